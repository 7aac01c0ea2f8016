"""The profilers by name, written by hand; each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmfix.errors import UsageError
from vlmfix.plugins import Table

if TYPE_CHECKING:
    from vlmfix.heads.profiler import Profiler

PROFILERS: Table[Profiler] = Table(
    "profiler",
    "vlmfix.profilers",
    "vlmfix.heads.profiler:Profiler",
    {
        "vhd": "vlmfix.heads.profilers.vhd:HeadDivergence",
        "image-mass": "vlmfix.heads.profilers.image_mass:ImageMass",
        "non-sink": "vlmfix.heads.profilers.non_sink:NonSink",
        "gaze-shift": "vlmfix.heads.profilers.gaze_shift:GazeShift",
        "saliency": "vlmfix.heads.profilers.saliency:Saliency",
        "retrieval": "vlmfix.heads.profilers.retrieval:Retrieval",
        "ablation": "vlmfix.heads.profilers.ablation:Ablation",
        "patching": "vlmfix.heads.profilers.patching:Patching",
        "localization": "vlmfix.heads.profilers.localization:Localization",
        "sinks": "vlmfix.heads.profilers.sink_tokens:SinkTokens",
        "logit-lens": "vlmfix.heads.profilers.logit_lens:LogitLens",
        "echo": "vlmfix.heads.profilers.echo:Echo",
        "active": "vlmfix.heads.profilers.active:Active",
        "influence": "vlmfix.heads.profilers.influence:Influence",
        "heterogeneity": "vlmfix.heads.profilers.heterogeneity:Heterogeneity",
    },
    needs=("name", "title"),
)
"""Every profiler that the command line offers, those of other distributions included."""


def profilers_of(names: Sequence[str | Profiler]) -> list[Profiler]:
    """Profilers, or those that names stand for with their defaults.

    Raises:
        UsageError: There is none, one is not known, or two have one name.
        PluginError: One is a plug-in's or in a file, and cannot be used.
    """
    if not names:
        raise UsageError("no profiler", f"use {', '.join(PROFILERS)}")
    for name in names:
        if (
            isinstance(name, str)
            and name not in set(PROFILERS)
            and (taken := PROFILERS.find(name).name) in PROFILERS.homes
        ):
            raise UsageError(f"{name} says name = {taken!r}, which vlmfix's own profiler has", "choose another name")
    found = [PROFILERS.find(name)() if isinstance(name, str) else name for name in names]
    chosen = [profiler.name for profiler in found]
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"profilers {', '.join(chosen)}: one is named twice", "name each once")
    return found
