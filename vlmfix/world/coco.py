"""A folder of scenes that any COCO tool reads: pictures, boxes, masks, captions and POPE questions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from vlmfix.errors import DataError
from vlmfix.files import is_draft, make_folder, remove_drafts, replacing
from vlmfix.world import pope
from vlmfix.world.captions import references
from vlmfix.world.categories import CATEGORIES, DRAWN, category
from vlmfix.world.masks import Mask, runs, visible
from vlmfix.world.render import render
from vlmfix.world.scenes import CANVAS, Placed, Scene, scene

VERSION = 2  # of the world: any change of a pixel or an annotation raises it
CAPTIONS = 5
CARD = "world.json"
CARD_SIZE = 1 << 16
"""Bytes; no card comes near."""


def make(directory: Path, *, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Write a world to a folder; go on with one that was begun.

    The folder gets `images/%012d.png` (512x512), `annotations/instances.json`, `annotations/captions.json`,
    `pope/random.json`, `pope/popular.json`, `pope/adversarial.json` and `world.json`. The picture with
    number n shows `scene(seed, n)`. The same arguments give the same pixels and the same annotation bytes
    everywhere.

    Args:
        directory: Where to write; created when missing.
        count: Number of scenes, 1 or more.
        seed: Seed of the world.
        progress: Called with the number of pictures that exist, after each one.

    Raises:
        DataError: The count is not positive, the folder holds something else than this world, or it cannot be written.
    """
    if count < 1:
        raise DataError(f"{count} scenes are too few", hint="draw 1 or more")
    _claim(directory, {"version": VERSION, "count": count, "seed": seed, "size": CANVAS})
    for index in range(count):
        path = directory / "images" / image_name(index)
        if not os.path.exists(path):
            picture = render([scene(seed, index)])[0].permute(1, 2, 0).contiguous()  # (512, 512, 3)
            with replacing(path, tidied=True) as file:
                Image.fromarray(picture.numpy()).save(file, format="PNG", compress_level=4)
        if progress is not None:
            progress(index + 1)
    _annotate(directory, count, seed)


def image_name(index: int) -> str:
    """File name of a scene's picture, such as 000000000042.png."""
    return f"{index:012d}.png"


def instances(drawn: Scene) -> list[Placed]:
    """Objects of a scene in the order of its annotations: left to right, easy and hard alike."""
    return sorted(drawn.objects, key=_place)


def objects(drawn: Scene) -> list[str]:
    """Category names of a scene without repeats, in the order of its annotations."""
    return list(dict.fromkeys(placed.category for placed in instances(drawn)))


def _claim(directory: Path, card: dict[str, int]) -> None:
    """Make the folder this world's own, or find that it is.

    Raises:
        DataError: It belongs to something else.
    """
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise DataError(f"{directory} is a file", hint="name a folder")
    make_folder(directory)
    path = directory / CARD
    if os.path.exists(path):
        found = _read(path)
        if found != card:
            raise DataError(f"{directory} holds another world: {found}, not {card}", hint="name an empty or new folder")
    elif not all(is_draft(entry) for entry in directory.iterdir()):
        raise DataError(f"{directory} is not empty and holds no {CARD}", hint="name an empty or new folder")
    else:
        _write(path, [json.dumps(card, indent=2), "\n"])
    for folder in (directory, *(directory / name for name in ("images", "annotations", "pope"))):
        make_folder(folder)
        remove_drafts(folder)


def _read(path: Path) -> dict[str, int] | None:
    """What a world's card says; None when the file is none."""
    if not os.path.isfile(path) or path.stat().st_size > CARD_SIZE:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _annotate(directory: Path, count: int, seed: int) -> None:
    """Write every annotation file that is missing."""
    writers: dict[Path, Callable[[], Iterator[str]]] = {
        directory / "annotations" / "instances.json": lambda: _instances(count, seed),
        directory / "annotations" / "captions.json": lambda: _captions(count, seed),
    }
    for path, pieces in writers.items():
        if not os.path.exists(path):
            _write(path, pieces())
    paths = {split: directory / "pope" / f"{split}.json" for split in pope.SPLITS}
    if all(os.path.exists(path) for path in paths.values()):
        return
    pictures = pope.choose(((image_name(index), objects(scene(seed, index))) for index in range(count)), seed=seed)
    names = [entry.name for entry in DRAWN]
    for split, path in paths.items():
        _write(path, (f"{line}\n" for line in pope.lines(pictures, split=split, seed=seed, names=names)))


def _instances(count: int, seed: int) -> Iterator[str]:
    """Pieces of `instances.json`."""
    categories = [{"supercategory": entry.supercategory, "id": entry.id, "name": entry.name} for entry in CATEGORIES]
    placed = ((index, *item) for index in range(count) for item in _masked(scene(seed, index)))
    yield from _head(count, seed)
    yield from _list("annotations", (_instance(n, *found) for n, found in enumerate(placed, start=1)))
    yield f',\n"categories":{_text(categories)}}}\n'


def _masked(drawn: Scene) -> list[tuple[Placed, Mask]]:
    """Objects with their visible pixels, in the order of the annotations."""
    return sorted(zip(drawn.objects, visible(drawn), strict=True), key=lambda item: _place(item[0]))


def _place(placed: Placed) -> tuple[tuple[int, int, int, int], str]:
    """What annotations are sorted by."""
    return placed.box, placed.category


def _instance(number: int, index: int, placed: Placed, mask: Mask) -> dict[str, Any]:
    x0, y0, x1, y1 = placed.box
    return {
        "segmentation": runs(mask),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "image_id": index,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "category_id": category(placed.category).id,
        "id": number,
    }


def _captions(count: int, seed: int) -> Iterator[str]:
    """Pieces of `captions.json`."""
    told = ((index, text) for index in range(count) for text in references(scene(seed, index), CAPTIONS))
    yield from _head(count, seed)
    yield from _list(
        "annotations",
        ({"image_id": index, "id": n, "caption": text} for n, (index, text) in enumerate(told, start=1)),
    )
    yield "}\n"


def _head(count: int, seed: int) -> Iterator[str]:
    """What both annotation files begin with."""
    info = {"description": f"vlmfix world, seed {seed}", "version": str(VERSION), "contributor": "vlmfix"}
    licence = {
        "id": 1,
        "name": "Sprites: SIL Open Font License 1.1",
        "url": "https://openfontlicense.org",
    }
    yield f'{{"info":{_text(info)},\n"licenses":{_text([licence])},\n'
    yield from _list(
        "images",
        (
            {"license": 1, "file_name": image_name(index), "height": CANVAS, "width": CANVAS, "id": index}
            for index in range(count)
        ),
    )
    yield ",\n"


def _list(key: str, entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One key with its list, an entry a line."""
    separators = chain([""], iter(lambda: ",", None))
    yield f'"{key}":['
    for separator, entry in zip(separators, entries, strict=False):
        yield f"{separator}\n{_text(entry)}"
    yield "]"


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _write(path: Path, pieces: Iterable[str]) -> None:
    """Write a file as a whole or not at all, with the same bytes on every system."""
    with replacing(path) as file:
        file.writelines(piece.encode() for piece in pieces)
