"""Imbalanced attention against its specification's invariants and a slow version, on every family."""

from __future__ import annotations

import math

import pytest
import torch

from tests.attention.test_tower import whole
from tests.contracts.support import PAIR, Forced, batch_of, close, logits, picture, plain, vlm_of
from tests.contracts.test_reference import TOKENS, Slow, installed, same
from tests.decoders.attention.test_locore import site
from tests.decoders.made_vit import made_vit
from tests.heads.made import made_profile
from tests.tiny import TINY
from vlmfix.decoders import Chain, Imbalance, parse
from vlmfix.decoders.attention.imbalance import TokenGain, largest, outliers, relative_sensitivity, select, share_of
from vlmfix.decoding.encoding import encoded
from vlmfix.errors import DataError, IncompatibleDecodersError, ProfileMismatchError, UsageError
from vlmfix.insight.significance import Significance
from vlmfix.insight.vit import load_vit
from vlmfix.models.layout import Batch

WITH_CLASS = ("llava", "llava_next", "internvl")
HERE = site([5], keys=6, prompt=4, image=[1, 2], text=[0, 3])
SCORES = torch.tensor([[2.0, 3.0, -4.0, 1.0, -1.0, 5.0], [1.0, 0.0, 2.0, -6.0, 7.0, 8.0]])[
    None, :, None
]  # (1, 2, 1, 6)


def edit(gains, heads=None):
    return TokenGain(gains=torch.tensor([gains]), heads=heads)


def drawn(count, seed=0, spikes=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(3, count, generator=generator)
    values[1, torch.randperm(count, generator=generator)[:spikes]] += 9
    return Significance(*values)


# The edit


def test_both_signs_rise_and_the_rest_stays():
    got = edit([0.0, 0.7, 0.7, 0.0]).scores(HERE, SCORES)
    want = SCORES.clone()
    want[0, 0, 0, 1:3] = torch.tensor([3 * 1.7, -4 * 0.3])
    want[0, 1, 0, 1:3] = torch.tensor([0.0, 2 * 1.7])
    torch.testing.assert_close(got, want)


def test_gain_1_maps_negative_scores_to_0_and_gain_0_changes_nothing():
    assert edit([0.0, 1.0, 1.0, 0.0]).scores(HERE, SCORES)[0, 0, 0].tolist() == [2, 6, 0, 1, -1, 5]
    assert torch.equal(edit([0.0] * 4).scores(HERE, SCORES), SCORES)


def test_after_the_softmax_the_group_gains_and_the_others_keep_their_ratios():
    before, after = SCORES.softmax(-1), edit([0.0, 0.7, 0.3, 0.0]).scores(HERE, SCORES).softmax(-1)
    assert (after[..., 1:3].sum(-1) >= before[..., 1:3].sum(-1)).all()
    rest = [0, 3, 4, 5]
    torch.testing.assert_close(after[..., rest] / after[..., :1], before[..., rest] / before[..., :1])


def test_heads_have_gains_of_their_own():
    got = edit([0.0, 0.5, 0.5, 0.0], torch.tensor([[0.0, 2.0]])).scores(HERE, SCORES)
    assert torch.equal(got[0, 0], SCORES[0, 0])
    torch.testing.assert_close(got[0, 1], SCORES[0, 1] * torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0, 1.0]))


# The choice of tokens


def test_one_planted_value_is_the_summary_token():
    flat = torch.linspace(0.4, 0.6, 40)
    flat[17] = 5.0
    assert outliers(flat).nonzero().flatten().tolist() == [17]
    assert not outliers(torch.full((40,), 0.3)).any()


