"""Joins what workers have written that shared a run, after it has made sure that all is there, once, and made alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

from vlmfix.errors import DataError, VlmfixError
from vlmfix.images import Found
from vlmfix.jobs.blocks import BlockFolder
from vlmfix.jobs.folder.joined import Merged, MergedFolder
from vlmfix.jobs.folder.output import Totals
from vlmfix.jobs.folder.questions import Questions
from vlmfix.jobs.folder.reproduce import questions_again
from vlmfix.jobs.ledger import now
from vlmfix.jobs.lines import ANSWERS, FAILED
from vlmfix.parsing import some
from vlmfix.records import flat, shown
from vlmfix.seen import Seen
from vlmfix.sources import Source, source_of

NAMES = 10
"""Most missing pictures that are named."""

Key = tuple[str, ...]
"""Picture and prompt of an answer or a failure; the picture alone where it cannot be opened."""


def merge_blocks(out: Path, into: Path | None = None) -> Merged:
    """Joins the blocks of a run that workers shared; see ``merge``.

    Args:
        out: The folder that ``vlmfix run --steal`` was given.
        into: The folder to write; None for ``out`` itself.

    Raises:
        UsageError: ``into`` holds something else.
        DataError: Blocks or pictures are missing, something stands twice or belongs elsewhere, or workers answered with
            different settings.
    """
    folder = BlockFolder(out)
    cards = {name: card for name, card in folder.cards().items() if card["sessions"]}
    if not cards:
        raise DataError(
            f"no worker has answered anything in {out}", "start vlmfix run --steal, and merge when it is done"
        )
    _refuse_other_settings(out, cards)
    last = cards[max(cards, key=lambda name: str(cards[name]["started"]))]
    settings = last["settings"]
    source, questions, unlisted = _asked(out, last)
    gaps, done, totals = _checked(folder, Path(settings["pictures"]), questions)
    if source is not None and questions is not None and not gaps.blocks:
        try:
            for file in source:
                gaps.add(file.name, _lacking(file, questions, done))
        except VlmfixError as error:
            unlisted = error.message
    gaps.refuse(out)
    with MergedFolder(into or out, settings) as merged:
        merged.card = _card(settings, cards, totals, folder.head(folder.planned()[0][-1])[0])
        merged.write_card()
        merged.lines[ANSWERS].replace(line for line in _lines(folder) if "reason" not in line)
        merged.lines[FAILED].replace(_failures(folder))
        merged.card |= {"updated": now(), "finished": True}
        merged.write_card()
    for left in (*folder.drafts.iterdir(), *folder.parts.iterdir()):  # by planners and workers that were killed
        rmtree(left, ignore_errors=True)
    return Merged(into or out, len(cards), totals, unlisted, "workers")


class _Gaps:
    """Collects what is missing."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.planned = True
        self.pictures = Seen()
        self._names: list[str] = []

    def add(self, name: str, lacking: bool) -> None:
        if lacking and self.pictures.add(name) and len(self._names) < NAMES:
            self._names.append(name)

    def refuse(self, out: Path) -> None:
        """Raises unless nothing is missing."""
        gaps = [] if self.planned else ["not all pictures are planned"]
        gaps += [f"blocks that are not done: {some(self.blocks)}"] if self.blocks else []
        if count := len(self.pictures):
            more = f" and {count - len(self._names)} others" if count > len(self._names) else ""
            gaps.append(f"{count} pictures are not done: {some(self._names, shown=NAMES)}{more}")
        if gaps:
            raise DataError(
                f"{out} is not complete; {'; '.join(gaps)}",
                "start a worker again with its command, which does what is left, and merge then",
            )


