"""What decides an answer, apart from the picture and the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, decoder and generation settings of a run.

    Attributes:
        model: ``tiny``, ``tiny-qwen``, a Hub id or a local directory.
        revision: Branch, tag or commit on the Hub.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        decoder: A decoder specification, such as ``vcd:contrast=0.5``.
        max_new_tokens: Longest answer, in tokens.
        num_beams: Beams; 1 for none, or for as many as the decoder itself says.
        temperature: Sampling temperature; 0 takes the most probable token, or leaves the choice to the decoder.
        seed: Seed of sampling.
        max_pixels: The most pixels that the processor makes of a picture; None leaves its own limit.
        device_map: ``auto`` spreads the model over all devices; None keeps it on one.
        quantize: ``int8`` or ``int4`` weights; None leaves them as they are.
    """

    model: str = "tiny"
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    decoder: str = "greedy"
    max_new_tokens: int = 128
    num_beams: int = 1
    temperature: float = 0.0
    seed: int = 0
    max_pixels: int | None = None
    device_map: str | None = None
    quantize: str | None = None

    def loading(self) -> dict[str, Any]:
        """What a loader is told beside the model, as keyword arguments of ``vlmfix.load``."""
        names = ("revision", "device", "dtype", "max_pixels", "device_map", "quantize")
        return {name: getattr(self, name) for name in names}
