"""Specifications of decoders, drawn and damaged: a decoder that is written as it is read, or a reason in one line."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.contracts.support import picture, vlm_of
from tests.fuzz.messages import names, one_line
from tests.fuzz.mutations import changed, changes
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import DECODERS, Chain, parse
from vlmfix.errors import VlmfixError
from vlmfix.generation import check_settings
from vlmfix.language.parameters import HeadList, Value, ranges, written
from vlmfix.settings import Settings

STRANGE = (
    *("", " ", "none", "None", "nan", "inf", "-inf", "1e400", "-1", "0", "1", "true", "FALSE", "0x10", "1_0", "٣", "½"),
    *("9" * 5000, "1e-400", "a,b", "a+b", "a+ @b", "@x.toml", "x=y", ":", "a\nb", "\0", "\x1b[31m", "\ud800", "all"),
    *(
        "2:-1",
        "5/8",
        "-",
        "-:",
        ":-",
        "::",
        "9" * 30,
        "L0H0",
        "L1H2/L1H2",
        "L٣H٣",
        "L0H" + "9" * 5000,
        "~no-one-here/x",
    ),
)
JOINTS = ("+", " + ", ":", "=", ",", "@", "/", "\n", "é")


def fitting(allowed) -> st.SearchStrategy[Value]:
    """Values that a parameter may have."""
    if allowed.choices:
        return st.sampled_from(allowed.choices)
    bounds = [max(allowed.low, -1e6), min(allowed.high, 1e6)]
    return {
        bool: st.booleans(),
        int: st.integers(*map(int, bounds)),
        float: st.floats(*bounds) | st.sampled_from(bounds),
        str: st.text("abc./~ é:=", min_size=1, max_size=8),
        tuple: st.lists(st.integers(-3, 99), min_size=1, max_size=3).map(tuple),
        LayerSet: st.sampled_from(["all", "2:-1", "0", "-1", "1:/0", ":"]),
        HeadList: st.sampled_from(["L0H0", "L1H2/L0H3", "L31H31"]),
    }[allowed.kind]


def parts() -> st.SearchStrategy[str]:
    """One decoder with some parameters, mostly as they may be."""

    def of(name):
        allowed = ranges(DECODERS[name])
        if not allowed:
            return st.just(name)
        item = st.sampled_from(list(allowed)).flatmap(
            lambda key: st.tuples(st.just(key), fitting(allowed[key]).map(written) | st.sampled_from(STRANGE))
        )
        items = st.lists(item, max_size=3, unique_by=lambda pair: pair[0])
        return items.map(lambda found: f"{name}:{','.join(f'{key}={value}' for key, value in found)}")

    return st.sampled_from(list(DECODERS)).flatmap(of)


def specifications() -> st.SearchStrategy[str]:
    whole = st.lists(parts(), min_size=1, max_size=3).map("+".join)
    torn = st.tuples(whole, st.integers(0, 60), st.integers(0, 3), st.sampled_from([*JOINTS, *STRANGE])).map(
        lambda drawn: drawn[0][: drawn[1]] + drawn[3] + drawn[0][drawn[1] + drawn[2] :]
    )
    return whole | torn | st.text(max_size=20) | st.sampled_from(STRANGE)


def test_specifications(rounds):
    def check(spec):
        try:
            decoder = parse(spec)
        except VlmfixError as error:
            one_line(error)
            return
        again = decoder.spec()
        assert parse(again) == decoder
        assert hash(parse(again)) == hash(decoder)
        assert parse(again).spec() == again
        for part in decoder.decoders if isinstance(decoder, Chain) else (decoder,):
            for name, allowed in ranges(type(part)).items():
                value = getattr(part, name)
                assert allowed.check(part.name, name, value) == value

    rounds(check, suite=250, spec=specifications())


def test_values_out_of_bounds(rounds):
    numbers = [
        (name, key, allowed)
        for name, decoder in DECODERS.items()
        for key, allowed in ranges(decoder).items()
        if allowed.kind in (int, float)
    ]

    def check(which, beyond, low):
        name, key, allowed = which
        bound = allowed.low if low else allowed.high
        value = allowed.kind(bound + (-beyond if low else beyond)) if abs(bound) < float("inf") else float("nan")
        if (low and value >= bound) or (not low and value <= bound):
            return  # so near that it rounds to the bound
        for make in (lambda: DECODERS[name](**{key: value}), lambda: parse(f"{name}:{key}={value}")):
            try:
                made = make()
            except VlmfixError as error:
                one_line(error)
            else:
                raise AssertionError(f"{made.spec()} was taken")

    rounds(
        check,
        suite=200,
        which=st.sampled_from(numbers),
        beyond=st.floats(0, 1e9, exclude_min=True) | st.integers(1, 10**6),
        low=st.booleans(),
    )


def test_recipes_in_specifications(rounds, tmp_path):
    path = tmp_path / "a.toml"

    def check(spec, how):
        path.write_bytes(changed(f"decoder = {spec!r}\nformat = 1\n".encode("utf-8", "replace"), how))
        try:
            assert parse(parse(f"@{path}").spec()) == parse(f"@{path}")
        except VlmfixError as error:
            one_line(error)
            names(error, path)

    rounds(check, suite=150, spec=specifications(), how=changes().map(lambda how: how[:1]) | st.just([]))


def test_what_is_taken_decodes_or_says_why_not(rounds):
    vlm, shown = vlm_of("llava"), picture(1, (30, 40))

    def check(spec, beams):
        try:
            decoder = parse(spec)
            check_settings(decoder, Settings(num_beams=beams))
            if reason := decoder.check(vlm):
                assert "\n" not in reason
                return
            (answer,) = vlm.generate([shown], ["is it?"], decoder=decoder, max_new_tokens=2, num_beams=beams)
        except VlmfixError as error:
            one_line(error)
        else:
            assert len(answer.ids) in (1, 2)

    rounds(
        check, suite=40, spec=st.lists(parts(), min_size=1, max_size=2).map("+".join), beams=st.sampled_from([1, 1, 2])
    )
