"""Profiles and directions that tests make up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmfix.heads.directions.kept import Directions
from vlmfix.heads.directions.pti import PARTS
from vlmfix.heads.directions.vti import tower_streams
from vlmfix.heads.profile import HeadProfile, ProfileCard, fingerprint
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.testing import picture


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


def made_directions(vlm: Checkpoint) -> dict[str, Directions]:
    """Directions of a model that nobody measured, of every method that reads some."""
    config, dice = vlm.model.config.get_text_config(), torch.Generator().manual_seed(11)
    places = tower_streams(vlm, vlm.encode(["?"], [[picture(1, (40, 60))]])).shape

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice)

    tensors = {
        "vti": {
            f"{part}_{kind}": drawn(*shape)
            for part, shape in (("text", (vlm.layers, config.hidden_size)), ("vision", places))
            for kind in ("mean", "component")
        },
        "pti": {
            f"{part}_{kind}": drawn(vlm.layers, config.num_key_value_heads, 8)
            for part in PARTS
            for kind in ("mean", "component")
        },
        "nullu": {
            "vectors": torch.linalg.qr(drawn(vlm.layers, config.hidden_size, 5))[0].mT.contiguous(),
            "values": drawn(vlm.layers, 5).abs(),
        },
    }
    return {name: Directions(own, made_profile(vlm, name).card, fingerprint(vlm)) for name, own in tensors.items()}