@pytest.mark.parametrize("count", [1, 2, 3, 10, 576])
def test_outliers_follow_tukeys_rule(count):
    import numpy as np

    values = drawn(count, seed=count, spikes=count // 10).penultimate
    low, high = np.percentile(values.double().numpy(), [25, 75])
    assert outliers(values).tolist() == (values.double().numpy() > high + 1.5 * (high - low)).tolist()


def test_groups_are_disjoint_and_no_larger_than_their_shares():
    for seed in range(20):
        significance = drawn(60, seed, spikes=5)
        groups = select(significance, local_share=0.25, spatial_share=0.05)
        assert not (groups.local & groups.summary).any()
        assert groups.local.sum() <= 15 + 3
        wanted = set(significance.first.topk(15).indices.tolist()) | set(significance.spatial.topk(3).indices.tolist())
        assert set(groups.local.nonzero().flatten().tolist()) == wanted - set(
            groups.summary.nonzero().flatten().tolist()
        )


def test_the_summary_wins_where_groups_meet():
    first = torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])
    groups = select(Significance(first, first, first), local_share=0.25, spatial_share=0.0)
    assert groups.summary.nonzero().flatten().tolist() == [0]
    assert groups.local.nonzero().flatten().tolist() == [1]


def test_tokens_without_a_value_are_neither_counted_nor_chosen():
    known = drawn(40, spikes=3)
    gaps = Significance(*(torch.cat([values[:7], torch.full((13,), torch.nan), values[7:]]) for values in known))
    want, got = (select(s, local_share=0.3, spatial_share=0.1) for s in (known, gaps))
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, torch.cat([other[:7], other[20:]]))
        assert not other[7:20].any()
    nothing = Significance(*torch.full((3, 4), torch.nan))
    assert not torch.stack(select(nothing, local_share=1.0, spatial_share=1.0)).any()


def test_of_equal_tokens_the_first_are_chosen_and_shares_are_rounded_down():
    assert largest(torch.ones(5), 2).tolist() == [True, True, False, False, False]
    assert [share_of(0.7, 10), share_of(0.25, 576), share_of(0.05, 576), share_of(0.29, 100)] == [7, 144, 28, 29]


def test_the_spatial_score_is_no_row_sum():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    layout = vlm.layout(batch)
    spatial = Imbalance().significant(vlm, batch, layout).spatial[0, layout.tokens[0]]
    assert spatial.std() > 0.05 * spatial.mean()


# The whole method


