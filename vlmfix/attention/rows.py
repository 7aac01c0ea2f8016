"""Recomputes query rows of attention with edits.

When an edit concerns every row of a long prompt, prefill computes the rows in blocks: memory then grows with the keys
and not with their square. Edits that are not ``blockwise`` have all of their rows in the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vlmfix.attention.edit import (
    AttentionEdit,
    BiasEdit,
    CacheEdit,
    Column,
    Memory,
    OutputEdit,
    PromptReading,
    ScoreEdit,
    Site,
    SplitEdit,
    WeightEdit,
)

BLOCK = 1 << 25
"""Most attention weights in a block of rows: 128 MiB in float32, of which a few copies are held."""


@dataclass(eq=False)
class Step:
    """Applies one edit in one layer, to the rows and keys that the edit concerns.

    Attributes:
        edit: The edit.
        prompt_rows: (B, R) bool, edited rows among the plan's prompt rows; none for an edit of all rows.
        live: (B,) bool, rows of the batch that it edits; False for contrast rows.
        image_keys: (B, T + ``HEADROOM``) bool; generated keys are False.
        text_keys: (B, T + ``HEADROOM``) bool.
        answer_keys: (1, T + ``HEADROOM``) bool.
        memory: What the edit learned from the prompt in this layer; see ``Site.memory``.
        mixed: Whether some rows are not live, so that edited and plain rows must be told apart.
        live_rows: (N,) int64, which rows are live.
    """

    edit: AttentionEdit
    prompt_rows: Tensor
    live: Tensor
    image_keys: Tensor
    text_keys: Tensor
    answer_keys: Tensor
    memory: Memory = field(default_factory=Memory)
    mixed: bool = True
    live_rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.live_rows = self.live.nonzero().squeeze(1)

    def of_rows(self, pick: Callable[[Tensor], Tensor]) -> Step:
        """Returns the step for some rows of the batch; ``pick`` takes those out of a tensor of all rows."""
        return replace(
            self,
            memory=Memory(
                {name: pick(values) for name, values in self.memory.of_rows.items()},
                {name: pick(values) for name, values in self.memory.of_keys.items()},
                {name: pick(values) for name, values in self.memory.of_steps.items()},
            ),
            prompt_rows=pick(self.prompt_rows),
            live=pick(self.live),
            image_keys=pick(self.image_keys),
            text_keys=pick(self.text_keys),
        )


@dataclass(frozen=True, eq=False)
class Block:
    """Holds query rows that are computed together.

    Attributes:
        query: (B, H, R, D).
        key: (B, G, K, D).
        value: (B, G, K, D).
        allowed: (1 or B, 1, R, K) bool, keys that each row may see.
        scale: Factor on the scores.
        steps: The edits, in order.
        sites: One for each step.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Tensor
    scale: float
    steps: Sequence[Step]
    sites: Sequence[Site]

    def split(self) -> list[Block]:
        """Splits the rows into blocks of at most ``BLOCK`` weights, as far as the edits allow."""
        batch, heads, rows, _ = self.query.shape
        each = batch * heads * self.key.shape[2]
        if rows * each <= BLOCK:
            return [self]
        end, size = self._first_whole(rows), max(BLOCK // each, 1)
        parts = [slice(start, min(start + size, end)) for start in range(0, end, size)]
        return [self._part(part, number) for number, part in enumerate([*parts, *([slice(end, rows)] * (end < rows))])]

    def _first_whole(self, rows: int) -> int:
        """Returns the first row of an edit that needs its rows in one block; ``rows`` when there is none."""
        whole = [step for step in self.steps if not (step.edit.blockwise or isinstance(step.edit, OutputEdit))]
        if not whole:
            return rows
        wanted = torch.stack([step.prompt_rows.any(dim=0) for step in whole]).any(dim=0)  # (R of the prompt,)
        return int(wanted.nonzero()[0]) if bool(wanted.any()) else len(wanted)

    def _part(self, part: slice, number: int) -> Block:
        last = part.stop == self.query.shape[2]
        kept = [pair for pair in zip(self.steps, self.sites, strict=True) if last or pair[0].edit.blockwise]
        return replace(
            self,
            query=self.query[:, :, part],
            allowed=self.allowed[:, :, part],
            steps=[step for step, _ in kept],
            sites=[
                replace(
                    site,
                    queries=site.queries[:, part],
                    allowed=site.allowed[:, :, part],
                    acts=site.acts[:, part],
                    block=number,
                )
                for _, site in kept
            ],
        )

    def output(self, *, reads: bool) -> Tensor:
        """Computes the head outputs, (B, R, H, D).

        Args:
            reads: Whether readings are called.
        """
        if not any(isinstance(step.edit, ScoreEdit | WeightEdit | SplitEdit | PromptReading) for step in self.steps):
            return self._biased()
        return self.outputs(self.weights(reads=reads))

    def outputs(self, weights: Tensor) -> Tensor:
        """Computes the head outputs from their (B, H, R, K) weights, (B, R, H, D)."""
        output = self._summed(weights)  # (B, H, R, D)
        for step, site in zip(self.steps, self.sites, strict=True):
            if isinstance(step.edit, SplitEdit):
                own = step.edit.share(site, weights)
                whole, part = output.float(), self._summed(own).float()
                new = step.edit.output(site, whole, part, own.sum(dim=-1, keepdim=True)).to(output.dtype)
                output = chosen(step, site, site.acts[:, None, :, None], new, output)
        return output.transpose(1, 2)  # (B, R, H, D)

    def _summed(self, weights: Tensor) -> Tensor:
        """Sums the values with (B, H, R, K) weights, (B, H, R, D)."""
        rows, heads, length, _ = weights.shape
        grouped = weights.to(self.value.dtype).view(
            rows, self.value.shape[1], -1, weights.shape[-1]
        )  # (B, G, H/G*R, K)
        return (grouped @ self.value).view(rows, heads, length, -1)

    def _biased(self) -> Tensor:
        bias, dtype = total_bias(self.steps, self.sites), self.query.dtype
        floor = torch.finfo(dtype).min  # not -inf: a padding row sees nothing, and its softmax must stay finite
        repeat = self.query.shape[1] // self.key.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            self.query,
            self.key.repeat_interleave(repeat, dim=1),
            self.value.repeat_interleave(repeat, dim=1),
            attn_mask=torch.where(self.allowed, 0.0 if bias is None else bias, floor).to(dtype),
            scale=self.scale,
        )
        return output.transpose(1, 2)  # (B, R, H, D)

    def weights(self, *, until: int | None = None, reads: bool) -> Tensor:
        """Computes the edited attention weights, (B, H, R, K) float32.

        Args:
            until: Apply weight edits and readings of the first ``until`` steps only (None: all). Score edits and
                biases always apply.
            reads: Whether readings are called.
        """
        rows, heads, length, width = self.query.shape
        grouped = self.query.reshape(rows, self.key.shape[1], -1, width)  # (B, G, H/G*R, D)
        scores = (grouped @ self.key.transpose(2, 3)).float() * self.scale
        scores = scores.view(rows, heads, length, -1)  # (B, H, R, K)
        pairs = list(zip(self.steps, self.sites, strict=True))
        for step, site in pairs:
            acts = site.acts[:, None, :, None]
            if isinstance(step.edit, ScoreEdit):
                scores = chosen(step, site, acts, step.edit.scores(site, scores), scores)
            elif isinstance(step.edit, BiasEdit):
                scores = scores + chosen(step, site, acts, step.edit.bias(site).float(), 0.0)
        weights = scores.masked_fill(~self.allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
        for step, site in pairs[:until]:
            if isinstance(step.edit, PromptReading) and reads:
                step.edit.read(site, weights)
            elif isinstance(step.edit, WeightEdit):
                new = step.edit.weights(site, weights).masked_fill(~self.allowed, 0.0)
                weights = chosen(step, site, site.acts[:, None, :, None], new, weights)
        return weights


def kept(steps: Sequence[Step], sites: Sequence[Site], weights: Tensor, newest: Column, before: Column) -> Column:
    """Lets each cache edit in turn change what is kept of the newest token; see ``CacheEdit.kept``."""
    for step, site in zip(steps, sites, strict=True):
        if isinstance(step.edit, CacheEdit):
            new, acts = step.edit.kept(site, weights, newest, before), site.acts[:, None, :, None]
            newest = Column(
                chosen(step, site, acts, new.keys.to(newest.keys.dtype), newest.keys),
                chosen(step, site, acts, new.values.to(newest.values.dtype), newest.values),
            )
    return newest


def read(steps: Sequence[Step], blocks: Sequence[Block]) -> None:
    """Calls the readings: each reads all blocks before the next edit starts."""
    if len(blocks) == 1:
        blocks[0].weights(reads=True)
        return
    for step in steps:
        for block in blocks:
            if isinstance(step.edit, PromptReading) and step in block.steps:
                place = block.steps.index(step)
                step.edit.read(block.sites[place], block.weights(until=place, reads=False))


def total_bias(steps: Sequence[Step], sites: Sequence[Site]) -> Tensor | None:
    """Sums all biases, broadcastable to (B, H, R, K); returns None without any."""
    total: Tensor | None = None
    for step, site in zip(steps, sites, strict=True):
        if isinstance(step.edit, BiasEdit):
            bias = chosen(step, site, site.acts[:, None, :, None], step.edit.bias(site).float(), 0.0)
            total = bias if total is None else total + bias
    return total


def chosen(step: Step, site: Site, acts: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """Returns ``new`` where the edit acts, else ``old``; in decoding without contrast rows it acts everywhere."""
    return torch.where(acts, new, old) if step.mixed or site.prefill else new
