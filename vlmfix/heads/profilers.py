"""The profilers by name, written by hand."""

from __future__ import annotations

from collections.abc import Sequence

from vlmfix.errors import UsageError
from vlmfix.heads.ablation import Ablation
from vlmfix.heads.gaze_shift import GazeShift
from vlmfix.heads.image_mass import ImageMass
from vlmfix.heads.localization import Localization
from vlmfix.heads.non_sink import NonSink
from vlmfix.heads.patching import Patching
from vlmfix.heads.profiler import Profiler
from vlmfix.heads.retrieval import Retrieval
from vlmfix.heads.saliency import Saliency
from vlmfix.heads.sink_tokens import SinkTokens
from vlmfix.heads.vhd import HeadDivergence

PROFILERS: dict[str, type[Profiler]] = {
    kind.name: kind
    for kind in (
        HeadDivergence,
        ImageMass,
        NonSink,
        GazeShift,
        Saliency,
        Retrieval,
        Ablation,
        Patching,
        Localization,
        SinkTokens,
    )
}
"""Every profiler that the command line offers."""


def profilers_of(names: Sequence[str | Profiler]) -> list[Profiler]:
    """Profilers, or those that names stand for with their defaults.

    Raises:
        UsageError: There is none, one is not known, or one is named twice.
    """
    unknown = [name for name in names if isinstance(name, str) and name not in PROFILERS]
    if unknown or not names:
        raise UsageError(f"{unknown[0]!r} is no profiler" if unknown else "no profiler", f"use {', '.join(PROFILERS)}")
    found = [PROFILERS[name]() if isinstance(name, str) else name for name in names]
    chosen = [profiler.name for profiler in found]
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"profilers {', '.join(chosen)}: one is named twice", "name each once")
    return found
