"""The folder of maps that a run writes beside its answers: what a refining decoder made of each picture, and why."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from PIL import Image

from vlmfix.decoders.picture.refined import Look, Refined, pixel_box
from vlmfix.errors import DataError, UsageError
from vlmfix.files import make_folder, plain_name, remove_drafts, replacing
from vlmfix.records import JsonLines, read_json, refuse_other, replace_json
from vlmfix.shapes import OBJECT, TEXT, fields

INDEX, CARD = "maps.jsonl", "maps.json"
ENTRY = fields({"image": TEXT, "prompt": TEXT, "shown": TEXT})
MAPS = fields({"settings": OBJECT})
LONGEST_PATH = 3800
"""Bytes of a path to which the endings of the files' names and of their drafts can still be added: 4096 are allowed."""
LINE = 2
"""Pixels that the box's line is wide."""


class MapFolder:
    """Refined pictures and maps; holds the folder's lock while it is open.

    For each question about a picture: ``NAME.KEY.png``, the refined picture; ``NAME.KEY.map.png``, the map in colours
    over the picture, with the box; ``NAME.KEY.map.npy``, its cells; and a line in ``maps.jsonl``. NAME is the picture's
    path below the pictures' folder, shortened where a file could not have it, KEY stands for the prompt. Questions that
    a killed run asks again are written again: of equal lines the last counts. ``maps.json`` says whose maps they are.

    Args:
        folder: Made when it is missing.
        settings: What the maps depend on.

    Raises:
        UsageError: Another process writes there, or the folder holds maps made with other settings.
        DataError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._settings = dict(settings)
        make_folder(folder)
        with ExitStack() as opened:
            self._index = opened.enter_context(JsonLines(folder / INDEX, ENTRY))
            self._claim()
            opened.pop_all()
        self._longest = os.pathconf(folder, "PC_NAME_MAX")

    def _claim(self) -> None:
        """Finds that the folder is this run's, or nobody's; its card is written with the first map."""
        path = self.folder / CARD
        self._begun = path.exists()
        if self._begun:
            refuse_other(self.folder, path, read_json(path, MAPS)["settings"], self._settings)
        elif not self._index.is_empty:
            raise UsageError(f"{self.folder} holds maps but no {CARD}", "choose another --save-maps")
        for _ in self._index:  # says which line is none of a run's
            pass
        self._index.claim()
        for parent, _, _ in os.walk(self.folder):
            remove_drafts(Path(parent))

    def save(self, image: str, picture: Image.Image, prompt: str, refined: Refined) -> None:
        """Writes what was made of one picture for one question.

        Args:
            image: The picture's path below the pictures' folder.
            picture: The picture itself.
            prompt: The question.
            refined: What the decoder made of it, a single look.

        Raises:
            DataError: A file cannot be written.
        """
        if not self._begun:
            replace_json(self.folder / CARD, {"settings": self._settings})
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
        self._index.append({**record, "problem": look.problem} if look.problem else record)

    def _stem(self, image: str, prompt: str) -> str:
        """What the names of one question's files begin with, below the folder."""
        key = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:8]
        room = self._longest - len(f".{key}.map.npy")
        *above, name = image.split("/")
        stem = "/".join([*(plain_name(part, self._longest) for part in above), plain_name(name, room)])
        if len(os.fsencode(self.folder / stem)) > LONGEST_PATH:
            stem = plain_name(image, room)
        return f"{stem}.{key}"

    def _make_parent(self, stem: str) -> None:
        parent = (self.folder / stem).parent
        make_folder(parent)
        if not parent.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"{parent} leads out of {self.folder} by a link", "choose another --save-maps")

    def close(self) -> None:
        """Gives the lock back."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def overlay(picture: Image.Image, look: Look) -> Image.Image:
    """The map in colours over a picture, dark to bright, and a white box around what was cut out.

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
