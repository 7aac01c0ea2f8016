"""The families that vlmfix knows, written by hand; each is imported when a model of it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

from vlmfix.errors import UnsupportedModelError
from vlmfix.models.family import Family
from vlmfix.plugins import Table, near

HOMES = {
    "llava": "vlmfix.models.llava:Llava",
    "llava_next": "vlmfix.models.llava_next:LlavaNext",
    "llava_onevision": "vlmfix.models.llava_onevision:LlavaOneVision",
    "qwen2_vl": "vlmfix.models.qwen_vl:QwenVL",
    "qwen2_5_vl": "vlmfix.models.qwen_vl:QwenVL",
    "qwen3_vl": "vlmfix.models.qwen_vl:QwenVL",
    "internvl": "vlmfix.models.internvl:InternVL",
    "smolvlm": "vlmfix.models.smolvlm:SmolVLM",
    "idefics3": "vlmfix.models.smolvlm:SmolVLM",
    "gemma3": "vlmfix.models.gemma:Gemma",
}
"""For each ``config.model_type``, module and class that serve it, of those that are vlmfix's own."""

FAMILIES: Table[Family] = Table(
    "family",
    "vlmfix.families",
    "vlmfix.models.family:Family",
    HOMES,
    plural="families",
    needs=("title", "model_types"),
    keys="model_types",
)
"""The same with those of other distributions, whose entry points have a model type as their name."""


def family_of(model_type: str) -> Family:
    """Gives the family that serves a ``config.model_type``.

    Raises:
        UnsupportedModelError: No family serves it; the message lists those that exist.
        PluginError: Another distribution's serves it, and cannot be used.
    """
    if model_type not in FAMILIES:
        if clashing := FAMILIES.clashes().get(model_type):
            raise UnsupportedModelError(clashing, "uninstall one of the two")
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported",
            f"{near(model_type, FAMILIES)}supported model types: {', '.join(FAMILIES)}; docs/extending.md says how to "
            "add one",
        )
    return FAMILIES[model_type]()


def families() -> Iterator[Family]:
    """Gives each of vlmfix's own families once, in the order of ``HOMES``."""
    for name in {home: name for name, home in reversed(HOMES.items())}.values():
        yield FAMILIES[name]()
