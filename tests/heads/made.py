"""Profiles that tests make up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmfix.heads.profile import HeadProfile, ProfileCard, fingerprint
from vlmfix.models.checkpoint import Checkpoint


def made_profile(
    vlm: Checkpoint, profiler: str, scores: Tensor | None = None, *, parameters: Mapping[str, Any] | None = None
) -> HeadProfile:
    """A profile of a model that nobody measured.

    Args:
        vlm: The model.
        profiler: What its card says.
        scores: (L, H); None draws them.
        parameters: What its card says of the profiler's parameters.
    """
    layers = len(vlm.family.layers(vlm.model))
    heads = int(vlm.model.config.get_text_config().num_attention_heads)
    if scores is None:
        scores = torch.randn(layers, heads, generator=torch.Generator().manual_seed(len(profiler)))
    card = ProfileCard(
        profiler=profiler,
        parameters=parameters or {},
        model=vlm.name,
        revision=None,
        model_type=str(vlm.model.config.model_type),
        dtype="float32",
        layers=layers,
        heads=heads,
        question="?",
        pictures=2,
        data="0" * 64,
        seed=0,
        reliability=None,
        stable=False,
        versions={},
    )
    return HeadProfile(scores, torch.zeros_like(scores), card, fingerprint(vlm))
