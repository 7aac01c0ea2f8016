"""A decoder at work acts on the planned batch or says why not: other inputs, other threads, other objects, no room."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import TextIteratorStreamer

from tests.contracts.support import PICTURES, PROMPTS, STRONG, batch_of, close, logits, method_of, picture, vlm_of
from tests.tiny import tiny_vlm
from vlmfix.attention.tower import TowerReading, tower_read
from vlmfix.decoders import parse
from vlmfix.decoding.encoding import encoded_once
from vlmfix.errors import DataError, IncompatibleDecodersError
from vlmfix.generation import VLM, wrap
from vlmfix.heads.measure import profile
from vlmfix.models.layout import Batch

ACTING = ("spin", "vcd", "gift", "sgrs")
SPECS = [STRONG.get(name, name) for name in ACTING]


def own_model():
    tiny = tiny_vlm("llava")
    return wrap(copy.deepcopy(tiny.model), tiny.processor)


def said(vlm, batch, arguments, **options):
    return vlm.model.generate(**batch, **arguments, max_new_tokens=3, do_sample=False, **options)


def swapped(batch):
    return {name: value.flip(0) for name, value in batch.items()}


TWINS = ["what is here?", "what is here?"]
OTHER = {
    "other words": lambda vlm, batch: {**batch, "input_ids": batch["input_ids"].clone().index_fill_(1, LAST, 42)},
    "rows in another order": lambda vlm, batch: swapped(batch),
    "other pictures": lambda vlm, batch: {**batch, "pixel_values": batch["pixel_values"] + 0.1},
    "pictures in another order": lambda vlm, batch: {**batch, "pixel_values": batch["pixel_values"].flip(0)},
    "fewer rows": lambda vlm, batch: {name: value[:1] for name, value in batch.items()},
    "a longer prompt": lambda vlm, batch: vlm.encode(["what is here now?"] * 2, batch.pictures),
    "no pictures": lambda vlm, batch: {name: batch[name] for name in ("input_ids", "attention_mask")},
    "another mask": lambda vlm, batch: {
        **batch,
        "attention_mask": batch["attention_mask"].clone().index_fill_(1, LAST, 0),
    },
}
LAST = torch.tensor([-1])


@pytest.mark.parametrize("spec", SPECS, ids=ACTING)
@pytest.mark.parametrize("name", OTHER)
def test_inputs_that_were_not_planned_for_are_refused(name, spec):
    vlm = vlm_of("llava")
    batch = vlm.encode(TWINS, [[picture(1, (40, 60))], [picture(2, (40, 60))]])
    if name == "rows in another order":
        batch = vlm.encode(["what is here?", "what is that?"], batch.pictures)
    with (
        method_of(spec).applied(vlm, batch) as arguments,
        pytest.raises(IncompatibleDecodersError, match="was planned for other inputs: "),
    ):
        said(vlm, OTHER[name](vlm, batch), arguments)


@pytest.mark.parametrize("spec", SPECS[:3], ids=ACTING[:3])
def test_a_pass_over_another_prompt_is_refused(spec):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with method_of(spec).applied(vlm, batch), pytest.raises(IncompatibleDecodersError, match="tokens are others"):
        vlm.model(**OTHER["other words"](vlm, batch))


@pytest.mark.parametrize("spec", SPECS, ids=ACTING)
def test_inputs_that_are_overwritten_are_others(spec):
    vlm = vlm_of("llava")
    batch = Batch.of({name: value.clone() for name, value in batch_of(vlm).items()})
    with method_of(spec).applied(vlm, batch) as arguments:
        batch["pixel_values"].copy_(batch["pixel_values"].flip(0))
        with pytest.raises(IncompatibleDecodersError, match="their pixel_values are others"):
            said(vlm, batch, arguments)


def test_plain_decoding_takes_any_inputs():
    vlm = vlm_of("llava")
    batch, other = batch_of(vlm), batch_of(vlm, [1])
    expected = vlm.model.generate(**other, max_new_tokens=3, do_sample=False)
    with parse("greedy").applied(vlm, batch) as arguments:
        assert torch.equal(said(vlm, other, arguments), expected)


@pytest.mark.parametrize("name", [*(name for name in STRONG if name not in ("head-gains",)), "sgrs"])
def test_a_second_call_in_one_block_says_the_same(name):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with method_of(STRONG.get(name, name)).applied(vlm, batch) as arguments:
        first, second = (said(vlm, batch, arguments) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("spec", SPECS, ids=ACTING)
def test_several_answers_for_a_row_are_planned_for_or_refused(spec):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    asked = {"max_new_tokens": 3, "do_sample": True, "temperature": 1e-4, "num_return_sequences": 2}
    with method_of(spec).applied(vlm, batch) as arguments:
        with pytest.raises(IncompatibleDecodersError, match=r"num_return_sequences=[12]") as caught:
            vlm.model.generate(**batch, **arguments | asked)
        if "custom_generate" in arguments:
            return
        assert caught.value.hint == "give num_beams=2 to decoder.applied(...), which plans for as many rows"
        with pytest.raises(IncompatibleDecodersError, match=r"num_beams=3 makes 3 rows of each"):
            vlm.model.generate(**batch, **arguments, num_beams=3)
        alone = vlm.model.generate(**batch, **arguments, max_new_tokens=3)
    with method_of(spec).applied(vlm, batch, num_beams=2) as arguments:
        twice = vlm.model.generate(**batch, **arguments | asked)
    assert torch.equal(twice, alone.repeat_interleave(2, dim=0))


def test_the_same_inputs_in_another_type_are_the_planned_ones():
    vlm = vlm_of("llava")
    batch = Batch.of(dict(batch_of(vlm)))
    coarse = batch.with_inputs(pixel_values=batch["pixel_values"].double(), input_ids=batch["input_ids"].int())
    with parse("vcd").applied(vlm, batch) as arguments:
        expected = said(vlm, batch, arguments)
        assert torch.equal(said(vlm, {**coarse, "input_ids": batch["input_ids"]}, arguments), expected)


def test_one_token_is_no_prompt():
    vlm = vlm_of("llava")
    batch = {"input_ids": torch.tensor([[40]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    for spec in ("spin", "sgrs"):
        with pytest.raises(DataError, match="one token"), method_of(spec).applied(vlm, batch):
            pass


@pytest.mark.parametrize("spec", SPECS, ids=ACTING)
def test_generate_in_a_thread_of_its_own_with_the_planned_inputs(spec):
    """As transformers' streamers are used."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    with method_of(spec).applied(vlm, batch) as arguments:
        expected = said(vlm, batch, arguments)[0, batch.length :]
        streamer = TextIteratorStreamer(vlm.processor.tokenizer, skip_prompt=True, timeout=60)
        name = "token_streamer" if "custom_generate" in arguments else "streamer"
        thread = threading.Thread(target=said, args=(vlm, batch, arguments), kwargs={name: streamer})
        thread.start()
        pieces = "".join(streamer)
        thread.join()
    assert pieces == vlm.processor.tokenizer.decode(expected)


