"""One language for decoders: parsed, printed, checked."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.contracts.support import STRONG, batch_of, vlm_of
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import DECODERS, INTER, VAR, VCD, Chain, Greedy, LocoRE, describe, parse
from vlmfix.decoders.spec import parse as read_spec
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.language.parameters import parameter, ranges


def test_parsing():
    assert parse("greedy") == Greedy()
    assert parse("vcd:contrast=0.5,noise_step=10") == VCD(contrast=0.5, noise_step=10)
    assert parse("vcd:contrast=1e+1") == VCD(contrast=10.0)
    assert parse("var:sink_dims=5/7,sink_threshold=none") == VAR(sink_dims=(5, 7), sink_threshold=None)
    assert parse("inter:variance=inf") == INTER(variance=math.inf)
    assert parse("var:moved_fraction=0.4+locore:strength=0.15") == Chain(
        decoders=(VAR(moved_fraction=0.4), LocoRE(strength=0.15))
    )
    assert parse("locore:layers=2:-1") == LocoRE(layers=LayerSet("2:-1"))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_a_value(name):
    decoder = DECODERS[name]()
    assert decoder == DECODERS[name]()
    assert hash(decoder) == hash(DECODERS[name]())
    assert parse(decoder.spec()) == decoder
    assert eval(repr(decoder), {**{type(decoder).__name__: type(decoder)}, "LayerSet": LayerSet}) == decoder
    with pytest.raises(dataclasses.FrozenInstanceError):
        decoder.anything = 1


@pytest.mark.parametrize("spec", [spec for spec in STRONG.values() if isinstance(spec, str)])
def test_specifications_round_trip(spec):
    assert parse(parse(spec).spec()) == parse(spec)


@pytest.mark.parametrize("spec", [spec for spec in STRONG.values() if isinstance(spec, str)])
def test_planning_twice_gives_independent_state(spec):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    decoder = parse(spec)
    one, two = (decoder.plan(vlm, batch, vlm.layout(batch)) for _ in range(2))
    for left, right in ((one.edits, two.edits), (one.contrasts, two.contrasts)):
        assert all(a is not b for a, b in zip(left, right, strict=True))
        assert all(getattr(a, "sinks", 1) is not getattr(b, "sinks", 2) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vdc", "unknown decoder 'vdc'.*greedy, sample, beam, var, locore, vcd, inter"),
        ("vcd:alpha=1", "'alpha=1' is no parameter.*contrast, plausibility"),
        ("vcd:contrast", "'contrast' is no parameter"),
        ("vcd:contrast=x", r"contrast=x is not allowed.*float in \[0, 10\]"),
        ("vcd:contrast=-1", r"contrast=-1\.0 is not allowed"),
        ("vcd:contrast=nan", "contrast=nan is not allowed"),
        ("vcd:contrast=none", "contrast=none is not allowed"),
        ("vcd:noise_step=1.5", "noise_step=1.5 is not allowed"),
        ("vcd:noise_step=1000", r"noise_step=1000 is not allowed.*\[0, 999\]"),
        ("vcd:contrast=1,contrast=2", "contrast is given twice"),
        ("var:preset=code", r"preset='code' is not allowed.*paper \| official-code"),
        ("locore:mode=half", "mode='half' is not allowed"),
        ("locore:layers=2-5", "layers '2-5' are not understood"),
        ("locore:layers=-:", "layers '-:' are not understood"),
        ("locore:layers=1/:-", "layers '1/:-' are not understood"),
        ("locore:layers=\u0663", "layers '\u0663' are not understood"),
        (f"locore:layers={'9' * 5000}", "layers '9+ ... 9+' are not understood"),
        (f"adhh:heads=L0H{'9' * 5000}", "heads 'L0H9+ ... 9+' are not understood"),
        ("@~no-one-here/x.toml", "~no-one-here/x.toml: there is no such home folder"),
        ("@a\0b.toml", r"'a.x00b.toml' is no path"),
        ("vcd:noise_step=1\n2", r"noise_step=1\\n2 is not allowed"),
        ("var:sink_dims=a", "sink_dims=a is not allowed.*integers"),
        ("", "unknown decoder ''"),
        ("greedy:x=1", "parameters of greedy: none"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(UsageError, match=message):
        parse(spec)


@pytest.mark.parametrize("value", ["0.5", True, float("nan"), -0.1])
def test_python_values_are_checked(value):
    with pytest.raises(UsageError, match="contrast="):
        VCD(contrast=value)


def test_none_stands_for_the_preset_and_for_nothing_else():
    assert VCD(contrast=None) == VCD()
    with pytest.raises(UsageError, match="noise_seed=None"):
        VCD(noise_seed=None)


@pytest.mark.parametrize("name", DECODERS)
def test_descriptions(name):
    info = describe(DECODERS[name])
    assert info.name == name
    assert info.title
    assert info.acts_on
    assert bool(info.arxiv) == (name not in ("greedy", "sample", "beam", "adhh"))  # AD-HH is on OpenReview alone
    assert all(parameter.help and parameter.range for parameter in info.parameters)
    declared = {field.name for field in dataclasses.fields(DECODERS[name])}
    assert {parameter.name for parameter in info.parameters} == declared


@pytest.mark.parametrize("name", DECODERS)
def test_searches_stay_within_what_is_allowed(name):
    for field, allowed in ranges(DECODERS[name]).items():
        for value in allowed.search:
            assert allowed.check(name, field, value) == value
        if allowed.search and allowed.kind in (int, float):
            low, high = allowed.search
            assert low < high
            assert low > 0 or not allowed.log


def test_descriptions_say_what_tuning_tries():
    described = {parameter.name: parameter.search for parameter in describe(LocoRE).parameters}
    assert described["strength"] == "0.02 to 0.6, logarithmic"
    assert described["scope"] == "post_image | generated"
    assert described["preset"] == described["layers"] == ""


def test_a_chain_costs_the_rows_of_its_parts():
    assert parse("locore+vcd+inter").passes == 1 + 1 + 3
    assert parse("locore+locore:mode=post").passes == 1
    assert parse("vcd+inter").beams


def test_a_chain_of_nothing_is_refused():
    with pytest.raises(UsageError, match="a chain of no decoders"):
        Chain(decoders=())


def test_errors_are_one_family():
    assert issubclass(UsageError, VlmfixError)
    assert str(UsageError("what", "do")) == "what (do)"


def test_an_error_is_one_line_whatever_it_quotes():
    error = UsageError("no 'a\nb\x1b[31m\udcff'", "try\r\nanother")
    assert (error.message, error.hint) == (r"no 'a\nb\u001b[31m\udcff'", r"try\r\nanother")
    assert str(error) == f"{error.message} ({error.hint})"
    assert error.args == (error.message,)
    long = UsageError(f"no {'x' * 100_000} there").message
    assert len(long) < 2100
    assert long.startswith("no xxx")
    assert long.endswith("xxx there")


def test_a_recipe_is_named_whatever_is_wrong_with_its_decoder(tmp_path):
    for decoder in ("vdc", "greedy+carve"):
        (tmp_path / "r.toml").write_text(f'decoder = "{decoder}"')
        with pytest.raises(DataError, match=r"r\.toml: (unknown decoder|carve refines)"):
            parse(f"@{tmp_path / 'r.toml'}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(Greedy):
    name = "named"
    file: str | None = parameter(None, str, optional=True, help="a file")


@pytest.mark.parametrize("text", ["a,b", "a+b", "a+ @b", "a\nb", " a", "a ", "none", ""])
def test_a_text_that_cannot_be_read_back_is_refused(text):
    with pytest.raises(UsageError, match=r"named: file=.* cannot stand in a specification"):
        Named(file=text)


@pytest.mark.parametrize("text", [None, "/a folder/x=1:b.safetensors", "a+1", "~/a@b"])
def test_other_texts_are_read_back(text):
    spec = Named(file=text).spec()
    assert read_spec(f"{spec}+greedy", {"named": Named, "greedy": Greedy}).decoders[0] == Named(file=text)
