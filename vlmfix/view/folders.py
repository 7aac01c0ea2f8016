"""Folders of answers put side by side, joined by the contents of their pictures."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlmfix.errors import DataError, UsageError
from vlmfix.files import resolved
from vlmfix.jobs.lines import CARD
from vlmfix.parsing import some
from vlmfix.view.runs import Answers, Asked, read_answers
from vlmfix.view.sheet import Card, Column, Judgement, PictureFile, Row, Said, Sheet

EVALUATED = "card.json"
"""The card of an evaluation; what reads it needs torch, and is imported where there is one."""
UNSURE = 0.1
"""Share of a column's answers that count as the least sure, by the mean log-probability of their tokens."""
FEW = 10
"""Answers of a column below which none is told apart in that way."""
CHAINED = re.compile(r"\+(?=[a-z])")

Key = tuple[str, int]
"""A picture: digest, or name where none is known, and a number that tells copies apart."""


def read_sheet(folders: Sequence[Path], images: Path | None = None) -> Sheet:
    """Reads folders of answers and puts them side by side, by pictures and prompts.

    Args:
        folders: What ``vlmfix run`` or ``vlmfix eval`` wrote.
        images: Where their pictures are now; None for where they were.

    Raises:
        UsageError: The folders have no picture in common, or one is given twice.
        DataError: A folder is none of these, or holds what was changed.
    """
    places = [resolved(folder) for folder in folders]
    if twice := [folders[number] for number, place in enumerate(places) if place in places[:number]]:
        raise UsageError(f"{twice[0]} is given twice", "give each folder once")
    return _joined([_read(folder, images) for folder in folders])


def _read(folder: Path, images: Path | None) -> Answers:
    if os.path.exists(folder / CARD):
        return read_answers(folder, images)
    if os.path.exists(folder / EVALUATED):
        from vlmfix.view.evaluations import read_evaluation

        return read_evaluation(folder, images)
    raise DataError(
        f"{folder} holds neither {CARD} nor {EVALUATED}", "give a folder that vlmfix run or vlmfix eval wrote"
    )


def _joined(found: list[Answers]) -> Sheet:
    labels = _labels(found)
    keys = _keys(found)
    rows: dict[tuple[Key | None, str, int], list[tuple[int, Asked]]] = {}
    pictures: dict[Key, PictureFile] = {}
    for place, answers in enumerate(found):
        asked_before: Counter[tuple[Key | None, str]] = Counter()
        for asked, key in zip(answers.asked, keys[place], strict=True):
            if key is not None and asked.picture is not None:
                known = pictures.setdefault(key, asked.picture)
                if asked.picture.sha256 and not known.sha256:  # one that failed there has no digest to be held to
                    pictures[key] = asked.picture
            rows.setdefault((key, asked.prompt, asked_before[key, asked.prompt]), []).append((place, asked))
            asked_before[key, asked.prompt] += 1
    cards: dict[Key | None, list[Row]] = {}
    for (key, prompt, _), parts in rows.items():
        cards.setdefault(key, []).append(_row(prompt, parts, labels))
    least = [
        _least([said for held in cards.values() for row in held if (said := row.said[column])])
        for column in range(len(labels))
    ]
    shown = [
        Card(None if key is None else pictures[key], tuple(_doubted(row, least) for row in held))
        for key, held in cards.items()
    ]
    columns = _columns(found, labels, shown)
    title = ", ".join(dict.fromkeys(resolved(answers.folder).name for answers in found))
    return Sheet(title, columns, tuple(shown), tuple(_notes(found, keys, labels, cards)))


def _least(said: Sequence[Said]) -> float:
    """The mean log-probability below which an answer is among the least sure of its column; -inf for no such."""
    known = sorted(answer.logprob for answer in said if answer.logprob is not None)
    return known[math.ceil(len(known) * UNSURE) - 1] if len(known) >= FEW else -math.inf


def _doubted(row: Row, least: Sequence[float]) -> Row:
    """The question with those answers marked that are among the least sure."""
    marked = (
        answer if answer is None or answer.logprob is None or answer.logprob > limit else replace(answer, unsure=True)
        for answer, limit in zip(row.said, least, strict=True)
    )
    return replace(row, said=tuple(marked))


def _keys(found: Sequence[Answers]) -> list[list[Key | None]]:
    """For each question of each folder which picture it is about."""
    digests: dict[str, str] = {}
    for answers in found:
        for asked in answers.asked:
            if asked.picture is not None and asked.picture.sha256:
                digests.setdefault(asked.picture.name, asked.picture.sha256)
    keys = []
    for answers in found:
        copies: dict[str, dict[str, int]] = {}
        own: list[Key | None] = []
        for asked in answers.asked:
            if asked.picture is None:
                own.append(None)
                continue
            name = asked.picture.name
            content = asked.picture.sha256 or digests.get(name) or f"name {name}"
            names = copies.setdefault(content, {})
            own.append((content, names.setdefault(name, len(names))))
        keys.append(own)
    return keys


