"""Lets contrast branches wait while no rule wants their logits, and lets them catch up in one pass when one does.

The branches keep a KV cache of their own. The tokens that the samples have said since are noted, and pass behind it all
at once, so that a wait costs no pass. Edits that change a branch's attention change it in every step anew, so such
branches catch up token by token.

Shape letters (``docs/notation.md``): L lines that go on, N branches that wait, R = N * L rows in branch-major order, V
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfix.attention.rows import Step
from vlmfix.attention.session import AtWork, bare, of_rows
from vlmfix.decoding.passes import Passes
from vlmfix.models.checkpoint import Checkpoint


class Waiting:
    """Holds the branches that wait.

    Args:
        vlm: The model, with the edits of all rows at work.
        passes: The passes of the R rows, of which the prompt's is done.
        work: The edits at work.
        steps: Layer number -> the edits of these rows; none act on other rows.
        copies: N.
        lines: L.
    """

    def __init__(
        self, vlm: Checkpoint, passes: Passes, work: AtWork, steps: dict[int, tuple[Step, ...]], copies: int, lines: int
    ) -> None:
        self._vlm, self._passes, self._work, self._steps = vlm, passes, work, steps
        self._copies, self._lines = copies, lines
        self._missing: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        """Notes one more token of each line, (L,) int64."""
        self._missing.append(tokens)

    def caught_up(self) -> Tensor:
        """Runs the noted tokens, one at least; returns the logits that follow them, (R, V) float32."""
        tokens = torch.stack(self._missing, dim=1).repeat(self._copies, 1)  # (R, Q)
        self._missing = []
        if not any(self._steps.values()):
            with bare(self._vlm):
                return self._passes.tokens(tokens)
        others = self._work.steps
        try:
            self._work.take(self._steps)
            for token in tokens.split(1, dim=1):
                logits = self._passes.tokens(token)
        finally:
            self._work.take(others)
        return logits

    def keep(self, lines: Tensor) -> None:
        """Keeps some of the lines, (L',) int64 numbers of the present ones."""
        rows = (lines + self._lines * torch.arange(self._copies, device=lines.device)[:, None]).flatten()
        self._passes.keep(rows)
        self._steps = of_rows(self._steps, rows)
        self._missing = [tokens[lines] for tokens in self._missing]
        self._lines = len(lines)
