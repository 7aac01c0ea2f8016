"""What the drawn world looks like in numbers: `python benchmarks/world.py` prints the shares of docs/world.md."""

from __future__ import annotations

import json

from vlmfix.world.coco import image_name, objects
from vlmfix.world.contexts import CONTEXTS
from vlmfix.world.pope import SPLITS, choose, lines, question
from vlmfix.world.scenes import scene
from vlmfix.world.sprites import SIZES


def main(count: int = 1500, seed: int = 0) -> None:
    """Prints shares of objects by size, faintness and darkness, and of POPE's no questions that fit the place."""
    scenes = [scene(seed, index) for index in range(count)]
    placed = [entry for drawn in scenes for entry in drawn.objects]
    shares = {
        "large (from 96 px)": sum(SIZES[entry.size] >= 96 for entry in placed),
        "medium (from 48 px)": sum(48 <= SIZES[entry.size] < 96 for entry in placed),
        "small": sum(SIZES[entry.size] < 48 for entry in placed),
        "faint": sum(entry.cover < 256 for entry in placed),
        "dark": sum(max(entry.tint) < 160 for entry in placed),
    }
    print(f"{len(scenes)} scenes, {len(placed)} objects")
    for name, number in shares.items():
        print(f"{name:20} {number / len(placed):.3f}")
    weights = {context.name: context.weights for context in CONTEXTS}
    place = {image_name(drawn.index): drawn.context for drawn in scenes}
    chosen = choose([(image_name(drawn.index), objects(drawn)) for drawn in scenes], seed=seed)
    for split in SPLITS:
        asked = [json.loads(line) for line in lines(chosen, split=split, seed=seed)]
        no = [entry for entry in asked if entry["label"] == "no"]
        fits = sum(any(question(name) == e["text"] for name in weights[place[e["image"]]]) for e in no)
        print(f"POPE {split}, no questions that fit the place: {fits / len(no):.3f}")


if __name__ == "__main__":
    main()
