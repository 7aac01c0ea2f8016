"""The contracts hold here, are quick, and a renamed part of transformers breaks them in words that say what to do."""

from __future__ import annotations

import logging
import time

import pytest

from vlmfix.commands import grounding, profile
from vlmfix.decoders import DECODERS
from vlmfix.errors import UpstreamError
from vlmfix.upstream import contracts, names, versions
from vlmfix.upstream.contracts import CONTRACTS, Bench, Contract, examined, first_use

OTHERWISE = {
    "shared beginnings",
    "repeated pictures",
    "smaller batches when memory runs out",
    "every decoder on LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2.5-VL",
}
"""What contracts protect beside decoders and commands."""


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_it_holds(contract, bench):
    assert contract.broken(bench) is None


def test_what_is_protected_exists():
    known = {*DECODERS, profile.profile.name, grounding.grounding.name, *OTHERWISE}
    assert {name for contract in CONTRACTS for name in contract.protects} <= known
    assert len({contract.name for contract in CONTRACTS}) == len(CONTRACTS)


def test_all_of_them_take_less_than_two_seconds():
    examined()  # imports what the probes need
    started = time.process_time()
    examined()
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("value", "broken"),
    [
        ("cache", {"cache argument", "layers of a cache", "static cache", "loops of another's"}),
        ("features", {"features of pictures"}),
        ("mask", {"layers of a cache"}),
        ("hidden", set()),
        ("pixels", {"features of pictures"}),
    ],
)
def test_a_renamed_argument_breaks_those_that_use_it(value, broken, monkeypatch):
    monkeypatch.setitem(names.KNOWN, value, ("under_another_name",))
    found = {finding.name: finding.reason for finding in examined() if finding.reason is not None}
    assert broken <= set(found)
    if broken:
        assert any("under_another_name" in reason for reason in found.values())


def test_every_finding_is_one_line(monkeypatch):
    def fails(bench):
        raise KeyError("first\nsecond")

    (finding,) = examined([Contract("a thing", ("vcd",), fails)])
    assert finding.reason == "KeyError: 'first\\nsecond'"
    assert finding.protects == ("vcd",)


@pytest.fixture
def unused():
    first_use.cache_clear()
    yield
    first_use.cache_clear()


def test_a_tested_version_is_taken_as_it_is(unused, monkeypatch):
    monkeypatch.setattr(contracts, "examined", lambda: pytest.fail("probed"))
    monkeypatch.setattr(contracts, "untested", lambda: [])
    first_use()


def test_an_untested_version_that_holds_says_nothing(unused, monkeypatch, caplog):
    monkeypatch.setitem(versions.TESTED, "transformers", ("5.0",))
    first_use()
    assert caplog.records == []


def test_an_untested_version_that_breaks_something_says_so_once_in_a_line(unused, monkeypatch, caplog):
    monkeypatch.setitem(versions.TESTED, "transformers", ("5.0", "5.1"))
    monkeypatch.setitem(names.KNOWN, "features", ("under_another_name",))
    with caplog.at_level(logging.WARNING):
        first_use()
        first_use()
    (record,) = caplog.records
    said = record.getMessage()
    assert "\n" not in said
    assert f"transformers {versions.installed('transformers')} is not among the versions tested" in said
    assert f"1 of {len(CONTRACTS)} contracts fail (features of pictures: " in said
    assert "do not work: vcd, inter" in said
    assert said.endswith("pip install 'transformers>=5.0,<5.2'")


def test_a_changed_copy_of_a_tested_version_is_to_be_installed_again(monkeypatch):
    monkeypatch.setattr(versions, "untested", lambda: [])
    error = versions.missing("there is no such thing")
    assert isinstance(error, UpstreamError)
    number = versions.installed("transformers")
    assert str(error).startswith(f"transformers {number}: there is no such thing")
    assert error.hint.endswith(f"pip install --force-reinstall --no-deps transformers=={number}")


def test_the_installed_versions_are_told_by_their_minor_number(monkeypatch):
    monkeypatch.setattr(
        versions, "installed", lambda package: {"torch": "2.14.1+cpu", "transformers": "6.0.0"}[package]
    )
    assert versions.untested() == ["transformers 6.0.0"]
