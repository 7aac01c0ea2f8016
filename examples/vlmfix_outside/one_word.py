"""A benchmark of questions that one word answers, from a file of JSON lines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlmfix.extend import (
    Benchmark,
    DataError,
    Judged,
    Numbers,
    Sample,
    UsageError,
    Verdict,
    Workload,
    parameter,
    plain,
    ratio,
)


@dataclass(frozen=True, kw_only=True)
class OneWord(Benchmark):
    """An answer is right when it holds the wanted word.

    Each line of the question file has ``image``, ``question`` and ``word``.

    Args:
        first: Only the answer's first word counts.
    """

    name: ClassVar[str] = "one-word"
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"accuracy": "higher"}
    shifts: ClassVar[tuple[str, ...]] = ("length",)
    max_new_tokens: ClassVar[int] = 16
    objective: ClassVar[str] = "accuracy"

    first: bool = parameter(False, bool, help="only the first word counts")

    def read(self, *, questions: Path | None, images: Path | None) -> Workload:
        """Reads a file of questions; see ``Benchmark.read``."""
        if questions is None or images is None:
            raise UsageError("one-word needs questions and pictures", "give --questions FILE and --images DIR")
        try:
            text = questions.read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
            samples = [
                Sample(
                    id=str(number), image=line["image"], prompt=line["question"], target={"word": line["word"].lower()}
                )
                for number, line in enumerate(lines, start=1)
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{questions} is no file of questions: {error}", "see the benchmark's docstring") from error
        about = {"questions": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}
        return Workload(samples=samples, images=images, about=about)

    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Looks for the word among the answer's."""
        words = re.findall(r"\w+", answer.lower())
        right = sample.target["word"] in (words[:1] if self.first else words)
        counts = {"right": float(right), "answers": 1.0, "words": float(len(words))}
        return Verdict(counts=counts, right=right, parsed=bool(words), note=" ".join(words))

    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Share of right answers, and their mean length in words."""
        return {
            "accuracy": ratio(sums["right"], sums["answers"]),
            "length": ratio(sums["words"], sums["answers"]),
        }

    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Returns both figures and the number of answers."""
        sums = self.tally(judged).sums()
        return {name: plain(value) for name, value in self.figures(sums).items()} | {"n": len(judged)}
