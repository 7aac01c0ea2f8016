"""What is said before a question: system messages and earlier turns, their pictures, and what cannot have them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, unlike, vlm_of
from tests.embedded import TINY
from vlmfix import Turn
from vlmfix.decoders import parse
from vlmfix.decoding.branches import without_picture, without_question
from vlmfix.errors import DataError, IncompatibleDecodersError, UnsupportedModelError, UsageError

ONE, TWO, THREE = PICTURES[0][0], *PICTURES[1]
TALK = (Turn("system", "be brief"), Turn("user", "what is here?", 1), Turn("assistant", "a dog"))


def rendered(vlm, messages):
    """The prompt as the checkpoint's own template writes it."""
    return vlm.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("family", unlike())
def test_turns_stand_in_the_prompt_as_the_template_writes_them(family):
    vlm = vlm_of(family)
    words = [{"type": "text", "text": turn.text} for turn in TALK]
    messages = [
        {"role": "system", "content": [words[0]]},
        {"role": "user", "content": [{"type": "image"}, words[1]]},
        {"role": "assistant", "content": [words[2]]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and now?"}]},
    ]
    batch = vlm.encode(["and now?", PROMPTS[0]], [[TWO, THREE], [ONE]], earlier=[TALK, ()])
    own = vlm.processor(text=[rendered(vlm, messages)], images=[[TWO, THREE]], return_tensors="pt")
    real = batch.attention_mask[0].bool()
    assert batch["input_ids"][0][real].tolist() == own["input_ids"][0].tolist()
    alone = vlm.encode([PROMPTS[0]], [[ONE]])
    assert batch["input_ids"][1][batch.attention_mask[1].bool()].tolist() == alone["input_ids"][0].tolist()


@pytest.mark.parametrize("decoder", ["greedy", "vcd:plausibility=0", "inter:variance=0,plausibility=0", "vhr:alpha=4"])
def test_an_answer_in_a_conversation_does_not_depend_on_its_neighbours(decoder):
    vlm = vlm_of("llava")
    rows, prompts, earlier = [[TWO, THREE], [ONE], []], ["and now?", PROMPTS[0], "hello"], [TALK, (), TALK[:1]]
    call = {"decoder": decoder, "max_new_tokens": 6}
    together = vlm.generate(rows, prompts, earlier=earlier, **call)
    for row, prompt, turns, answer in zip(rows, prompts, earlier, together, strict=True):
        assert vlm.generate([row], prompt, earlier=[turns], **call)[0].ids == answer.ids
    plain = vlm.generate(rows, prompts, **call)
    assert [one.ids == other.ids for one, other in zip(together, plain, strict=True)] == [False, True, False]


def test_branches_keep_what_was_said_before():
    vlm = vlm_of("llava")
    batch = vlm.encode(["and now?", PROMPTS[0]], [[TWO, THREE], [ONE]], earlier=[TALK, ()])
    for make, asked, shown in ((without_question, "", [[TWO, THREE], [ONE]]), (without_picture, None, [[], []])):
        branch = make(vlm, batch).batch
        for row, (question, pictures) in enumerate(zip(batch.prompts, shown, strict=True)):
            turns = [replace(turn, pictures=turn.pictures * bool(pictures)) for turn in (TALK, ())[row]]
            alone = vlm.encode([question if asked is None else asked], [pictures], earlier=[turns])
            real = branch["input_ids"][row][branch.attention_mask[row].bool()]
            assert real.tolist() == alone["input_ids"][0].tolist()


def test_a_system_message_of_all_rows_replaces_their_own():
    vlm = vlm_of("llava")
    said = vlm.encode("hello", [[ONE]], system="be kind", earlier=[(Turn("system", "be brief"),)])
    assert said["input_ids"].tolist() == vlm.encode("hello", [[ONE]], system="be kind")["input_ids"].tolist()
    call = {"system": "be kind", "max_new_tokens": 6}
    (answer,) = vlm.generate([ONE], "hello", **call)
    assert answer.ids != vlm.generate([ONE], "hello", max_new_tokens=6)[0].ids
    assert "".join(vlm.stream(ONE, "hello", **call)).rstrip() == answer.text
    prepared = vlm.prepared(["hello"], [[ONE]], system="be kind")
    with pytest.raises(UsageError, match="other pictures or questions"):
        vlm.generate([ONE], "hello", prepared=prepared)


def test_a_stream_goes_on_with_a_conversation():
    vlm = vlm_of("llava")
    (answer,) = vlm.generate([[TWO, THREE]], "and now?", earlier=[TALK], max_new_tokens=6)
    streamed = "".join(vlm.stream([TWO, THREE], "and now?", earlier=TALK, max_new_tokens=6))
    assert streamed.rstrip() == answer.text
    beams = {"decoder": "beam:num_beams=3", "max_new_tokens": 6, "earlier": TALK}
    (answer,) = vlm.generate([[TWO, THREE]], "and now?", **beams | {"earlier": [TALK]})
    assert list(vlm.stream([TWO, THREE], "and now?", **beams)) == [answer.text]


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        ([], "one list for each of 1 questions"),
        ([["a dog"]], r"earlier\[0\] is not a list of turns"),
        ([[Turn("user", "\ud800"), TALK[2]]], "no text"),
        ([[Turn("user", "what?")]], "has the roles user"),
        ([[TALK[1], TALK[2], TALK[0]]], "roles user, assistant, system"),
        ([[Turn("user", "what?"), Turn("assistant", "this", 1)]], "not the user's"),
        ([[Turn("user", "what?", 2), TALK[2]]], "2 pictures and its row 1"),
    ],
)
def test_what_was_said_is_checked(earlier, message):
    with pytest.raises(DataError, match=message):
        vlm_of("llava").generate([ONE], "and now?", earlier=earlier)


