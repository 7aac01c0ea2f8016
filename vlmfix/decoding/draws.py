"""Draws of tokens with a generator per row, so that a row's draw does not depend on its neighbours.

Shape letters (``docs/notation.md``): B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


def seed_of(seed: int, contents: Iterable[bytes]) -> int:
    """Makes the seed of a draw out of a seed and of what the draw is about, so that it depends on nothing else.

    Args:
        seed: Non-negative seed, such as a call's.
        contents: What the draw is about, taken one after the other.
    """
    digest = hashlib.sha256(seed.to_bytes(8, "little"))
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest()[:7], "little")


def rounded(pixels: Tensor) -> bytes:
    """Gives the bytes of pixel values in bfloat16, so that the precision of the model changes no seed."""
    return pixels.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()


class RowSampler(LogitsProcessor):
    """Sampling by the Gumbel-max rule with a generator per row, so that a row's draw is its own.

    The most probable token of ``log p + Gumbel noise`` is distributed as ``p``. Greedy search then picks it.

    Args:
        seeds: One seed per row.
        device: Where the scores are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Adds a draw of Gumbel noise to (B, V) scores."""
        draws = torch.stack([torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self.generators])
        tiny = torch.finfo(torch.float32).tiny
        return scores - (-(draws.clamp(min=tiny).log())).clamp(min=tiny).log()

    def keep(self, rows: Tensor) -> None:
        """Goes on with the generators of some of the rows, (R,) int64 numbers of the present ones."""
        self.generators = [self.generators[number] for number in rows.tolist()]


def drawing(seeds: Sequence[int], device: torch.device, *, temperature: float, top_p: float) -> list[LogitsProcessor]:
    """Makes what turns scores into scores of which the greatest is a draw: what shapes them first, then what draws.

    Args:
        seeds: One seed per row.
        device: Where the scores are.
        temperature: Above 0; scores are divided by it.
        top_p: Nucleus of the draw, in (0, 1].
    """
    shaping: list[LogitsProcessor] = []
    if temperature != 1:
        shaping.append(TemperatureLogitsWarper(temperature))
    if top_p < 1:
        shaping.append(TopPLogitsWarper(top_p))
    return [*shaping, RowSampler(seeds, device)]
