"""Noise for pictures that depends on the picture alone, never on its place in a batch."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def row_noise(pixels: Tensor, owners: Tensor, seed: int, *, uniform: bool) -> Tensor:
    """Noise of the pixels' shape: N(0, 1), or U[0, 1) when ``uniform``.

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
        # Rounded to bfloat16, so that the model's precision does not change the noise.
        content = pixels[mine.to(pixels.device)].to(torch.bfloat16).cpu().contiguous()
        digest = hashlib.sha256(seed.to_bytes(8, "little") + content.view(torch.int16).numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        draw = torch.rand if uniform else torch.randn
        noise[mine] = draw(content.shape, generator=generator)
    return noise.to(pixels.device)
