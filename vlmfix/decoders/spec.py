"""The one language for decoders: ``var:moved_fraction=0.4+locore:strength=0.15``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vlmfix.decoders.base import Chain, Decoder
from vlmfix.decoders.parameters import Value, ranges
from vlmfix.errors import UsageError


@dataclass(frozen=True)
class Parameter:
    """One parameter of a decoder, for tables."""

    name: str
    default: Value
    range: str
    help: str


@dataclass(frozen=True)
class DecoderInfo:
    """One decoder, for tables."""

    name: str
    title: str
    arxiv: str
    acts_on: str
    passes: int
    beams: bool
    compiles: bool
    parameters: tuple[Parameter, ...]


def parse(spec: str, decoders: Mapping[str, type[Decoder]]) -> Decoder:
    """Reads a decoder.

    Args:
        spec: ``name``, ``name:parameter=value,parameter=value``, or several joined by ``+``.
        decoders: Known decoders by name.

    Raises:
        UsageError: Unknown name or parameter, or a value that is not allowed.
    """
    parts = re.split(r"\+(?=\s*[a-zA-Z])", spec)
    chain = tuple(_one(part.strip(), decoders) for part in parts)
    return chain[0] if len(chain) == 1 else Chain(decoders=chain)


def _one(spec: str, decoders: Mapping[str, type[Decoder]]) -> Decoder:
    name, _, rest = spec.partition(":")
    if name not in decoders:
        raise UsageError(f"unknown decoder {name!r}", f"known decoders: {', '.join(decoders)}")
    allowed = ranges(decoders[name])
    values: dict[str, Value] = {}
    for item in filter(None, rest.split(",")):
        key, equals, text = item.partition("=")
        key = key.strip()
        if key not in allowed or not equals:
            known = ", ".join(allowed) or "none"
            raise UsageError(
                f"{name}: {item!r} is no parameter", f"write parameter=value; parameters of {name}: {known}"
            )
        if key in values:
            raise UsageError(f"{name}: {key} is given twice", "give each parameter once")
        values[key] = allowed[key].parse(name, key, text.strip())
    return decoders[name](**values)


def describe(decoder: type[Decoder]) -> DecoderInfo:
    """What a table says about a decoder."""
    defaults = decoder()
    return DecoderInfo(
        name=decoder.name,
        title=decoder.source.title,
        arxiv=decoder.source.arxiv,
        acts_on=decoder.acts_on,
        passes=decoder.passes,
        beams=decoder.beams,
        compiles=decoder.compiles,
        parameters=tuple(
            Parameter(name, getattr(defaults, name), allowed.text(), allowed.help)
            for name, allowed in ranges(decoder).items()
        ),
    )
