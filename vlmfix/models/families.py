"""The families that vlmfix knows, written by hand; each is imported when a model of it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from vlmfix.errors import UnsupportedModelError
from vlmfix.models.family import Family

HOMES = {
    "llava": ("llava", "Llava"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_onevision": ("llava_onevision", "LlavaOneVision"),
    "qwen2_vl": ("qwen_vl", "QwenVL"),
    "qwen2_5_vl": ("qwen_vl", "QwenVL"),
    "qwen3_vl": ("qwen_vl", "QwenVL"),
    "internvl": ("internvl", "InternVL"),
    "smolvlm": ("smolvlm", "SmolVLM"),
    "idefics3": ("smolvlm", "SmolVLM"),
    "gemma3": ("gemma", "Gemma"),
}
"""For each ``config.model_type``, the module of this room and the class that serve it."""


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
    family: Family = getattr(import_module(f"vlmfix.models.{module}"), name)()
    return family
