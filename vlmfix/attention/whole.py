"""Asks SDPA for sums and parts of a prompt's attention, in memory that is linear in the keys.

Sums of weights are the gradient of the output with respect to the values, and parts of an output are outputs of values
that are zero elsewhere: neither needs the weights. Shape letters (``docs/notation.md``): B rows, H query heads, G
key/value heads, Q queries, K keys, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

ALIGNED = 8
"""Numbers that kernels of SDPA want the dimensions of a head to be a multiple of."""


@dataclass(frozen=True, eq=False)
class Whole:
    """Holds query, key and value of a prompt's pass, and sums up its attention.

    Attributes:
        query: (B, H, Q, D).
        key: (B, G, K, D), K = Q unless there is a mask.
        value: (B, G, K, D).
        mask: (1 or B, 1, Q, K) bool, True where a query may look; None for plain causality.
        scale: Factor on the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float

    def column_sums(self, rows: Tensor) -> Tensor:
        """Sums the attention to each key over some rows.

        Args:
            rows: (B, Q) bool, the rows that are summed over; each sees a key.

        Returns:
            (B, H, K) float32, or float64 for a query of that kind.
        """
        query, key = self.query.detach(), self._by_head(self.key.detach())
        wanted = torch.zeros_like(query)
        wanted[..., 0] = rows[:, None]
        with torch.enable_grad():
            value = torch.zeros_like(key).requires_grad_()
            (sums,) = torch.autograd.grad(self._sdpa(query, key, value), value, wanted)
        return sums[..., 0].to(torch.promote_types(sums.dtype, torch.float32))

    def seeing(self, rows: Tensor) -> Tensor:
        """Counts which of some rows, (B, Q) bool, may see each key, (B, K) int64."""
        if self.mask is None:
            return rows.long().flip(1).cumsum(dim=1).flip(1)
        return (self.mask[:, 0] & rows[:, :, None]).sum(dim=1)

    def without(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns each output without what some keys contribute, and the shares of attention of the others and these.

        Args:
            keys: (B, H, K) bool, the keys that are left out.

        Returns:
            (B, Q, H, D) of the query's kind, and twice (B, Q, H, 1) float32, or float64 for a query of that kind.
        """
        kept = torch.stack([~keys, keys], dim=-1).to(self.value.dtype)  # (B, H, K, 2)
        value = torch.cat([self._by_head(self.value) * kept[..., :1], kept], dim=-1)  # (B, H, K, D + 2)
        value = pad(value, (0, ALIGNED - 2))
        query, key = (pad(part, (0, ALIGNED)) for part in (self.query, self._by_head(self.key)))
        found = self._sdpa(query, key, value).transpose(1, 2)  # (B, Q, H, D + ALIGNED)
        size = self.value.shape[-1]
        exact = torch.promote_types(found.dtype, torch.float32)
        rest, own = (found[..., size + place, None].to(exact) for place in (0, 1))
        return found[..., :size], rest, own

    def _by_head(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.query.shape[1] // values.shape[1], dim=1)  # (B, H, K, D)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.mask
        if mask is not None:
            mask = mask | ~mask.any(dim=-1, keepdim=True)  # what sees nothing would have no number for a gradient
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale)
