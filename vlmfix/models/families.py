"""The families that vlmfix knows, written by hand; each is imported when a model of it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from vlmfix.errors import UnsupportedModelError
from vlmfix.models.family import Family

HOMES = {
    "llava": ("vlmfix.models.llava", "Llava"),
    "llava_next": ("vlmfix.models.llava_next", "LlavaNext"),
    "llava_onevision": ("vlmfix.models.llava_onevision", "LlavaOneVision"),
    "qwen2_vl": ("vlmfix.models.qwen_vl", "QwenVL"),
    "qwen2_5_vl": ("vlmfix.models.qwen_vl", "QwenVL"),
    "qwen3_vl": ("vlmfix.models.qwen_vl", "QwenVL"),
    "internvl": ("vlmfix.models.internvl", "InternVL"),
    "smolvlm": ("vlmfix.models.smolvlm", "SmolVLM"),
    "idefics3": ("vlmfix.models.smolvlm", "SmolVLM"),
    "gemma3": ("vlmfix.models.gemma", "Gemma"),
}
"""For each ``config.model_type``, the module and the class that serve it."""


def family_of(model_type: str) -> Family:
    """Gives the family that serves a ``config.model_type``.

    Raises:
        UnsupportedModelError: No family serves it; the message lists those that exist.
    """
    if model_type not in HOMES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported",
            f"supported model types: {', '.join(HOMES)}; CONTRIBUTING.md says how to add one",
        )
    return _made(*HOMES[model_type])


def families() -> Iterator[Family]:
    """Gives every family once, in the order of ``HOMES``."""
    for home in dict.fromkeys(HOMES.values()):
        yield _made(*home)


def _made(module: str, name: str) -> Family:
    family: Family = getattr(import_module(module), name)()
    return family
