"""Shares a run between workers that know of each other by files alone: its plan, leases on its blocks, and their parts.

Below the run's folder lies ``blocks``:

- ``plan/N`` holds block N of the questions, or says that all are planned. A planner publishes block N only after it has
  read all blocks before it, so that no question is planned twice, however many plan at once.
- ``leases/N-A`` says whose attempt A at block N is. Who creates the file has the attempt, alone writes ``parts/N-A``.
  Attempt A + 1 is taken when the worker of attempt A is dead, and begins with what that one has written. Its journal
  says which pictures it had in hand; the next one answers those apart (``jobs/journal.py``).
- ``done/N`` is the part of the attempt that came first to its end.
- ``workers/NAME.json`` says of each worker what it answers with, how far it is, and that it lives.

It asks two things of a file system: a file is created once, and a folder is renamed whole, and not onto one that holds
something. No clock is compared with another: a worker is dead to another one that has not seen it stir for
``LEASE_SECONDS`` of its own time. One that lives and does not get on does not stir (``jobs/folder/pulse.py``).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.files import cannot_write, make_folder, plain_name
from vlmfix.images import Found
from vlmfix.jobs.journal import BEGUN, lines_of
from vlmfix.jobs.lines import ANSWER, FAILURE
from vlmfix.records import read_json, read_lines, replace_json, to_json
from vlmfix.shapes import COUNT, FLAG, OBJECT, TEXT, TIME, Shape, fault, fields, list_of, mapping_of

BLOCKS = "blocks"
"""Folder of all this, below the run's."""
LEASE_SECONDS = 60.0
"""Time without a sign of life after which a worker's blocks are another's."""
BEATS = 6
"""Signs of life in that time."""
LARGEST, SMALLEST, GROWTH = 512, 16, 16
"""Questions of a block, and of the first ones, which are small so that a short run has one for every worker; after so
many blocks they are longer by the smallest."""
CHOICE = 64
"""Free blocks among which a worker chooses by chance, so that few want the same."""
NUMBERED = re.compile(r"\d{8}", re.ASCII)
LEASED = re.compile(r"(\d{8})-(\d{4})", re.ASCII)
PLANNED = re.compile(r"plan-()(\d{4})", re.ASCII)
LINES, COUNTED, PICTURES, ALL = "lines.jsonl", "count.json", "pictures.jsonl", "all.json"
"""Files of a part, and of a block of the plan; the last one stands in its place in the block that ends a plan."""
ENTRY = fields(
    {"image": TEXT},
    {
        "path": TEXT,
        "problem": TEXT,
        "prompts": list_of(TEXT),
        "part": list_of(COUNT, least=2),
        "cell": fields({"column": TEXT, "row": COUNT}),
        "url": TEXT,
    },
)
END = fields({"questions": COUNT})
HEAD = fields({"before": COUNT, "questions": COUNT})
ROW = Shape(lambda value: (ENTRY if isinstance(value, dict) and "image" in value else HEAD).problem(value))
"""Shape of a line of a block of the plan: the first one is a head."""
COUNTS = fields({"answers": COUNT, "failed": COUNT, "reasons": mapping_of(COUNT), "worker": TEXT})
CARD = fields(
    {
        "worker": TEXT,
        "beat": COUNT,
        "ended": FLAG,
        "planning": FLAG,
        "settings": OBJECT,
        "started": TEXT,
        "updated": TIME,
        "sessions": list_of(fields({"started": TEXT, "peak_memory": COUNT})),
        "totals": fields({"answers": COUNT, "failed": COUNT}),
        "recent": list_of(fields({"time": TIME, "done": COUNT})),
    },
    {"hung": FLAG},
)
"""Shape of a worker's file."""
LINE = Shape(lambda value: (FAILURE if isinstance(value, dict) and "reason" in value else ANSWER).problem(value))
"""Shape of a line of a part: an answer or a failure."""


