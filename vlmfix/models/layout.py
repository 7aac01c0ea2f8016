"""What goes into the model and which of its tokens show which part of which picture.

Shape letters (``docs/notation.md``): B rows, T prompt tokens, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from vlmfix.errors import LayoutError

Pictures = tuple[tuple[Image.Image, ...], ...]
"""Pictures of every row, in the order of the prompt."""
Sizes = tuple[tuple[tuple[int, int], ...], ...]
"""(height, width) in pixels of every picture of every row, as it came from the file."""


@dataclass(frozen=True)
class Turn:
    """Holds what somebody said before a question.

    Attributes:
        role: Who: the ``user``, the ``assistant``, which is the model, or the ``system``, which speaks first.
        text: The words.
        pictures: How many of the row's pictures were shown with them; the earlier turns' come first among these.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: int = 0


Earlier = tuple[tuple[Turn, ...], ...]
"""What was said in each row before its question."""


@dataclass(frozen=True, eq=False)
class Batch(Mapping[str, Tensor]):
    """Model inputs, with what they were made from; ``model.generate(**batch)`` takes it as it is.

    Attributes:
        inputs: What the processor returned, on the model's device; ``input_ids`` is (B, T), left-padded.
        prompts: The question of each row, or None when the inputs come from elsewhere.
        pictures: The pictures of each row, or None when the inputs come from elsewhere.
        sizes: Original (height, width) of every picture, or None when unknown.
        system: The system message of all rows, or None for the chat template's own.
        earlier: What was said in each row before its question; None for nothing.
    """

    inputs: Mapping[str, Tensor]
    prompts: tuple[str | None, ...] | None = None
    pictures: Pictures | None = None
    sizes: Sizes | None = None
    system: str | None = None
    earlier: Earlier | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> Batch:
        """Wraps a user's own processor output; a ``Batch`` is returned as it is."""
        return inputs if isinstance(inputs, Batch) else cls(inputs=dict(inputs))

    def __getitem__(self, key: str) -> Tensor:
        return self.inputs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return int(self.inputs["input_ids"].shape[0])

    @property
    def length(self) -> int:
        """T, the padded prompt length in tokens."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) int64, 1 where a token is real; all ones when the processor returned none."""
        mask = self.inputs.get("attention_mask")
        return torch.ones_like(self.inputs["input_ids"]) if mask is None else mask

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, real tokens of each row's prompt."""
        return self.attention_mask.bool().sum(dim=1)

    def with_inputs(self, **changed: Tensor) -> Batch:
        """The same batch with some input tensors replaced."""
        return replace(self, inputs={**self.inputs, **changed})


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows that wait for the model, on the CPU; ``Checkpoint.placed`` makes a ``Batch`` of them.

    Attributes:
        inputs: What the processor returned, in the model's precision; those named in ``sources`` have the entries of
            distinct pictures alone, ``input_ids`` is (B, T), left-padded.
        sources: For each entry of the whole input, which of those in ``inputs`` it is, (n,) int64.
        prompts: The question of each row.
        pictures: The pictures of each row.
        system: The system message of all rows, or None for the chat template's own.
        earlier: What was said in each row before its question; None for nothing.
    """

    inputs: Mapping[str, Tensor]
    sources: Mapping[str, Tensor]
    prompts: tuple[str | None, ...]
    pictures: Pictures
    system: str | None = None
    earlier: Earlier | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's prompt, pictures included and padding left out."""
        ids = self.inputs["input_ids"]
        mask = self.inputs.get("attention_mask")
        return [ids.shape[1]] * len(ids) if mask is None else [int(row.sum()) for row in mask.bool()]

    @property
    def length(self) -> int:
        """T, the padded prompt length in tokens."""
        return int(self.inputs["input_ids"].shape[1])


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Which prompt token shows which part of which picture.

    Attributes:
        tokens: (B, T) bool, True at image-patch tokens (newline and tile separators are False).
        text: (B, T) bool, True at prompt text: neither image nor padding.
        image: (B, T) int64, number of the picture within the row, -1 elsewhere.
        boxes: (B, T, 4) float32, x0, y0, x1, y1 in [0, 1] of the original picture; NaN where a token
            has no place in it or the picture's size is unknown.
    """

    tokens: Tensor
    text: Tensor
    image: Tensor
    boxes: Tensor

    def image_keys(self, length: int) -> Tensor:
        """(B, length) bool: patch tokens among the first ``length`` keys; generated keys are False."""
        return _padded(self.tokens, length)

    def text_keys(self, length: int) -> Tensor:
        """(B, length) bool: prompt-text tokens among the first ``length`` keys; generated keys are False."""
        return _padded(self.text, length)

    def text_after_image(self) -> Tensor:
        """(B, T) bool: prompt text that stands after an image token of its own row."""
        return self.text & (self.tokens.int().cumsum(dim=1) > 0)

    def expand(self, times: int) -> ImageLayout:
        """The layout after beam search repeated every row ``times`` times."""
        return ImageLayout(
            *(x.repeat_interleave(times, dim=0) for x in (self.tokens, self.text, self.image, self.boxes))
        )

    def grid(self, row: int, image: int) -> tuple[int, int] | None:
        """(rows, columns) when one picture's patches form a single rectangle of distinct cells, else None."""
        boxes = self._boxes(row, image)
        columns = boxes[:, 0].unique().numel()
        lines = boxes[:, 1].unique().numel()
        placed = bool(boxes.isfinite().all())
        return (lines, columns) if placed and lines * columns == boxes.shape[0] else None

    def heatmap(self, values: Tensor, *, row: int, image: int, size: tuple[int, int]) -> Tensor:
        """Paints one value per token over the part of the picture that the token shows.

        Args:
            values: (T,) float, one value per prompt token; only those of the picture's patches are read.
            row: Row of the batch.
            image: Number of the picture within the row.
            size: (height, width) of the map in pixels.

        Returns:
            (height, width) float32; where tiles overlap, the mean of the tokens that show the pixel;
            zero where no token shows it (cropped away).

        Raises:
            LayoutError: The row has no such picture, or its tokens have no place in it.
        """
        boxes = self._boxes(row, image)
        placed = boxes.isfinite().all(dim=1)
        if not bool(placed.any()):
            raise LayoutError(
                f"the tokens of picture {image} in row {row} have no place in the picture",
                "encode with vlm.encode(...), which records the picture's size",
            )
        height, width = size
        scale = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        chosen = values[self.image[row] == image].float().cpu()[placed]
        total, count = torch.zeros(height, width), torch.zeros(height, width)
        edges = (boxes[placed] * scale).round().long().tolist()
        for (x0, y0, x1, y1), value in zip(edges, chosen.tolist(), strict=True):
            total[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] += value
            count[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] += 1
        return total / count.clamp(min=1)

    def _boxes(self, row: int, image: int) -> Tensor:
        mine = self.image[row] == image
        if not bool(mine.any()):
            raise LayoutError(f"row {row} has no picture {image}", "pictures count from 0 within their row")
        return self.boxes[row][mine].cpu()


