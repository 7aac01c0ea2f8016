"""The table of methods: what each does to captions with its defaults, all models beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.study.page import difference, number, table
from tools.study.results import NOT_YET
from vlmfix.decoders.index import own
from vlmfix.evals.record import PLAIN

SHOWN = {"chair_i": "CHAIR_i ↓", "recall": "recall ↑"}


def summary(results: Mapping[str, Any]) -> str:
    """Writes the table: plain decoding's values, then each method's differences to them.

    Chains, and ways of methods that are not the default, are left out.

    Args:
        results: See :func:`tools.study.results.results`.
    """
    models = {name: found for name, found in results["models"].items() if found["rows"]}
    head = ["decoder", "acts on", *(f"{title}, {model}" for model in models for title in SHOWN.values())]
    plain = [number(found["plain"]["captions"][figure]["value"]) for found in models.values() for figure in SHOWN]
    lines = [[_linked(PLAIN), "nothing", *plain]]
    rows = {model: {row["name"]: row for row in found["rows"]} for model, found in models.items()}
    for info in own().values():
        if any(info.name in listed for listed in rows.values()):
            cells = [cell for listed in rows.values() for cell in _cells(listed.get(info.name))]
            lines.append([_linked(info.name), info.acts_on, *cells])
    return table(head, lines) + "\n"


def _linked(name: str) -> str:
    return f"[`{name}`](methods/{name}.md)"


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is not None and row["captions"] is not None:
        return [difference(row["captions"][figure]) for figure in SHOWN]
    said = "cannot act" if row is not None and row["reason"] else NOT_YET
    return [said] * len(SHOWN)
