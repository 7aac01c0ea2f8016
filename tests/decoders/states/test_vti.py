"""VTI against the slow way: one sample in float64 without a cache, hooks that hold the formula."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, STRONG, Forced, batch_of, close, extended, logits, plain, vlm_of
from tests.decoding.again import recording_on_cpu
from tests.decoding.test_graphs import scores
from vlmfix.attention.tower import tower_mlps
from vlmfix.decoders import VTI, parse
from vlmfix.decoders.states.directed import directions_for
from vlmfix.errors import DataError, IncompatibleDecodersError
from vlmfix.heads.directions.kept import save_directions
from vlmfix.models.checkpoint import DIRECTIONS

STEPS = 4


def slow(vlm, row, tokens, text, image, names):
    """(steps, V) scores of one sample behind its prompt and each of ``tokens`` but the last."""
    model, family = copy.deepcopy(vlm.model).double(), vlm.family
    held = directions_for(vlm, "vti", None).tensors
    directions = {part: sum(held[f"{part}_{name}"].double() for name in names) for part in ("text", "vision")}

    def turn(d, strength):
        def change(module, args, x):
            flat, ways = x.reshape(-1, x.shape[-1]), d.expand(x.shape).reshape(-1, x.shape[-1])
            new = torch.empty_like(flat)
            for at, (one, way) in enumerate(zip(flat, ways, strict=True)):
                moved = one / one.norm() + 0.1 * strength * way / way.norm()
                new[at] = one.norm() * moved / moved.norm()
            return new.view(x.shape)

        return change

    shown = vlm.encode([PROMPTS[row]], [PICTURES[row]])
    given = extended(shown, tokens[None, :-1])
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    exact = type(vlm)(model=model, processor=vlm.processor, family=family)
    with ExitStack() as hooks, torch.no_grad():
        for layer, d in zip(family.layers(model), directions["text"], strict=True):
            hooks.callback(layer.mlp.register_forward_hook(turn(d, text)).remove)
        for mlp, d in zip(tower_mlps(exact), directions["vision"], strict=True):
            hooks.callback(mlp.register_forward_hook(turn(d, image)).remove)
        return model(**given, use_cache=False).logits[0, shown.length - 1 :]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_token_and_every_patch_is_turned_in_its_direction(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm, (0, 1, 1))
    tokens = torch.arange(20, 20 + 3 * STEPS).view(3, STEPS)
    for preset, names in (("mean", ("mean",)), ("official-code", ("mean", "component"))):
        method = VTI(preset=preset, text=5, image=-8)
        found = logits(vlm, batch, method, steps=STEPS, logits_processor=[Forced(tokens, batch.length)])
        for sample, row in enumerate((0, 1, 1)):
            expected = slow(vlm, row, tokens[sample], 5, -8, names)
            close(found[:, sample], expected, 1e-3)
    assert (slow(vlm, 1, tokens[2], 5, 8, names) - expected).abs().max() > 1e-2


@pytest.fixture
def recording():
    with recording_on_cpu([vlm_of("llava")]) as made:
        yield made


def test_recorded_steps_give_the_scores_of_others(recording, monkeypatch):
    vlm, method = vlm_of("llava"), parse(f"{STRONG['vti']}+vcd:plausibility=0")
    for shown in ((0, 1, 0, 1), (1, 1, 1, 1)):
        recorded, others = (scores(vlm, method, monkeypatch, recorded=yes, shown=shown) for yes in (True, False))
        for one, other in zip(recorded, others, strict=True):
            close(one, other, 1e-3)
    assert len(recording) == 2


def test_contrast_rows_and_samples_without_a_picture_are_left_alone():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?", "hello there"], [PICTURES[0], ()])
    close(logits(vlm, batch, "vti:text=6,image=6")[:, 1], plain(vlm, batch)[:, 1])
    tokens = torch.arange(20, 26).view(2, 3)

    def said(spec):
        return logits(vlm, batch, spec, logits_processor=[Forced(tokens, batch.length)])[:, 0]

    turned, vcd = "vti:text=6,image=0", "vcd:contrast=1,plausibility=0"
    noisy = 2 * said("greedy") - said(vcd)
    close(said(f"{turned}+{vcd}"), 2 * said(turned) - noisy, 1e-3)


@pytest.mark.parametrize("beside", ["", "+vcd:plausibility=0"])
def test_our_loop_turns_the_tower_as_transformers_does(beside):
    """With the pictures of both rows the same, so that they are encoded once."""
    vlm, spec = vlm_of("llava"), parse(f"vti:text=0,image=9{beside}")
    batch = vlm.encode(list(PROMPTS), [PICTURES[0], PICTURES[0]])
    own = vlm.generate([list(row) for row in batch.pictures], list(batch.prompts), decoder=spec, max_new_tokens=6)
    with spec.applied(vlm, batch) as arguments:
        found = vlm.model.generate(**batch, **arguments, max_new_tokens=6, do_sample=False)
    texts = vlm.processor.batch_decode(found[:, batch.length :], skip_special_tokens=True)
    assert [answer.text for answer in own] == [text.strip() for text in texts]
    assert (logits(vlm, batch, spec) - logits(vlm, batch, f"greedy{beside}")).abs().nan_to_num().amax() > 1e-2


def test_without_directions_of_this_model_it_says_how_to_measure_them(tmp_path):
    vlm, other = vlm_of("llava"), vlm_of("llava", seed=1)
    held = {"vti": directions_for(other, "vti", None)}
    save_directions(held, tmp_path / DIRECTIONS)
    assert "other weights" in VTI(profile=str(tmp_path / DIRECTIONS)).check(vlm)
    assert VTI(profile=str(tmp_path / DIRECTIONS)).check(other) is None
    assert "vlmfix profile --model llava --directions vti" in VTI(profile=str(tmp_path / "no")).check(vlm)
    with pytest.raises(IncompatibleDecodersError, match=r"vti cannot act: .*other weights"):
        logits(vlm, batch_of(vlm), VTI(profile=str(tmp_path / DIRECTIONS)))
    facts = VTI(profile=str(tmp_path / DIRECTIONS)).facts(other)
    assert facts["directions"] == f"vti in {DIRECTIONS}"
    assert VTI(text=0, image=0).facts(vlm) == {}
    assert parse(VTI(profile="a/b").spec()) == VTI(profile="a/b")


def test_a_tower_that_sees_other_places_is_refused(tmp_path):
    vlm = vlm_of("llava")
    held = directions_for(vlm, "vti", None)
    fewer = {name: value[:, :-1].clone() if "vision" in name else value for name, value in held.tensors.items()}
    save_directions({"vti": type(held)(fewer, held.card, held.fingerprint)}, tmp_path / DIRECTIONS)
    with pytest.raises(DataError, match=r"the vision tower sees [0-9]+ places, and the directions are of"):
        logits(vlm, batch_of(vlm), VTI(profile=str(tmp_path / DIRECTIONS)))
