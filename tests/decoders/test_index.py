"""What is known of decoders without importing them: the same as the classes say, and enough to tell a typo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import index
from vlmfix import decoders
from vlmfix.decoders import DECODERS, DecoderInfo, describe, parse
from vlmfix.decoders.index import HOMES, INDEX, check, own
from vlmfix.errors import UsageError
from vlmfix.language.grammar import split


def test_the_index_is_what_the_classes_say():
    assert INDEX.read_text(encoding="utf-8") == index.text(), "run: make index"
    assert [own()[name] for name in HOMES] == [describe(DECODERS[name]) for name in HOMES]
    assert all(isinstance(info, DecoderInfo) for info in own().values())


def test_every_class_is_a_name_of_the_package():
    assert all(getattr(decoders, home.partition(":")[2]) is DECODERS[name] for name, home in HOMES.items())
    assert all(getattr(decoders, name) is not None for name in decoders.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = decoders.nonsense


@pytest.mark.parametrize(
    "arguments",
    [
        ["decoders"],
        ["decoders", "vcd", "--json"],
        ["run", "x", "--out", "y", "--decoder", "vdc"],
        ["run", "x", "--out", "y", "--decoder", "beam+vcd:contrst=1"],
        ["run", "x", "--out", "y", "--model", "tniy"],
        ["doctor", "tniy"],
        ["tune", "vdc", "--task", "pope", "--images", "x", "--out", "y"],
        ["explain", "beam+vcd"],
        ["explain", "vdc"],
        ["eval", "pop"],
        ["eval", "--help"],
        ["profile", "--profiler", "vdh", "--images", "x", "--out", "y"],
    ],
    ids=" ".join,
)
def test_names_are_told_without_torch(arguments):
    code = f"import sys, vlmfix.cli as c; c._run({arguments!r}); print('|', 'torch' in sys.modules)"
    python = [sys.executable, "-c", code]
    found = subprocess.run(python, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert found.stdout.endswith("| False\n")
    assert found.stdout != "| False\n" or "mean" in found.stderr


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("vdc", "did you mean vcd\\? known decoders: greedy"),
        ("beam+lokore", "did you mean locore\\?"),
        ("vcd:contrst=1", "did you mean contrast\\? write parameter=value; parameters of vcd: preset"),
        ("xxxxxx", r"\(known decoders: greedy"),
    ],
)
def test_similar_names_are_named(spec, hint):
    for reader in (check, parse):
        with pytest.raises(UsageError, match=hint):
            reader(spec)


@pytest.mark.parametrize("model", ["tniy", "tiny-qwne"])
def test_a_misspelt_embedded_model_is_told(model):
    import vlmfix

    with pytest.raises(UsageError, match="did you mean tiny"):
        vlmfix.load(model)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("vcd", ["vcd"]),
        ("vcd:contrast=1e+1,noise_step=3+beam", ["vcd contrast=1e+1 noise_step=3", "beam"]),
        ("mine.py:Mine", ["mine.py:Mine"]),
        ("vcd+mine.py:Mine:strength=2", ["vcd", "mine.py:Mine strength=2"]),
        ("a/b/mine.py:Mine:strength=2+vcd", ["a/b/mine.py:Mine strength=2", "vcd"]),
        ("beam + ./mine.py:Mine", ["beam", "./mine.py:Mine"]),
        ("vcd:contrast=1+2.py:Mine", ["vcd contrast=1", "2.py:Mine"]),
        ("~/x+y/mine.py:Mine+/a:b/c,d=e/f.py:F:x=1", ["~/x+y/mine.py:Mine", "/a:b/c,d=e/f.py:F x=1"]),
        ("../a.py:A+../b.py:B", ["../a.py:A", "../b.py:B"]),
        ("adhh:profile=/a+/b.py", ["adhh profile=/a+/b.py"]),
        ("adhh:profile=x.py:y", ["adhh profile=x.py:y"]),
        ("@x+y.toml+mine.py:Mine", ["@x+y.toml", "mine.py:Mine"]),
        ("ein ordner/größe.py:Mine", ["ein ordner/größe.py:Mine"]),
    ],
)
def test_files_have_a_place_in_chains(spec, parts):
    found = [
        " ".join([words.name or f"@{words.recipe}", *("".join(one) for one in words.given)]) for words in split(spec)
    ]
    assert found == parts
