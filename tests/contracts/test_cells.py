"""`docs/support.md` and its table say what happens: some cells are tried in every run, and all as a product."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.contracts.support import PAIR, vlm_of
from tests.tiny import TINY
from tools.support import PAGE, WAYS, found, page, verdict
from vlmfix.decoders import DecodingPlan, Greedy
from vlmfix.decoders.index import HOMES
from vlmfix.decoders.support import support
from vlmfix.decoding.branches import Contrast


def some():
    """Cells: every decoder in two of the ways, with one of the pair of families and with one of the others.

    Each way meets a third of the decoders, and every family beside the pair three decoders or four.
    """
    others = [family for family in TINY if family not in PAIR]
    ways = list(WAYS)
    for place, name in enumerate(HOMES):
        yield pytest.param(PAIR[place // len(ways) % 2], name, [ways[place % len(ways)]])
        yield pytest.param(others[place % len(others)], name, [ways[(place + 3) % len(ways)]])
    for family in TINY:
        for name in HOMES:
            yield pytest.param(family, name, ways, marks=pytest.mark.product)


@pytest.mark.parametrize(("family", "name", "ways"), list(some()))
def test_the_table_says_what_happens(family, name, ways):
    said = support()[name].of(family)
    assert found(family, name, ways) == {way: said[way] for way in ways}, "run: make support"


def test_the_page_is_the_table_and_nothing_in_it_fails():
    table = {name: {way: dict(cells) for way, cells in tried.found.items()} for name, tried in support().items()}
    assert PAGE.read_text(encoding="utf-8") == page(table), "run: make support"
    assert list(table) == list(HOMES)
    for ways in table.values():
        assert list(ways) == list(WAYS)
        for cells in ways.values():
            assert set(cells) == set(TINY)
            assert not [
                cell for cell in cells.values() if not cell.startswith(("works", "refused: ", "not applicable"))
            ]


class Neighbours(Contrast):
    """Scores that depend on how many rows there are."""

    def fuse(self, clean, others, scores):
        return scores.roll(len(scores), dims=-1)


@dataclass(frozen=True, kw_only=True)
class Sociable(Greedy):
    def plan(self, vlm, batch, layout):
        return DecodingPlan(contrasts=(Neighbours(branches=(), rows=batch.attention_mask.any(dim=1)),))


def test_a_decoder_whose_rows_depend_on_their_neighbours_fails():
    for way in ("greedy", "beams", "own generate"):
        assert verdict(way, vlm_of("llava"), Sociable()) == "fails: row 0 and 1 gets other tokens than alone"
