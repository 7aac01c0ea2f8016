"""The profilers by name, written by hand."""

from __future__ import annotations

from collections.abc import Sequence

from vlmfix.errors import UsageError
from vlmfix.heads.profiler import Profiler
from vlmfix.heads.profilers.ablation import Ablation
from vlmfix.heads.profilers.gaze_shift import GazeShift
from vlmfix.heads.profilers.image_mass import ImageMass
from vlmfix.heads.profilers.localization import Localization
from vlmfix.heads.profilers.non_sink import NonSink
from vlmfix.heads.profilers.patching import Patching
from vlmfix.heads.profilers.retrieval import Retrieval
from vlmfix.heads.profilers.saliency import Saliency
from vlmfix.heads.profilers.sink_tokens import SinkTokens
from vlmfix.heads.profilers.vhd import HeadDivergence

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
