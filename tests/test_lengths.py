"""Prompts and answers that are too long: for the model's context, and for the sliding windows of its layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.models.mistral.modeling_mistral import MistralAttention

from tests.contracts.support import PICTURES, STRONG, Tiny, close, logits, method_of, plain, vlm_of
from tests.tiny import tiny_vlm
from vlmfix.answering import Answerer
from vlmfix.attention.windows import narrowest
from vlmfix.decoders import DECODERS, DecodingPlan, Greedy, parse
from vlmfix.decoding.branches import Contrast, with_instruction
from vlmfix.doctor import met, tried
from vlmfix.errors import DataError, WindowError
from vlmfix.generation import VLM
from vlmfix.heads.measure import profile
from vlmfix.insight.grounding import grounding
from vlmfix.settings import Settings
from vlmfix.supply import Question
from vlmfix.testing.text import DECODER, drawn
from vlmfix.upstream import attention
from vlmfix.upstream.positions import context

SHOWN = PICTURES[0][0]
ASKED = "what is here?"
LONG = "what is here? " * 4


def limited(family="llava", *, most=None, beyond=0):
    """A model whose context is so many tokens, or so many more than those of the short question."""
    tiny = tiny_vlm(family)
    vlm = Tiny(model=copy.deepcopy(tiny.model), processor=tiny.processor, family=tiny.family, name=family)
    vlm.model.generation_config.eos_token_id = None  # talks on
    length = vlm.encode([ASKED], [[SHOWN]]).length
    vlm.model.config.get_text_config().max_position_embeddings = most or length + beyond
    return vlm


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    vlm = limited(beyond=0)
    length = vlm.encode([ASKED], [[SHOWN]]).length
    message = rf"has {length} tokens, pictures included, and the model's context is {length} "
    batch = vlm.encode([ASKED], [[SHOWN]])
    calls = {
        "generate": lambda: vlm.generate([SHOWN], ASKED),
        "beams": lambda: vlm.generate([SHOWN], ASKED, num_beams=2),
        "sgrs": lambda: vlm.generate([SHOWN], ASKED, decoder="sgrs"),
        "carve": lambda: vlm.generate([SHOWN], ASKED, decoder="carve"),
        "vicrop": lambda: vlm.refine([SHOWN], ASKED, decoder="vicrop:method=grad-att,terse=false"),
        "pixels": lambda: vlm.refine([SHOWN], ASKED, decoder="vicrop:method=pure-grad,terse=false"),
        "stream": lambda: list(vlm.stream(SHOWN, ASKED)),
        "applied": lambda: parse("spin").applied(vlm, batch).__enter__(),
        "profile": lambda: profile(vlm, [SHOWN], ["vhd"], question=ASKED),
    }
    for name, call in calls.items():
        expected = message if name not in ("carve", "pixels") else "the model's context is"  # asked generally first
        with pytest.raises(DataError, match=expected):
            call()
    with pytest.raises(DataError, match=rf"and its answer 3, and the model's context is {length + 2} "):
        grounding(limited(beyond=2), [SHOWN], ASKED, [[5, 6, 7]])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"temperature": 1.0}, {"decoder": "vcd"}, {"decoder": "sgrs"}, {"static_cache": True}],
    ids=str,
)
def test_an_answer_ends_where_the_context_is_full_whatever_its_neighbours(options):
    vlm, free = limited(beyond=5), limited(most=2048)
    length = vlm.encode([ASKED], [[SHOWN]]).length
    shorter = vlm.encode(["what?"], [[SHOWN]]).length
    rooms = [5, 5 + length - shorter]
    answers = vlm.generate([SHOWN, SHOWN], [ASKED, "what?"], max_new_tokens=12, **options)
    for answer, room, prompt in zip(answers, rooms, (ASKED, "what?"), strict=True):
        (alone,) = free.generate([SHOWN], prompt, max_new_tokens=min(room, 12), **options)
        assert answer.ids == alone.ids
        assert answer.finish == ("context" if room < 12 else "length")


def test_an_answer_that_ends_before_the_context_does_is_whole():
    vlm = limited(beyond=6)
    first = vlm.generate([SHOWN], ASKED, max_new_tokens=6)[0]
    assert (first.tokens, first.finish) == (6, "length")
    vlm.model.generation_config.eos_token_id = first.ids[2]
    (answer,) = vlm.generate([SHOWN], ASKED, max_new_tokens=30)
    assert (answer.ids, answer.finish) == (first.ids[: first.ids.index(first.ids[2]) + 1], "eos")


def test_a_stream_that_the_context_cuts_says_so(caplog):
    vlm = limited(beyond=4)
    said = "".join(vlm.stream(SHOWN, ASKED, max_new_tokens=9))
    assert said.strip() == vlm.generate([SHOWN], ASKED, max_new_tokens=4)[0].text
    assert "the model's context is full" in caplog.text


def test_a_users_generate_ends_there_too():
    vlm = limited(beyond=4)
    batch = vlm.encode([ASKED], [[SHOWN]])
    for spec in ("greedy", "vcd"):
        with parse(spec).applied(vlm, batch) as arguments:
            found = vlm.model.generate(**batch, **arguments, max_new_tokens=9, do_sample=False)
        assert found.shape[1] == batch.length + 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Ignored(Contrast):
    def fuse(self, clean, others, scores):
        return scores


class Instructed(Greedy):
    def plan(self, vlm, batch, layout):
        branch = with_instruction(vlm, batch, "look")
        return DecodingPlan(contrasts=(Ignored(branches=(branch,), rows=torch.ones(batch.rows, dtype=torch.bool)),))


def test_a_branch_with_a_longer_prompt_takes_of_the_context():
    free = limited(most=2048)
    batch = free.encode([ASKED], [[SHOWN]])
    more = with_instruction(free, batch, "look").batch.length - batch.length
    assert more > 0
    (answer,) = limited(beyond=more + 3).generate([SHOWN], ASKED, decoder=Instructed(), max_new_tokens=9)
    assert (answer.tokens, answer.finish) == (3, "context")
    with pytest.raises(DataError, match=f"has {batch.length + more} tokens"):
        limited(beyond=more).generate([SHOWN], ASKED, decoder=Instructed())


def test_a_question_that_is_too_long_fails_alone():
    vlm = limited(beyond=8)
    ask = Answerer(vlm, parse("greedy"), Settings(max_new_tokens=3), batch_size=3)
    questions = [Question(SHOWN, ASKED), Question(SHOWN, LONG), Question(SHOWN, "what?")]
    (settled,) = ask([list(enumerate(questions))], lambda: None)
    assert [number for number, _ in settled] == [0, 1, 2]
    assert "the model's context is" in settled[1][1]
    assert [outcome.tokens for number, outcome in settled if number != 1] == [3, 3]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 100),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 200),
        ({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}, 300),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 400),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 25,
                }
            },
            100,
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 50,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
            },
            100,
        ),
    ],
    ids=["plain", "dynamic", "linear", "yarn", "yarn, stretched already", "llama3"],
)
def test_where_the_context_comes_from(settings, expected):
    module = torch.nn.Module()
    module.config = LlamaConfig(max_position_embeddings=100, **settings)
    assert context(module) == expected


def test_kinds_of_layers_with_embeddings_of_their_own_name_the_context_as_it_is():
    vlm = vlm_of("gemma3")
    decoder = vlm.family.decoder(vlm.model)
    assert context(decoder) == decoder.config.max_position_embeddings


def windowed(beyond):
    """Gemma whose windows are so many tokens wider than the question about a picture."""
    vlm = limited("gemma3", most=2048)
    window = vlm.encode([ASKED], [[SHOWN]]).length + beyond
    vlm.model.config.text_config.sliding_window = window
    for module in vlm.family.attention_modules(vlm.model):
        if module.sliding_window is not None:
            module.sliding_window = window
    return vlm, window


LOGITS = ("vcd", "inter", "icd", "m3id", "flb", "dola", "deco", "avisc", "mod", "revisit")
EDITING = sorted(name for name in STRONG if not name.startswith((*LOGITS, "chain")))


@pytest.mark.parametrize("name", [*EDITING, "sgrs:layers=all"])
def test_edits_act_until_a_window_is_full_and_refuse_what_is_longer(name):
    vlm, window = windowed(4)
    decoder = method_of(STRONG.get(name, name))
    (answer,) = vlm.generate([SHOWN], ASKED, decoder=decoder, max_new_tokens=4)
    assert answer.ids == limited("gemma3", most=2048).generate([SHOWN], ASKED, decoder=decoder, max_new_tokens=4)[0].ids
    layer, _ = narrowest(vlm, range(3))
    with pytest.raises(WindowError, match=rf"5 new ones fill the sliding window of {window} in layer [02].*: 4 new"):
        vlm.generate([SHOWN], ASKED, decoder=decoder, max_new_tokens=5)
    vlm, window = windowed(0)
    with pytest.raises(WindowError, match=rf"fill the sliding window of {window} .* at most {window - 1} fit"):
        vlm.generate([SHOWN], ASKED, decoder=decoder, max_new_tokens=1)
    assert layer == 0


def test_edits_in_layers_without_a_window_go_on():
    vlm, _ = windowed(3)
    (answer,) = vlm.generate([SHOWN], ASKED, decoder="locore:strength=4,layers=1", max_new_tokens=8)
    assert answer.tokens == 8


@pytest.mark.parametrize("beyond", [-20, 0, 3])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["vcd:contrast=0,plausibility=0", "inter:variance=inf,plausibility=0"])
def test_branches_that_change_nothing_change_nothing_beyond_a_window(name, beams, beyond):
    vlm, _ = windowed(beyond)
    options = {"max_new_tokens": 9, "num_beams": beams}
    prompts = [ASKED, LONG]
    plainly, neutrally = (vlm.generate([SHOWN] * 2, prompts, decoder=each, **options) for each in ("greedy", name))
    assert [answer.ids for answer in plainly] == [answer.ids for answer in neutrally]


@pytest.mark.parametrize("beyond", [-20, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_branches_see_the_window_that_they_would_see_alone(beyond, padded):
    """Logits of the contrast are those of clean and distorted rows in passes of their own, without a cache."""
    vlm, _ = windowed(beyond)
    batch = vlm.encode([ASKED, LONG] if padded else [ASKED], [[SHOWN]] * (1 + padded))
    cached = logits(vlm, batch, STRONG["vcd"], steps=8)
    close(cached, logits(vlm, batch, STRONG["vcd"], steps=8, use_cache=False), 1e-3)
    assert (cached - plain(vlm, batch, steps=8)).abs().max() > 1e-2


def test_what_reads_attention_refuses_a_full_window():
    vlm, window = windowed(2)
    with pytest.raises(WindowError, match=f"window of {window} .*: 2 new tokens fit"):
        grounding(vlm, [SHOWN], ASKED, [[5, 6, 7]])
    assert len(grounding(vlm, [SHOWN], ASKED, [[5, 6]])) == 1
    vlm, _ = windowed(0)
    with pytest.raises(WindowError):
        profile(vlm, [SHOWN], ["vhd"], question=ASKED)
    for spec in ("carve:layers=all,terse=false", "vicrop:layers=0,terse=false", "vicrop:method=grad-att,layers=1"):
        with pytest.raises(WindowError):
            vlm.refine([SHOWN], ASKED, decoder=spec)


def test_doctor_says_how_far_edits_act():
    vlm, window = windowed(10_000)
    for name, expected in {"greedy": set(), "vcd": set(), "locore": {window}, "carve": {window}}.items():
        with met(vlm) as windows:
            found = tried(vlm, DECODERS[name]())
        assert set(windows) == expected
        assert found["plain"] is None


@pytest.mark.parametrize("beyond", [-10, 3])
def test_a_text_model_whose_every_layer_has_a_window(beyond):
    tiny = tiny_vlm("llava")
    ids = {"vocab_size": len(tiny.processor.tokenizer), "pad_token_id": 0, "eos_token_id": 2}
    window = limited().encode([ASKED], [[SHOWN]]).length + beyond
    config = copy.deepcopy(tiny.model.config)
    config.text_config = MistralConfig(**DECODER, **ids, sliding_window=window)
    model = drawn(type(tiny.model), config, tiny.processor.tokenizer, seed=0)
    vlm = VLM(model=model, processor=tiny.processor, family=tiny.family)
    batch = vlm.encode([ASKED], [[SHOWN]])
    cached = logits(vlm, batch, STRONG["vcd"], steps=6)
    close(cached, logits(vlm, batch, STRONG["vcd"], steps=6, use_cache=False), 1e-3)
    for spec in ("locore", "sgrs", "vhr"):
        with pytest.raises(WindowError, match=f"sliding window of {window}"):
            vlm.generate([SHOWN], ASKED, decoder=spec, max_new_tokens=6)


def test_mistral_says_its_window_in_the_configuration():
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    for wide in (None, 7):
        module = MistralAttention(MistralConfig(**size, sliding_window=wide), 0)
        assert attention.window(module) == wide