def _row(prompt: str, parts: Sequence[tuple[int, Asked]], labels: Sequence[tuple[int, str, str]]) -> Row:
    """One question with the answers of all folders; what any of them knows of it holds for all."""
    by_place = dict(parts)
    said: list[Said | None] = []
    for place, arm, _ in labels:
        said.append(by_place[place].said.get(arm) if place in by_place else None)
    truth = next((asked.truth for _, asked in parts if asked.truth is not None), None)
    judged: list[Judgement | None] = [
        None if truth is None or answer is None or answer.failed else truth.judge(answer.text) for answer in said
    ]
    group = next((asked.group for _, asked in parts if asked.group), "")
    return Row(prompt, tuple(said), "" if truth is None else truth.text, tuple(judged), group)


def _labels(found: Sequence[Answers]) -> list[tuple[int, str, str]]:
    """(folder's number, arm, label) of each column; labels are as short as they can be and still differ."""
    columns = [(place, arm) for place, answers in enumerate(found) for arm in answers.arms]
    names = [resolved(found[place].folder).name for place, _ in columns]
    arms = [arm for _, arm in columns]
    short = ["+".join(part.partition(":")[0] for part in CHAINED.split(arm)) for arm in arms]
    several = [f"{name}: {arm}" for name, arm in zip(names, arms, strict=True)]
    numbered = [f"{number}. {arm}" for number, arm in enumerate(arms, start=1)]
    choices = (short, arms, [f"{name}: {arm}" for name, arm in zip(names, short, strict=True)], several, numbered)
    labels = next(labels for labels in choices if len(set(labels)) == len(labels))
    return [(place, arm, label) for (place, arm), label in zip(columns, labels, strict=True)]


def _columns(
    found: Sequence[Answers], labels: Sequence[tuple[int, str, str]], cards: Sequence[Card]
) -> tuple[Column, ...]:
    rows = [row for card in cards for row in card.rows]
    return tuple(
        Column(label, found[place].arms[arm], tuple(_summary(number, rows)), found[place].folder)
        for number, (place, arm, label) in enumerate(labels)
    )


def _summary(number: int, rows: Iterable[Row]) -> Iterable[str]:
    """What the answers of one column amount to."""
    rows = list(rows)
    said = [answer for row in rows if (answer := row.said[number]) is not None]
    answered = [answer for answer in said if not answer.failed]
    judged = [judgement for row in rows if (judgement := row.judged[number]) is not None]
    mean = sum(len(answer.text.split()) for answer in answered) / max(1, len(answered))
    yield f"{_counted(len(answered), 'answer')}, {mean:.1f} words on average"
    marks = [kind for judgement in judged for _, _, kind in judgement.marks]
    if "present" in marks:
        yield f"{marks.count('absent')} of {_counted(len(marks), 'object')} mentioned are not in the picture"
    elif absent := sum(bool(judgement.absent) for judgement in judged):
        yield f"{absent} name something absent"
    if outcomes := [judgement.right for judgement in judged if judgement.right is not None]:
        yield f"{sum(outcomes)} of {len(outcomes)} right"
    open_ends = {"failed": len(said) - len(answered), "cut off": sum(answer.cut for answer in said)}
    if any(open_ends.values()):
        yield ", ".join(f"{number} {what}" for what, number in open_ends.items() if number)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _notes(
    found: Sequence[Answers],
    keys: Sequence[Sequence[Key | None]],
    labels: Sequence[tuple[int, str, str]],
    rows: Mapping[Key | None, Sequence[Row]],
) -> Iterable[str]:
    """Says what the folders do not share.

    Raises:
        UsageError: They share no picture.
    """
    about = [
        {key: asked.picture for key, asked in zip(own, answers.asked, strict=True)}
        for own, answers in zip(keys, found, strict=True)
    ]
    if len(found) > 1 and not set.intersection(*(set(pictures) for pictures in about)):
        listed = some([answers.folder for answers in found])
        raise UsageError(f"no picture is in all of {listed}", "give folders of answers about the same pictures")
    everything = {key: picture for pictures in reversed(about) for key, picture in pictures.items()}
    for answers, pictures in zip(found, about, strict=True):
        names = [picture.name for key, picture in everything.items() if key not in pictures and picture is not None]
        if names:
            own = {picture.name for picture in pictures.values() if picture is not None}
            other = sum(name in own for name in names)
            changed = f"; {other} of them have the same name and other contents there" if other else ""
            yield f"{_counted(len(names), 'picture')} not in {answers.folder}: {some(sorted(names))}{changed}."
    for number, (place, _, label) in enumerate(labels):
        left_open = sum(row.said[number] is None for key, held in rows.items() if key in about[place] for row in held)
        if left_open:
            yield f"{_counted(left_open, 'question')} about the same pictures without an answer by {label}."
