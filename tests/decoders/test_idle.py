"""Parameters that do nothing under the values of others: of every decoder, in Python, specifications and recipes."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from tests.contracts.support import PICTURES
from tests.embedded import TINY
from vlmfix import load
from vlmfix.bench.arms import suited
from vlmfix.decoders import DECODERS, VCD, parse
from vlmfix.decoders.spec import describe
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.evals.tuning.search import Space
from vlmfix.language.parameters import Given, HeadList, Range, parameter, ranges, written
from vlmfix.models.checkpoint import HEADS

CASES = [
    (decoder, name, case)
    for decoder in DECODERS.homes
    for name, allowed in ranges(DECODERS[decoder]).items()
    for case in allowed.idle
]
"""Every parameter of every decoder with every case in which it does nothing."""


def some(allowed: Range):
    """A value that is not None."""
    texts = {"HeadList": "L2H1", "LayerSet": "1:3", "float": 0.3, "int": 3, "str": "heads.safetensors"}
    return (allowed.choices or (texts[allowed.kind.__name__],))[0]


def another(allowed: Range, own):
    """A value that is not a parameter's own."""
    if allowed.choices:
        return next(word for word in allowed.choices if word != own)
    if allowed.kind is bool:
        return not own
    if allowed.kind in (int, float):
        return next(allowed.kind(value) for value in (1, 3, 31) if value != own and value >= allowed.low)
    return some(allowed)


def under(decoder: str, case, **given):
    """The decoder in a case, and what else is given."""
    kind = DECODERS[decoder]
    said = {name: some(ranges(kind)[name]) if value is Given else value for name, value in case.items()}
    return kind(**(said | given))


def test_which_parameters_they_are():
    found = {f"{decoder}.{name}" for decoder, name, _ in CASES}
    waiting = ("vcd", "icd", "m3id", "pai", "sid", "avisc", "mod", "inter")
    assert {name for name in found if name.endswith(".margin")} == {f"{decoder}.margin" for decoder in waiting}
    assert {"vcd.complement", "act.sink_factor", "acg.per", "sgrs.draw_seed", "vicrop.median", "carve.regions"} < found


