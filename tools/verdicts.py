"""How often a comparison calls something better or worse: by chance, and where an arm is better indeed.

    python -m tools.verdicts

Arms are drawn, not run: every picture has its own difficulty, questions about one picture share it, and an arm gives
the plain arm's answer to most questions. The draws go through the benchmark's own counts and figures and `compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vlmfix.evals.benchmarks.amber import DESCRIPTIONS, Amber
from vlmfix.evals.benchmarks.chair import Chair
from vlmfix.evals.benchmarks.hallusion import Hallusion
from vlmfix.evals.benchmarks.mme import HALLUCINATION, Mme
from vlmfix.evals.benchmarks.pope import Pope
from vlmfix.evals.comparison.compare import Comparison, compare
from vlmfix.evals.record import PLAIN, EvalRun, Record
from vlmfix.evals.task import Judged, Sample, Task, Verdict
from vlmfix.world.pope import SPLITS

CHANGED = 0.2
"""Share of the answers that an arm draws anew; the others are the plain arm's."""
LEVEL = 1.5
"""Log odds of a right answer about a picture of middling difficulty."""
QUESTIONS = ("existence", "state", "number", "action", "relation", "existence")
"""Groups of AMBER's questions about each picture."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnRun(EvalRun):
    """A run whose verdicts were drawn.

    Attributes:
        verdicts: By arm, in the order of the samples.
    """

    verdicts: Mapping[str, Sequence[Verdict]]

    def judged(self, arm: str) -> list[Judged]:
        """Samples with their verdicts."""
        return list(zip(self.samples, self.verdicts[arm], strict=True))


@dataclass(frozen=True)
class Exam:
    """A benchmark as far as chance is concerned.

    Attributes:
        task: Its rules.
        samples: Makes the samples about so many pictures.
        figure: The figure whose verdicts are counted where an arm is better.
    """

    task: Task
    samples: Callable[[int], list[Sample]]
    figure: str


def _asked(picture: int, number: int, *, group: str = "", unit: str = "", key: str = "", **target: object) -> Sample:
    """A question that is to be answered by yes when its number is even; those with one key are one question."""
    label = "no" if number % 2 else "yes"
    name = f"{group}/{picture}/{number}"
    target = {"label": label, "key": key or name, **target}
    return Sample(id=name, image=f"{picture}.png", prompt="?", target=target, group=group, unit=unit)


def _pope(pictures: int) -> list[Sample]:
    """Six questions a picture in each split; those with the answer yes are the same in all of them, as in POPE."""
    return [
        _asked(picture, number, group=split, key="" if number % 2 else f"{picture}/{number}")
        for split in SPLITS
        for picture in range(pictures)
        for number in range(6)
    ]


def _chair(pictures: int) -> list[Sample]:
    return [Sample(id=str(picture), image=f"{picture}.png", prompt="?") for picture in range(pictures)]


def _amber(pictures: int) -> list[Sample]:
    """A description and six questions a picture."""
    return [
        *(Sample(id=f"{n}", image=f"{n}.png", prompt="?", group=DESCRIPTIONS) for n in range(pictures)),
        *(_asked(n, place, group=group) for n in range(pictures) for place, group in enumerate(QUESTIONS)),
    ]


def _mme(pictures: int) -> list[Sample]:
    """Two questions a picture; the pictures are shared out over the tasks."""
    tasks = [HALLUCINATION[picture % len(HALLUCINATION)] for picture in range(pictures)]
    return [
        _asked(picture, number, group=task, unit=f"{task}/{picture}")
        for picture, task in enumerate(tasks)
        for number in range(2)
    ]


def _hallusion(sets: int) -> list[Sample]:
    """Sets of two questions about three figures, one of them edited."""
    return [
        _asked(
            unit,
            number,
            unit=str(unit),
            unclear_is_right=False,
            judgements={},
            groups={
                "qAcc": [f"{unit}/{number % 2}", 3],
                "fAcc": [f"{unit}/{number // 2}", 2],
                ("hard" if number // 2 == 2 else "easy"): [f"{unit}/{number % 2}", 1 if number // 2 == 2 else 2],
            },
        )
        for unit in range(sets)
        for number in range(6)
    ]


EXAMS: Mapping[str, Exam] = {
    "pope": Exam(Pope(), _pope, "mean/f1"),
    "chair": Exam(Chair(), _chair, "chair_i"),
    "amber": Exam(Amber(), _amber, "amber_score"),
    "mme": Exam(Mme(), _mme, "total/score"),
    "hallusion": Exam(Hallusion(), _hallusion, "aAcc"),
}


def drawn(exam: Exam, pictures: int, arms: int, *, gain: float, seed: int) -> DrawnRun:
    """A run of plain decoding and of some arms.

    Args:
        exam: The benchmark.
        pictures: How many.
        arms: How many beside the plain one.
        gain: Added by every arm to the log odds of a right answer, and of a mention that is no hallucination.
        seed: Of all draws.
    """
    generator = np.random.default_rng(seed)
    samples = exam.samples(pictures)
    ease = dict(zip(dict.fromkeys(s.drawn_as() for s in samples), generator.normal(0, 1, len(samples)), strict=False))
    keys = {key: number for number, key in enumerate(dict.fromkeys(_key(sample) for sample in samples))}
    luck = {PLAIN: generator.random((len(keys), 4))}
    for arm in range(arms):
        anew = generator.random(len(keys)) < CHANGED
        luck[str(arm)] = np.where(anew[:, None], generator.random((len(keys), 4)), luck[PLAIN])
    known: dict[tuple[str, str], Verdict] = {}

    def verdict(arm: str, sample: Sample) -> Verdict:
        odds = LEVEL + ease[sample.drawn_as()] + (0.0 if arm == PLAIN else gain)
        if "label" not in sample.target:
            return _described(exam.task, luck[arm][keys[_key(sample)]], odds)
        label = sample.target["label"]
        right = luck[arm][keys[_key(sample)], 0] < _chance(odds)
        answer = {"yes": "Yes", "no": "No"}[label if right else {"yes": "no", "no": "yes"}[label]]
        if (label, answer) not in known:
            known[label, answer] = exam.task.judge(sample, answer)
        return known[label, answer]

    return DrawnRun(
        Path("drawn"),
        {"arms": {arm: {"spec": arm} for arm in luck}, "count": len(samples)},
        exam.task,
        samples,
        {arm: {sample.id: Record(id=sample.id, answer="") for sample in samples} for arm in luck},
        verdicts={arm: [verdict(arm, sample) for sample in samples] for arm in luck},
    )


def _key(sample: Sample) -> str:
    return str(sample.target.get("key", sample.id))


def _chance(odds: float) -> float:
    return float(1 / (1 + np.exp(-odds)))


def _described(task: Task, luck: np.ndarray, odds: float) -> Verdict:
    """Counts of a description, in CHAIR's names and in AMBER's."""
    present = 2 + int(4 * luck[0])
    named = 2 + int(8 * luck[1])
    wrong = min(named, int(-np.log(1 - luck[2]) / -np.log(1 - _chance(odds)) * 2))  # geometric
    found = min(present, named - wrong, 1 + int(present * luck[3]))
    counts: dict[str, float]
    if isinstance(task, Chair):
        counts = {
            "captions": 1,
            "hallucinated_captions": wrong > 0,
            "mentions": named,
            "hallucinated": wrong,
            "distinct": found + wrong,
            "found": found,
            "present": present,
            "tokens": 8 * named,
        }
    else:
        counts = {
            "answers": 1,
            "mentions": named,
            "hallucinated": wrong,
            "covered": found,
            "truth": present,
            "expected": min(wrong, 1),
            "hallu": 3,
            "bad": wrong > 0,
            "words": 8 * named,
        }
    return Verdict(counts={name: float(value) for name, value in counts.items()}, right=not wrong)


def compared(name: str, pictures: int, arms: int, gain: float, draws: int, seed: int) -> Comparison:
    """A comparison of drawn arms."""
    return compare([drawn(EXAMS[name], pictures, arms, gain=gain, seed=seed)], draws=draws, seed=seed)


def marks(comparison: Comparison) -> list[tuple[str, str]]:
    """Figures that are called better or worse, with what they are called."""
    return [
        (change.figure, change.direction)
        for arm in comparison.arms
        for change in arm.changes
        if change.direction in ("better", "worse")
    ]


def _told(name: str, pictures: int, arms: int, gain: float, draws: int, seed: int) -> tuple[bool, bool, float]:
    """Whether anything is marked, whether the exam's figure is called better, and how much it differs."""
    comparison = compared(name, pictures, arms, gain, draws, seed)
    figure = EXAMS[name].figure
    change = next(change for change in comparison.arms[0].changes if change.figure == figure)
    return bool(marks(comparison)), change.direction == "better", change.difference.value or 0.0


