"""A benchmark for tests: yes/no questions in two groups, and runs of it in memory or on the disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from vlmfix.evals.record import ANSWERS, CARD, FORMAT, PLAIN, SAMPLES, EvalRun, Record, digest
from vlmfix.evals.task import Sample, Task, Verdict, plain, ratio
from vlmfix.records import replace_json, to_json


@dataclass(frozen=True, kw_only=True)
class Exam(Task):
    name: ClassVar = "exam"
    better: ClassVar = {"accuracy": "higher", "precision": "higher", "misses": "lower"}
    shifts: ClassVar = ("yes_ratio", "length")
    max_new_tokens: ClassVar = 8

    strict: bool = False

    def judge(self, sample, answer):
        said, truth = answer.startswith("yes"), sample.target["label"] == "yes"
        counts = {
            "right": float(said == truth),
            "tp": float(said and truth),
            "missed": float(truth and not said),
            "yes": float(said),
            "words": float(len(answer.split())),
            "n": 1.0,
        }
        return Verdict(counts=counts, right=said == truth, parsed=answer.split()[0] in ("yes", "no"))

    def figures(self, sums):
        found = {}
        groups = [name.removesuffix("/n") for name in sums if name.endswith("/n")]
        for group in groups:
            count = {name.removeprefix(f"{group}/"): value for name, value in sums.items() if name.startswith(group)}
            found |= {
                f"{group}/accuracy": ratio(count["right"], count["n"]),
                f"{group}/precision": ratio(count["tp"], count["yes"]),
                f"{group}/misses": ratio(count["missed"], count["n"]),
                f"{group}/yes_ratio": ratio(count["yes"], count["n"]),
                f"{group}/length": ratio(count["words"], count["n"]),
                f"{group}/n": count["n"],
            }
        found["mean/accuracy"] = np.mean([found[f"{group}/accuracy"] for group in groups], axis=0)
        return found

    def results(self, judged):
        return {name: plain(value) for name, value in self.figures(self.tally(judged).sums()).items()}


def samples(pictures=60, *, prompt="Is there a {}?"):
    """Two questions about each picture in each group; one in two is to be answered with yes."""
    return [
        Sample(
            id=f"{group}-{picture}-{number}",
            image=f"{picture:03}.png",
            prompt=prompt.format("cat dog".split()[number]),
            target={"label": "yes" if number == 0 else "no"},
            group=group,
        )
        for group in ("easy", "hard")
        for picture in range(pictures)
        for number in range(2)
    ]


def answers(asked, right, *, seed, words=1, noise=0.0):
    """Right answers with a chance for each group; the seed says which, and noise how many are drawn anew."""
    generator, other = np.random.default_rng(seed), np.random.default_rng((seed, words, int(1e6 * noise), 1))
    found = {}
    for sample in asked:
        luck, again = generator.random(), other.random(2)
        luck = again[1] if again[0] < noise else luck
        said = (
            sample.target["label"] if luck < right[sample.group] else {"yes": "no", "no": "yes"}[sample.target["label"]]
        )
        found[sample.id] = Record(id=sample.id, answer=" ".join([said] + ["indeed"] * (words - 1)), finish="eos")
    return found


def exam(folder="run", *, asked=None, arms=None, task=None, **card):
    """A run in memory: a plain arm, a better arm, and one that only talks more."""
    asked = samples() if asked is None else asked
    if arms is None:
        arms = {
            PLAIN: answers(asked, {"easy": 0.8, "hard": 0.5}, seed=0),
            "good": answers(asked, {"easy": 0.95, "hard": 0.8}, seed=0, noise=0.05),
            "wordy": answers(asked, {"easy": 0.8, "hard": 0.5}, seed=0, words=3, noise=0.05),
        }
    task = task or Exam()
    known = {
        "format": FORMAT,
        "task": task.name,
        "options": task.options(),
        "data": {"questions": {"file": "exam.json", "sha256": "12ab"}, "path": "/data/exam.json"},
        "samples": digest(asked),
        "count": len(asked),
        "images": "/pictures",
        "model": "tiny",
        "revision": None,
        "commit": None,
        "weights": "sha256:77",
        "dtype": "float32",
        "decoding": {"max_new_tokens": 8, "num_beams": 1, "temperature": 0.0, "seed": 0},
        "arms": {name: {"spec": name, "parameters": {}} for name in arms},
        "sessions": [{"versions": {"vlmfix": "1.0", "torch": "2.15", "transformers": "5.23"}}],
    }
    return EvalRun(Path(folder), known | card, task, asked, arms)


def written(run):
    """The same run on the disk."""
    run.folder.mkdir()
    replace_json(run.folder / CARD, run.card)
    (run.folder / SAMPLES).write_text("".join(f"{to_json(asdict(sample))}\n" for sample in run.samples))
    for arm, found in run.answers.items():
        (run.folder / arm).mkdir()
        known = [
            {name: value for name, value in asdict(record).items() if value is not None} for record in found.values()
        ]
        (run.folder / arm / ANSWERS).write_text("".join(f"{to_json(line)}\n" for line in known))
    return run.folder
