"""What the vision tower makes of a batch's pictures, each distinct picture once.

Shape letters (``docs/notation.md``): B rows, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoding.branches import picture_counts
from vlmfix.models import repeats
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.upstream.features import Features, encoded, handed_over, picked, read_by_tower, sizes


def encoded_once(vlm: Checkpoint, batch: Batch) -> Features:
    """The features of all pictures of a batch, where rows with the same pictures share one run of the vision tower.

    Rows share when they hold the same picture objects in the same order and all inputs that belong to their pictures
    are equal; a batch without such rows is encoded as it is.

    Args:
        vlm: The model.
        batch: B rows with ``pixel_values``.

    Returns:
        Features in the order of the prompts, as for ``encoded``.
    """
    first, inputs = distinct(vlm, batch)
    if first == list(range(batch.rows)):
        return encoded(vlm.model, batch)
    features = encoded(vlm.model, inputs)
    tokens = (batch["input_ids"] == vlm.family.image_token(vlm.model.config)).sum(dim=1).tolist()
    kept = sorted({row for row in first if tokens[row]})
    parts = _by_row(sizes(features), kept, tokens)
    order = [part for row in first for part in parts.get(row, ())]
    return picked(features, order)


def generation_inputs(vlm: Checkpoint, batch: Batch) -> dict[str, Any]:
    """Inputs for ``model.generate``, with every distinct picture encoded once."""
    inputs = dict[str, Any](batch)
    if repeats_pictures(batch):
        inputs |= handed_over(vlm.model, encoded_once(vlm, batch))
        del inputs["pixel_values"]
    return inputs


def distinct(vlm: Checkpoint, batch: Batch) -> tuple[list[int], Mapping[str, Tensor]]:
    """Which rows show other pictures than those before them, and what the vision tower reads of these.

    Args:
        vlm: The model.
        batch: B rows with ``pixel_values``.

    Returns:
        For each row the first that shows the same pictures, itself where that is not certain; and the inputs that
        belong to the pictures of the rows that stand for themselves, in their order.
    """
    names, every = read_by_tower(vlm.model, batch), list(range(batch.rows))
    whole = {name: batch[name] for name in names}
    if not repeats_pictures(batch):
        return every, whole
    first, counts = first_rows(batch), picture_counts(vlm, batch)
    owners = {name: vlm.family.owners(vlm.model, batch, name, counts) for name in names}
    if not all(_alike(batch[name], own, first) for name, own in owners.items()):
        return every, whole
    kept = torch.tensor(sorted({row for row, count in zip(first, counts, strict=True) if count}))
    return first, {name: batch[name][torch.isin(own, kept).to(batch[name].device)] for name, own in owners.items()}


def first_rows(batch: Batch) -> list[int]:
    """For each row, the first row that holds the same picture objects in the same order; itself when unknown."""
    return list(range(batch.rows)) if batch.pictures is None else repeats.first_rows(batch.pictures)


def repeats_pictures(batch: Batch) -> bool:
    """Whether some row holds the pictures of an earlier one."""
    return batch.pictures is not None and repeats.repeats_pictures(batch.pictures)


def _alike(value: Tensor, owners: Tensor, first: Sequence[int]) -> bool:
    """Whether every row's entries equal those of the row that is to stand for it."""
    source = torch.cat([(owners == first[row]).nonzero().squeeze(1) for row in owners.unique().tolist()])
    if len(owners) != len(value) or len(source) != len(value):
        return False
    return torch.equal(value, value[source.to(value.device)])


def _by_row(sizes: Sequence[int], rows: Sequence[int], tokens: Sequence[int]) -> dict[int, list[int]]:
    """Which parts of the encoder's output belong to each row, by the image tokens that they fill.

    Args:
        sizes: Image tokens of every part.
        rows: The rows that were encoded.
        tokens: Image tokens of every row of the batch.
    """
    parts: dict[int, list[int]] = {}
    rest = iter(enumerate(sizes))
    for row in rows:
        parts[row], filled = [], 0
        while filled < tokens[row]:
            number, size = next(rest)
            parts[row].append(number)
            filled += size
    return parts
