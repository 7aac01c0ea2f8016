"""What must hold for every decoder that refines pictures, on every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contracts.support import PICTURES, PROMPTS, STRONG, batch_of, crossed, method_of, picture, vlm_of
from tests.contracts.test_gpu import on_gpu
from tests.contracts.test_reference import Slow, installed, same
from tests.tiny import TINY
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import CARVE, Chain, Greedy, ViCrop, parse
from vlmfix.decoders.picture.probing import attention_maps
from vlmfix.errors import IncompatibleDecodersError, UnsupportedAttentionError

REFINERS = {
    "carve": CARVE(probe_tokens=3),
    "carve-official": CARVE(preset="official-code", probe_tokens=3),
    "carve-first": CARVE(steps="first", shown="both"),
    "rel-att": ViCrop(base=12),
    "grad-att": ViCrop(base=12, method="grad-att", layers=LayerSet("0:2")),
    "pure-grad": ViCrop(base=12, method="pure-grad"),
    "rel-att-blocks": ViCrop(base=12, high_resolution=True, block=40),
}
ROWS = [list(row) for row in PICTURES]


def acts(name, family):
    return name != "pure-grad" or family not in ("llava_next", "llava_onevision")


CASES = [pair for pair in crossed(REFINERS) if acts(pair.values[1], pair.values[0])]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_row_is_refined_as_if_it_were_alone(family, name):
    """Left padding, other prompts and other pictures in the batch change no map."""
    vlm = vlm_of(family)
    vlm.memo.clear()
    together = vlm.refine(ROWS, PROMPTS, decoder=REFINERS[name])
    for number, row in enumerate(together):
        vlm.memo.clear()
        (alone,) = vlm.refine([ROWS[number]], PROMPTS[number], decoder=REFINERS[name])
        assert len(row.looks) == len(alone.looks) == len(ROWS[number])
        for one, other in zip(row.looks, alone.looks, strict=True):
            largest = np.abs(other.map.values).max()
            np.testing.assert_allclose(one.map.values, other.map.values, atol=1e-4 * largest)
            x0, y0, x1, y1 = one.box
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1


@pytest.mark.parametrize(("family", "name"), crossed({name: REFINERS[name] for name in ("carve-official", "rel-att")}))
def test_decoding_goes_on_with_the_refined_pictures(family, name):
    """Answers are those of the rest of the chain to what ``refine`` shows."""
    vlm = vlm_of(family)
    chain = Chain(decoders=(REFINERS[name], method_of("vcd:plausibility=0")))
    shown = vlm.refine(ROWS, PROMPTS, decoder=chain)
    answers = vlm.generate(ROWS, PROMPTS, decoder=chain, max_new_tokens=4)
    rest = vlm.generate([row.pictures for row in shown], PROMPTS, decoder="vcd:plausibility=0", max_new_tokens=4)
    assert [answer.ids for answer in answers] == [answer.ids for answer in rest]
    for answer, row in zip(answers, shown, strict=True):
        assert [p.tobytes() for p in answer.refined.pictures] == [p.tobytes() for p in row.pictures]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "idefics3"])
def test_the_whole_picture_gives_the_plain_answer(family):
    """Keeping every pixel refines nothing."""
    vlm = vlm_of(family)
    plain = vlm.generate(ROWS, PROMPTS, max_new_tokens=4)
    kept = vlm.generate(ROWS, PROMPTS, decoder=CARVE(kept_share=1.0, probe_tokens=2), max_new_tokens=4)
    assert [answer.ids for answer in kept] == [answer.ids for answer in plain]
    assert all(answer.refined is None for answer in plain)


@pytest.mark.parametrize("family", TINY)
def test_maps_are_what_a_slow_pass_over_the_whole_sequence_shows(family):
    """Every row of attention in float64, without a cache, of the prompt and the answer together."""
    vlm = vlm_of(family)
    batch = vlm.encode([PROMPTS[0]], [PICTURES[0]])
    steps, layers = 3, (0, 2)
    (maps,) = attention_maps(vlm, batch, LayerSet("0/2"), steps=steps)
    said = vlm.model.generate(**batch, max_new_tokens=steps, do_sample=False)[:, batch.length :][:, : len(maps)]
    seen = {}

    def keep(layer, b, h, q, row):
        seen[layer, h, q] = row
        return row

    inputs = dict(batch)
    inputs["input_ids"] = torch.cat([batch["input_ids"], said], dim=1)
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            fill = int(name == "attention_mask")
            inputs[name] = torch.cat([inputs[name], torch.full_like(said, fill)], dim=1)
    with installed(vlm, Slow(same, keep)), torch.no_grad():
        vlm.model(**inputs, use_cache=False)
    for step in range(len(maps)):
        for place, layer in enumerate(layers):
            rows = [seen[layer, head, batch.length - 1 + step][: batch.length] for head in range(8)]
            expected = torch.stack(rows).mean(dim=0)
            torch.testing.assert_close(maps[step, place].double(), expected, atol=1e-5, rtol=1e-3)


def test_an_answer_that_ends_has_maps_up_to_its_end(monkeypatch):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    ids = vlm.model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch.length :]
    end = int(ids[0, 1])
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", [end])
    lengths = [row.index(end) + 1 if end in row else 5 for row in ids.tolist()]
    found = attention_maps(vlm, batch, LayerSet("1"), steps=5)
    assert [len(row) for row in found] == lengths
    assert lengths[0] <= 2


@pytest.mark.parametrize("spec", ["carve:probe_tokens=2", "vicrop:base=12", "vicrop:base=12,method=pure-grad"])
def test_questions_about_a_picture_share_what_depends_on_it_alone(spec, monkeypatch):
    vlm, shown = vlm_of("llava"), picture(9, (50, 50))
    vlm.memo.clear()
    asked = []
    encode = type(vlm).encode
    monkeypatch.setattr(
        type(vlm), "encode", lambda self, prompts, *a, **k: asked.extend(prompts) or encode(self, prompts, *a, **k)
    )
    decoder = parse(spec)
    vlm.refine([shown, shown], ["what?", "who?"], decoder=decoder)
    vlm.refine([shown.copy()], ["and where?"], decoder=decoder)
    assert sum(prompt.startswith(decoder.general_prompt) for prompt in asked) == 1
    assert len(asked) == 4


@pytest.mark.parametrize("name", REFINERS)
def test_a_row_without_a_picture_is_left_alone(name):
    vlm = vlm_of("llava")
    found = vlm.refine([ROWS[0], []], ["what is here?", "hello there"], decoder=REFINERS[name])
    assert (len(found[0].looks), found[1].looks, found[1].pictures) == (1, (), ())
    answers = vlm.generate([ROWS[0], []], ["what is here?", "hello there"], decoder=REFINERS[name], max_new_tokens=3)
    plain = vlm.generate([[]], ["hello there"], max_new_tokens=3)
    assert answers[1].ids == plain[0].ids
    assert vlm.refine([[]], ["hello"], decoder=REFINERS[name])[0].pictures == ()


@pytest.mark.parametrize("spec", ["carve:probe_tokens=2", "vicrop:base=12", "vicrop:base=12+locore"])
def test_encoded_batches_are_refused(spec):
    vlm = vlm_of("llava")
    with pytest.raises(IncompatibleDecodersError, match=r"before they are encoded.*vlm\.refine"):
        parse(spec).applied(vlm, batch_of(vlm)).__enter__()


def test_chains_name_one_refiner_and_name_it_first():
    with pytest.raises(IncompatibleDecodersError, match="carve and vicrop both refine"):
        parse("carve+vicrop")
    with pytest.raises(IncompatibleDecodersError, match=r"vicrop refines the pictures before.*name it first"):
        parse("vcd+vicrop")
    chain = parse("vicrop+vcd+inter")
    assert chain.refines
    assert not chain.decoding.refines
    assert (chain.passes, parse("vicrop").decoding) == (5, Greedy())
    with pytest.raises(IncompatibleDecodersError, match="leaves pictures as they are"):
        vlm_of("llava").refine(ROWS, "what?", decoder="vcd")


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"temperature": 1.0, "seed": 3}, {"static_cache": True}], ids=str
)
def test_beams_sampling_and_static_caches_work(options):
    vlm, decoder = vlm_of("qwen2_5_vl"), ViCrop(base=12)
    shown = [row.pictures for row in vlm.refine(ROWS, PROMPTS, decoder=decoder)]
    answers = vlm.generate(ROWS, PROMPTS, decoder=decoder, max_new_tokens=3, **options)
    rest = vlm.generate(shown, PROMPTS, max_new_tokens=3, **options)
    assert [answer.ids for answer in answers] == [answer.ids for answer in rest]


def test_streams_are_what_generate_says():
    vlm, decoder = vlm_of("llava"), REFINERS["carve"]
    (answer,) = vlm.generate([ROWS[0]], PROMPTS[0], decoder=decoder, max_new_tokens=4)
    assert "".join(vlm.stream(ROWS[0], PROMPTS[0], decoder=decoder, max_new_tokens=4)).strip() == answer.text


@pytest.mark.parametrize("name", REFINERS)
def test_the_model_is_left_as_it_was(name):
    vlm = vlm_of("llava")
    before = [(key, value.requires_grad) for key, value in vlm.model.named_parameters()]
    vlm.refine(ROWS, PROMPTS, decoder=REFINERS[name])
    assert [(key, value.requires_grad) for key, value in vlm.model.named_parameters()] == before
    assert all(value.grad is None for value in vlm.model.parameters())
    assert not any("vlmfix" in key for module in vlm.model.modules() for key in module.__dict__)


@pytest.mark.parametrize("spec", ["carve:layers=20:26", "vicrop:layers=3", "vicrop:layers=1/7,method=grad-att"])
def test_layers_that_do_not_exist_are_refused(spec):
    vlm = vlm_of("llava")
    assert "the model has 3" in parse(spec).check(vlm)
    with pytest.raises(UnsupportedAttentionError, match="the model has 3"):
        vlm.refine(ROWS, PROMPTS, decoder=spec)


@pytest.mark.parametrize("family", TINY)
def test_what_cannot_act_says_so_beforehand(family):
    vlm = vlm_of(family)
    for name, decoder in REFINERS.items():
        assert (decoder.check(vlm) is None) == acts(name, family)
    if not acts("pure-grad", family):
        with pytest.raises(IncompatibleDecodersError, match="method=rel-att or grad-att"):
            vlm.refine(ROWS, PROMPTS, decoder=REFINERS["pure-grad"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("name", REFINERS)
def test_the_gpu_sees_the_cpus_maps(family, name, dtype):
    here, there = vlm_of(family), on_gpu(family, dtype)
    one, two = (vlm.refine(ROWS, PROMPTS, decoder=REFINERS[name]) for vlm in (here, there))
    for left, right in zip(one, two, strict=True):
        for look, other in zip(left.looks, right.looks, strict=True):
            assert np.isfinite(other.map.values).all()
            if dtype == torch.float32 and name != "pure-grad":  # a quotient of gradients magnifies rounding
                np.testing.assert_allclose(other.map.values, look.map.values, rtol=2e-2, atol=1e-4)
    assert all(answer.ids for answer in there.generate(ROWS, PROMPTS, decoder=REFINERS[name], max_new_tokens=3))


def test_refining_is_repeatable():
    vlm = vlm_of("llava")
    for decoder in REFINERS.values():
        one, two = (vlm.refine(ROWS, PROMPTS, decoder=decoder) for _ in range(2))
        assert [p.tobytes() for row in one for p in row.pictures] == [p.tobytes() for row in two for p in row.pictures]


def test_the_chain_with_every_strong_method_runs():
    vlm = vlm_of("llava")
    for name in ("locore", "vcd", "inter"):
        chain = Chain(decoders=(REFINERS["rel-att"], method_of(STRONG[name])))
        assert len(vlm.generate(ROWS, PROMPTS, decoder=chain, max_new_tokens=2)) == 2


def test_a_tiny_picture_is_refined():
    vlm = vlm_of("llava")
    for decoder in REFINERS.values():
        (found,) = vlm.refine([Image.new("RGB", (3, 2), "red")], "what?", decoder=decoder)
        assert all(min(shown.size) >= 1 for shown in found.pictures)


@pytest.mark.parametrize("spec", ["vicrop:base=12,layers=1", "carve:steps=first,layers=1"])
def test_question_and_instruction_are_looked_at_in_one_pass_that_ends_early(spec):
    """Two calls of a layer: of the beginning that both share, and of the rest."""
    vlm = vlm_of("llava")
    vlm.memo.clear()
    layers, seen = vlm.family.layers(vlm.model), []
    towers = []
    hooks = [layer.register_forward_pre_hook(lambda *_, n=n: seen.append(n)) for n, layer in enumerate(layers)]
    hooks.append(vlm.model.get_submodule("model.vision_tower").register_forward_pre_hook(lambda *_: towers.append(1)))
    try:
        vlm.refine([picture(11, (50, 50))], ["what?"], decoder=spec)
    finally:
        for hook in hooks:
            hook.remove()
    assert [seen.count(n) for n in range(len(layers))] == [2, 2] + [0] * (len(layers) - 2)
    assert len(towers) == 1
