"""The four kinds of attention edit, a reading of the prompt, and where they are applied.

Shape letters (``docs/notation.md``): B rows, H query heads, Q queries, K keys, D head dimension, L layers, T prompt
tokens, R edited query rows.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.errors import UnsupportedAttentionError, UsageError


@dataclass(frozen=True, eq=False)
class Memory:
    """What an edit has learned in one layer from the prompt, by names of its own.

    Attributes:
        of_rows: (B, ...) tensors.
        of_keys: (B, ..., T) tensors; zero at the keys behind the prompt.
    """

    of_rows: dict[str, Tensor] = field(default_factory=dict)
    of_keys: dict[str, Tensor] = field(default_factory=dict)


Rows = Literal["text", "last", "prompt", "all", "none"]
"""Query rows of the prompt that an edit touches: the text after a picture; only the row that predicts; every token's
row, which the kernel recomputes (give such an edit ``blockwise``, or all of attention stands in memory at once);
every row without picking it out, which is for output edits, for which nothing is recomputed; or none, for an edit of
what passes behind the prompt."""


LAYERS = re.compile(r"-?[0-9]{1,9}|(-?[0-9]{1,9})?:(-?[0-9]{1,9})?")
"""A layer, or a slice of them."""


@dataclass(frozen=True)
class LayerSet:
    """Decoder layers, written like Python slices: ``all``, ``2:-1``, ``9:15``, ``5``, or several joined by ``/``.

    Args:
        spec: The layers; they count from 0, negative numbers count from the end, the end of a slice is excluded.

    Raises:
        UsageError: ``spec`` is not of that form.
    """

    spec: str = "all"

    def __post_init__(self) -> None:
        if self.spec != "all":
            for part in self.spec.split("/"):
                if not LAYERS.fullmatch(part):
                    raise UsageError(f"layers {self.spec!r} are not understood", "write all, 2:-1, 9:15, 5 or 2:5/8/-1")

    def __str__(self) -> str:
        return self.spec

    def resolve(self, count: int) -> frozenset[int]:
        """Layer numbers of a model with ``count`` layers; those that it lacks are left out."""
        every = range(count)
        if self.spec == "all":
            return frozenset(every)
        chosen: set[int] = set()
        for part in self.spec.split("/"):
            if ":" in part:
                start, stop = (int(x) if x else None for x in part.split(":"))
                chosen.update(every[start:stop])
            else:
                number = int(part)
                chosen.update({number % count} if -count <= number < count else set())
        return frozenset(chosen)


@dataclass(frozen=True, eq=False)
class Site:
    """Where and when an edit is applied: one layer of one forward pass.

    Attributes:
        number: Layer number, from 0; None in a compiled step, which all layers share.
        heads: H, number of query heads.
        tokens: T, number of prompt tokens, padding included.
        prefill: True when the prompt itself passes through, False for one new token.
        queries: (1 or B, R) int64, position of each edited query row among the keys.
        allowed: (1 or B, 1, R, K) bool, keys that each query row may see; for an edit of ``all`` rows in prefill only
            what the pass's last row may see, (1 or B, 1, 1, K).
        image_keys: (B, K) bool, image patches.
        text_keys: (B, K) bool, prompt text: no image, no padding, no generated token.
        answer_keys: (1, K) bool, keys behind the prompt: generated tokens, and what a static cache has room for.
        acts: (B, R) bool, rows that the edit changes; elsewhere its result is thrown away.
        live: (N,) int64, rows of the batch that are no contrast rows; beams of one sample stand side by side.
        block: In prefill, number of the block of query rows that these R are, from 0; see ``AttentionEdit.blockwise``.
        hidden: (B, Q, hidden size) residual stream that enters the layer, when the edit asked for it.
        memory: What the edit has learned in this layer from the prompt; written by ``learn`` and ``learn_of_keys`` in
            prefill, read by ``learned`` in both. Rows that have ended are taken out of it.
    """

    number: int | None
    heads: int
    tokens: int
    prefill: bool
    queries: Tensor
    allowed: Tensor
    image_keys: Tensor
    text_keys: Tensor
    answer_keys: Tensor
    acts: Tensor
    live: Tensor
    block: int = 0
    hidden: Tensor | None = None
    memory: Memory = field(default_factory=Memory)

    @property
    def layer(self) -> int:
        """Layer number, from 0; known in prefill, and in decoding where each layer's code is its own."""
        if self.number is None:
            raise RuntimeError("a compiled decoding step that depends on the layer's number; learn it from the prompt")
        return self.number

    @property
    def prompt(self) -> int:
        """T, number of prompt tokens, padding included; known in prefill alone.

        A decoding step serves prompts of several lengths: it has ``answer_keys`` and what was learned from the prompt.
        """
        if not self.prefill:
            raise RuntimeError("a decoding step that depends on the prompt's length; use answer_keys, or learn it")
        return self.tokens

    @property
    def predicting(self) -> int:
        """The index of the prompt's last row among the R edited rows, of which generated tokens come after it.

        It means something in prefill alone, and not to a ``blockwise`` edit.
        """
        return self.queries.shape[1] - 1 - (self.allowed.shape[-1] - self.prompt)

    def learn(self, name: str, values: Tensor) -> None:
        """Keeps (B, ...) values until the call ends."""
        self.memory.of_rows[name] = values

    def learn_of_keys(self, name: str, values: Tensor) -> None:
        """Keeps (B, ..., T) values of the prompt's tokens until the call ends; later tokens have zero."""
        self.memory.of_keys[name] = values

    def learned(self, name: str) -> Tensor:
        """Gives what the edit has learned from the prompt: (B, ...) of rows, (B, ..., K) of keys.

        Raises:
            UnsupportedAttentionError: The prompt did not pass before.
        """
        if name in self.memory.of_rows:
            return self.memory.of_rows[name]
        if name not in self.memory.of_keys:
            raise UnsupportedAttentionError("a token came before its prompt", "let generate read the prompt itself")
        values = self.memory.of_keys[name]
        later = self.image_keys.shape[1] - values.shape[-1]
        return pad(values, (0, later)) if later else values

    def spread(self, values: Tensor) -> Tensor:
        """Hands what is known of the samples out to the rows of the pass: every beam gets its sample's.

        Args:
            values: (samples, ...).

        Returns:
            (B, ...); zeros for contrast rows.
        """
        each = values.repeat_interleave(self.live.shape[0] // values.shape[0], dim=0)  # (N, ...)
        return each.new_zeros(self.image_keys.shape[0], *values.shape[1:]).index_copy(0, self.live, each)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionEdit:
    """One change to attention. An edit returns a new tensor and never writes into its argument.

    It is traced by ``torch.compile``: no ``.item()``, no branching on a tensor's values.

    Args:
        layers: Layers it acts in.

    Class attributes:
        rows: Rows of the prompt that it acts on; it acts on all rows of generated tokens.
        blockwise: Whether the prompt's rows may come in several blocks, one after the other, so that memory grows with
            the keys and not with their square. Such an edit may use only the row that it edits, and what a reading
            before it has learned: a reading sees all blocks before the next edit sees the first.
        needs_hidden: Whether it reads the residual stream.
        of_prompt: Names of its fields that are read while the prompt passes, and not in decoding.

    Attributes:
        memory: Layer number -> ``Site.memory``, as it was when the prompt had passed.
    """

    layers: LayerSet = field(default_factory=LayerSet)
    memory: dict[int, Memory] = field(default_factory=dict, init=False, repr=False)
    rows: ClassVar[Rows] = "text"
    blockwise: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    of_prompt: ClassVar[frozenset[str]] = frozenset()


class BiasEdit(AttentionEdit, ABC):
    """Adds to the scaled scores before the softmax; stays on SDPA."""

    @abstractmethod
    def bias(self, site: Site) -> Tensor:
        """Returns a float tensor broadcastable to (B, H, R, K)."""


class ProductBias(BiasEdit):
    """Adds a number of the row times a number of the key: in prefill, one more dimension of queries and keys.

    No row is recomputed then, however many it concerns. In prefill ``site.allowed`` is what the pass's last row may
    see, (1 or B, 1, 1, K).
    """

    @abstractmethod
    def factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Returns (B, 1 or H, R) and (B, K) float tensors; a key's -inf hides it from every row that is not 0."""

    def bias(self, site: Site) -> Tensor:
        """(B, 1 or H, R, K)."""
        rows, keys = (factor[..., None] for factor in self.factors(site))
        return torch.where(rows != 0, rows * keys.mT[:, None], 0.0)


class ScoreEdit(AttentionEdit, ABC):
    """Rewrites the scaled, unmasked scores; materialises the edited rows."""

    @abstractmethod
    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Returns new scores for ``scores`` (B, H, R, K) float32."""


class WeightEdit(AttentionEdit, ABC):
    """Rewrites the attention weights after the softmax; materialises the edited rows."""

    @abstractmethod
    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns new weights for ``weights`` (B, H, R, K) float32."""


class PartEdit(WeightEdit):
    """Multiplies the weights of some keys by one number and those of all others by another.

    Both depend on how much attention the row gives to either, so no row need be materialised in prefill. There
    ``site.allowed`` is then what the pass's last row may see, (1 or B, 1, 1, K).
    """

    @abstractmethod
    def keys(self, site: Site) -> Tensor:
        """Returns (B, H, K) bool, the keys that are apart."""

    @abstractmethod
    def factors(self, own: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factor of the keys that are apart, and that of the others.

        Args:
            own: Attention of each row to the keys that are apart; what is returned has its shape.
            rest: The same for the others.
        """

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """(B, H, R, K)."""
        apart = self.keys(site)
        own, rest = (weights @ keys[..., None].to(weights.dtype) for keys in (apart, ~apart))  # (B, H, R, 1)
        factor, others = self.factors(own, rest)
        return weights * torch.where(apart[:, :, None], factor, others)


class OutputEdit(AttentionEdit, ABC):
    """Rewrites the head outputs before the output projection; stays on SDPA."""

    @abstractmethod
    def output(self, site: Site, output: Tensor) -> Tensor:
        """Returns new outputs for ``output`` (B, R, H, D); R is Q for an edit of ``all`` rows."""


class PromptReading(AttentionEdit, ABC):
    """Reads the attention weights of the prompt's rows and changes nothing; decoding does not see it.

    It reads at its place among the edits: what weight edits before it have made.
    """

    @abstractmethod
    def read(self, site: Site, weights: Tensor) -> None:
        """Looks at ``weights`` (B, H, R, K) float32; must not write into them.

        A ``blockwise`` reading is called once for each block, and begins anew with block 0.
        """


class ColumnReading(PromptReading):
    """Reads how much attention each key of the prompt gets from all of its rows that count.

    No row need be materialised for it; ``site.allowed`` may be what the pass's last row may see, (1 or B, 1, 1, K).
    """

    @abstractmethod
    def counts(self, site: Site) -> Tensor:
        """Returns (B, R) bool, the rows that are summed over."""

    @abstractmethod
    def add(self, site: Site, sums: Tensor, numbers: Tensor) -> None:
        """Takes (B, H, K) sums over the rows of a block, or over all, and (B, K) how many of them may see each key."""

    def read(self, site: Site, weights: Tensor) -> None:
        """Adds the rows of a block."""
        counted = self.counts(site)  # (B, R)
        sums = (counted[:, None, None].to(weights.dtype) @ weights).squeeze(2)
        self.add(site, sums, (site.allowed[:, 0] & counted[:, :, None]).sum(dim=1))
