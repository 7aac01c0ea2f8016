"""Writes the answers of a run in other forms, from its folder alone: CSV, Parquet, and COCO's results of captions."""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from vlmfix.errors import DataError, UsageError
from vlmfix.extras import need
from vlmfix.files import replacing
from vlmfix.jobs.lines import ANSWER, ANSWERS, CARD, FAILED, FAILURE
from vlmfix.jobs.shards import shards_in
from vlmfix.records import read_json, read_lines, to_json
from vlmfix.shapes import FLAG, fields

JSONL = "jsonl"
"""The form that a run writes itself, answer by answer, and that the others are made from."""
NAMES = {"csv": "answers.csv", "parquet": "answers.parquet", "coco": "answers.coco.json"}
"""Forms, and what their files are called in a run's folder."""
IMAGES = "-images.json"
"""What the file beside COCO's results is called behind their name: which number is which picture."""
TEXTS = ("image", "sha256", "prompt", "answer", "finish", "failed")
COLUMNS = ("image", "prompt", "answer", "tokens", "finish", "seconds", "logprob", "entropy", "sar", "failed", "sha256")
"""Columns of tables, the names of ``answers.jsonl``; ``failed`` is the reason where there is no answer."""
UNSAFE = ("=", "+", "-", "@", "\t", "\r", "'")
"""What a cell must not begin with, for a spreadsheet takes it for a formula; the last is what stands before these."""
GROUP = 10_000
"""Rows of a Parquet file that are written at once."""
MARK = b"vlmfix"
"""Key in a Parquet file's metadata, by which it is known again."""
DIGITS = re.compile(r"(\d{1,18})$", re.ASCII)

Line = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """Says what was written.

    Attributes:
        files: The files.
        rows: Answers and failures in them.
        finished: Whether the run was finished.
    """

    files: tuple[Path, ...]
    rows: int
    finished: bool


def targets(folder: Path, kind: str, out: Path | None = None) -> tuple[Path, ...]:
    """Lists the files that an export will write, and makes sure that it may; see ``export``.

    Raises:
        UsageError: A file exists and is of something else.
        MissingExtraError: The form is ``parquet``, and pyarrow is not installed.
    """
    if kind == "parquet":
        need("parquet")
    target = folder / NAMES[kind] if out is None else out
    files = (target, target.with_name(f"{target.stem}{IMAGES}")) if kind == "coco" else (target,)
    for path in files:
        if os.path.exists(path) and not _is_ours(path, kind):
            raise UsageError(f"{path} is there, and no {kind} file of vlmfix", "move it away, or choose another --out")
    return files


def export(folder: Path, kind: str, out: Path | None = None) -> Exported:
    """Writes the answers of a folder in another form; a file that an export has written is written anew.

    Args:
        folder: A folder that ``vlmfix run`` wrote or writes, or that shards were merged into.
        kind: ``csv``, ``parquet`` or ``coco``.
        out: The file; None for the one of ``NAMES`` in the folder.

    Raises:
        UsageError: The file exists and is of something else; or a picture has several answers, which COCO's form has no
            place for.
        DataError: The folder is none of a run, or a file in it is damaged; or the file cannot be written.
        MissingExtraError: The form is ``parquet``, and pyarrow is not installed.
    """
    files = targets(folder, kind, out)
    if not os.path.exists(folder / CARD):
        joined = f"join its shards first: vlmfix merge {folder}" if shards_in(folder) else "give what vlmfix run wrote"
        raise DataError(f"{folder} holds no {CARD}", joined)
    finished = bool(read_json(folder / CARD, fields({"finished": FLAG}))["finished"])
    if kind == "coco":
        return Exported(files, _write_coco(folder, *files), finished)
    with replacing(files[0]) as file:
        return Exported(files, _TABLES[kind](folder, file), finished)


