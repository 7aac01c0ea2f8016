"""Single steps of the profilers against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.contracts.support import picture, vlm_of
from vlmfix.errors import LayoutError, UnsupportedModelError, UsageError
from vlmfix.heads.measure import profile
from vlmfix.heads.profilers import patching
from vlmfix.heads.profilers.ablation import Ablation
from vlmfix.heads.profilers.active import Active
from vlmfix.heads.profilers.echo import Echo
from vlmfix.heads.profilers.influence import Influence
from vlmfix.heads.profilers.localization import Localization, elbow, selected, spatial_entropy
from vlmfix.heads.profilers.non_sink import NonSink
from vlmfix.heads.profilers.patching import Patching
from vlmfix.heads.profilers.retrieval import Retrieval
from vlmfix.heads.profilers.sink_tokens import SinkTokens, active_range, label
from vlmfix.heads.profilers.vhd import without_image_tokens
from vlmfix.insight.gaze import gaze_shift
from vlmfix.insight.wording import Tail, decoded, question_columns
from vlmfix.insight.work import Work


def a_map(*lines):
    return torch.tensor([[float(cell == "#") for cell in line] for line in lines])[None]


@pytest.mark.parametrize(
    ("lines", "entropy"),
    [
        (("##..", "##..", "....", "...."), 0.0),
        (("##..", "....", "....", "..##"), math.log(2)),
        (("#.#.", ".#.#", "#.#.", ".#.#"), 0.0),  # corners touch
        (("....", "....", "....", "...."), math.inf),
        (("###.", "....", "....", "...#"), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
    ],
)
def test_spatial_entropy(lines, entropy):
    assert float(spatial_entropy(a_map(*lines))) == pytest.approx(entropy)


def test_the_elbow_parts_low_from_high():
    assert 0.1 < elbow(torch.tensor([0.9, 0.05, 0.1, 0.0, 0.95])) < 0.9
    assert 0.0 < elbow(torch.tensor([0.9, 0.92, 0.0, 0.95, 0.99])) < 0.9
    assert elbow(torch.tensor([0.3])) == pytest.approx(0.3)


def test_selection_wants_mass_first_then_low_entropy_and_breaks_ties_by_mass():
    mass = torch.tensor([[0.9, 0.5, 0.6], [0.1, 0.8, 0.7]])
    entropy = torch.tensor([[2.0, 0.0, 0.0], [0.0, math.inf, 1.0]])
    assert selected(mass, entropy, 0.4, 1).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert selected(mass, entropy, 0.4, 3).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert selected(mass, entropy, 0.4, 9).tolist() == [[1, 1, 1], [0, 0, 1]]


def test_gaze_shift_counts_gains_alone():
    rows = torch.tensor([4, 5, 6, 8])  # 7 is missing: 8 has nothing to be held against
    weights = torch.tensor([[0.1, 0.4, 0.5], [0.3, 0.3, 0.4], [0.2, 0.6, 0.2], [0.9, 0.1, 0.0]])[None, None]
    image = torch.tensor([[True, True, False]])
    every = torch.ones(1, 4, dtype=torch.bool)
    assert float(gaze_shift(weights, rows, image, every)) == pytest.approx(0.2 + 0.3)
    assert float(gaze_shift(weights, rows, image, torch.tensor([[True, False, True, True]]))) == pytest.approx(0.3)
    falling = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.4, 0.2], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])[None, None]
    assert float(gaze_shift(falling, torch.arange(4), image, every)) == 0


def test_words_are_found_in_the_prompt():
    vlm = vlm_of("qwen2_vl")
    questions = ["is the 7 red?", "and what about the long green snake over there?"]
    batch = vlm.encode(questions, [[picture(1, (40, 60))], [picture(2, (40, 40))]])
    work = Work(vlm, batch, vlm.layout(batch), 0, 0)
    tokenizer = vlm.processor.tokenizer

    def said(mask):
        return [tokenizer.decode(ids[row]) for ids, row in zip(batch["input_ids"], mask, strict=True)]

    assert said(question_columns(work, content=False)) == questions
    assert said(question_columns(work, content=True)) == ["7red", "longgreensnake"]
    silent = vlm.encode(["is it?"], [[picture(1, (40, 60))]])
    work = Work(vlm, silent, vlm.layout(silent), 0, 0)
    assert tokenizer.decode(silent["input_ids"][question_columns(work, content=True)]) == "is it?"
    with pytest.raises(LayoutError, match="does not hold"):
        Tail.of(work, 0).find("an elephant")


def test_a_token_owns_the_characters_that_it_finishes_and_those_that_it_begins():
    tokenizer = vlm_of("llava").processor.tokenizer
    ids = tokenizer("aé🐈b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1 + 2 + 4 + 1
    assert decoded(tokenizer, ids) == ("aé🐈b", (1, 2, 2, 3, 3, 3, 3, 4))
    closed = [*ids, tokenizer.eos_token_id]
    assert decoded(tokenizer, closed, special=False) == ("aé🐈b", (1, 2, 2, 3, 3, 3, 3, 4, 4))
    assert decoded(tokenizer, closed)[0] == "aé🐈b<eos>"
    assert decoded(tokenizer, []) == ("", ())


def test_effects_are_relative_losses_however_improbable_the_token():
    logits = torch.tensor([[0.0, -60.0, 3.0], [0.0, -60.0 + math.log(0.25), 3.0], [0.0, -59.0, 3.0]])
    found = patching._effects(logits, (1, 0))
    assert found[0].tolist() == pytest.approx([0.75, 1 - math.e], abs=1e-5)
    assert found[1].abs().max() < 1e-6


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "internvl"])
def test_deleting_image_tokens_leaves_everything_else(family):
    vlm = vlm_of(family)
    batch = vlm.encode(["is the 7 red?", "and now?"], [[picture(1, (40, 60))], [picture(2, (60, 90))]])
    short = without_image_tokens(vlm, batch)
    image = vlm.family.image_token(vlm.model.config)
    for row in range(2):
        real = batch["input_ids"][row][batch.attention_mask[row].bool()]
        kept = short["input_ids"][row][short.attention_mask[row].bool()]
        assert kept.tolist() == real[real != image].tolist()
    assert not any(name.startswith(("pixel", "image")) for name in short)
    assert int(short.attention_mask.sum(1).max()) == short.length


def curve(layers, start, end):
    norms = torch.ones(layers, 8)
    norms[start:end, 0] = 100.0
    return norms


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1, 1, 50, 52, 51, 3, 2], (2, 5)),
        ([1, 1, 1, 1, 1, 90], (5, 6)),  # rises into the last layer
        ([1, 2, 90, 91, 92, 93], (2, 6)),  # never falls
        ([5, 5, 5, 5], (1, 4)),
        ([5], (0, 1)),
    ],
)
def test_active_range(norms, expected):
    assert active_range(torch.tensor(norms, dtype=torch.float32)) == expected


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("layers", "lifetime", "kind"),
    [
        *((24, 4, None), (24, 5, "secondary"), (24, 8, "secondary"), (24, 9, "lasting")),
        *((32, 16, "secondary"), (32, 17, "lasting"), (48, 32, "secondary"), (48, 33, "lasting")),
    ],
)
def test_labels_follow_the_published_limits(sign, layers, lifetime, kind):
    norms = curve(layers, 2, layers - 1)
    cosines = torch.zeros(layers, 3, 8)
    cosines[:, 0, 0] = 1.0
    cosines[4 : 4 + lifetime, 0, 5] = 0.95 * sign
    cosines[:, 0, 6] = 0.89
    cosines[:, 1, 7] = 1.0  # parallel to another candidate
    sinks = label(norms, cosines, 0.9)
    assert sinks.primary == 0
    assert sinks.active == (2, layers - 1)
    born = [5] if kind == "secondary" else []
    assert sinks.secondary.any(dim=0).nonzero().flatten().tolist() == born
    assert sinks.lasting.nonzero().flatten().tolist() == ([5] if kind == "lasting" else [])
    if kind == "secondary":
        assert sinks.secondary[:, 5].nonzero().flatten().tolist() == list(range(4, 4 + lifetime))
    assert sinks.tokens().nonzero().flatten().tolist() == ([0] if kind is None else [0, 5])


def test_labels_of_a_shallow_model_and_of_one_token():
    norms = curve(12, 2, 11)
    cosines = torch.zeros(12, 3, 8)
    cosines[5:8, 0, 4] = 1.0  # born late, short
    cosines[2:5, 0, 5] = 1.0  # born with the primary sink
    cosines[2:10, 0, 6] = 1.0  # as long as the primary sink
    cosines[6, 0, 7] = 1.0  # noise
    sinks = label(norms, cosines, 0.9)
    assert sinks.secondary.any(dim=0).nonzero().flatten().tolist() == [4]
    assert sinks.lasting.nonzero().flatten().tolist() == [6]
    alone = label(norms[:, :1], torch.ones(12, 3, 1), 0.9)
    assert alone.tokens().tolist() == [True]


def test_labels_do_not_depend_on_what_follows():
    generator = torch.Generator().manual_seed(1)
    norms = curve(24, 2, 23)
    cosines = torch.rand(24, 3, 8, generator=generator) * 0.2 + 0.8
    whole, part = label(norms, cosines, 0.9), label(norms[:, :6], cosines[..., :6], 0.9)
    assert torch.equal(whole.secondary[:, :6], part.secondary)
    assert torch.equal(whole.lasting[:6], part.lasting)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Ablation, {"copies": 0}, "copies=0"),
        (Ablation, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (Patching, {"copies": 0}, "copies=0"),
        (Retrieval, {"words": 41}, "words=41"),
        (Echo, {"words": 0}, "words=0"),
        (Active, {"mass": 1.1}, "mass=1.1"),
        (Active, {"value": -1}, "value=-1"),
        (Influence, {"window": 0}, "window=0"),
        (Influence, {"near": 0}, "near=0"),
        (Influence, {"far": 3}, "far=3"),
        (Localization, {"selected": 0}, "selected=0"),
        (Localization, {"min_mass": 1.5}, "min_mass=1.5"),
        (NonSink, {"largest_sink_share": -0.1}, "largest_sink_share=-0.1"),
        (SinkTokens, {"cosine": 2.0}, "cosine=2.0"),
    ],
)
def test_parameters_are_checked(kind, given, message):
    with pytest.raises(UsageError, match=message):
        kind(**given)


def test_a_model_without_sinks_has_no_sink_free_heads():
    with pytest.raises(UnsupportedModelError, match="no sink dimensions"):
        profile(vlm_of("llava"), [picture(1, (40, 60))], ["non-sink"])
