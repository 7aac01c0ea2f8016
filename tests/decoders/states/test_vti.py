"""VTI against the slow way: one sample in float64 without a cache, hooks that hold the formula."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, Forced, batch_of, close, logits, vlm_of
from tests.decoders.whole import in_float64
from vlmfix.attention.tower import tower_mlps
from vlmfix.decoders import VTI, parse
from vlmfix.decoders.states.directed import directions_for
from vlmfix.errors import DataError
from vlmfix.heads.directions.kept import save_directions
from vlmfix.models.checkpoint import DIRECTIONS

STEPS = 4


def slow(vlm, row, tokens, text, image, names):
    """(steps, V) scores of one sample behind its prompt and each of ``tokens`` but the last."""
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

    def hook(exact):
        for layer, d in zip(exact.family.layers(exact.model), directions["text"], strict=True):
            layer.mlp.register_forward_hook(turn(d, text))
        for mlp, d in zip(tower_mlps(exact), directions["vision"], strict=True):
            mlp.register_forward_hook(turn(d, image))

    return in_float64(vlm, vlm.encode([PROMPTS[row]], [PICTURES[row]]), tokens, hook)


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


def test_a_tower_that_sees_other_places_is_refused(tmp_path):
    vlm = vlm_of("llava")
    held = directions_for(vlm, "vti", None)
    fewer = {name: value[:, :-1].clone() if "vision" in name else value for name, value in held.tensors.items()}
    save_directions({"vti": type(held)(fewer, held.card, held.fingerprint)}, tmp_path / DIRECTIONS)
    with pytest.raises(DataError, match=r"the vision tower sees [0-9]+ places, and the directions are of"):
        logits(vlm, batch_of(vlm), VTI(profile=str(tmp_path / DIRECTIONS)))
