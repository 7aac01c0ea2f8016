"""Builds contrast branches, which ask the same model in another way, and declares the rule that fuses their logits.

``rows.py`` and ``stack.py`` run them as extra rows of the same forward pass. Shape letters (``docs/notation.md``): B
rows (after beam expansion), N branches, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.edit import AttentionEdit
from vlmfix.decoding.exits import Exit
from vlmfix.errors import DataError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.upstream.names import TYPES

TOKENS = ("input_ids", "attention_mask", *TYPES)
"""Names of inputs with one entry per token."""


@dataclass(frozen=True, eq=False)
class Branch:
    """Asks the clean batch's questions in another way: with another prompt, or other pictures.

    Attributes:
        batch: Its inputs; row i belongs to row i of the clean batch.
        same_pictures: Whether the pictures are the clean batch's own, so that both share the features.
        blank: (B, T) bool, tokens of its prompts whose embeddings are zero; None when it has none.
        edits: Edits of attention that act on its rows alone; its prompts are then those of the clean batch.
    """

    batch: Batch
    same_pictures: bool = False
    blank: Tensor | None = None
    edits: tuple[AttentionEdit, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Contrast(ABC):
    """Fuses the logits of contrast branches with the clean logits.

    Class attributes:
        steps_alike: Whether all steps are the same computation; False for a rule that counts or remembers them.
        counts: Whether it counts steps, so that a search cannot take it back to an earlier one.

    Attributes:
        branches: The N branches; none for a rule that needs the clean rows alone.
        rows: (B,) bool, rows on which the rule acts; the other rows keep their scores.
        exits: E early layers of the clean rows whose logits it takes as well.
        views: Places at which it takes the residual stream of the prompt's columns; see ``view``.
        margin: Lead of the best token over the second, in clean probability, from which on a step is left to the clean
            row, whose branches then need not run; None acts in every step.
    """

    branches: tuple[Branch, ...]
    rows: Tensor
    exits: tuple[Exit, ...] = ()
    views: tuple[Exit, ...] = ()
    margin: float | None = None
    steps_alike: ClassVar[bool] = True
    counts: ClassVar[bool] = False

    @abstractmethod
    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Fuses the logits of one step.

        Args:
            clean: (B, V) float32 raw logits of the clean rows.
            others: (N + E, B, V) float32 raw logits of the branches, then of the exits.
            scores: (B, V) the scores that earlier methods of a chain made of ``clean``; ``clean`` for the first.

        Returns:
            (B, V) new scores.
        """

    def view(self, states: Tensor) -> None:  # noqa: B027 (most rules look at no prompt)
        """Takes the residual stream of the prompts, before the first ``fuse``.

        Args:
            states: (views, B, T, hidden size) of the clean rows; T may be padded further on the left.
        """

    def acts(self, clean: Tensor) -> Tensor:
        """Tells in which rows the rule acts in a step, (B,) bool.

        Args:
            clean: (B, V) float32 raw logits of the clean rows.
        """
        if self.margin is None:
            return self.rows
        first, second = clean.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
        return self.rows & (first - second < self.margin)

    def begun(self) -> Self:
        """Returns the rule as it is before the first step; a block may run several calls, one after the other."""
        return self

    def keep(self, rows: Tensor) -> Self:
        """Returns the rule for some of the rows, or for repeated ones, (B',) int64; see ``Running.keep``."""
        return replace(self, rows=self.rows[rows])


def fused(contrasts: Sequence[Contrast], logits: Tensor, early: Tensor | None = None) -> Tensor:
    """Fuses the logits of one step: each contrast in turn changes the samples' scores.

    Args:
        contrasts: The rules, in order; each takes the logits of its own branches and exits.
        logits: (1 + N, B, V) float32 of the clean rows and of all branches.
        early: (E, B, V) float32 of all exits; None without any.

    Returns:
        (B, V) float32.
    """
    clean, scores, branch, place = logits[0], logits[0], 1, 0
    for contrast in contrasts:
        others = logits[branch : branch + len(contrast.branches)]
        branch += len(contrast.branches)
        if early is not None and contrast.exits:
            others = torch.cat([others, early[place : place + len(contrast.exits)]])
            place += len(contrast.exits)
        scores = torch.where(contrast.acts(clean)[:, None], contrast.fuse(clean, others, scores), scores)
    return scores


def viewed(contrasts: Sequence[Contrast], states: Tensor) -> None:
    """Hands each contrast the states at its own views, which stand one contrast's behind the other's."""
    place = 0
    for contrast in contrasts:
        if contrast.views:
            contrast.view(states[place : place + len(contrast.views)])
            place += len(contrast.views)


def without_picture(vlm: Checkpoint, batch: Batch) -> Branch:
    """Makes a branch that asks the same question without any picture."""
    earlier = batch.earlier and [[replace(turn, pictures=0) for turn in turns] for turns in batch.earlier]
    return Branch(vlm.encode(_prompts(batch), [()] * batch.rows, system=batch.system, earlier=earlier))


