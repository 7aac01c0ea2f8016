"""ACT against its specification's invariants, a slow version and planted sinks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from tests.contracts.support import batch_of, close, logits, plain, vlm_of
from tests.decoders.attention.test_locore import site
from vlmfix.attention.edit import LayerSet, Memory
from vlmfix.decoders import ACT, parse
from vlmfix.decoders.attention.act import Calibration, SinkSearch, published, read_heads, write_heads
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError, UsageError

N, H = 10, 3
PROMPT = dataclasses.replace(
    site(list(range(N)), keys=N, prompt=N, image=[2, 3, 4], text=[0, 1, *range(5, N)]),
    prefill=True,
    allowed=torch.ones(N, N, dtype=torch.bool).tril()[None, None],
)


def maps(seed=0, planted=()):
    """(1, H, N, N) causal attention; the planted columns draw most of every row that sees them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, H, N, N, generator=generator, dtype=torch.float64)
    scores[..., list(planted)] += 6 - scores[..., list(planted)]
    return scores.masked_fill(~PROMPT.allowed, float("-inf")).softmax(-1)


def edit(**changed):
    """All heads of one layer; the paper's threshold of 5 / N is out of reach in a prompt of ten."""
    settings = {"factor": 1.5, "threshold": None, "first_sink": False, "tail": 0, **changed}
    kept = settings.pop("kept", 0.4)
    return Calibration(search=SinkSearch(**settings), chosen=torch.ones(1, H, dtype=torch.bool), kept=kept)


def applied(method, here, full):
    """What the method makes of a prompt's map: the search reads it, the edit changes it."""
    method.search.read(here, full)
    return method.weights(dataclasses.replace(here, memory=method.memory.setdefault(0, Memory())), full)


def calibrate(weights, sink, kept):
    keys = weights.shape[-1]
    here = site([keys - 1], keys=keys, prompt=keys, image=[], text=[0])
    here = dataclasses.replace(here, prefill=False, memory=Memory({}, {"sinks": sink}))
    return edit(kept=kept).weights(here, weights)


def slow(full, theta, beta, *, first_sink=False, tail=0):
    """The specification's lines, one head and row at a time."""
    new = full.clone()
    for h in range(H):
        average = [float(sum(full[0, h, i, j] for i in range(N))) / (N - j) for j in range(N)]
        sinks = [j for j in range(N - tail) if average[j] > theta]
        sinks = sinks[1:] if first_sink else [j for j in sinks if j != 0]
        for i in range(N):
            clear = full[0, h, i].clone()
            if i >= 1:
                clear[sinks] = 0
            ratios = clear / clear.sum()
            available = (1 - beta) * full[0, h, i, sinks].sum()
            new[0, h, i, sinks] *= beta
            new[0, h, i] += available * ratios
        new[0, h, 0, 0] = 1
    return new


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("changed", "theta"),
    [
        ({}, 0.15),
        ({"factor": 3.0}, 0.3),
        ({"threshold": 0.1}, 0.1),
        ({"threshold": 0.2, "first_sink": True}, 0.2),
        ({"threshold": 0.1, "tail": 3}, 0.1),
    ],
)
def test_against_the_slow_version(beta, changed, theta):
    for seed in range(3):
        full = maps(seed, planted=[seed + 1])
        got = applied(edit(kept=beta, **changed), PROMPT, full)
        want = slow(full, theta, beta, first_sink=changed.get("first_sink", False), tail=changed.get("tail", 0))
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_invariants():
    full = maps(planted=[5])
    method = edit(threshold=0.3)
    got = applied(method, PROMPT, full)
    torch.testing.assert_close(got.sum(-1), torch.ones(1, H, N, dtype=torch.float64), atol=1e-15, rtol=0)
    assert (got[~PROMPT.allowed.expand_as(got)] == 0).all()
    assert torch.equal(got[:, :, 0], full[:, :, 0])
    assert (got[..., 0] >= full[..., 0]).all()
    (sink,) = (memory.of_keys["sinks"] for memory in method.memory.values())
    assert sink[0, :, 5].all()
    kept = (~sink)[:, :, None] & (full > 0)
    ratio = torch.where(kept, got / full, torch.nan)
    same = ratio.nanmean(-1, keepdim=True).expand_as(ratio)
    torch.testing.assert_close(ratio[kept], same[kept])


