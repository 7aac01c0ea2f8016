"""VHR against its specification's invariants."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import LogitsProcessor

from tests.contracts.support import PICTURES, STRONG, Forced, batch_of, close, logits, method_of, plain, vlm_of
from tests.heads.made import made_profile
from tests.tiny import TINY
from vlmfix.attention.edit import ScoreEdit
from vlmfix.decoders import VHR, Chain, DecodingPlan, Greedy
from vlmfix.decoders.attention.vhr import Choice, DivergentHeads, upper_half
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError, UsageError
from vlmfix.heads.profile import HeadProfile
from vlmfix.upstream.cache import handed_over, returned
from vlmfix.upstream.names import TextNames

B, H, D = 2, 8, 6
PAPER = Choice(squared=False, drop=True, guard=0.0)
OFFICIAL = Choice(squared=True, drop=True, guard=1.0)


def outputs(seed=0, heads=H, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shown, blind = (torch.randn(B, heads, D, generator=generator) for _ in range(2))
    return shown * scale, blind * scale


def moved_by(distances, *, blind=1.0):
    """Outputs whose head i moves by a distance, while its length without the picture is another."""
    lengths = torch.tensor(blind).expand(len(distances)) if isinstance(blind, float) else torch.tensor(blind)
    without, direction = torch.zeros(1, len(distances), D), torch.zeros(1, len(distances), D)
    without[0, :, 0], direction[0, :, 1] = lengths, torch.tensor(distances)
    return without + direction, without


@pytest.mark.parametrize("rule", [PAPER, OFFICIAL])
@pytest.mark.parametrize("heads", [8, 9])
def test_half_of_the_heads_are_chosen(rule, heads):
    chosen = rule.heads(*outputs(heads=heads))
    assert chosen.sum(dim=1).tolist() == [heads // 2] * B


def test_the_distance_is_symmetric_and_rows_do_not_mix():
    rule = Choice(squared=False, drop=False, guard=0.0)
    shown, blind = outputs()
    assert torch.equal(rule.heads(shown, blind), rule.heads(blind, shown))
    assert torch.equal(rule.heads(shown.flip(0), blind.flip(0)), rule.heads(shown, blind).flip(0))


def test_heads_that_do_not_move_are_not_chosen():
    shown, blind = outputs()
    for rule in (PAPER, OFFICIAL):
        assert not rule.heads(shown, shown).any()
        nearly = shown * (1 + 1e-7 * torch.randn(shown.shape, generator=torch.Generator().manual_seed(3)))
        assert not rule.heads(nearly, shown).any()  # rounding is no movement
    shown[:, 3:] = blind[:, 3:]  # more than half do not move: all that do are chosen
    assert Choice(squared=False, drop=False, guard=0.0).heads(shown, blind).tolist() == [[True] * 3 + [False] * 5] * B


def test_ties_are_not_above_the_median():
    assert not PAPER.heads(*moved_by([1.0] * 8)).any()
    assert PAPER.heads(*moved_by([1.0] * 6 + [2.0, 2.0])).tolist() == [[False] * 6 + [True] * 2]


def test_heads_that_flare_up_without_the_picture_are_passed_over():
    distances, flaring = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 9.0], [1.0] * 7 + [20.0]
    for rule in (PAPER, OFFICIAL):
        assert not rule.heads(*moved_by(distances, blind=flaring))[0, 7]
        assert rule.heads(*moved_by(distances))[0, 7]  # large movement alone is no outlier
    kept = Choice(squared=False, drop=False, guard=0.0)
    assert kept.heads(*moved_by(distances, blind=flaring))[0, 7]


def test_the_released_guard_depends_on_the_scale_and_the_papers_does_not():
    distances, flaring = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 9.0], [1.0] * 7 + [20.0]
    small = [tensor * 1e-2 for tensor in moved_by(distances, blind=flaring)]
    assert not PAPER.heads(*small)[0, 7]
    assert OFFICIAL.heads(*small)[0, 7]


def test_squares_do_not_overflow_in_half_precision():
    shown, blind = (tensor.half() for tensor in outputs(scale=300.0))
    assert torch.equal(PAPER.heads(shown, blind), PAPER.heads(shown.float(), blind.float()))
    assert PAPER.heads(shown, blind).any()


@pytest.mark.parametrize(
    ("count", "paper", "official"),
    [
        (32, {1, *range(18, 32)}, {1, *range(18, 32)}),
        (40, {1, *range(22, 40)}, {1, *range(26, 40)}),
        (28, {1, *range(16, 28)}, {1, *range(14, 28)}),
        (36, {1, *range(20, 36)}, {1, *range(22, 36)}),
        (3, {1, 2}, {0, 1, 2}),
    ],
)
def test_default_layers(count, paper, official, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setattr(type(vlm.family), "layers", lambda self, model: [None] * count)
    assert VHR()._layers(vlm).resolve(count) == paper
    assert VHR(preset="official-code")._layers(vlm).resolve(count) == official


def test_presets_and_gains():
    assert (VHR().distance, VHR().outlier_guard) == ("euclidean", 0.0)
    assert (VHR(preset="official-code").distance, VHR(preset="official-code").outlier_guard) == ("squared", 1.0)
    assert [VHR()._alpha(vlm_of(family)) for family in ("llava", "internvl")] == [2.0, 1.5]
    with pytest.raises(UsageError, match="alpha=11"):
        VHR(alpha=11)


def planned(vlm, batch, method):
    """The edit of one plan, and a decoder that has exactly this plan."""
    plan = method.plan(vlm, batch, vlm.layout(batch))

    class Planned(Greedy):
        def plan(self, vlm, batch, layout):
            return plan

    (edit,) = plan.edits
    return edit, Planned()


def test_a_gain_of_one_changes_no_bit():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    close(logits(vlm, batch, VHR(alpha=1, layers="all")), plain(vlm, batch), 0)


def test_a_gain_is_one_on_the_heads_columns_of_the_output_projection():
    """With alpha 0 that is taking the heads away."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [1])
    for alpha in (0.0, 2.5):
        edit, method = planned(vlm, batch, VHR(alpha=alpha, layers="1:"))
        got = logits(vlm, batch, method)
        weights = {layer: vlm.family.attention_modules(vlm.model)[layer].o_proj.weight for layer in edit.memory}
        former = {layer: weight.detach().clone() for layer, weight in weights.items()}
        try:
            with torch.no_grad():
                for layer, memory in edit.memory.items():
                    columns = memory.of_rows["heads"][0].repeat_interleave(8)
                    assert columns.sum() == 32
                    weights[layer][:, columns] *= alpha
            close(got, plain(vlm, batch))
        finally:
            with torch.no_grad():
                for layer, weight in former.items():
                    weights[layer].copy_(weight)