def without_question(vlm: Checkpoint, batch: Batch, *, prompt: str | None = "") -> Branch:
    """Makes a branch with the same pictures and ``prompt``, empty by default; None leaves no text in the user's turn.

    Inputs that were not made by ``vlm.encode`` lose the text between their last picture and the assistant's turn; text
    before a picture counts as template and stays.
    """
    if batch.prompts is None or batch.pictures is None:
        return _cut_after_pictures(vlm, batch, prompt)
    return _asked(vlm, batch, [prompt] * batch.rows, batch.system)


def with_instruction(vlm: Checkpoint, batch: Batch, instruction: str) -> Branch:
    """Makes a branch with the same pictures and question under another system message."""
    return _asked(vlm, batch, _prompts(batch), instruction)


def with_question(vlm: Checkpoint, batch: Batch, change: Callable[[str], str]) -> Branch:
    """Makes a branch with the same pictures and, in place of each question, what ``change`` makes of it."""
    return _asked(vlm, batch, [change(prompt or "") for prompt in _prompts(batch)], batch.system)


def with_blanks(batch: Batch, blank: Tensor) -> Branch:
    """Makes a branch with the same prompt and pictures, some of whose tokens are zeros.

    Args:
        batch: The clean rows.
        blank: (B, T) bool, those tokens.
    """
    return Branch(batch, same_pictures=True, blank=blank)


def with_edits(batch: Batch, *edits: AttentionEdit) -> Branch:
    """Makes a branch with the same prompt and pictures, and other attention.

    Args:
        batch: The clean rows.
        *edits: What changes attention in the branch's rows, in order.
    """
    return Branch(batch, same_pictures=True, edits=edits)


def with_pixels(vlm: Checkpoint, branch: Batch, change: Callable[[Tensor, Tensor], Tensor]) -> Branch:
    """Makes a branch with the same prompt and other pixels.

    Args:
        vlm: The model.
        branch: The prompt to keep.
        change: Given ``pixel_values`` and the row of the batch that each of its entries belongs to (int64, CPU),
            returns new pixel values of the same shape.
    """
    pixels = branch["pixel_values"]
    owners = vlm.family.pixel_rows(vlm.model, branch, picture_counts(vlm, branch))
    if pixels.dim() == 5:  # (n, tiles, channels, height, width), filled up with empty tiles that depend on the batch
        tiles = pixels.flatten(0, 1)
        real = (tiles != 0).flatten(1).any(dim=1)
        changed = change(tiles[real], owners.repeat_interleave(pixels.shape[1])[real.cpu()])
        # Some models tell empty tiles by their zeros: a real tile must not become one.
        changed = torch.where((changed == 0).all(), torch.finfo(pixels.dtype).tiny, changed)
        pixels = tiles.index_put((real,), changed).view_as(pixels)
    else:
        pixels = change(pixels, owners)
    return Branch(branch.with_inputs(pixel_values=pixels))


def picture_counts(vlm: Checkpoint, batch: Batch) -> list[int]:
    """Counts the pictures of each row."""
    if batch.pictures is not None:
        return [len(row) for row in batch.pictures]
    return [len(row) for row in vlm.family.patches(vlm.model, vlm.processor, batch)]


def _cut_after_pictures(vlm: Checkpoint, batch: Batch, prompt: str | None) -> Branch:
    """Replaces all tokens behind each row's last image token by those that the template puts there."""
    image = vlm.family.image_token(vlm.model.config)
    blank = Image.new("RGB", (64, 64))
    kept: list[dict[str, Tensor]] = []
    for row, count in enumerate(picture_counts(vlm, batch)):
        real = batch.attention_mask[row].bool()
        own = {name: batch[name][row][real] for name in TOKENS if name in batch}
        if count:
            template = vlm.encode([prompt], [[blank] * count])
            end, begin = (int((ids == image).nonzero()[-1]) + 1 for ids in (own["input_ids"], template["input_ids"][0]))
            own = {name: torch.cat([value[:end], template[name][0, begin:]]) for name, value in own.items()}
        kept.append(own)
    length = max(len(row["input_ids"]) for row in kept)
    fill = {"input_ids": vlm.processor.tokenizer.pad_token_id or 0}
    inputs = {
        name: torch.stack([pad(row[name], (length - len(row[name]), 0), value=fill.get(name, 0)) for row in kept])
        for name in kept[0]
    }
    return Branch(batch.with_inputs(**inputs), same_pictures=True)


def _asked(vlm: Checkpoint, batch: Batch, prompts: Sequence[str | None], system: str | None) -> Branch:
    if batch.pictures is None:
        raise DataError("the pictures of these inputs are unknown", _ENCODE)
    branch = vlm.encode(prompts, batch.pictures, system=system, earlier=batch.earlier)
    return Branch(branch, same_pictures=True)


_ENCODE = "make the inputs with vlm.encode(prompts, pictures), which remembers what they were made from"


def _prompts(batch: Batch) -> Sequence[str | None]:
    if batch.prompts is None:
        raise DataError("the questions of these inputs are unknown", _ENCODE)
    return batch.prompts