@pytest.mark.parametrize("spec", SPECS[:3], ids=ACTING[:3])
def test_a_call_of_another_thread_is_refused_and_not_changed(spec):
    vlm = vlm_of("llava")
    batch, other = batch_of(vlm), batch_of(vlm, [1])
    with method_of(spec).applied(vlm, batch) as arguments, ThreadPoolExecutor(1) as threads:
        for call in (lambda: said(vlm, other, {}), lambda: vlm.model(**other)):
            with pytest.raises(IncompatibleDecodersError, match="another thread decodes with this model"):
                threads.submit(call).result()
        said(vlm, batch, arguments)


@pytest.mark.parametrize("spec", SPECS[:3], ids=ACTING[:3])
def test_a_call_that_was_under_way_in_another_thread_is_refused(spec):
    """Its steps would be edited: it began before the block, with inputs of the same size."""
    vlm = own_model()
    batch = batch_of(vlm)
    begun, go_on = threading.Event(), threading.Event()

    class Waits(torch.nn.Module):
        def __call__(self, input_ids, scores):
            begun.set()
            go_on.wait(60)
            return scores

    with ThreadPoolExecutor(1) as threads:
        foreign = threads.submit(said, vlm, batch, {}, logits_processor=[Waits()])
        begun.wait(60)
        with method_of(spec).applied(vlm, batch) as arguments:
            go_on.set()
            with pytest.raises(IncompatibleDecodersError, match="another thread decodes with this model"):
                foreign.result()
            said(vlm, batch, arguments)


