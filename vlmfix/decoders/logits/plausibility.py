"""Makes the adaptive plausibility cut that contrastive methods share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cut(clean: Tensor, scores: Tensor, share: float) -> Tensor:
    """Forbids tokens whose clean probability is below a share of the largest.

    Source: Li et al., "Contrastive Decoding", 2023, arXiv 2210.15097, the adaptive plausibility constraint. The best
    clean token always survives. Logits and log-probabilities give the same result.

    Args:
        clean: (B, V) clean logits.
        scores: (B, V) scores to cut.
        share: beta in [0, 1]; 0 cuts nothing.

    Returns:
        (B, V) scores, -inf where cut.
    """
    if share == 0:
        return scores
    floor = clean.max(dim=-1, keepdim=True).values + math.log(share)
    return torch.where(clean < floor, float("-inf"), scores)
