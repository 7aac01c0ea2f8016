"""Tiny Idefics3 and SmolVLM: tiles of 24 pixels in nine tokens, at most two by two and the whole picture.

The tokenizer of SmolVLM has a token per tile name and that of Idefics3 spells it: released models do either.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.tiny.decoder import text_config
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.smolvlm import SmolVLM
from vlmfix.testing.text import byte_tokenizer, drawn

TEMPLATE = """\
%s
{%%- for message in messages %%}{{ message['role'] | capitalize }}:
{%%- for part in message['content'] %%}
{%%- if part['type'] == 'image' %%}<image>{%% else %%}{{ ' ' + part['text'] }}{%% endif %%}
{%%- endfor %%}<end_of_utterance>
{%% endfor %%}
{%%- if add_generation_prompt %%}Assistant:{%% endif %%}"""

SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<video>"]
TILE_NAMES = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))]
PIXELS = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
VIDEO: dict[str, Any] = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 24}}


def build(name: str, seed: int) -> Checkpoint:
    """A tiny Idefics3 or SmolVLM, both with a Llama decoder.

    Args:
        name: ``idefics3`` or ``smolvlm``.
        seed: Seed of its weights.
    """
    small = name == "smolvlm"
    begin = "<|im_start|>" if small else "<|begin_of_text|>"
    special = SPECIAL + TILE_NAMES if small else SPECIAL
    tokenizer = byte_tokenizer(special, bos=begin, eos="<end_of_utterance>")
    config = (SmolVLMConfig if small else Idefics3Config)(
        text_config=text_config("llama", tokenizer),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 4,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    kind = SmolVLMForConditionalGeneration if small else Idefics3ForConditionalGeneration
    processor = _processor(tokenizer, TEMPLATE % begin, small=small)
    return Checkpoint(drawn(kind, config, tokenizer, seed=seed), processor, SmolVLM(), name=name)


def _processor(tokenizer: PreTrainedTokenizerFast, template: str, *, small: bool) -> ProcessorMixin:
    if not small:
        return Idefics3Processor(
            image_processor=Idefics3ImageProcessor(**PIXELS),
            tokenizer=tokenizer,
            image_seq_len=9,
            chat_template=template,
        )
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**PIXELS),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**VIDEO),
        image_seq_len=9,
        chat_template=template,
    )