def _refuse_other_settings(out: Path, cards: Mapping[str, Mapping[str, Any]]) -> None:
    names = list(cards)
    first = cards[names[0]]["settings"]
    for name in names[1:]:
        second = cards[name]["settings"]
        one, other = dict(flat(first)), dict(flat(second))
        if differing := [field for field in dict.fromkeys([*one, *other]) if one.get(field) != other.get(field)]:
            listed = "; ".join(
                f"{known} is {shown(one.get(known))} and {shown(other.get(known))}" for known in differing
            )
            raise DataError(
                f"the workers {names[0]} and {name} in {out} answered with other settings: {listed}",
                "run all of it again in another folder",
            )


def _asked(out: Path, card: Mapping[str, Any]) -> tuple[Source | None, Questions | None, str]:
    """Returns the pictures and questions of the run; or why they cannot be read any more."""
    settings = card["settings"]
    try:
        source = source_of(Path(settings["pictures"]), column=settings["column"], skip=out)
        file = card["sessions"][-1].get("prompts_file")
        return source, questions_again(out, settings, file, None, source), ""
    except VlmfixError as error:
        return None, None, error.message


def _lacking(file: Found, questions: Questions, done: Seen) -> bool:
    asked = questions.of_picture(file)
    return (file.name,) not in done and any((file.name, prompt) not in done for prompt in asked)


def _checked(folder: BlockFolder, pictures: Path, questions: Questions | None) -> tuple[_Gaps, Seen, Totals]:
    """Holds every block against the plan.

    Raises:
        DataError: Something stands twice, or in another block than its own.
    """
    gaps, done, totals = _Gaps(), Seen(), Totals()
    base = pictures if os.path.isdir(pictures) else pictures.parent
    numbers, end = folder.planned()
    gaps.planned = end is not None
    finished = folder.finished()
    for number in numbers:
        planned = list(folder.pictures(number, base))
        names = dict.fromkeys(file.name for file in planned)
        if planned and number not in finished:
            gaps.blocks.append(str(number))
            for name in names:
                gaps.add(name, True)
            continue
        here: set[Key] = set()
        for line in folder.lines(number) if planned else ():
            key = _key(line)
            if line["image"] not in names:
                raise DataError(
                    f"{line['image']} in {folder.done} does not belong to block {number}", "restore the file"
                )
            again = not done.add(key)
            if key in here or (again and len(key) > 1):  # a picture that cannot be opened may be asked about in several
                raise DataError(f"{line['image']} stands twice in {folder.done}", f"remove one line, in block {number}")
            here.add(key)
            if "reason" not in line:
                totals.count(line)
            elif not again:
                totals.failed += 1
        for file in planned:
            if (file.name,) in here:
                continue
            if questions is None:
                gaps.add(file.name, all(key[0] != file.name for key in here))
            else:
                gaps.add(file.name, any((file.name, prompt) not in here for prompt in questions.of_picture(file)))
    return gaps, done, totals


def _key(line: Mapping[str, Any]) -> Key:
    return (line["image"], line["prompt"]) if "prompt" in line else (line["image"],)


def _lines(folder: BlockFolder) -> Iterator[dict[str, Any]]:
    for number in sorted(folder.finished()):
        yield from folder.lines(number)


def _failures(folder: BlockFolder) -> Iterator[dict[str, Any]]:
    unreadable = Seen()
    for line in _lines(folder):
        if "reason" in line and ("prompt" in line or unreadable.add(line["image"])):
            yield line


def _card(
    settings: dict[str, Any], cards: Mapping[str, Mapping[str, Any]], totals: Totals, asked: int
) -> dict[str, Any]:
    sessions = [{**session, "worker": name} for name, card in cards.items() for session in card["sessions"]]
    return {
        "settings": settings,
        "started": min(card["started"] for card in cards.values()),
        "sessions": sorted(sessions, key=lambda session: str(session["started"])),
        "merged": len(cards),
        "updated": now(),
        "finished": False,
        "progress": {"total": asked, "left": 0, "recent": []},
        "totals": totals.noted(),
        "ms_per_token": totals.noted_pace(),
        "peak_memory": max(session["peak_memory"] for session in sessions),
    }
