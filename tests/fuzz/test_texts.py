"""Damaged text files: read, or refused by a line that names the file, which stays as it is with its neighbours."""

from __future__ import annotations

import gzip
import json
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from tests.evals.benchmarks.test_coco import TOLD
from tests.fuzz.bounds import bounded
from tests.fuzz.messages import names, one_line
from tests.fuzz.mutations import WHOLE, Damage, changes, damages
from tests.fuzz.texts import FORMATS, PICTURES
from tests.jobs.fake import draw
from vlmfix.errors import VlmfixError
from vlmfix.evals.benchmarks import amber, coco

SECONDS, MEMORY = 10, 300
SCORES = ("results.json", "report.json")
"""What is made of the answers anew each time, before a comparison may be refused."""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = SimpleNamespace(nouns=str.split, similarity=lambda one, other: float(one == other))
    monkeypatch.setattr(amber, "installed_language", lambda: plain)


def bare(error):
    """An error without the frames that it came through, which hold what was open in them."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name, rounds, tmp_path, capfd):
    format, folder = FORMATS[name], tmp_path / "files"
    draw(tmp_path / "pictures", PICTURES)
    folder.mkdir()
    format.make(folder)
    format.read(folder)  # whole, it is read
    shutil.rmtree(folder)
    folder.mkdir()
    format.make(folder)
    whole = tmp_path / "whole"
    folder.rename(whole)

    def check(file, damage):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder, symlinks=True)
        path = folder / file
        path.write_bytes(damage(path.read_bytes(), path.suffix))
        before, problem = contents(folder), None
        with bounded(seconds=SECONDS, mebibytes=MEMORY):
            try:
                format.read(folder)
            except VlmfixError as error:
                problem = bare(error)
        capfd.readouterr()
        if problem is not None:
            one_line(problem)
            names(problem, path.name, tmp_path)
        if problem is not None or not format.writes:
            after = contents(folder)
            changed = [str(path) for path in before if path.name not in SCORES and after.get(path) != before[path]]
            assert not changed, f"changed: {changed}, {problem}"

    rounds(check, suite=format.suite, file=st.sampled_from(format.damaged), damage=damages())


def test_damaged_indexes(rounds, tmp_path):
    """Whatever has become of the index in the cache, an annotation file is read: from it, or as if there were none."""
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(TOLD))
    whole = coco.read_index(path, "captions")
    (cached,) = (tmp_path / "cache" / "vlmfix" / "coco").iterdir()
    packed = cached.read_bytes()

    def check(damage, inside):
        text = damage(gzip.decompress(packed) if inside else packed, ".json" if inside else "")
        cached.write_bytes(gzip.compress(text) if inside else text)
        with bounded(seconds=SECONDS, mebibytes=MEMORY):
            found = coco.read_index(path, "captions")
        assert all(isinstance(number, int) and isinstance(file, str) for number, file in found.files.items())
        assert all(isinstance(number, int) and set(map(type, told)) <= {str} for number, told in found.told.items())
        cached.unlink()
        assert coco.read_index(path, "captions") == whole

    plain = changes().map(lambda how: Damage(tuple(how))) | st.sampled_from(list(WHOLE)).map(Damage)
    drawn = st.tuples(damages(), st.just(True)) | st.tuples(plain, st.just(False))
    rounds(lambda drawn: check(*drawn), suite=60, drawn=drawn)
