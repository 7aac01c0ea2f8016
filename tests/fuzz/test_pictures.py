"""Damaged pictures: the whole picture or a reason in one line, within bounds, and never anything else."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.bounds import bounded
from tests.fuzz.corpus import READ, corpus, size_of
from tests.fuzz.mutations import Change, changed, changes, checked_again
from tests.jobs.fake import FakeVLM
from vlmfix import display
from vlmfix.errors import DataError
from vlmfix.images import FORMATS, open_picture
from vlmfix.records import read_json, read_lines
from vlmfix.upstream import libtiff

PIXELS = 1_000_000
"""Limit on a picture's pixels while it is tried."""
MEMORY = 100
"""MiB that a picture of so many pixels may take."""
PILLOW = (UserWarning, Image.DecompressionBombWarning)
"""What Pillow says of metadata and of large pictures; who uses it from Python may want to hear it."""


@pytest.fixture(autouse=True)
def _small_and_quiet(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS)
    libtiff.silence()  # as every command does


def names():
    """Those that are read three times as often as those that are not."""
    readable = [name for name in corpus() if name.split()[0] in READ]
    return st.sampled_from(readable * 3 + [name for name in corpus() if name not in readable])


def outcome(path):
    """The picture, or the reason why there is none."""
    with bounded(seconds=5, mebibytes=MEMORY, allowed=PILLOW):
        try:
            return open_picture(path).image
        except DataError as error:
            reason = error
    assert reason.message.strip(), "no reason"
    assert "\n" not in str(reason), f"several lines: {str(reason)!r}"
    return reason


def test_whole_pictures(tmp_path):
    path = tmp_path / "a"
    for name, content in corpus().items():
        path.write_bytes(content)
        found = outcome(path)
        if name in ("TIFF F", "TIFF I") or name.split()[0] not in READ:
            assert isinstance(found, DataError), name
        else:
            assert isinstance(found, Image.Image), (name, found)
            assert (found.mode, found.size) == ("RGB", size_of(name)), name


def header(path):
    """The size that a file says it has; none where Pillow alone cannot read what stands beside the pixels."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as opened:
            return opened.size
    except Exception:
        return None


def test_damaged_pictures(rounds, tmp_path):
    path = tmp_path / "a"

    def check(name, how, repaired):
        content = changed(corpus()[name], how)
        path.write_bytes(checked_again(content) if repaired else content)
        found = outcome(path)
        if isinstance(found, Image.Image):
            assert found.mode == "RGB"
            if said := header(path):
                assert found.size in (said, said[::-1]), f"{found.size} of {said}"

    snippets = [corpus()["PNG RGB"], corpus()["JPEG RGB"], b"II*\0\x08\0\0\0", b"IEND\xae\x42\x60\x82", b"\xff\xd9"]
    rounds(check, suite=600, name=names(), how=changes(*snippets), repaired=st.booleans())


def test_cut_pictures(rounds, tmp_path):
    """What is left of a file shows the whole picture, pixel for pixel, or nothing: never one with a part made up.

    It may show it as it lies, where what says how to turn it stands behind the pixels and has been cut off.
    """
    path = tmp_path / "a"
    wholes = {}

    def check(name, kept):
        content = corpus()[name]
        path.write_bytes(content)
        if name not in wholes:
            wholes[name] = outcome(path)
        path.write_bytes(content[: kept % len(content)])
        found = outcome(path)
        if isinstance(found, Image.Image):
            assert isinstance(wholes[name], Image.Image)
            whole = np.asarray(wholes[name])
            turned = [np.rot90(side, times) for side in (whole, whole[::-1]) for times in range(4)]
            assert any(np.array_equal(np.asarray(found), one) for one in turned), "a part of the picture is made up"

    rounds(check, suite=300, name=names(), kept=st.integers(0, 1 << 16))


def test_a_run_over_damaged_pictures(rounds, tmp_path, vlmfix, monkeypatch):
    """Every file is answered or has a reason, and the run ends well."""
    monkeypatch.setattr(display, "loading", lambda *model, **how: FakeVLM())
    turn = iter(range(10**9))

    def check(files):
        base = tmp_path / f"{next(turn)}"
        (base / "in").mkdir(parents=True)
        for number, (name, how) in enumerate(files):
            (base / "in" / f"{number:03d}").write_bytes(changed(corpus()[name], how))
        code, _, said = vlmfix("run", base / "in", "--out", base / "out", "--batch-size", 4)
        assert code == 0, said
        answered = [line["image"] for line in read_lines(base / "out" / "answers.jsonl")]
        failed = [line["image"] for line in read_lines(base / "out" / "failed.jsonl")]
        assert sorted(answered + failed) == [f"{number:03d}" for number in range(len(files))]
        assert read_json(base / "out" / "run.json")["finished"] is True

    # a whole picture stands first: where nothing at all is answered, a run may end otherwise
    whole = st.just(("PNG RGB", [Change("append", 0, 1, 0, b"")]))
    damaged = st.lists(st.tuples(names(), changes()), min_size=10, max_size=20)
    rounds(check, suite=6, about="folders", files=st.builds(lambda first, rest: [first, *rest], whole, damaged))
