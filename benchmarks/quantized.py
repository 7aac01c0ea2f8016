"""What quantized weights cost: memory, and milliseconds of a step of ``greedy``, for a model of true shapes.

    python benchmarks/quantized.py --into /tmp/folder                        # bfloat16, int8 and int4
    python benchmarks/quantized.py --into /tmp/folder --rows 1 8 -- int4

The model has random weights and is saved once, as by benchmarks/folder.py; each way of loading it has a process of its
own. A step is the difference between answers of 8 and of 40 tokens, by the shortest of three each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from folder import prepare
from PIL import Image

from vlmfix.bench.shapes import SHAPES, usual
from vlmfix.generation import VLM, load

WAYS = ("bfloat16", "int8", "int4")
SHORT, LONG = 8, 40


def fastest(vlm: VLM, rows: int, tokens: int) -> float:
    """Returns the seconds of the shortest of three answers of so many tokens, after one that records steps."""
    pictures = [Image.effect_noise((336, 336), 80).convert("RGB") for _ in range(rows)]
    found = []
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        answers = vlm.generate(pictures, "What is there?", decoder="greedy", max_new_tokens=tokens)
        found.append(time.perf_counter() - started)
        short = [len(answer.ids) for answer in answers if len(answer.ids) != tokens]
        if short:
            raise SystemExit(f"an answer ended after {short[0]} of {tokens} tokens: choose other weights")
    return min(found[1:])


def measure(model: Path, way: str, rows: list[int]) -> None:
    """Prints a line for each number of rows."""
    vlm = load(model, device="cuda", dtype="bfloat16", quantize=None if way == WAYS[0] else way)
    held = torch.cuda.memory_allocated() / 2**30
    for count in rows:
        short, long = (fastest(vlm, count, tokens) for tokens in (SHORT, LONG))
        step = 1000 * (long - short) / (LONG - SHORT)
        print(f"{way}, {count} rows: {step:.1f} ms a step, the weights take {held:.1f} GiB", flush=True)


def main() -> None:
    """Measures each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", help="bfloat16, int8, int4", default=WAYS)
    parser.add_argument("--into", type=Path, required=True, help="a folder for the model")
    parser.add_argument("--shapes", choices=SHAPES, default=usual("auto"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        measure(given.into, given.ways[0], given.rows)
        return
    model, _ = prepare(given.into, given.shapes, 1)
    for way in given.ways:
        rows = ["--rows", *map(str, given.rows)]
        subprocess.run([sys.executable, __file__, "--into", str(model), "--here", *rows, "--", way], check=True)


if __name__ == "__main__":
    main()
