"""Tiny random models of every family, built offline: real classes, real processors, a few thousand weights.

Every model has 3 decoder layers, 8 query heads, 2 key/value heads and head dimension 8, runs in float32 and
eval mode, and is drawn with a wide initialisation so that its logits really depend on its input.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from vlmfix.models.checkpoint import Checkpoint

MODULES = {
    "llava": "tests.tiny.llava",
    "llava_next": "tests.tiny.llava",
    "llava_onevision": "tests.tiny.llava",
    "gemma3": "tests.tiny.gemma",
    "qwen2_vl": "vlmfix.testing.qwen",
    "qwen2_5_vl": "vlmfix.testing.qwen",
    "qwen3_vl": "vlmfix.testing.qwen",
    "internvl": "tests.tiny.internvl",
    "idefics3": "tests.tiny.idefics",
    "smolvlm": "tests.tiny.idefics",
}
"""The module that builds each model."""

TINY: tuple[str, ...] = tuple(MODULES)
"""Names that ``tiny_vlm`` takes."""


@cache
def tiny_vlm(family: str, *, seed: int = 0) -> Checkpoint:
    """The tiny model of a family; the same object for the whole process, so leave it as you found it.

    Args:
        family: One of ``TINY``.
        seed: Seed of its weights; another seed gives another model.
    """
    builder = import_module(MODULES[family])
    return builder.build(family, seed)


def saved(vlm: Checkpoint, folder: Path) -> Path:
    """Writes a model and its processor into a folder, which can then be loaded."""
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder
