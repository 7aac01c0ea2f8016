"""Knows what was tried of vlmfix's own decoders, on models with random weights of every family, in every way to run.

``support.json`` holds that; ``make support`` writes it and ``docs/support.md`` from what happens, and tests try again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SUPPORT = Path(__file__).with_name("support.json")
WORKS = "works"
"""A batch of two rows with prompts of different lengths gives each row the tokens that it gets alone, in float32."""


@dataclass(frozen=True)
class Tried:
    """Holds what was found of one decoder.

    Attributes:
        spec: The decoder with the parameters that it was tried with.
        found: Way of running -> family -> ``WORKS``, ``refused: `` with the reason, or ``not applicable: `` with it.
    """

    spec: str
    found: Mapping[str, Mapping[str, str]]

    def of(self, family: str) -> dict[str, str]:
        """Returns what was found with a family's model, by way of running; nothing of a family that was not tried."""
        return {way: verdicts[family] for way, verdicts in self.found.items() if family in verdicts}


@cache
def support() -> Mapping[str, Tried]:
    """Reads what was tried, by the decoder's name."""
    return {
        name: Tried(
            entry["spec"],
            {
                way: {family: verdict for verdict, families in verdicts.items() for family in families.split()}
                for way, verdicts in entry["found"].items()
            },
        )
        for name, entry in json.loads(SUPPORT.read_bytes()).items()
    }
