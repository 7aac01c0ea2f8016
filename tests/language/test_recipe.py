"""Recipes: a decoder in a file, wherever a specification may stand."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime

import pytest

from vlmfix.decoders import DECODERS, VCD, Chain, LocoRE, parse
from vlmfix.decoders.index import check
from vlmfix.decoders.spec import read_parts
from vlmfix.errors import DataError, UsageError
from vlmfix.language.recipe import SHIPPED, read_recipe, write_recipe

DECODER = VCD(contrast=0.3)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "best.toml"
    write_recipe(path, DECODER.spec(), {})
    return path


def test_a_recipe_stands_for_its_decoder(recipe):
    assert parse(f"@{recipe}") == DECODER
    assert parse(f" @{recipe} ") == DECODER


def test_a_recipe_in_a_chain(recipe):
    assert parse(f"@{recipe}+locore") == Chain(decoders=(DECODER, LocoRE()))
    assert parse(f"locore:strength=1e+0+@{recipe}") == Chain(decoders=(LocoRE(strength=1.0), DECODER))
    assert parse(f"@{recipe} + @{recipe}") == Chain(decoders=(DECODER, DECODER))


def test_a_chain_in_a_recipe_becomes_part_of_the_chain(tmp_path):
    path = tmp_path / "chain.toml"
    write_recipe(path, "vcd:contrast=0.3+locore", {})
    assert parse(f"@{path}+locore") == Chain(decoders=(DECODER, LocoRE(), LocoRE()))
    assert parse(parse(f"@{path}+locore").spec()) == parse(f"@{path}+locore")


def test_a_path_may_look_like_a_chain(tmp_path):
    folder = tmp_path / "vcd+locore.toml.d" / "a+@b"
    folder.mkdir(parents=True)
    path = folder / "x+y.toml"
    write_recipe(path, DECODER.spec(), {})
    assert parse(f"@{path}") == DECODER


def test_a_recipe_in_the_home_folder(recipe, monkeypatch):
    monkeypatch.setenv("HOME", str(recipe.parent))
    assert parse("@~/best.toml") == DECODER


def test_parts_say_what_was_given(recipe):
    part, other = read_parts(f"vcd:contrast=0.5,preset=paper+@{recipe}", DECODERS)
    assert (part.decoder, part.given) == (VCD, {"contrast": 0.5, "preset": "paper"})
    assert other.given == DECODER.parameters()


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.toml"
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    about = {
        "date": when,
        "data": {"name": 'quo"te\n\\ \u00e9', "revision": None, "deep": {"list": [1, 2.5], "none": None}},
        "share": float("inf"),
    }
    write_recipe(path, "greedy", about)
    read = read_recipe(path)
    assert read == {
        "format": 1,
        "decoder": "greedy",
        "date": when,
        "data": {"name": 'quo"te\n\\ \u00e9', "deep": {"list": [1, 2.5]}},
        "share": float("inf"),
    }
    assert tomllib.loads(path.read_text(encoding="utf-8")) == read
    assert [file.name for file in tmp_path.iterdir()] == ["a.toml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decoder = ", "is not TOML.*vlmfix tune"),
        ("contrast = 1", "has no decoder.*decoder = "),
        ("decoder = 1", "has no decoder"),
        ('format = 2\ndecoder = "vcd"', "has format 2.*reads format 1"),
        ('decoder = "vdc"', r"a\.toml: unknown decoder 'vdc'.*known decoders"),
        ('decoder = "vcd:contrast=-1"', r"a\.toml: vcd: contrast=-1\.0 is not allowed"),
        ('decoder = "@a.toml"', "names a recipe"),
        ('decoder = "locore+@a.toml"', "names a recipe"),
    ],
)
def test_bad_recipes_are_named(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(DataError, match=message):
        parse("@a.toml")


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not TOML"):
        parse(f"@{tmp_path / 'a.toml'}")


@pytest.mark.parametrize("name", ["no.toml", "./no", ""])
def test_a_missing_recipe(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"cannot read the recipe .*check the path after @"):
        parse(f"@{name}")


def test_a_bare_name_is_a_recipe_of_the_package_unless_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("@fast") == parse(read_recipe(SHIPPED["fast"])["decoder"])
    assert parse("vcd+@fast+locore").spec().count("spin") == 1
    (tmp_path / "fast").write_text('decoder = "vcd:contrast=0.3"')
    assert parse("@fast") == DECODER


def test_a_misspelt_recipe_is_told_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"there is no recipe 'keep-recal' \(did you mean keep-recall\? recipes of"):
        check("beam+@keep-recal")


def test_the_fast_recipe_is_one_pass_without_beams():
    fast = parse("@fast")
    assert (fast.passes, fast.strategy) == (1, None)


def test_a_stranger_may_name_recipes_of_the_package_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("@fast", files=False) == parse("@fast")
    (tmp_path / "fast").write_text('decoder = "vcd"')
    with pytest.raises(UsageError, match="files are not read here"):
        parse("@fast", files=False)


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*choose a folder"):
        write_recipe(tmp_path / "missing" / "a.toml", "vcd", {})
