"""What ``vlmfix run`` makes of a folder: tokens per second over pictures of 1024x768, with a model of true shapes.

    python benchmarks/folder.py --into /tmp/folder greedy spin:kept_share=0.95,suppression=0.08,layers=all vcd
    python benchmarks/folder.py --into /tmp/folder --shapes tiny --pictures 16 greedy
    python benchmarks/folder.py --into /tmp/folder --pictures 4096 --cards 1 2 -- greedy

Saves a model with random weights and makes JPEGs, once, and then runs the command for one decoder after the other, each
in a process of its own. The time of a run's card is that of its batches, without loading the model; how busy a GPU was
in that time is asked of nvidia-smi (the share of the time in which some kernel ran). With ``--cards`` each decoder runs
once with so many GPUs, in one command (``--devices``), or with ``--steal`` in a worker for each; the rate is that at
which answers came in from when every GPU had given its first batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmfix.bench.shapes import SHAPES, usual


def draw(path: Path, number: int) -> None:
    """Writes a picture of blurred noise, another one for each number."""
    dice = torch.Generator().manual_seed(number)
    small = torch.randint(256, (96, 128, 3), generator=dice, dtype=torch.uint8).numpy()
    Image.fromarray(small).resize((1024, 768), Image.Resampling.BICUBIC).save(path, quality=90)


def prepare(folder: Path, shapes: str, count: int) -> tuple[Path, Path]:
    """Makes the model's folder and that of the pictures, where they are missing."""
    model, pictures = folder / f"model-{shapes}", folder / f"pictures-{count}"
    if not model.exists():
        vlm = SHAPES[shapes]()
        vlm.model.save_pretrained(model)
        vlm.processor.save_pretrained(model)
    if not pictures.exists():
        pictures.mkdir(parents=True)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: draw(pictures / f"{number:05d}.jpg", number), range(count)))
    return model, pictures


class Watched:
    """Asks nvidia-smi five times a second how busy the first GPU is, inside the block; says nothing without it."""

    def __enter__(self) -> Watched:
        """Begins to ask."""
        asked = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200", "--id=0"]
        tool = shutil.which("nvidia-smi")
        self.process = tool and subprocess.Popen([tool, *asked], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends, and keeps what was answered."""
        self.values: list[int] = []
        if self.process:
            self.process.terminate()
            said = self.process.communicate()[0]
            self.values = [int(line) for line in said.split() if line.isdigit()]

    def busy(self, seconds: float) -> float | None:
        """Returns the mean of the last so many seconds in percent, or None when nobody answered."""
        last = self.values[-max(1, round(5 * seconds)) :]
        return sum(last) / len(last) if last else None


def run(model: Path, pictures: Path, out: Path, decoder: str, tokens: int) -> dict[str, Any]:
    """Runs the command once and reads its card."""
    shutil.rmtree(out, ignore_errors=True)
    options = ["--model", model, "--out", out, "--decoder", decoder, "--max-new-tokens", tokens]
    started = time.perf_counter()
    with Watched() as watched:
        subprocess.run([sys.executable, "-m", "vlmfix", "run", *map(str, [pictures, *options])], check=True)
    wall = time.perf_counter() - started
    card = json.loads((out / "run.json").read_text())
    totals = card["totals"]
    return {
        "wall": wall,
        "tokens": totals["tokens"],
        "per_second": totals["tokens"] / totals["seconds"],
        "batch": card["sessions"][-1]["batch_size"],
        "peak": card["peak_memory"] / 2**30,
        "busy": watched.busy(totals["seconds"]),
    }


class Counted:
    """Counts the answers of a run five times a second, inside the block."""

    def __init__(self, out: Path, answers: str) -> None:
        """Looks at the files below a folder that a pattern names, which may come later."""
        self.out, self.answers = out, answers
        self.seen: list[tuple[float, int]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look)

    def __enter__(self) -> Counted:
        """Begins to count."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends."""
        self.over.set()
        self.thread.join()

    def look(self) -> None:
        """Writes down when the number of lines grew, until it is over."""
        before, sizes = 0, {}
        while not self.over.wait(0.2):
            for file in self.out.glob(self.answers):
                with suppress(
                    FileNotFoundError
                ):  # a part of a block, whose number comes first, has moved to what is done
                    sizes[file.parent.name[:8]] = file.read_bytes().count(b"\n")
            if (count := sum(sizes.values())) > before:
                before = count
                self.seen.append((time.perf_counter(), count))

    def rate(self, first: int) -> float:
        """Returns answers per second from the moment when so many were there to the last one."""
        began, before = next(pair for pair in self.seen if pair[1] >= first)
        ended, after = self.seen[-1]
        return (after - before) / (ended - began)


def spread(
    model: Path, pictures: Path, out: Path, decoder: str, tokens: int, cards: int, steal: bool
) -> tuple[float, int]:
    """Answers all pictures once on so many GPUs; returns answers per second and rows of a batch."""
    shutil.rmtree(out, ignore_errors=True)
    options = ["--model", model, "--out", out, "--decoder", decoder, "--max-new-tokens", tokens]
    command = [sys.executable, "-m", "vlmfix", "run", *map(str, [pictures, *options])]
    if steal:
        with Counted(out, "blocks/*/*/lines.jsonl") as counted:
            workers = [
                subprocess.Popen([*command, "--steal"], env=os.environ | {"CUDA_VISIBLE_DEVICES": str(card)})
                for card in range(cards)
            ]
            if any([worker.wait() for worker in workers]):
                raise SystemExit("a worker failed")
        subprocess.run([sys.executable, "-m", "vlmfix", "merge", str(out)], check=True)
    else:
        with Counted(out, "answers.jsonl") as counted:
            subprocess.run([*command, "--devices", ",".join(map(str, range(cards)))], check=True)
    batch = json.loads((out / "run.json").read_text())["sessions"][-1]["batch_size"]
    return counted.rate(cards * batch), batch


def main() -> None:
    """Prints a line for each decoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("decoders", nargs="+", metavar="DECODER", help="as --decoder takes it")
    parser.add_argument("--into", type=Path, required=True, help="a folder for the model, the pictures and the answers")
    parser.add_argument("--shapes", choices=SHAPES, default=usual("auto"))
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cards", type=int, nargs="+", help="run each decoder with so many GPUs, one after the other")
    parser.add_argument("--steal", action="store_true", help="with --cards: a worker for each, in its own process")
    given = parser.parse_args()
    model, pictures = prepare(given.into, given.shapes, given.pictures)
    if given.cards:
        print(f"{given.pictures} JPEGs of 1024x768, at most {given.tokens} tokens each")
        for spec, cards in itertools.product(given.decoders, given.cards):
            out = given.into / f"out-{'steal' if given.steal else 'devices'}-{cards}"
            rate, batch = spread(model, pictures, out, spec, given.tokens, cards, given.steal)
            print(
                f"{spec}, {cards} GPUs{', --steal' * given.steal}: {rate:.1f} pictures/s, batches of {batch}",
                flush=True,
            )
        return
    found = {spec: run(model, pictures, given.into / "out", spec, given.tokens) for spec in given.decoders}
    print(f"{given.pictures} JPEGs of 1024x768, at most {given.tokens} tokens each")
    for spec, row in found.items():
        busy = "" if row["busy"] is None else f", GPU busy {row['busy']:.0f} %"
        print(
            f"{spec}: {row['per_second']:.0f} tokens/s, batches of {row['batch']:.0f}, peak {row['peak']:.1f} GiB, "
            f"{row['wall']:.0f} s with loading, {row['tokens']:.0f} tokens{busy}"
        )


if __name__ == "__main__":
    main()
