"""Parameters chosen on scenes that no figure is reported for."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tools.study.clock import Clock
from tools.study.runs import Exam, answered, copy_plain, figures
from tools.study.small import GROUP
from vlmfix.card import versions
from vlmfix.decoders import Decoder, parse
from vlmfix.errors import UsageError, VlmfixError
from vlmfix.evals.record import PLAIN, EvalRun
from vlmfix.evals.tuning.search import Measured, Space, Tried, search
from vlmfix.evals.tuning.tune import Guards, Outcome, arm_name
from vlmfix.language.parameters import Value
from vlmfix.language.recipe import write_recipe
from vlmfix.records import read_json, refuse_other, replace_json

CARD, JOURNAL, RUNS, FOUND = "search.json", "trials.jsonl", "runs", "found.json"
CHAIR, POPE, SMALL = "chair", "pope", "small"
"""The exams by name."""
SMALL_FIGURE = f"{GROUP}/accuracy"
F1 = "mean/f1"
DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Limits(Guards):
    """What a trial may lose against plain decoding on the tuning scenes.

    Recall may lose half of what the goal allows on the reported scenes: the best of many trials is partly lucky, and on
    300 scenes the error of a recall's difference is about 0.01.

    Attributes:
        max_f1_loss: Of POPE's mean F1, absolute, in [0, 1].
    """

    max_recall_loss: float = 0.01
    max_f1_loss: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Hunt:
    """What is searched.

    Attributes:
        folder: For the search.
        specs: Where it begins; the trials are shared out among them.
        exams: On the tuning scenes, with plain decoding answered: ``chair`` and ``pope``, or ``small``.
        trials: In all.
        listed: Whether each specification is tried as it is, and nothing is searched; ``trials`` counts for nothing.
        seed: Of the draws.
        limits: What a trial may lose.
    """

    folder: Path
    specs: Sequence[str]
    exams: Mapping[str, Exam]
    trials: int
    listed: bool = False
    seed: int = 0
    limits: Limits = Limits()

    @property
    def small(self) -> bool:
        """It is tuned for questions about small things, and not for captions."""
        return SMALL in self.exams

    @property
    def shares(self) -> list[int]:
        """Trials that begin at each specification, at least one."""
        parts = len(self.specs)
        if self.listed:
            return [1] * parts
        return [max(1, self.trials // parts + (number < self.trials % parts)) for number in range(parts)]


@dataclass(frozen=True)
class Found:
    """What a search gave, in what JSON holds.

    Attributes:
        spec: The best decoder within the limits; empty when none of them beats plain decoding.
        figure: What was tuned.
        plain: Plain decoding's figures on the tuning scenes.
        chosen: The best decoder's there; empty when there is none.
        furthest: The specification and figures of the trial with the best value, within the limits or not.
        trials: Number of them.
        feasible: How many kept within the limits of captions.
        turned_down: How many of these were better than plain decoding, and than what was chosen, but lost too much of
            POPE's F1.
    """

    spec: str
    figure: str
    plain: Mapping[str, Any]
    chosen: Mapping[str, Any]
    furthest: Mapping[str, Any]
    trials: int
    feasible: int
    turned_down: int


def hunt(wanted: Hunt, clock: Clock) -> Found:
    """Searches what the specifications leave open, and writes the best as a recipe.

    For captions the smallest CHAIR_i is wanted, with recall, length and POPE's F1 within the limits. POPE has many
    questions, so they are asked in the end alone: of the best trial, and of the next as long as too much F1 is lost.
    For small things the highest accuracy is wanted. A search that was stopped goes on; of a finished one the journal
    stays, and the trials' answers go. If the journal holds more trials than are wanted, only the first ones are used.

    Raises:
        UsageError: There is nothing to tune, or the folder holds another search.
        OutOfTimeError: The time is over.
    """
    _claim(wanted)
    ended = wanted.folder / FOUND
    if ended.exists() and (before := Found(**read_json(ended))).trials == sum(wanted.shares):
        return before
    measure, plain = (_small if wanted.small else _captions)(wanted, clock)

    def fairly(decoder: Decoder) -> Measured:
        return _tried(partial(measure, decoder), plain)

    tried = _each(wanted, fairly) if wanted.listed else _searched(wanted, fairly)
    result = _best(wanted, clock, plain, tried)
    shutil.rmtree(wanted.folder / RUNS, ignore_errors=True)
    recipe = wanted.folder / "recipe.toml"
    recipe.unlink(missing_ok=True)
    if result.spec:
        write_recipe(recipe, result.spec, _about(wanted, result))
    replace_json(ended, asdict(result))
    return result


def _each(wanted: Hunt, measure: Measure) -> list[tuple[str, Tried]]:
    """Tries every specification as it is."""
    found = [(spec, measure(parse(spec))) for spec in wanted.specs]
    return [
        (spec, Tried({}, one.value, all(lost <= 0 for lost in one.constraints.values()), one.about))
        for spec, one in found
    ]


def _searched(wanted: Hunt, measure: Measure) -> list[tuple[str, Tried]]:
    """Searches what the specifications leave open, one after the other."""
    better: Literal["higher", "lower"] = "higher" if wanted.small else "lower"
    tried: list[tuple[str, Tried]] = []
    for number, (spec, budget) in enumerate(zip(wanted.specs, wanted.shares, strict=True)):
        space = Space.of(spec)

        def build(chosen: Mapping[str, Value], space: Space = space) -> Measured:
            return measure(space.build(chosen))

        journal = wanted.folder / f"{number}-{JOURNAL}"
        found = search(space, journal, build, better=better, budget=budget, seed=wanted.seed)[:budget]
        tried += [(space.build(one.chosen).spec() if "refused" not in one.about else spec, one) for one in found]
    return tried


def _claim(wanted: Hunt) -> None:
    """Makes the folder this search's own, or finds that it is; more trials go on with it."""
    exam = next(iter(wanted.exams.values()))
    plain = read_json(exam.folder / "card.json")
    card = {
        "specs": list(wanted.specs),
        "exams": {name: one.workload.about for name, one in wanted.exams.items()},
        "model": exam.settings.model,
        "weights": plain["weights"],
        "batch_size": exam.batch_size,
        "seed": wanted.seed,
        "limits": asdict(wanted.limits),
    }
    wanted.folder.mkdir(parents=True, exist_ok=True)
    path = wanted.folder / CARD
    if path.exists():
        refuse_other(wanted.folder, path, read_json(path), card)
    replace_json(path, card)


