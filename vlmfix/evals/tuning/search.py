"""Search a decoder's parameters with Optuna: what a specification leaves open, trial by trial, in a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import create_trial

from vlmfix.decoders import DECODERS, Chain, Decoder
from vlmfix.decoders.spec import Part, read_parts
from vlmfix.errors import DataError, UsageError
from vlmfix.language.parameters import Range, Value, ranges
from vlmfix.plugins import origin_of
from vlmfix.records import JsonLines
from vlmfix.shapes import NUMBER, OBJECT, Shape, fields, mapping_of

DIGITS = 3
"""Significant digits of the numbers that are tried, so that people can read and write them."""


@dataclass(frozen=True)
class Axis:
    """One open parameter.

    Attributes:
        part: Which decoder of the chain has it.
        name: Its name there.
        allowed: Its declaration, with what a search tries.
    """

    part: int
    name: str
    allowed: Range

    def distribution(self) -> BaseDistribution:
        """The same in Optuna's terms."""
        if self.allowed.kind is float:
            low, high = (float(end) for end in self.allowed.search)
            return FloatDistribution(low, high, log=self.allowed.log)
        if self.allowed.kind is int:
            first, last = (int(end) for end in self.allowed.search)
            return IntDistribution(first, last, log=self.allowed.log)
        return CategoricalDistribution(self.allowed.search)

    def tried(self, value: object) -> bool:
        """Whether a value, as a file holds it, is one that the search tries, of the right type."""
        if self.allowed.kind in (int, float):
            return type(value) is self.allowed.kind and self.holds(value)
        return any(type(value) is type(word) and value == word for word in self.allowed.search)

    def holds(self, value: Value) -> bool:
        """Whether the search may try a value."""
        if isinstance(value, int | float) and self.allowed.kind in (int, float):
            low, high = (float(end) for end in self.allowed.search)
            return low <= value <= high
        return value in self.allowed.search


@dataclass(frozen=True)
class Space:
    """A decoder with open parameters.

    Attributes:
        parts: The decoders of the chain with what is given.
        axes: The open parameters by name; in a chain the name is ``decoder.parameter``.
    """

    parts: tuple[Part, ...]
    axes: Mapping[str, Axis]

    @classmethod
    def of(cls, spec: str) -> Space:
        """What a specification leaves open. A preset that it names is where the search begins; it fixes nothing.

        Raises:
            UsageError: The specification is wrong, or leaves nothing open that a search tries.
            DataError: A recipe in it cannot be read.
        """
        parts = read_parts(spec, DECODERS)
        axes = {
            f"{label}{name}": Axis(number, name, allowed)
            for number, (label, part) in enumerate(zip(_labels(parts), parts, strict=True))
            for name, allowed in ranges(part.decoder).items()
            if allowed.search and name not in part.given
        }
        if not axes:
            raise UsageError(f"{spec} leaves nothing to tune", _openable(parts))
        space = cls(parts, axes)
        space.build({})
        return space

    def build(self, chosen: Mapping[str, Value]) -> Decoder:
        """The decoder with values for open parameters; those that are not named keep their defaults.

        What does nothing beside the chosen values has its own value again.
        """
        values = [dict(part.given) for part in self.parts]
        for label, value in chosen.items():
            axis = self.axes[label]
            values[axis.part][axis.name] = value
        chain = tuple(
            (part.decoder.acting if chosen else part.decoder)(**given)
            for part, given in zip(self.parts, values, strict=True)
        )
        return chain[0] if len(chain) == 1 else Chain(decoders=chain)

    def defaults(self) -> dict[str, Value]:
        """Values of the open parameters in the decoder as specified, as far as the search may try them."""
        decoders = [part.decoder(**part.given) for part in self.parts]
        values = {label: decoders[axis.part].parameters()[axis.name] for label, axis in self.axes.items()}
        return {label: value for label, value in values.items() if self.axes[label].holds(value)}


def _openable(parts: Sequence[Part]) -> str:
    """Says how a specification that leaves nothing open would leave something: in its decoders, or of vlmfix's own."""
    fixed = {part.decoder.called(): _searched(part.decoder) for part in parts if _searched(part.decoder)}
    if fixed:
        return f"leave one of these open: {_listed(fixed)}"
    foreign = [part.decoder for part in parts if origin_of(part.decoder) is not None]
    undeclared = [
        f"{name} = parameter(..., search=({allowed.low:g}, {allowed.high:g}))"
        for decoder in foreign
        for name, allowed in ranges(decoder).items()
        if allowed.kind in (int, float) and math.isfinite(allowed.low) and math.isfinite(allowed.high)
    ]
    if undeclared:
        return (
            f"a parameter says what to try in its declaration; write, or with a smaller range: {'; '.join(undeclared)}"
        )
    if foreign:
        return "a parameter says what to try in its declaration: search=(low, high) for numbers, else the words"
    named = {name: _searched(DECODERS[name]) for name in DECODERS.homes if _searched(DECODERS[name])}
    return f"leave one of these open: {_listed(named)}"


