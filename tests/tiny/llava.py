"""Tiny LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.tiny.text import DECODER, byte_tokenizer, drawn
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.families import family_of

VISION = {
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

CHATML = """{%- for message in messages -%}
<|im_start|>{{ message.role }} {% for part in message.content if part.type == 'image' -%}<image>{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ '\n' + part.text }}{%- endfor -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"""
"""ChatML as LLaVA-OneVision writes it."""


def build(name: str, seed: int) -> Checkpoint:
    """The tiny model ``llava``, ``llava_next`` or ``llava_onevision``."""
    return {"llava": _llava, "llava_next": _llava_next, "llava_onevision": _llava_onevision}[name](seed)


def _llava(seed: int) -> Checkpoint:
    """5 x 5 tokens of the middle square; CLIP's class token is dropped."""
    tokenizer = byte_tokenizer(named={"image_token": "<image>"})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=40, projection_dim=32),
        image_seq_length=25,
        **_text(LlamaConfig, tokenizer),
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return _checkpoint(drawn(LlavaForConditionalGeneration, config, tokenizer, seed=seed), processor)


def _llava_next(seed: int) -> Checkpoint:
    """A base tile of 3 x 3 tokens and up to four large ones with newlines."""
    tokenizer = byte_tokenizer(named={"image_token": "<image>"})
    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=24, projection_dim=32),
        image_grid_pinpoints=pinpoints,
        image_seq_length=9,
        **_text(LlamaConfig, tokenizer),
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
    return _checkpoint(drawn(LlavaNextForConditionalGeneration, config, tokenizer, seed=seed), processor)


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
        **_text(Qwen2Config, tokenizer),
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
    return _checkpoint(drawn(LlavaOnevisionForConditionalGeneration, config, tokenizer, seed=seed), processor)


def _text(kind: type[Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The text config and the image token, as every LLaVA config takes them."""
    text = kind(
        **DECODER,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {"text_config": text, "image_token_index": tokenizer.image_token_id}


def _checkpoint(model: Any, processor: Any) -> Checkpoint:
    return Checkpoint(model=model, processor=processor, family=family_of(model.config.model_type))