def size_of(number: int) -> int:
    """Returns how many questions a block of that number has, at most."""
    return min(LARGEST, SMALLEST * (1 + number // GROWTH))


@dataclass(frozen=True)
class Taken(Found):
    """A picture of a block that a worker has.

    Attributes:
        block: Number of the block.
    """

    block: int = 0


@dataclass(frozen=True)
class Lease:
    """Names one attempt at a block.

    Attributes:
        number: Number of the block.
        attempt: Number of the attempt, from 0.
    """

    number: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.number:08d}-{self.attempt:04d}"


class BlockFolder:
    """Reads and writes the files that workers share; every method may be called by any of them at any time.

    Args:
        out: The run's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / BLOCKS
        self.plan, self.leases, self.parts, self.done, self.workers, self.drafts = (
            self.folder / name for name in ("plan", "leases", "parts", "done", "workers", "drafts")
        )

    @property
    def is_there(self) -> bool:
        """Whether a worker has begun here."""
        return os.path.isdir(self.folder)

    def make(self) -> None:
        """Makes the folders.

        Raises:
            DataError: They cannot be made, or lead elsewhere.
        """
        for folder in (self.plan, self.leases, self.parts, self.done, self.workers, self.drafts):
            if os.path.islink(self.folder) or os.path.islink(folder):
                raise DataError(
                    f"{self.folder} holds a link, and nothing is written through links", "choose another --out"
                )
            make_folder(folder)

    # -- the plan

    def planned(self) -> tuple[list[int], int | None]:
        """Lists the blocks of the plan, and the number of the one that ended it last; None while it has no end."""
        numbers = _numbers(self.plan)
        ends = [number for number in numbers[-1:] if self.is_end(number)]
        return numbers, ends[0] if ends else None

    def is_end(self, number: int) -> bool:
        """Says whether a block holds no pictures, and says that all are planned."""
        return os.path.exists(self.plan / _name(number) / ALL)

    def head(self, number: int) -> tuple[int, int]:
        """Returns the questions before a block, and those in it."""
        place = self.plan / _name(number)
        if self.is_end(number):
            return int(read_json(place / ALL, END)["questions"]), 0
        for line in read_lines(place / PICTURES, HEAD):
            return int(line["before"]), int(line["questions"])
        raise DataError(f"{place / PICTURES} is empty", "restore the file")

    def pictures(self, number: int, base: Path) -> Iterator[Taken]:
        """Yields the pictures of a block.

        Args:
            number: Number of the block.
            base: Folder that names are relative to.

        Raises:
            DataError: The file is damaged.
        """
        if self.is_end(number):
            return
        path = self.plan / _name(number) / PICTURES
        for place, line in enumerate(read_lines(path, ROW)):
            if (place == 0) == ("image" in line):
                raise DataError(f"line {place + 1} of {path} does not belong there", "restore the file")
            if place > 0:
                yield taken(line, number, base)

    def publish(self, number: int, pictures: Sequence[Mapping[str, Any]], before: int, questions: int) -> bool:
        """Adds a block to the plan; returns False where another planner was first.

        Args:
            number: Number of the block; those before it are there.
            pictures: What ``noted`` gave; without any, the block ends the plan.
            before: Questions in the blocks before.
            questions: Questions in it.
        """
        draft = self.drafts / f"{_name(number)}-{secrets.token_hex(4)}"
        try:
            draft.mkdir()
            if pictures:
                lines = [{"before": before, "questions": questions}, *pictures]
                _write(draft / PICTURES, "".join(f"{to_json(line)}\n" for line in lines))
            else:
                _write(draft / ALL, to_json({"questions": before}))
            return renamed(draft, self.plan / _name(number))
        except OSError as error:
            raise cannot_write(draft, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    # -- leases

    def attempts(self) -> dict[int, int]:
        """Returns the last attempt at each block that has one."""
        return _attempts(self.leases, LEASED)

    def planning(self) -> int | None:
        """Returns the last attempt at planning; None before the first."""
        return _attempts(self.leases, PLANNED).get(0)

    def take(self, name: str, worker: str) -> bool:
        """Takes a lease of that name for a worker; returns False where another one has it.

        Raises:
            DataError: It cannot be written.
        """
        try:
            file = os.open(self.leases / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise cannot_write(self.leases / name, error) from error
        try:
            os.write(file, worker.encode())
        except OSError as error:
            raise cannot_write(self.leases / name, error) from error
        finally:
            os.close(file)
        return True

    def owner(self, name: str) -> str:
        """Returns the worker that has a lease; empty where it was killed before it had written its name."""
        try:
            return (self.leases / name).read_text(errors="replace")
        except OSError:
            return ""

    # -- parts

    def part(self, lease: Lease) -> Path:
        """Returns the folder that an attempt writes."""
        return self.parts / str(lease)

    def inherited(self, lease: Lease) -> Iterator[dict[str, Any]]:
        """Yields what earlier attempts at a block have written, some of it perhaps twice."""
        for attempt in range(lease.attempt):
            with suppress(DataError):  # a kill may have torn it, and its worker may be at it
                yield from read_lines(self.part(Lease(lease.number, attempt)) / LINES, LINE)

    def begun(self, lease: Lease) -> Iterator[dict[str, Any]]:
        """Yields what the journals of earlier attempts at a block tell, of those that did not come to an end."""
        for attempt in range(lease.attempt):
            yield from lines_of(self.part(Lease(lease.number, attempt)) / BEGUN)

    def finish(self, lease: Lease, counts: Mapping[str, Any]) -> bool:
        """Makes the part of an attempt that of its block; returns False where another attempt was first.

        Raises:
            DataError: It cannot be written.
        """
        part, place = self.part(lease), self.done / _name(lease.number)
        try:
            _write(part / COUNTED, to_json(counts))
            first = renamed(part, place)
        except OSError as error:
            if os.path.exists(place):
                return False
            raise cannot_write(part, error) from error
        for attempt in range(lease.attempt + 1):
            shutil.rmtree(self.part(Lease(lease.number, attempt)), ignore_errors=True)
        return first

    def is_done(self, number: int) -> bool:
        """Says whether a block is done."""
        return os.path.exists(self.done / _name(number))

    def finished(self) -> set[int]:
        """Returns the blocks that are done."""
        return set(_numbers(self.done))

    def counts(self, number: int) -> dict[str, Any]:
        """Reads what ``finish`` noted of a block."""
        return read_json(self.done / _name(number) / COUNTED, COUNTS)

    def lines(self, number: int) -> Iterator[dict[str, Any]]:
        """Yields answers and failures of a block that is done.

        Raises:
            DataError: The file is damaged.
        """
        return read_lines(self.done / _name(number) / LINES, LINE)

    def in_progress(self) -> Iterator[tuple[int, int, Counter[str]]]:
        """Yields number, answers and failures by reason of each block that is not done, by its longest part."""
        longest: dict[int, tuple[int, Counter[str]]] = {}
        try:
            names = os.listdir(self.parts)
        except OSError:
            return
        for name in names:
            if not (match := LEASED.fullmatch(name)) or self.is_done(int(match[1])):
                continue
            answers, failed = 0, Counter[str]()
            with suppress(DataError):
                for line in read_lines(self.parts / name / LINES, LINE):
                    answers += "reason" not in line
                    failed.update([line["reason"]] if "reason" in line else [])
            found = longest.get(number := int(match[1]), (0, Counter[str]()))
            longest[number] = max(found, (answers, failed), key=lambda counts: counts[0] + counts[1].total())
        yield from ((number, *found) for number, found in sorted(longest.items()))

    # -- workers

    def cards(self) -> dict[str, dict[str, Any]]:
        """Reads the files of all workers.

        Raises:
            DataError: One is damaged.
        """
        try:
            names = sorted(name for name in os.listdir(self.workers) if name.endswith(".json") and name[0] != ".")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"cannot list {self.workers}: {error.strerror}", "check the path") from error
        return {name.removesuffix(".json"): read_json(self.workers / name, CARD) for name in names}

    def card(self, worker: str) -> dict[str, Any] | None:
        """Reads a worker's file; None where there is none."""
        path = self.workers / f"{worker}.json"
        try:
            return read_json(path, CARD) if worker and os.path.exists(path) else None
        except DataError:
            return None

    def write_card(self, worker: str, card: Mapping[str, Any]) -> None:
        """Writes a worker's file.

        Raises:
            DataError: It cannot be written.
        """
        replace_json(self.workers / f"{worker}.json", card)


class Watch:
    """Finds out which workers are dead, by watching their signs of life for as long as a lease lasts.

    Args:
        blocks: The files.
    """

    def __init__(self, blocks: BlockFolder) -> None:
        self._blocks = blocks
        self._seen: dict[str, tuple[int, float]] = {}
        self._owners: dict[str, str] = {}
        self._cards: dict[str, dict[str, Any] | None] = {}

    def look(self) -> None:
        """Begins another look: what was read of workers is read again."""
        self._cards = {}

    def is_free(self, lease: str) -> bool:
        """Says whether the worker that has a lease has ended or is dead, as far as was seen until now."""
        owner = self._owners[lease] = self._owners.get(lease) or self._blocks.owner(lease)
        if owner not in self._cards:
            self._cards[owner] = self._blocks.card(owner)
        card = self._cards[owner]
        if card is not None and card["ended"]:
            return True
        watched, beat = (owner, int(card["beat"])) if card is not None else (lease, -1)
        before, since = self._seen.get(watched, (None, 0.0))
        if before != beat:
            self._seen[watched] = beat, time.monotonic()
            return False
        return time.monotonic() - since > LEASE_SECONDS


def named_worker() -> str:
    """Makes a name for this process that no other has: machine, process, and eight digits of chance."""
    return f"{plain_name(socket.gethostname() or 'host', 60)}-{os.getpid()}-{secrets.token_hex(4)}"


def noted(file: Found, prompts: Sequence[str], base: Path) -> dict[str, Any]:
    """Returns a picture as a line of the plan.

    Args:
        file: The picture.
        prompts: The questions about it alone; empty where all are asked the same.
        base: Folder that names are relative to.
    """
    line: dict[str, Any] = {"image": file.name}
    if file.path != base / file.name:
        line["path"] = str(file.path)
    if prompts:
        line["prompts"] = list(prompts)
    if file.part is not None:
        line["part"] = list(file.part)
    if file.cell is not None:
        line["cell"] = {"column": file.cell[0], "row": file.cell[1]}
    return line | {name: value for name in ("problem", "url") if (value := getattr(file, name))}


def taken(line: Mapping[str, Any], number: int, base: Path) -> Taken:
    """Returns the picture of a line of the plan; see ``noted``.

    Args:
        line: The line.
        number: Number of its block.
        base: Folder that names are relative to.

    Raises:
        DataError: The line is damaged.
    """
    if wrong := fault(line, ENTRY):
        raise DataError(f"a line of the plan{wrong}", "restore the file")
    part, cell = line.get("part"), line.get("cell")
    return Taken(
        line["image"],
        Path(line["path"]) if "path" in line else base / line["image"],
        line.get("problem", ""),
        tuple(line.get("prompts", ())),
        None if part is None else (part[0], part[1]),
        line.get("url", ""),
        None if cell is None else (cell["column"], cell["row"]),
        number,
    )


def renamed(draft: Path, place: Path) -> bool:
    """Gives a folder its name; returns False where another folder has it, which stays.

    A file system of a network may say that the draft is gone when it has renamed it at the first of two attempts.

    Raises:
        OSError: It cannot be renamed.
    """
    try:
        os.rename(draft, place)
    except OSError as error:
        taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        if taken or (error.errno == errno.ENOENT and os.path.exists(place)):
            return False
        raise
    return True


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _name(number: int) -> str:
    return f"{number:08d}"


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(folder) if NUMBERED.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}", "check the path") from error


def _attempts(folder: Path, pattern: re.Pattern[str]) -> dict[int, int]:
    last: dict[int, int] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}", "check the path") from error
    for name in names:
        if match := pattern.fullmatch(name):
            number = int(match[1] or 0)
            last[number] = max(last.get(number, 0), int(match[2]))
    return last
