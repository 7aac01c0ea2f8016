"""GIFT against its specification's invariants."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import PICTURES, batch_of, close, logits, plain, vlm_of
from vlmfix.attention.session import edited
from vlmfix.decoders import GIFT, DecodingPlan, Greedy
from vlmfix.decoders.attention.gift import enhance, gains
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError, UsageError
from vlmfix.insight import gaze
from vlmfix.insight.gaze import most, shift_map, shift_peak
from vlmfix.upstream.cache import handed_over, returned

B, H, K = 2, 6, 12
IMAGE, QUESTION = (torch.zeros(B, K, dtype=torch.bool) for _ in range(2))
IMAGE[0, 2:7], IMAGE[1, 1:5] = True, True
QUESTION[0, 8:11], QUESTION[1, 6:9] = True, True
HALVES = {"beta": 1.0, "image_heads": 0.5, "question_heads": 0.5}


def attention(rows=1, seed=0, heads=H):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, heads, rows, K, generator=generator, dtype=torch.float64) * 1.5).softmax(-1)


def gain_of(seed=1, alpha=2.0):
    saliency = torch.rand(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return gains(saliency, IMAGE, alpha=alpha, clip=3.0)


def test_most_takes_the_first_of_equals():
    values = torch.tensor([[[3.0], [1.0], [3.0], [3.0], [0.0]]])
    assert most(values, 0.5)[0, :, 0].tolist() == [True, False, True, False, False]  # floor(2.5)
    assert most(values, 1.0).all()
    assert not most(values, 0.1).any()


def test_a_map_counts_only_what_is_gained_at_content_words():
    """Patch 2 is a sink, patch 3 fades, patch 4 gains at a content word and patch 5 elsewhere."""
    rows = torch.tensor([7, 8, 9, 10])
    weights = torch.zeros(B, H, 4, K)
    weights[:, :, :, 2] = 0.5
    weights[:, :, :, 3] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    weights[:, :, 2:, 4] = 0.2
    weights[:, :, 3:, 5] = 0.3
    weights[:, :, 2:, 0] = 0.1  # no patch
    content = torch.zeros(B, 4, dtype=torch.bool)
    content[:, 1:3] = True
    found = shift_map(weights, rows, IMAGE, content, 0.5)
    assert found[0].nonzero().flatten().tolist() == [4]
    torch.testing.assert_close(found[0, 4], torch.tensor(0.1))  # 0.2 at one of two tokens
    gain = gains(found, IMAGE, alpha=3.0, clip=3.0)
    torch.testing.assert_close(gain[0, [2, 3, 4, 5]], torch.tensor([1.0, 1.0, math.exp(3), 1.0]))


def test_a_map_is_of_the_heads_that_shift_most():
    rows = torch.tensor([7, 8])
    weights = torch.zeros(1, 4, 2, K)
    weights[0, :, 1, 3] = torch.tensor([0.1, 0.4, 0.2, 0.3])
    content = torch.tensor([[True, True]])
    for share, want in ((0.5, 0.35), (0.25, 0.4), (1.0, 0.25)):
        torch.testing.assert_close(shift_map(weights, rows, IMAGE[:1], content, share)[0, 3], torch.tensor(want))


def test_a_token_whose_predecessor_is_not_at_hand_is_left_out():
    weights = torch.rand(1, 4, 3, K, generator=torch.Generator().manual_seed(0))
    content = torch.tensor([[True, True, False]])
    assert not shift_map(weights, torch.tensor([5, 8, 9]), IMAGE[:1], content, 1.0).any()
    assert shift_map(weights, torch.tensor([7, 8, 9]), IMAGE[:1], content, 1.0).any()


def test_falling_attention_raises_nothing():
    weights = torch.linspace(1, 0.1, 4)[None, None, :, None].expand(B, H, 4, K)
    content = torch.ones(B, 4, dtype=torch.bool)
    found = shift_map(weights, torch.arange(4), IMAGE, content, 0.5)
    assert not found.any()
    assert (gains(found, IMAGE, alpha=5.0, clip=3.0) == 1).all()


def test_gains_go_from_one_to_the_exponential_of_alpha():
    gain = gain_of(alpha=2.0)
    for row in range(B):
        torch.testing.assert_close(gain[row][IMAGE[row]].min().item(), 1.0)
        torch.testing.assert_close(gain[row][IMAGE[row]].max().item(), math.exp(2.0))
    assert (gain[~IMAGE] == 1).all()


def test_gains_clip_the_map():
    saliency = torch.zeros(1, 40, dtype=torch.float64)
    saliency[0, 0], saliency[0, 1] = 100.0, 20.0
    image = torch.ones(1, 40, dtype=torch.bool)
    top = saliency.mean() + 3 * saliency.std()
    got = gains(saliency, image, alpha=1.0, clip=3.0)[0, 1]
    torch.testing.assert_close(got, (20 / top).exp())
    assert (gains(saliency, image, alpha=1.0, clip=0.0) == 1).all()


@pytest.mark.parametrize("patches", [0, 1, 5])
def test_a_map_without_differences_raises_nothing(patches):
    image = torch.arange(K)[None] < patches
    gain = gains(torch.full((1, K), 0.3), image, alpha=5.0, clip=3.0)
    assert (gain == 1).all()


def test_the_order_of_patches_does_not_matter():
    order = torch.randperm(K, generator=torch.Generator().manual_seed(4))
    saliency = torch.rand(B, K, generator=torch.Generator().manual_seed(5))
    want = gains(saliency, IMAGE, alpha=2.0, clip=3.0)
    torch.testing.assert_close(gains(saliency[:, order], IMAGE[:, order], alpha=2.0, clip=3.0), want[:, order])
    weights, gain = attention(2), gain_of()
    got = enhance(weights[..., order], IMAGE[:, order], QUESTION[:, order], gain[:, order], **HALVES)
    torch.testing.assert_close(got, enhance(weights, IMAGE, QUESTION, gain, **HALVES)[..., order])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("beta", "looking", "asking"), [(1.0, 0.5, 0.5), (2.0, 0.3, 1.0), (1.0, 1.0, 0.0)])
def test_enhancement_against_a_slow_version(rows, beta, looking, asking):
    weights, gain = attention(rows), gain_of()
    want = weights.clone()
    for b in range(B):
        shown, question = IMAGE[b].nonzero().flatten().tolist(), QUESTION[b].nonzero().flatten().tolist()
        for q in range(rows):
            mass = [float(weights[b, h, q, shown].sum()) for h in range(H)]
            text = [float(weights[b, h, q, question].sum()) for h in range(H)]
            picture_heads = sorted(range(H), key=lambda h: -mass[h])[: int(looking * H)]
            question_heads = sorted(range(H), key=lambda h: -text[h])[: int(asking * H)]
            for h in picture_heads:
                want[b, h, q, shown] *= gain[b, shown]
            ratio = sum(float(want[b, h, q, shown].sum()) for h in picture_heads) / sum(mass[h] for h in picture_heads)
            assert 1 <= ratio <= math.exp(2.0)
            for h in question_heads:
                want[b, h, q, question] *= beta * ratio
            want[b, :, q] /= want[b, :, q].sum(-1, keepdim=True)
    got = enhance(weights, IMAGE, QUESTION, gain, beta=beta, image_heads=looking, question_heads=asking)
    torch.testing.assert_close(got, want)


def test_invariants_of_enhanced_rows():
    weights, gain = attention(2), gain_of()
    got = enhance(weights, IMAGE, QUESTION, gain, **HALVES)
    torch.testing.assert_close(got.sum(-1), torch.ones(B, H, 2, dtype=torch.float64))
    assert (got >= 0).all()
    seen, text = ((weights * keys[:, None, None]).sum(-1) for keys in (IMAGE, QUESTION))
    looking, asking = most(seen, 0.5), most(text, 0.5)
    neither = ~looking & ~asking
    assert neither.any()
    torch.testing.assert_close(got[neither], weights[neither])
    b, h, q = (looking & ~asking).nonzero()[0].tolist()
    other = (~IMAGE[b]).nonzero().flatten()[:2]
    before, after = weights[b, h, q, other], got[b, h, q, other]
    torch.testing.assert_close(after[0] / after[1], before[0] / before[1])


def test_no_attention_on_the_picture_is_no_division_by_zero():
    weights = attention().masked_fill(IMAGE[:, None, None], 0.0)
    weights /= weights.sum(-1, keepdim=True)
    torch.testing.assert_close(enhance(weights, IMAGE, QUESTION, gain_of(), **HALVES), weights)


def test_samples_without_picture_or_question_are_unchanged():
    weights, none = attention(), torch.zeros_like(IMAGE)
    assert torch.equal(enhance(weights, none, QUESTION, gain_of(), **HALVES), weights)
    assert torch.equal(enhance(weights, IMAGE, none, gain_of(), **HALVES), weights)


MODEL = ("llava", "llama", 4096, 32)


@pytest.mark.parametrize(
    ("kind", "source", "target", "alpha"),
    [
        (MODEL, [11], range(12, 23), 5.0),
        (("llava", "llama", 5120, 40), [10], range(14, 21), 5.0),
        (("qwen2_vl", "qwen2_vl_text", 3584, 28), [14], range(5, 19), 4.0),
        (("qwen3_vl", "qwen3_vl_text", 4096, 36), [7], range(8, 26), 4.0),
    ],
)
def test_default_layers_and_strength(kind, source, target, alpha, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setattr("vlmfix.decoders.attention.gift._kind", lambda vlm: kind)
    monkeypatch.setattr("vlmfix.decoders.attention.gift.shift_peak", lambda vlm: 7)
    monkeypatch.setattr(type(vlm.family), "layers", lambda self, model: [None] * kind[3])
    found = [layers.resolve(kind[3]) for layers in GIFT()._layers(vlm)]
    assert found == [set(source), set(target)]
    assert GIFT()._alpha(vlm) == alpha
    assert GIFT(saliency_layers="3")._layers(vlm)[0].resolve(kind[3]) == {3}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_peak_is_where_attention_to_the_picture_is_gained(family):
    """Where queries and keys of all other layers are silenced, attention does not shift there."""
    vlm = vlm_of(family)
    assert shift_peak(vlm) in (0, 1)
    for loud in (0, 1):
        modules = [m for n, m in enumerate(vlm.family.attention_modules(vlm.model)) if n != loud]
        former = [(module.q_proj.weight, module.q_proj.weight.detach().clone()) for module in modules]
        try:
            with torch.no_grad():
                for weight, _ in former:
                    weight.zero_()
            gaze._PEAKS.pop(vlm.model, None)
            assert shift_peak(vlm) == loud
        finally:
            with torch.no_grad():
                for weight, before in former:
                    weight.copy_(before)
            gaze._PEAKS.pop(vlm.model, None)


def test_no_strength_is_the_plain_model_bit_by_bit():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    close(logits(vlm, batch, GIFT(alpha=0)), plain(vlm, batch), 0)
    assert (logits(vlm, batch, GIFT(alpha=0, beta=3, layers="1:")) - plain(vlm, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_prompts_other_rows_are_untouched_to_the_bit(family):
    """The map is read and the last row enhanced: all other states of the prompt are those of the plain model."""
    vlm = vlm_of(family)
    batch = batch_of(vlm, [0])
    method = GIFT(alpha=6, saliency_layers="0", layers="1:")
    want = vlm.model(**batch, output_hidden_states=True).hidden_states
    with method.applied(vlm, batch):
        got = vlm.model(**batch, output_hidden_states=True).hidden_states
    assert all(torch.equal(one[:, :-1], two[:, :-1]) for one, two in zip(got, want, strict=True))
    assert (got[-1][:, -1] - want[-1][:, -1]).abs().max() > 1e-3


def learned(vlm, batch, method):
    """What the enhancement of one run has learned."""
    plan = method.plan(vlm, batch, vlm.layout(batch))

    class Planned(Greedy):
        def plan(self, vlm, batch, layout):
            return plan

    logits(vlm, batch, Planned(), steps=2)
    memory = next(iter(plan.edits[-1].memory.values()))
    return dict(memory.of_keys)


def test_a_map_of_its_own_pass_equals_the_one_of_the_same_pass():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    together = learned(vlm, batch, GIFT(saliency_layers="0", layers="2"))
    apart = learned(vlm, batch, GIFT(saliency_layers="0", layers="0/2"))
    for name in ("gain", "question"):
        close(apart[name], together[name])


def test_the_map_belongs_to_the_prompt():
    vlm = vlm_of("llava")
    method = GIFT(saliency_layers="0", layers="1:")
    one, two, again = (learned(vlm, batch_of(vlm, [row]), method)["gain"] for row in (0, 1, 0))
    assert torch.equal(one, again)
    assert one.shape != two.shape
    layout = vlm.layout(batch_of(vlm, [1]))
    assert (two[~layout.tokens] == 1).all()
    close(two[layout.tokens].max(), torch.tensor(math.exp(4.0)))  # one map over both pictures
    close(two[layout.tokens].min(), torch.tensor(1.0))


@pytest.mark.parametrize("layers", ["1:", "0:"], ids=["together", "apart"])
def test_rows_without_a_picture_or_a_question_are_decoded_plainly(layers):
    vlm = vlm_of("llava")
    method = GIFT(alpha=6, saliency_layers="0", layers=layers)
    nothing = vlm.encode(["what is here?", ""], [[], PICTURES[0]])
    assert method.plan(vlm, nothing, vlm.layout(nothing)).edits == ()
    mixed = vlm.encode(["a dog here?", "hello", ""], [PICTURES[0], [], PICTURES[0]])
    got, want = logits(vlm, mixed, method), plain(vlm, mixed)
    close(got[:, 1:], want[:, 1:])
    assert (got[:, 0] - want[:, 0]).abs().max() > 1e-3


def test_content_words_matter():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [1])
    results = [logits(vlm, batch, GIFT(saliency_layers="0", words=words)) for words in ("stop-words", "all")]
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_what_told_the_words_can_be_read(monkeypatch):
    monkeypatch.setattr("vlmfix.decoders.attention.gift.has_tagger", lambda: False)
    assert GIFT().facts(vlm_of("llava")) == {"content_words": "list of English function words"}
    assert GIFT(words="all").facts(vlm_of("llava")) == {"content_words": "every word"}
    assert GIFT(words="spacy").check(vlm_of("llava")) == (
        "words=spacy needs spaCy and its model en_core_web_sm, which are not installed: "
        "pip install 'vlmfix[spacy]' && python -m spacy download en_core_web_sm"
    )
    monkeypatch.setattr("vlmfix.decoders.attention.gift.has_tagger", lambda: True)
    assert (GIFT().word_rule, GIFT(words="stop-words").word_rule) == ("spacy", "stop-words")


def test_what_cannot_act_says_so():
    vlm = vlm_of("llava")
    assert GIFT().check(vlm) is None
    assert GIFT(saliency_layers="9").check(vlm) == "saliency_layers 9 are none of the model's 3"
    assert GIFT(layers="9:").check(vlm) == "layers 9: are none of the model's 3"
    assert GIFT(saliency_layers="2").check(vlm) == "layers 3:4 are none of the model's 3"
    with pytest.raises(IncompatibleDecodersError, match="gift cannot act: layers 9: are none"):
        logits(vlm, batch_of(vlm), GIFT(layers="9:"))
    with pytest.raises(UsageError, match="alpha=30"):
        GIFT(alpha=30)


def test_a_cache_from_before_the_session_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    behind = handed_over(vlm.model, returned(vlm.model, vlm.model(**batch, use_cache=True)))
    with GIFT().applied(vlm, batch), pytest.raises(UnsupportedAttentionError, match="before its prompt"):
        vlm.model(input_ids=torch.full((2, 1), 40), **behind)


def test_decoding_without_enhancement_layers_stays_on_sdpa():
    """The layer that is only read costs nothing after the prompt."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    plan = GIFT(saliency_layers="0", layers="2").plan(vlm, batch, vlm.layout(batch))
    assert isinstance(plan, DecodingPlan)
    with edited(vlm, vlm.layout(batch), plan.edits):
        steps = vlm.family.attention_modules(vlm.model)[0]._vlmfix_plan
        assert (steps.materialises, steps.reads) == (False, True)
