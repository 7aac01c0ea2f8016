"""What a source of very many pictures costs: time until the first answer behind the model's loading, and memory.

    python benchmarks/listing.py --into /tmp/listing --entries 1000000
    python benchmarks/listing.py --into /tmp/listing --entries 1000000 --kinds txt parquet --answers 200000

Makes a source of each kind, once: a list (txt), a table (csv), Parquet files of paths (parquet) and of bytes (bytes), a
tar file (tar) and a folder of links (folder). Then it runs the job on each, in a process of its own, with an answerer
that says the same of every picture at once, until so many answers are written, and prints when the first one was, and
the most memory that the process has held, with what torch and the package take of it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

KINDS = ("txt", "csv", "parquet", "bytes", "tar", "folder")
GROUP = 10_000
"""Rows of a Parquet file that are written at once."""


def picture() -> bytes:
    """Returns the bytes of a small picture."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


def name(number: int) -> str:
    """Returns the path of a picture below the folder; all are links to one."""
    return f"pictures/{number // 10_000:05d}/{number:09d}.png"


def made(folder: Path, kind: str, count: int) -> Path:
    """Makes a source where it is missing."""
    place = folder / {"bytes": "bytes.parquet", "folder": "pictures", "parquet": "paths.parquet"}.get(
        kind, f"list.{kind}"
    )
    if kind not in ("bytes", "tar"):
        _links(folder, count)
    if place.exists():
        return place
    draft = place.with_suffix(".draft")
    if kind in ("txt", "csv"):
        with draft.open("w") as file:
            file.writelines(["image\n"] if kind == "csv" else [])
            file.writelines(f"{name(number)}\n" for number in range(count))
    elif kind == "tar":
        content = picture()
        with tarfile.open(draft, "w") as tar:
            for number in range(count):
                about = tarfile.TarInfo(f"{number:09d}.png")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    else:
        _write_parquet(draft, ({"image": picture() if kind == "bytes" else name(n)} for n in range(count)))
    draft.rename(place)
    return place


def _links(folder: Path, count: int) -> None:
    """Makes a folder of hard links, which take no room; a file has 60,000 at most."""
    if (folder / "pictures").exists():
        return
    draft, content = folder / "pictures.draft", picture()
    for number in range(count):
        place = draft / Path(*Path(name(number)).parts[1:])
        if number % 10_000 == 0:
            place.parent.mkdir(parents=True)
            first = place
            first.write_bytes(content)
        else:
            os.link(first, place)
    draft.rename(folder / "pictures")


def _write_parquet(place: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    group = list(islice(rows, GROUP))
    with parquet.ParquetWriter(place, arrow.Table.from_pylist(group).schema) as writer:
        while group:
            writer.write_table(arrow.Table.from_pylist(group))
            group = list(islice(rows, GROUP))


class Said:
    """Answers everything at once, in place of a model."""

    rows = ahead = 8
    peak_memory = 0

    def __init__(self, limit: int) -> None:
        from vlmfix.card import Known

        self.known, self.limit = Known(None, {}, "float32", {}, "cpu"), limit
        self.begun = time.perf_counter()
        self.first: float | None = None

    def __call__(self, batches: Any, answered: Any) -> Iterator[Any]:  # noqa: ANN401
        """Yields an answer for each question, up to the limit."""
        from vlmfix.generation import Answer

        done = 0
        for batch in batches:
            if self.first is None:
                self.first = time.perf_counter() - self.begun
            yield [(item, Answer("red", 1, "eos", 0.0, (5,))) for item, _ in batch]
            done += len(batch)
            if done >= self.limit:
                return


def measure(place: Path, out: Path, limit: int) -> dict[str, float]:
    """Runs the job in this process; gives seconds and bytes."""
    from vlmfix.jobs.folder import Questions, job
    from vlmfix.settings import Settings

    begun = time.perf_counter()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answerers: list[Said] = []

    def answerer(*_: object) -> Said:
        answerers.append(Said(limit))
        return answerers[0]

    job.Answerer = answerer  # type: ignore[assignment,misc]
    job.run(
        place,
        out,
        questions=Questions.text("What?"),
        settings=Settings(),
        batch_size=8,
        loader=lambda *_, **__: None,  # type: ignore[arg-type,return-value]
    )
    return {
        "counted": answerers[0].begun - begun,
        "first": answerers[0].first or 0.0,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "base": base,
    }


def main() -> None:
    """Prints a line for each kind of source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, required=True, help="a folder for the sources and the answers")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--answers", type=int, default=50_000, help="answers after which it is enough")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one, given.answers)))
        return
    given.into.mkdir(parents=True, exist_ok=True)
    print("| source | counted in | first answer after loading | most memory | of it before the job |")
    print("| --- | --- | --- | --- | --- |")
    for kind in given.kinds:
        place, out = made(given.into, kind, given.entries), given.into / f"answers-{kind}-{os.getpid()}"
        options = ["--into", given.into, "--answers", given.answers, "--one", place, out]
        said = subprocess.run(
            [sys.executable, __file__, *map(str, options)], check=True, stdout=subprocess.PIPE, text=True
        )
        row = json.loads(said.stdout.splitlines()[-1])
        print(
            f"| {kind} | {row['counted']:.1f} s | {row['first']:.2f} s | {row['peak'] / 1e6:.0f} MB "
            f"| {row['base'] / 1e6:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
