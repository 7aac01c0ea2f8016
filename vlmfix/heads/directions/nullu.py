"""Directions for `nullu`: those in which planted captions move the layers' streams most, against true ones.

Shape letters (``docs/notation.md``): T tokens, L layers, D hidden size; here also N pictures and k directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.errors import DataError, UsageError
from vlmfix.heads.directions.method import Differences, Measurement
from vlmfix.heads.directions.shown import Shown, answered, streams
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Subspace(Measurement):
    """Measures for each layer the directions in which planted captions move its stream.

    ``vectors`` (L, rank, D) are the right singular vectors with the largest singular values, largest first, of the
    matrix whose N rows are half the differences, true caption minus planted one, of the mean over all tokens of
    question and caption of the stream that leaves the layer. Rows are not centred. ``values`` (L, rank) are the
    singular values.

    Args:
        rank: Directions that are kept of each layer, at least 1; a decoder takes some of them.
    """

    name: ClassVar[str] = "nullu"

    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"nullu: rank={self.rank!r} is not allowed", "rank is at least 1")

    def begin(self, vlm: Checkpoint, question: str, seed: int) -> Differences:
        """Begins a measurement."""
        return _Subspace(self.rank, vlm, question)


class _Subspace(Differences):
    def __init__(self, rank: int, vlm: Checkpoint, question: str) -> None:
        self._rank, self._vlm, self._question = rank, vlm, question
        self._rows: list[Tensor] = []

    def add(self, shown: Shown, number: int) -> None:
        """Measures the difference of both captions."""
        true, planted = (
            streams(self._vlm, answered(self._vlm, self._question, shown.picture, said)).mean(dim=1)
            for said in (shown.caption, shown.planted)
        )
        self._rows.append(((true - planted) / 2).cpu())

    def tensors(self) -> dict[str, Tensor]:
        """Returns singular vectors and values."""
        rows = torch.stack(self._rows, dim=1).double()  # (L, N, D)
        if rows.shape[1] < self._rank:
            raise DataError(f"{rows.shape[1]} pictures have no {self._rank} directions for nullu", "show more pictures")
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        return {
            "vectors": vectors[:, : self._rank].float().contiguous(),
            "values": values[:, : self._rank].float().contiguous(),
        }
