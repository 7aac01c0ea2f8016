"""Reads and writes what a run on Ray keeps below its folder: the plan, the rows that are written, the actors' cards."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError
from vlmfix.files import make_folder
from vlmfix.jobs.blocks import noted
from vlmfix.jobs.export import COLUMNS, readable
from vlmfix.jobs.folder.job import SPREAD, Progress
from vlmfix.jobs.folder.joined import MergedFolder
from vlmfix.jobs.folder.output import Totals
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.journal import lines_of
from vlmfix.jobs.ledger import now
from vlmfix.jobs.lines import ACTOR, ACTORS, ANSWERS, FAILED, QUESTIONS, RAY, ROWS
from vlmfix.records import read_json, refuse_other, replace_json
from vlmfix.seen import Seen
from vlmfix.shapes import OBJECT, fields
from vlmfix.sources import Source

if TYPE_CHECKING:
    import pyarrow

BLOCK = 256
"""Questions that an actor gets at once, and that are written and checkpointed together."""
ANSWERED = ("image", "sha256", "prompt", "answer", "tokens", "finish", "seconds", "logprob", "entropy")
"""Fields of every answer, in their order."""
PLAIN = {*ANSWERED, "reason"}
"""Fields that a row holds in columns of their own; of a line with others it holds the whole, too."""


class RayFolder:
    """Reads and writes what a run on Ray keeps below its folder.

    Args:
        out: The run's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / RAY
        self.questions, self.answers, self.checkpoint, self.workers, self.begun = (
            self.folder / name for name in (QUESTIONS, ROWS, "checkpoint", ACTORS, "begun")
        )

    @property
    def is_there(self) -> bool:
        """Whether a run on Ray has begun here."""
        return os.path.isdir(self.folder)

    @staticmethod
    def base(source: Source) -> Path:
        """Returns the folder that names of pictures are relative to."""
        return source.place if os.path.isdir(source.place) else source.place.parent

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder this run's.

        Raises:
            UsageError: It is another run's.
        """
        for folder in (self.answers, self.workers, self.begun):
            make_folder(folder)
        card = self.folder / "settings.json"
        if os.path.exists(card):
            refuse_other(self.out, card, read_json(card, fields({"settings": OBJECT}))["settings"], settings)
        else:
            replace_json(card, {"settings": settings})

    def plan(self, source: Source, questions: Questions) -> tuple[tuple[str, ...], int]:
        """Writes the questions, a file for every block, and returns some of them and their number.

        Args:
            source: The pictures.
            questions: The prompts.
        """
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        shutil.rmtree(self.questions, ignore_errors=True)
        make_folder(self.questions)
        asked = self._asked(source, questions)
        sample: tuple[str, ...] = ()
        total = 0
        for number in itertools.count():
            rows = list(itertools.islice(asked, BLOCK))
            if not rows:
                return sample, total
            sample = sample or tuple(line for _, line in rows[:SPREAD])
            total += len(rows)
            table = arrow.table({"id": [key for key, _ in rows], "question": [line for _, line in rows]})
            parquet.write_table(table, self.questions / f"{number:08d}.parquet")
        raise AssertionError

    def _asked(self, source: Source, questions: Questions) -> Iterator[tuple[str, str]]:
        """Yields the id of each question, and the question as a line."""
        known, base = Seen(), self.base(source)
        for file in source:
            for prompt in questions.of_picture(file):
                if known.add((file.name, prompt)):
                    yield identity(file.name, prompt), json.dumps(noted(file, [prompt], base))

    def written(self) -> int:
        """Counts the rows of answers and failures that are written."""
        import pyarrow.parquet as parquet

        count = 0
        for path in self.answers.glob("*.parquet"):
            with suppress(Exception):  # one that is being written
                count += parquet.read_metadata(path).num_rows
        return count

    def lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the id and the line of each answer and failure, once.

        Raises:
            DataError: A file is damaged.
        """
        import pyarrow.parquet as parquet

        known = Seen()
        for path in sorted(self.answers.glob("*.parquet")):
            try:
                with parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(batch_size=BLOCK):
                        for row in batch.to_pylist():
                            if known.add(row["id"]):
                                yield row["id"], _line(row)
            except DataError:
                raise
            except Exception as error:  # Arrow's, of several kinds
                raise DataError(f"{path} is no whole Parquet file: {error}", "restore it") from error

    def journals(self, ids: Set[str]) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
        """Yields path and lines of each actor's journal that tells of one of some questions.

        Args:
            ids: The questions' ids. One actor at a time has them, so others that tell of them have died.
        """
        for path in sorted(self.begun.glob("*.jsonl")):
            lines = list(lines_of(path))
            if any(not ids.isdisjoint(names) for line in lines for names in line.values()):
                yield path, lines

    def cards(self) -> dict[str, dict[str, Any]]:
        """Reads the cards of all actors."""
        return {path.stem: read_json(path, ACTOR) for path in sorted(self.workers.glob("*.json"))}

    def join(self, joined: MergedFolder, total: int, before: int, notes: tuple[str, ...]) -> Progress:
        """Writes the folder as of any run.

        Args:
            joined: The folder.
            total: Questions of the run.
            before: Answers and failures of earlier starts.
            notes: What is to be said of the run.
        """
        cards = self.cards()
        refuse_other_settings(self.out, cards)
        if not cards:
            raise DataError(f"no actor has begun to answer in {self.out}", "see what the logs of Ray say")
        totals, done = Totals(), 0
        unreadable = Seen()

        def answers() -> Iterator[dict[str, Any]]:
            for _, line in self.lines():
                if "reason" not in line:
                    totals.count(line)
                    yield line

        def failures() -> Iterator[dict[str, Any]]:
            for _, line in self.lines():
                if "reason" in line and ("prompt" in line or unreadable.add(line["image"])):
                    totals.failed += 1
                    yield line

        settings = next(iter(cards.values()))["settings"]
        sessions = [{**card["session"], "worker": name} for name, card in cards.items()]
        joined.card = {
            "settings": settings,
            "started": min(session["started"] for session in sessions),
            "sessions": sorted(sessions, key=lambda session: str(session["started"])),
            "merged": len(cards),
            "updated": now(),
            "finished": False,
            "totals": totals.noted(),
            "notes": list(notes),
        }
        joined.write_card()
        joined.lines[ANSWERS].replace(answers())
        joined.lines[FAILED].replace(failures())
        done = sum(1 for _ in self.lines())
        joined.card |= {
            "updated": now(),
            "finished": done >= total,
            "progress": {"total": total, "left": max(0, total - done), "recent": []},
            "totals": totals.noted(),
            "ms_per_token": totals.noted_pace(),
            "peak_memory": max(session["peak_memory"] for session in sessions),
        }
        joined.write_card()
        shutil.rmtree(self.begun, ignore_errors=True)
        return Progress(total, min(before, done), done, totals.answers, totals, BLOCK, notes=notes)