@pytest.mark.parametrize(("decoder", "name", "case"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_value_that_nothing_asks_is_refused(decoder, name, case, tmp_path):
    kind, plain = DECODERS[decoder], under(decoder, case)
    own = getattr(plain, name)
    assert parse(plain.spec()) == plain, "what a decoder writes of itself can be read"
    assert under(decoder, case, **{name: own}) == plain
    value = another(ranges(kind)[name], own)
    with pytest.raises(UsageError, match=f"{decoder}: .* does nothing with ") as refused:
        under(decoder, case, **{name: value})
    asked = {other for cases in (*ranges(kind)[name].idle, {name: value}) for other in cases}
    assert any(f"{other}=" in refused.value.message.partition(" with ")[2] for other in asked)
    assert any(other in refused.value.hint for other in asked)
    assert refused.value.hint.startswith("leave ")
    said = [f"{other}={written(getattr(plain, other))}" for other in case]
    spec = f"{decoder}:{','.join([*said, f'{name}={written(value)}'])}"
    with pytest.raises(UsageError, match="does nothing with"):
        parse(spec)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'decoder = "{spec}"\n')
    with pytest.raises(DataError, match=r"recipe\.toml: .* does nothing with"):
        parse(f"@{recipe}")


@pytest.mark.parametrize(("decoder", "name", "case"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_hint_says_makes_it_act(decoder, name, case):
    """Each case is left by one of its parameters alone, beside those that other cases name."""
    kind, plain = DECODERS[decoder], under(decoder, case)
    allowed = ranges(kind)
    for other, value in case.items():
        values = {one: getattr(plain, one) for one in allowed}
        values[other] = None if value is Given else another(allowed[other], value)
        assert allowed[name].idle_case(values) != case


def test_a_decoder_that_is_described_says_where_a_parameter_does_nothing():
    for decoder, name, case in CASES:
        (found,) = [one for one in describe(DECODERS[decoder]).parameters if one.name == name]
        assert all(other in found.idle for other in case)
    (margin,) = [one for one in describe(VCD).parameters if one.name == "margin"]
    assert margin.meaning.endswith("in clean probability; does nothing with when=always")


def test_the_command_line_refuses_it_before_a_model_is_loaded(vlmfix, tmp_path):
    code, _, told = vlmfix(
        "run", tmp_path, "--model", "nowhere", "--decoder", "vcd:margin=0.4", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "vcd: margin=0.4 does nothing with when=always" in told
    assert "leave margin out, or give when=uncertain" in told


def test_presets_and_defaults_are_no_values_that_somebody_gave():
    assert parse("vicrop:preset=paper").median == 3
    assert parse("act:preset=official-code").sink_factor == 5.0
    assert parse("act:preset=official-code,sink_threshold=none,sink_factor=7").sink_factor == 7.0
    with pytest.raises(UsageError, match=r"act: sink_factor=7.0 does nothing with sink_threshold=0.1"):
        parse("act:preset=official-code,sink_factor=7")
    with pytest.raises(UsageError, match=r"vicrop: median=3 does nothing with method=rel-att") as refused:
        parse("vicrop:median=3")
    assert refused.value.hint == "leave median out, or give method=pure-grad"


def test_a_search_gives_up_what_does_nothing_beside_what_it_tries():
    space = Space.of("sgrs:window=7")
    one = space.build({"top_k": 1, "strictness": 0.3, "tries": 5, "draw": "greedy", "scope": "generated"})
    assert one == parse("sgrs:top_k=1,draw=greedy")
    two = space.build({"top_k": 2, "strictness": 0.3, "tries": 5, "draw": "greedy", "scope": "generated"})
    assert two == parse("sgrs:window=7,top_k=2,strictness=0.3,tries=5,draw=greedy,scope=generated")
    with pytest.raises(UsageError, match=r"margin=0\.4 does nothing"):
        Space.of("vcd:margin=0.4")


def test_a_decoder_of_ones_own_may_have_some():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(VCD):
        heads: HeadList | None = parameter(None, HeadList, optional=True, help="heads")
        depth: int = parameter(1, int, low=0, high=9, idle=({"heads": Given}, {"when": "always"}), help="depth")

    assert Mine(when="uncertain", depth=2).depth == 2
    with pytest.raises(UsageError, match=r"depth=2 does nothing with heads=L1H1"):
        Mine(when="uncertain", heads="L1H1", depth=2)
    with pytest.raises(UsageError, match=r"depth=2 does nothing with when=always"):
        Mine(depth=2)


ACTING = {
    "act": {"heads": "all"},
    "vhr": {"layers": "1/4:"},
    "vicrop": {"base": 40},
    "imbalance": {"significance": "received"},
    "inter": {"variance": 0.0},
}
"""What makes decoders act on the embedded model."""


@pytest.fixture(scope="module")
def embedded():
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def bases(embedded):
    """Of every decoder a specification by which it acts on the embedded model."""
    return dict(zip(DECODERS.homes, suited(embedded), strict=True))


@pytest.mark.parametrize(("decoder", "name", "case"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_said_to_do_nothing_does_nothing(decoder, name, case, embedded):
    own = {key: value for key, value in ACTING.get(decoder, {}).items() if key not in case}
    if "profile" in case:
        own["profile"] = str(TINY["tiny"] / HEADS)
    plain = under(decoder, case, **own)
    changed = copy.copy(plain)
    object.__setattr__(changed, name, another(ranges(type(plain))[name], getattr(plain, name)))
    picture = PICTURES[0][0].resize((48, 48))
    one, other = (
        [(said.ids, said.logprob) for said in embedded.generate([picture], ["What?"], decoder=kind, max_new_tokens=4)]
        for kind in (plain, changed)
    )
    assert one == other


ENDS = {"sample": {"top_p"}}
"""Parameters with an end that is not allowed."""


def switched(kind, base):
    """Every value of every word and flag of a decoder, None or a value for what is optional, and ends of scales."""
    for name, allowed in ranges(kind).items():
        values = [*allowed.choices, *((True, False) if allowed.kind is bool else ())]
        if allowed.optional and not allowed.choices and allowed.kind is not str:
            values = [None, (0, 1) if allowed.kind is tuple else some(allowed)]
        elif allowed.kind in (int, float) and name not in ENDS.get(kind.name, ()):
            values = [allowed.kind(end) for end in (allowed.low, allowed.high) if end in (0, 1)]
        for value in values:
            if value != base[name]:
                own = {} if name == "preset" else base
                yield f"{name}={written(value)}", own | {name: value}


@pytest.mark.product
@pytest.mark.parametrize("decoder", DECODERS.homes)
def test_what_is_read_under_one_value_of_a_switch_is_read_under_all_or_said_to_do_nothing(decoder, embedded, bases):
    kind, read = DECODERS[decoder], set()

    class Watched(kind):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    base = {name: getattr(parse(bases[decoder]), name) for name in ranges(kind)}
    found = {}
    for label, given in [("as it is", base), *switched(kind, base)]:
        try:
            acting = kind.acting(**given)
            values = {name: getattr(acting, name) for name in ranges(kind)}
            method = Watched(**values)
            read.clear()
            embedded.generate([PICTURES[0][0].resize((48, 48))], ["What?"], decoder=method, max_new_tokens=3)
        except VlmfixError:  # not allowed, or nothing that this model can do
            continue
        found[label] = {name for name, allowed in ranges(kind).items() if name in read or allowed.idle_case(values)}
    ever = set().union(*found.values()) - {"preset"}
    assert {label: ever - one for label, one in found.items() if ever - one} == {}
