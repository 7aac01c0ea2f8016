"""The samples of one call at work: their branches, the edits, and the passes that a loop asks for.

Shape letters (``docs/notation.md``): B samples of the call, L lines that go on (one per sample, or one per beam of a
sample, side by side), N branches, R = (1 + N) * L rows in branch-major order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from vlmfix.attention.session import AtWork, edited
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.passes import Passes
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.prefix import Prompts, prompts_of, shared_prefixes
from vlmfix.decoding.rows import rows_of
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


class Running:
    """What a loop steps through: ``prompt`` once, then ``token`` and ``keep`` as often as wanted.

    Args:
        vlm: The model, with the edits at work on it.
        passes: The passes over all rows.
        work: The edits.
        contrasts: The rules that fuse the branches' logits, in order.
        alike: Which prompts begin alike and share that, or None.
        copies: 1 + N.
    """

    def __init__(
        self,
        vlm: Checkpoint,
        passes: Passes,
        work: AtWork,
        contrasts: Sequence[Contrast],
        alike: Prompts | None,
        copies: int,
    ) -> None:
        self._vlm, self._passes, self._work, self._contrasts = vlm, passes, work, tuple(contrasts)
        self._alike, self._copies, self._lines, self._width = alike, copies, 0, 1

    def prompt(self) -> Tensor:
        """The scores that follow each prompt, (B, V) float32."""
        with shared_prefixes(self._vlm, self._alike) if self._alike else nullcontext():
            logits = self._passes.prompt()
        self._lines = len(logits) // self._copies
        return self._scores(logits)

    def token(self, tokens: Tensor) -> Tensor:
        """The scores that follow one more token of each line, (L, V) float32; ``tokens`` (L,) int64."""
        return self._scores(self._passes.token(tokens.repeat(self._copies)))

    def keep(self, lines: Tensor, *, width: int = 1) -> None:
        """Goes on with some of the lines, or with some of them several times.

        Args:
            lines: (L',) int64, numbers of the present lines; those of a sample stand side by side.
            width: Lines that each sample has from now on.
        """
        rows = (lines + self._lines * torch.arange(self._copies, device=lines.device)[:, None]).flatten()  # (R',)
        samples = lines[::width] // self._width
        self._passes.keep(rows)
        self._work.keep(rows, samples)
        self._contrasts = tuple(replace(contrast, rows=contrast.rows[lines]) for contrast in self._contrasts)
        self._lines, self._width = len(lines), width

    def _scores(self, logits: Tensor) -> Tensor:
        return fused(self._contrasts, logits.unflatten(0, (self._copies, -1)))


@contextmanager
def running(vlm: Checkpoint, batch: Batch, layout: ImageLayout, plan: DecodingPlan) -> Iterator[Running]:
    """Puts a plan to work on the samples of a batch inside the block; the model is then as it was.

    Args:
        vlm: The model.
        batch: B samples.
        layout: Where their image tokens are.
        plan: What the decoder does; one without a loop of its own.
    """
    branches = [branch for contrast in plan.contrasts for branch in contrast.branches]
    rows = rows_of(vlm, batch, branches)
    wide, live = rows.layout(layout)
    with edited(vlm, wide, plan.edits, live=live) as work:
        alike = prompts_of(vlm, batch, branches)
        yield Running(vlm, Passes(vlm, rows), work, plan.contrasts, alike, rows.copies)


def fused(contrasts: Sequence[Contrast], logits: Tensor) -> Tensor:
    """The scores of one step: the samples' logits, and what each contrast makes of them in turn.

    Args:
        contrasts: The rules, in order; each takes as many of the branches as it has.
        logits: (1 + N, L, V) float32; the samples come first.

    Returns:
        (L, V) float32.
    """
    clean, scores, first = logits[0], logits[0], 1
    for contrast in contrasts:
        count = len(contrast.branches)
        new = contrast.fuse(clean, logits[first : first + count], scores)
        scores = torch.where(contrast.rows[:, None], new, scores)
        first += count
    return scores
