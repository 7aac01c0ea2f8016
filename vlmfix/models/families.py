"""The families that vlmfix knows, written by hand."""

from __future__ import annotations

from vlmfix.errors import UnsupportedModelError
from vlmfix.models.family import Family
from vlmfix.models.gemma import Gemma
from vlmfix.models.internvl import InternVL
from vlmfix.models.llava import Llava
from vlmfix.models.llava_next import LlavaNext
from vlmfix.models.llava_onevision import LlavaOneVision
from vlmfix.models.qwen_vl import QwenVL
from vlmfix.models.smolvlm import SmolVLM

FAMILIES: tuple[Family, ...] = (
    Llava(),
    LlavaNext(),
    LlavaOneVision(),
    QwenVL(),
    InternVL(),
    SmolVLM(),
    Gemma(),
)


def family_of(model_type: str) -> Family:
    """The family that serves a ``config.model_type``.

    Raises:
        UnsupportedModelError: No family serves it; the message lists those that exist.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(f"{family.title} ({'/'.join(sorted(family.model_types))})" for family in FAMILIES)
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported",
        f"supported families: {known}; CONTRIBUTING.md says how to add one",
    )