def _listed(named: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(searched)}" for name, searched in named.items())


def _labels(parts: Sequence[Part]) -> list[str]:
    """What stands before a parameter's name: nothing for one decoder, else the decoder, numbered when repeated."""
    if len(parts) == 1:
        return [""]
    seen: Counter[str] = Counter()
    labels = []
    for part in parts:
        seen[part.decoder.name] += 1
        times = seen[part.decoder.name]
        labels.append(f"{part.decoder.name}{f'-{times}' if times > 1 else ''}.")
    return labels


def _searched(decoder: type[Decoder]) -> list[str]:
    return [name for name, allowed in ranges(decoder).items() if allowed.search]


@dataclass(frozen=True)
class Measured:
    """What one trial gave.

    Attributes:
        value: What is made small or large.
        constraints: By name; each is kept when it is at most 0.
        about: What else is known, in JSON values.
    """

    value: float
    constraints: Mapping[str, float]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """One finished trial.

    Attributes:
        chosen: Values of the open parameters.
        value: What is made small or large.
        feasible: All constraints are kept.
        about: See :class:`Measured`.
    """

    chosen: Mapping[str, Value]
    value: float
    feasible: bool
    about: Mapping[str, Any]


def search(
    space: Space,
    journal: Path,
    measure: Callable[[Mapping[str, Value]], Measured],
    *,
    better: Literal["higher", "lower"],
    budget: int,
    seed: int,
    about: Shape = OBJECT,
) -> list[Tried]:
    """Try values with the tree-structured Parzen estimator until a file holds as many trials as asked for.

    The first trial is the decoder as specified. Every trial's draw depends on the seed and on the trials before it
    alone, so a search that was killed goes on as if it had not been.

    Args:
        space: What is searched.
        journal: A file of JSON lines, one a finished trial; one that is there is gone on with.
        measure: Tries values; called once a trial.
        better: Which way the value is better.
        budget: Finished trials in the end, those in the file included.
        seed: Of every draw.
        about: What a trial's ``about`` must hold.

    Returns:
        The finished trials of the file, in order.

    Raises:
        UsageError: Another process searches with the file.
        DataError: The file was damaged, or cannot be written.
    """
    shape = fields({"parameters": OBJECT, "value": NUMBER, "constraints": mapping_of(NUMBER), "about": about})
    with JsonLines(journal, shape) as lines, _quiet():
        trials = [_checked(space, journal, number, line) for number, line in enumerate(lines, start=1)]
        lines.claim()
        while len(trials) < budget:
            parameters = _next(space, trials, better, _seed(seed, len(trials)))
            measured = measure(_readable(parameters))
            line = {
                "parameters": parameters,
                "value": measured.value,
                "constraints": dict(measured.constraints),
                "about": dict(measured.about),
            }
            lines.append(line)
            trials.append(line)
    return [
        Tried(
            chosen=_readable(line["parameters"]),
            value=float(line["value"]),
            feasible=all(value <= 0 for value in line["constraints"].values()),
            about=line["about"],
        )
        for line in trials
    ]


def _checked(space: Space, journal: Path, number: int, line: dict[str, Any]) -> dict[str, Any]:
    """A line of a journal, if it is of this search.

    Raises:
        DataError: It is not.
    """
    parameters = line["parameters"]
    if parameters.keys() != space.axes.keys():
        wrong = f"the parameters {', '.join(parameters) or '(none)'}, not {', '.join(space.axes)}"
    else:
        odd = (f"{name}={parameters[name]!r}" for name, axis in space.axes.items() if not axis.tried(parameters[name]))
        wrong = next(odd, "")
    if wrong:
        raise DataError(
            f"line {number} of {journal} is not of this search: it has {wrong}",
            "restore the file, or choose another folder",
        )
    return line


def _next(
    space: Space, trials: Sequence[Mapping[str, Any]], better: Literal["higher", "lower"], seed: int
) -> dict[str, Any]:
    """What is tried after some trials."""
    distributions = {label: axis.distribution() for label, axis in space.axes.items()}
    study = optuna.create_study(
        direction="maximize" if better == "higher" else "minimize", sampler=optuna.samplers.TPESampler(seed=seed)
    )
    study.add_trials(
        [
            create_trial(
                params=line["parameters"],
                distributions=distributions,
                value=line["value"],
                constraints=line["constraints"],
            )
            for line in trials
        ]
    )
    if not trials:
        study.enqueue_trial(space.defaults())
    return dict(study.ask(distributions).params)


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _readable(chosen: Mapping[str, Any]) -> dict[str, Value]:
    """Floats rounded to a few digits."""
    return {name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for name, value in chosen.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna from telling every step on stderr."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
