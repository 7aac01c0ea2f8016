"""CARVE's contrast and its presets, and what it finds on a model whose attention is known."""

import numpy as np
import pytest
import torch

from tests.contracts.support import vlm_of
from tests.decoders.bright import BRIGHT_AT, QUESTION, bright_vlm, scene
from vlmfix.decoders import CARVE
from vlmfix.decoders.picture.prompts import GENERAL, TERSE, worded
from vlmfix.errors import UsageError


def attention(steps, layers=6, tokens=256, seed=0):
    return torch.rand(steps, layers, tokens, generator=torch.Generator().manual_seed(seed)) / tokens


def test_equal_maps_contrast_to_nearly_one():
    flat = torch.full((3, 6, 256), 1 / 256)
    assert CARVE(steps="first").fused(flat, flat).mean() == pytest.approx(5.99998, abs=1e-5)
    assert CARVE(steps="all").fused(flat, flat).mean() == pytest.approx(36, abs=1e-3)
    assert CARVE(steps="last").fused(flat, flat).mean() == pytest.approx(5.99998, abs=1e-5)


def test_the_formula_step_by_step():
    question, general = attention(4), attention(3, seed=1)
    expected = np.zeros(256)
    for step in range(3):  # what both answers have
        for layer in range(6):
            for token in range(256):
                noise = float(general[step, layer, token]) + 1e-3
                expected[token] += (step + 1) * float(question[step, layer, token]) / noise
    np.testing.assert_allclose(CARVE(steps="all", ridge=1e-3).fused(question, general), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "own", "other"),
    [("first", slice(0, 1), slice(0, 1)), ("last", slice(2, 3), slice(2, 3)), ("own-last", slice(3, 4), slice(2, 3))],
)
def test_single_steps(steps, own, other):
    question, general = attention(4), attention(3, seed=1)
    got = CARVE(steps=steps).fused(question, general)
    torch.testing.assert_close(got, CARVE(steps="all").fused(question[own], general[other]))


def test_later_steps_weigh_more():
    flat = torch.full((2, 6, 9), 1 / 9)
    excess = []
    for step in (0, 1):
        spiked = flat.clone()
        spiked[step, :, 4] *= 5
        got = CARVE(steps="all").fused(spiked, flat)
        excess.append(float(got[4] - got[0]))
    assert excess[1] / excess[0] == pytest.approx(2, abs=1e-6)


def test_the_contrast_minimises_its_objective():
    question, general, ridge = attention(1, 1).double().flatten(), attention(1, 1, seed=1).double().flatten(), 0.3

    def objective(values):
        return ((values * general - question) ** 2).sum() + ridge * (values**2 * general).sum()

    best = CARVE(steps="first", ridge=ridge).fused(question[None, None], general[None, None])
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        other = best * (1 + 0.05 * torch.randn(256, generator=generator, dtype=torch.float64))
        assert objective(other) > objective(best)


def test_a_large_ridge_ranks_by_the_question_alone():
    question, general = attention(1, 1), attention(1, 1, seed=1)
    by_ratio = CARVE(ridge=1e-12).fused(question, general).argsort()
    assert torch.equal(by_ratio, (question / general).double().flatten().argsort())
    assert torch.equal(CARVE(ridge=1e3).fused(question, general).argsort(), question.flatten().argsort())


def test_a_relative_ridge_tames_tokens_that_the_general_map_misses():
    question, general = torch.full((1, 1, 9), 0.1), torch.full((1, 1, 9), 0.1)
    general[0, 0, 3] = 0
    assert CARVE().fused(question, general)[3] > 1e6
    assert CARVE(relative_ridge=0.1).fused(question, general).isfinite().all()
    assert CARVE(relative_ridge=0.1).fused(question, general)[3] < 15


def test_layers_follow_the_depth(monkeypatch):
    vlm = vlm_of("llava")
    for count, layers in [
        (28, "20:26"),
        (36, "20:26"),
        (40, "20:26"),
        (24, "17:22"),
        (80, "57:72"),
        (8, "6:8"),
        (3, "2:3"),
    ]:
        monkeypatch.setattr(type(vlm.family), "layers", lambda self, model, count=count: [None] * count)
        assert str(CARVE().layers_of(vlm)) == layers
    assert str(CARVE(layers="1:2").layers_of(vlm)) == "1:2"


def test_presets():
    code = CARVE(preset="official-code")
    assert (code.steps, code.kept_share, code.regions, code.region_rule, code.shown) == (
        "all",
        0.2,
        3,
        "at-least",
        "both",
    )
    assert (CARVE().steps, CARVE().shown, CARVE().region_rule) == ("last", "refined", "at-most")


def test_wording():
    assert worded("What?", True) == f"What? {TERSE}"
    assert worded(f"What? {TERSE}", True) == f"What? {TERSE}"
    assert worded(GENERAL, False) == GENERAL
    for text in ("", " x", "a, b", "a + b", "a\nb"):
        with pytest.raises(UsageError, match="general_prompt"):
            CARVE(general_prompt=text)


@pytest.mark.parametrize("steps", ["first", "last", "all"])
@pytest.mark.parametrize("size", [(200, 200), (320, 200)])
def test_the_object_asked_about_is_found(steps, size):
    """The model looks at what is bright when the question says so, and everywhere alike otherwise."""
    vlm, (picture, box) = bright_vlm(), scene(size)
    short = {} if steps == "first" else {"probe_tokens": 3}
    decoder = CARVE(layers="1", steps=steps, kept_share=0.08, regions=1, **short)
    (found,) = vlm.refine([picture], QUESTION, decoder=decoder)
    (look,) = found.looks
    assert look.box[0] < (box[0] + box[2]) / 2 < look.box[2]
    assert look.box[1] < (box[1] + box[3]) / 2 < look.box[3]
    assert (look.box[2] - look.box[0]) * (look.box[3] - look.box[1]) < 0.25
    assert np.asarray(look.picture).max() == 255
    assert np.unravel_index(look.map.values.argmax(), look.map.values.shape) == BRIGHT_AT


def test_a_question_that_looks_nowhere_keeps_the_picture():
    vlm, (picture, _) = bright_vlm(), scene((200, 200))
    (found,) = vlm.refine([picture], "who?", decoder=CARVE(layers="1", steps="first", kept_share=0.08))
    assert found.looks[0].map.values.std() < 1e-5 * found.looks[0].map.values.mean()
