"""A benchmark of two questions a picture, for tests of what surrounds a benchmark."""

from dataclasses import dataclass
from typing import ClassVar

from tests.jobs.fake import draw
from vlmfix.evals.task import Sample, Task, Verdict, Workload, plain, ratio


@dataclass(frozen=True, kw_only=True)
class Says(Task):
    """Right when the answer holds the word that the sample wants."""

    name: ClassVar[str] = "says"
    better: ClassVar = {"accuracy": "higher"}
    shifts: ClassVar = ("length",)
    max_new_tokens: ClassVar[int] = 4

    upper: bool = False

    def judge(self, sample, answer):
        wanted = sample.target["word"].upper() if self.upper else sample.target["word"]
        right = wanted in answer
        counts = {"right": float(right), "answers": 1.0, "words": float(len(answer.split()))}
        return Verdict(counts=counts, right=right, parsed=bool(answer), note=answer)

    def figures(self, sums):
        groups = sorted({name.partition("/")[0] for name in sums})
        return {
            f"{group}/{figure}": ratio(sums[f"{group}/{count}"], sums[f"{group}/answers"])
            for group in groups
            for figure, count in (("accuracy", "right"), ("length", "words"))
        }

    def results(self, judged):
        figures = self.figures(self.tally(judged).sums())
        return {name: plain(value) for name, value in figures.items()}

    def details(self, judged, answers):
        return {"first": answers[0] if answers else None}


def workload(folder, pictures=6, splits=("a", "b")):
    """Two splits over the same pictures that share one of their two questions."""
    draw(folder, pictures)
    samples = [
        Sample(
            id=f"{split}/{number}/{question}",
            image=f"{number:04d}.png",
            prompt=question,
            target={"word": question},
            group=split,
        )
        for split in splits
        for number in range(pictures)
        for question in ("shared", f"only {split}")
    ]
    return Workload(samples=samples, images=folder, about={"data": "drawn"})
