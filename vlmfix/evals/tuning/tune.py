"""Tune a decoder's parameters on half of the pictures, and report what they are worth on the other half."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from vlmfix.card import versions
from vlmfix.decoders import Decoder, Greedy
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.comparison.compare import Comparison, compare
from vlmfix.evals.record import CARD as RUN
from vlmfix.evals.record import PLAIN, EvalRun, digest
from vlmfix.evals.task import Benchmark, Task, Workload, plain
from vlmfix.evals.tuning.halves import HELD_OUT, TUNING, about_halves, split
from vlmfix.evals.tuning.search import Measured, Space, Tried, search
from vlmfix.files import is_draft, make_folder, remove_drafts
from vlmfix.language.parameters import Value
from vlmfix.language.recipe import write_recipe
from vlmfix.records import read_json, refuse_other, replace_json
from vlmfix.settings import LOADED, Settings, check_searchable
from vlmfix.shapes import COUNT, NUMBER, fields

FORMAT = 2
"""Of the folder; raised when an older search could not be gone on with."""
CARD, JOURNAL, RECIPE = "tune.json", "trials.jsonl", "recipe.toml"
OBJECTIVES: Mapping[str, str] = {"pope": "mean/f1", "chair": "chair_i"}
"""For each benchmark the figure that is tuned; which way is better is the benchmark's to say."""
DIGITS = 12
"""Decimals of a guard; what is lost beyond them is rounding."""

OUTCOME = fields(
    {"value": NUMBER.or_null(), "recall": NUMBER.or_null(), "length": NUMBER.or_null(), "failed": COUNT},
    {"skip_rate": NUMBER.or_null()},
)
"""What the journal holds of a trial."""

Evaluate = Callable[[Mapping[str, Decoder], Workload, Path], EvalRun]
"""Runs arms over a workload into a folder, resumes what is there, and adds arms to those that the folder has."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What an arm gave on the tuning split; None for a figure without a value.

    Attributes:
        value: The tuned figure.
        recall: Mean of the recall over the benchmark's groups.
        length: Mean of the answers' length over the benchmark's groups, in words.
        failed: Samples that failed.
        skip_rate: Share of the tokens that a contrast left to the clean row; None without a rule that leaves any.
    """

    value: float | None
    recall: float | None
    length: float | None
    failed: int
    skip_rate: float | None = None


