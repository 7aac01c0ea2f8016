"""Every method says what it said when its answers were recorded, whatever changed in how decoding is done."""

from __future__ import annotations

import pytest

from tests.recorded.answers import answered, methods, recorded
from vlmfix.generation import load
from vlmfix.models.checkpoint import EMBEDDED


@pytest.fixture(scope="module", params=EMBEDDED)
def model(request):
    return load(request.param, device="cpu", dtype="float32")


@pytest.mark.parametrize("name", methods())
def test_the_tokens_are_those_that_were_recorded(model, name):
    assert answered(model, methods()[name]) == recorded()[model.name][name]


def test_the_cases_tell_methods_apart():
    """A method that did nothing would pass on greedy's tokens; most cases have tokens of their own."""
    for cases in recorded().values():
        assert len({str(rows) for rows in cases.values()}) > len(cases) / 2
