"""Every method says what it said when its answers were recorded, whatever changed in how decoding is done."""

from __future__ import annotations

import pytest

from tests.embedded import TINY
from tests.recorded.answers import MORE, answered, methods, recorded
from vlmfix.generation import load


@pytest.fixture(scope="module")
def models():
    return {name: load(name, device="cpu", dtype="float32") for name in TINY}


def asked(place, name, number):
    """Strong parameters and chains meet both models; defaults, which often say what greedy decoding says, one each."""
    return name in MORE or (place + number) % len(TINY) == 0


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, marks=() if asked(place, name, number) else pytest.mark.product)
        for number, model in enumerate(TINY)
        for place, name in enumerate(methods())
    ],
)
def test_the_tokens_are_those_that_were_recorded(models, model, name):
    assert answered(models[model], methods()[name]) == recorded()[model][name]


def test_the_cases_tell_methods_apart():
    """A method that did nothing would pass on greedy's tokens; most cases have tokens of their own."""
    for cases in recorded().values():
        assert len({str(rows) for rows in cases.values()}) > len(cases) / 2
