"""Parameters of decoders: declared once as dataclass fields, then checked, printed and parsed from there."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfix.attention.edit import LayerSet
from vlmfix.errors import UsageError

HEADS = re.compile(r"L[0-9]{1,9}H[0-9]{1,9}(/L[0-9]{1,9}H[0-9]{1,9})*")


@dataclass(frozen=True)
class HeadList:
    """Query heads in an order, written ``L16H29/L26H9``: layer 16, head 29, then layer 26, head 9; both count from 0.

    Args:
        spec: The heads; none twice.

    Raises:
        UsageError: ``spec`` is not of that form.
    """

    spec: str

    def __post_init__(self) -> None:
        if not HEADS.fullmatch(self.spec):
            raise UsageError(f"heads {self.spec!r} are not understood", "write layers and heads such as L16H29/L26H9")
        if len(set(self.pairs)) < len(self.pairs):
            raise UsageError(f"heads {self.spec!r} name a head twice", "name each once")

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> HeadList:
        """The list of some (layer, head)."""
        return cls("/".join(f"L{layer}H{head}" for layer, head in pairs))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of each, in order."""
        return tuple((int(layer), int(head)) for layer, head in re.findall(r"L([0-9]+)H([0-9]+)", self.spec))

    def __str__(self) -> str:
        return self.spec


Value = bool | int | float | str | LayerSet | HeadList | tuple[int, ...] | None
"""What a decoder's parameter can hold."""
UNWRITABLE = re.compile(r"[,\n\r]|\+(?=\s*[a-zA-Z@])|^\s|\s$|^(?i:none)?$")
"""Texts that a specification could not be read back from, or that mean something else there."""
PRESETS_OWN: Any = object()
"""Default of an optional parameter that presets set: what the preset says, or None where it says nothing. A None that
was given is a value of such a parameter, and no preset replaces it."""
WRITABLE = "no comma, line break, + before a letter or white space around it, and neither nothing nor none"


class Given:
    """Stands, in ``Range.idle``, for every value of an optional parameter but None."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a parameter may be.

    Attributes:
        kind: bool, int, float, str, LayerSet, HeadList or tuple (of ints).
        low: Smallest allowed number.
        high: Largest allowed number.
        choices: Allowed words; empty for any.
        optional: None is allowed and stands for what ``help`` says.
        help: One sentence: meaning, the paper's symbol, unit.
        search: What tuning tries: the lowest and highest number, or the words; empty for a parameter that tuning
            leaves alone, such as a seed.
        log: Tuning tries numbers on a logarithmic scale.
        file: It names a file, a folder or a model to load: whoever may not read what the process can may not set it.
        idle: Under which values of other parameters it does nothing, each a mapping from their names to these values,
            all of which hold then; ``Given`` is any value but None. Another value than the parameter's own is refused
            there. Ends of a scale are none of these, unless they are said to switch a part off.
        later: A later version added it to the decoder: where all such parameters have their defaults, none is written,
            so that cards of earlier versions, which lack them, name an equal decoder.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    optional: bool = False
    help: str = ""
    search: tuple[bool | int | float | str, ...] = ()
    log: bool = False
    file: bool = False
    idle: tuple[Mapping[str, Any], ...] = ()
    later: bool = False

    def text(self) -> str:
        """The allowed values in words."""
        if self.choices:
            words = " | ".join(self.choices)
        elif self.kind in (int, float):
            words = f"{self.kind.__name__} in [{self.low:g}, {self.high:g}]"
        else:
            words = {
                bool: "true | false",
                LayerSet: "layers such as all, 2:-1 or 5/8",
                HeadList: "heads such as L16H29/L26H9",
                tuple: "integers joined by /",
            }.get(self.kind, "text")
        return words

    def search_text(self) -> str:
        """What tuning tries, in words; empty when it leaves the parameter alone."""
        if self.search and self.kind in (int, float):
            low, high = self.search
            return f"{low:g} to {high:g}{', logarithmic' if self.log else ''}"
        return " | ".join(written(word) for word in self.search)

    def idle_text(self) -> str:
        """What the parameter does nothing with, in words; empty when it always acts."""
        return " or ".join(" and ".join(_said(*pair) for pair in case.items()) for case in self.idle)

    def idle_case(self, values: Mapping[str, Value]) -> Mapping[str, Any] | None:
        """Returns the first case of ``idle`` that some values of the decoder's parameters are; None where it acts."""
        return next((case for case in self.idle if all(_holds(values[name], case[name]) for name in case)), None)

    def check(self, owner: str, name: str, value: Value) -> Value:
        """Returns the value in its own type.

        Raises:
            UsageError: It is of another type or out of range.
        """
        if value is None and self.optional:
            return None
        if self.kind in (LayerSet, HeadList) and isinstance(value, str):
            made: Value = self.kind(value)
            return made
        if self.kind is float and type(value) is int:
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            fits = type(value) is self.kind and self.low <= value <= self.high
        else:
            fits = type(value) is self.kind and (not self.choices or value in self.choices)
        if not fits:
            raise UsageError(f"{owner}: {name}={value!r} is not allowed", f"allowed: {self.text()}")
        if isinstance(value, str) and UNWRITABLE.search(value):
            raise UsageError(f"{owner}: {name}={value!r} cannot stand in a specification", WRITABLE)
        return value

    def parse(self, owner: str, name: str, text: str) -> Value:
        """Reads a value from a specification string."""
        if self.optional and text.lower() == "none":
            return None
        try:
            if self.kind is bool:
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            if self.kind is tuple:
                return tuple(int(part) for part in text.split("/"))
            value: Value = self.kind(text)
            return value
        except (ValueError, KeyError) as error:
            raise UsageError(f"{owner}: {name}={text} is not allowed", f"allowed: {self.text()}") from error


