"""Measures directions: pictures whose objects are known are shown to the model, one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import vlmfix
from vlmfix.asked import whole
from vlmfix.attention.session import bare
from vlmfix.errors import DataError, UsageError
from vlmfix.heads.directions.kept import Directions
from vlmfix.heads.directions.method import Measurement
from vlmfix.heads.directions.nullu import Subspace
from vlmfix.heads.directions.pti import Interventions
from vlmfix.heads.directions.shown import Shown
from vlmfix.heads.directions.vti import Shifts
from vlmfix.heads.measure import PACKAGES, QUESTION
from vlmfix.heads.profile import ProfileCard, fingerprint
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.turns import turn_of
from vlmfix.pixels import content
from vlmfix.plugins import plugins_of

MEASURED: Mapping[str, type[Measurement]] = {"vti": Shifts, "nullu": Subspace, "pti": Interventions}
"""Methods that read directions, with what measures these."""


def measurements_of(names: Sequence[str | Measurement]) -> list[Measurement]:
    """Returns measurements, or those that names of methods stand for with their defaults.

    Raises:
        UsageError: There is none, one is not known, or two are for one method.
    """
    if not names:
        raise UsageError("no method to measure directions for", f"use {', '.join(MEASURED)}")
    for name in names:
        if isinstance(name, str) and name not in MEASURED:
            raise UsageError(f"no directions are measured for {name!r}", f"use {', '.join(MEASURED)}")
    found = [MEASURED[name]() if isinstance(name, str) else name for name in names]
    if len({part.name for part in found}) < len(found):
        raise UsageError(f"{', '.join(part.name for part in found)}: one is named twice", "name each once")
    return found


def directions(
    vlm: Checkpoint,
    shown: Iterable[Shown],
    methods: Sequence[str | Measurement],
    *,
    about: Mapping[str, Any] | None = None,
    question: str = QUESTION,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
) -> dict[str, Directions]:
    """Measures the directions that methods read.

    Args:
        vlm: The model; it is left as it was found.
        shown: The pictures, with what is known of them.
        methods: Names of ``MEASURED``, or measurements with parameters.
        about: Where the captions come from, in JSON values, for the cards.
        question: Asked about every picture.
        seed: Seed of what is drawn, at least 0.
        report: Called with the number of pictures done.

    Returns:
        By method.

    Raises:
        UsageError: A method is not known.
        UnsupportedModelError: The model lacks what is measured.
        DataError: There are too few pictures, or one does not fit into the model's context.
    """
    seed, chosen = whole("seed", seed, 0, 2**63 - 1), measurements_of(methods)
    digest, count = hashlib.sha256(), 0
    with bare(vlm), turn_of(vlm.model).guarded(vlm.family.decoder(vlm.model)):
        runs = [measurement.begin(vlm, question, seed) for measurement in chosen]
        for one in shown:
            for run in runs:
                run.add(one, count)
            digest.update(content(one.picture))
            digest.update("\0".join((*one.objects, one.caption, one.planted)).encode())
            if one.mask is not None:
                digest.update(one.mask.numpy().tobytes())
            count += 1
            if report is not None:
                report(count)
        if count < 2:
            raise DataError(
                f"{count} pictures are too few to measure directions", "give at least two, better a hundred"
            )
        marks = fingerprint(vlm)
        return {
            measurement.name: Directions(
                run.tensors(),
                ProfileCard(
                    profiler=measurement.name,
                    parameters={**measurement.parameters(), **({"labels": dict(about)} if about else {})},
                    model=vlm.name,
                    revision=vlm.revision,
                    model_type=str(vlm.model.config.model_type),
                    dtype=str(vlm.model.dtype).removeprefix("torch."),
                    layers=vlm.layers,
                    heads=vlm.heads,
                    question=question,
                    pictures=count,
                    data=digest.hexdigest(),
                    seed=seed,
                    reliability=None,
                    stable=False,
                    versions={"vlmfix": vlmfix.__version__}
                    | {name: version(name) for name in PACKAGES}
                    | plugins_of([type(vlm.family)]),
                ),
                marks,
            )
            for measurement, run in zip(chosen, runs, strict=True)
        }