@pytest.mark.parametrize("changed", [{"kept": 1.0}, {"threshold": 1.0}, {"factor": 10.0}, {"tail": N}])
def test_identities(changed):
    full = maps(planted=[5])
    torch.testing.assert_close(applied(edit(**changed), PROMPT, full), full, atol=1e-15, rtol=0)


def test_planted_sinks_are_found():
    method = edit(threshold=0.3)
    applied(method, PROMPT, maps(planted=[3, 6]))
    assert method.memory[0].of_keys["sinks"].all(1)[0].nonzero().flatten().tolist() == [3, 6]
    assert method.memory[0].of_keys["sinks"].any(1)[0, [0, 1, 2, 4]].sum() == 0


def test_sparing_the_first_sink_spares_a_real_one_where_the_first_token_is_none():
    full = maps(planted=[3, 6])
    assert (full[..., 0].sum(2) / N < 0.3).all()
    method = edit(threshold=0.3, first_sink=True)
    applied(method, PROMPT, full)
    assert not method.memory[0].of_keys["sinks"][..., 3].any()
    assert method.memory[0].of_keys["sinks"][..., 6].all()


def test_no_kept_share_empties_sinks_and_a_lone_first_token_takes_all():
    full = maps(planted=[5])
    got = applied(edit(threshold=0.3, kept=0.0), PROMPT, full)
    assert (got[..., 5] == 0).all()
    everything = calibrate(full, (torch.arange(N) > 0).expand(1, H, N), kept=0.0)
    torch.testing.assert_close(everything[..., 0], torch.ones(1, H, N, dtype=torch.float64))
    assert everything.isfinite().all()


def test_a_row_of_sinks_alone_is_unchanged():
    row = torch.tensor([[[[0.0, 0.25, 0.75]]]])
    assert torch.equal(calibrate(row, torch.tensor([[[False, True, True]]]), kept=0.4), row)


def test_a_head_that_is_not_chosen_is_untouched():
    full = maps(planted=[5])
    method = dataclasses.replace(edit(threshold=0.3), chosen=torch.tensor([[True, False, True]]))
    got = applied(method, PROMPT, full)
    assert torch.equal(got[:, 1], full[:, 1])
    assert (got != full)[:, [0, 2], -1].any(-1).all()


def test_decoding_keeps_the_prompts_sinks_and_the_row_sums():
    method = edit(threshold=0.3, kept=0.5)
    applied(method, PROMPT, maps(planted=[5]))
    row = torch.full((1, H, 1, N + 2), 1 / (N + 2), dtype=torch.float64)
    step = site([N + 1], keys=N + 2, prompt=N, image=[2, 3, 4], text=[0, 1, *range(5, N)])
    step = dataclasses.replace(step, prefill=False)
    got = method.weights(dataclasses.replace(step, memory=method.memory[0]), row)
    torch.testing.assert_close(got.sum(-1), torch.ones(1, H, 1, dtype=torch.float64))
    torch.testing.assert_close(got[..., 5], row[..., 5] / 2)
    with pytest.raises(UnsupportedAttentionError, match="before its prompt"):
        edit().weights(step, row)