def parameter(default: Value, kind: type, **limits: Any) -> Any:  # noqa: ANN401 (a field stands for its value)
    """A dataclass field that knows its range; see ``Range`` for ``limits``."""
    return dataclasses.field(default=default, metadata={"range": Range(kind=kind, **limits)})


def ranges(decoder: type) -> dict[str, Range]:
    """The declared parameters of a decoder class, in order."""
    return {f.name: f.metadata["range"] for f in dataclasses.fields(decoder) if "range" in f.metadata}


def settled(
    decoder: Any,  # noqa: ANN401 (a dataclass with a name)
    given: Mapping[str, Value],
    preset: Mapping[str, Value],
) -> dict[str, Value]:
    """The values that parameters get, in their own types.

    Args:
        decoder: The class, whose ``name`` messages begin with.
        given: What is given; a parameter that is missing is left at its default.
        preset: What the preset says of those that are left open; see ``PRESETS_OWN``.

    Raises:
        UsageError: A value is of another type or out of range.
    """
    values: dict[str, Value] = {}
    defaults = {field.name: field.default for field in dataclasses.fields(decoder)}
    for name, allowed in ranges(decoder).items():
        value: Any = given.get(name, defaults[name])
        if value is (PRESETS_OWN if allowed.optional else None):
            value = preset.get(name)
        values[name] = allowed.check(decoder.name, name, value)
    return values


def noted(decoder: Any) -> dict[str, Value]:  # noqa: ANN401 (a dataclass)
    """The parameters of a decoder that are written down, with their values; see ``Range.later``."""
    values = {name: getattr(decoder, name) for name in ranges(type(decoder))}
    late = {name for name, allowed in ranges(type(decoder)).items() if allowed.later}
    defaults = {field.name: field.default for field in dataclasses.fields(decoder)}
    if any(values[name] != defaults[name] for name in late):
        return values
    return {name: value for name, value in values.items() if name not in late}


def written(value: Value) -> str:
    """A value as a specification string writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(str(part) for part in value)
    return "none" if value is None else str(value)


def plain(value: Value) -> bool | int | float | str | None:
    """A decoder's parameter as JSON holds it; a layer set or a tuple is written as on the command line."""
    return value if value is None or isinstance(value, bool | int | float | str) else written(value)


def _holds(value: Value, expected: Any) -> bool:  # noqa: ANN401 (a value, or Given)
    return value is not None if expected is Given else value == expected


def _said(name: str, value: Any) -> str:  # noqa: ANN401 (a value, or Given)
    return name if value is Given else f"{name}={written(value)}"
