"""The choice of pairs: what tests share between them is everything, and a few methods stand for all."""

from __future__ import annotations

from tests.contracts.support import NEUTRAL, STRONG, crossed, few, method_of, parts_of
from tests.tiny import TINY


def met(pairs):
    return {pair.values for pair in pairs if not pair.marks}


def test_three_tests_that_share_the_pairs_ask_all_of_them():
    parts = [met(crossed(STRONG, turn=turn)) for turn in range(3)]
    assert set.union(*parts) == met(crossed(STRONG))
    for part in parts:
        assert len(part) < len(met(crossed(STRONG))) / 2
        assert {family for family, _ in part} == set(TINY)
        assert {name for _, name in part} == set(STRONG)


def test_a_few_methods_have_every_part():
    for table in (STRONG, NEUTRAL):
        parts = {name: parts_of(method_of(spec)) for name, spec in table.items()}
        chosen = [parts[name] for name in few(table)]
        assert len(chosen) < len(table) / 2
        assert frozenset().union(*chosen) == frozenset().union(*parts.values())
