"""`vlmfix new decoder`: files that work as they are written, and overwrite nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from vlmfix.decoders import parse
from vlmfix.scaffold import KINDS


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_every_kind_passes_its_own_test(vlmfix, tmp_path, capsys, monkeypatch):
    for kind in KINDS:
        code, said, _ = vlmfix("new", "decoder", f"my-{kind}", "--kind", kind)
        assert code == 0
        assert f"  pytest test_my_{kind}.py\n" in said
        assert f"--decoder my_{kind}.py:My{kind.title()}\n" in said
        assert parse(f"my_{kind}.py:My{kind.title()}").name == f"my-{kind}"
    assert sorted(os.listdir()) == sorted(f"{start}my_{kind}.py" for kind in KINDS for start in ("", "test_"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # pytest adds the folder to it
    quick = ["-k", "Logits or llava or value"]  # of one kind on both families
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "-c", os.devnull, "--rootdir", str(tmp_path), *quick]
    assert pytest.main([*options, str(tmp_path)]) == pytest.ExitCode.OK
    assert " failed" not in capsys.readouterr().out


def test_what_is_written_is_formatted(vlmfix):
    for kind in KINDS:
        assert vlmfix("new", "decoder", f"my-{kind}", "--kind", kind)[0] == 0
    for path in Path().iterdir():
        lines = path.read_text().splitlines()
        assert max(map(len, lines)) <= 120
        assert not any(line != line.rstrip() or "{{" in line for line in lines)


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(there, vlmfix):
    Path(there).write_text("my work")
    code, said, told = vlmfix("new", "decoder", "mine")
    assert (code, said) == (2, "")
    assert told == f"vlmfix: {there} is there\nhint: nothing is overwritten: choose another name, or move it away\n"
    assert os.listdir() == [there]
    assert Path(there).read_text() == "my work"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vcd", "there is a decoder vcd"),
        ("torch", "torch.py would hide the module torch"),
        ("class", "'class' can be no decoder's name"),
        ("my decoder", "'my decoder' can be no decoder's name"),
        ("../mine", "'../mine' can be no decoder's name"),
    ],
)
def test_names_that_cannot_be(name, message, vlmfix):
    code, _, told = vlmfix("new", "decoder", name)
    assert code == 2
    assert message in told
    assert os.listdir() == []