def _tried(measured: Callable[[], Measured], plain: Mapping[str, Any]) -> Measured:
    """A trial; one that the method refuses is no better than plain decoding, and not within the limits."""
    try:
        return measured()
    except VlmfixError as error:
        return Measured(plain["value"], {"refused": 1.0}, {"refused": str(error)})


Measure = Callable[[Decoder], Measured]


def _captions(wanted: Hunt, clock: Clock) -> tuple[Measure, dict[str, Any]]:
    """How a decoder is tried on captions, and plain decoding's figures."""
    chair, pope = wanted.exams[CHAIR], wanted.exams[POPE]
    before, f1 = _outcome(chair.run(), PLAIN), figures(pope.run(), PLAIN)[F1]
    plain = {**asdict(before), "value": before.value or 0.0, "f1": f1}

    def measure(decoder: Decoder) -> Measured:
        found = _outcome(_answered(wanted, CHAIR, decoder, clock), arm_name(decoder))
        constraints = wanted.limits.constraints(found, before)
        return Measured(plain["value"] if found.value is None else found.value, constraints, asdict(found))

    return measure, plain


def _small(wanted: Hunt, clock: Clock) -> tuple[Measure, dict[str, Any]]:
    """How a decoder is tried on questions about small things, and plain decoding's figures."""
    run = wanted.exams[SMALL].run()
    plain = {"value": figures(run, PLAIN)[SMALL_FIGURE]}

    def measure(decoder: Decoder) -> Measured:
        after = _answered(wanted, SMALL, decoder, clock)
        arm = arm_name(decoder)
        value = figures(after, arm)[SMALL_FIGURE]
        return Measured(value, {"failed": float(after.failed(arm))}, {"value": value})

    return measure, plain


def _answered(wanted: Hunt, name: str, decoder: Decoder, clock: Clock) -> EvalRun:
    clock.check()
    own = wanted.exams[name].at(wanted.folder / RUNS / name)
    copy_plain(wanted.exams[name], own)
    arm = arm_name(decoder)
    run = answered(own, {arm: decoder}, clock)
    return replace(run, answers={arm: run.answers[arm]})


def _outcome(run: EvalRun, arm: str) -> Outcome:
    found = {name: value if math.isfinite(value) else None for name, value in figures(run, arm).items()}
    return Outcome(found["chair_i"], found["recall"], found["length"], run.failed(arm))


def _best(wanted: Hunt, clock: Clock, plain: Mapping[str, Any], tried: Sequence[tuple[str, Tried]]) -> Found:
    sign = 1 if wanted.small else -1
    known = sorted(
        ((spec, one) for spec, one in tried if "refused" not in one.about), key=lambda found: -sign * found[1].value
    )
    if not known:
        raise UsageError(f"every trial was refused: {tried[0][1].about['refused']}", "leave that decoder out")
    feasible = [(spec, one) for spec, one in known if one.feasible]
    spec, chosen, turned_down = "", {}, 0
    for candidate, one in feasible:
        if sign * (one.value - plain["value"]) <= 0:
            break
        answers = {} if wanted.small else {"f1": _f1(wanted, parse(candidate), clock)}
        if answers and round(plain["f1"] - answers["f1"], DIGITS) > wanted.limits.max_f1_loss:
            turned_down += 1
            continue
        spec, chosen = candidate, {**one.about, **answers}
        break
    return Found(
        spec=spec,
        figure=SMALL_FIGURE if wanted.small else "chair_i",
        plain=plain,
        chosen=chosen,
        furthest={"spec": known[0][0], **known[0][1].about},
        trials=len(tried),
        feasible=len(feasible),
        turned_down=turned_down,
    )


def _f1(wanted: Hunt, decoder: Decoder, clock: Clock) -> float:
    """POPE's mean F1 on the tuning scenes."""
    return float(figures(_answered(wanted, POPE, decoder, clock), arm_name(decoder))[F1])


def _about(wanted: Hunt, found: Found) -> dict[str, Any]:
    """What the recipe says of itself."""
    exam = next(iter(wanted.exams.values()))
    card = read_json(exam.folder / "card.json")
    return {
        "model": {name: card.get(name) for name in ("model", "weights", "dtype")},
        "search": {"figure": found.figure, "trials": found.trials, "feasible": found.feasible, **asdict(wanted.limits)},
        "tuning": {"plain": dict(found.plain), "recipe": dict(found.chosen)},
        "data": {name: dict(one.workload.about) for name, one in wanted.exams.items()},
        "versions": versions(),
    }