def identity(image: str, prompt: str) -> str:
    """Returns the id of a question: 32 hexadecimal digits of its picture's name and its prompt."""
    text = f"{len(image)}:{image}{prompt}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of an answers' file as a line of a run's."""
    if row["line"]:
        line: dict[str, Any] = json.loads(row["line"])
        return line
    if row["failed"] is not None:
        about = {} if row["prompt"] is None else {"prompt": row["prompt"]}
        return {"image": row["image"], "reason": row["failed"], **about}
    return {name: row[name] for name in ANSWERED}


def refuse_other_settings(out: Path, cards: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes sure that actors answered with equal weights and facts.

    Args:
        out: The run's folder, for the message.
        cards: The cards of actors, by their names.

    Raises:
        UsageError: Some differ.
    """
    first: Mapping[str, Any] | None = None
    for name, card in cards.items():
        first = first or card["settings"]
        refuse_other(out, out / RAY / ACTORS / f"{name}.json", card["settings"], first)


def table_of(settled: Sequence[tuple[str, dict[str, Any]]]) -> pyarrow.Table:
    """Makes a table of lines; what a Parquet file cannot hold as it is stands there whole as JSON, too."""
    import pyarrow as arrow

    kinds = {"tokens": arrow.int64(), **dict.fromkeys(("seconds", "logprob", "entropy", "sar"), arrow.float64())}
    rows = []
    for key, line in settled:
        row = {name: line.get(name) for name in COLUMNS} | {"failed": line.get("reason")}
        whole = not line.keys() <= PLAIN or any(
            isinstance(value, str) and not _is_text(value) for value in line.values()
        )
        plain = {name: readable(value) if isinstance(value, str) else value for name, value in row.items()}
        rows.append({"id": key, **plain, "line": json.dumps(line) if whole else None})
    columns = [("id", arrow.string()), *((name, kinds.get(name, arrow.string())) for name in COLUMNS)]
    return arrow.Table.from_pylist(rows, schema=arrow.schema([*columns, ("line", arrow.string())]))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
