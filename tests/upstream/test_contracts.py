"""The contracts hold here, are quick, and a renamed part of transformers breaks them in words that say what to do."""

from __future__ import annotations

import importlib
import logging
import sys
import time

import pytest
import transformers

from tests.contracts.support import vlm_of
from tests.processes import said
from vlmfix.commands import bench as cost
from vlmfix.commands import export, grounding, profile
from vlmfix.decoders import DECODERS
from vlmfix.errors import UpstreamError
from vlmfix.generation import load, wrap
from vlmfix.upstream import contracts, names, versions
from vlmfix.upstream.contracts import CONTRACTS, Bench, Contract, examined, first_use

OTHERWISE = {
    "everything",
    "shared beginnings",
    "recorded steps",
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
    known = {*DECODERS, profile.profile.name, grounding.grounding.name, cost.bench.name, export.export.name, *OTHERWISE}
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
    number = versions.installed("transformers")
    assert (
        f"transformers {number} breaks 1 of {len(CONTRACTS)} things that vlmfix builds on (features of pictures)"
        in said
    )
    assert "affected: vcd, inter, repeated pictures;" in said
    assert said.endswith("pip install 'transformers>=5.0,<5.2'")


@pytest.mark.parametrize("value", ["cache", "mask"])
def test_an_error_of_another_package_is_explained_by_what_it_breaks(value, vlmfix, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("no such name")

    monkeypatch.setattr("vlmfix.doctor.diagnose", broken)
    assert vlmfix("doctor")[2] == "vlmfix: AttributeError: no such name\nhint: use --debug for the traceback\n"
    monkeypatch.setitem(names.KNOWN, value, ("under_another_name",))
    code, _, told = vlmfix("doctor")
    assert code == 1
    assert told.startswith("vlmfix: AttributeError: no such name\nhint: transformers ")
    assert "pip install" in told
    assert told.count("\n") == 2


def asked_without_a_name():
    """For a process of its own: imports the package anew, beside a transformers that has no ``DynamicLayer``."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmfix"]:
        del sys.modules[name]
    del sys.modules[transformers.DynamicCache.__module__].DynamicLayer
    sys.exit(importlib.import_module("vlmfix.cli")._run(["ask", "none.png", "what?"]))


def test_a_name_that_has_moved_is_told_with_what_to_install():
    code, told = said(asked_without_a_name)
    assert code == 1
    first, second = told.splitlines()[-2:]
    assert first.startswith("vlmfix: ImportError: cannot import name 'DynamicLayer'")
    assert second.startswith("hint: ")
    assert "pip install" in second


def test_a_model_whose_padding_cannot_be_hidden_is_not_loaded(monkeypatch):
    monkeypatch.setitem(names.KNOWN, "mask", ("under_another_name",))
    vlm = vlm_of("llava")
    with pytest.raises(UpstreamError, match="the mask"):
        load("tiny")
    with pytest.raises(UpstreamError, match="the mask"):
        wrap(vlm.model, vlm.processor)


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
