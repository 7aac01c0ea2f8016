"""Reads and describes decoders in their language: ``var:moved_fraction=0.4+locore:strength=0.15``, ``@recipe.toml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vlmfix.decoders.base import Chain, Decoder
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.language.parameters import Value, path_of, ranges
from vlmfix.language.recipe import read_recipe

PART = re.compile(r"(@.*?\.toml\s*(?=\+|$)|.*?)(?:\+(?=\s*[a-zA-Z@])|$)", re.DOTALL)
"""A part of a chain and the ``+`` after it; the path of a recipe may hold a ``+``, and so may a number."""


@dataclass(frozen=True)
class Parameter:
    """Describes one parameter of a decoder, for tables."""

    name: str
    default: Value
    range: str
    help: str
    search: str


@dataclass(frozen=True)
class DecoderInfo:
    """Describes one decoder, for tables: ``summary`` is one sentence, ``presets`` the values of each named set."""

    name: str
    title: str
    summary: str
    arxiv: str
    code: str
    acts_on: str
    passes: int
    beams: bool
    compiles: bool
    parameters: tuple[Parameter, ...]
    presets: Mapping[str, Mapping[str, Value]]


@dataclass(frozen=True)
class Part:
    """Holds one decoder of a chain, as a specification gives it.

    Attributes:
        decoder: The method.
        given: The parameters that the specification names, with their values.
    """

    decoder: type[Decoder]
    given: Mapping[str, Value]


def parse(spec: str, decoders: Mapping[str, type[Decoder]]) -> Decoder:
    """Reads a decoder.

    Args:
        spec: ``name``, ``name:parameter=value,parameter=value``, ``@recipe.toml``, or several joined by ``+``.
        decoders: Known decoders by name.

    Raises:
        UsageError: A name or a parameter is unknown, or a value is not allowed.
        DataError: A recipe cannot be read.
    """
    chain = tuple(part.decoder(**part.given) for part in read_parts(spec, decoders))
    return chain[0] if len(chain) == 1 else Chain(decoders=chain)


def read_parts(spec: str, decoders: Mapping[str, type[Decoder]]) -> tuple[Part, ...]:
    """Reads the parts of a specification, with the parameters that it names and no others.

    Raises:
        UsageError: A name or a parameter is unknown.
        DataError: A recipe cannot be read.
    """
    parts: list[Part] = []
    for text in [found[1].strip() for found in PART.finditer(spec) if found[0]] or [""]:
        parts += _recipe(text[1:], decoders) if text.startswith("@") else [_one(text, decoders)]
    return tuple(parts)


def _recipe(name: str, decoders: Mapping[str, type[Decoder]]) -> tuple[Part, ...]:
    path = path_of(name)
    spec = read_recipe(path)["decoder"]
    if "@" in spec:
        raise DataError(f"{path}: its decoder {spec!r} names a recipe", "write the decoder's parameters out")
    try:
        parse(spec, decoders)  # so that the error for a value out of range names the file too
        return read_parts(spec, decoders)
    except VlmfixError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from error


def _one(spec: str, decoders: Mapping[str, type[Decoder]]) -> Part:
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
    return Part(decoders[name], values)


def describe(decoder: type[Decoder]) -> DecoderInfo:
    """Describes a decoder for tables."""
    defaults = decoder()
    return DecoderInfo(
        name=decoder.name,
        title=decoder.source.title,
        summary=" ".join((decoder.__doc__ or "").split("\n\n")[0].replace("``", "").split()),
        arxiv=decoder.source.arxiv,
        code=decoder.source.code,
        acts_on=decoder.acts_on,
        passes=decoder.passes,
        beams=decoder.beams,
        compiles=decoder.compiles,
        parameters=tuple(
            Parameter(name, getattr(defaults, name), allowed.text(), allowed.help, allowed.search_text())
            for name, allowed in ranges(decoder).items()
        ),
        presets=decoder.presets,
    )
