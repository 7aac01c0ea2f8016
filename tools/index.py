"""Writes what is known of the decoders without importing them: `make index`, after a decoder was added or changed."""

from __future__ import annotations

import json
from dataclasses import asdict

from vlmfix.decoders import DECODERS, describe
from vlmfix.decoders.index import HOMES, INDEX


def text() -> str:
    """Returns what the index must hold: JSON, an entry for each of vlmfix's own decoders."""
    return json.dumps([asdict(describe(DECODERS[name])) for name in HOMES], indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    INDEX.write_text(text(), encoding="utf-8")
