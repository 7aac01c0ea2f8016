"""RMS norms of a text decoder, each computed by one kernel.

transformers writes a norm as six operations: in a decoding step of one row, six kernels that do next to nothing; in
prefill, six passes over the memory of all tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

EPSILON = ("variance_epsilon", "eps")
"""Names under which norms keep what is added to the mean square."""


@contextmanager
def fused(decoder: nn.Module) -> Iterator[None]:
    """Computes the RMS norms inside a module by torch's own kernel inside the block, those of other formulas as ever.

    In bfloat16 the kernel rounds once, where the model's own code rounds twice.

    Args:
        decoder: The text decoder, or any module.
    """
    with ExitStack() as block:
        for module in decoder.modules():
            epsilon = epsilon_of(module)
            if epsilon is not None and "forward" not in vars(module) and is_rms(module):
                module.forward = functools.partial(_normed, module, epsilon)
                block.callback(delattr, module, "forward")
        yield


def _normed(norm: nn.Module, epsilon: float, states: Tensor) -> Tensor:
    weight = norm.weight
    return rms_norm(states, states.shape[-1:], weight if isinstance(weight, Tensor) else None, epsilon)


def epsilon_of(module: nn.Module) -> float | None:
    """What a norm adds to the mean square; None when it has no such number."""
    values = [getattr(module, name, None) for name in EPSILON]
    return next((value for value in values if isinstance(value, float)), None)


_KNOWN: WeakKeyDictionary[type[nn.Module], bool] = WeakKeyDictionary()


def is_rms(module: nn.Module) -> bool:
    """Whether a module computes ``weight * x / sqrt(mean(x^2) + epsilon)``; tried once for each class."""
    epsilon = epsilon_of(module)
    if epsilon is None or not _has_one_vector(module):
        return False
    kind = type(module)
    if kind not in _KNOWN:
        _KNOWN[kind] = _tried(module, epsilon)
    return _KNOWN[kind]


def _has_one_vector(module: nn.Module) -> bool:
    parameters = list(module.named_parameters())
    return [name for name, _ in parameters] == ["weight"] and parameters[0][1].dim() == 1


@torch.no_grad()
def _tried(module: nn.Module, epsilon: float) -> bool:
    """Whether a module gives what the formula gives, for values from far below epsilon to far above."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    dice = torch.Generator().manual_seed(0)
    values = torch.randn(4, len(weight), generator=dice) * torch.tensor([[1e-4], [1e-2], [1.0], [1e2]])
    states = values.to(weight)
    try:
        found = module.forward(states)  # no hook of anybody's is to see it
    except Exception:  # a module that wants something else is another thing
        return False
    expected = _normed(module, epsilon, states)
    close = 2 * torch.finfo(weight.dtype).eps
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=close, atol=1e-6)