def test_a_template_that_drops_the_system_message_is_refused(monkeypatch):
    vlm = vlm_of("llava")
    template = (TINY["tiny"] / "chat_template.jinja").read_text()
    monkeypatch.setattr(vlm.processor, "chat_template", "{% set messages = messages[-1:] %}" + template)
    with pytest.raises(UnsupportedModelError, match="leaves out what the system said"):
        vlm.encode("hello", [[ONE]], system="be kind")


def test_inputs_with_a_video_are_refused():
    vlm = vlm_of("llava")
    inputs = dict(vlm.encode("hello", [[ONE]])) | {"pixel_values_videos": torch.zeros(1, 3, 4, 4)}
    with (
        pytest.raises(IncompatibleDecodersError, match=r"hold a video \(pixel_values_videos\)"),
        parse("vcd").applied(vlm, inputs),
    ):
        pass


def test_a_refining_decoder_takes_one_question():
    with pytest.raises(IncompatibleDecodersError, match="more than that was said"):
        vlm_of("llava").generate([ONE], "and now?", decoder="vicrop", system="be kind")


def test_every_row_may_have_its_own_limit_and_seed():
    vlm = vlm_of("llava")
    rows, prompts = [list(row) for row in PICTURES], list(PROMPTS)
    for static in (False, True):
        call = {"temperature": 1.5, "static_cache": static}
        together = vlm.generate(rows, prompts, max_new_tokens=[3, 6], seed=[5, 6], **call)
        alone = [
            vlm.generate([row], prompt, max_new_tokens=limit, seed=seed, **call)[0]
            for row, prompt, limit, seed in zip(rows, prompts, (3, 6), (5, 6), strict=True)
        ]
        assert [answer.ids for answer in together] == [answer.ids for answer in alone]
        assert [answer.finish for answer in together] == [answer.finish for answer in alone]
    with pytest.raises(UsageError, match="3 values of max_new_tokens for 2 questions"):
        vlm.generate(rows, prompts, max_new_tokens=[1, 2, 3])


class Leaver:
    """Listens, and lets a sample go after some steps."""

    def __init__(self, leaves):
        self.leaves, self.prompts, self.heard = leaves, [], []

    def began(self, prompts):
        self.prompts = list(prompts)

    def following(self, choice):
        return choice

    def said(self, said):
        self.heard.append(dict(zip(said.samples, said.tokens, strict=True)))
        return [sample for sample, step in self.leaves.items() if step == len(self.heard)]


@pytest.mark.parametrize("decoder", ["greedy", "vcd:plausibility=0", "sgrs"])
def test_a_listener_hears_every_token_and_lets_samples_go(decoder):
    vlm = vlm_of("llava")
    rows, prompts = [list(row) for row in PICTURES], list(PROMPTS)
    call = {"decoder": decoder, "max_new_tokens": 6}
    plain = vlm.generate(rows, prompts, **call)
    listener = Leaver({0: 2})
    answers = vlm.generate(rows, prompts, listener=listener, **call)
    assert (answers[0].ids, answers[1].ids) == (plain[0].ids[:2], plain[1].ids)
    assert [sorted(step) for step in listener.heard] == [[0, 1]] * 2 + [[1]] * (len(plain[1].ids) - 2)
    assert tuple(step[1] for step in listener.heard) == plain[1].ids
    assert listener.prompts == vlm.encode(prompts, rows).lengths.tolist()
    with pytest.raises(IncompatibleDecodersError, match="a listener with a static cache"):
        vlm.generate(rows, prompts, listener=listener, static_cache=True, **call)


@pytest.mark.parametrize("family", unlike())
def test_a_picture_that_is_written_is_refused(family):
    vlm = vlm_of(family)
    mark = vlm.processor.tokenizer.convert_ids_to_tokens(vlm.family.image_token(vlm.model.config))
    with pytest.raises(DataError, match="stands for a picture"):
        vlm.generate([ONE], f"what is {mark} here?", max_new_tokens=2)
    with pytest.raises(DataError, match="stands for a picture"):
        vlm.generate([ONE], "and now?", earlier=[[Turn("user", mark), Turn("assistant", "a dog")]], max_new_tokens=2)