def _lines(folder: Path) -> Iterator[Line]:
    """Yields answers and then failures, with the columns of tables."""
    for line in read_lines(folder / ANSWERS, ANSWER):
        yield {name: line.get(name) for name in COLUMNS}
    for line in read_lines(folder / FAILED, FAILURE):
        known = {"image": line["image"], "prompt": line.get("prompt"), "failed": line["reason"]}
        yield {name: known.get(name) for name in COLUMNS}


def readable(value: str) -> str:
    """Returns a text that can be written: names from file systems that are not UTF-8 hold bytes that cannot."""
    return value.encode("utf-8", "backslashreplace").decode()


def _write_csv(folder: Path, file: BinaryIO) -> int:
    text = TextIOWrapper(file, encoding="utf-8", newline="")
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    count = 0
    for line in _lines(folder):
        table.writerow(line | {name: _cell(line[name]) for name in TEXTS})
        count += 1
    text.detach()  # flushes, and leaves the file to its owner
    return count


def _cell(value: str | None) -> str:
    """A text as a cell that no spreadsheet takes for a formula."""
    text = readable(value or "")
    return f"'{text}" if text.startswith(UNSAFE) else text


def _write_parquet(folder: Path, file: BinaryIO) -> int:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    kinds = {"tokens": arrow.int64(), **dict.fromkeys(("seconds", "logprob", "entropy", "sar"), arrow.float64())}
    columns = [(name, kinds.get(name, arrow.string())) for name in COLUMNS]
    schema = arrow.schema(columns, metadata={MARK: b"answers"})
    lines, count = _lines(folder), 0
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(lines, GROUP)):
            rows = [
                line | {name: None if line[name] is None else readable(line[name]) for name in TEXTS} for line in group
            ]
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def _write_coco(folder: Path, results: Path, images: Path) -> int:
    """Writes captions by the numbers of pictures, and which number is which picture."""
    names: dict[str, str] = {}
    for line in read_lines(folder / ANSWERS, ANSWER):
        if line["image"] in names:
            raise UsageError(
                f"{line['image']} has several answers in {folder}, and COCO's results have one caption for a picture",
                "take csv or parquet, or run one prompt into a folder of its own",
            )
        names[line["image"]] = ""
    numbers = _numbers(names)
    with replacing(images) as file:
        listed = ({"id": number, "file_name": readable(name)} for name, number in numbers.items())
        file.write(b'{"images": ' + _json_list(listed) + b"}\n")
    with replacing(results) as file:
        lines = read_lines(folder / ANSWERS, ANSWER)
        captions = ({"image_id": numbers[line["image"]], "caption": line["answer"]} for line in lines)
        file.write(_json_list(captions) + b"\n")
    return len(numbers)


def _numbers(names: dict[str, str]) -> dict[str, int]:
    """Numbers pictures by the digits at the end of their names, as COCO's are; or else in order, from 1."""
    found = {name: DIGITS.search(PurePosixPath(name).stem) for name in names}
    numbers = {name: int(digits[1]) for name, digits in found.items() if digits}
    if len(set(numbers.values())) == len(names):
        return numbers
    return {name: number for number, name in enumerate(names, start=1)}


def _json_list(entries: Iterator[Line]) -> bytes:
    return f"[{','.join(map(to_json, entries))}]".encode()


def _is_ours(path: Path, kind: str) -> bool:
    """Whether a file is what an export of this kind has written, as far as its beginning tells."""
    if kind == "parquet":
        import pyarrow.parquet as parquet

        try:
            return MARK in (parquet.read_schema(path).metadata or {})
        except Exception:  # it is something else, of which pyarrow says so in several ways
            return False
    beginnings = {"csv": [",".join(COLUMNS) + "\r\n"], "coco": ['[{"image_id": ', "[]\n", '{"images": [']}[kind]
    try:
        with path.open("rb") as file:
            return file.read(200).startswith(tuple(beginning.encode() for beginning in beginnings))
    except OSError:
        return False


_TABLES: dict[str, Callable[[Path, BinaryIO], int]] = {"csv": _write_csv, "parquet": _write_parquet}
