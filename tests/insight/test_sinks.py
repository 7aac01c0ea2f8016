"""The probe finds planted sinks, and says so when there are none."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, Qwen2_5_VLTextConfig, Qwen2VLTextConfig

from tests.contracts.support import batch_of, logits, plain, vlm_of
from vlmfix.decoders import VAR
from vlmfix.generation import VLM
from vlmfix.insight import sinks
from vlmfix.insight.sinks import find_sinks, first_token_mass, ratio_threshold, sink_rate


@pytest.fixture(autouse=True)
def _forget():
    sinks._REPORTS.clear()
    sinks._MASSES.clear()
    yield
    sinks._REPORTS.clear()
    sinks._MASSES.clear()


@contextmanager
def planted(vlm: VLM, dims, *, image_share=0.0, everywhere=False):
    """Makes the first token, and a share of the image tokens, massive in the given dimensions from layer 0 on."""
    image = vlm.family.image_token(vlm.model.config)
    ids = []

    def note(module, args, kwargs):
        given = kwargs["input_ids"]
        if given.shape[1] > 1:
            ids[:] = [given]

    def plant(module, args, kwargs):
        hidden = args[0].clone()
        if hidden.shape[1] == 1:
            return None
        where = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        where[:, 0] = True
        shown = ids[0] == image
        order = shown.int().cumsum(1)
        where |= shown & (order <= (shown.sum(1, keepdim=True) * image_share).round())
        if everywhere:
            where[:] = True
        for number, dim in enumerate(dims):
            hidden[..., dim] = torch.where(where, 400.0 - 100 * number, hidden[..., dim])
        return (hidden, *args[1:]), kwargs

    first = vlm.family.layers(vlm.model)[0]
    handles = [
        vlm.model.register_forward_pre_hook(note, with_kwargs=True),
        first.register_forward_pre_hook(plant, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_planted_dimensions_are_found_in_order(family):
    vlm = vlm_of(family)
    with planted(vlm, (17, 5), image_share=0.1):
        report = find_sinks(vlm, threshold=0.4 * math.sqrt(64))
    assert report.dims == (17, 5)
    assert report.largest > 0.5 * report.bound
    assert report.visual_share == pytest.approx(0.1, abs=0.05)


def test_dimensions_that_every_token_shares_are_no_sinks():
    vlm = vlm_of("llava")
    with planted(vlm, (17,), everywhere=True):
        assert 17 not in find_sinks(vlm, threshold=2.0).dims


def test_a_random_model_has_none():
    report = find_sinks(vlm_of("llava"))
    assert report.dims == ()
    assert report.threshold == ratio_threshold(64, 0)
    assert 0 < report.largest < 3


def test_the_answer_is_kept_per_model_and_threshold(monkeypatch):
    vlm = vlm_of("llava")
    calls = []
    original = sinks._probe
    monkeypatch.setattr(sinks, "_probe", lambda *args: calls.append(1) or original(*args))
    assert find_sinks(vlm, threshold=2.0) is find_sinks(vlm, threshold=2.0)
    find_sinks(vlm, threshold=3.0)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        (LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_key_value_heads=32), (1415, 2533)),
        (LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_key_value_heads=40), (2100, 4743)),
        (LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_key_value_heads=8), ()),  # LLaMA-3 is another model
        (Qwen2VLTextConfig(hidden_size=3584, num_hidden_layers=28, num_key_value_heads=4), (458, 2570)),
        (Qwen2_5_VLTextConfig(hidden_size=3584, num_hidden_layers=28, num_key_value_heads=4), (458, 2570)),
    ],
)
def test_the_table_knows_the_released_models(text, dims, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setattr(type(vlm.model.config), "get_text_config", lambda self: text)
    assert sinks.tabulated_sinks(vlm) == dims
    monkeypatch.setattr(sinks, "_probe", lambda *args: pytest.fail("tabulated models are not probed"))
    if dims:
        assert VAR().check(vlm) is None


@pytest.mark.parametrize(
    ("share", "everywhere", "reason"),
    [(0.0, False, "no visual sinks"), (0.5, False, "% of image tokens exceed"), (0.1, False, None)],
)
def test_var_says_why_it_cannot_act(share, everywhere, reason):
    vlm = vlm_of("llava")
    method = VAR(sink_threshold=0.4 * math.sqrt(64), layers="2:")
    with planted(vlm, (17,), image_share=share, everywhere=everywhere):
        said = method.check(vlm)
    assert said is None if reason is None else reason in said


def test_var_acts_on_planted_sinks_without_being_told_where():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    method = VAR(sink_threshold=3.0, layers="2:", min_visual_mass=0.0, min_nonsink_ratio=0.0, moved_fraction=1.0)
    with planted(vlm, (17,), image_share=0.1):
        assert (logits(vlm, batch, method) - plain(vlm, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("width", [3584, 4096, 5120])
def test_the_threshold_is_the_papers_at_the_widths_of_its_models(width):
    assert ratio_threshold(width) == pytest.approx(20.0, rel=0.015)


@pytest.mark.parametrize(
    ("width", "ordinary", "low", "high"),
    [
        (64, 1.0, 7.0, 8.0),  # out of 8
        (256, 1.0, 12.0, 14.0),  # of `tiny`, out of 16
        (576, 1.0, 15.0, 16.0),
        (576, 12.0, 19.0, 20.0),  # SmolLM2, out of 24: pictures reach 17.7 without a sink, its sinks 22 to 24
        (576, 20.0, 21.5, 24.0),
    ],
)
def test_the_threshold_is_within_reach_and_above_what_is_ordinary(width, ordinary, low, high):
    assert max(low, ordinary) < ratio_threshold(width, ordinary) < high


def test_the_ratio_is_that_to_the_other_dimensions():
    torch.manual_seed(0)
    x = torch.randn(4096)
    for ordinary in (0.0, 3.0):
        x[7] = (20 + ordinary / math.sqrt(1 - ordinary**2 / 4096)) * x[x.abs() < 9].square().mean().sqrt()
        assert float(sinks.sink_strength(x, (7,))) == pytest.approx(ratio_threshold(4096, ordinary), rel=1e-3)
        x[7] = 0.0


def test_the_threshold_rises_with_what_is_ordinary_in_a_model():
    vlm = vlm_of("llava")
    with planted(vlm, (17,), image_share=0.1):
        report = find_sinks(vlm)
    assert report.dims == (17,)
    assert report.threshold == sinks.threshold_of(vlm) == ratio_threshold(64, report.ordinary)
    assert 0 < report.ordinary < 3
    assert report.visual_share == pytest.approx(0.1, abs=0.05)
    assert VAR(sink_threshold=None, layers="2:").check(vlm) is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_attention_to_the_first_token(family):
    """The probe's own mean, from maps of the model's eager attention."""
    vlm = vlm_of(family)
    found = first_token_mass(vlm)
    assert first_token_mass(vlm) is found
    batches = [batch for batch in sinks._prompts(vlm) if vlm.layout(batch).tokens.any()]
    vlm.model.set_attn_implementation("eager")
    try:
        expected = []
        for batch in batches:
            rows = vlm.layout(batch).text_after_image()[0]
            maps = vlm.model(**batch, output_attentions=True).attentions
            expected.append(torch.stack([one[0, :, rows, 0].mean(1) for one in maps]))
    finally:
        vlm.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, torch.stack(expected).mean(0).detach(), atol=1e-5, rtol=1e-4)


def test_the_sink_rate_is_the_share_of_heads_that_rest_on_the_first_token(monkeypatch):
    masses = torch.tensor([[0.9, 0.31, 0.3], [0.0, 0.5, 0.1]])
    monkeypatch.setattr(sinks, "first_token_mass", lambda vlm: masses)
    assert sink_rate(vlm_of("llava")) == 0.5
