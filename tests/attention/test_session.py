"""Sessions install edits and leave the model exactly as it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AttentionInterface

from tests.contracts.support import PAIR, HeadGain, batch_of, close, logits, plain, vlm_of
from tests.processes import said
from tests.tiny import TINY
from vlmfix.attention.edit import BiasEdit, LayerSet, OutputEdit, Rows, ScoreEdit, WeightEdit
from vlmfix.attention.session import bare, edited, first_edited
from vlmfix.decoders import DecodingPlan, Greedy
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.upstream.cache import handed_over, returned

GAIN = 1.7


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageBias(BiasEdit):
    size: float = 1.0

    def bias(self, site):
        return site.image_keys[:, None, None, :] * self.size


@dataclass(frozen=True, eq=False, kw_only=True)
class LastImageBias(ImageBias):
    rows: ClassVar[Rows] = "last"


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageScores(ScoreEdit):
    size: float = 1.0

    def scores(self, site, scores):
        return scores + site.image_keys[:, None, None, :] * self.size


@dataclass(frozen=True, eq=False, kw_only=True)
class DoubledScores(ScoreEdit):
    def scores(self, site, scores):
        return scores * 2


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageWeights(WeightEdit):
    gain: float = GAIN

    def weights(self, site, weights):
        return torch.where(site.image_keys[:, None, None, :], weights * self.gain, weights)


@dataclass(frozen=True, eq=False, kw_only=True)
class Doubled(OutputEdit):
    rows: ClassVar[Rows] = "all"

    def output(self, site, output):
        return output * 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Same(WeightEdit):
    """Changes nothing and makes the layer materialise."""

    def weights(self, site, weights):
        return weights


STRONG = {
    "bias": ImageBias(size=3.0),
    "scores": ImageScores(size=3.0),
    "weights": ImageWeights(),
    "output": HeadGain(),
}
NEUTRAL = {
    "bias": ImageBias(size=0.0),
    "scores": ImageScores(size=0.0),
    "weights": ImageWeights(gain=1.0),
    "output": HeadGain(gain=1.0),
}


def run(vlm, batch, *edits, **options):
    with edited(vlm, vlm.layout(batch), edits):
        return plain(vlm, batch, **options)


def snapshot(vlm):
    """Everything about a model that a session could leave changed."""
    return {
        name: (
            sorted(module.__dict__),
            [id(hook) for hook in module._forward_pre_hooks.values()],
            [id(hook) for hook in module._forward_hooks.values()],
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in vlm.model.named_modules()
    }


def some(turn):
    """Pairs (family, kind): two families meet all kinds, the others every second one, and in two tests each."""
    return [
        pytest.param(family, kind, marks=() if family in PAIR or (one + other) % 2 == turn else pytest.mark.product)
        for one, family in enumerate(TINY)
        for other, kind in enumerate(STRONG)
    ]


@pytest.mark.parametrize(("family", "kind"), some(1))
def test_neutral_edits_change_nothing_and_strong_ones_change_every_row(family, kind):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    before = plain(vlm, batch)
    close(run(vlm, batch, NEUTRAL[kind]), before)
    assert (run(vlm, batch, STRONG[kind]) - before).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("kind", ["bias", "output"])
def test_the_sdpa_path_equals_the_materialised_path(family, kind):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    close(run(vlm, batch, STRONG[kind], Same()), run(vlm, batch, STRONG[kind]), 1e-5)


@pytest.mark.parametrize("family", TINY)
def test_bias_equals_scores(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    close(run(vlm, batch, ImageBias(size=2.0)), run(vlm, batch, ImageScores(size=2.0)), 1e-5)


@pytest.mark.parametrize(("family", "kind"), some(0))
def test_padding_and_caches_change_nothing(family, kind):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    together = run(vlm, batch, STRONG[kind])
    close(run(vlm, batch, STRONG[kind], cache_implementation="static"), together)
    for row in (0, 1):
        alone = batch_of(vlm, [row])
        close(together[:, row], run(vlm, alone, STRONG[kind])[:, 0])
        close(run(vlm, alone, STRONG[kind], cache_implementation="static")[:, 0], together[:, row])


@pytest.mark.parametrize("family", TINY)
def test_an_edit_of_the_last_row_equals_an_edit_of_all_rows_there(family):
    """In the last layer the other rows are read by nobody."""
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    last = LayerSet("-1")
    close(run(vlm, batch, LastImageBias(layers=last, size=2.0)), run(vlm, batch, ImageBias(layers=last, size=2.0)))


@pytest.mark.parametrize("family", TINY)
def test_the_model_is_left_as_it_was_found(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm, [0])
    logits_before = plain(vlm, batch, steps=1)  # transformers hooks some vision towers on their first pass
    before = snapshot(vlm)
    run(vlm, batch, *STRONG.values(), steps=1)
    assert snapshot(vlm) == before
    with pytest.raises(ZeroDivisionError), edited(vlm, vlm.layout(batch), tuple(STRONG.values())):
        raise ZeroDivisionError
    assert snapshot(vlm) == before
    close(plain(vlm, batch, steps=1), logits_before, 0)


@pytest.mark.parametrize("family", TINY)
def test_the_vision_tower_is_never_touched(family):
    """Inside a session no module outside the text decoder has a plan, another implementation or a hook."""
    vlm = vlm_of(family)
    batch = batch_of(vlm, [0])
    plain(vlm, batch, steps=1)
    before = snapshot(vlm)
    decoder = next(name for name, module in vlm.model.named_modules() if module is vlm.family.decoder(vlm.model))
    inside = {}
    with edited(vlm, vlm.layout(batch), tuple(STRONG.values())):
        inside = snapshot(vlm)
    outside = {name for name in before if not name.startswith(decoder)}
    assert any("vision" in name or "visual" in name for name in outside)
    assert {name for name in outside if inside[name] != before[name]} == set()
    assert any(inside[name] != before[name] for name in before)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("kind", STRONG)
def test_prefill_changes_the_text_after_a_picture_and_nothing_else(family, kind):
    """Read off the first layer, whose inputs no edit has touched."""
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    outputs = []

    def keep(module, args, output):
        outputs.append(output[0].detach())

    handle = vlm.family.attention_modules(vlm.model)[0].register_forward_hook(keep)
    try:
        vlm.model(**batch)
        with edited(vlm, vlm.layout(batch), [STRONG[kind]]):
            vlm.model(**batch)
    finally:
        handle.remove()
    before, after = outputs
    layout = vlm.layout(batch)
    changed = ((before - after).abs().amax(dim=-1) > 1e-5) & batch.attention_mask.bool()
    assert torch.equal(changed, layout.text_after_image())
    assert (layout.text & ~layout.text_after_image()).any()


def test_sessions_nest_by_appending():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    layout = vlm.layout(batch)
    one, two = ImageBias(size=2.0, layers=LayerSet("0:2")), LastImageBias(size=-1.0, layers=LayerSet("1:"))
    with edited(vlm, layout, [one]), edited(vlm, layout, [two]):
        nested = plain(vlm, batch)
    close(nested, run(vlm, batch, one, two))
    before = snapshot(vlm)
    with edited(vlm, layout, [one]):
        inner = snapshot(vlm)
        with edited(vlm, layout, [two]):
            pass
        assert snapshot(vlm) == inner
        close(plain(vlm, batch), run_alone(vlm, batch, one))
    assert snapshot(vlm) == before


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_inner_sessions_edits_come_after_the_outers(family):
    """Doubled and then raised is not raised and then doubled."""
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    layout, outer, inner = vlm.layout(batch), DoubledScores(), ImageScores(size=3.0)
    with edited(vlm, layout, [outer]), edited(vlm, layout, [inner]):
        nested = plain(vlm, batch)
    close(nested, run(vlm, batch, outer, inner))
    assert (nested - run(vlm, batch, inner, outer)).abs().max() > 1e-2


def run_alone(vlm, batch, edit):
    with bare(vlm):
        return run(vlm, batch, edit)


def test_bare_lifts_every_edit():
    vlm = vlm_of("qwen2_5_vl")
    batch = batch_of(vlm)
    before = plain(vlm, batch)
    with edited(vlm, vlm.layout(batch), tuple(STRONG.values())):
        with bare(vlm):
            close(plain(vlm, batch), before)
        assert (plain(vlm, batch) - before).abs().max() > 1e-3


def test_only_output_edits_act_on_all_rows():
    class Everywhere(ImageBias):
        rows: ClassVar[Rows] = "all"

    vlm = vlm_of("llava")
    with pytest.raises(TypeError, match="Everywhere acts on all rows, which only output and residual edits can"):
        run(vlm, batch_of(vlm), Everywhere())


@pytest.mark.parametrize("family", TINY)
def test_an_edit_of_all_rows_changes_every_row_of_the_prompt(family):
    """Doubling all outputs of a layer is doubling the weights of its output projection."""
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    got = run(vlm, batch, Doubled(layers=LayerSet("1")))
    projection = vlm.family.attention_modules(vlm.model)[1].o_proj.weight
    with torch.no_grad():
        projection.mul_(2)
        want = plain(vlm, batch)
        projection.div_(2)
    close(got, want)
    close(run(vlm, batch, Doubled(layers=LayerSet("1")), use_cache=False), want)
    with edited(vlm, vlm.layout(batch), [ImageBias(), Doubled(layers=LayerSet("1"))]):
        assert first_edited(vlm) == 0


def test_an_edit_that_fits_no_layer_is_an_error():
    vlm = vlm_of("llava")
    with pytest.raises(UnsupportedAttentionError, match="layers 30:40, but the model has 3 layers"):
        run(vlm, batch_of(vlm), ImageBias(layers=LayerSet("30:40")))


@pytest.mark.parametrize("family", TINY)
def test_chunked_prefill_is_refused(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    plain(vlm, batch, steps=1)  # transformers hooks some vision towers on their first pass
    before = snapshot(vlm)
    with pytest.raises(UnsupportedAttentionError, match="chunked prefill"):
        run(vlm, batch, ImageBias(), prefill_chunk_size=16)
    assert snapshot(vlm) == before


def test_a_cache_from_an_earlier_call_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    behind = handed_over(vlm.model, returned(vlm.model, vlm.model(**batch, use_cache=True)))
    with (
        pytest.raises(UnsupportedAttentionError, match="behind a cache of"),
        edited(vlm, vlm.layout(batch), [ImageBias()]),
    ):
        vlm.model(input_ids=torch.full((2, 3), 40), **behind)


def test_capped_scores_are_refused(monkeypatch):
    vlm = vlm_of("gemma3")
    module = vlm.family.attention_modules(vlm.model)[0]
    monkeypatch.setattr(module, "attn_logit_softcapping", 50.0)
    with pytest.raises(UnsupportedAttentionError, match="caps its scores"):
        run(vlm, batch_of(vlm), ImageBias())


def not_registered():
    """For a process that has imported everything and opened no session."""
    assert "vlmfix" not in AttentionInterface().valid_keys()


def test_nothing_is_registered_before_the_first_session():
    assert said(not_registered) == (0, "")
    vlm = vlm_of("llava")
    run(vlm, batch_of(vlm, [0]), ImageBias(), steps=1)
    assert "vlmfix" in AttentionInterface().valid_keys()


def test_edits_never_write_into_their_argument():
    """Every edit of every decoder gets a tensor that remembers its version."""
    from tests.contracts.support import STRONG as DECODERS
    from tests.contracts.support import method_of

    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    checked = []

    def guard(edit):
        for stage in ("scores", "weights", "output"):
            if hasattr(type(edit), stage):
                checked.append(type(edit).__name__)
                original = getattr(edit, stage)

                def guarded(site, *tensors, original=original):
                    versions = [tensor._version for tensor in tensors]
                    result = original(site, *tensors)
                    assert [tensor._version for tensor in tensors] == versions
                    return result

                object.__setattr__(edit, stage, guarded)
        return edit

    class Guarded(Greedy):
        def plan(self, vlm, batch, layout):
            return DecodingPlan(edits=tuple(guard(edit) for edit in planned.edits))

    for spec in DECODERS.values():
        planned = method_of(spec).plan(vlm, batch, vlm.layout(batch))
        logits(vlm, batch, Guarded(), steps=2)
    assert set(checked) >= {"Redistribution", "LocalScores", "LocalWeights"}
