"""What came out when an evaluation was run again, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmfix.jobs.benchmark.reproduce import Reproduction
from vlmfix.parsing import escaped, some


def reproduction_text(found: Reproduction, folder: Path) -> str:
    """What came out when an evaluation was run again."""
    lines = []
    for arm, difference in found.arms.items():
        same = f"{difference.same} of {difference.samples} answers have the same tokens"
        lines.append(f"{arm}: {same}" + (f"; others: {some(difference.first)}" if difference.first else ""))
        lines += [f"  {name}: {before:.4f}, now {now:.4f}" for name, (before, now) in difference.figures.items()]
    if found.versions:
        changed = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in found.versions.items())
        lines.append(f"versions that changed: {changed}")
    lines += [f"{name} changed: {before or 'none'} -> {now or 'none'}" for name, (before, now) in found.facts.items()]
    verdict = "reproduced, token for token" if found.exact else "not the same"
    lines.append(f"{folder}: {verdict}; the second run is in {found.run.folder}")
    return "\n".join(escaped(line) for line in lines) + "\n"


def reproduction_json(found: Reproduction) -> dict[str, Any]:
    """The same in plain JSON values."""
    return {
        "exact": found.exact,
        "arms": {arm: asdict(difference) for arm, difference in found.arms.items()},
        "versions": found.versions,
        "facts": found.facts,
    }
