"""Small random models and inputs, on which probes try what vlmfix relies on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor

library: Any = transformers
"""Its configurations take more than their types say."""
PICTURE, PAD, END = 3, 0, 2
"""Token ids of the models that are probed."""


class Bench:
    """Two-layer random models and inputs for the probes, made when they are asked for."""

    @cached_property
    def llava(self) -> Any:  # noqa: ANN401 (a model)
        """LLaVA-1.5 whose picture becomes four tokens."""
        vision = library.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        )
        config = library.LlavaConfig(
            vision_config=vision,
            text_config=library.LlamaConfig(**TEXT),
            image_token_index=PICTURE,
            image_seq_length=4,
        )
        return drawn(library.LlavaForConditionalGeneration, config)

    @cached_property
    def qwen(self) -> Any:  # noqa: ANN401 (a model)
        """Qwen3-VL, with rotary embeddings of several axes and features of several depths."""
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
        vision: dict[str, Any] = {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        }
        config = library.Qwen3VLConfig(
            text_config=TEXT | {"head_dim": 4, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=PICTURE,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        return drawn(library.Qwen3VLForConditionalGeneration, config)

    @cached_property
    def prompt(self) -> dict[str, Tensor]:
        """Two rows for ``llava``, the second with two tokens of padding on the left."""
        ids = torch.tensor([[1, *[PICTURE] * 4, 7, 8, 9], [PAD, PAD, *[PICTURE] * 4, 10, 11]])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": noise(2, 3, 8, 8)}

    @cached_property
    def qwen_prompt(self) -> dict[str, Tensor]:
        """Two rows for ``qwen``, the second with two tokens of padding on the left."""
        ids = torch.tensor([[1, 5, *[PICTURE] * 4, 6, 8, 9], [PAD, PAD, 5, *[PICTURE] * 4, 6, 11]])
        return {
            "input_ids": ids,
            "attention_mask": (ids != PAD).long(),
            "mm_token_type_ids": (ids == PICTURE).long(),
            "pixel_values": noise(32, 48),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        }

    @property
    def decoder(self) -> Any:  # noqa: ANN401 (a module)
        """LLaVA's text decoder."""
        return self.llava.model.language_model

    def logits(self, model: Any, **inputs: Any) -> Tensor:  # noqa: ANN401
        """(B, T, V) of one pass."""
        with torch.no_grad():
            return torch.as_tensor(model(**inputs).logits)

    def generate(self, model: Any, inputs: Mapping[str, Any], tokens: int, **options: Any) -> Tensor:  # noqa: ANN401
        """Greedy tokens, (B, T + tokens)."""
        with torch.no_grad():
            found = model.generate(
                **inputs, **options, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, disable_compile=True
            )
        return torch.as_tensor(found)


TEXT: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "eos_token_id": END,
}


def drawn(kind: type[Any], config: Any) -> Any:  # noqa: ANN401 (a model)
    """A model of a class with weights drawn from seed 0, float32, in eval mode."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.2)
    model.generation_config = library.GenerationConfig(pad_token_id=PAD, eos_token_id=END)
    return model.float().eval()


def noise(*shape: int) -> Tensor:
    """Normal numbers from seed 1."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
