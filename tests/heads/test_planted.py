"""Every profiler ranks the head first that was built to do what it measures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.contracts.support import picture
from tests.heads.planted import (
    CODE,
    CONSTANT,
    FIRST,
    GROUP,
    HEADS,
    IMAGE,
    LAYERS,
    SHARP,
    WIDTH,
    look,
    look_away,
    planted_vlm,
)
from vlmfix.attention.probe import LastOutputs
from vlmfix.attention.session import edited
from vlmfix.errors import DataError
from vlmfix.heads.measure import QUESTION, profile
from vlmfix.heads.profiler import run_pass
from vlmfix.heads.profilers import needle
from vlmfix.heads.profilers.ablation import Ablation
from vlmfix.heads.profilers.echo import Echo
from vlmfix.heads.profilers.localization import Localization
from vlmfix.heads.profilers.non_sink import NonSink
from vlmfix.heads.profilers.patching import Patching, effects
from vlmfix.heads.profilers.retrieval import Retrieval
from vlmfix.heads.profilers.vhd import without_image_tokens
from vlmfix.insight.captions import Labels, Word
from vlmfix.insight.last_step import LastStep
from vlmfix.insight.work import Work

PICTURES = [picture(1, (40, 60)), picture(2, (60, 40))]


def measured(vlm, profiler, **options):
    name = profiler if isinstance(profiler, str) else profiler.name
    return profile(vlm, PICTURES, [profiler], **options)[name]


@pytest.mark.parametrize("planted", [(0, 3), (1, 5), (2, 6)])
def test_image_mass(planted):
    vlm = planted_vlm()
    look_away(vlm, but=[planted])
    look(vlm, *planted, IMAGE)
    found = measured(vlm, "image-mass")
    assert found.top(1) == (planted,)
    assert found.scores[planted] == pytest.approx(1.0, abs=1e-3)
    assert found.scores.sum() == pytest.approx(1.0, abs=1e-2)


def test_vhd_finds_the_one_head_that_carries_the_picture():
    vlm = planted_vlm()
    look_away(vlm, but=[(2, 5)])
    look(vlm, 2, 5, IMAGE)
    found = measured(vlm, "vhd")
    assert found.top(1) == ((2, 5),)
    others = found.scores.clone()
    others[2, 5] = 0
    assert others.max() < 1e-3 * found.scores[2, 5]


def test_looking_without_reading_is_image_mass_but_no_divergence():
    vlm = planted_vlm()
    look_away(vlm, but=[(2, 5)])
    look(vlm, 2, 5, IMAGE)
    with torch.no_grad():
        vlm.family.attention_modules(vlm.model)[2].v_proj.weight[WIDTH:] = 0.0
    found = profile(vlm, PICTURES, ["vhd", "image-mass", "saliency"])
    assert found["image-mass"].top(1) == ((2, 5),)
    assert found["vhd"].scores[2, 5] == found["saliency"].scores[2, 5] == 0


def test_a_model_that_ignores_the_picture_has_no_divergence():
    vlm = planted_vlm()
    look_away(vlm)
    assert measured(vlm, "vhd").scores.max() < 1e-3


def test_saliency_finds_the_one_head_whose_look_decides():
    vlm = planted_vlm()
    look_away(vlm, but=[(1, 2), (1, 3)])
    look(vlm, 1, 2, IMAGE)
    look(vlm, 1, 3, IMAGE)
    with torch.no_grad():
        vlm.family.attention_modules(vlm.model)[1].o_proj.weight[:, 2 * WIDTH : 3 * WIDTH] = 0.0
    found = measured(vlm, "saliency")
    assert found.top(1) == ((1, 3),)
    assert found.scores[1, 2] == 0
    assert found.scores[1, 3] > 0.5 * found.scores.sum() > 0


def test_gaze_shift_counts_gains_at_content_words_alone():
    seven = CODE
    vlm = planted_vlm(tokens=[("7", seven, 1.0), ("h", seven + 1, 1.0)])
    look(vlm, 1, 6, IMAGE, when=seven)  # at the content word
    look(vlm, 0, 2, IMAGE, when=seven + 1)  # at a function word
    look(vlm, 2, 1, IMAGE)  # always
    found = measured(vlm, "gaze-shift", question="the 77 has")
    assert found.top(1) == ((1, 6),)
    others = found.scores.clone()
    others[1, 6] = 0
    assert others.max() < 1e-3
    assert found.scores[1, 6] == pytest.approx(1 - 1 / 36, abs=1e-3)  # from 36 tokens alike to one patch alone


def one_hot(vlm, layer, head, shift):
    """Makes a head look at the digit that is ``shift`` behind the one that it reads."""
    module = vlm.family.attention_modules(vlm.model)[layer]
    with torch.no_grad():
        for digit in range(WIDTH):
            module.k_proj.weight[head // GROUP * WIDTH + digit, CODE + digit] = SHARP
            module.q_proj.weight[head * WIDTH + (digit + shift) % WIDTH, CODE + digit] = SHARP
        if shift:  # the colon before the answer stands for the last digit
            module.q_proj.weight[head * WIDTH, CODE + WIDTH] = SHARP


def test_retrieval_wants_the_token_itself_and_not_its_neighbour(monkeypatch):
    monkeypatch.setattr(needle, "WORDS", ("01234567",))
    codes = [(str(digit), CODE + digit, 1.0) for digit in range(WIDTH)]
    vlm = planted_vlm(tokens=[*codes, (":", CODE + WIDTH, 1.0)])
    one_hot(vlm, 1, 6, 1)
    one_hot(vlm, 0, 2, 0)
    found = measured(vlm, Retrieval(words=1))
    assert found.scores[1, 6] == 1
    assert found.scores.sum() == 1  # every other head scores exactly 0


def test_echo_tells_heads_that_find_a_word_again_from_those_that_find_the_next(monkeypatch):
    monkeypatch.setattr(needle, "WORDS", ("01234567",))
    vlm = planted_vlm(tokens=[(str(digit), CODE + digit, 1.0) for digit in range(WIDTH)])
    one_hot(vlm, 1, 6, 1)
    one_hot(vlm, 0, 2, 0)
    found = measured(vlm, Echo(words=1))
    assert found.top(2) == ((1, 6), (0, 2))
    assert found.scores[1, 6] == found.details["induction"][1, 6] == pytest.approx(1, abs=1e-3)
    assert found.details["echo"][0, 2] == pytest.approx(0.5, abs=1e-3)  # there, and where it stands again
    assert found.details["echo"][1, 6] < 1e-3
    assert found.details["induction"][0, 2] < 1e-3
    others = found.scores.clone()
    others[1, 6] = others[0, 2] = 0
    assert others.max() < 0.1


def test_the_logit_lens_finds_the_head_that_says_the_answer():
    vlm = babbler()
    found = measured(vlm, "logit-lens")  # a colon is last, and r is said
    assert found.top(1) == ((2, 5),)
    assert found.scores[2, 5] > 0
    assert found.scores[1, 3] < 0  # speaks for the h, so against the mean of the others
    others = found.scores.clone()
    others[2, 5] = others[1, 3] = 0
    assert bool((others == 0).all())


def test_heterogeneity_finds_the_head_that_differs():
    vlm = planted_vlm()
    speaking(vlm, {(1, 3): CODE + 5})
    found = measured(vlm, "heterogeneity")
    assert found.scores[1].tolist() == pytest.approx([7.0 if head == 3 else 1.0 for head in range(HEADS)])
    assert not bool(found.scores[[0, 2]].any())


def test_heads_that_rest_on_the_first_token_are_dormant():
    vlm = planted_vlm()
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = {"dim": IMAGE, "place": 1} if (layer, head) == (1, 2) else {"dim": FIRST}
            look(vlm, layer, head, **own)
    with torch.no_grad():
        for module in vlm.family.attention_modules(vlm.model):
            module.v_proj.weight.zero_()
            module.v_proj.weight[:, CONSTANT] = 1.0
            module.v_proj.weight[:, FIRST] = -0.99
    found = measured(vlm, "active")
    assert found.top(1) == ((1, 2),)
    dormant = found.details["dormant"]
    assert (float(dormant[1, 2]), float(dormant.sum())) == (0.0, LAYERS * HEADS - 1)
    assert found.details["sink_mass"][0, 0] == pytest.approx(1, abs=1e-3)
    assert found.details["sink_value"].max() < 0.1


def test_influence_finds_the_head_that_looks_far():
    vlm = planted_vlm()
    look(vlm, 2, 6, FIRST)
    found = measured(vlm, "influence")
    assert found.top(1) == ((2, 6),)
    assert found.scores[2, 6] == pytest.approx(10, abs=1e-2)
    assert found.details["future"][2, 6] < 1e-3 < found.details["future"][0, 0]


def test_ablation_finds_the_one_head_that_speaks():
    vlm = planted_vlm()
    look(vlm, 1, 3, IMAGE)
    with torch.no_grad():
        for layer, module in enumerate(vlm.family.attention_modules(vlm.model)):
            kept = module.o_proj.weight[:, 3 * WIDTH : 4 * WIDTH].clone()
            module.o_proj.weight.zero_()
            if layer == 1:
                module.o_proj.weight[:, 3 * WIDTH : 4 * WIDTH] = kept
        found = measured(vlm, "ablation", batch_size=1)
        lost = []
        for shown in PICTURES:
            batch = vlm.encode(["Please describe this image in detail."], [[shown]])
            whole = vlm.model(**batch).logits[0, -1].softmax(-1)
            module = vlm.family.attention_modules(vlm.model)[1].o_proj
            former = module.weight.clone()
            module.weight.zero_()
            silent = vlm.model(**batch).logits[0, -1].softmax(-1)
            module.weight.copy_(former)
            lost.append(float(whole.max() - silent[whole.argmax()]))
    others = found.scores.clone()
    others[1, 3] = 0
    assert bool((others == 0).all())
    assert found.scores[1, 3] == pytest.approx(sum(lost) / 2, abs=1e-6)
    first = found.details["first_order"]
    assert bool(((first != 0) == (found.scores != 0)).all())


def speaking(vlm, heads):
    """Lets only some (layer, head) write, each to the dimension given for it, a positive number at every token."""
    with torch.no_grad():
        for layer, module in enumerate(vlm.family.attention_modules(vlm.model)):
            module.o_proj.weight.zero_()
            for (number, head), dim in heads.items():
                if number == layer:
                    module.v_proj.weight[head // GROUP * WIDTH, :] = 0.0
                    module.v_proj.weight[head // GROUP * WIDTH, CONSTANT] = 1.0
                    module.o_proj.weight[dim, head * WIDTH] = 1.0


def babbler():
    """A model that says ``r h.`` to everything; one head speaks for the h, another for the r."""
    follows = {":": "r", "r": " ", " ": "h", "h": "."}
    codes = {letter: CODE + number for number, letter in enumerate(follows)}
    vlm = planted_vlm(tokens=[(letter, dim, 1.0) for letter, dim in codes.items()])
    speaking(vlm, {(1, 3): CODE + 5, (2, 5): CODE + 6})
    said = {letter: vlm.processor.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "r h."}
    with torch.no_grad():
        weight = vlm.model.get_output_embeddings().weight
        weight.zero_()
        for letter, following in follows.items():
            weight[said[following], codes[letter]] = 3.0
        weight[said["h"], CODE + 5] = weight[said["r"], CODE + 6] = 0.4
    return vlm


def test_ablation_on_captions_finds_the_head_that_pushes_the_hallucinated_word():
    seen = []

    def words(number, caption):
        seen.append((number, caption))
        return [Word(0, 1, True), Word(2, 3, False)]

    labels = Labels(words=words, about={})
    found = measured(babbler(), Ablation(labels=labels, max_new_tokens=4), batch_size=1)
    assert seen == [(0, "r h."), (1, "r h.")]
    assert found.top(1) == ((1, 3),)
    flipped = dataclasses.replace(found, scores=-found.scores)
    assert flipped.top(1) == ((2, 5),)
    assert (found.scores != 0).sum() == 2
    assert found.details["hallucinated"][1, 3] > 0 > found.details["real"][1, 3]
    assert found.details["real"][2, 5] > 0 > found.details["hallucinated"][2, 5]
    first = found.details["first_order"]
    assert first[1, 3] > 0 > first[2, 5]
    assert (first != 0).sum() == 2


def test_captions_without_a_hallucinated_word_are_left_out():
    def words(number, caption):
        return [Word(0, 1, True), *([Word(2, 3, False)] if number else [])]

    found = measured(babbler(), Ablation(labels=Labels(words=words, about={}), max_new_tokens=4))
    assert found.card.pictures == 1
    assert found.details["real_words"].tolist() == [1]
    for kinds in ((True,), (False,), ()):
        labels = Labels(words=lambda number, caption, kinds=kinds: [Word(0, 1, kind) for kind in kinds], about={})
        with pytest.raises(DataError, match="says nothing about 2 pictures"):
            measured(babbler(), Ablation(labels=labels, max_new_tokens=4))


@pytest.mark.parametrize("start", [-1, 4])
def test_a_word_outside_the_caption_is_refused(start):
    labels = Labels(words=lambda number, caption: [Word(start, 9, False)], about={})
    with pytest.raises(DataError, match=f"begins at {start} in a caption of 4"):
        measured(babbler(), Ablation(labels=labels, max_new_tokens=4))


def test_a_token_of_two_words_counts_as_hallucinated_and_a_repeated_word_twice():
    def words(number, caption):
        return [Word(0, 1, True), Word(0, 3, False), Word(2, 3, True), Word(3, 4, True)]

    found = measured(babbler(), Ablation(labels=Labels(words=words, about={}), max_new_tokens=4))
    assert found.details["hallucinated_words"].tolist() == [2]
    assert found.details["real_words"].tolist() == [4]


@pytest.mark.parametrize("planted", [(0, 3), (2, 5)])
def test_patching_finds_the_one_head_that_reads_the_picture(planted):
    vlm = planted_vlm()
    look_away(vlm, but=[planted])
    look(vlm, *planted, IMAGE)
    with torch.no_grad():
        for layer, module in enumerate(vlm.family.attention_modules(vlm.model)):
            heads = module.o_proj.weight.view(-1, HEADS, WIDTH)
            for head in range(HEADS):
                # nothing behind it may read what it wrote
                heads[:, head] *= 40.0 if (layer, head) == planted else 0.1 * (layer <= planted[0])
    found = measured(vlm, "patching")
    for part in (found.scores, *(found.details[name] for name in ("memory", "context", "direct"))):
        others = part.clone()
        others[planted] = 0
        assert others.abs().max() < 1e-3 * part[planted].abs()
    assert found.scores[planted] < 0 < found.details["context"][planted]  # it speaks for the picture


def test_patching_a_model_that_ignores_the_picture_has_no_conflict_and_no_effect():
    vlm = planted_vlm()
    look_away(vlm)
    with pytest.raises(DataError, match="otherwise when it does not see the picture"):
        measured(vlm, "patching")
    batch = vlm.encode([QUESTION], [PICTURES[:1]])
    work = Work(vlm, batch, vlm.layout(batch), 0, 0)
    state = Patching().begin(vlm)
    ran = run_pass(work, [state])
    state.scores(work, ran)
    shown = torch.stack([state._shown[layer][0] for layer in range(LAYERS)])
    blind = without_image_tokens(vlm, batch)
    others = {}
    with edited(
        vlm, vlm.layout(blind), [LastOutputs(reader=lambda site, output: others.update({site.layer: output[0]}))]
    ):
        vlm.model(**blind)
    found = effects(LastStep.of(work, ran, 0), shown, torch.stack(list(others.values())), (5, 6), 8)
    assert found.abs().max() < 1e-4


def test_localization_prefers_one_place_to_many():
    blob, scattered = CODE, CODE + 1
    codes = [(patch, blob, 1.0) for patch in (6, 7, 11, 12)] + [(patch, scattered, 1.0) for patch in (0, 4, 20, 24)]
    vlm = planted_vlm(codes=codes)
    look_away(vlm, but=[(2, 1), (2, 6)])
    look(vlm, 2, 1, scattered, place=1, sharp=12.0)
    look(vlm, 2, 6, blob, place=1, sharp=12.0)
    found = measured(vlm, Localization(selected=1))
    assert found.scores[2, 6] == 1
    assert found.scores.sum() == 1
    both = measured(vlm, Localization(selected=10))
    assert both.scores[2, 1] == both.scores[2, 6] == 1
    assert both.scores.sum() == 2  # the others do not look at the picture


def test_non_sink_leaves_out_heads_that_look_at_sinks():
    sinks = [3, 17]
    massive, content = FIRST, CODE
    codes = [(patch, massive, 200.0) for patch in sinks]
    codes += [(patch, content, 1.0) for patch in range(25) if patch not in sinks]
    vlm = planted_vlm(codes=codes, first=200.0)
    look_away(vlm, but=[(2, 1), (2, 6)])
    look(vlm, 2, 6, content, place=1)
    look(vlm, 2, 1, massive, place=1)
    both = profile(vlm, PICTURES, ["image-mass", NonSink(sink_dims=(massive,), sink_threshold=4.0)])
    assert both["non-sink"].top(1) == ((2, 6),)
    assert both["non-sink"].scores[2, 6] > 0.9
    assert both["non-sink"].scores[2, 1] == 0
    assert bool((both["non-sink"].scores[:2] == 0).all())


def test_sinks_finds_the_head_that_rests_on_the_first_token():
    vlm = planted_vlm(first=30.0)
    look_away(vlm, FIRST, but=[(1, 4)])
    look(vlm, 1, 4, FIRST)
    found = measured(vlm, "sinks")
    assert found.top(1) == ((1, 4),)
    assert found.scores[1, 4] > 0.95
    assert bool((found.details["primary_norm"] > 2).all())
    assert len(found.details["visual"]) == LAYERS


def test_permuting_the_heads_of_a_group_permutes_the_scores():
    vlm = planted_vlm(tokens=[("d", CODE, 1.0)])
    names = [
        "vhd",
        "image-mass",
        "gaze-shift",
        "ablation",
        "sinks",
        "logit-lens",
        "active",
        "influence",
        "heterogeneity",
    ]
    look(vlm, 1, 4, IMAGE)
    look(vlm, 1, 6, IMAGE, sign=-1)
    look(vlm, 1, 5, FIRST, place=1)
    look(vlm, 1, 7, IMAGE, when=CODE, place=2)
    before = profile(vlm, PICTURES, names)
    module = vlm.family.attention_modules(vlm.model)[1]
    order = [0, 1, 2, 3, 6, 7, 4, 5]
    columns = torch.arange(HEADS * WIDTH).view(HEADS, WIDTH)[order].flatten()
    with torch.no_grad():
        module.q_proj.weight.copy_(module.q_proj.weight[columns].clone())
        module.o_proj.weight.copy_(module.o_proj.weight[:, columns].clone())
    after = profile(vlm, PICTURES, names)
    for name in names:
        expected = before[name].scores.clone()
        expected[1] = expected[1, order]
        torch.testing.assert_close(after[name].scores, expected, atol=1e-5, rtol=1e-5)
        assert not math.isclose(float(expected[1].std()), 0.0, abs_tol=1e-7)
