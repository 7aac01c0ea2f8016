"""Writes the folder of maps beside a run's answers: the pictures that a refining decoder made, and their maps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from vlmfix.decoders.picture.refined import Look, Refined, pixel_box
from vlmfix.errors import DataError
from vlmfix.files import make_folder, plain_name, remove_drafts, replacing, resolved
from vlmfix.jobs.ledger import CardFolder
from vlmfix.shapes import OBJECT, TEXT, fields

INDEX, CARD = "maps.jsonl", "maps.json"
ENTRY = fields({"image": TEXT, "prompt": TEXT, "shown": TEXT})
MAPS = fields({"settings": OBJECT})
LONGEST_PATH = 3800
"""Most bytes of a path without the endings of files and of their drafts: 4096 are allowed with them."""
LINE = 2
"""Width of the box's line in pixels."""


class MapFolder(CardFolder):
    """Writes refined pictures and maps.

    For each question about a picture: ``NAME.KEY.png``, the refined picture; ``NAME.KEY.map.png``, the map in colours
    over the picture, with the box; ``NAME.KEY.map.npy``, its cells; and a line in ``maps.jsonl``. NAME is the picture's
    path below the pictures' folder, shortened where a file name cannot hold it, KEY stands for the prompt. Questions
    that a resumed run asks again are written again: the last of equal lines counts. ``maps.json`` says which run the
    maps belong to; it is written with the first map.

    Args:
        folder: Made when it is missing.
        settings: Settings that the maps depend on.
    """

    card_name: ClassVar = CARD
    card_shape: ClassVar = MAPS
    holds: ClassVar = "maps"
    option: ClassVar = "--save-maps"

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, {INDEX: ENTRY})
        self._settings = dict(settings)
        self._begun = False

    def new_card(self) -> dict[str, Any]:
        """Makes a card with the settings alone."""
        return {"settings": self._settings}

    def go_on(self) -> None:
        """Refuses settings that differ from the card's."""
        self.refuse_other(self.card["settings"], self._settings)
        self._begun = True

    def read_back(self) -> None:
        """Finds lines that are none of a run's, which reading them says."""
        for _ in self.lines[INDEX]:
            pass

    def tidy(self) -> None:
        """Removes the drafts that a kill has left, in all folders below."""
        for parent, _, _ in os.walk(self.folder):
            remove_drafts(Path(parent))

    def save(self, image: str, picture: Image.Image, prompt: str, refined: Refined) -> None:
        """Writes the refined picture and the map of one picture for one question.

        Args:
            image: The picture's path below the pictures' folder.
            picture: The picture itself.
            prompt: The question.
            refined: The decoder's result, with a single look.

        Raises:
            DataError: A file cannot be written.
        """
        if not self._begun:
            self.write_card()
            self._begun = True
        (look,) = refined.looks
        stem = self._stem(image, prompt)
        record = {
            "image": image,
            "prompt": prompt,
            "box": [round(edge, 6) for edge in look.box],
            "shown": f"{stem}.png",
        }
        self._make_parent(stem)
        with replacing(self.folder / f"{stem}.png", tidied=True) as file:
            look.picture.save(file, format="PNG")
        if look.map is not None:
            with replacing(self.folder / f"{stem}.map.png", tidied=True) as file:
                overlay(picture, look).save(file, format="PNG")
            with replacing(self.folder / f"{stem}.map.npy", tidied=True) as file:
                np.save(file, look.map.values)
            record |= {"map": f"{stem}.map.npy", "map_box": [round(edge, 6) for edge in look.map.box]}
        self.lines[INDEX].append({**record, "problem": look.problem} if look.problem else record)

    def _stem(self, image: str, prompt: str) -> str:
        """Returns the common beginning of one question's file names, below the folder."""
        key = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:8]
        longest = os.pathconf(self.folder, "PC_NAME_MAX")
        room = longest - len(f".{key}.map.npy")
        *above, name = image.split("/")
        stem = "/".join([*(plain_name(part, longest) for part in above), plain_name(name, room)])
        if len(os.fsencode(self.folder / stem)) > LONGEST_PATH:
            stem = plain_name(image, room)
        return f"{stem}.{key}"

    def _make_parent(self, stem: str) -> None:
        parent = (self.folder / stem).parent
        make_folder(parent)
        if not resolved(parent).is_relative_to(resolved(self.folder)):
            raise DataError(f"{parent} leads out of {self.folder} by a link", "choose another --save-maps")


def overlay(picture: Image.Image, look: Look) -> Image.Image:
    """Draws the map in colours over a picture, dark to bright, and a white box around the part that was cut out.

    Args:
        picture: RGB.
        look: A look at it; without a map the picture alone is drawn.
    """
    width, height = picture.size
    drawn = np.asarray(picture).copy()  # (height, width, 3)
    if look.map is not None:
        values = np.nan_to_num(look.map.pixels(height, width))
        low, high = float(values.min()), float(values.max())
        levels = ((values - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
        colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
        drawn = cv2.addWeighted(drawn, 0.5, colours, 0.5, 0)
    x0, y0, x1, y1 = pixel_box(look.box, width, height)
    cv2.rectangle(drawn, (x0, y0), (x1 - 1, y1 - 1), (255, 255, 255), LINE)
    return Image.fromarray(drawn)
