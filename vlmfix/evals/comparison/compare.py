"""Every arm of one or several runs against plain decoding, with intervals, tests and the shifts to read them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlmfix.card import reading_notes
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.comparison.comparable import (
    fact_notes,
    older_notes,
    refuse_incomparable,
    strategy_notes,
    version_notes,
)
from vlmfix.evals.comparison.statistics import Tested, bootstrap, interval, swap_test
from vlmfix.evals.record import PLAIN, EvalRun
from vlmfix.evals.task import Judged, Numbers, Task
from vlmfix.evals.task import plain as finite
from vlmfix.files import resolved
from vlmfix.settings import LOADED

ALPHA = 0.05
"""A difference is called better or worse when its corrected p value is below this and its interval leaves out zero."""
FEW_UNITS = 30
"""Below this many units a figure is called neither better nor worse: its interval is too narrow."""
MIN_DRAWS = 1000
DRAWS_PER_ARM = 400
"""A p value is never below 1 / draws; with fewer draws the correction for the arms alone could hide an effect."""
TEST = "swaps"

Direction = Literal["better", "worse", "no clear difference", "too few units to tell", ""]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; None for what has no value.

    Attributes:
        value: As measured.
        low: Low end of the percentile bootstrap interval.
        high: High end.
    """

    value: float | None
    low: float | None
    high: float | None

    @property
    def leaves_out_zero(self) -> bool:
        """Whether zero is outside of the interval; False without an interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Change:
    """One figure of an arm against the plain arm, on the samples that both answered.

    Attributes:
        figure: Its name, with its group before a slash when there is one: ``random/f1``.
        kind: A ``merit`` has a better side and is tested, a ``shift`` is what merits must be read with; the rest is
            ``other``.
        better: Which side is better; empty unless a merit.
        plain: The plain arm's.
        arm: The arm's.
        difference: Arm minus plain, with the interval of the paired difference.
        test: ``swaps``, see :func:`vlmfix.evals.comparison.statistics.swap_test`; empty when not tested.
        p: The test's p value.
        corrected: The same, corrected for all merits of all arms.
        direction: Better or worse when ``corrected`` is below 0.05, the interval leaves out zero and the figure is
            about 30 units or more; empty when not tested.
        shifted: For what is better or worse, the shifts beside it whose intervals leave out zero: it may come from
            them alone.
    """

    figure: str
    kind: Literal["merit", "shift", "other"]
    better: Literal["higher", "lower", ""]
    plain: Estimate
    arm: Estimate
    difference: Estimate
    test: str = ""
    p: float | None = None
    corrected: float | None = None
    direction: Direction = ""
    shifted: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """What stands before the last slash of the figure's name; empty when there is none."""
        return self.figure.rpartition("/")[0]

    @property
    def label(self) -> str:
        """The last part of the figure's name."""
        return self.figure.rpartition("/")[2]


