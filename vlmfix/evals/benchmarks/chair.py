"""CHAIR: which objects a caption names that are not in the picture.

Ground truth of a picture are the categories of its COCO instances and the objects that its reference captions name,
found by the same function as those of the answer.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.coco import AnnotatedPicture, Annotations, Progress, read_annotations
from vlmfix.evals.benchmarks.words import Mention, words_of
from vlmfix.evals.inputs import read_source
from vlmfix.evals.task import Judged, Numbers, Sample, Task, Verdict, Workload, plain, ratio
from vlmfix.parsing import DIGITS, some

QUARTERS = 4
FREQUENT = 20
"""So many of the words that were hallucinated most often are reported."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What CHAIR figures of that name were measured with.

    Attributes:
        prompt: What the model is asked.
        max_new_tokens: Longest answer, in tokens.
        trim: Whether the last, incomplete sentence is left out of the score.
    """

    prompt: str
    max_new_tokens: int
    trim: bool


PROTOCOLS: Mapping[str, Protocol] = {
    "chair-512": Protocol(prompt="Please describe this image in detail.", max_new_tokens=512, trim=False),
    "chair-64-trim": Protocol(prompt="Please describe this image in detail.", max_new_tokens=64, trim=True),
}


@dataclass(frozen=True, kw_only=True)
class Chair(Task):
    """CHAIR of the pattern version, with recall, precision and length beside it.

    A sample's target has ``objects``, the categories of its instances, and ``captions``, its reference captions.

    Attributes:
        synonyms: Text of a word table in the original's format, which is then read by the original's rules; None for
            our own table. See `vlmfix.evals.benchmarks.words`.
        trim: Score a caption only as far as its last full stop; one without a full stop is scored whole.
    """

    name: ClassVar = "chair"
    better: ClassVar = {
        "chair_s": "lower",
        "chair_i": "lower",
        "recall": "higher",
        "precision": "higher",
        "f1": "higher",
    }
    shifts: ClassVar = ("length",)
    max_new_tokens: ClassVar = PROTOCOLS["chair-512"].max_new_tokens

    synonyms: str | None = None
    trim: bool = False

    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Count mentions; right is a caption without a hallucinated one.

        Raises:
            DataError: The picture has a category that the word table lacks.
        """
        truth = self.truth(sample)
        reading = words_of(self.synonyms).read(self.scored(answer))
        absent = [mention.word for mention in reading.mentions if mention.node not in truth]
        named = {mention.node for mention in reading.mentions}
        counts = {
            "captions": 1,
            "hallucinated_captions": bool(absent),
            "mentions": len(reading.mentions),
            "hallucinated": len(absent),
            "distinct": len(named),
            "found": len(named & truth),
            "present": len(truth),
            "tokens": reading.tokens,
        }
        return Verdict(
            counts={name: float(value) for name, value in counts.items()}, right=not absent, note=", ".join(absent)
        )

    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """CHAIR_s, CHAIR_i, recall, precision and F1, all pooled over captions, and the mean length in tokens.

        Tokens are counted after CHAIR's own processing: a phrase such as "traffic light" is one.
        """
        recall, precision = ratio(sums["found"], sums["present"]), ratio(sums["found"], sums["distinct"])
        return {
            "chair_s": ratio(sums["hallucinated_captions"], sums["captions"]),
            "chair_i": ratio(sums["hallucinated"], sums["mentions"]),
            "recall": recall,
            "precision": precision,
            "f1": ratio(2 * recall * precision, recall + precision),
            "length": ratio(sums["tokens"], sums["captions"]),
        }

    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """chair_s, chair_i, recall, precision, f1, length and n.

        Raises:
            DataError: No caption names any object, so that nothing was measured.
        """
        if not judged:
            return {**dict.fromkeys([*self.better, *self.shifts]), "n": 0}
        sums = self.tally(judged).sums()
        if not sums["mentions"]:
            raise DataError(
                f"none of {len(judged)} captions names an object that the word table knows",
                "look at the answers: they may be empty, or in another language than the table",
            )
        return {name: plain(value) for name, value in self.figures(sums).items()} | {"n": len(judged)}

    def details(self, judged: Sequence[Judged], answers: Sequence[str]) -> dict[str, Any]:
        """Where and what was hallucinated.

        ``by_quarter`` counts the first, second, third and last quarter of each caption's mentions, ``by_sentence`` its
        sentences; ``words_per_caption`` are words as written.
        """
        quarters: Counter[tuple[int, bool]] = Counter()
        sentences: Counter[tuple[int, bool]] = Counter()
        words: Counter[str] = Counter()
        without = 0
        for (sample, _), answer in zip(judged, answers, strict=True):
            found = self.mentions(sample, answer)
            without += not found
            for number, (mention, absent) in enumerate(found):
                quarters[QUARTERS * number // len(found), absent] += 1
                sentences[mention.sentence, absent] += 1
                words[mention.node] += absent
        captions = max(1, len(judged))
        return {
            "words": "own table" if self.synonyms is None else "table given, read by the original's rules",
            "by_quarter": _by_place(quarters, "quarter"),
            "by_sentence": _by_place(sentences, "sentence"),
            "hallucinated_words": [
                {"word": word, "count": count} for word, count in words.most_common(FREQUENT) if count
            ],
            "mentions_per_caption": quarters.total() / captions,
            "words_per_caption": sum(len(self.scored(answer).split()) for answer in answers) / captions,
            "captions_without_mention": without,
        }

    def mentions(self, sample: Sample, answer: str) -> list[tuple[Mention, bool]]:
        """What a caption names, in order, with its place in the text, and whether it is hallucinated."""
        truth = self.truth(sample)
        reading = words_of(self.synonyms).read(self.scored(answer))
        return [(mention, mention.node not in truth) for mention in reading.mentions]

    def truth(self, sample: Sample) -> frozenset[str]:
        """Categories that are in the picture.

        Raises:
            DataError: One of them is not in the word table.
        """
        return _truth(self.synonyms, tuple(sample.target["objects"]), tuple(sample.target["captions"]))

    def scored(self, answer: str) -> str:
        """The part of an answer that is scored, which is its beginning."""
        end = answer.rfind(".") + 1
        return answer[:end] if self.trim and end else answer


@lru_cache(maxsize=1 << 17)
def _truth(synonyms: str | None, objects: tuple[str, ...], captions: tuple[str, ...]) -> frozenset[str]:
    words = words_of(synonyms)
    unknown = [name for name in objects if name not in words.nodes]
    if unknown:
        raise DataError(
            f"the word table does not know the categories {some(unknown)}", "give a table with a row for each category"
        )
    return frozenset({words.nodes[name] for name in objects} | words.nodes_of(captions))


def _by_place(counts: Mapping[tuple[int, bool], int], name: str) -> list[dict[str, Any]]:
    rows = []
    for place in sorted({place for place, _ in counts}):
        absent = counts.get((place, True), 0)
        mentions = absent + counts.get((place, False), 0)
        rows.append({name: place + 1, "mentions": mentions, "hallucinated": absent, "share": absent / mentions})
    return rows


def read(
    instances: Path | Sequence[Path],
    captions: Path | Sequence[Path],
    images: Path,
    *,
    protocol: str = "chair-512",
    prompt: str | None = None,
    count: int | None = None,
    seed: int = 0,
    listed: Path | None = None,
    synonyms: str | None = None,
    progress: Progress | None = None,
) -> Workload:
    """Ask for a caption of COCO pictures.

    Args:
        instances: COCO instances, one file or several (train and val).
        captions: COCO captions of the same pictures.
        images: Folder of the pictures.
        protocol: One of `PROTOCOLS`; its ``trim`` and ``max_new_tokens`` are for the task and the model.
        prompt: Asked about every picture, literally; None for the protocol's.
        count: Ask about this many pictures; None for all. A smaller count gives a part of a larger one's.
        seed: Seed of the draw: image ids are sorted, shuffled by ``random.Random(seed)``, and the first taken.
        listed: Text file with the pictures to ask about, in that order, one file name or image id per line.
        synonyms: The task's word table, to make sure that it knows the categories.
        progress: Told the bytes read and those of the file, while an annotation file is read for the first time.

    Raises:
        UsageError: An unknown protocol, both a count and a list, or a count below 1.
        DataError: A file has another shape; ids do not match; there are fewer pictures than asked for; a picture is
            missing or has no captions; a category is not in the word table.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"no CHAIR protocol is called {protocol!r}", f"use one of: {', '.join(PROTOCOLS)}")
    if count is not None and (listed is not None or count < 1):
        raise UsageError(f"count={count} is not allowed", "give a number of pictures from 1, or a list, not both")
    annotations = read_annotations(instances, captions, progress=progress)
    about: dict[str, Any] = {"protocol": protocol, **annotations.sources}
    if listed is not None:
        chosen, about["list"] = _listed(annotations, listed)
    else:
        chosen = _drawn(annotations, count, seed)
        about |= {"count": count, "seed": None if count is None else seed}
    about["prompt"] = PROTOCOLS[protocol].prompt if prompt is None else prompt
    _refuse_incomplete(chosen, images, captions)
    try:
        for picture in chosen:
            _truth(synonyms, picture.objects, ())
    except DataError as error:
        named = ", ".join(annotations.sources["instances"]["file"])
        raise DataError(f"{named}: {error.message}", error.hint) from error
    return Workload(samples=[_sample(picture, about["prompt"]) for picture in chosen], images=images, about=about)


def _sample(picture: AnnotatedPicture, prompt: str) -> Sample:
    target = {"objects": list(picture.objects), "captions": list(picture.captions)}
    return Sample(id=str(picture.id), image=picture.file, prompt=prompt, target=target)


def _drawn(annotations: Annotations, count: int | None, seed: int) -> list[AnnotatedPicture]:
    numbers = sorted(annotations.pictures)
    if count is not None:
        if count > len(numbers):
            raise DataError(f"{count} pictures were asked for, {len(numbers)} are annotated", "lower the count")
        random.Random(seed).shuffle(numbers)
        numbers = sorted(numbers[:count])
    return [annotations.pictures[number] for number in numbers]


def _listed(annotations: Annotations, path: Path) -> tuple[list[AnnotatedPicture], dict[str, Any]]:
    source = read_source(path)
    lines = [line.strip() for line in source.lines() if line.strip()]
    if not lines:
        raise DataError(f"{path} lists no picture", "write one file name or image id per line")
    by_name: dict[str, AnnotatedPicture] = {}
    for picture in annotations.pictures.values():
        by_name |= {picture.file: picture, Path(picture.file).name: picture}
    found = [by_name.get(line) or _numbered(annotations, line) for line in lines]
    unknown = [line for line, picture in zip(lines, found, strict=True) if picture is None]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(lines)} pictures in {path} are not in the annotations: {some(unknown)}",
            "give the annotations of these pictures; train and val may be given together",
        )
    chosen = [picture for picture in found if picture is not None]
    twice = [str(number) for number, times in Counter(picture.id for picture in chosen).items() if times > 1]
    if twice:
        raise DataError(f"{path} lists {len(twice)} pictures more than once: {some(twice)}", "list each picture once")
    return chosen, source.about()


def _numbered(annotations: Annotations, line: str) -> AnnotatedPicture | None:
    """The picture that has a line for its image id; a number of thousands of digits is none's."""
    return annotations.pictures.get(int(line)) if line.isdecimal() and len(line) <= DIGITS else None


def _refuse_incomplete(chosen: Sequence[AnnotatedPicture], images: Path, captions: Path | Sequence[Path]) -> None:
    """Find missing pictures and missing captions before a model is loaded."""
    if not os.path.isdir(images):
        raise DataError(f"there is no folder {images}", "give the folder of the pictures")
    missing = [picture.file for picture in chosen if not os.path.isfile(images / picture.file)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(chosen)} pictures are not in {images}: {some(missing)}",
            "give the folder of the pictures that the annotations are about",
        )
    silent = [picture.id for picture in chosen if not picture.captions]
    if silent:
        files = some([captions] if isinstance(captions, Path) else captions)
        raise DataError(
            f"{len(silent)} of {len(chosen)} pictures have no reference caption in {files}: {some(silent)}",
            "their ground truth would lack objects; list other pictures, or give the captions",
        )
