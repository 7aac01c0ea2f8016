"""Splits what attention adds to the residual stream into the parts of its heads.

Shape letters (``docs/notation.md``): B rows, H query heads, D head dimension; here also d, the hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def added(layer: nn.Module, outputs: Tensor) -> Tensor:
    """Computes what attention adds to the residual stream, (N, d), for head outputs (N, H * D).

    Args:
        layer: The decoder layer.
        outputs: Head outputs before the output projection.
    """
    written: Tensor = layer.get_submodule("self_attn.o_proj")(outputs)
    norm = _behind(layer)
    return written if norm is None else norm(written)


def contributions(layer: nn.Module, outputs: Tensor) -> Tensor:
    """Computes each head's part of what attention adds to the residual stream.

    The parts of all heads and the projection's bias add up to what is added. Where a norm stands behind the projection
    (Gemma), its scale is held at that of the sum.

    Args:
        layer: The decoder layer.
        outputs: (B, H, D) head outputs before the output projection.

    Returns:
        (B, H, d) float32.
    """
    project, heads = layer.get_submodule("self_attn.o_proj"), outputs.shape[1]
    kept = torch.eye(heads, dtype=outputs.dtype, device=outputs.device)[..., None]  # (H, H, 1)
    single = (outputs[:, None] * kept).flatten(2)  # (B, H, H * D), one head each
    bias = project(torch.zeros_like(single[:1, 0])).float()  # (1, d)
    parts: Tensor = project(single.flatten(0, 1)).float().view(*single.shape[:2], -1) - bias[:, None]
    norm = _behind(layer)
    if norm is None:
        return parts
    return parts * held(norm, project(outputs.flatten(1)))[:, None]


def held(norm: nn.Module, states: Tensor) -> Tensor:
    """Computes what an RMS norm multiplies each dimension of some states by.

    Args:
        norm: The norm.
        states: (..., d).

    Returns:
        (..., d) float32.
    """
    gain = norm(states.new_ones(1, states.shape[-1])).float()[0]  # (d,), the gain, for ones have an rms of 1
    factors: Tensor = gain * (states.float().square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    return factors


def _behind(layer: nn.Module) -> nn.Module | None:
    """The norm of what attention adds: Gemma has one, under a name that others use for another norm."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.get_submodule("post_attention_layernorm")
    return None