class Watch(LogitsProcessor):
    """Keeps the heads that an edit has chosen, step by step."""

    def __init__(self, edit):
        self.edit, self.seen = edit, []

    def __call__(self, input_ids, scores):
        self.seen.append({layer: memory.of_rows["heads"] for layer, memory in self.edit.memory.items()})
        return scores


def test_heads_are_chosen_once_and_anew_for_every_prompt():
    vlm = vlm_of("qwen2_5_vl")
    method = VHR(alpha=3, layers="all")
    chosen = []
    for row, tokens in ((0, [40, 50, 60]), (0, [70, 80, 90]), (1, [40, 50, 60])):
        batch = batch_of(vlm, [row])
        edit, decoder = planned(vlm, batch, method)
        watch = Watch(edit)
        logits(vlm, batch, decoder, logits_processor=[watch, Forced(torch.tensor([tokens]), batch.length)])
        assert len(watch.seen) == 3
        assert all(after[layer] is watch.seen[0][layer] for after in watch.seen for layer in range(3))
        chosen.append(torch.cat([memory.of_rows["heads"] for memory in edit.memory.values()]))
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


@dataclass(frozen=True, eq=False, kw_only=True)
class Averted(ScoreEdit):
    """Text does not look at the picture."""

    def scores(self, site, scores):
        return scores.masked_fill(site.image_keys[:, None, None], -1e9)


@dataclass(frozen=True, kw_only=True)
class Avert(Greedy):
    def plan(self, vlm, batch, layout):
        return DecodingPlan(edits=(Averted(),))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_model_that_does_not_look_has_no_such_heads(family):
    """But for the shift of positions, which makes every head move."""
    vlm = vlm_of(family)
    batch = batch_of(vlm, [0])
    before = logits(vlm, batch, Avert())
    still = logits(vlm, batch, Chain(decoders=(Avert(), VHR(alpha=3, layers="all", keep_positions=True))))
    close(still, before, 1e-5)
    shifted = logits(vlm, batch, Chain(decoders=(Avert(), VHR(alpha=3, layers="all"))))
    assert (shifted - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("spec", [STRONG["vhr"], "vhr:alpha=3,layers=all,reinforce_text_branch=true"])
def test_rows_without_a_picture_are_decoded_plainly(family, spec):
    vlm = vlm_of(family)
    nothing = vlm.encode(["what is here?", "hello"], [[], []])
    assert method_of(spec).plan(vlm, nothing, vlm.layout(nothing)).edits == ()
    close(logits(vlm, nothing, spec), plain(vlm, nothing), 0)
    mixed = vlm.encode(["what is here?", "hello"], [PICTURES[0], []])
    got, want = logits(vlm, mixed, spec), plain(vlm, mixed)
    close(got[:, 1], want[:, 1])
    assert (got[:, 0] - want[:, 0]).abs().max() > 1e-3


def test_the_model_is_asked_without_the_picture_once():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    passes = []
    handle = vlm.family.decoder(vlm.model).register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs[TextNames.of(module).embeds].shape[1]), with_kwargs=True
    )
    try:
        logits(vlm, batch, VHR())
    finally:
        handle.remove()
    longest = (batch.attention_mask.bool() & ~vlm.layout(batch).tokens).sum(dim=1).max()
    assert passes == [longest, batch.length, 1, 1]


