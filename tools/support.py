"""Tries every decoder on every family in every way to run, and writes what happens: `make support`.

``docs/support.md`` is for people, ``vlmfix/decoders/support.json`` for ``vlmfix doctor`` and ``vlmfix explain``. The
models are the tests' own: tiny ones with random weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from tests.contracts.support import PICTURES, PROMPTS, STRONG, vlm_of
from tests.decoding.again import recording_on_cpu
from tests.tiny import TINY
from tools.entry import run
from vlmfix.decoders import Decoder, parse
from vlmfix.decoders.index import HOMES
from vlmfix.decoders.support import SUPPORT, WORKS, support
from vlmfix.errors import VlmfixError
from vlmfix.generation import VLM
from vlmfix.planned import planned
from vlmfix.upstream.defaults import ends, undisturbed

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
TOKENS = 6
"""Tokens of an answer: more than the four up to which no step is recorded."""
PLAIN = {"carve": "carve:probe_tokens=3", "vicrop": "vicrop:base=12"}
"""Parameters of methods that no other test asks with stronger ones; without an entry, a method has its defaults."""
OWN_DRAWS = {"sample": "sample:top_k=1"}
"""Parameters inside a user's own ``generate``, where transformers draws from a state that all rows share."""

LENGTH = re.compile(r"\b[0-9]{2,}\b")
"""A length of a tiny model's prompt, which says nothing of other models."""

Rows = list[tuple[int, ...]]
"""The tokens of each row."""


def spec(name: str) -> str:
    """Writes a decoder with the parameters that it is tried with."""
    return str(STRONG.get(name) or PLAIN.get(name, name))


def found(family: str, name: str, ways: Iterable[str] | None = None) -> dict[str, str]:
    """Tries a decoder on the tiny model of a family.

    Args:
        family: The family.
        name: The decoder.
        ways: The ways to run that are tried; None for all.

    Returns:
        Each way with ``works``, or with ``refused``, ``not applicable`` or ``fails`` and the reason.
    """
    vlm, decoder = vlm_of(family), parse(spec(name))
    return {way: verdict(way, vlm, decoder) for way in ways or WAYS}


def verdict(way: str, vlm: VLM, decoder: Decoder) -> str:
    """Tries a decoder in one way; see ``found``."""
    try:
        return WAYS[way](vlm, decoder)
    except VlmfixError as error:
        reason = error.message.replace(decoder.spec(), decoder.name)
        return f"refused: {LENGTH.sub('N', reason)}"
    except Exception as error:  # the finding, which the tool ends with
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _answers(vlm: VLM, decoder: Decoder, rows: Iterable[int] = (0, 1), **options: Any) -> Rows:
    rows = list(rows)
    vlm.memo.clear()
    pictures, prompts = [list(PICTURES[row]) for row in rows], [PROMPTS[row] for row in rows]
    found = vlm.generate(pictures, prompts, decoder=decoder, max_new_tokens=TOKENS, **options)
    return [answer.ids for answer in found]


def _same(together: Rows, alone: Rows) -> str:
    other = [str(row) for row, pair in enumerate(zip(together, alone, strict=True)) if pair[0] != pair[1]]
    return f"fails: row {' and '.join(other)} gets other tokens than alone" if other else WORKS


def _alone(vlm: VLM, decoder: Decoder, **options: Any) -> Rows:
    return [_answers(vlm, decoder, [row], **options)[0] for row in range(len(PROMPTS))]


def _batched(vlm: VLM, decoder: Decoder, **options: Any) -> str:
    return _same(_answers(vlm, decoder, **options), _alone(vlm, decoder, **options))


def _greedy(vlm: VLM, decoder: Decoder) -> str:
    if decoder.strategy is not None:
        return "not applicable: it chooses tokens in a way of its own"
    return _batched(vlm, decoder)


def _sampling(vlm: VLM, decoder: Decoder) -> str:
    draws = decoder.strategy is not None and decoder.strategy.temperature > 0
    return _batched(vlm, decoder, seed=7, **({} if draws else {"temperature": 1.3}))


def _beams(vlm: VLM, decoder: Decoder) -> str:
    searches = decoder.strategy is not None and decoder.strategy.num_beams > 1
    return _batched(vlm, decoder, **({} if searches else {"num_beams": 2}))


def _static(vlm: VLM, decoder: Decoder) -> str:
    return _same(_answers(vlm, decoder, static_cache=True), _alone(vlm, decoder))


@torch.no_grad()
def _own_generate(vlm: VLM, decoder: Decoder) -> str:
    decoder = parse(OWN_DRAWS[decoder.name]) if decoder.name in OWN_DRAWS else decoder
    batch = vlm.encode(PROMPTS, PICTURES)
    generate: Any = vlm.model.generate
    with decoder.applied(vlm, batch) as arguments, undisturbed(vlm.model):
        tokens = generate(**batch, **{"do_sample": False, **arguments}, max_new_tokens=TOKENS)[:, batch.length :]
    return _same([_ended(row, ends(vlm.model)) for row in tokens.tolist()], _alone(vlm, decoder))


def _ended(row: list[int], ends: list[int]) -> tuple[int, ...]:
    return tuple(row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))])


def _recorded(vlm: VLM, decoder: Decoder) -> str:
    with recording_on_cpu([vlm]) as made:
        together = _answers(vlm, decoder)
    total = planned(vlm, [decoder], max_new_tokens=TOKENS)["total"]
    reasons: list[str] = total["recorded"]
    if bool(made) == bool(reasons):
        return f"fails: {len(made)} steps are recorded, and vlmfix explain says {reasons or 'that they are'}"
    return _same(together, _alone(vlm, decoder)) if made else f"not applicable: {' and '.join(reasons)}"