@dataclass(frozen=True)
class Trial:
    """One decoder that was tried.

    Attributes:
        arm: Its name in the tuning split's folder.
        spec: With all parameters.
        parameters: Those that were searched, with their values.
        outcome: What it gave.
        feasible: Its recall and length are within the guards, nothing failed that plain decoding answers, and the
            tuned figure has a value.
        chosen: It is the recipe's.
    """

    arm: str
    spec: str
    parameters: Mapping[str, Value]
    outcome: Outcome
    feasible: bool
    chosen: bool = False


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        objective: Name of the tuned figure.
        better: Which way it is better.
        plain: Plain decoding on the tuning split.
        trials: In the order in which they were tried.
        verdict: In words: what the recipe is worth on the held-out split, or why plain decoding is best.
        recipe: The file; None when plain decoding is best.
        held_out: The recipe against plain decoding on the held-out split; None when there is no recipe.
    """

    objective: str
    better: Literal["higher", "lower"]
    plain: Outcome
    trials: tuple[Trial, ...]
    verdict: str
    recipe: Path | None = None
    held_out: Comparison | None = None

    @property
    def chosen(self) -> Trial | None:
        """The recipe's trial; None when plain decoding is best."""
        return next((trial for trial in self.trials if trial.chosen), None)


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What a trial may lose against plain decoding on the tuning split.

    Attributes:
        max_recall_loss: Absolute, in [0, 1].
        max_length_loss: Relative, in [0, 1].
    """

    max_recall_loss: float = 0.02
    max_length_loss: float = 0.10

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise UsageError(f"{name}={value} is not allowed", "give a share in [0, 1]")

    def constraints(self, found: Outcome, before: Outcome) -> dict[str, float]:
        """What is lost beyond what may be: each is kept when it is at most 0, or plain decoding has no value for it."""
        shorter = _lost(found.length, before.length) / (before.length or 1.0)
        return {
            "recall": round(_lost(found.recall, before.recall) - self.max_recall_loss, DIGITS),
            "length": round(shorter - self.max_length_loss, DIGITS),
            "failed": float(found.failed - before.failed),
            "value": float(found.value is None),
        }


def _lost(found: float | None, before: float | None) -> float:
    return 0.0 if before is None else before - (found or 0.0)


def tune(
    spec: str,
    workload: Workload,
    task: Task,
    settings: Settings,
    *,
    budget: int,
    out: Path,
    evaluate: Evaluate,
    seed: int = 0,
    guards: Guards = Guards(),
) -> Tuned:
    """Search what a specification leaves open, and try the best on pictures that the search never saw.

    The pictures are split in halves by a seeded hash of their names. The tuning half alone is searched; the best trial
    within the guards that beats plain decoding there becomes the recipe, which then runs on the held-out half beside
    plain decoding. A search that was killed goes on from ``out``, and a larger budget adds trials to it.

    Args:
        spec: A decoder; the parameters that it names stay as they are.
        workload: Samples and pictures.
        task: The rules of scoring.
        settings: Model and generation settings; its ``decoder`` is not read.
        budget: Number of trials.
        out: Folder of the search; made when it is missing.
        evaluate: Runs arms over a workload into a folder. It is called once a trial with the same folder, so it
            should keep the model loaded.
        seed: Of the split and of the search.
        guards: What a trial may lose.

    Raises:
        UsageError: The task has no figure to tune, the specification leaves nothing open, the folder holds another
            search, or the model is kept for tests.
        DataError: There are fewer than two pictures, or plain decoding has no value on the tuning split.
    """
    if budget < 1:
        raise UsageError(f"budget={budget} is not allowed", "give a number of trials from 1")
    space = Space.of(spec)
    field = Field.claimed(spec, space.build({}).plugins(), workload, task, settings, out, evaluate, seed, guards)

    def measure(chosen: Mapping[str, Value]) -> Measured:
        found, value = field.tried(space.build(chosen))
        return Measured(value, guards.constraints(found, field.plain), asdict(found))

    tried = search(space, out / JOURNAL, measure, better=field.better, budget=budget, seed=seed, about=OUTCOME)
    return field.concluded([(_trial(space, one), space.build(one.chosen)) for one in tried])


@dataclass(frozen=True, eq=False, kw_only=True)
class Field:
    """A folder of a search, with both halves of the pictures, and plain decoding on the tuning half.

    Attributes:
        spec: What the search began with.
        figure: Name of the tuned figure.
        better: Which way it is better.
        tuning: The half that is searched on.
        held_out: The other.
        out: The folder.
        evaluate: Runs arms over a workload into a folder.
        seed: Of the split.
        guards: What a trial may lose.
        about: What the workload is.
        plain: Plain decoding on the tuning half.
    """

    spec: str
    figure: str
    better: Literal["higher", "lower"]
    tuning: Workload
    held_out: Workload
    out: Path
    evaluate: Evaluate
    seed: int
    guards: Guards
    about: Mapping[str, Any]
    plain: Outcome

    @classmethod
    def claimed(
        cls,
        spec: str,
        plugins: Mapping[str, str],
        workload: Workload,
        task: Task,
        settings: Settings,
        out: Path,
        evaluate: Evaluate,
        seed: int,
        guards: Guards,
        further: Mapping[str, Any] | None = None,
    ) -> Field:
        """Splits the pictures, makes the folder the search's own, and runs plain decoding.

        Args:
            spec: A decoder.
            plugins: Its parts that are not vlmfix's own.
            workload: Samples and pictures.
            task: The rules of scoring.
            settings: Model and generation settings.
            out: Folder of the search; made when it is missing.
            evaluate: Runs arms over a workload into a folder.
            seed: Of the split.
            guards: What a trial may lose.
            further: What else tells this search from others.

        Raises:
            UsageError: The task has no figure to tune, the folder holds another search, or the model is kept for tests.
            DataError: There are fewer than two pictures, or plain decoding has no value on the tuning split.
        """
        check_searchable(settings.model)
        figure, better = _objective(task)
        tuning, held_out = split(workload, seed)
        _claim(out, spec, plugins, workload, task, settings, seed, guards, further or {})
        before = _outcome(evaluate({PLAIN: Greedy()}, tuning, out / TUNING), PLAIN, figure)
        if before.value is None:
            raise DataError(f"plain decoding has no {figure} on the tuning split", "take more pictures")
        return cls(
            spec=spec,
            figure=figure,
            better=better,
            tuning=tuning,
            held_out=held_out,
            out=out,
            evaluate=evaluate,
            seed=seed,
            guards=guards,
            about=workload.about,
            plain=before,
        )

    def tried(self, decoder: Decoder) -> tuple[Outcome, float]:
        """Runs a decoder on the tuning half; returns what it gave, and its figure, or plain decoding's without one."""
        arm = arm_name(decoder)
        run = self.evaluate({PLAIN: Greedy(), arm: decoder}, self.tuning, self.out / TUNING)
        found = _outcome(run, arm, self.figure)
        logger.info("%s: %s %s", decoder.spec(), self.figure, found.value)
        return found, (self.plain.value if found.value is None else found.value) or 0.0

    def feasible(self, found: Outcome) -> bool:
        """Whether a trial is within the guards."""
        return all(lost <= 0 for lost in self.guards.constraints(found, self.plain).values())

    def concluded(self, tried: Sequence[tuple[Trial, Decoder]]) -> Tuned:
        """Runs the best trial within the guards on the held-out half, and writes it as a recipe."""
        figure, better, before, trials = self.figure, self.better, self.plain, [trial for trial, _ in tried]
        best = _best(trials, before, better)
        if best is None:
            return Tuned(figure, better, before, tuple(trials), _why_plain(trials))
        chosen, decoder = replace(trials[best], chosen=True), tried[best][1]
        trials[best] = chosen
        after = self.evaluate({PLAIN: Greedy(), chosen.arm: decoder}, self.held_out, self.out / HELD_OUT)
        after = replace(after, answers={arm: after.answers[arm] for arm in (PLAIN, chosen.arm)})
        comparison = compare([after])
        lost = self.guards.constraints(*(_outcome(after, arm, figure) for arm in (chosen.arm, PLAIN)))
        verdict = _verdict(comparison, figure, [name for name in ("recall", "length") if lost[name] > 0])
        found = Tuned(figure, better, before, tuple(trials), verdict, self.out / RECIPE, comparison)
        about = {
            **_about(found, chosen, after, self.guards, self.spec),
            "data": self.about,
            "split": about_halves(self.tuning, self.held_out, self.seed),
        }
        write_recipe(self.out / RECIPE, decoder.spec(), about)
        return found


