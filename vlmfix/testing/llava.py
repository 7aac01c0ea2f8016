"""Makes a tiny LLaVA-1.5, and what the tiny models of its relatives share with it."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.families import family_of
from vlmfix.testing.text import DECODER, byte_tokenizer, drawn

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}

VICUNA = """{%- for message in messages -%}
{%- if message.role == 'user' -%}USER: {% elif message.role == 'assistant' -%}ASSISTANT: {% endif -%}
{%- for part in message.content if part.type == 'image' -%}<image>{{ '\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""
"""Vicuna's dialogue as LLaVA-1.5 and LLaVA-NeXT write it: a bare system message, pictures first."""


def llava(seed: int) -> Checkpoint:
    """Makes a LLaVA-1.5 with random weights: a picture's middle square becomes 5 x 5 tokens, without a class token."""
    tokenizer = byte_tokenizer(named={"image_token": "<image>"})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=40, projection_dim=32),
        image_seq_length=25,
        **text_parts(LlamaConfig, tokenizer),
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return checkpoint(drawn(LlavaForConditionalGeneration, config, tokenizer, seed=seed), processor)


def text_parts(kind: type[Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Makes the text config and the image token, as every LLaVA config takes them."""
    text = kind(
        **DECODER,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {"text_config": text, "image_token_index": tokenizer.image_token_id}


def checkpoint(model: Any, processor: Any) -> Checkpoint:  # noqa: ANN401
    """Puts a model and its processor together."""
    return Checkpoint(model=model, processor=processor, family=family_of(model.config.model_type))
