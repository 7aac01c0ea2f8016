"""Tiny Gemma 3."""

from __future__ import annotations

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.families import family_of
from vlmfix.testing.text import DECODER, byte_tokenizer, drawn

TURNS = """{{ bos_token }}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.system = message.content[0].text + '\n\n' -%}
{%- else -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}{{ '\n' }}
{{- ns.system }}{%- set ns.system = '' -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<start_of_image>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<end_of_turn>{{ '\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model{{ '\n' }}{%- endif -%}"""
"""Gemma's turns: a system message goes before the words of the user's."""


def build(name: str, seed: int) -> Checkpoint:
    """4 x 4 tokens per picture, pooled from 8 x 8 patches; two sliding-window layers of three."""
    tokenizer = byte_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            **DECODER,
            vocab_size=len(tokenizer),
            query_pre_attn_scalar=8,
            sliding_window=1024,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            vision_use_head=False,
        ),
        mm_tokens_per_image=16,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        chat_template=TURNS,
        image_seq_length=16,
    )
    model = drawn(Gemma3ForConditionalGeneration, config, tokenizer, seed=seed)
    return Checkpoint(model=model, processor=processor, family=family_of(name))
