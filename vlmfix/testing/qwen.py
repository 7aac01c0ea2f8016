"""Makes tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL: 8 by 8 pixels to a token, at most 24 tokens per picture."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.qwen_vl import QwenVL
from vlmfix.testing.text import DECODER, byte_tokenizer, drawn

TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part['text'] }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

PIXELS: dict[str, Any] = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 4 * 64, "longest_edge": 24 * 64},
}
VISION = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 4}


class Kind(NamedTuple):
    """Holds what one generation of Qwen-VL differs in."""

    config: type[Any]
    model: type[PreTrainedModel]
    processor: type[ProcessorMixin]
    video: type[Any]
    vision: dict[str, Any]
    rope: dict[str, Any]


KINDS = {
    "qwen2_vl": Kind(
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        {"embed_dim": 32, "hidden_size": 64},
        {"type": "mrope"},
    ),
    "qwen2_5_vl": Kind(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        {"type": "mrope"},
    ),
    "qwen3_vl": Kind(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        {"rope_type": "default", "mrope_interleaved": True},
    ),
}


def build(name: str, seed: int) -> Checkpoint:
    """Makes a tiny Qwen-VL with random weights.

    Args:
        name: ``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``.
        seed: Seed of its weights.
    """
    kind = KINDS[name]
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
        pad="<|endoftext|>",
        eos="<|im_end|>",
    )
    ids = tokenizer.convert_tokens_to_ids
    text = {
        **DECODER,
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [2, 1, 1], **kind.rope},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = kind.config(
        text_config=text,
        vision_config={**VISION, **kind.vision},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    processor = kind.processor(
        image_processor=Qwen2VLImageProcessor(**PIXELS),
        tokenizer=tokenizer,
        video_processor=kind.video(**PIXELS),
        chat_template=TEMPLATE,
    )
    return Checkpoint(drawn(kind.model, config, tokenizer, seed=seed), processor, QwenVL(), name=name)
