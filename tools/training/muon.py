"""Momentum with orthogonalised updates (Muon), all matrices of one shape at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic that lifts every singular value to about 1 in five rounds


class Muon(torch.optim.Optimizer):
    """Muon for matrices of many layers.

    torch's own takes one matrix after the other; with small matrices that costs more time than a whole training step.

    Args:
        params: Matrices (2 dimensions).
        lr: Learning rate; updates are scaled so that AdamW's rates and decays fit.
        momentum: Share of the past in the (Nesterov) momentum.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for value in params:
            shapes.setdefault(value.shape, []).append(value)
        groups = [{"params": values} for values in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step with every matrix that has a gradient; a batch without pictures gives the tower none."""
        for group in self.param_groups:
            values = [value for value in group["params"] if value.grad is not None]
            if not values:
                continue
            slopes = [value.grad for value in values]
            means = [self.state[value].setdefault("mean", torch.zeros_like(value)) for value in values]
            torch._foreach_lerp_(means, slopes, 1 - group["momentum"])
            ahead = torch._foreach_lerp(slopes, means, group["momentum"])
            turns = orthogonal(torch.stack(ahead)).to(values[0].dtype)  # (n, rows, columns)
            scale = 0.2 * max(turns.shape[1:]) ** 0.5
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(values, list(turns.unbind()), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values near 1.

    Args:
        matrices: (n, rows, columns) float.

    Returns:
        (n, rows, columns) bfloat16.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # (n, short, long)
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).to(x.dtype) + 1e-7)
    first, third, fifth = _COEFFICIENTS
    for _ in range(5):
        square = x @ x.mT  # (n, short, short)
        x = first * x + (third * square + fifth * square @ square) @ x
    found: Tensor = x.mT if tall else x  # (n, rows, columns)
    return found
