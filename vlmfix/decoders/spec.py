"""Reads and describes decoders in their language: ``var:moved_fraction=0.4+locore:strength=0.15``, ``@recipe.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmfix.decoders.base import Decoder
from vlmfix.decoders.chain import Chain
from vlmfix.decoders.index import DecoderInfo, Parameter, check_parameters
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.language.grammar import Words, split
from vlmfix.language.parameters import Value, plain, ranges
from vlmfix.language.recipe import SHIPPED, read_recipe, recipe_file
from vlmfix.plugins import FILE, Table, near


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
        spec: ``name``, ``path/to/file.py:Class``, either with ``:parameter=value,parameter=value`` behind it,
            ``@recipe.toml``, ``@keep-recall`` (one that comes with the package), or several joined by ``+``.
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
    for words in split(spec):
        parts += [_one(words, decoders)] if words.recipe is None else _recipe(words.recipe, decoders)
    return tuple(parts)


def refuse_files(spec: str) -> None:
    """Refuses a specification that names files: recipes other than the package's, or files with classes.

    Raises:
        UsageError: It does.
    """
    for words in split(spec):
        recipe = words.recipe is not None and recipe_file(words.recipe) not in SHIPPED.values()
        if recipe or FILE.fullmatch(words.name):
            raise UsageError(
                f"{words.name or f'@{words.recipe}'}: files are not read here",
                "name a decoder of vlmfix or of an installed distribution, and write its parameters out",
            )


def _recipe(name: str, decoders: Mapping[str, type[Decoder]]) -> tuple[Part, ...]:
    path = recipe_file(name)
    spec = read_recipe(path)["decoder"]
    if "@" in spec:
        raise DataError(f"{path}: its decoder {spec!r} names a recipe", "write the decoder's parameters out")
    try:
        parse(spec, decoders)  # so that the error for a value out of range names the file too
        return read_parts(spec, decoders)
    except VlmfixError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from error


def _one(words: Words, decoders: Mapping[str, type[Decoder]]) -> Part:
    if isinstance(decoders, Table):
        kind: type[Decoder] = decoders.find(words.name)
    elif words.name in decoders:
        kind = decoders[words.name]
    else:
        known = f"known decoders: {', '.join(decoders)}"
        raise UsageError(f"unknown decoder {words.name!r}", f"{near(words.name, decoders)}{known}")
    allowed = ranges(kind)
    check_parameters(words, list(allowed))
    return Part(kind, {key: allowed[key].parse(words.name, key, text) for key, _, text in words.given})


def describe(decoder: type[Decoder]) -> DecoderInfo:
    """Describes a decoder for tables."""
    defaults = decoder()
    paragraphs = [" ".join(text.replace("``", "").split()) for text in (decoder.__doc__ or "").split("\n\n")]
    costs = [text.removeprefix("*Cost*: ") for text in paragraphs if text.startswith("*Cost*: ")]
    return DecoderInfo(
        name=decoder.called(),
        made_by=next(iter(defaults.plugins().values()), ""),
        title=decoder.source.title,
        summary=paragraphs[0],
        arxiv=decoder.source.arxiv,
        code=decoder.source.code,
        acts_on=decoder.acts_on,
        cost=costs[0] if costs else "",
        passes=decoder.passes,
        beams=decoder.beams,
        compiles=decoder.compiles,
        refines=decoder.refines,
        chooses=_chosen(defaults),
        parameters=tuple(
            Parameter(
                name=name,
                default=plain(getattr(defaults, name)),
                range=allowed.text(),
                search=allowed.search_text(),
                help=allowed.help,
                idle=allowed.idle_text(),
            )
            for name, allowed in ranges(decoder).items()
        ),
        presets={name: {key: plain(value) for key, value in set_.items()} for name, set_ in decoder.presets.items()},
    )


def _chosen(decoder: Decoder) -> str:
    own = decoder.strategy
    return "" if own is None else "beams" if own.num_beams > 1 else "sampling"
