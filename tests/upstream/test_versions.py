"""What the repository says of versions in several places is the same, and the locks are what they promise to be."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vlmfix.upstream.versions import TESTED, minor

ROOT = Path(__file__).parents[2]
LOCKS = ("build", "all")


def after(number):
    major, last = number.split(".")
    return f"{major}.{int(last) + 1}"


def locked(name):
    """Package -> version and the number of its hashes; a package may have a version for each Python."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text().replace("\\\n", " ")
    lines = [re.match(r"([\w.-]+)==(\S+)(.*)", line) for line in text.splitlines()]
    return [(line[1], line[2], line[3].count("--hash=sha256:")) for line in lines]


def test_the_bounds_are_those_that_were_tested():
    with (ROOT / "pyproject.toml").open("rb") as file:
        given = {re.match(r"[\w-]+", line)[0]: line for line in tomllib.load(file)["project"]["dependencies"]}
    first, last = TESTED["transformers"][0], TESTED["transformers"][-1]
    assert given["transformers"] == f"transformers>={first}.0,<{after(last)}"
    assert given["torch"] == f"torch>={TESTED['torch'][0]}.0"
    held = (ROOT / "requirements" / "held.txt").read_text().split()
    assert f"torch<{after(TESTED['torch'][-1])}" in held


def test_the_lock_has_the_newest_tested_versions():
    versions = {name: number for name, number, _ in locked("all")}
    assert {name: minor(versions[name]) for name in TESTED} == {name: known[-1] for name, known in TESTED.items()}


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_version_is_exact_and_hashed_and_no_address_is_told(name):
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    assert all(hashes > 0 for _, _, hashes in locked(name))
    assert "//" not in text


def test_what_builds_is_locked_alike_in_both():
    both = [{(package, number) for package, number, _ in locked(name)} for name in LOCKS]
    shared = {package for package, _ in both[0]} & {package for package, _ in both[1]}
    assert {pair for pair in both[0] if pair[0] in shared} == {pair for pair in both[1] if pair[0] in shared}
