"""The two halves of the pictures: one that a search sees, and one on which the best of it is tried."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from vlmfix.errors import DataError
from vlmfix.evals.record import digest
from vlmfix.evals.task import Workload

TUNING, HELD_OUT = "tuning", "held-out"


def split(workload: Workload, seed: int) -> tuple[Workload, Workload]:
    """Halve a workload by pictures: the tuning split, and the held-out split, which gets the odd one.

    Args:
        workload: What is halved; samples keep their order, and those of one unit stay together.
        seed: Of the hash that the units are sorted by.

    Raises:
        DataError: There are fewer than two units.
    """
    units = dict.fromkeys(sample.drawn_as() for sample in workload.samples)
    if len(units) < 2:
        raise DataError(f"{len(units)} pictures cannot be split in two", "take more pictures")
    ranked = sorted(units, key=lambda unit: hashlib.sha256(f"{seed} {unit}".encode(errors="surrogateescape")).digest())
    first = set(ranked[: len(ranked) // 2])
    return _part(workload, first, TUNING, seed), _part(workload, set(ranked) - first, HELD_OUT, seed)


def _part(workload: Workload, units: set[str], name: str, seed: int) -> Workload:
    samples = [sample for sample in workload.samples if sample.drawn_as() in units]
    return replace(workload, samples=samples, about={**workload.about, "split": {"part": name, "seed": seed}})


def about_halves(tuning: Workload, held_out: Workload, seed: int) -> dict[str, Any]:
    """What a recipe says of the halves, in JSON values.

    Args:
        tuning: The half that is searched on.
        held_out: The other.
        seed: Of the split.
    """
    return {
        "seed": seed,
        **{
            name: {
                "pictures": len({sample.drawn_as() for sample in part.samples}),
                "samples": len(part.samples),
                "digest": digest(part.samples),
            }
            for name, part in ((TUNING, tuning), (HELD_OUT, held_out))
        },
    }
