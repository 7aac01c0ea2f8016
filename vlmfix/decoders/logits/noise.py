"""Makes noise for pictures that depends on the picture alone, never on its place in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfix.decoding.draws import rounded, seed_of


def row_noise(pixels: Tensor, owners: Tensor, seed: int, *, uniform: bool) -> Tensor:
    """Draws noise of the pixels' shape: N(0, 1), or U[0, 1) when ``uniform``.

    It is drawn on the CPU from a seed made of ``seed`` and the row's own pixels, so a sample's noise depends neither
    on its neighbours nor on their order.

    Args:
        pixels: (n, ...) pixel values.
        owners: (n,) int64 on the CPU, row that each entry belongs to; each row gets a draw of its own.
        seed: Non-negative seed.
        uniform: Which distribution.

    Returns:
        (n, ...) float32 on the device of ``pixels``.
    """
    noise = torch.empty(pixels.shape, dtype=torch.float32)
    for row in owners.unique().tolist():
        mine = owners == row
        content = pixels[mine.to(pixels.device)]
        generator = torch.Generator().manual_seed(seed_of(seed, [rounded(content)]))
        draw = torch.rand if uniform else torch.randn
        noise[mine] = draw(content.shape, generator=generator)
    return noise.to(pixels.device)
