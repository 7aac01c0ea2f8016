"""A picture of what the tokens of an answer owe to what: bars per token, and the patches behind the best-seen words."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vlmfix.figures import literally, write
from vlmfix.insight.grounding import Grounding
from vlmfix.insight.wording import FUNCTION_WORDS
from vlmfix.models.layout import ImageLayout
from vlmfix.parsing import escaped

MAPS, DPI = 6, 100
"""Tokens whose patches are shown, and dots per inch."""
WIDTH, STRIP, PANEL = 10.0, 1.15, 1.9
"""Inches: of the page, of one strip of bars and of one row of pictures."""
SIDE = 240
"""Pixels of the longer side of a picture."""
STRIPS = (("picture", "#0072B2"), ("prompt", "#009E73"), ("preceding", "#D55E00"))
"""What has a strip, and its colour (Okabe and Ito's)."""


@literally()
def draw(found: Grounding, picture: Image.Image, layout: ImageLayout, path: Path) -> None:
    """Draws the scores of an answer, and where in the picture its best-grounded content words look.

    Args:
        found: The scores, from a batch of one row with one picture.
        picture: That picture, RGB.
        layout: Layout of the batch's prompt.
        path: A PNG, PDF or SVG file; its folder must exist.

    Raises:
        DataError: The file cannot be written.
        LayoutError: The picture's tokens have no place in it.
    """
    shown = sorted(_best(found, MAPS))
    figure = Figure(figsize=(WIDTH, len(STRIPS) * STRIP + PANEL + 0.9), dpi=DPI, layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(len(STRIPS) * STRIP + 0.7, PANEL))[:, 0]
    strips = upper.subplots(len(STRIPS), 1, sharex=True)
    for axis, (name, colour) in zip(strips, STRIPS, strict=True):
        _strip(axis, getattr(found, name), name, colour, shown if name == "picture" else [])
    strips[-1].set_xticks(range(len(found.texts)), _labels(found), rotation=60, ha="right", fontsize=7)
    upper.suptitle("What each token owes to the picture, to the prompt's text and to the token before it", fontsize=10)
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    for axis, place in zip(lower.subplots(1, MAPS, squeeze=False)[0], [*shown, *[None] * MAPS], strict=False):
        axis.set_axis_off()
        if place is None:
            continue
        prompt = layout.tokens.shape[1]
        heat = layout.heatmap(found.rows[place, :prompt], row=0, image=0, size=(small.height, small.width))
        axis.imshow(small)
        axis.imshow(heat.numpy(), cmap="magma", alpha=0.6, vmin=0.0)
        axis.set_title(_labels(found)[place], fontsize=9)
    write(figure, path)


def _best(found: Grounding, count: int) -> list[int]:
    """Words with a meaning of their own that owe most to the picture; any tokens where there are none."""
    words = [text.strip().lower() for text in found.texts]
    every = range(len(words))
    speaking = [place for place in every if words[place].isalpha() and words[place] not in FUNCTION_WORDS] or [*every]
    return sorted(speaking, key=lambda place: -float(found.picture[place].nan_to_num()))[:count]


def _strip(axis: Axes, scores: torch.Tensor, name: str, colour: str, marked: list[int]) -> None:
    axis.bar(range(len(scores)), scores.nan_to_num().tolist(), color=colour, width=0.8)
    for place in marked:
        axis.annotate("▾", (place, float(scores[place])), ha="center", va="bottom", fontsize=8)
    axis.set_ylabel(name, fontsize=9)
    axis.set_ylim(0, 1.25 * max(float(scores.nan_to_num().max()), 1e-6))
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _labels(found: Grounding) -> list[str]:
    return [escaped(text.strip()) or repr(text)[1:-1] for text in found.texts]