@pytest.mark.parametrize("reading", ["profile", "tower"])
def test_what_is_read_is_not_another_threads(reading):
    vlm = vlm_of("llava")
    other = batch_of(vlm, [1])

    def foreign(module, args, output):
        with ThreadPoolExecutor(1) as threads:
            call = (lambda: vlm.model(**other)) if reading == "profile" else (lambda: encoded_once(vlm, other))
            with pytest.raises(IncompatibleDecodersError, match="another thread decodes with this model"):
                threads.submit(call).result()
            passed.append(True)

    passed: list[bool] = []
    if reading == "profile":
        with vlm.family.layers(vlm.model)[0].register_forward_hook(foreign):
            profile(vlm, [PICTURES[0][0]], ["vhd"], until_stable=False)
    else:
        sums = TowerReading(layer=-1, rows="patches", classes=1)
        with tower_read(vlm, [sums]), vlm.family.tower(vlm.model).register_forward_hook(foreign):
            encoded_once(vlm, batch_of(vlm, [0]))
        assert len(sums.sums) == 1
    assert passed


def another_models_generate(vlm):
    vlm.model.generate = copy.deepcopy(vlm.model).generate


def attention_of_its_own(vlm):
    layer = vlm.family.layers(vlm.model)[1].self_attn
    inside = copy.deepcopy(layer)  # has a configuration of its own
    layer.forward = inside.forward


@pytest.mark.parametrize("change", [another_models_generate, attention_of_its_own])
def test_a_decoder_that_does_not_act_is_found(change):
    vlm = own_model()
    change(vlm)
    found = "layer 1" if change is attention_of_its_own else "layer 0"
    with pytest.raises(IncompatibleDecodersError, match=f"spin.* did not act: attention of {found} was computed"):
        vlm.generate([PICTURES[0][0]], "what?", decoder="spin", max_new_tokens=3)
    if change is another_models_generate:
        with pytest.raises(IncompatibleDecodersError, match=r"vcd.* did not act: the model's pass went round"):
            vlm.generate([PICTURES[0][0]], "what?", decoder="vcd", max_new_tokens=3)
        with pytest.raises(IncompatibleDecodersError, match=r"sgrs.* did not act: generate ran another model"):
            vlm.generate([PICTURES[0][0]], "what?", decoder="sgrs", max_new_tokens=3)
    assert len(vlm.generate([PICTURES[0][0]], "what?", max_new_tokens=3)) == 1


def test_a_layer_that_is_exchanged_while_it_decodes_is_found():
    vlm = own_model()
    batch = batch_of(vlm)
    layers = vlm.family.decoder(vlm.model).layers
    with parse("spin").applied(vlm, batch) as arguments:
        layers[1] = copy.deepcopy(tiny_vlm("llava").model.model.language_model.layers[1])
        with pytest.raises(IncompatibleDecodersError, match="did not act: attention of layer 1"):
            said(vlm, batch, arguments)


def test_a_text_model_that_is_exchanged_between_two_calls_is_the_one_that_answers():
    vlm, other = own_model(), tiny_vlm("llava", seed=1)
    expected = wrap(other.model, other.processor)
    vlm.generate([PICTURES[0][0]], "what?", decoder="gift", max_new_tokens=3)
    vlm.model.model = copy.deepcopy(other.model.model)
    vlm.model.lm_head = copy.deepcopy(other.model.lm_head)
    for spec in ("spin", "vcd", "gift"):
        one, two = (
            each.generate([PICTURES[0][0]], "what?", decoder=spec, max_new_tokens=3) for each in (vlm, expected)
        )
        assert one[0].ids == two[0].ids


def test_a_block_without_a_pass_says_so(caplog):
    vlm = vlm_of("llava")
    with parse("vcd").applied(vlm, batch_of(vlm)):
        pass
    assert "vcd" in caplog.text
    assert "the model made no pass" in caplog.text
    assert "generate" not in vlm.model.__dict__


def test_two_objects_of_one_model_take_turns():
    one = own_model()
    other = VLM(model=one.model, processor=one.processor, family=one.family)
    expected = [
        each.generate([PICTURES[0][0]], "what?", decoder="vcd", max_new_tokens=3)[0].ids for each in (one, other)
    ]
    with ThreadPoolExecutor(2) as threads:
        calls = [
            threads.submit(each.generate, [PICTURES[0][0]], "what?", decoder=spec, max_new_tokens=3)
            for each in (one, other)
            for spec in ("vcd", "spin")
        ]
    assert [calls[0].result()[0].ids, calls[2].result()[0].ids] == expected
    assert expected[0] == expected[1]


def test_a_decoder_inside_another_ones_block_needs_the_same_inputs():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with parse("spin").applied(vlm, batch):
        nested = logits(vlm, batch, "locore:strength=4")
        with pytest.raises(IncompatibleDecodersError, match=r"spin.* was planned for other inputs"):
            vlm.generate([PICTURES[0][0]], PROMPTS[0], decoder="vcd", max_new_tokens=2)
    close(nested, logits(vlm, batch, "spin+locore:strength=4"))
