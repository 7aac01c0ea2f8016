"""What decides an answer, apart from the picture and the question."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.errors import UsageError
from vlmfix.parsing import told
from vlmfix.plugins import near
from vlmfix.shapes import COUNT, NUMBER, SEED, SIZE, TEXT, list_of

EMBEDDED = {name: Path(__file__).parent / "world" / "assets" / name for name in ("tiny", "tiny-qwen", "small")}
"""Models that come with the package, by name; of ``small`` the trained parts, and the rest with the extra ``small``."""
UNSEARCHED = ("small",)
"""Models that nothing is searched on: what was found on others is tested on them."""
MODEL = {"revision": TEXT.or_null(), "commit": TEXT.or_null(), "weights": TEXT, "dtype": TEXT}
"""What a card says of the model beside its name."""
MEASURES = (SAR, GROUNDED) = ("sar", "sar+grounding")
"""What may be measured of an answer's tokens beside their probability."""
OWN = "own"
"""The similarity model that needs no download: the answering model's own token embeddings."""
ATTENTIONS = ("sdpa", "eager")
"""How a model computes attention where no decoder edits it, by transformers' names."""
FLASH = re.compile(r"flash([-_](attention|attn))?([-_]?[0-9])?", re.IGNORECASE)
"""Names of the package flash-attn, as people and transformers write them."""
LOADED = {
    "max_pixels": SIZE.or_null(),
    "min_pixels": SIZE.or_null(),
    "device_map": TEXT.or_null(),
    "quantize": TEXT.or_null(),
    "attention": TEXT.or_null(),
}
"""What a card says of how the model was loaded, by names of ``Settings``; cards of earlier versions lack some."""
DECODED = {"max_new_tokens": SIZE, "num_beams": SIZE, "temperature": NUMBER, "seed": SEED}
"""What a card says of decoding, by names of ``Settings``."""
REQUESTED = {
    "system": TEXT.or_null(),
    "top_k": COUNT.or_null(),
    "top_p": NUMBER.or_null(),
    "repetition_penalty": NUMBER.or_null(),
    "stop": list_of(TEXT).or_null(),
}
"""What a card says of decoding where somebody requested it, likewise; cards of earlier versions lack all of it."""


def check_model_name(name: str) -> None:
    """Refuses a misspelt name of an embedded model, which would be looked for on the Hub.

    Raises:
        UsageError: There is no such folder, and an embedded model has nearly that name.
    """
    if name not in EMBEDDED and "/" not in name and not os.path.exists(name) and (meant := near(name, EMBEDDED)):
        raise UsageError(f"there is no model {name!r}", f"{meant}else give a Hub id, OWNER/NAME, or a directory")


def check_searchable(model: str) -> None:
    """Refuses a model that is kept for testing what was searched on others.

    Raises:
        UsageError: It is one.
    """
    if model in UNSEARCHED:
        raise UsageError(
            f"nothing is searched on {model!r}: what is found on other models is tested on it",
            "search on tiny, tiny-qwen or a model of your own, and evaluate the recipe on it",
        )


def check_attention(name: str | None) -> None:
    """Refuses a way to compute attention that vlmfix does not load models with.

    Raises:
        UsageError: It is none of ``ATTENTIONS``.
    """
    if name in (None, *ATTENTIONS):
        return
    if FLASH.fullmatch(str(name)):
        raise UsageError(
            f"attention {name!r} is not used: flash-attn takes no masks, so each pass would wait for the GPU to count "
            "padding, and no decoding step could be recorded",
            "use sdpa, which takes torch's own flash kernel wherever no mask is needed",
        )
    raise UsageError(f"unknown attention {name!r}", f"use {' or '.join(ATTENTIONS)}, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, decoder and generation settings of a run.

    Attributes:
        model: ``tiny``, ``tiny-qwen``, ``small``, a Hub id or a local directory.
        revision: Branch, tag or commit on the Hub.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        decoder: A decoder specification, such as ``vcd:contrast=0.5``.
        max_new_tokens: Longest answer, in tokens.
        num_beams: Beams; 1 for none, or for as many as the decoder itself says.
        temperature: Sampling temperature; 0 takes the most probable token, or leaves the choice to the decoder.
        seed: Seed of sampling.
        max_pixels: The most pixels that the processor makes of a picture; None leaves its own limit.
        min_pixels: The fewest, likewise.
        device_map: ``auto`` spreads the model over all devices; None keeps it on one.
        quantize: ``int8`` or ``int4`` weights; None leaves them as they are.
        attention: ``sdpa`` or ``eager``; None is sdpa.
        system: System message; None keeps the chat template's own.
        top_k: How many of the most probable tokens are sampled from; None for all.
        top_p: Nucleus of sampling; None for all.
        repetition_penalty: What scores of tokens that were said are divided by; None for nothing.
        stop: Texts that end an answer; None for none.
        words: Whether answers say of every word how sure it was, which decides no answer and stands in no card.
        confidence: ``sar`` or ``sar+grounding``, what else is measured of their tokens; likewise.
        similarity: What tells the relevance of tokens, ``own`` or a sentence encoder; likewise.
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
    min_pixels: int | None = None
    device_map: str | None = None
    quantize: str | None = None
    attention: str | None = None
    system: str | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    words: bool = False
    confidence: str | None = None
    similarity: str = OWN

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop) if self.stop else None)  # a card has a list

    def loading(self) -> dict[str, Any]:
        """What a loader is told beside the model, as keyword arguments of ``vlmfix.load``."""
        return {name: getattr(self, name) for name in ("revision", "device", "dtype", *LOADED)}

    def loaded(self) -> dict[str, Any]:
        """What decides how the model is loaded, whatever its revision, device and precision."""
        return {name: getattr(self, name) for name in LOADED}

    def decoding(self) -> dict[str, Any]:
        """The generation settings that two comparable runs share, as keyword arguments of ``VLM.generate``."""
        always = {name: getattr(self, name) for name in DECODED}
        return always | {name: value for name, value in self.requested().items() if value is not None}

    def requested(self) -> dict[str, Any]:
        """What was requested of decoding beside that, by the names of ``REQUESTED``, in JSON values."""
        return {name: getattr(self, name) for name in REQUESTED} | {"stop": None if self.stop is None else [*self.stop]}


def decoding_in(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card's settings say of decoding, in the form of ``Settings.decoding``."""
    always = {name: card[name] for name in DECODED}
    return always | {name: card[name] for name in REQUESTED if card.get(name) is not None}


def decoding_text(decoding: Mapping[str, Any]) -> str:
    """Generation settings in words; sampling, beams and what else was requested only where they are used.

    Args:
        decoding: What a card says of decoding.
    """
    words = [f"up to {decoding['max_new_tokens']} tokens"]
    if decoding["num_beams"] > 1:
        words.append(f"{decoding['num_beams']} beams")
    drawn = [name for name in ("temperature", "top_k", "top_p", "seed") if decoding.get(name) is not None]
    if decoding["temperature"] > 0:
        words.append(f"sampling ({', '.join(f'{name} {decoding[name]}' for name in drawn)})")
    if decoding.get("repetition_penalty") is not None:
        words.append(f"repetition penalty {decoding['repetition_penalty']}")
    if decoding.get("stop"):
        words.append(f"stop at {' or '.join(map(told, decoding['stop']))}")
    if decoding.get("system") is not None:
        words.append(f"system message {told(decoding['system'])}")
    return ", ".join(words)
