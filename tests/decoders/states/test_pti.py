"""PTI against the slow way: whole sequences without a cache, in which later rows see turned columns of the prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.contracts.support import PICTURES, PROMPTS, STRONG, batch_of, close, logits, vlm_of
from tests.decoders.whole import both_ways
from vlmfix.attention.edit import Column
from vlmfix.decoders import PTI, parse
from vlmfix.decoders.states.directed import directions_for
from vlmfix.decoders.states.pti import Intervened
from vlmfix.decoding.running import running
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError
from vlmfix.upstream.cache import handed_over, keys_and_values

STEPS = 5


def steered(vlm, places, names, strengths, *, first):
    """The formula, row by row, in float64."""
    held = {key: value.double() for key, value in directions_for(vlm, "pti", None).tensors.items()}

    def turn(c, s, strength):
        away = max(0.0, float(-(c @ s) / c.norm() / s.norm()))
        moved = c / c.norm() + strength * (1 + away) * s / s.norm()
        return c.norm() * moved / moved.norm()

    def edit(here):
        output = here.output(here.scores)
        end = int(here.last.nonzero()[0])
        kept = {"keys": here.keys.clone(), "values": here.values.clone()}
        for place, columns in (("image", here.image.nonzero().flatten().tolist()), ("text", [end])):
            for (kind, own), strength in zip(kept.items(), strengths, strict=True):
                directions = sum(held[f"{place}_{kind}_{name}"] for name in names)[here.layer]  # (G, D)
                for head in range(len(own)):
                    direction = directions[head * len(directions) // len(own)]
                    for column in columns if place in places else ():
                        own[head, column] = turn(own[head, column], direction, strength)
        for row in range(end if first else end + 1, output.shape[1]):
            weights = (here.queries[:, row, None] @ kept["keys"][:, : row + 1].mT).softmax(-1)  # (H, 1, row + 1)
            output[:, row] = (weights @ kept["values"][:, : row + 1])[:, 0]
        return output

    return edit


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("first", ["steered", "plain"])
def test_later_rows_see_turned_columns(family, first):
    vlm = vlm_of(family)
    both, mean = ("image", "text"), ("mean",)
    for spec, places, names in (
        ({}, both, mean),
        ({"preset": "text"}, ("text",), mean),
        ({"preset": "official-code"}, both, ("mean", "component")),
    ):
        method = PTI(keys=1.0, values=2.0, first=first, **spec)
        edit = steered(vlm, places, names, (1.0, 2.0), first=first == "steered")
        found, expected = both_ways(method, edit, family, STEPS)
        close(found, expected, 1e-3)
    if first == "plain":
        close(found[0], both_ways("greedy", lambda here: here.output(here.scores), family, STEPS)[0][0])
    for other in (steered(vlm, ("text",), names, (1.0, 2.0), first=True), steered(vlm, both, mean, (2, 1), first=True)):
        _, wrong = both_ways(method, other, family, STEPS)
        assert (expected - wrong).abs().nan_to_num().max() > 1e-2


def test_columns_keep_their_lengths_and_others_every_bit():
    vlm, shown = vlm_of("qwen2_5_vl"), ([*PICTURES[0]], ())
    batch = vlm.encode(["what is here?", "hello there, my friend"], shown)
    layout = vlm.layout(batch)

    def kept(method):
        plan = method.plan(vlm, batch, layout)
        with running(vlm, batch, layout, plan, limit=2, name="pti") as call:
            call.prompt()
            return [[part.clone() for part in pair] for pair in keys_and_values(call.cache)]

    before, after = kept(PTI(keys=0, values=0)), kept(PTI(keys=1, values=2, first="plain"))
    turned = layout.tokens.clone()
    turned[0, -1] = True
    for pair in zip(before, after, strict=True):
        for old, new in zip(*pair, strict=True):
            same = (old == new).all(dim=-1).all(dim=1)  # (B, T)
            assert torch.equal(~same, turned)
            close(old.norm(dim=-1), new.norm(dim=-1))
    assert PTI(keys=0, values=0).plan(vlm, batch, layout).plain


def test_a_column_that_points_away_is_turned_more():
    direction = torch.zeros(1, 2, 1, 2)
    direction[..., 0] = 2.0
    edit = Intervened(predicts=True, strengths=(0.25, 0), image=direction, text=None)
    here = type("Here", (), {"layer": 0, "image_keys": torch.tensor([[True, True, False]])})()
    keys = torch.tensor([[[[0.0, -4.0], [-3.0, -4.0], [-3.0, -4.0]]]])
    found = edit.kept(here, Column(keys, keys))
    close(found.keys[0, 0].norm(dim=-1), torch.tensor([4.0, 5.0, 5.0]))
    close(found.keys[0, 0, 0, 0] / found.keys[0, 0, 0, 1], torch.tensor(0.25 / -1))
    close(found.keys[0, 0, 1, 0] / found.keys[0, 0, 1, 1], torch.tensor((-0.6 + 0.25 * 1.6) / -0.8))
    assert torch.equal(found.keys[0, 0, 2], keys[0, 0, 2])
    close(found.values, keys)


@pytest.mark.parametrize("other", ["spin:kept_share=0.5", "acg:strength=4", "vaf:image=3,layers=all"])
def test_beside_edits_of_attention_the_last_row_alone_sees_what_is_kept(other):
    """Edits of all kinds give the same in either order, beside a cache and without one."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    chain = logits(vlm, batch, f"{STRONG['pti']}+{other}")
    close(chain, logits(vlm, batch, f"{other}+{STRONG['pti']}"), 1e-3)
    for alone in (STRONG["pti"], other):
        assert (chain - logits(vlm, batch, alone)).abs().nan_to_num().amax(dim=(0, 2)).min() > 1e-3
    only = batch_of(vlm, [1])  # which is not padded
    with parse(f"{STRONG['pti']}+{other}").applied(vlm, only), torch.no_grad():
        close(vlm.model(**only, use_cache=False).logits[0, -1], chain[0, 1], 1e-3)


def test_rows_that_share_a_picture_are_turned_each():
    vlm = vlm_of("llava")
    together = vlm.encode(list(PROMPTS), [PICTURES[0], PICTURES[0]])
    found = logits(vlm, together, STRONG["pti"])
    for row, prompt in enumerate(PROMPTS):
        close(found[:, row], logits(vlm, vlm.encode([prompt], [PICTURES[0]]), STRONG["pti"])[:, 0])


def test_what_needs_another_cache_is_refused():
    vlm = vlm_of("llava")

    class Own(DynamicCache):
        pass

    cache = handed_over(vlm.model, Own(config=vlm.model.config.get_text_config()))
    with pytest.raises(UnsupportedAttentionError, match="a Own gives attention copies"):
        logits(vlm, batch_of(vlm, [0]), STRONG["pti"], **cache)
    for spec in ("pti+sgrs", "sgrs+pti"):
        with pytest.raises(IncompatibleDecodersError, match="edits the KV cache, and another asks for gradients"):
            logits(vlm, batch_of(vlm), parse(spec))


def test_presets_name_columns_and_direction():
    assert [(one.columns, one.direction) for one in (PTI(), PTI(preset="text"), PTI(preset="official-code"))] == [
        ("both", "mean"),
        ("text", "mean"),
        ("both", "pca"),
    ]
