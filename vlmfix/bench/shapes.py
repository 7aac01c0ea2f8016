"""Models of true shapes with random weights, and what they are shown: weights do not change the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessor,
)

from vlmfix.errors import UsageError
from vlmfix.generation import VLM, load, wrap
from vlmfix.models.places import device_named, dtype_named
from vlmfix.settings import EMBEDDED

QUESTION = "Please describe this image in detail."
"""What every model is asked."""
SIZE = (640, 480)
"""Width and height of a picture in pixels, unless a length of the prompt is asked for."""
TINY = "tiny"


def llava(*, layers: int = 32, device: str = "auto", dtype: str = "auto") -> VLM:
    """LLaVA-1.5-7B's shapes with random weights, and the embedded model's tokenizer.

    Args:
        layers: Layers of the text decoder; the checkpoint has 32.
        device: As ``Checkpoint.load`` takes it.
        dtype: The same; ``auto`` is bfloat16 on a GPU and float32 on the CPU.
    """
    small: Any = AutoProcessor.from_pretrained(EMBEDDED[TINY])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        small.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=small.chat_template,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    picture = small.tokenizer.convert_tokens_to_ids(processor.image_token)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=picture)
    return _drawn(config, processor, device, dtype)


def qwen(*, layers: int = 28, device: str = "auto", dtype: str = "auto") -> VLM:
    """Qwen2.5-VL-7B's shapes with random weights, and the embedded model's tokenizer.

    Args:
        layers: Layers of the text decoder; the checkpoint has 28.
        device: As ``Checkpoint.load`` takes it.
        dtype: The same; ``auto`` is bfloat16 on a GPU and float32 on the CPU.
    """
    processor: Any = AutoProcessor.from_pretrained(EMBEDDED["tiny-qwen"])
    pixels = {"shortest_edge": 3136, "longest_edge": 12845056}
    processor.image_processor = Qwen2VLImageProcessor(patch_size=14, temporal_patch_size=2, merge_size=2, size=pixels)
    small: Any = Qwen2_5_VLConfig.from_pretrained(EMBEDDED["tiny-qwen"])
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **{name: getattr(small, name) for name in ids})
    return _drawn(config, processor, device, dtype)


def tiny(*, device: str = "auto", dtype: str = "auto") -> VLM:
    """The embedded model, with its own weights."""
    return endless(load(TINY, device=device, dtype=dtype))


SHAPES: dict[str, Callable[..., VLM]] = {"llava-1.5-7b": llava, "qwen2.5-vl-7b": qwen, TINY: tiny}
"""What makes a model, by the name on the command line."""


def usual(device: str) -> str:
    """The shapes that are measured where none are asked for: those of a checkpoint on a GPU, else the embedded model's.

    Args:
        device: As ``Checkpoint.load`` takes it.
    """
    return "llava-1.5-7b" if device_named(device).type == "cuda" else TINY


def checkpoint(model: str | Path, device: str = "auto", dtype: str = "auto") -> VLM:
    """A checkpoint of one's own, whose answers do not end by themselves; see ``Checkpoint.load``."""
    return endless(load(model, device=device, dtype=dtype))


def endless(vlm: VLM) -> VLM:
    """The model, told that no token ends an answer: every answer then has the length that is asked for."""
    settings: Any = vlm.model.generation_config
    settings.eos_token_id = None
    return vlm


def _drawn(config: PreTrainedConfig, processor: ProcessorMixin, device: str, dtype: str) -> VLM:
    place = device_named(device)
    kind = dtype_named(dtype, place)
    torch.manual_seed(0)
    with place:
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16 if kind == "auto" else kind, attn_implementation="sdpa"
        )
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return endless(wrap(model.eval(), processor))


def shown(vlm: VLM, rows: int, prompt_tokens: int | None = None) -> tuple[VLM, list[Image.Image]]:
    """Pictures of noise, all different, and the model that is shown them.

    Args:
        vlm: The model.
        rows: How many pictures.
        prompt_tokens: About how many tokens picture and question are to have together; None shows pictures of ``SIZE``.

    Returns:
        The model, whose processor takes a picture as large as that, and the pictures.

    Raises:
        UsageError: The model makes the same number of tokens of every picture.
    """
    width, height = SIZE
    if prompt_tokens is not None:
        around = vlm.encode([QUESTION], [()]).length
        kind = vlm.processor.image_processor
        try:
            cell = kind.patch_size * kind.merge_size
        except AttributeError as error:
            raise UsageError(
                f"the number of tokens that {vlm.family.title} makes of a picture cannot be chosen by its size",
                "leave --prompt-tokens out, or take --shapes qwen2.5-vl-7b or a Qwen-VL model",
            ) from error
        width = height = cell * max(1, round(math.sqrt(prompt_tokens - around)) if prompt_tokens > around else 1)
        least = kind.size["shortest_edge"]
        vlm = replace(vlm, processor=vlm.family.limited(vlm.processor, most=max(width * height, least), least=None))
    return vlm, [_noise(width, height, seed) for seed in range(rows)]


def _noise(width: int, height: int, seed: int) -> Image.Image:
    dice = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), generator=dice, dtype=torch.uint8).numpy())
