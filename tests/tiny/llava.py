"""Tiny LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.testing.llava import VICUNA, VISION, checkpoint, llava, text_parts
from vlmfix.testing.text import byte_tokenizer, drawn

CHATML = """{%- for message in messages -%}
<|im_start|>{{ message.role }} {% for part in message.content if part.type == 'image' -%}<image>{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ '\n' + part.text }}{%- endfor -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"""
"""ChatML as LLaVA-OneVision writes it."""


def build(name: str, seed: int) -> Checkpoint:
    """The tiny model ``llava``, ``llava_next`` or ``llava_onevision``."""
    return {"llava": llava, "llava_next": _llava_next, "llava_onevision": _llava_onevision}[name](seed)


def _llava_next(seed: int) -> Checkpoint:
    """A base tile of 3 x 3 tokens and up to four large ones with newlines."""
    tokenizer = byte_tokenizer(named={"image_token": "<image>"})
    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=24, projection_dim=32),
        image_grid_pinpoints=pinpoints,
        image_seq_length=9,
        **text_parts(LlamaConfig, tokenizer),
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return checkpoint(drawn(LlavaNextForConditionalGeneration, config, tokenizer, seed=seed), processor)


def _llava_onevision(seed: int) -> Checkpoint:
    """Tiles of 26 pixels, of which whole patches cover 24, and at most about four tiles' worth of tokens."""
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        named={"image_token": "<image>", "video_token": "<video>"},
        eos="<|im_end|>",
    )
    pinpoints = [[26 * lines, 26 * columns] for lines in (1, 2, 3) for columns in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=26, vision_use_head=False),
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
        **text_parts(Qwen2Config, tokenizer),
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size={"height": 26, "width": 26}, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size={"height": 26, "width": 26}),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=CHATML,
    )
    return checkpoint(drawn(LlavaOnevisionForConditionalGeneration, config, tokenizer, seed=seed), processor)
