"""Joins the shards of a run into one folder, after it has made sure that they are all there and fit together.

What workers have written that shared a run (``--steal``) is joined by ``merge_blocks.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.jobs.blocks import BlockFolder
from vlmfix.jobs.folder.joined import Merged, MergedFolder
from vlmfix.jobs.folder.merge_blocks import merge_blocks
from vlmfix.jobs.folder.output import Totals
from vlmfix.jobs.folder.reproduce import questions_again
from vlmfix.jobs.ledger import now
from vlmfix.jobs.lines import ANSWER, ANSWERS, CARD, FAILED, FAILURE, PROGRESS
from vlmfix.jobs.shards import SHARD, Shard, shards_in
from vlmfix.parsing import some
from vlmfix.records import flat, is_held, read_json, read_lines, shown
from vlmfix.seen import Seen
from vlmfix.settings import DECODED
from vlmfix.shapes import COUNT, FLAG, PATH, TEXT, fields, list_of
from vlmfix.sources import source_of

PART = fields(
    {
        "finished": FLAG,
        "started": TEXT,
        "progress": PROGRESS,
        "settings": fields(
            {
                "pictures": PATH,
                "prompt": TEXT.or_null(),
                "prompts": TEXT.or_null(),
                "column": TEXT.or_null(),
                "shard": SHARD,
                **DECODED,
            }
        ),
        "sessions": list_of(fields({"started": TEXT, "peak_memory": COUNT, "prompts_file": PATH.or_null()})),
    }
)
"""Shape that the card of a shard must have."""
NAMES = 10
"""Most missing pictures that are named."""


def merge(out: Path, into: Path | None = None) -> Merged:
    """Joins the parts of a run: one file of answers, one of failures, and a card as of a single run.

    Lines come shard by shard, or block by block, which is the order of the pictures. What was joined before is written
    anew.

    Args:
        out: The folder that ``vlmfix run --shard`` or ``--steal`` was given.
        into: The folder to write; None for ``out`` itself.

    Raises:
        UsageError: There are no shards, some are of another number, a process writes to one, or ``into`` holds
            something else.
        DataError: A shard is missing or unfinished, pictures are missing or stand twice, or settings differ.
    """
    if BlockFolder(out).is_there:
        return merge_blocks(out, into)
    parts = _parts(out)
    cards = {
        shard: read_json(shard.folder(out) / CARD, PART) for shard in parts if os.path.exists(shard.folder(out) / CARD)
    }
    _refuse_other_settings(out, cards)
    done, totals = _done(out, parts)
    unlisted, missing = _missing(out, cards, done)
    _refuse_gaps(out, parts, cards, missing, unlisted)
    begun = next((card for card in cards.values() if card["sessions"]), next(iter(cards.values())))
    settings = begun["settings"] | {"shard": None}
    folders = [shard.folder(out) for shard in parts]
    with MergedFolder(into or out, settings) as merged:
        merged.card = _card(settings, cards, totals)
        merged.write_card()
        for name, shape in ((ANSWERS, ANSWER), (FAILED, FAILURE)):
            merged.lines[name].replace(chain.from_iterable(read_lines(folder / name, shape) for folder in folders))
        merged.card |= {"updated": now(), "finished": True}
        merged.write_card()
    return Merged(into or out, len(parts), totals, unlisted)


def _parts(out: Path) -> list[Shard]:
    """Lists the shards that have a folder.

    Raises:
        UsageError: There is none, they are of several numbers, or a process writes to one.
    """
    found = shards_in(out)
    if not found:
        raise UsageError(
            f"{out} holds no shards", "give the folder that vlmfix run --shard I/N (or --steal) --out was given"
        )
    if len(counts := sorted({shard.count for shard in found})) > 1:
        raise UsageError(
            f"{out} holds shards of {some(counts)}", "move those of the numbers away that are not to be joined"
        )
    if busy := [str(shard) for shard in found if is_held(shard.folder(out) / ANSWERS)]:
        raise UsageError(f"processes are writing to the shards {some(busy)} in {out}", "wait for them to end")
    return found


def _refuse_other_settings(out: Path, cards: Mapping[Shard, Mapping[str, Any]]) -> None:
    """Refuses shards whose cards differ; one that had no picture knows less of the model, and is held to what it knows.

    Raises:
        DataError: Some do; the message says which, with both values.
    """
    begun = [shard for shard, card in cards.items() if card["sessions"]] or list(cards)
    for shard, card in cards.items():
        if Shard.of(card["settings"]["shard"]) != shard:
            raise DataError(f"{shard.folder(out) / CARD} is of shard {card['settings']['shard']}", "put it back")
        first, second = cards[begun[0]]["settings"], card["settings"]
        names = ({*first, *second} if card["sessions"] else {*second}) - {"shard"}
        if differing := sorted(name for name in names if first.get(name) != second.get(name)):
            one, other = (dict(flat({name: values.get(name) for name in differing})) for values in (first, second))
            listed = "; ".join(
                f"{name} is {shown(one.get(name))} and {shown(other.get(name))}"
                for name in dict.fromkeys([*one, *other])
                if one.get(name) != other.get(name)
            )
            raise DataError(
                f"the shards {begun[0]} and {shard} in {out} were made with other settings: {listed}",
                "run one of them again in a folder of its own, with the settings of the others",
            )


def _done(out: Path, parts: Iterable[Shard]) -> tuple[Seen, Totals]:
    """Collects what was answered or failed, as (picture, prompt), or (picture,) where it cannot be opened.

    Raises:
        DataError: Something stands twice, or in another shard than its own.
    """
    done = Seen()
    totals = Totals()
    for shard in parts:
        for name, shape in ((ANSWERS, ANSWER), (FAILED, FAILURE)):
            for line in read_lines(shard.folder(out) / name, shape):
                key = (line["image"], line["prompt"]) if "prompt" in line else (line["image"],)
                if not shard.holds(line["image"]):
                    raise DataError(
                        f"{line['image']} in {shard.folder(out) / name} does not belong to shard {shard}",
                        "restore the file, or run that shard again in an empty folder",
                    )
                if not done.add(key):
                    raise DataError(
                        f"{line['image']} stands twice in the shards of {out}",
                        f"remove one of the lines; the second is in {shard.folder(out) / name}",
                    )
                if name == ANSWERS:
                    totals.count(line)
                else:
                    totals.failed += 1
    return done, totals


def _missing(out: Path, cards: Mapping[Shard, Mapping[str, Any]], done: Seen) -> tuple[str, list[str]]:
    """Lists the pictures and finds those that lack an answer; or says why they cannot be listed."""
    if not cards:
        return "there is no card", []
    card = next((card for card in cards.values() if card["sessions"]), next(iter(cards.values())))
    settings = card["settings"]
    try:
        source = source_of(Path(settings["pictures"]), column=settings["column"], skip=out)
        file = card["sessions"][-1]["prompts_file"] if card["sessions"] else settings["pictures"]
        questions = questions_again(out, settings, file, None, source)
        names = [
            file.name
            for file in source
            if (file.name,) not in done
            and any((file.name, prompt) not in done for prompt in questions.of_picture(file))
        ]
    except VlmfixError as error:
        return error.message, []
    return "", list(dict.fromkeys(names))


def _refuse_gaps(
    out: Path,
    parts: list[Shard],
    cards: Mapping[Shard, Mapping[str, Any]],
    missing: list[str],
    unlisted: str,
) -> None:
    count = parts[0].count
    absent = [str(shard) for shard in (Shard(index, count) for index in range(count)) if shard not in cards]
    unfinished = [str(shard) for shard, card in cards.items() if not card["finished"]]
    if not (absent or unfinished or missing):
        return
    gaps = [f"shards without a card: {some(absent)}"] if absent else []
    gaps += [f"unfinished shards: {some(unfinished)}"] if unfinished else []
    if unlisted:
        gaps.append(f"which pictures are missing is not known: {unlisted}")
    elif missing:
        gaps.append(f"{len(missing)} pictures are not done: {some(missing, shown=NAMES)}")
    raise DataError(
        f"{out} is not complete; {'; '.join(gaps)}",
        "start these shards again with their commands, which go on, and merge then",
    )


def _card(settings: dict[str, Any], cards: Mapping[Shard, Mapping[str, Any]], totals: Totals) -> dict[str, Any]:
    sessions: Iterator[dict[str, Any]] = (
        {**session, "shard": str(shard)} for shard, card in cards.items() for session in card["sessions"]
    )
    in_time = sorted(sessions, key=lambda session: str(session["started"]))
    return {
        "settings": settings,
        "started": min(card["started"] for card in cards.values()),
        "sessions": in_time,
        "merged": len(cards),
        "updated": now(),
        "finished": False,
        "progress": {"total": sum(card["progress"]["total"] for card in cards.values()), "left": 0, "recent": []},
        "totals": totals.noted(),
        "ms_per_token": totals.noted_pace(),
        "peak_memory": max((session["peak_memory"] for session in in_time), default=0),
    }
