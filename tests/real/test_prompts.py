"""Prompts, tokens around pictures and ends of answers of the published checkpoints, to the letter."""

from __future__ import annotations

import re
from contextlib import contextmanager
from itertools import groupby

import pytest
import torch
from PIL import Image

from tests.real.published import NOT_HERE, PUBLISHED, SHARED

QUESTION = "What is this?"

RENDERED = {
    "llava-1.5-7b-hf": (
        "USER: <image>\nWhat is this? ASSISTANT:",
        "USER: <image>\n<image>\nWhat is this? ASSISTANT:",
    ),
    "llava-v1.6-mistral-7b-hf": (
        "[INST] <image>\nWhat is this? [/INST]",
        "[INST] <image>\n<image>\nWhat is this? [/INST]",
    ),
    "llava-onevision-qwen2-7b-ov-hf": (
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|><|im_start|>assistant\n",
        "<|im_start|>user\n<image><image>\nWhat is this?<|im_end|><|im_start|>assistant\n",
    ),
    "Qwen2-VL-2B-Instruct": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "What is this?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Qwen3-VL-4B-Instruct": (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "What is this?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "InternVL3-1B-hf": (
        "<|im_start|>user\n<IMG_CONTEXT>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Idefics3-8B-Llama3": (
        "<|begin_of_text|>User:<image>What is this?<end_of_utterance>\nAssistant:",
        "<|begin_of_text|>User:<image><image>What is this?<end_of_utterance>\nAssistant:",
    ),
    "SmolVLM-256M-Instruct": (
        "<|im_start|>User:<image>What is this?<end_of_utterance>\nAssistant:",
        "<|im_start|>User:<image><image>What is this?<end_of_utterance>\nAssistant:",
    ),
    "gemma-3-4b-it": (
        "<bos><start_of_turn>user\n<start_of_image>What is this?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\n<start_of_image><start_of_image>What is this?<end_of_turn>\n<start_of_turn>model\n",
    ),
}
RENDERED["Qwen2.5-VL-7B-Instruct"] = RENDERED["Qwen2-VL-2B-Instruct"]
RENDERED["SmolVLM2-500M-Video-Instruct"] = RENDERED["SmolVLM-256M-Instruct"]
"""The prompt with one picture and with two."""

WITH_SYSTEM = {
    "llava-1.5-7b-hf": "Be brief. USER: <image>\nWhat is this? ASSISTANT:",
    "llava-v1.6-mistral-7b-hf": "<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] <image>\nWhat is this? [/INST]",
    "llava-onevision-qwen2-7b-ov-hf": "<|im_start|>system\n\nBe brief.<|im_end|>"
    + RENDERED["llava-onevision-qwen2-7b-ov-hf"][0],
    "Qwen2-VL-2B-Instruct": RENDERED["Qwen2-VL-2B-Instruct"][0].replace("You are a helpful assistant.", "Be brief."),
    "Qwen2.5-VL-7B-Instruct": RENDERED["Qwen2-VL-2B-Instruct"][0].replace("You are a helpful assistant.", "Be brief."),
    "Qwen3-VL-4B-Instruct": "<|im_start|>system\nBe brief.<|im_end|>\n" + RENDERED["Qwen3-VL-4B-Instruct"][0],
    "InternVL3-1B-hf": "<|im_start|>system\nBe brief.<|im_end|>\n" + RENDERED["InternVL3-1B-hf"][0],
    "Idefics3-8B-Llama3": "<|begin_of_text|>System: Be brief.<end_of_utterance>\n"
    "User:<image>What is this?<end_of_utterance>\nAssistant:",
    "SmolVLM-256M-Instruct": "<|im_start|>System: Be brief.<end_of_utterance>\n"
    "User:<image>What is this?<end_of_utterance>\nAssistant:",
    "SmolVLM2-500M-Video-Instruct": "<|im_start|>System: Be brief.<end_of_utterance>\n"
    "User:<image>What is this?<end_of_utterance>\nAssistant:",
    "gemma-3-4b-it": "<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>What is this?<end_of_turn>\n"
    "<start_of_turn>model\n",
}

FAKE = "<fake_token_around_image>"


def tiles(rows, columns, tokens):
    """How SmolVLM and Idefics3 write a picture in tiles."""
    lines = [
        "".join(f"{FAKE}<row_{row}_col_{column}>[{tokens}]" for column in range(1, columns + 1))
        for row in range(1, rows + 1)
    ]
    return "\n".join([*lines, f"\n{FAKE}<global-img>[{tokens}]{FAKE}"])


THIN, BOX = Image.new("RGB", (1000, 37), "navy"), Image.new("RGB", (64, 64), "olive")

ENCODED = {
    "llava-1.5-7b-hf": "<s>USER: [576]\n[576]\nWhat is this? ASSISTANT:",
    "llava-v1.6-mistral-7b-hf": "<s>[INST] [722]\n[1176]\nWhat is this? [/INST]",
    "llava-onevision-qwen2-7b-ov-hf": "<|im_start|>user\n[1460]\nWhat is this?<|im_end|><|im_start|>assistant\n",
    "Qwen2-VL-2B-Instruct": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>[36]<|vision_end|><|vision_start|>[4]<|vision_end|>What is this?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Qwen3-VL-4B-Instruct": "<|im_start|>user\n<|vision_start|>[84]<|vision_end|><|vision_start|>[64]<|vision_end|>"
    "What is this?<|im_end|>\n<|im_start|>assistant\n",
    "InternVL3-1B-hf": "<|im_start|>user\n<img>[3328]</img>\n<img>[256]</img>\nWhat is this?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Idefics3-8B-Llama3": f"<|begin_of_text|>User:{tiles(1, 4, 169)}{tiles(4, 4, 169)}What is this?"
    "<end_of_utterance>\nAssistant:",
    "SmolVLM-256M-Instruct": f"<|im_start|>User:{tiles(1, 4, 64)}{tiles(4, 4, 64)}What is this?"
    "<end_of_utterance>\nAssistant:",
    "gemma-3-4b-it": "<bos><start_of_turn>user\n\n\n<start_of_image>[256]<end_of_image>\n\n"
    "\n\n<start_of_image>[256]<end_of_image>\n\nWhat is this?<end_of_turn>\n<start_of_turn>model\n",
}
ENCODED["Qwen2.5-VL-7B-Instruct"] = ENCODED["Qwen2-VL-2B-Instruct"]
ENCODED["SmolVLM2-500M-Video-Instruct"] = ENCODED["SmolVLM-256M-Instruct"]
"""What the tokens say of a picture of 1000 x 37 pixels and one of 64 x 64, each run of image tokens as its number."""


def written(vlm, ids):
    """The text of token ids, with the number of image tokens in place of each run of them."""
    image, decode = vlm.family.image_token(vlm.model.config), vlm.processor.tokenizer.decode
    runs = [(marked, list(run)) for marked, run in groupby(ids, lambda token: token == image)]
    return "".join(f"[{len(run)}]" if marked else decode(run) for marked, run in runs)


def test_the_prompt_is_the_published_template_s(vlm, name):
    assert (vlm.render(QUESTION, 1), vlm.render(QUESTION, 2)) == RENDERED[name]


@pytest.mark.skipif(not SHARED.is_dir(), reason=NOT_HERE)
def test_a_system_message_stands_where_the_published_template_puts_it(vlm, name):
    assert vlm.render(QUESTION, 1, system="Be brief.") == WITH_SYSTEM[name]


def test_tokens_are_the_prompt_with_its_pictures_unfolded(vlm, name):
    batch = vlm.encode([QUESTION], [[THIN, BOX]])
    ids = batch["input_ids"][0].tolist()
    assert written(vlm, ids) == ENCODED[name]
    special = PUBLISHED[name].tokens
    known = {token: number for token, number in special.items() if token in re.split(r"(<[^<>]+>)", ENCODED[name])}
    assert all(number in ids for number in known.values())


def test_a_row_with_fewer_tokens_is_filled_up_on_its_left(vlm, name):
    batch = vlm.encode(["?", "What?"], [[], [BOX]])
    text, pad = batch["input_ids"][0], PUBLISHED[name].tokens[PUBLISHED[name].roles["pad_token"]]
    filled = int((batch["attention_mask"][0] == 0).sum())
    assert filled > 1
    assert (text[:filled] == pad).all()
    assert written(vlm, text[filled:].tolist()) == written(vlm, vlm.encode(["?"], [[]])["input_ids"][0].tolist())


# Generation settings

TURN_ENDS = {
    "llava-1.5-7b-hf": "</s>",
    "llava-v1.6-mistral-7b-hf": "</s>",
    "Idefics3-8B-Llama3": "<end_of_utterance>",
    "SmolVLM-256M-Instruct": "<end_of_utterance>",
    "SmolVLM2-500M-Video-Instruct": "<end_of_utterance>",
    "gemma-3-4b-it": "<end_of_turn>",
}
"""What closes a turn of the dialogue; ``<|im_end|>`` in the others."""

ROWS = {"pictures": [[], []], "prompts": ["?", "What?"]}


@contextmanager
def saying(model, *scores):
    """Makes a model give tokens a score in each row, at every step; all others are far below.

    Args:
        model: The model.
        *scores: For each row, token ids with their scores.
    """

    def force(module, args, logits):
        logits = torch.full_like(logits, -100.0)
        there = scores[-len(logits) :]  # the first row is the first to end, and then gone
        for row in range(len(logits)):  # a row may have several beams
            for token, score in there[row * len(there) // len(logits)].items():
                logits[row, ..., token] = score
        return logits

    hook = model.get_output_embeddings().register_forward_hook(force)
    try:
        yield
    finally:
        hook.remove()


def test_each_published_end_token_ends_an_answer_and_padding_does_not(vlm, name):
    published = PUBLISHED[name]
    stops = published.generation.get("eos_token_id", [])
    stops = stops if isinstance(stops, list) else [stops]
    for token in {*stops, published.tokens[published.roles["pad_token"]]}:
        with saying(vlm.model, {token: 1.0}, {50: 1.0}):
            ended, goes_on = vlm.generate(**ROWS, max_new_tokens=2)
        expected = ("eos", (token,)) if token in stops else ("length", (token, token))
        assert (ended.finish, ended.ids) == expected
        assert (goes_on.finish, goes_on.ids) == ("length", (50, 50))


def test_the_end_of_a_turn_ends_an_answer(vlm, name):
    token = PUBLISHED[name].tokens[TURN_ENDS.get(name, "<|im_end|>")]
    with saying(vlm.model, {token: 1.0}, {50: 1.0}):
        ended, _ = vlm.generate(**ROWS, max_new_tokens=2)
    assert (ended.finish, ended.ids) == ("eos", (token,))


def test_published_sampling_and_penalties_do_not_act(vlm, name):
    """Two tokens are nearly as probable; the better one stands in the prompt."""
    (said,) = vlm.processor.tokenizer("?", add_special_tokens=False)["input_ids"]
    for spec in ("greedy", "vcd", "beam:num_beams=2"):
        with saying(vlm.model, {said: 1.0, 50: 0.97}, {said: 1.0, 50: 0.97}):
            answers = vlm.generate(**ROWS, decoder=spec, max_new_tokens=1)
        assert [answer.ids for answer in answers] == [(said,)] * 2
