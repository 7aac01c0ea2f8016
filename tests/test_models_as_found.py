"""Models as users have them: wrapped, training, compiled, offloaded. The answers are those of the plain model."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

import vlmfix
from tests.contracts.support import STRONG, batch_of, method_of, picture
from tests.tiny import tiny_vlm
from vlmfix.attention.tower import TowerReading, tower_read
from vlmfix.decoders import parse
from vlmfix.decoding.encoding import encoded_once
from vlmfix.errors import UnsupportedModelError
from vlmfix.heads.measure import profile
from vlmfix.insight.grounding import grounding
from vlmfix.insight.sinks import find_sinks

PICTURE = picture(4, (48, 60))
pytestmark = [
    # torch 2.12 says it of itself when something is compiled
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # transformers before 5.24 says it of every model that is offloaded
    pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning"),
]

KINDS = ("greedy", "spin", "vcd", "gift", "sgrs", "beam", "carve", "vicrop:method=grad-att")
"""One decoder of each kind: none, an edit, a branch, a reading of states, a loop, beams, and two that probe."""


def model_of(family="llava"):
    """A model that a test may change."""
    return copy.deepcopy(tiny_vlm(family).model)


def answers(vlm, decoders=KINDS):
    found = [method_of(STRONG.get(name, name)) for name in decoders]
    return [vlm.generate([PICTURE], "what is it?", decoder=one, max_new_tokens=4)[0].ids for one in found]


@pytest.fixture(scope="module")
def expected():
    tiny = tiny_vlm("llava")
    return answers(vlmfix.wrap(tiny.model, tiny.processor))


class Adapter(nn.Module):
    """A linear module with a low-rank adapter beside it, as PEFT puts it in the place of one."""

    def __init__(self, base_layer, strength):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            self.up.weight.fill_(strength)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(self.drop(x)))


class Adapted(nn.Module):
    """What PEFT puts around a model: it hands ``generate`` on, and has a ``forward`` of its own."""

    def __init__(self, model, kind="LORA", **settings):
        super().__init__()
        self.inside = model
        self.peft_config = {"default": SimpleNamespace(peft_type=SimpleNamespace(value=kind), **settings)}

    def get_base_model(self):
        return self.inside

    def forward(self, **inputs):
        return self.inside(**inputs)

    def generate(self, **inputs):
        return self.inside.generate(**inputs)


def adapted(strength):
    model = model_of()
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj, strength)
    return Adapted(model)


class Quantised(nn.Module):
    """A linear module whose weights are small integers, as quantising packages put it in the place of one."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def whole(self):
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.whole())


def test_quantised_weights_are_those_that_they_stand_for():
    quantised, whole = model_of(), model_of()
    for one, other in zip(quantised.model.language_model.layers, whole.model.language_model.layers, strict=True):
        one.self_attn.k_proj = Quantised(one.self_attn.k_proj)
        other.self_attn.k_proj.weight.data = one.self_attn.k_proj.whole()
    one, other = (vlmfix.wrap(model, tiny_vlm("llava").processor) for model in (quantised, whole))
    assert answers(one) == answers(other)


WRAPPED = {
    "adapters": lambda model: Adapted(model),
    "torch.compile": torch.compile,
    "data parallel": nn.DataParallel,
    "adapters, compiled": lambda model: torch.compile(Adapted(model)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_is_seen_through(name, expected):
    wrapper = WRAPPED[name](model_of())
    vlm = vlmfix.wrap(wrapper, tiny_vlm("llava").processor)
    assert answers(vlm) == expected
    if name == "adapters":  # what the wrapper generates is changed too
        batch = vlm.encode(["what is it?"], [[PICTURE]])
        with parse("vcd").applied(vlm, batch) as arguments:
            found = wrapper.generate(**batch, **arguments, max_new_tokens=4, do_sample=False)
        assert tuple(found[0, batch.length :].tolist()) == answers(vlm, ["vcd:contrast=1"])[0]


def test_adapters_act_with_every_decoder(expected):
    fresh, trained = (vlmfix.wrap(adapted(strength), tiny_vlm("llava").processor) for strength in (0.0, 0.7))
    assert answers(fresh) == expected
    assert all(one != other for one, other in zip(answers(trained), expected, strict=True))


def with_compiled_text(model):
    model.model.language_model = torch.compile(model.model.language_model)
    return model


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (lambda model: Adapted(model, "PREFIX_TUNING"), r"'default' \(PREFIX_TUNING\) acts around the model"),
        (lambda model: Adapted(model, alora_invocation_tokens=[1, 2]), r"'default' \(LORA\) acts around the model"),
        (nn.Sequential, "Sequential is no model of transformers .*pipeline.model"),
        (lambda model: model.model, "LlavaModel does not generate .*AutoModelForImageTextToText"),
        (lambda model: SimpleNamespace(model=model), "SimpleNamespace is no model of transformers"),
        (with_compiled_text, r"model.language_model of the LlavaForConditionalGeneration is inside torch.compile"),
        (lambda model: model.to("meta"), "the model's weights are on the meta device"),
    ],
    ids=["prefix tuning", "invoked adapter", "other wrapper", "no head", "pipeline", "compiled part", "no weights"],
)
def test_what_cannot_be_seen_through_is_refused(wrapper, message):
    with pytest.raises(UnsupportedModelError, match=message):
        vlmfix.wrap(wrapper(model_of()), tiny_vlm("llava").processor).generate([PICTURE], "what?")


class Switched(Adapter):
    """An adapter that can be switched off, which says so as those of PEFT do."""

    active_adapters = ("default",)
    disable_adapters = False

    def forward(self, x):
        return self.base_layer(x) if self.disable_adapters else super().forward(x)


