"""Draws profiles as maps of layers by heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlmfix.figures import literally, write
from vlmfix.heads.profile import HeadProfile
from vlmfix.heads.profilers import PROFILERS
from vlmfix.parsing import escaped

PANEL, DPI = 4.6, 130
"""Inches of a panel's side, and dots per inch."""
ACROSS = 3
"""Panels side by side."""


def draw(profiles: Sequence[HeadProfile], path: Path) -> None:
    """Draws profiles into a file; see ``drawn``.

    Args:
        profiles: At least one.
        path: A PNG, PDF or SVG file; its folder must exist.

    Raises:
        DataError: The file cannot be written.
    """
    with literally():
        write(drawn(profiles), path)


@literally()
def drawn(profiles: Sequence[HeadProfile]) -> Figure:
    """Draws one map per profile: a cell per head, layers from the bottom up, with a colour bar of its own.

    Scores of one sign run from light to dark. Where some are negative, colours part at zero.

    Args:
        profiles: At least one.
    """
    across = min(ACROSS, len(profiles))
    down = -(-len(profiles) // across)
    figure = Figure(figsize=(across * PANEL + 0.4, down * PANEL * 0.86 + 0.4), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, profile in zip(axes, profiles, strict=False):
        _map(figure, axis, profile)
    for axis in axes[len(profiles) :]:
        axis.set_visible(False)
    first = profiles[0].card
    model = escaped(first.model or first.model_type)
    figure.suptitle(f"{model}: {first.layers} layers of {first.heads} heads", fontsize=11)
    return figure


def _map(figure: Figure, axis: Axes, profile: HeadProfile) -> None:
    card, scores = profile.card, profile.scores.numpy()
    signed = bool((scores < 0).any())
    norm: Normalize = CenteredNorm() if signed else Normalize(vmin=0.0)
    image = axis.imshow(
        scores, origin="lower", aspect="auto", interpolation="nearest", cmap="RdBu_r" if signed else "YlGnBu", norm=norm
    )
    known = PROFILERS[card.profiler] if card.profiler in PROFILERS.homes else None  # a card names no code to run
    axis.set_title(f"{escaped(card.profiler)}, {card.pictures} pictures", fontsize=10)
    axis.set_xlabel("head", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axis.tick_params(labelsize=8)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label(known.title if known is not None else "score", fontsize=9)
    bar.ax.tick_params(labelsize=8)
