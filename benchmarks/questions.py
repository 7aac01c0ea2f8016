"""What it saves to ask several questions about one picture at once, at LLaVA-1.5-7B's shapes with random weights.

    python benchmarks/questions.py --layers 8

Rows of a batch that hold the same picture object share its encoding and the beginning of their prompts; copies of the
picture share nothing. Short answers, as POPE asks for: nearly all of the time is the prompt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from PIL import Image

from vlmfix.bench import shapes
from vlmfix.generation import VLM

NAMES = ("cup", "dog", "chair", "car", "person", "bottle", "dining table", "traffic light", "umbrella")


def seconds(vlm: VLM, pictures: Sequence[Image.Image], prompts: Sequence[str], decoder: str, repeats: int) -> float:
    """Mean time of one batch, after one to warm up."""
    for count in (1, repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            vlm.generate(pictures, prompts, decoder=decoder, max_new_tokens=2)
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def main() -> None:
    """Prints questions per second with and without sharing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    vlm = shapes.llava(layers=given.layers, device="cuda")
    noise = torch.Generator().manual_seed(0)
    shown = [
        Image.fromarray(torch.randint(256, (480, 640, 3), generator=noise, dtype=torch.uint8).numpy())
        for _ in range(given.pictures)
    ]
    rows = [(picture, f"Is there a {name} in the image?") for picture in shown for name in NAMES]
    prompts = [prompt for _, prompt in rows]
    for decoder in ("greedy", "vcd"):
        shared = seconds(vlm, [picture for picture, _ in rows], prompts, decoder, given.repeats)
        alone = seconds(vlm, [picture.copy() for picture, _ in rows], prompts, decoder, given.repeats)
        count = len(rows)
        print(f"{decoder}: {count / shared:.1f} questions/s shared, {count / alone:.1f} not", flush=True)


if __name__ == "__main__":
    main()
