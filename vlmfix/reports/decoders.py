"""What people read of decoders: a table, and pages; needs none of the decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vlmfix.advice.recipes import Recipe
from vlmfix.decoders.index import DecoderInfo, Plain
from vlmfix.plugins import Found
from vlmfix.reports.recipes import recipe_table
from vlmfix.terminal import rendered


def decoder_table(infos: Sequence[DecoderInfo], plugins: Sequence[Found], recipes: Sequence[Recipe]) -> str:
    """Recipes; decoders, one in a line as far as the width allows; and where to read on.

    Args:
        infos: Those that are described.
        plugins: Those of other distributions, of which the names alone are known.
        recipes: Those that come with the package.
    """
    table = Table(box=None, pad_edge=False)
    for title in ("decoder", "title", "acts on", "passes", "beams", "arXiv"):
        table.add_column(title, justify="right" if title == "passes" else "left")
    for info in infos:
        beams = "yes" if info.beams else "no"
        table.add_row(info.name, info.title, info.acts_on, str(info.passes), beams, info.arxiv)
    for found in plugins:
        table.add_row(found.name, f"of {found.distribution}", "", "", "", "")
    return rendered(
        *recipe_table(recipes),
        "",
        table,
        "",
        Text("Parameters and presets: vlmfix decoders NAME; of all: vlmfix decoders --all"),
    )


def decoder_pages(infos: Sequence[DecoderInfo]) -> str:
    """What each of some decoders does, with its parameters and presets."""
    parts: list[RenderableType] = []
    for info in infos:
        parts += [*([""] if parts else []), *_decoder_page(info)]
    return rendered(*parts)


def _decoder_page(info: DecoderInfo) -> Iterator[RenderableType]:
    links = [f"arXiv {info.arxiv}" if info.arxiv else "", info.code]
    source = "; ".join(filter(None, links))
    yield Text(f"{info.name}: {info.title}{f' ({source})' if source else ''}", style="bold")
    if info.made_by:
        yield Text(f"From {info.made_by}.")
    yield Text(info.summary)
    works = ", ".join(f"{what} {'works' if flag else 'does not work'}" for what, flag in _abilities(info))
    yield Text(f"Acts on: {info.acts_on}. Rows per sample: {info.passes}. {works[0].upper()}{works[1:]}.")
    if info.parameters:
        table = Table(box=None, pad_edge=False)
        for title in ("parameter", "default", "allowed", "meaning"):
            table.add_column(title)
        for parameter in info.parameters:
            table.add_row(parameter.name, _written(parameter.default), parameter.range, parameter.meaning)
        yield from ("", table)
    for name, values in info.presets.items():
        yield Text(f"preset={name}: {', '.join(f'{key}={_written(value)}' for key, value in values.items())}")


def _abilities(info: DecoderInfo) -> tuple[tuple[str, bool], ...]:
    return ("beam search", info.beams), ("compiled decoding", info.compiles)


def _written(value: Plain) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