@dataclass(frozen=True)
class Arm:
    """An arm and what it changes.

    Attributes:
        name: In the comparison; with the folder's name before it when several runs have an arm of that name.
        spec: Decoder specification.
        folder: The run's folder.
        plain: Name of the plain arm that it is compared with.
        compared: Samples that both answered; the figures are over these.
        units: Units among them that the bootstrap draws.
        failed: Samples of the arm that failed.
        missing: Samples of the arm that were not asked yet.
        unparsed: Compared answers that could not be read; they count as the benchmark says.
        skip_rate: Share of the tokens of all its answers that a contrast left to the clean row; None without a rule
            that leaves any.
        changes: By figure, in the task's order; for a plain arm the differences are zero and nothing is tested.
    """

    name: str
    spec: str
    folder: str
    plain: str
    compared: int
    units: int
    failed: int
    missing: int
    unparsed: int
    skip_rate: float | None
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Comparison:
    """Arms of comparable runs against plain decoding.

    Attributes:
        task: Name of the benchmark.
        card: What all runs share: options, data, count and digest of the samples, model, revision, commit, weights,
            files, how the checkpoint was read, dtype, limits on pixels, device_map, quantize, attention, decoding.
        unit: What the bootstrap draws, in the plural.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
        plain: The plain arms; several when those of several folders differ.
        arms: The others.
        notes: What a reader must know besides, in sentences.
    """

    task: str
    card: dict[str, Any]
    unit: str
    draws: int
    seed: int
    plain: tuple[Arm, ...]
    arms: tuple[Arm, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[EvalRun], *, draws: int = 10_000, seed: int = 0) -> Comparison:
    """Compare every arm with the plain arm of its own folder.

    Intervals are 95 % percentile intervals of a bootstrap over units, the same draws for both arms. Merits are tested
    by swapping the two arms' results unit by unit. P values are corrected for all merits of an arm (Westfall and Young)
    and for the number of arms (Bonferroni): where no arm differs from its plain arm, at most one comparison in twenty
    calls anything better or worse.

    Args:
        runs: Runs of the same samples by the same model with the same settings; their arms may be unfinished.
        draws: Of the bootstrap, and swaps of the test; 1000 or more, and 400 or more for each arm.
        seed: Of both.

    Raises:
        UsageError: The runs differ in what must be equal, have no plain arm, or ``draws`` is too small.
        DataError: No arm has a sample in common with its plain arm yet, or plain decoding alone has none.
    """
    refuse_incomparable(runs)
    count = sum(len(run.answers) - 1 for run in runs)
    if draws < (least := max(MIN_DRAWS, DRAWS_PER_ARM * count)):
        raise UsageError(f"draws={draws} is too few for {count} arms", f"give {least} or more")
    labels = _labels([run.folder for run in runs])
    differing = _differing_plain(runs, labels)
    names = _names(runs, labels, keep_plain=not differing)
    found = [
        replace(arm, name=names[number][arm.name], plain=names[number][PLAIN])
        for number, run in enumerate(runs)
        for arm in _arms(run, draws, seed)
    ]
    plain = {arm.name: arm for arm in sorted(found, key=lambda arm: arm.compared) if arm.name == arm.plain}
    arms = [arm for arm in found if arm.name != arm.plain]
    if not any(arm.compared for arm in arms or found):
        folders = " and ".join(str(run.folder) for run in runs)
        if not any(arm.missing for arm in found):
            raise DataError(
                f"no sample in {folders} is answered by both an arm and its plain arm: {_failures(runs)}",
                "the reasons are in answers.jsonl; repair what failed and start again with --retry-failed",
            )
        raise DataError(
            f"no sample in {folders} is answered by both an arm and its plain arm yet", "let vlmfix eval go on first"
        )
    samples = runs[0].samples
    by_run = list(zip(runs, names, strict=True))
    strategies = [note for run, known in by_run for note in strategy_notes(run, known)]
    facts = [note for run, known in by_run for note in fact_notes(run, known)]
    read = reading_notes(runs[0].card.get("checkpoint"))
    about = [*version_notes(runs, labels), *older_notes(runs, labels), *read, *facts, *_few_units(arms or found)]
    notes = [*differing, *strategies, *_unfinished(found), *about]
    made_by = ("model", "revision", "commit", "weights", "files", "checkpoint", "dtype", *LOADED, "decoding")
    shared = ("options", "data", "count", "samples", *made_by)
    return Comparison(
        task=runs[0].task.name,
        card={name: runs[0].card.get(name) for name in shared},
        unit="pictures" if all(sample.image and not sample.unit for sample in samples) else "units",
        draws=draws,
        seed=seed,
        plain=tuple(plain.values()),
        arms=tuple(_corrected(arms)),
        notes=tuple(notes),
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """Short names of folders: their last part, or the whole path where that is not enough."""
    short = [resolved(folder).name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _names(runs: Sequence[EvalRun], labels: Sequence[str], *, keep_plain: bool) -> list[dict[str, str]]:
    """For each run its arms' names in the comparison."""
    times: dict[str, int] = {}
    for run in runs:
        for arm in run.answers:
            times[arm] = times.get(arm, 0) + 1
    return [
        {arm: arm if times[arm] == 1 or (arm == PLAIN and keep_plain) else f"{label}/{arm}" for arm in run.answers}
        for run, label in zip(runs, labels, strict=True)
    ]


def _differing_plain(runs: Sequence[EvalRun], labels: Sequence[str]) -> list[str]:
    """Says where plain arms of several folders gave other answers; nothing when all agree."""
    first = runs[0].answers[PLAIN]
    notes = []
    for run, label in zip(runs[1:], labels[1:], strict=True):
        other = run.answers[PLAIN]
        both = [name for name in first if name in other and not (first[name].failed or other[name].failed)]
        if count := sum(first[name].answer != other[name].answer for name in both):
            notes.append(
                f"The plain arms of {labels[0]} and {label} answer {count} of {len(both)} samples differently; "
                "each arm is compared with the plain arm of its own folder."
            )
    return notes


def _unfinished(arms: Sequence[Arm]) -> Iterator[str]:
    for arm in arms:
        if arm.failed or arm.missing:
            against = "" if arm.name == arm.plain else f"; compared with {arm.plain} on {arm.compared} samples"
            counts = (f"{arm.failed} failed", f"{arm.missing} not asked yet")
            listed = ", ".join(count for count in counts if not count.startswith("0 "))
            yield f"{arm.name} is incomplete: {listed}{against}."


def _failures(runs: Sequence[EvalRun]) -> str:
    return ", ".join(f"{run.failed(arm)} of {len(run.samples)} failed in {arm}" for run in runs for arm in run.answers)


def _few_units(arms: Sequence[Arm]) -> Iterator[str]:
    if (fewest := min(arm.units for arm in arms if arm.units)) < FEW_UNITS:
        yield (
            f"Only {fewest} units to draw from: with fewer than {FEW_UNITS} the intervals are too narrow, and no "
            "figure is called better or worse."
        )


def _arms(run: EvalRun, draws: int, seed: int) -> Iterator[Arm]:
    """Every arm of a run against its plain arm, the plain arm included; names are the run's."""
    judged = {arm: {sample.id: (sample, verdict) for sample, verdict in run.judged(arm)} for arm in run.answers}
    common = {arm: tuple(name for name in judged[PLAIN] if name in found) for arm, found in judged.items()}
    together: dict[tuple[str, ...], list[str]] = {}
    for arm, names in common.items():
        together.setdefault(names, []).append(arm)
    changes: dict[str, tuple[Change, ...]] = {}
    for names, arms in together.items():  # arms with the same samples share their draws
        found = {arm: [judged[arm][name] for name in names] for arm in dict.fromkeys([PLAIN, *arms])}
        changed = _changes(run.task, found, draws, seed)
        changes |= {arm: changed[arm] for arm in arms}
    for arm in run.answers:
        both = [judged[arm][name] for name in common[arm]]
        yield Arm(
            name=arm,
            spec=run.card["arms"][arm]["spec"],
            folder=str(run.folder),
            plain=PLAIN,
            compared=len(both),
            units=len({sample.drawn_as() for sample, _ in both}),
            failed=run.failed(arm),
            missing=run.missing(arm),
            unparsed=sum(not verdict.parsed for _, verdict in both),
            skip_rate=run.skips(arm).rate,
            changes=changes[arm],
        )


def _changes(
    task: Task, judged: Mapping[str, Sequence[Judged]], draws: int, seed: int
) -> dict[str, tuple[Change, ...]]:
    """What each arm changes; all arms have judged the same samples."""
    if not judged[PLAIN]:
        return {arm: () for arm in judged}
    tallies = {arm: task.tally(found) for arm, found in judged.items()}
    values = {arm: task.figures(tally.sums()) for arm, tally in tallies.items()}
    drawn = bootstrap(task.figures, tallies, draws=draws, seed=seed)
    plain = {name: _estimate(value, drawn[PLAIN][name]) for name, value in values[PLAIN].items()}
    few = _few(judged[PLAIN])
    found: dict[str, tuple[Change, ...]] = {}
    for arm in judged:
        changes = [
            _sorted(
                Change(
                    figure=name,
                    kind="other",
                    better="",
                    plain=plain[name],
                    arm=_estimate(value, drawn[arm][name]),
                    difference=_estimate(value - values[PLAIN][name], drawn[arm][name] - drawn[PLAIN][name]),
                ),
                task,
            )
            for name, value in values[arm].items()
        ]
        if arm != PLAIN:
            names = [change.figure for change in changes if change.kind == "merit"]
            tested = swap_test(task.figures, tallies[PLAIN], tallies[arm], names, draws=draws, seed=seed)
            changes = [_tested(change, tested, few=few(change.group)) for change in changes]
        found[arm] = tuple(changes)
    return found


def _estimate(value: Numbers, drawn: Numbers) -> Estimate:
    number = finite(value)
    low, high = interval(drawn)
    return Estimate(None, None, None) if number is None else Estimate(number, finite(low), finite(high))


def _sorted(change: Change, task: Task) -> Change:
    """With the kind that the task gives the figure."""
    if change.label in task.better:
        return replace(change, kind="merit", better=task.better[change.label])
    return replace(change, kind="shift") if change.label in task.shifts else change


def _few(judged: Sequence[Judged]) -> Callable[[str], bool]:
    """Says of a group of figures whether its units are too few; a group that no sample has is about all of them."""
    units: dict[str, set[str]] = {}
    for sample, _ in judged:
        units.setdefault(sample.group, set()).add(sample.drawn_as())
    every = set().union(*units.values())
    return lambda group: len(units.get(group, every)) < FEW_UNITS


def _tested(change: Change, tested: Mapping[str, Tested], *, few: bool) -> Change:
    """With the p values, where it was tested."""
    if change.figure not in tested:
        return change
    found = tested[change.figure]
    direction: Direction = "too few units to tell" if few else "no clear difference"
    return replace(change, test=TEST, p=found.p, corrected=found.corrected, direction=direction)


def _corrected(arms: Sequence[Arm]) -> list[Arm]:
    """With p values corrected for the number of arms as well, and the direction that follows."""
    count = sum(any(change.test for change in arm.changes) for arm in arms)
    return [
        replace(
            arm,
            changes=tuple(_directed(change, arm.changes, count) if change.test else change for change in arm.changes),
        )
        for arm in arms
    ]


def _directed(change: Change, beside: Sequence[Change], arms: int) -> Change:
    corrected = min(1.0, (change.corrected or 0.0) * arms)
    change = replace(change, corrected=corrected)
    difference = change.difference
    if change.direction == "too few units to tell" or corrected >= ALPHA or not difference.leaves_out_zero:
        return change
    direction: Direction = "better" if ((difference.value or 0.0) > 0) == (change.better == "higher") else "worse"
    return replace(change, direction=direction, shifted=_shifted(change, beside))


def _shifted(change: Change, beside: Sequence[Change]) -> tuple[str, ...]:
    """The shifts of the figure's group, or of all groups where it has none, whose intervals leave out zero."""
    shifts = [other for other in beside if other.kind == "shift"]
    own = [shift for shift in shifts if shift.group == change.group]
    return tuple(shift.figure for shift in own or shifts if shift.difference.leaves_out_zero)
