"""POPE: is there such an object in the picture? Yes or no.

Question files of every generation are read as they are, or questions are built from COCO instances. Scores follow the
official script; what the other published parsers make of the same answers stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.yesno import PARSERS, Reading, has_word
from vlmfix.evals.inputs import Entry, Source, files_of, read_source, source
from vlmfix.evals.task import Judged, Numbers, Sample, Task, Verdict, Workload, plain, ratio
from vlmfix.parsing import told
from vlmfix.world import pope as rule
from vlmfix.world.pope import SPLITS

SUFFIX = "\nAnswer the question using a single word or phrase."
OFFICIAL = "official"

FIELDS = ("image", "text", "label", "question_id")
FIELDS_V2 = ("image_name", "query", "label")
"""POPEv2's questions have no number of their own."""

KNOWN = {
    "dc9b6c41ad832c48da758cfa85b37d2c": "COCO random, current (since November 2023)",
    "64902313fb995e09fa478de9741910d7": "COCO popular, current (since November 2023)",
    "3b1a278f8d61acd21b27020d0af817cb": "COCO adversarial, current (since November 2023)",
    "b635b20061b1262cba65ed5bef7660a2": "COCO random, first release (2910 questions)",
    "8233e15e9bb7587b03a624b38a1cee74": "COCO popular, first release",
    "b3f9df71709d436462611d7e88ce1447": "COCO adversarial, first release",
    "196378cf4eed618c51a814dba75ba410": "COCO popular, as shipped with VCD",
    "18fb002e51fc2fb8bff4ccd4469661b2": "COCO adversarial, as shipped with VCD (57 questions with imange)",
    "fefaa62a6a849aa5d219c0dfc8fbbdac": "A-OKVQA random, by POPE's authors",
    "a2ead7d2a8e19ad7b570f3bcfd1d279a": "A-OKVQA popular, by POPE's authors",
    "93a94c763f52c9108678616e92ce47ac": "A-OKVQA adversarial, by POPE's authors",
    "fb7febb7630ea7c16870ed744e81815d": "GQA random, by POPE's authors",
    "d70bdec01a590524073e371819566c7d": "GQA popular, by POPE's authors",
    "c92e5e77da5ecec97e3f626580d7e8ad": "GQA adversarial, by POPE's authors",
    "f3096df532efd2d9b6d472a07a67c1f8": "A-OKVQA random, as shipped with VCD",
    "d8ea7a741e0b043cd365c97b4b586a8e": "A-OKVQA popular, as shipped with VCD",
    "b110000c34a3b768995cfdfb77ae6d98": "A-OKVQA adversarial, as shipped with VCD",
    "2d41cf60dde63a52d6d93ba088eb6a93": "GQA random, as shipped with VCD",
    "68eeb1b64295b5900dd970bd9544f113": "GQA popular, as shipped with VCD",
    "6b7860069bcc85069e91424c72fd8255": "GQA adversarial, as shipped with VCD",
    "e588f193fdf52eec4b52c3b927747208": "POPEv2 (1000 questions)",
    "9736a20ddbcee1f3f3ce5d0226586038": "RePOPE, COCO random (2774 of current POPE, 144 labels turned)",
    "0e7869000daab1e1ebf10c99206c0ef8": "RePOPE, COCO popular (2727 of current POPE, 178 labels turned)",
    "d6c8a054d0f99d813e3abc9610ee5b82": "RePOPE, COCO adversarial (2684 of current POPE, 172 labels turned)",
}
"""Published files by the md5 of their bytes. RePOPE leaves out POPE's questions whose label nobody can tell, and turns
labels that are wrong, most of them from yes to no; pictures and questions are the same."""


