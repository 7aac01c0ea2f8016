"""Saliency: attention times gradient, for the one row of attention that chose a token.

For a token c that row r predicts, with attention A of one layer and loss ``-log softmax(logits of r)[c]``::

    S[j] = mean over heads of |A[h, r, j] * d loss / d A[h, r, j]|        Sbar = S / ||S||_2

A counts as a free variable (no gradient of the softmax), and a causal model leaves every row behind r without gradient.

Row r is the newest query of a cached step, so the keys and values before it are constants and one backward pass through
one row gives exactly what the full T x T computation gives, in memory that is linear in T. ``decoding/newest.py`` takes
such steps.

Shape letters (``docs/notation.md``): B rows, H query heads, K keys, V vocabulary; here also N layers.

Source: "Hallucination Begins Where Saliency Drops", ICLR 2026, arXiv 2601.20279, sec. 2, eq. 1-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet
from vlmfix.models.layout import ImageLayout

SCALE = 1024.0
"""The loss is multiplied by it and the gradients are divided by it, so that float16 does not lose small ones."""


def scoring_layers(count: int) -> LayerSet:
    """Layers 6 to 8, those of the authors' script for 32 layers; of fewer than nine, the same share of the depth.

    The paper itself says "middle-to-deep"; for shallow models it says nothing.
    """
    return LayerSet("6:9") if count >= 9 else LayerSet(f"{6 * count // 32}:{-(-9 * count // 32)}")


def row_saliency(weights: Tensor, gradient: Tensor) -> Tensor:
    """Merges heads and normalises one row of attention.

    Args:
        weights: (B, H, K) attention of the row.
        gradient: (B, H, K) gradient of the token's loss with respect to it.

    Returns:
        (B, K) of norm 1 in the last dimension, or all zero; float32, or float64 for float64 arguments.
    """
    exact = torch.promote_types(weights.dtype, torch.float32)
    merged = (weights.to(exact) * gradient.to(exact)).abs().mean(dim=1)  # (B, K)
    norm: Tensor = torch.linalg.vector_norm(merged, dim=-1, keepdim=True)
    return merged / norm.clamp(min=torch.finfo(exact).tiny)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """``-log softmax(logits)[token]``, written so that a token of probability almost 1 keeps its gradient.

    That gradient is ``p - 1`` for the token's own logit, which rounds to nothing in float32, while the normalised
    saliency depends on its direction alone.

    Args:
        logits: (B, V) float32.
        tokens: (B,) int64.

    Returns:
        (B,) losses.
    """
    own = logits.gather(1, tokens[:, None])[:, 0]  # (B,)
    others = logits.scatter(1, tokens[:, None], float("-inf")).logsumexp(dim=1)
    return torch.nn.functional.softplus(others - own)


def mean_over(saliency: Tensor, keys: Tensor) -> Tensor:
    """A token's score: the mean over layers and over some keys.

    Args:
        saliency: (N, B, K).
        keys: (B, K) bool.

    Returns:
        (B,) in [0, 1 / sqrt(number of keys)]; NaN where there are no keys.
    """
    return (saliency.mean(dim=0) * keys).sum(dim=-1) / keys.sum(dim=-1)


def after_picture(layout: ImageLayout) -> Tensor:
    """(B,) the column behind each row's last image token, or its first real column when it has no picture."""
    column = torch.arange(layout.tokens.shape[1], device=layout.tokens.device)
    after = torch.where(layout.tokens, column + 1, 0).amax(dim=1)
    first = torch.where(layout.text, column, len(column)).amin(dim=1)
    return torch.where(after > 0, after, first)