def _lines(given: argparse.Namespace, pool: ProcessPoolExecutor) -> Iterator[str]:
    yield f"nothing differs: share of {given.repeats} comparisons with any mark"
    for name in EXAMS:
        for arms, sizes in ((1, (30, 100, 500)), (5, (30, 100))):
            cells = []
            for pictures in sizes:
                ask = partial(_told, name, pictures, arms, 0.0, given.draws * (1 if arms == 1 else 2))
                found = list(pool.map(ask, range(given.repeats), chunksize=8))
                cells.append(f"{pictures} pictures {np.mean([any_mark for any_mark, _, _ in found]):.3f}")
            yield f"{name}, {arms} {'arm' if arms == 1 else 'arms'}: {', '.join(cells)}"
    yield "log odds of a right answer 0.5 higher: share of comparisons that call the figure better"
    for name, exam in EXAMS.items():
        cells = []
        for pictures in (30, 100, 500):
            ask = partial(_told, name, pictures, 1, 0.5, given.draws)
            found = list(pool.map(ask, range(10**6, 10**6 + given.repeats), chunksize=8))
            better = np.mean([called for _, called, _ in found])
            cells.append(f"{pictures} pictures {better:.2f} ({np.mean([value for _, _, value in found]):+.3f})")
        yield f"{name}, {exam.figure}: {', '.join(cells)}"


def main() -> None:
    """Prints shares of comparisons with marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300, help="comparisons for each share")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap and of the swaps")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args()
    with ProcessPoolExecutor(given.jobs) as pool:
        for line in _lines(given, pool):
            print(line, flush=True)


if __name__ == "__main__":
    main()