WAYS: Mapping[str, Callable[[VLM, Decoder], str]] = {
    "greedy": _greedy,
    "sampling": _sampling,
    "beams": _beams,
    "static cache": _static,
    "own generate": _own_generate,
    "recorded steps": _recorded,
}
"""The ways to run: by ``vlm.generate`` but for the fifth."""

Table = dict[str, dict[str, dict[str, str]]]
"""Decoder -> way -> family -> verdict."""


def tried(names: Iterable[str], report: Callable[[str], None]) -> Table:
    """Tries decoders, and takes what is known of the others from the table that stands.

    Args:
        names: The decoders.
        report: Called with each decoder's name before it is tried.
    """
    table: Table = {}
    wanted, known = set(names), support()
    for name in HOMES:
        if name in wanted or name not in known:
            report(name)
            cells = {family: found(family, name) for family in TINY}
            table[name] = {way: {family: cells[family][way] for family in TINY} for way in WAYS}
        else:
            table[name] = {way: dict(families) for way, families in known[name].found.items()}
    return table


def gathered(verdicts: Mapping[str, str]) -> dict[str, list[str]]:
    """Gathers families by what was found."""
    return {
        verdict: [family for family in verdicts if verdicts[family] == verdict]
        for verdict in dict.fromkeys(verdicts.values())
    }


def document(table: Table) -> str:
    """Returns the table as JSON."""
    entries = {
        name: {
            "spec": spec(name),
            "found": {
                way: {verdict: " ".join(families) for verdict, families in gathered(found).items()}
                for way, found in ways.items()
            },
        }
        for name, ways in table.items()
    }
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def page(table: Table) -> str:
    """Returns the table as a page: what holds for every family stands in the table, all else in notes below it."""
    notes: dict[str, int] = {}
    lines = [HEAD, f"| decoder | {' | '.join(WAYS)} |", "| --- |" + " --- |" * len(WAYS)]
    for name, ways in table.items():
        cells = [_cell(gathered(found), notes) for found in ways.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for note, number in notes.items()), "", TAIL]
    lines += [f"- `{spec(name)}`" for name in table if spec(name) != name]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, list[str]], notes: dict[str, int]) -> str:
    most_first = sorted(found.items(), key=lambda pair: -len(pair[1]))
    return "; ".join(_words(verdict, families, notes) for verdict, families in most_first)


def _words(verdict: str, families: list[str], notes: dict[str, int]) -> str:
    kind, _, reason = verdict.partition(": ")
    note = f" ({notes.setdefault(reason, len(notes) + 1)})" if reason else ""
    return f"{kind}{note}" if len(families) > len(TINY) / 2 else f"{kind}{note} with {', '.join(families)}"


HEAD = f"""# Support

Which decoder works with which family, in which way to run. Nothing here is written by hand: `make support` tries
every cell and writes this page, and what `vlmfix doctor` and `vlmfix explain` say of it. The suite tries a part of the
cells anew, and `pytest -m product` all of them.

**Works** means that a batch of two rows, whose prompts and pictures differ in number and length, gives each row the
tokens that it gets alone, in float32. What stands without a family holds for all of the {len(TINY)} that are not named
beside it: {", ".join(f"`{name}`" for name in TINY)}.
Beside this table, the suite holds every decoder to that with eight rows, on `llava` and `qwen2_5_vl`.
The models are tiny and have random weights: the page says what runs and gives the right tokens, and nothing about how
good a method is (that is [effects.md](effects.md)).

- **Greedy**, **sampling**, **beams** and **static cache** are `vlm.generate` with its options, or with the decoder's.
- **Own generate** is `model.generate` inside `decoder.applied(vlm, batch)`. There transformers draws from a state that
  all rows share, so `sample` was tried with `top_k=1`.
- **Recorded steps** are those that a GPU replays ([design.md](design.md)). They are tried on a CPU, which runs the
  recorded step again, and must give the tokens of steps that are not recorded.
"""

TAIL = """## What was tried

Tiny models lack what some methods look for, so these have parameters under which they act; the others have their
defaults.
"""


@click.command()
@click.option(
    "--decoder",
    "names",
    multiple=True,
    type=click.Choice(list(HOMES)),
    help="These and new ones alone.  [default: all]",
)
@click.option("--page", "page_path", default=PAGE, type=click.Path(path_type=Path), help="The page to write.")
@click.option("--table", "table_path", default=SUPPORT, type=click.Path(path_type=Path), help="The JSON to write.")
def main(names: tuple[str, ...], page_path: Path, table_path: Path) -> None:
    """Try every decoder on every family in every way, and write what happens."""
    table = tried(names or HOMES, partial(click.echo, err=True))
    page_path.write_text(page(table), encoding="utf-8")
    table_path.write_text(document(table), encoding="utf-8")
    if failing := list(_failing(table)):
        raise click.ClickException("\n".join(failing))


def _failing(table: Table) -> Iterator[str]:
    for name, ways in table.items():
        for way, verdicts in ways.items():
            for verdict, families in gathered(verdicts).items():
                if verdict.startswith("fails"):
                    yield f"{name}, {way}, {', '.join(families)}: {verdict}"


if __name__ == "__main__":
    run(main)
