"""Stacks the rows of one call, the samples and below them their contrast branches, as one left-padded batch.

Shape letters (``docs/notation.md``): B samples, N branches, R = (1 + N) * B rows in branch-major order, T prompt
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.session import Portion
from vlmfix.decoding.branches import Branch
from vlmfix.decoding.encoding import encoded_once, repeats_pictures
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream.features import Features, handed_over, joined
from vlmfix.upstream.names import PIXELS, TYPES
from vlmfix.upstream.positions import prompt_positions


@dataclass(frozen=True, eq=False)
class Rows:
    """Holds the inputs of prefill.

    Attributes:
        samples: B.
        copies: 1 + N.
        ids: (R, T) int64, padded on the left with zeros.
        mask: (R, T) int64, 1 where a token is real.
        positions: (R, T) or (3 or 4, R, T) int64.
        types: (R, T) each, under the names in ``TYPES`` that the samples have.
        pictures: Arguments of the model for all pictures, row after row: encoded features, or pixels where no picture
            serves several rows.
        blank: (R, T) bool, tokens that branches blank; None where none does.
    """

    samples: int
    copies: int
    ids: Tensor
    mask: Tensor
    positions: Tensor
    types: dict[str, Tensor]
    pictures: Mapping[str, Any]
    blank: Tensor | None = None

    @property
    def length(self) -> int:
        """Returns T."""
        return int(self.ids.shape[1])

    @property
    def longest(self) -> Tensor:
        """Counts the real tokens of the longest among each sample's prompt and its branches' prompts, (B,)."""
        return self.mask.view(self.copies, self.samples, -1).sum(dim=-1).amax(dim=0)

    def layout(self, clean: ImageLayout) -> tuple[ImageLayout, Tensor | None]:
        """Returns the layout of all rows, and a mask of the samples among them, (R,) bool, None when all are.

        Args:
            clean: (B, T') layout of the samples, T' <= T.
        """
        return (clean, None) if self.copies == 1 else alone(clean, 0, self.copies, self.length)

    def portions(self, clean: ImageLayout, branches: Sequence[Branch]) -> list[Portion]:
        """Returns the edits that branches have of their own, and where they act.

        Args:
            clean: (B, T') layout of the samples, which such branches share.
            branches: The branches.
        """
        return portions_of(clean, branches, self.length)


def portions_of(clean: ImageLayout, branches: Sequence[Branch], length: int) -> list[Portion]:
    """Returns the edits that branches have of their own, and where they act among the rows of a pass.

    Args:
        clean: (B, T') layout of the samples, beams expanded.
        branches: N branches.
        length: T.
    """
    return [
        Portion(branch.edits, *alone(clean, number, 1 + len(branches), length))
        for number, branch in enumerate(branches, 1)
        if branch.edits
    ]


def alone(clean: ImageLayout, copy: int, copies: int, length: int) -> tuple[ImageLayout, Tensor]:
    """Returns a layout of all rows in which one copy of the samples is shown, and which rows that is, (R,) bool.

    The other rows show no picture and no text, because edits must leave them alone.

    Args:
        clean: (B, T') layout of the samples, T' <= T.
        copy: Number of the copy: 0 for the samples themselves, then the branches.
        copies: 1 + N.
        length: T.
    """
    samples, wider = len(clean.tokens), length - clean.tokens.shape[1]
    before, behind = copy * samples, (copies - copy - 1) * samples

    def grown(values: Tensor, fill: float) -> Tensor:
        return pad(values, (0, 0) * (values.dim() - 2) + (wider, 0, before, behind), value=fill)

    layout = ImageLayout(
        tokens=grown(clean.tokens, False),
        text=grown(clean.text, False),
        image=grown(clean.image, -1),
        boxes=grown(clean.boxes, float("nan")),
    )
    row = torch.arange(copies * samples, device=clean.tokens.device)
    return layout, (row >= before) & (row < before + samples)


@torch.no_grad()
def rows_of(vlm: Checkpoint, batch: Batch, branches: Sequence[Branch]) -> Rows:
    """Stacks samples and branches, and encodes every distinct picture once.

    Args:
        vlm: The model.
        batch: The samples.
        branches: Contrast branches, with a row for each sample.
    """
    batches = [batch, *(branch.batch for branch in branches)]
    length = max(part.length for part in batches)

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(part, (length - part.shape[-1], 0)) for part in parts], dim=-2)

    return Rows(
        samples=batch.rows,
        copies=len(batches),
        ids=stacked([part["input_ids"] for part in batches]),
        mask=stacked([part.attention_mask for part in batches]),
        positions=stacked([prompt_positions(vlm.model, part) for part in batches]),
        types={
            name: stacked([part.get(name, torch.zeros_like(part["input_ids"])) for part in batches])
            for name in TYPES
            if name in batch
        },
        pictures=_pictures(vlm, batch, branches),
        blank=blank_of(batch, branches, length),
    )


def blank_of(batch: Batch, branches: Sequence[Branch], length: int) -> Tensor | None:
    """Stacks the tokens that branches blank, (R, T) bool; None where no branch does.

    Args:
        batch: The samples.
        branches: Their branches.
        length: T.
    """
    if all(branch.blank is None for branch in branches):
        return None
    none = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    parts = [
        none,
        *(torch.zeros_like(b.batch["input_ids"], dtype=torch.bool) if b.blank is None else b.blank for b in branches),
    ]
    return torch.cat([pad(part, (length - part.shape[1], 0)) for part in parts])


def _pictures(vlm: Checkpoint, batch: Batch, branches: Sequence[Branch]) -> Mapping[str, Any]:
    """Makes the arguments for all rows' pictures; batches with the same pixel tensor share one run of the tower."""
    if not branches and not repeats_pictures(batch):
        return {name: batch[name] for name in PIXELS if name in batch}
    shown = [batch, *(batch if branch.same_pictures else branch.batch for branch in branches)]
    made: dict[int, Features] = {}
    for part in shown:
        pixels = part.get("pixel_values")
        if pixels is not None and id(pixels) not in made:
            made[id(pixels)] = encoded_once(vlm, part)
    present = [made[id(part["pixel_values"])] for part in shown if "pixel_values" in part]
    return handed_over(vlm.model, joined(present)) if present else {}
