"""Rows that show the same pictures share the work of the image processor.

The processor itself runs on all rows, so every token is its own doing. In a copy of it, made for the call, two parts
are replaced: the image processor is shown each distinct list of pictures once, and the text that stands for a picture
is made once. What belongs to the pictures is then handed out to all rows that show them. Where a family's pictures are
processed apart, the image processor is shown one list after the other, in as many threads as the caller has: at once,
a batch of photographs takes longer than one by one even in one thread, because it leaves the processor's caches.

Shape letters (``docs/notation.md``): B rows; here also U rows that no earlier row repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from vlmfix.models.family import Family
from vlmfix.models.layout import Batch

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""What calls a function with one thing after the other and gives the results in order, as ``map`` does."""


class Processed(NamedTuple):
    """What the processor returned, before repeated pictures are handed out.

    Attributes:
        inputs: Its tensors; those named in ``sources`` have the entries of U rows, the others of B.
        sources: For each entry of the whole input, which of those in ``inputs`` it is, (n,) int64 on the CPU.
    """

    inputs: Mapping[str, Tensor]
    sources: Mapping[str, Tensor]


def first_rows(pictures: Sequence[Sequence[Image.Image]]) -> list[int]:
    """For each row, the first row that holds the same picture objects in the same order."""
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(tuple(id(picture) for picture in row), number) for number, row in enumerate(pictures)]


def repeats_pictures(pictures: Sequence[Sequence[Image.Image]]) -> bool:
    """Whether some row holds the pictures of an earlier one."""
    return any(
        row and first != number for number, (row, first) in enumerate(zip(pictures, first_rows(pictures), strict=True))
    )


def process_once(
    family: Family,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    pictures: Sequence[Sequence[Image.Image]],
    each: Each = map,
) -> Processed:
    """``family.process``, in which the image processor sees each distinct list of picture objects once.

    Args:
        family: The model's family.
        model: The model; only its configuration is read.
        processor: The model's processor; it is left as it was found.
        texts: B rendered chat prompts with the family's picture placeholders.
        pictures: Pictures of each row, RGB; a row may have none.
        each: Calls the image processor with one row after the other, where the family's rows are processed apart.
    """
    alike = repeats_pictures(pictures)
    if not alike and not (family.apart and any(pictures)):
        return Processed(family.process(processor, texts, pictures), {})
    first = first_rows(pictures)
    rows = sorted(set(first))
    counts = [len(pictures[row]) for row in rows]
    shown = _Shown(processor.image_processor, rows, each if family.apart else None)
    if not alike:
        own: Any = copy(processor)
        own.image_processor = shown
        return Processed(family.process(own, texts, pictures), {})
    sharing = family.sharing(processor)
    sharing.image_processor = shown
    numbers = _sources(torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)), rows, first).tolist()
    sharing.replace_image_token = _replacing(processor.replace_image_token, numbers)
    inputs = family.process(sharing, texts, pictures)
    batch = Batch({**inputs, "input_ids": inputs["input_ids"][rows]})  # (U, T)
    names = [name for name, value in inputs.items() if name in shown.names and isinstance(value, Tensor)]
    owners = {name: family.owners(model, batch, name, counts) for name in names}
    if any(len(own) != len(inputs[name]) for name, own in owners.items()):
        # A question that spells out image tokens: whose entries are whose can no longer be told from the tokens.
        return Processed(family.process(processor, texts, pictures), {})
    return Processed(inputs, {name: _sources(own, rows, first) for name, own in owners.items()})


def _sources(owners: Tensor, rows: Sequence[int], first: Sequence[int]) -> Tensor:
    """For each entry of an input of all rows, the entry of an input of some that it repeats.

    Args:
        owners: (n,) int64, number among ``rows`` that each entry belongs to.
        rows: The U rows that have entries.
        first: For each of B rows, the one of ``rows`` whose pictures it shows.
    """
    entries = {row: (owners == number).nonzero().squeeze(1) for number, row in enumerate(rows)}
    return torch.cat([entries[row] for row in first])


def _replacing(replace: Callable[..., str], numbers: Sequence[int]) -> Callable[..., str]:
    """A processor's ``replace_image_token`` for the pictures of all rows, where some rows' alone were processed.

    Args:
        replace: The processor's own.
        numbers: For each picture of all rows, its number among those that were processed.
    """
    made: dict[int, str] = {}

    def replaced(image_inputs: Any, image_idx: int, **kwargs: Any) -> str:  # noqa: ANN401 (families differ)
        number = numbers[image_idx]
        if number not in made:
            made[number] = replace(image_inputs, image_idx=number, **kwargs)
        return made[number]

    return replaced


class _Shown:
    """An image processor that is shown some rows of every batch; in all else the one that it is made of.

    Args:
        image_processor: The one.
        rows: Numbers of the rows.
        each: Calls it with one row after the other; None to call it once with all of them.

    Attributes:
        names: Names of what it returned last.
    """

    names: frozenset[str] = frozenset()

    def __init__(self, image_processor: Any, rows: Sequence[int], each: Each | None) -> None:  # noqa: ANN401 (families differ)
        self._image_processor, self._rows, self._each = image_processor, rows, each

    def __call__(self, images: Sequence[Any], **kwargs: Any) -> Any:  # noqa: ANN401
        shown = [images[row] for row in self._rows]
        if self._each is None:
            returned = self._image_processor(shown, **kwargs)
        else:
            process = functools.partial(self._image_processor, **kwargs)
            returned = _joined(list(self._each(process, [[row] for row in shown if row])))
        self.names = frozenset(returned)
        return returned

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._image_processor, name)


def _joined(parts: Sequence[Mapping[str, Any]]) -> BatchFeature:
    """What an image processor returned of several rows, as it would of all at once."""
    values = {name: [part[name] for part in parts] for name in parts[0]}
    return BatchFeature(
        {
            name: torch.cat(found) if isinstance(found[0], Tensor) else [entry for one in found for entry in one]
            for name, found in values.items()
        }
    )
