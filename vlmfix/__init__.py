"""vlmfix reduces hallucination in vision-language models while they decode, without training."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Answer": "vlmfix.generation",
    "Turn": "vlmfix.models.layout",
    "VLM": "vlmfix.generation",
    "load": "vlmfix.generation",
    "wrap": "vlmfix.generation",
    "DECODERS": "vlmfix.decoders",
    "Decoder": "vlmfix.decoders",
    "parse": "vlmfix.decoders",
    "HeadProfile": "vlmfix.heads.profile",
    "profile": "vlmfix.heads.measure",
    "VlmfixError": "vlmfix.errors",
}
"""Where each public name lives. They are fetched on first use, because most of them need torch, and
``import vlmfix`` must stay quick; ``__init__.pyi`` tells type checkers and editors the same."""

__all__ = [
    "DECODERS",
    "VLM",
    "Answer",
    "Decoder",
    "HeadProfile",
    "Turn",
    "VlmfixError",
    "__version__",
    "load",
    "parse",
    "profile",
    "wrap",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