def _objective(task: Task) -> tuple[str, Literal["higher", "lower"]]:
    figure = OBJECTIVES.get(task.called()) or (task.objective if isinstance(task, Benchmark) else "")
    if not figure:
        raise UsageError(
            f"{task.called()} cannot be tuned for",
            f"tune for {' or '.join(OBJECTIVES)}, or for a benchmark of your own that says objective",
        )
    return figure, task.better[figure.rpartition("/")[2]]


def arm_name(decoder: Decoder) -> str:
    """Name of a trial's arm: the same decoder has the same, so it is run once."""
    return f"trial-{hashlib.sha256(decoder.spec().encode()).hexdigest()[:6]}"


def _claim(
    out: Path,
    spec: str,
    plugins: Mapping[str, str],
    workload: Workload,
    task: Task,
    settings: Settings,
    seed: int,
    guards: Guards,
    further: Mapping[str, Any],
) -> None:
    """Makes the folder this search's own, or finds that it is."""
    card = {
        "format": FORMAT,
        "spec": spec,
        "plugins": plugins or None,
        "task": task.name,
        "options": task.options(),
        "data": dict(workload.about),
        "samples": digest(workload.samples),
        "model": settings.model,
        "revision": settings.revision,
        **settings.loaded(),
        "decoding": settings.decoding(),
        "seed": seed,
        "guards": asdict(guards),
        **further,
    }
    make_folder(out)
    begun = os.path.exists(out / TUNING / RUN) or os.path.exists(out / JOURNAL)  # else no model has answered anything
    if os.path.exists(out / CARD):
        former = read_json(out / CARD)
        if not begun and former.keys() | {"plugins"} != card.keys():  # earlier versions noted none
            raise UsageError(f"{out / CARD} is not of a search", "choose another --out")
        if begun:
            refuse_other(out, out / CARD, former, card)
            return
    elif not all(is_draft(path) for path in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no {CARD}", "choose another --out")
    remove_drafts(out, CARD)
    replace_json(out / CARD, card)


def _outcome(run: EvalRun, arm: str, figure: str) -> Outcome:
    figures = run.task.figures(run.task.tally(run.judged(arm)).sums())
    values = {name: plain(value) for name, value in figures.items()}

    def mean(label: str) -> float | None:
        found = [value for name, value in values.items() if name.rpartition("/")[2] == label and value is not None]
        return sum(found) / len(found) if found else None

    return Outcome(values.get(figure), mean("recall"), mean("length"), run.failed(arm), run.skips(arm).rate)


def _trial(space: Space, tried: Tried) -> Trial:
    decoder = space.build(tried.chosen)
    return Trial(
        arm_name(decoder),
        decoder.spec(),
        tried.chosen,
        Outcome(**{name: tried.about[name] for name in Outcome.__annotations__ if name in tried.about}),
        tried.feasible,
    )


def _best(trials: list[Trial], before: Outcome, better: str) -> int | None:
    """Number of the first of the best feasible trials, when it beats plain decoding."""
    sign = 1.0 if better == "higher" else -1.0
    gains = {
        number: sign * (trial.outcome.value - (before.value or 0.0))
        for number, trial in enumerate(trials)
        if trial.feasible and trial.outcome.value is not None
    }
    best = max(gains, key=gains.__getitem__, default=None)
    return best if best is not None and gains[best] > 0 else None


def _why_plain(trials: list[Trial]) -> str:
    feasible = sum(trial.feasible for trial in trials)
    if not feasible:
        return f"Plain is best: none of {len(trials)} trials stays within the guards."
    return f"Plain is best: none of the {feasible} trials within the guards ({len(trials)} in all) beats it."


def _verdict(comparison: Comparison, figure: str, broken: Sequence[str]) -> str:
    (arm,) = comparison.arms
    change = next(change for change in arm.changes if change.figure == figure)
    difference = change.difference
    if difference.value is None or difference.low is None or difference.high is None:
        said = f"On the held-out split {figure} has no value that could be compared."
    else:
        interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
        found = f"{difference.value:+.4f} {interval}: {change.direction}"
        shifts = f", while {', '.join(change.shifted)} changes too" if change.shifted else ""
        said = f"On the held-out split {figure} changes by {found}{shifts}."
    return f"{said} It loses more {' and '.join(broken)} there than the guards allow." if broken else said


def _about(found: Tuned, chosen: Trial, after: EvalRun, guards: Guards, spec: str) -> dict[str, Any]:
    """What the recipe says of itself."""
    card = after.card
    model = ("model", "revision", "commit", "weights", "files", "checkpoint", "dtype", *LOADED, "decoding")
    return {
        "date": datetime.now(UTC).replace(microsecond=0),
        "model": {name: card.get(name) for name in model},
        "task": {"name": card["task"], "options": card["options"]},
        "search": {
            "spec": spec,
            "plugins": after.card["arms"][chosen.arm].get("plugins"),
            "objective": found.objective,
            "better": found.better,
            "trials": len(found.trials),
            "feasible": sum(trial.feasible for trial in found.trials),
            "tuned": list(chosen.parameters),
            **asdict(guards),
        },
        TUNING: {"plain": asdict(found.plain), "recipe": asdict(chosen.outcome)},
        HELD_OUT: _about_held_out(found.held_out) if found.held_out else {},
        "versions": versions(),
    }


def _about_held_out(comparison: Comparison) -> dict[str, Any]:
    (arm,) = comparison.arms
    return {
        "compared": arm.compared,
        "failed": arm.failed,
        "unparsed": arm.unparsed,
        "skip_rate": arm.skip_rate,
        "notes": list(comparison.notes),
        "figures": {
            change.figure: {
                "plain": change.plain.value,
                "recipe": change.arm.value,
                "difference": change.difference.value,
                "low": change.difference.low,
                "high": change.difference.high,
                "direction": change.direction or None,
                "shifted": list(change.shifted),
            }
            for change in arm.changes
        },
    }