@dataclass(frozen=True, kw_only=True)
class Pope(Task):
    """POPE's scores; yes is the positive class.

    Attributes:
        parser: Who reads the answers, one of `vlmfix.evals.benchmarks.yesno.PARSERS`.
    """

    name: ClassVar = "pope"
    better: ClassVar = {
        "accuracy": "higher",
        "precision": "higher",
        "recall": "higher",
        "f1": "higher",
    }
    shifts: ClassVar = ("yes_ratio", "length")
    max_new_tokens: ClassVar = 128

    parser: str = OFFICIAL

    def __post_init__(self) -> None:
        if self.parser not in PARSERS:
            raise UsageError(f"no yes/no parser is called {self.parser!r}", f"use one of: {', '.join(PARSERS)}")

    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Read an answer and put it into the confusion matrix.

        Unparsed is an answer that the parser reads nothing in, or that has neither the word yes nor the word no, so
        that the parser goes by its default. It is counted, and scored as the parser says all the same.
        """
        parser = PARSERS[self.parser]
        reading = parser.read(answer)
        cell = parser.cell(reading, Reading[sample.target["label"].upper()])
        parsed = has_word(answer) and reading is not Reading.NEITHER
        counts = {name: float(name == cell) for name in ("tp", "fp", "tn", "fn")}
        counts |= {"answers": 1.0, "unparsed": float(not parsed), "words": float(len(answer.split()))}
        return Verdict(counts=counts, right=cell in ("tp", "tn"), parsed=parsed, note=str(reading))

    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Five scores and the mean length of every split, the unweighted mean of their F1, and F1 over all answers."""
        splits = _splits(sums)
        found: dict[str, Numbers] = {}
        for split in splits:
            found |= {f"{split}/{name}": value for name, value in _scores(_of(sums, split)).items()}
        if splits:
            found["mean/f1"] = np.mean([found[f"{split}/f1"] for split in splits], axis=0)
            pooled = {
                name: np.sum([sums[f"{split}/{name}"] for split in splits], axis=0) for name in _of(sums, splits[0])
            }
            found["pooled/f1"] = _scores(pooled)["f1"]
        return found

    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """By split: accuracy, precision, recall, f1, yes_ratio, n and unparsed."""
        return self._by_split(self.tally(judged).sums())

    def details(self, judged: Sequence[Judged], answers: Sequence[str]) -> dict[str, Any]:
        """Mean and pooled F1, mean length in words, and what every published parser makes of the same answers.

        ``disagree`` counts the answers that a parser reads otherwise than the official one; ``any_disagree`` those that
        any of them does.
        """
        samples = [sample for sample, _ in judged]
        parsers: dict[str, Any] = {}
        readings: dict[str, list[str]] = {}
        for name in PARSERS:
            task = replace(self, parser=name)
            verdicts = task.judge_all(samples, answers)
            readings[name] = [verdict.note for verdict in verdicts]
            sums = task.tally(list(zip(samples, verdicts, strict=True))).sums()
            parsers[name] = {"splits": task._by_split(sums), **task._overall(sums)}
        for name, said in readings.items():
            parsers[name]["disagree"] = sum(one != other for one, other in zip(said, readings[OFFICIAL], strict=True))
        return {
            **self._overall(self.tally(judged).sums()),
            "length": sum(verdict.counts["words"] for _, verdict in judged) / max(1, len(judged)),
            "parsers": parsers,
            "any_disagree": sum(len(set(said)) > 1 for said in zip(*readings.values(), strict=True)),
        }

    def _by_split(self, sums: Mapping[str, Numbers]) -> dict[str, Any]:
        figures = self.figures(sums)
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        return {
            split: {name: plain(figures[f"{split}/{name}"]) for name in names}
            | {"n": int(sums[f"{split}/answers"]), "unparsed": int(sums[f"{split}/unparsed"])}
            for split in _splits(sums)
        }

    def _overall(self, sums: Mapping[str, Numbers]) -> dict[str, float | None]:
        figures = self.figures(sums)
        return {f"{kind}_f1": plain(figures[f"{kind}/f1"]) for kind in ("mean", "pooled") if figures}


def _splits(sums: Mapping[str, Numbers]) -> list[str]:
    return [name.removesuffix("/answers") for name in sums if name.endswith("/answers")]


def _of(sums: Mapping[str, Numbers], split: str) -> dict[str, Numbers]:
    """The counts of one split, by their own names."""
    return {name.removeprefix(f"{split}/"): value for name, value in sums.items() if name.startswith(f"{split}/")}


def _scores(counts: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """The official script's formulas, in its order of operations, so that the last digit agrees."""
    tp, fp, tn, answers = (counts[name] for name in ("tp", "fp", "tn", "answers"))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + counts["fn"])
    return {
        "accuracy": ratio(tp + tn, answers),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, answers),
        "length": ratio(counts["words"], answers),
    }


