"""What decides an answer, apart from the picture and the question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import UsageError
from vlmfix.plugins import near
from vlmfix.shapes import NUMBER, SEED, SIZE, TEXT

EMBEDDED = {name: Path(__file__).parent / "world" / "assets" / name for name in ("tiny", "tiny-qwen")}
"""Models that come with the package, by name."""
MODEL = {"revision": TEXT.or_null(), "commit": TEXT.or_null(), "weights": TEXT, "dtype": TEXT}
"""What a card says of the model beside its name."""
LOADED = {"max_pixels": SIZE.or_null(), "device_map": TEXT.or_null(), "quantize": TEXT.or_null()}
"""What a card says of how the model was loaded, by names of ``Settings``; cards of earlier versions lack some."""
DECODED = {"max_new_tokens": SIZE, "num_beams": SIZE, "temperature": NUMBER, "seed": SEED}
"""What a card says of decoding, by names of ``Settings``."""


def check_model_name(name: str) -> None:
    """Refuses a misspelt name of an embedded model, which would be looked for on the Hub.

    Raises:
        UsageError: There is no such folder, and an embedded model has nearly that name.
    """
    if name not in EMBEDDED and "/" not in name and not Path(name).exists() and (meant := near(name, EMBEDDED)):
        raise UsageError(f"there is no model {name!r}", f"{meant}else give a Hub id, OWNER/NAME, or a directory")


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
        return {name: getattr(self, name) for name in ("revision", "device", "dtype", *LOADED)}

    def loaded(self) -> dict[str, Any]:
        """What decides how the model is loaded, whatever its revision, device and precision."""
        return {name: getattr(self, name) for name in LOADED}

    def decoding(self) -> dict[str, Any]:
        """The generation settings that two comparable runs share."""
        return {name: getattr(self, name) for name in DECODED}


def decoding_text(decoding: Mapping[str, Any]) -> str:
    """Generation settings in words; sampling and beams only where they are used.

    Args:
        decoding: What a card says of decoding.
    """
    words = [f"up to {decoding['max_new_tokens']} tokens"]
    if decoding["num_beams"] > 1:
        words.append(f"{decoding['num_beams']} beams")
    if decoding["temperature"] > 0:
        rest = ", ".join(
            f"{name} {value}" for name, value in decoding.items() if name not in ("max_new_tokens", "num_beams")
        )
        words.append(f"sampling ({rest})")
    return ", ".join(words)