def test_padding_is_no_part_of_the_prompt():
    """Two keys of padding before the same prompt change neither its sinks nor its map."""
    full, pad = maps(planted=[5]), 2
    wide = torch.zeros(1, H, N + pad, N + pad, dtype=torch.float64)
    wide[:, :, pad:, pad:] = full
    wide[:, :, :pad] = 1 / (N + pad)  # what the softmax of a row that sees nothing gives
    allowed = torch.nn.functional.pad(PROMPT.allowed, (pad, 0, pad, 0))
    rows = list(range(N + pad))
    here = site(rows, keys=N + pad, prompt=N + pad, image=[4, 5, 6], text=[2, 3, *range(7, N + pad)])
    here = dataclasses.replace(here, prefill=True, allowed=allowed)
    for changed in ({}, {"threshold": 0.2, "first_sink": True}):
        got = applied(edit(**changed), here, wide)[:, :, pad:, pad:]
        torch.testing.assert_close(got, applied(edit(**changed), PROMPT, full))


def test_the_released_lists():
    assert (len(published("classification")), len(published("multiple-choice"))) == (184, 74)
    assert {layer for layer, _ in published("classification")} == set(range(2, 31)) - {28}
    assert (31, 4) in published("multiple-choice")
    assert all(0 <= head < 32 for name in ("classification", "multiple-choice") for _, head in published(name))


def test_heads_are_read_and_written():
    assert read_heads("L10H2/L2H31") == {(10, 2), (2, 31)}
    assert write_heads(read_heads("L10H2/L2H31/L2H4")) == "L2H4/L2H31/L10H2"
    for text in ("", "L2", "2:8", "L2H8,L3H1", "L2H8/"):
        with pytest.raises(UsageError, match="heads="):
            ACT(heads=text)


def test_presets():
    paper, code = ACT(), ACT(preset="official-code")
    assert (paper.sink_threshold, paper.sink_factor, paper.spared, paper.spared_tail) == (None, 5.0, "first-token", 3)
    assert (code.sink_threshold, code.spared, code.spared_tail) == (0.1, "first-sink", 0)
    assert paper.kept_fraction == code.kept_fraction == 0.4


def test_a_model_without_published_heads_says_so():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    assert "no calibrated heads are published" in ACT().check(vlm)
    with pytest.raises(IncompatibleDecodersError, match=r"act cannot act.*heads=all"):
        logits(vlm, batch, ACT())
    assert "L5H0/L5H9 are outside the model's 3 layers of 8 heads" in ACT(heads="L5H9/L2H1/L5H0").check(vlm)
    assert "none of its heads are in layers 0:1" in ACT(heads="L2H1", layers="0:1").check(vlm)
    assert ACT(heads="L1H7", layers="all").check(vlm) is None


def test_a_model_of_llama_2s_shape_has_the_published_heads(monkeypatch):
    vlm = vlm_of("llava")
    text = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
    monkeypatch.setattr(type(vlm.model.config), "get_text_config", lambda self: text)
    monkeypatch.setattr(type(vlm.family), "layers", lambda self, model: [None] * 32)
    assert ACT().check(vlm) is None
    (_, calibration) = ACT().plan(vlm, None, None).edits
    assert int(calibration.chosen.sum()) == 184
    assert calibration.layers.resolve(32) == frozenset(range(2, 31)) - {28}
    (_, fewer) = ACT(heads="multiple-choice").plan(vlm, None, None).edits
    assert int(fewer.chosen.sum()) == 72  # the two of the last layer are outside layers 2:-1


def test_unlisted_layers_are_not_touched():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    (_, only) = ACT(heads="L1H7/L2H3", layers="0:2").plan(vlm, batch, vlm.layout(batch)).edits
    assert only.layers == LayerSet("1")
    assert only.chosen.nonzero().tolist() == [[1, 7]]
    close(logits(vlm, batch, ACT(heads="all", layers="all", sink_threshold=1.0)), plain(vlm, batch))


def test_a_preset_does_not_replace_a_threshold_that_was_given():
    assert ACT(preset="official-code", heads="all").sink_threshold == 0.1
    assert ACT(heads="all").sink_threshold is None
    none = parse("act:preset=official-code,heads=all,sink_threshold=none")
    assert none.sink_threshold is None
    assert parse(none.spec()) == none == ACT(preset="official-code", heads="all", sink_threshold=None)
    assert parse("act:preset=official-code,heads=all,sink_threshold=0.15").sink_threshold == 0.15
