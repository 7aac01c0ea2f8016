"""VISTA against the slow way: one sample in float64 without a cache, hooks that hold the formula."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, STRONG, Forced, batch_of, close, extended, logits, plain, vlm_of
from tests.decoding.again import recording_on_cpu
from tests.decoding.test_graphs import scores
from vlmfix.attention.session import bare, edited
from vlmfix.decoders import VISTA, parse
from vlmfix.decoders.states.vista import Turned
from vlmfix.errors import IncompatibleDecodersError

STEPS = 4


def hooked(model, family, number, place, change):
    """Changes what leaves a layer, or its MLP, by a hook."""
    layer = family.layers(model)[number]

    def hook(module, args, output):
        return change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])

    return (layer.mlp if place == "mlp" else layer).register_forward_hook(hook)


def states(model, family, inputs):
    """The stream of the last token behind each layer, (L, D)."""
    found = []
    with ExitStack() as hooks, torch.no_grad():
        for number in range(len(family.layers(model))):
            handle = hooked(model, family, number, "layer", lambda x: found.append(x[0, -1].clone()) or x)
            hooks.callback(handle.remove)
        model(**inputs, use_cache=False)
    return torch.stack(found)


def slow(vlm, row, tokens, strength, augmentation, exits, place, component=0.0):
    """(steps, V) scores of one sample behind its prompt and each of ``tokens`` but the last."""
    model, family = copy.deepcopy(vlm.model).double(), vlm.family

    def exact(batch):
        return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}

    shown, hidden = vlm.encode([PROMPTS[row]], [PICTURES[row]]), vlm.encode([PROMPTS[row]], [()])
    directions = states(model, family, exact(shown)) - states(model, family, exact(hidden))
    directions[0, 0] += component

    def turn(number):
        d = directions[number]

        def change(x):
            new = torch.empty_like(x)
            for at in range(x.shape[1]):
                one = x[0, at]
                away = max(0.0, float(-(one @ d) / one.norm() / d.norm()))
                moved = one / one.norm() + strength * (1 + away) * d / d.norm()
                new[0, at] = one.norm() * moved / moved.norm()
            return new

        return change

    late, count = {}, len(family.layers(model))
    with ExitStack() as hooks, torch.no_grad():
        for number in range(count):
            hooks.callback(hooked(model, family, number, place, turn(number)).remove)
            keep = lambda x, number=number: late.__setitem__(number + 1, x.clone()) or x  # noqa: E731
            hooks.callback(hooked(model, family, number, "layer", keep).remove)
        said = model(**exact(extended(shown, tokens[None, :-1])), use_cache=False).logits[0, shown.length - 1 :]
        mean = torch.stack([model.lm_head(late[exit_][0, shown.length - 1 :]) for exit_ in exits]).mean(0)
    return (1 - augmentation) * said + augmentation * mean


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("place", ["layer", "mlp"])
def test_every_token_is_turned_towards_what_the_picture_put_into_the_last_one(family, place):
    """In a padded batch of four, of which each sample has its own directions."""
    vlm = vlm_of(family)
    batch = batch_of(vlm, (0, 1, 1, 0))
    tokens = torch.arange(20, 20 + 4 * STEPS).view(4, STEPS)
    method = VISTA(strength=0.4, exits="1:3", place=place)
    found = logits(vlm, batch, method, steps=STEPS, logits_processor=[Forced(tokens, batch.length)])
    for sample, row in enumerate((0, 1, 1, 0)):
        close(found[:, sample], slow(vlm, row, tokens[sample], 0.4, 0.3, (1, 2), place))
    for other in ((0.2, 0.3, (1, 2)), (0.4, 0.2, (1, 2)), (0.4, 0.3, (2,))):
        assert (found[:, 0] - slow(vlm, 0, tokens[0], *other, place)).abs().max() > 1e-2


def test_the_released_direction_has_a_component_of_nothing_in_it():
    """Of the zero matrix that its one sample leaves: 1 in the first coordinate of the first layer."""
    vlm = vlm_of("llava")
    batch, tokens = batch_of(vlm, (0, 1)), torch.arange(20, 20 + 2 * STEPS).view(2, STEPS)
    method = VISTA(strength=0.4, exits="1:3", direction="official-code")
    found = logits(vlm, batch, method, steps=STEPS, logits_processor=[Forced(tokens, batch.length)])
    for row in (0, 1):
        close(found[:, row], slow(vlm, row, tokens[row], 0.4, 0.3, (1, 2), "mlp", component=1.0))
    assert (found[:, 0] - slow(vlm, 0, tokens[0], 0.4, 0.3, (1, 2), "mlp")).abs().max() > 1e-3


@pytest.fixture
def recording():
    with recording_on_cpu([vlm_of("llava"), vlm_of("qwen2_5_vl")]) as made:
        yield made


@pytest.mark.parametrize("name", ["vista", "vista-layer"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_recorded_steps_give_the_scores_of_others(family, name, recording, monkeypatch):
    vlm, method = vlm_of(family), parse(f"{STRONG[name]}+vcd:plausibility=0")
    for shown in ((0, 1, 0, 1), (1, 1, 1, 1)):
        recorded, others = (scores(vlm, method, monkeypatch, recorded=yes, shown=shown) for yes in (True, False))
        for one, other in zip(recorded, others, strict=True):
            close(one, other, 1e-3)
    assert len(recording) == 2


def test_contrast_rows_and_samples_without_a_picture_are_left_alone():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?", "hello there"], [PICTURES[0], ()])
    close(logits(vlm, batch, "vista:strength=1,place=layer")[:, 1], plain(vlm, batch)[:, 1])
    tokens = torch.arange(20, 26).view(2, 3)

    def said(spec):
        return logits(vlm, batch, spec, logits_processor=[Forced(tokens, batch.length)])[:, 0]

    turned, vcd = "vista:strength=0.5,augmentation=0", "vcd:contrast=1,plausibility=0"
    noisy = 2 * said("greedy") - said(vcd)
    close(said(f"{turned}+{vcd}"), 2 * said(turned) - noisy, 1e-3)


def test_lengths_stay_and_the_more_a_token_is_opposed_the_more_it_is_turned():
    stream = torch.tensor([[[3.0, 0.0], [0.0, -4.0], [-3.0, -4.0]]])
    edit = Turned(strength=0.25, directions=torch.tensor([[[2.0, 0.0]]]), place="layer")
    here = type("Here", (), {"prefill": False, "learned": lambda self, name: edit.directions[:, 0]})()
    turned = edit.stream(here, stream)[0]
    close(turned.norm(dim=-1), torch.tensor([3.0, 4.0, 5.0]))
    close(turned[0], stream[0, 0])
    close(turned[1, 0] / turned[1, 1], torch.tensor(0.25 / -1))
    close(turned[2, 0] / turned[2, 1], torch.tensor((-0.6 + 0.25 * 1.6) / -0.8))


@pytest.mark.parametrize("place", ["layer", "mlp"])
def test_blocks_nest_and_bare_lifts_both_places(place):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    layout, directions = vlm.layout(batch), torch.randn(2, vlm.layers, 64)
    width = vlm.model.config.get_text_config().hidden_size
    one, two = (Turned(strength=0.3, directions=directions[..., :width], place=place) for _ in "ab")
    before = plain(vlm, batch)
    with edited(vlm, layout, [one, two]):
        both = plain(vlm, batch)
    with edited(vlm, layout, [one]), edited(vlm, layout, [two]):
        close(plain(vlm, batch), both)
        with bare(vlm):
            assert torch.equal(plain(vlm, batch), before)
    assert torch.equal(plain(vlm, batch), before)
    assert (both - before).abs().nan_to_num().max() > 1e-2


def test_exits_that_no_layer_has_are_refused():
    vlm = vlm_of("llava")
    with pytest.raises(IncompatibleDecodersError, match="3 layers have no exit there"):
        logits(vlm, batch_of(vlm), VISTA(exits="20:28"))
    assert VISTA(augmentation=0).check(vlm) is None


def test_presets_have_the_authors_strengths():
    assert (VISTA().strength, VISTA(preset="questions").strength) == (0.17, 0.01)
    deep = type("Deep", (), {"layers": 32})()
    assert VISTA().places(deep) == [26, 27, 28, 29, 30, 31]