@pytest.mark.parametrize("change", ["training", "adapter"])
def test_what_was_remembered_of_other_weights_is_forgotten(change):
    """Windows and sinks are looked for once, and anew when the model was trained on or an adapter switched."""
    model, processor = model_of(), tiny_vlm("llava").processor
    text = model.model.language_model
    if change == "adapter":
        for layer in text.layers:
            layer.self_attn.q_proj = Switched(layer.self_attn.q_proj, 2.0)
    vlm, kinds = vlmfix.wrap(model, processor), ("carve", "vicrop", "vhr", "gift")
    vlm.refine([PICTURE], "what?", decoder="vicrop")
    before, massive = answers(vlm, kinds), find_sinks(vlm, threshold=1.0)
    if change == "training":
        with torch.no_grad():
            text.embed_tokens.weight.mul_(-3).add_(0.5)
            for layer in text.layers:
                layer.self_attn.q_proj.weight.mul_(-2)
    else:
        for layer in text.layers:
            layer.self_attn.q_proj.disable_adapters = True
    fresh = vlmfix.wrap(copy.deepcopy(model), processor)
    (mine,), (own,) = (each.refine([PICTURE], "what?", decoder="vicrop")[0].looks for each in (vlm, fresh))
    torch.testing.assert_close(torch.from_numpy(mine.map.values), torch.from_numpy(own.map.values))
    assert answers(vlm, kinds) == answers(fresh, kinds) != before
    assert find_sinks(vlm, threshold=1.0) == find_sinks(fresh, threshold=1.0)
    if change == "training":  # the adapters act behind the layer whose input is looked at
        assert find_sinks(vlm, threshold=1.0) != massive


def dropping(model):
    """Lets attention and one projection drop at random, and the whole model train but for one layer."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.24
    enable()
    layers = model.model.language_model.layers
    layers[0].mlp.down_proj = nn.Sequential(layers[0].mlp.down_proj, nn.Dropout(0.5)).train()
    layers[1].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_a_training_model_answers_as_one_that_does_not_train_and_trains_on(expected):
    model = dropping(model_of())
    before = modes(model)
    vlm = vlmfix.wrap(model, tiny_vlm("llava").processor)
    assert answers(vlm) == expected
    assert modes(model) == before
    assert len(set(before)) == 2
    said = "".join(vlm.stream(PICTURE, "what is it?", decoder="spin", max_new_tokens=4))
    assert said.strip() == vlm.generate([PICTURE], "what is it?", decoder="spin", max_new_tokens=4)[0].text
    batch = vlm.encode(["what is it?"], [[PICTURE]])
    with parse("greedy").applied(vlm, batch) as arguments:
        assert not model.training
        ids = model.generate(**batch, **arguments, max_new_tokens=4, do_sample=False)[0, batch.length :]
    assert tuple(ids.tolist()) == expected[0]
    assert modes(model) == before


def test_what_is_measured_of_a_training_model_is_that_of_one_that_does_not_train():
    tiny = tiny_vlm("llava")
    plain, training = (vlmfix.wrap(one, tiny.processor) for one in (tiny.model, dropping(model_of())))

    def measured(vlm):
        scores = profile(vlm, [PICTURE], ["vhd", "image-mass"], until_stable=False)
        (judged,) = grounding(vlm, [PICTURE], "what?", [[5, 6]])
        reading = TowerReading(layer=-1, rows="patches", classes=1)
        with tower_read(vlm, [reading]):
            encoded_once(vlm, batch_of(vlm, [0]))
        return [*(found.scores for found in scores.values()), judged.rows, *reading.sums]

    for one, other in zip(measured(plain), measured(training), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("part", ["model", "layers", "forward"])
def test_code_that_was_compiled_by_others_does_not_hide_edits(part, expected):
    model = model_of()
    if part == "model":
        model.compile(backend="eager")
    elif part == "layers":
        for layer in model.model.language_model.layers:
            layer.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    vlm = vlmfix.wrap(model, tiny_vlm("llava").processor)
    vlm.model.generate(**vlm.encode(["what?"], [[PICTURE]]), max_new_tokens=2)  # compiled before anything is changed
    assert answers(vlm) == expected


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_a_model_whose_weights_are_elsewhere(offload, expected, tmp_path):
    model = model_of()
    here = torch.device("cpu")
    if offload == "memory":
        cpu_offload(model, execution_device=here)
    else:
        disk_offload(model, str(tmp_path), execution_device=here)
    assert model.device.type == "meta"
    tiny = tiny_vlm("llava")
    vlm = vlmfix.wrap(model, tiny.processor)
    assert vlm.device == here
    assert answers(vlm) == expected
    plain = vlmfix.wrap(tiny.model, tiny.processor)
    both = [profile(one, [PICTURE], ["vhd"], until_stable=False)["vhd"] for one in (vlm, plain)]
    torch.testing.assert_close(both[0].scores, both[1].scores)
    torch.testing.assert_close(both[0].fingerprint, both[1].fingerprint)
    judged = [grounding(one, [PICTURE], "what?", [[5, 6]])[0].rows for one in (vlm, plain)]
    torch.testing.assert_close(*judged)


def test_a_forward_that_was_replaced_on_the_model_goes_on_acting(expected):
    model = model_of()
    own = model.forward
    calls = []

    @functools.wraps(own)
    def forward(**inputs):
        calls.append(len(inputs))
        return own(**inputs)

    model.forward = forward
    assert answers(vlmfix.wrap(model, tiny_vlm("llava").processor), ["greedy", "vcd"]) == [
        expected[0],
        answers(vlmfix.wrap(tiny_vlm("llava").model, tiny_vlm("llava").processor), ["vcd"])[0],
    ]
    assert calls
    assert model.forward is forward
