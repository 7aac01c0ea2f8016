"""Small changes of a frozen decoder: a product of two thin matrices on top of each of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vlmfix.models.assembly import DOWN, UP


class LowRank(nn.Module):
    """A frozen linear map, and a trained one of low rank that is added to its weights.

    The sum is made anew in each pass: with thousands of tokens that is cheaper than two thin products with all of them.

    Args:
        base: The frozen map, without a bias.
        rank: Rank of what is added; at first it adds nothing.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        rows, columns = base.weight.shape
        device = base.weight.device
        self.down = nn.Parameter((torch.rand(rank, columns, device=device) * 2 - 1) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., columns) to (..., rows)."""
        return linear(x, self.base.weight + self.up @ self.down)


def put_in(decoder: nn.Module, rank: int) -> list[nn.Parameter]:
    """Put a trained map on top of every linear map of a decoder's layers.

    Args:
        decoder: Changed in place.
        rank: See `LowRank`.

    Returns:
        What is trained.
    """
    found: list[nn.Parameter] = []
    for holder in list(decoder.modules()):
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(holder, LowRank):
                added = LowRank(child, rank)
                setattr(holder, name, added)
                found += [added.down, added.up]
    return found


def take_over(decoder: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Set the trained factors to those that `factors` gave.

    Args:
        decoder: From `put_in`.
        state: By name; other names are left alone.
        prefix: See `factors`.
    """
    for name, value in factors(decoder, prefix).items():
        value.copy_(state[name])


def factors(decoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The trained factors by the names that `vlmfix.models.assembly.joined` reads.

    Args:
        decoder: From `put_in`, or without any.
        prefix: What the names of the decoder's weights begin with.
    """
    found = {}
    for name, module in decoder.named_modules():
        if isinstance(module, LowRank):
            found[f"{prefix}{name}.weight{DOWN}"] = module.down
            found[f"{prefix}{name}.weight{UP}"] = module.up
    return {name: value.detach() for name, value in found.items()}  # the same memory