def slow_groups(first, penultimate, spatial, method):
    """Sections 2.2 and 2.5 of the specification for one picture, on lists."""
    count = len(first)

    def top(values, number):
        return sorted(range(count), key=lambda p: (-values[p], p))[:number]

    def quartile(share):
        ordered, place = sorted(penultimate), share * (count - 1)
        low = math.floor(place)
        high = min(low + 1, count - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    low, high = quartile(0.25), quartile(0.75)
    summary = top(penultimate, sum(value > high + 1.5 * (high - low) for value in penultimate))
    local = {*top(first, share_of(method.local_share, count)), *top(spatial, share_of(method.spatial_share, count))}
    return sorted(local - set(summary)), summary


def slow_significance(vlm, batch, method):
    """Three numbers for each image token of the batch, in the order of the prompts, from whole attention matrices."""
    with torch.no_grad(), whole(vlm) as matrices:
        encoded(vlm.model, batch)
    modules, start = vlm.family.tower_attention(vlm.model), vlm.family.class_tokens(vlm.model)

    def per_token(layer, row):
        sums = [row(weights) for weights in matrices[modules[layer]]]
        return vlm.family.per_token(vlm.model, batch, sums)

    def of_patches(weights):
        return weights[:, :, start:].mean(dim=1).sum(dim=1)

    def of_class(weights):
        return weights[:, :, 0].sum(dim=1)

    chosen = of_class if method.significance == "cls" else of_patches
    return per_token(0, chosen), per_token(-2, chosen), per_token(0, of_patches)


def imbalance(vlm, batch, method):
    """Section 2.3, one row of scores at a time."""
    layout, prompt = vlm.layout(batch), batch.length
    marked = batch["input_ids"] == vlm.family.image_token(vlm.model.config)
    values = torch.full((3, *marked.shape), torch.nan, dtype=torch.float64)
    values[:, marked] = torch.stack(slow_significance(vlm, batch, method)).double()
    raised = []
    for row in range(batch.rows):
        gains = {}
        for image in range(int(layout.image[row].max()) + 1):
            columns = (layout.image[row] == image).nonzero().flatten().tolist()
            local, summary = slow_groups(*values[:, row, columns].tolist(), method)
            gains |= {columns[place]: method.alpha for place in local}
            gains |= {columns[place]: method.beta for place in summary}
        raised.append(gains)

    def scores(layer, b, h, q, row):
        if q < prompt - 1 or layer not in method.layers.resolve(3):
            return row
        new = row.clone()
        for column, gain in raised[b].items():
            new[column] += gain * abs(row[column])
        return new

    return Slow(scores, same)


CASES = [(family, "received") for family in TINY] + [(family, "cls") for family in WITH_CLASS]


@pytest.mark.parametrize(
    ("family", "significance", "preset"),
    [
        pytest.param(*case, preset, marks=() if case[0] in PAIR or place % 2 == turn else pytest.mark.product)
        for turn, preset in enumerate(Imbalance.presets)
        for place, case in enumerate(CASES)
    ],
)
def test_a_whole_model_with_the_slow_method_gives_the_same_logits(family, significance, preset):
    method = Imbalance(significance=significance, preset=preset, layers="1:", local_share=0.4)
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    fast = logits(vlm, batch, method, logits_processor=[Forced(TOKENS, batch.length)])
    with installed(vlm, imbalance(vlm, batch, method)):
        slow = logits(vlm, batch, logits_processor=[Forced(TOKENS, batch.length)], use_cache=False)
    close(fast, slow, 1e-4)
    assert (fast - logits(vlm, batch, logits_processor=[Forced(TOKENS, batch.length)])).abs().max() > 1e-3


def test_pai_is_the_case_in_which_every_image_token_is_local():
    vlm = vlm_of("llava_next")
    batch = batch_of(vlm)
    image, prompt = vlm.layout(batch).tokens, batch.length

    def pai(layer, b, h, q, row):
        new = row.clone()
        if q >= prompt - 1 and layer >= 1:
            shown = image[b].nonzero().flatten()
            new[shown] = row[shown] + 0.4 * row[shown].abs()
        return new

    method = Imbalance(local_share=1, alpha=0.4, beta=0.4, layers="1:")
    fast = logits(vlm, batch, method, logits_processor=[Forced(TOKENS, batch.length)])
    with installed(vlm, Slow(pai, same)):
        slow = logits(vlm, batch, logits_processor=[Forced(TOKENS, batch.length)], use_cache=False)
    close(fast, slow, 1e-4)


@pytest.mark.parametrize("family", TINY)
def test_another_vit_works_for_every_family(family, tmp_path):
    vlm, method = vlm_of(family), Imbalance(vit=str(made_vit(tmp_path / "v")), layers="all", local_share=0.5)
    batch = batch_of(vlm)
    assert method.check(vlm) is None
    layout = vlm.layout(batch)
    gains = method.gains(vlm, batch, layout)
    assert not gains[~layout.tokens].any()
    for row in range(2):
        for image in range(row + 1):
            mine = layout.image[row] == image
            placed = int(layout.boxes[row, mine].isfinite().all(dim=-1).sum())
            assert 0 < int((gains[row, mine] > 0).sum()) <= placed
            assert int((gains[row, mine] == torch.tensor(0.7)).sum()) <= share_of(0.5, placed) + share_of(0.05, placed)
    together = logits(vlm, batch, method)
    for row in (0, 1):
        close(together[:, row], logits(vlm, batch_of(vlm, [row]), method)[:, 0])
    assert (together - plain(vlm, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("family", WITH_CLASS)
def test_the_choice_is_of_the_picture_alone(family):
    vlm, shown = vlm_of(family), picture(4, (50, 80))
    batch = vlm.encode(["what?", "is there a dog in this picture?"], [[shown], [shown.copy()]])
    layout = vlm.layout(batch)
    gains = Imbalance().gains(vlm, batch, layout)
    assert gains.any()
    torch.testing.assert_close(gains[0, layout.tokens[0]], gains[1, layout.tokens[1]])


def test_a_row_without_a_picture_is_left_alone():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what?", "hello"], [[picture(1, (40, 60))], []])
    method = Imbalance(layers="all", alpha=1)
    edited, before = logits(vlm, batch, method), plain(vlm, batch)
    close(edited[:, 1], before[:, 1])
    assert (edited[:, 0] - before[:, 0]).abs().max() > 1e-3
    words = vlm.encode(["hello"], [[]])
    close(logits(vlm, words, method), plain(vlm, words))


def test_early_layers_are_left_alone():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    seen = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output, number=number: seen.setdefault(number, []).append(output)
        )
        for number, layer in enumerate(vlm.family.layers(vlm.model))
    ]
    for method in (Imbalance(alpha=1, beta=1), "greedy"):
        logits(vlm, batch, method, steps=1)
    for hook in hooks:
        hook.remove()
    for number in (0, 1):
        assert torch.equal(*seen[number])
    edited, before = seen[2]
    torch.testing.assert_close(edited[:, :-1], before[:, :-1], atol=0, rtol=0)
    assert not torch.allclose(edited[:, -1], before[:, -1], atol=1e-3)


def test_inputs_of_ones_own_processor_will_do():
    vlm = vlm_of("internvl")
    batch = batch_of(vlm)
    method = Imbalance(layers="all")
    close(logits(vlm, Batch.of(dict(batch)), method), logits(vlm, batch, method), 0)


def test_beams_sampling_and_contrasts_go_along(tmp_path):
    vlm = vlm_of("llava")
    shown = [[picture(1, (40, 60))], [picture(2, (60, 40))]]
    for spec in ("imbalance", "imbalance:layers=all+vcd", f"imbalance:vit={made_vit(tmp_path / 'v')}"):
        for options in ({"num_beams": 2}, {"temperature": 1.0, "seed": 3}, {"static_cache": True}):
            answers = vlm.generate(shown, "what?", decoder=spec, max_new_tokens=3, **options)
            alone = [vlm.generate([row], "what?", decoder=spec, max_new_tokens=3, **options)[0] for row in shown]
            assert [answer.ids for answer in answers] == [answer.ids for answer in alone]


def test_branches_are_not_edited():
    """The branch with the noised picture stays the plain model's: fused is twice clean less branch, and clean moves."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    chain = Chain(decoders=(Imbalance(layers="all", alpha=1), parse("vcd:contrast=1,plausibility=0")))
    both = logits(vlm, batch, chain, steps=1)
    contrast = logits(vlm, batch, "vcd:contrast=1,plausibility=0", steps=1)
    clean, edited = plain(vlm, batch, steps=1), logits(vlm, batch, chain.decoders[0], steps=1)
    branch = 2 * clean - contrast
    close(2 * edited - branch, both, 1e-3)


# Heads


def test_gains_by_head_follow_the_profile(tmp_path):
    vlm = vlm_of("llava")
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.1
    path = tmp_path / "heads.safetensors"
    made_profile(vlm, "image-mass", scores).save(path)
    method = Imbalance(sensitivity=0.5, profile=str(path), least_gain=0, most_gain=10)
    assert method.check(vlm) is None
    gains = method.head_gains(vlm)
    torch.testing.assert_close(gains, 1 + 0.5 * (scores / scores.mean(1, keepdim=True) - 1))
    torch.testing.assert_close(gains.mean(dim=1), torch.ones(3))
    narrow = Imbalance(sensitivity=5, profile=str(path), least_gain=0.5, most_gain=1.5).head_gains(vlm)
    assert (narrow.min(), narrow.max()) == (0.5, 1.5)
    assert method.facts(vlm)["profile"].startswith("image-mass in heads.safetensors")
    batch = batch_of(vlm)
    apart = logits(vlm, batch, Imbalance(sensitivity=2, profile=str(path), layers="all"))
    assert (apart - logits(vlm, batch, Imbalance(layers="all"))).abs().max() > 1e-3


def test_without_sensitivity_no_profile_is_read(tmp_path):
    vlm = vlm_of("llava")
    assert Imbalance().check(vlm) is None
    assert "profile" not in Imbalance().facts(vlm)
    with pytest.raises(UsageError, match=r"profile=.*missing\.safetensors does nothing with sensitivity=0"):
        Imbalance(profile=str(tmp_path / "missing.safetensors"))


def test_a_profile_that_is_missing_or_of_another_model_is_refused(tmp_path):
    vlm = vlm_of("llava")
    assert "vlmfix profile --model llava --profiler image-mass" in Imbalance(sensitivity=1).check(vlm)
    with pytest.raises(IncompatibleDecodersError, match="no image-mass profile"):
        logits(vlm, batch_of(vlm), Imbalance(sensitivity=1))
    path = tmp_path / "heads.safetensors"
    made_profile(vlm_of("internvl"), "image-mass").save(path)
    for method in (Imbalance(sensitivity=1, profile=str(path)), Imbalance(sensitivity=1, profile=str(tmp_path / "no"))):
        assert method.check(vlm)
    with pytest.raises(ProfileMismatchError):
        Imbalance(sensitivity=1, profile=str(path)).facts(vlm)


def test_heads_of_a_layer_that_never_looks_are_alike():
    assert relative_sensitivity(torch.tensor([[0.0, 0.0], [0.1, 0.3]])).tolist() == [[1, 1], [0.5, 1.5]]


# What is refused


def test_parameters_that_contradict_each_other_are_refused():
    assert [Imbalance(preset=name).beta for name in Imbalance.presets] == [0.4, 0.3]
    assert [Imbalance(preset=name).spatial_share for name in Imbalance.presets] == [0.05, 0.0]
    for wrong in ({"significance": "vit"}, {"significance": "cls", "vit": "x"}, {"least_gain": 3.0}):
        with pytest.raises(UsageError):
            Imbalance(**wrong)
    assert Imbalance(vit="x").chosen_by == "vit"
    assert Imbalance(vit="x", significance="vit") != Imbalance(vit="x")


@pytest.mark.parametrize("family", [family for family in TINY if family not in WITH_CLASS])
def test_a_tower_without_a_class_token_names_the_two_ways_out(family):
    vlm = vlm_of(family)
    reason = Imbalance().check(vlm)
    assert "no class token" in reason
    assert "vit=" in reason
    assert "significance=received" in reason
    with pytest.raises(IncompatibleDecodersError, match="no class token"):
        logits(vlm, batch_of(vlm), Imbalance())


def test_what_cannot_act_says_why(tmp_path):
    vlm = vlm_of("llava")
    assert "none of layers 7" in Imbalance(layers="7").check(vlm)
    assert "cannot load the ViT 'nothing'" in Imbalance(vit="nothing").check(vlm)
    with pytest.raises(DataError, match="cannot load the ViT"):
        Imbalance(vit="nothing").facts(vlm)


def test_a_card_says_what_tokens_are_chosen_by(tmp_path):
    vlm, name = vlm_of("llava"), str(made_vit(tmp_path / "v"))
    assert "class token of the model's vision tower" in Imbalance().facts(vlm)["significance"]
    assert "patches" in Imbalance(significance="received").facts(vlm)["significance"]
    said = Imbalance(vit=name).facts(vlm)
    assert said["significance"] == f"attention of the class token of the ViT {name}"
    assert said["vit_digest"] == f"sha256:{load_vit(name, vlm.device).digest()}"
