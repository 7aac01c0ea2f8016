"""vlmfix reduces hallucination in vision-language models while they decode, without training."""

from __future__ import annotations

__version__ = "0.1.0"
