"""AMBER: describe the picture, and yes/no questions about what is there, its attributes and its relations.

The figures that are compared are shares in [0, 1]. ``results`` has the official script's digits instead: percent,
rounded to one decimal where that script rounds.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.nouns import Vocabulary, installed_language
from vlmfix.evals.benchmarks.yesno import PARSERS, Reading
from vlmfix.evals.inputs import Entry, Source, read_source
from vlmfix.evals.task import Judged, Numbers, Sample, Task, Verdict, Workload, ratio
from vlmfix.parsing import is_text, some, told

Part = Literal["all", "generative", "discriminative"]

EXACT = "exact"
DESCRIPTIONS = "generative"
GROUPS = {
    "generative": DESCRIPTIONS,
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",  # so are the relations with the answer no spelled
}
"""Group of each ``type`` of the annotations."""
ROWS: Mapping[str, tuple[str, ...]] = {
    "all": ("existence", "state", "number", "action", "relation"),
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
"""Rows of the official table, and the groups of questions in each."""
SHARES = {
    "chair": ("hallucinated", "mentions"),
    "cover": ("covered", "truth"),
    "hal": ("bad", "answers"),
    "cog": ("expected", "hallu"),
}
"""Figures of descriptions: what is counted, and among what."""
DESCRIBED = sorted({name for pair in SHARES.values() for name in pair} | {"words"})
ANSWERED = ("answers", "right", "no_truth", "no_said", "no_right", "unparsed", "words")
NOTHING_YET = 0.001
"""The official script begins each denominator with this, so that it can divide."""
FREQUENT = 20
QUERIES = ("query_all.json", "query_generative.json", "query_discriminative.json")
BY_DIMENSION = tuple(f"query_discriminative-{name}.json" for name in ("attribute", "existence", "relation"))


@dataclass(frozen=True, kw_only=True)
class Amber(Task):
    """AMBER's scores; no is the positive class of its questions.

    A description's target has ``truth`` and ``hallu``, the objects that are there and those that people would expect; a
    question's has its ``label``.

    Attributes:
        parser: How an answer becomes yes or no: ``exact``, as the official script has it, takes "Yes" and "No" and
            nothing else, not even "No."; or one of `vlmfix.evals.benchmarks.yesno.PARSERS`. What is neither is wrong,
            and is not counted as a no.
        association: For each object the words that speak of it; needed for descriptions.
        safe: Words that are never held against a description.
    """

    name: ClassVar = "amber"
    better: ClassVar = {
        "chair": "lower",
        "cover": "higher",
        "hal": "lower",
        "cog": "lower",
        "accuracy": "higher",
        "precision": "higher",
        "recall": "higher",
        "f1": "higher",
        "amber_score": "higher",
    }
    shifts: ClassVar = ("no_ratio", "length")
    max_new_tokens: ClassVar = 512

    parser: str = EXACT
    association: Mapping[str, Sequence[str]] = field(default_factory=dict)
    safe: Sequence[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.parser != EXACT and self.parser not in PARSERS:
            raise UsageError(
                f"no yes/no parser is called {self.parser!r}", f"use one of: {', '.join([EXACT, *PARSERS])}"
            )

    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Score one description or one answer.

        Raises:
            DataError: A description, and the language data for it is not installed.
        """
        return self._describe(sample, answer) if sample.group == DESCRIPTIONS else self._answer(sample, answer)

    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Shares of descriptions, five figures for each row of questions, and the AMBER score."""
        found: dict[str, Numbers] = {}
        if f"{DESCRIPTIONS}/answers" in sums:
            counts = {name: sums[f"{DESCRIPTIONS}/{name}"] for name in DESCRIBED}
            shares = {name: ratio(counts[above], counts[below]) for name, (above, below) in SHARES.items()}
            shares["length"] = ratio(counts["words"], counts["answers"])
            found |= {f"{DESCRIPTIONS}/{name}": value for name, value in shares.items()}
        for row in _rows(sums):
            found |= {f"{row}/{name}": value for name, value in _scores(_pooled(sums, row)).items()}
        if f"{DESCRIPTIONS}/chair" in found and "all/f1" in found:
            found["amber_score"] = (1 - found[f"{DESCRIPTIONS}/chair"] + found["all/f1"]) / 2
        return found

    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """The official figures: percent, rounded as the official script rounds.

        ``generative`` has chair, cover, hal, cog and n; ``discriminative`` has accuracy, precision, recall, f1, n and
        unparsed for every row; ``amber_score`` is (100 - chair + f1) / 2 of these, None unless both parts were asked.
        F1 is made of the rounded precision and recall.
        """
        sums = self.tally(judged).sums()
        found: dict[str, Any] = {}
        if f"{DESCRIPTIONS}/answers" in sums:
            counts = {name: sums[f"{DESCRIPTIONS}/{name}"] for name in DESCRIBED}
            found["generative"] = {
                name: _percent(counts[above], counts[below]) for name, (above, below) in SHARES.items()
            }
            found["generative"]["hal"] = round(
                100 - _share(counts["answers"] - counts["bad"], counts["answers"]) * 100, 1
            )
            found["generative"]["n"] = int(counts["answers"])
        if rows := _rows(sums):
            found["discriminative"] = {row: _official(row, _pooled(sums, row)) for row in rows}
        both = len(found) == 2
        score = (100 - found["generative"]["chair"] + found["discriminative"]["all"]["f1"]) / 2 if both else None
        return found | {"amber_score": score if score is None else round(score, 1)}

    def details(self, judged: Sequence[Judged], answers: Sequence[str]) -> dict[str, Any]:
        """The words that were hallucinated most often, and what every parser makes of the answers to questions."""
        found: dict[str, Any] = {}
        words = Counter(
            word
            for sample, verdict in judged
            if sample.group == DESCRIPTIONS
            for word in verdict.note.split(", ")
            if word
        )
        if any(sample.group == DESCRIPTIONS for sample, _ in judged):
            found["hallucinated_words"] = [
                {"word": word, "count": count} for word, count in words.most_common(FREQUENT)
            ]
        asked = [
            (sample, answer)
            for (sample, _), answer in zip(judged, answers, strict=True)
            if sample.group != DESCRIPTIONS
        ]
        if asked:
            found["parsers"] = {}
            for name in (EXACT, *PARSERS):
                task = replace(self, parser=name)
                again = [(sample, task.judge(sample, answer)) for sample, answer in asked]
                found["parsers"][name] = task.results(again)["discriminative"]["all"]
        return found

    def vocabulary(self) -> Vocabulary:
        """The word lists, ready for use."""
        return Vocabulary(self.association, frozenset(self.safe))

    def _describe(self, sample: Sample, answer: str) -> Verdict:
        truth, hallu = sample.target["truth"], sample.target["hallu"]
        found = self.vocabulary().describe(answer, truth, hallu, installed_language())
        counts = {
            "answers": 1,
            "mentions": len(found.kept),
            "hallucinated": len(found.hallucinated),
            "covered": found.covered,
            "truth": len(truth),
            "expected": found.expected,
            "hallu": len(hallu),
            "bad": bool(found.hallucinated),
            "words": len(answer.split()),
        }
        note = ", ".join(found.hallucinated)
        return Verdict(counts={name: float(value) for name, value in counts.items()}, note=note)

    def _answer(self, sample: Sample, answer: str) -> Verdict:
        reading = _exact(answer) if self.parser == EXACT else PARSERS[self.parser].read(answer)
        label = Reading[sample.target["label"].upper()]
        right, said_no, is_no = label in reading, Reading.NO in reading, label is Reading.NO
        counts = {
            "answers": 1,
            "right": right,
            "no_truth": is_no,
            "no_said": said_no,
            "no_right": is_no and said_no,
            "unparsed": reading is Reading.NEITHER,
            "words": len(answer.split()),
        }
        return Verdict(
            counts={name: float(value) for name, value in counts.items()},
            right=right,
            parsed=reading is not Reading.NEITHER,
            note=str(reading),
        )


def _exact(answer: str) -> Reading:
    return {"Yes": Reading.YES, "No": Reading.NO}.get(answer, Reading.NEITHER)


def _rows(sums: Mapping[str, Any]) -> list[str]:
    """Rows of the table with at least one question."""
    return [row for row, groups in ROWS.items() if any(f"{group}/answers" in sums for group in groups)]


def _pooled(sums: Mapping[str, Numbers], row: str) -> dict[str, Numbers]:
    """Counts of a row: the sum over its groups."""
    groups = [group for group in ROWS[row] if f"{group}/answers" in sums]
    return {name: np.sum([sums[f"{group}/{name}"] for group in groups], axis=0) for name in ANSWERED}


def _scores(counts: Mapping[str, Numbers]) -> dict[str, Numbers]:
    precision, recall = (ratio(counts["no_right"], counts[below]) for below in ("no_said", "no_truth"))
    return {
        "accuracy": ratio(counts["right"], counts["answers"]),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "no_ratio": ratio(counts["no_said"], counts["answers"]),
        "length": ratio(counts["words"], counts["answers"]),
    }


def _official(row: str, counts: Mapping[str, Numbers]) -> dict[str, float]:
    accuracy, precision, recall = (
        _percent(counts[above], counts[below])
        for above, below in (("right", "answers"), ("no_right", "no_said"), ("no_right", "no_truth"))
    )
    tiny = 0.001 if row == "existence" else 0.0001  # as the official script has it
    f1 = 2 * (precision / 100) * (recall / 100) / (precision / 100 + recall / 100 + tiny)
    return {
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "f1": round(f1 * 100, 1),
        "n": int(counts["answers"]),
        "unparsed": int(counts["unparsed"]),
    }


def _share(above: Numbers, below: Numbers) -> float:
    return float(above) / (float(below) + NOTHING_YET)


def _percent(above: Numbers, below: Numbers) -> float:
    return round(_share(above, below) * 100, 1)


def rules(folder: Path, *, parser: str = EXACT) -> Amber:
    """The task with the word lists of AMBER's folder: ``relation.json`` and ``safe_words.txt``, where they are.

    Args:
        folder: AMBER's ``data`` folder, or the one that it lies in.
        parser: How an answer becomes yes or no.

    Raises:
        DataError: A file has another shape.
        UsageError: There is no such parser.
    """
    association, safe = _find(folder, "relation.json"), _find(folder, "safe_words.txt")
    related: dict[str, list[str]] = {}
    if association is not None:
        entry = next(iter(read_source(association).entries()), Entry(str(association), {}))
        if not entry.fields or not all(_is_words(words) for words in entry.fields.values()):
            raise DataError(f"{association} is no association list", "give AMBER's: an object of lists of words")
        related = entry.fields
    words = [] if safe is None else read_source(safe).lines()
    return Amber(parser=parser, association=related, safe=[word.strip() for word in words if word.strip()])


def read(folder: Path, images: Path, *, part: str = "all", suffix: str = "") -> Workload:
    """Read AMBER's official files.

    Args:
        folder: AMBER's ``data`` folder, or the one that it lies in: ``annotations.json`` and, there or in ``query``,
            ``query_all.json`` or the files that it is made of.
        images: Folder of the pictures.
        part: ``generative`` (descriptions), ``discriminative`` (questions) or ``all``.
        suffix: Put behind every question, literally; the official questions have none.

    Raises:
        UsageError: There is no such part.
        DataError: A file is missing or has another shape, ids do not match, no query is left, or descriptions are
            asked for without the language data that scores them.
    """
    if part not in get_args(Part):
        raise UsageError(f"AMBER has no part {part!r}", f"use one of: {', '.join(get_args(Part))}")
    truths_file, query_files = _find(folder, "annotations.json"), _query_files(folder)
    if truths_file is None or not query_files:
        lacking = "no query file" if truths_file else "no annotations.json"
        raise DataError(f"{folder} has {lacking}", "give AMBER's data folder")
    truths, queries = read_source(truths_file), [read_source(file) for file in query_files]
    samples = [sample for sample in _samples(truths, queries, suffix) if part in ("all", _part(sample))]
    if not samples:
        raise DataError(f"{folder} has no query of the part {part!r}", "choose another part")
    _refuse_unscorable(folder, [sample for sample in samples if sample.group == DESCRIPTIONS])
    about = {
        "part": part,
        "suffix": suffix,
        "annotations": truths.about(),
        "queries": {source.path.name: source.about() for source in queries},
    }
    return Workload(samples=samples, images=images, about=about)


def _part(sample: Sample) -> Part:
    return "generative" if sample.group == DESCRIPTIONS else "discriminative"


def _samples(truths: Source, queries: Iterable[Source], suffix: str) -> list[Sample]:
    """Every query with its truth; the same query may be in several files."""
    known = _truths(truths)
    found: dict[str, Sample] = {}
    strangers = []
    for entry in (entry for source in queries for entry in source.entries()):
        entry.require("id", "image", "query")
        number = entry.fields["id"]
        if type(number) is not int or number not in known:
            strangers.append(number)
            continue
        sample = _sample(entry, *known[number], suffix)
        if found.setdefault(sample.id, sample) != sample:
            raise DataError(f"{entry.where}: id {sample.id} is asked twice, in two ways", "give one release of AMBER")
    if strangers:
        raise DataError(
            f"{len(strangers)} ids of queries are not in {truths.path}: {some(strangers)}",
            "give the queries and annotations of one release",
        )
    return list(found.values())


def _refuse_unscorable(folder: Path, descriptions: Sequence[Sample]) -> None:
    """Find out before a model is loaded whether descriptions can be scored."""
    if not descriptions:
        return
    words = rules(folder)
    if not words.association or not words.safe:
        raise DataError(
            f"{folder} has no {'safe_words.txt' if words.association else 'relation.json'}",
            "descriptions are scored with AMBER's word lists; the discriminative part needs none",
        )
    language = installed_language()
    try:
        for sample in descriptions:
            words.vocabulary().describe("", sample.target["truth"], sample.target["hallu"], language)
    except DataError as error:
        raise DataError(f"{folder}: {error.message}", error.hint) from error


def _truths(source: Source) -> dict[int, tuple[str, dict[str, Any]]]:
    """Group and target by id."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for entry in source.entries():
        entry.require("id", "type", "truth")
        number, kind, truth = (entry.fields[name] for name in ("id", "type", "truth"))
        if type(number) is not int or number in found:
            raise DataError(f"{entry.where}: id {told(number)} is no whole number, or stands twice", "check the file")
        if not isinstance(kind, str) or kind not in GROUPS:
            raise DataError(f"{entry.where}: type is {told(kind)}", f"known are {', '.join(GROUPS)}")
        if GROUPS[kind] == DESCRIPTIONS:
            hallu = entry.fields.get("hallu")
            if not _is_words(truth) or not _is_words(hallu):
                raise DataError(f"{entry.where}: truth and hallu must be lists of words", "check the file")
            found[number] = DESCRIPTIONS, {"truth": truth, "hallu": hallu}
        elif truth in ("yes", "no"):
            found[number] = GROUPS[kind], {"label": truth}
        else:
            raise DataError(f"{entry.where}: truth is {told(truth)}", "a question's truth is yes or no")
    return found


def _sample(entry: Entry, group: str, target: dict[str, Any], suffix: str) -> Sample:
    prompt = entry.text("query") + ("" if group == DESCRIPTIONS else suffix)
    return Sample(id=str(entry.fields["id"]), image=entry.text("image"), prompt=prompt, target=target, group=group)


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _query_files(folder: Path) -> list[Path]:
    """The fewest files that have all the queries that are there."""
    whole = _find(folder, QUERIES[0])
    if whole is not None:
        return [whole]
    parts = {name: _find(folder, name) for name in (*QUERIES[1:], *BY_DIMENSION)}
    wanted = QUERIES[1:] if parts[QUERIES[2]] else (QUERIES[1], *BY_DIMENSION)
    return [file for name in wanted if (file := parts[name]) is not None]


def _find(folder: Path, name: str) -> Path | None:
    places = (folder / between / name for between in ("", "query", "data", "data/query"))
    return next((place for place in places if os.path.isfile(place)), None)