def read(questions: Path, images: Path, *, suffix: str = SUFFIX) -> Workload:
    """Read official question files, whatever their generation.

    Args:
        questions: A file, or a folder with ``.json`` or ``.jsonl`` files; each is one split. A file with exactly one of
            random, popular and adversarial in its name is that split; any other has its own name.
        images: Folder of the pictures.
        suffix: Put behind every question, literally.

    Raises:
        DataError: A file has another shape, a label that is neither yes nor no, an id twice, or no question; or two
            files are the same split.
    """
    splits: dict[str, Source] = {}
    for path in files_of(questions, (".json", ".jsonl")):
        split = _split(path)
        if split in splits:
            raise DataError(
                f"{splits[split].path.name} and {path.name} are both the split {split}",
                "give the files of one source at a time",
            )
        splits[split] = read_source(path)
    splits = {split: splits[split] for split in sorted(splits, key=_official_first)}
    return _workload(splits, images, suffix, {split: KNOWN.get(file.md5) for split, file in splits.items()})


def build(pictures: Iterable[rule.Picture], images: Path, *, seed: int, suffix: str = SUFFIX) -> Workload:
    """Build questions from COCO instances by the official rule, for 500 pictures with three objects or more.

    The official script draws unseeded; this draws by seed, so that a list of questions can be had again.

    Args:
        pictures: File name and object names, without repeats and in the order of the annotations, of every picture;
            taken one at a time.
        images: Folder of the pictures.
        seed: Seed of every draw.
        suffix: Put behind every question, literally.

    Raises:
        DataError: No picture has three objects.
    """
    built = {
        split: source(Path(f"{split}.json"), text.encode()) for split, text in build_lines(pictures, seed=seed).items()
    }
    return _workload(built, images, suffix, dict.fromkeys(built, f"built by the official rule with seed {seed}"))


def build_lines(pictures: Iterable[rule.Picture], *, seed: int) -> dict[str, str]:
    """The text of the three question files that `build` asks from, by split, in the official format.

    Raises:
        DataError: No picture has three objects.
    """
    names: dict[str, None] = {}

    def noted() -> Iterator[rule.Picture]:
        for picture in pictures:
            names.update(dict.fromkeys(picture[1]))
            yield picture

    chosen = rule.choose(noted(), seed=seed)
    if not chosen:
        raise DataError(
            f"no picture has {rule.POSITIVES} objects or more",
            "POPE asks about such pictures only; give more instances",
        )
    return {
        split: "".join(f"{line}\n" for line in rule.lines(chosen, split=split, seed=seed, names=list(names)))
        for split in SPLITS
    }


def _split(path: Path) -> str:
    named = [split for split in SPLITS if split in path.name.lower()]
    return named[0] if len(named) == 1 else path.stem


def _official_first(split: str) -> tuple[int, str]:
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS)), split


def _workload(
    splits: Mapping[str, Source], images: Path, suffix: str, generations: Mapping[str, str | None]
) -> Workload:
    samples = [sample for split, file in splits.items() for sample in _samples(split, file, suffix)]
    about = {split: file.about() | {"generation": generations[split]} for split, file in splits.items()}
    return Workload(samples=samples, images=images, about={"questions": about, "suffix": suffix})


def _samples(split: str, file: Source, suffix: str) -> list[Sample]:
    """The questions of one file.

    Raises:
        DataError: It has none, or one that is not as it should be.
    """
    found: dict[str, Sample] = {}
    for number, entry in enumerate(file.entries(), start=1):
        sample = _sample(split, entry, number, suffix)
        if sample.id in found:
            raise DataError(
                f"{entry.where} repeats the question_id {told(entry.fields['question_id'])}",
                "ids must be unique within a file",
            )
        found[sample.id] = sample
    if not found:
        raise DataError(f"{file.path} has no question", "give a question file as published")
    return list(found.values())


def _sample(split: str, entry: Entry, number: int, suffix: str) -> Sample:
    second = "query" in entry.fields
    names = FIELDS_V2 if second else FIELDS
    entry.require(*names)
    image, question, label = (entry.text(name) for name in names[:3])
    label = label.strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{entry.where}: the label is {told(label)}", "it must be yes or no")
    return Sample(
        id=f"{split}/{number if second else entry.identity('question_id')}",
        image=image.lstrip("/"),  # POPEv2 writes paths from the root of its own disk
        prompt=question + suffix,
        target={"label": label},
        group=split,
    )
