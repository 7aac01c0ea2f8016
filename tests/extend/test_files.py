"""A class in a file, named by its path: in every place of a decoder, and known by its digest afterwards."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
from PIL import Image

import vlmfix as package
from tests.extend.installed import EXAMPLES
from vlmfix.decoders import Chain, parse
from vlmfix.errors import PluginError, UsageError
from vlmfix.evals.tuning.search import Space
from vlmfix.heads.profilers import profilers_of
from vlmfix.records import read_json


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A working directory with the example's decoder as mine.py, and a folder of two pictures."""
    shutil.copy(EXAMPLES / "vlmfix_outside" / "textless.py", tmp_path / "mine.py")
    (tmp_path / "in").mkdir()
    for number in range(2):
        Image.new("RGB", (40, 40), (90 * number, 50, 200)).save(tmp_path / "in" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(path):
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_it_is_read_and_written_in_chains_and_with_parameters(here):
    decoder = package.parse("beam+mine.py:Textless:gamma=2+locore:strength=1")
    assert isinstance(decoder, Chain)
    assert decoder.decoders[1].gamma == 2.0
    assert decoder.decoders[1].spec() == "mine.py:Textless:gamma=2.0"
    assert parse(decoder.spec()) == decoder
    assert decoder.plugins() == {"mine.py:Textless": digest(here / "mine.py")}
    (here / "r.toml").write_text('decoder = "mine.py:Textless:gamma=2"')
    assert parse("vcd+@r.toml").decoders[1] == decoder.decoders[1]
    odd = here / "a+b, c:d=e"
    odd.mkdir()
    shutil.copy("mine.py", odd)
    found = parse(f"vcd+{odd}/mine.py:Textless+./mine.py:Textless:gamma=3")
    assert [part.called() for part in found.decoders[1:]] == [f"{odd}/mine.py:Textless", "./mine.py:Textless"]
    assert parse(found.spec()) == found


def test_a_file_that_was_changed_is_read_again(here):
    before = parse("mine.py:Textless")
    assert parse("mine.py:Textless") == before
    path = here / "mine.py"
    path.write_text(path.read_text().replace("parameter(1.1,", "parameter(1.7,"))
    assert (before.gamma, parse("mine.py:Textless").gamma) == (1.1, 1.7)
    assert parse("mine.py:Textless") != before


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        (
            "mine.py",
            UsageError,
            r"mine\.py names no class \(write mine\.py:CLASS, with the name of the decoder's class",
        ),
        ("gone.py:Mine", UsageError, r"cannot read gone\.py: No such file or directory"),
        ("in.py/x.py:Mine", UsageError, r"cannot read in\.py/x\.py"),
        ("mine.py:Textles", UsageError, r"mine\.py has no class Textles \(did you mean Textless\? it has: Textless\)"),
        ("mine.py:Decoder", UsageError, r"mine\.py has no class Decoder"),
        ("mine.py:Away", PluginError, r"mine\.py:Away is no class that inherits Decoder \(from vlmfix\.extend import"),
        ("mine.py:Textless:gama=2", UsageError, r"mine\.py:Textless: 'gama=2' is no parameter \(did you mean gamma\?"),
        ("mine.py:Textless:gamma=0", UsageError, r"textless: gamma=0\.0 is not allowed"),
        ("broken.py:Mine", PluginError, r"broken\.py cannot be run: SyntaxError: '\(' was never closed"),
        ("fails.py:Mine", PluginError, r"fails\.py cannot be run: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_is_said(spec, kind, message, here):
    (here / "broken.py").write_text("print(\n")
    (here / "fails.py").write_text("1 / 0\n")
    with pytest.raises(kind, match=message):
        parse(spec)


def test_a_stranger_may_name_no_files(here):
    (here / "r.toml").write_text('decoder = "vcd"\n')
    assert parse("vcd+locore:strength=0.2", files=False) == parse("vcd+locore:strength=0.2")
    for spec in ("mine.py:Textless", "vcd+./mine.py:Textless:gamma=2", "@r.toml", "beam+@r.toml"):
        with pytest.raises(UsageError, match="files are not read here"):
            parse(spec, files=False)


def test_a_run_names_the_file_and_goes_on_with_no_other(here, vlmfix):
    asked = ("run", "in", "--out", "out", "--decoder", "vcd+mine.py:Textless:gamma=2", "--max-new-tokens", 2)
    assert vlmfix(*asked)[0] == 0
    card = read_json(here / "out" / "run.json")["settings"]
    assert card["decoder"].endswith("+mine.py:Textless:gamma=2.0")
    assert card["plugins"] == {"mine.py:Textless": digest(here / "mine.py")}
    code, said, _ = vlmfix("reproduce", "out")
    assert code == 0
    assert said.startswith("out: 2 of 2 answers are the same")
    before = digest(here / "mine.py")
    (here / "mine.py").write_text((here / "mine.py").read_text() + "# another\n")
    code, _, told = vlmfix("reproduce", "out", "--out", "second")
    assert code == 1
    assert (
        f"mine.py:Textless is not what out was made with: it was {before}, now it is {digest(here / 'mine.py')}" in told
    )
    assert not (here / "second").exists()
    (here / "mine.py").rename("gone.py")
    code, _, told = vlmfix("reproduce", "out", "--out", "second")
    assert code == 1
    assert told.startswith(f"vlmfix: out was made with mine.py:Textless ({before}): cannot read mine.py: No such file")
    (here / "gone.py").rename("mine.py")
    code, _, told = vlmfix(*asked)
    assert code == 2
    assert f"plugins.mine.py:Textless was '{before}', now '{digest(here / 'mine.py')}'" in told


def test_a_run_without_plug_ins_goes_on_where_an_earlier_version_noted_none(here, vlmfix):
    asked = ("run", "in", "--out", "out", "--max-new-tokens", 2)
    assert vlmfix(*asked)[0] == 0
    card = read_json(here / "out" / "run.json")
    assert card["settings"].pop("plugins") is None
    (here / "out" / "run.json").write_text(json.dumps(card))
    assert vlmfix(*asked)[0] == 0
    assert vlmfix("reproduce", "out")[0] == 0


def test_it_is_asked_described_and_tried(here, vlmfix):
    code, said, _ = vlmfix("ask", "in/0.png", "what?", "--decoder", "mine.py:Textless", "--max-new-tokens", 2)
    assert code == 0
    assert said.strip()
    code, said, _ = vlmfix("grounding", "in/0.png", "what?", "--decoder", "mine.py:Textless", "--max-new-tokens", 2)
    assert code == 0
    code, said, _ = vlmfix("decoders", "mine.py:Textless")
    assert said.startswith("mine.py:Textless: Paying More Attention to Image (arXiv 2407.21771)\nFrom sha256:")
    code, said, _ = vlmfix("doctor", "--decoder", "mine.py:Textless:gamma=2")
    assert re.search(r"\nmine\.py:Textless:gamma=2 +works +works +works", said)


def test_a_parameter_without_a_search_says_what_to_write(here):
    assert list(Space.of("mine.py:Textless").axes) == ["gamma"]
    with pytest.raises(UsageError, match=r"gamma=2 leaves nothing to tune \(leave one of these open: .*: gamma\)"):
        Space.of("mine.py:Textless:gamma=2")
    text = (here / "mine.py").read_text()
    (here / "mine.py").write_text(text.replace(", search=(1.0, 3.0)", ""))
    with pytest.raises(UsageError, match=r"smaller range: gamma = parameter\(\.\.\., search=\(1, 10\)\)"):
        Space.of("vcd:contrast=1,plausibility=0,noise_step=500+mine.py:Textless".partition("+")[2])
    (here / "mine.py").write_text(text.replace("low=1, high=10, search=(1.0, 3.0)", "low=1"))
    with pytest.raises(UsageError, match=r"search=\(low, high\) for numbers"):
        Space.of("mine.py:Textless")


def test_a_profiler_in_a_file_keeps_a_name_of_its_own(here, vlmfix):
    text = (EXAMPLES / "vlmfix_outside" / "first_token.py").read_text()
    (here / "first.py").write_text(text)
    options = ("--images", "in", "--out", "heads.safetensors", "--count", 2)
    code, said, _ = vlmfix("profile", "--profiler", "image-mass,first.py:FirstToken", *options)
    assert code == 0
    assert "\nfirst-token: tiny, 2 pictures" in said
    found = json.loads(vlmfix("profile", "show", "heads.safetensors", "--json")[1])
    assert found["first-token"]["card"]["versions"]["first.py:FirstToken"] == digest(here / "first.py")
    assert all(0 <= head["score"] <= 1 for head in found["first-token"]["heads"])
    assert sum(head["score"] for head in found["first-token"]["heads"]) > 0.01
    (here / "first.py").write_text(text.replace('"first-token"', '"vhd"'))
    with pytest.raises(UsageError, match="says name = 'vhd', which vlmfix's own profiler has"):
        profilers_of(["first.py:FirstToken"])