def laid_out(ids: Tensor, real: Tensor, marked: Tensor, places: Sequence[list[Tensor]]) -> ImageLayout:
    """Gives each token that stands for a part of a picture its place there.

    Args:
        ids: (B, T) prompt tokens.
        real: (B, T) bool, False at padding.
        marked: (B, T) bool, the tokens that stand for parts of pictures, newlines among them.
        places: Of each row and picture the boxes of these tokens; see ``Family.patches``.

    Raises:
        LayoutError: The number of image tokens and of places in the pictures differ.
    """
    boxes = torch.full((*ids.shape, 4), float("nan"))
    image = torch.full(ids.shape, -1, dtype=torch.long)
    for row, pictures in enumerate(places):
        where = marked[row].nonzero().squeeze(1).cpu()
        count = sum(len(picture) for picture in pictures)
        if len(where) != count:
            raise LayoutError(
                f"row {row} has {len(where)} image tokens but its pictures fill {count}",
                "the inputs were cut, or made with another processor",
            )
        if pictures:
            boxes[row, where] = torch.cat(pictures)
            image[row, where] = torch.arange(len(pictures)).repeat_interleave(
                torch.tensor([len(picture) for picture in pictures])
            )
    boxes, image = boxes.to(ids.device), image.to(ids.device)
    separator = boxes.isnan().any(dim=2)
    tokens = marked & ~separator
    return ImageLayout(
        tokens=tokens,
        text=real & ~marked,
        image=torch.where(tokens, image, -1),
        boxes=torch.where(boxes.isinf(), float("nan"), boxes),
    )


def _padded(mask: Tensor, length: int) -> Tensor:
    missing = length - mask.shape[1]
    return mask[:, :length] if missing <= 0 else torch.nn.functional.pad(mask, (0, missing))
