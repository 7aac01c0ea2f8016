"""Tiny InternVL: tiles of 24 pixels in nine tokens, at most six tiles and the thumbnail."""

from __future__ import annotations

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from tests.tiny.decoder import text_config
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.internvl import InternVL
from vlmfix.testing.text import byte_tokenizer, drawn

TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TILE = {"height": 24, "width": 24}
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def build(name: str, seed: int) -> Checkpoint:
    """A tiny InternVL with a Qwen2 decoder.

    Args:
        name: ``internvl``.
        seed: Seed of its weights.
    """
    tokenizer = byte_tokenizer(["<|im_start|>"], named=NAMED, pad="<|endoftext|>", eos="<|im_end|>")
    config = InternVLConfig(
        text_config=text_config("qwen2", tokenizer),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [24, 24],
            "patch_size": [4, 4],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=TILE, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=TILE),
        image_seq_length=9,
        chat_template=TEMPLATE,
    )
    model = drawn(InternVLForConditionalGeneration, config, tokenizer, seed=seed)
    return Checkpoint(model, processor, InternVL(), name=name)
