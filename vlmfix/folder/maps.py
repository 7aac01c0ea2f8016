"""The folder of maps that a run writes beside its answers: what a refining decoder made of each picture, and why."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

import cv2
import numpy as np
from PIL import Image

from vlmfix.decoders.refined import Look, Refined, pixel_box
from vlmfix.errors import DataError
from vlmfix.records import JsonLines

INDEX = "maps.jsonl"
LINE = 2
"""Pixels that the box's line is wide."""


class MapFolder:
    """Refined pictures and maps; holds the folder's lock while it is open.

    For each question about a picture: ``NAME.KEY.png``, the refined picture; ``NAME.KEY.map.png``, the map in colours
    over the picture, with the box; ``NAME.KEY.map.npy``, its cells; and a line in ``maps.jsonl``. NAME is the picture's
    path below the pictures' folder, KEY stands for the prompt. Questions that a killed run asks again are written
    again: of equal lines the last counts.

    Args:
        folder: Made when it is missing.

    Raises:
        UsageError: Another process writes there.
        DataError: The folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {folder}: {error.strerror}", "choose another folder") from error
        self._index = JsonLines(folder / INDEX)

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
        (look,) = refined.looks
        stem = f"{image}.{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
        record = {
            "image": image,
            "prompt": prompt,
            "box": [round(edge, 6) for edge in look.box],
            "shown": f"{stem}.png",
        }
        try:
            (self.folder / stem).parent.mkdir(parents=True, exist_ok=True)
            look.picture.save(self.folder / f"{stem}.png")
            if look.map is not None:
                overlay(picture, look).save(self.folder / f"{stem}.map.png")
                np.save(self.folder / f"{stem}.map.npy", look.map.values)
                record |= {"map": f"{stem}.map.npy", "map_box": [round(edge, 6) for edge in look.map.box]}
        except OSError as error:
            raise DataError(f"cannot write into {self.folder}: {error.strerror or error}", "make room there") from error
        self._index.append({**record, "problem": look.problem} if look.problem else record)

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
