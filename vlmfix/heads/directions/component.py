"""Finds the direction in which rows differ most: their first principal component, with a sign that can be had again."""

from __future__ import annotations

import torch
from torch import Tensor


def first_component(rows: Tensor) -> Tensor:
    """Returns the first principal component of rows, as a unit vector.

    A component has no sign of its own. It gets the one by which the row that it says most of lies on its positive side,
    as in the code of VTI and PTI. Where all rows are equal, there is none, and it is zero.

    Args:
        rows: (N, n), N at least 1.

    Returns:
        (n,) float32.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # (N, N), which is small: there are few rows
    scores = vectors[:, -1]
    found = centred.T @ (scores * scores[scores.abs().argmax()].sign())
    length = found.norm()
    spread = rows.double().norm() * 1e-12
    return (found / length if bool(values[-1] > 0) and bool(length > spread) else torch.zeros_like(found)).float()
