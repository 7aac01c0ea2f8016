"""The embedded models that come whole with the package and are quick; ``small`` has tests of its own."""

from __future__ import annotations

from vlmfix.settings import EMBEDDED

TINY = {name: EMBEDDED[name] for name in ("tiny", "tiny-qwen")}
"""Folders of both, by name."""
