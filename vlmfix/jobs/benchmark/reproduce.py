"""Runs an evaluation again from its card, and reports the differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vlmfix.card import changed_facts, changed_reading, decoder_again, settings_again
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.record import CARD, MADE_BY, SESSION, EvalRun, Record
from vlmfix.evals.task import Task, Workload
from vlmfix.files import resolved
from vlmfix.generation import VLM, load
from vlmfix.jobs.benchmark.job import Report, check, evaluate, refuse_changed
from vlmfix.parsing import some
from vlmfix.settings import DECODED, REQUESTED
from vlmfix.shapes import fault, fields, list_of

REPEATABLE = fields(MADE_BY | {"sessions": list_of(SESSION, least=1)})
"""Shape that a card must have, beside what scoring needs, for the run to be repeated."""


@dataclass(frozen=True)
class Difference:
    """Says how the second run of one arm differs from the first.

    Attributes:
        samples: Number of samples compared.
        same: Number of samples answered with the same tokens, or failed in both.
        first: Ids of the first few samples with other tokens.
        figures: Figures whose values differ: name to (before, now).
    """

    samples: int
    same: int
    first: tuple[str, ...]
    figures: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Reproduction:
    """Compares the second run with the first.

    Attributes:
        run: The second run.
        arms: Differences by arm.
        versions: Packages whose version differed in the second run: name to (before, then).
        facts: Facts of decoders beside parameters that differed in the second run, such as a profile's digest:
            ``arm.fact`` to (before, now); runs of versions that kept none are left out.
    """

    run: EvalRun
    arms: dict[str, Difference]
    versions: dict[str, tuple[str | None, str]]
    facts: dict[str, tuple[str | None, str | None]]

    @property
    def exact(self) -> bool:
        """Returns whether every answer has the same tokens."""
        return all(found.same == found.samples for found in self.arms.values())


def reproduce(
    run: EvalRun,
    out: Path,
    *,
    images: Path | None = None,
    model: str | None = None,
    device: str = "auto",
    report: Report = lambda done, total: None,
    loader: Callable[..., VLM] = load,
) -> Reproduction:
    """Asks every question of a run again, with the same model, decoders, settings and batches.

    Before it loads the model, it checks that pictures and weights are those of the run.

    Args:
        run: A finished run.
        out: Folder for the second run; a run begun there is resumed.
        images: Folder of the pictures; None for the folder of the run.
        model: Directory of the model; None for the directory of the run.
        device: Where to run; another kind of device rounds differently, and single tokens may change.
        report: Called with the samples done and their total.
        loader: Loads the model.

    Raises:
        UsageError: ``model`` is given for a model of the Hub, or ``images`` for a run without pictures.
        DataError: The run is unfinished, the model's weights or pictures are not those of the run, or pictures are
            missing.
        PluginError: A decoder of another distribution, or in a file, is not that of the run.
    """
    card = run.card
    if wrong := fault(card, REPEATABLE):
        raise DataError(f"{run.folder / CARD}{wrong}", "restore the file, or run again")
    if strange := sorted(card["decoding"].keys() - DECODED.keys() - REQUESTED.keys()):
        raise DataError(
            f"{run.folder / CARD}: decoding has {some(strange)}, which this version does not know",
            "restore the file, or use the vlmfix that wrote it",
        )
    if unfinished := [arm for arm in run.answers if run.missing(arm)]:
        raise DataError(
            f"{run.folder} is unfinished: {', '.join(unfinished)}", "finish it with the command in its card"
        )
    workload = Workload(samples=run.samples, images=_images(run, images), about=card["data"])
    try:
        check(workload)
    except DataError as error:
        raise DataError(f"{run.folder}: {error.message}", error.hint) from error
    refuse_changed(run.folder, workload, run.pictures())
    arms = {
        arm: decoder_again(f"the arm {arm} of {run.folder}", about["spec"], about.get("plugins"))
        for arm, about in card["arms"].items()
    }
    settings = settings_again(
        str(run.folder), card, card["decoding"], model=model, device=device, decoders=arms.values()
    )
    again = evaluate(
        out,
        _moved(run.task, images),
        workload,
        settings,
        arms,
        batch_size=card["batch_size"],
        command=f"vlmfix reproduce {run.folder}",
        report=report,
        loader=loader,
    )
    before, then = (one.card["sessions"][-1]["versions"] for one in (run, again))
    return Reproduction(
        again,
        arms={arm: _difference(run, again, arm) for arm in run.answers},
        versions={name: (before.get(name), now) for name, now in then.items() if before.get(name) != now},
        facts=_changed_facts(run, again) | changed_reading(run.card, again.card),
    )


def _images(run: EvalRun, elsewhere: Path | None) -> Path | None:
    """Returns the folder of a run's pictures as it is now."""
    if run.card["images"] is None:
        if elsewhere is not None:
            raise UsageError(f"the questions of {run.folder} go without pictures", "leave --images out")
        return None
    return Path(run.card["images"]) if elsewhere is None else elsewhere


def _moved(task: Task, images: Path | None) -> Task:
    """Gives a task that takes pictures from a folder itself the present folder; returns other tasks unchanged."""
    if images is None or "images" not in task.options():
        return task
    return replace(task, **{"images": str(resolved(images))})


def _changed_facts(first: EvalRun, second: EvalRun) -> dict[str, tuple[str | None, str | None]]:
    return {
        f"{arm}.{name}": values
        for arm, about in first.card["arms"].items()
        for name, values in changed_facts(about.get("facts"), second.card["arms"][arm].get("facts")).items()
    }


def _difference(first: EvalRun, second: EvalRun, arm: str) -> Difference:
    before, now = first.answers[arm], second.answers[arm]
    other = [s.id for s in first.samples if _said(before[s.id]) != _said(now[s.id])]
    values, later = _figures(first, arm), _figures(second, arm)
    return Difference(
        samples=len(first.samples),
        same=len(first.samples) - len(other),
        first=tuple(other[:5]),
        figures={name: (value, later[name]) for name, value in values.items() if _differ(value, later[name])},
    )


def _said(record: Record) -> tuple[int, ...] | None:
    return None if record.failed else record.ids


def _figures(run: EvalRun, arm: str) -> dict[str, float]:
    tally = run.task.tally(run.judged(arm))
    return {name: float(value) for name, value in run.task.figures(tally.sums()).items()}


def _differ(one: float, other: float) -> bool:
    return one != other and not (one != one and other != other)  # two figures without a value are equal
