"""Where a model looks while it writes a caption, and whether it has attention sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tools.training.questions import DESCRIBE
from vlmfix.generation import VLM

REGIONS = ("beginning", "image", "question", "generated")


def looking(vlm: VLM, pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, Any]:
    """Measure attention mass and the largest activations while captions are written.

    Args:
        vlm: The model.
        pictures: One for each row.
        captions: What the model said about them.

    Returns:
        `mass`: for each region (beginning: what stands before the picture) the share of the attention of the
        caption's tokens, per layer; `first token` and `top image token`: share of the attention that the first token
        and the most attended image token get, per layer; `largest`: for the first token, image tokens and text tokens
        the largest |x_d| / rms(x) of the hidden states after each layer; a model with sinks passes 20. It cannot
        exceed the square root of the width, 16 for a width of 256.
    """
    parts = ("text_config", "vision_config")
    before = {part: getattr(vlm.model.config, part)._attn_implementation for part in parts}
    vlm.model.set_attn_implementation("eager")
    try:
        rows = [_one(vlm, picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    finally:
        vlm.model.set_attn_implementation(before)
    mass = torch.stack([row["mass"] for row in rows]).mean(0)  # (4, L)
    largest = torch.stack([row["largest"] for row in rows]).amax(0)  # (3, L)
    return {
        "mass": {name: mass[number].tolist() for number, name in enumerate(REGIONS)},
        "first token": torch.stack([row["first"] for row in rows]).mean(0).tolist(),
        "top image token": torch.stack([row["top"] for row in rows]).mean(0).tolist(),
        "largest": {name: largest[number].tolist() for number, name in enumerate(("first", "image", "text"))},
    }


def _one(vlm: VLM, picture: Image.Image, caption: str) -> dict[str, Tensor]:
    batch = vlm.encode([DESCRIBE[0]], [[picture]])
    asked = batch.length
    said = vlm.processor.tokenizer(_said(vlm, caption), add_special_tokens=False, return_tensors="pt")["input_ids"]
    said = said.to(vlm.device)  # (1, n)
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    inputs["input_ids"] = torch.cat([batch["input_ids"], said], dim=1)  # (1, T)
    if "mm_token_type_ids" in inputs:  # 0 is text
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(said)], dim=1)  # (1, T)
    with torch.inference_mode():
        out = vlm.model(**inputs, output_attentions=True, output_hidden_states=True)
    ids = inputs["input_ids"]
    ids = ids[0]  # (T,)
    image = ids == vlm.model.config.image_token_id
    first = int(image.nonzero()[0])
    place = torch.arange(len(ids), device=ids.device)
    regions = torch.stack(
        [place < first, image, (place > first) & ~image & (place < asked), place >= asked]
    ).float()  # (4, T)
    # the query that predicts a caption token is the one before it
    rows = torch.stack([layer[0].float().mean(0)[asked - 1 : -1] for layer in out.attentions])  # (L, Q, T)
    states = torch.stack(out.hidden_states[1:]).float()[:, 0]  # (L, T, width)
    ratio = states.abs().amax(-1) / states.square().mean(-1).sqrt()  # (L, T)
    text = ~image & (place > 0)
    return {
        "mass": torch.einsum("lqt,rt->rl", rows, regions) / rows.shape[1],
        "first": rows[..., 0].mean(-1),
        "top": (rows * image).mean(1).amax(-1),
        "largest": torch.stack([ratio[:, 0], ratio[:, image].amax(-1), ratio[:, text].amax(-1)]),
    }


def _said(vlm: VLM, caption: str) -> str:
    """The caption as it stands behind the prompt: with what the chat template puts between the two."""
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE[0]}]}
    ]
    talk = [*asked, {"role": "assistant", "content": [{"type": "text", "text": caption}]}]
    before = len(vlm.render(DESCRIBE[0], 1))
    text = str(vlm.processor.apply_chat_template(talk, tokenize=False))
    return text[before : text.index(caption, before) + len(caption)]
