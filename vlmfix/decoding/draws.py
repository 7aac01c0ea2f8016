"""Draws tokens with a generator per row, so that a row's draw does not depend on its neighbours.

Shape letters (``docs/notation.md``): B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def seed_of(seed: int, contents: Iterable[bytes]) -> int:
    """Derives the seed of a draw from a call's seed and the draw's subject, so that it depends on nothing else.

    Args:
        seed: Non-negative seed, such as a call's.
        contents: The subject of the draw, such as a question and its pixels, hashed one after the other.
    """
    digest = hashlib.sha256(seed.to_bytes(8, "little"))
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest()[:7], "little")


def rounded(pixels: Tensor) -> bytes:
    """Returns the bytes of pixel values in bfloat16, so that the model's precision does not change the seed."""
    return pixels.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()


def gumbel(uniform: Tensor) -> Tensor:
    """Turns draws from [0, 1) into Gumbel noise, which is finite for a draw of 0 too."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()


class RowSampler(LogitsProcessor):
    """Adds Gumbel noise to scores with a generator per row, so that greedy search then draws a token.

    The most probable token of ``log p + Gumbel noise`` is distributed as ``p`` (the Gumbel-max rule).

    Args:
        seeds: One seed per row.
        device: Where the scores are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Adds a draw of Gumbel noise to (B, V) scores."""
        draws = torch.stack([torch.rand(scores.shape[1], generator=g, device=scores.device) for g in self.generators])
        return scores + gumbel(draws)

    def keep(self, rows: Tensor) -> None:
        """Keeps the generators of some of the rows, (R,) int64 numbers of the present ones."""
        self.generators = [self.generators[number] for number in rows.tolist()]


def drawing(
    seeds: Sequence[int], device: torch.device, *, temperature: float, top_p: float, top_k: int = 0
) -> list[LogitsProcessor]:
    """Makes the processors that turn greedy search into sampling: those that shape the scores, then a ``RowSampler``.

    Args:
        seeds: One seed per row.
        device: Where the scores are.
        temperature: Above 0; scores are divided by it.
        top_p: Nucleus of the draw, in (0, 1]; of the tokens that ``top_k`` leaves.
        top_k: How many of the most probable tokens are drawn from; 0 for all.
    """
    shaping: list[LogitsProcessor] = []
    if temperature != 1:
        shaping.append(TemperatureLogitsWarper(temperature))
    if top_k:
        shaping.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        shaping.append(TopPLogitsWarper(top_p))
    return [*shaping, RowSampler(seeds, device)]