@pytest.fixture
def profiled(tmp_path):
    def written(vlm, scores=None, profiler="vhd"):
        path = tmp_path / f"{vlm.name}.safetensors"
        made_profile(vlm, profiler, scores).save(path)
        return str(path)

    return written


def test_the_upper_half_of_a_profile():
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0]])
    expected = [[True, False, False, True], [False] * 4, [False, True, False, False]]
    assert upper_half(scores).tolist() == expected
    assert upper_half(torch.arange(5.0)[None]).tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize("family", TINY)
def test_heads_of_a_profile_are_multiplied_in_every_row(family, profiled):
    """As if their columns of the output projection were larger, while the model is not asked without its pictures."""
    vlm = vlm_of(family)
    batch, file = batch_of(vlm), profiled(vlm)
    heads = upper_half(HeadProfile.load(file).scores)
    projections = [module.o_proj.weight for module in vlm.family.attention_modules(vlm.model)]
    former = [weight.detach().clone() for weight in projections]
    passes = []
    decoder = vlm.family.decoder(vlm.model)
    handle = decoder.register_forward_hook(lambda module, args, output: passes.append(1))
    try:
        got = logits(vlm, batch, VHR(alpha=2.5, layers="1:", profile=file))
    finally:
        handle.remove()
    assert len(passes) == 3
    try:
        with torch.no_grad():
            for layer in (1, 2):
                projections[layer][:, heads[layer].repeat_interleave(8)] *= 2.5
        close(got, plain(vlm, batch))
    finally:
        with torch.no_grad():
            for weight, before in zip(projections, former, strict=True):
                weight.copy_(before)
    assert (got - plain(vlm, batch)).abs().max() > 1e-3


def test_a_profile_leaves_rows_without_a_picture_alone_and_goes_with_beams(profiled):
    vlm = vlm_of("llava")
    method = VHR(alpha=3, layers="all", profile=profiled(vlm))
    mixed = vlm.encode(["what is here?", "hello"], [PICTURES[0], []])
    got, want = logits(vlm, mixed, method), plain(vlm, mixed)
    close(got[:, 1], want[:, 1])
    assert (got[:, 0] - want[:, 0]).abs().max() > 1e-3
    options = {"num_beams": 3, "max_new_tokens": 4}
    both = vlm.generate([PICTURES[0], PICTURES[1]], "what is here?", decoder=method, **options)
    for row in range(2):
        (alone,) = vlm.generate([PICTURES[row]], "what is here?", decoder=method, **options)
        assert both[row].ids == alone.ids


def test_profiles_that_do_not_fit(profiled):
    vlm = vlm_of("llava")
    assert VHR(profile="no.safetensors").check(vlm).startswith("vhr: cannot read the profile no.safetensors")
    assert "holds ablation" in VHR(profile=profiled(vlm, profiler="ablation")).check(vlm)
    assert "measured on" in VHR(profile=profiled(vlm_of("internvl"))).check(vlm)
    for option in ("keep_positions", "reinforce_text_branch"):
        with pytest.raises(UsageError, match=f"{option}=true does nothing with profile=heads.safetensors"):
            VHR(profile="heads.safetensors", **{option: True})
    assert VHR().facts(vlm) == {}
    assert VHR(profile=profiled(vlm)).facts(vlm)["profile"] == "vhd in llava.safetensors"


def test_layers_that_the_model_lacks_are_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    assert VHR().check(vlm) is None
    assert VHR(layers="30:").check(vlm) == "layers 30: are none of the model's 3"
    with pytest.raises(IncompatibleDecodersError, match="vhr cannot act: layers 30: are none"):
        logits(vlm, batch, VHR(layers="30:"))


def test_a_cache_from_before_the_session_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    behind = handed_over(vlm.model, returned(vlm.model, vlm.model(**batch, use_cache=True)))
    with VHR().applied(vlm, batch), pytest.raises(UnsupportedAttentionError, match="before its prompt"):
        vlm.model(input_ids=torch.full((2, 1), 40), **behind)


def test_the_default_measures_while_the_prompt_is_read():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    (edit,) = VHR().plan(vlm, batch, vlm.layout(batch)).edits
    assert isinstance(edit, DivergentHeads)
    assert edit.memory == {}
    assert {layer: tuple(blind.shape) for layer, blind in edit.blind.items()} == {1: (2, 8, 8), 2: (2, 8, 8)}
