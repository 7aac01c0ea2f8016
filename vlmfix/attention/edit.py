"""Declares the seven kinds of edit, readings of the prompt, and the site at which they are applied.

Shape letters (``docs/notation.md``): B rows, H query heads, G key/value heads, Q queries, K keys, D head dimension,
L layers, T prompt tokens, R edited query rows.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.errors import UnsupportedAttentionError, UsageError


@dataclass(frozen=True, eq=False)
class Memory:
    """Holds what an edit learned from the prompt in one layer, under names that the edit chose.

    Attributes:
        of_rows: (B, ...) tensors.
        of_keys: (B, ..., T) tensors; keys behind the prompt have zero.
        of_steps: (B, ...) tensors that every decoding step writes into, and that follow their beams.
    """

    of_rows: dict[str, Tensor] = field(default_factory=dict)
    of_keys: dict[str, Tensor] = field(default_factory=dict)
    of_steps: dict[str, Tensor] = field(default_factory=dict)


Rows = Literal["text", "last", "prompt", "all", "none"]
"""Names the prompt's query rows that an edit touches: ``text``, the text after a picture; ``last``, the row that
predicts; ``prompt``, every token's row, which the kernel recomputes (make such an edit ``blockwise``, or all attention
weights are in memory at once); ``all``, every row with nothing recomputed, for output and residual edits; ``none``, for
an edit that acts on generated tokens alone."""


LAYERS = re.compile(r"-?[0-9]{1,9}|(-?[0-9]{1,9})?:(-?[0-9]{1,9})?")
"""A layer, or a slice of them."""


@dataclass(frozen=True)
class LayerSet:
    """Selects decoder layers by Python slices: ``all``, ``2:-1``, ``9:15``, ``5``, or several joined by ``/``.

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
        """Returns the selected layer numbers of a model with ``count`` layers; numbers that it lacks are left out."""
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
    """Tells an edit where and when it acts: in one layer of one forward pass.

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
        answer_keys: (1, K) bool, keys behind the prompt: generated tokens, and the free room of a static cache.
        acts: (B, R) bool, rows that the edit changes; its result is discarded in the other rows.
        live: (N,) int64, rows of the batch that are no contrast rows; beams of one sample stand side by side.
        block: In prefill, number, from 0, of the block that these R rows form; see ``AttentionEdit.blockwise``.
        hidden: (B, Q, hidden size) residual stream that enters the layer, when the edit asked for it.
        entered: (B, Q, hidden size), what the layer's MLP made its output of, for a residual edit of that output.
        memory: What the edit learned from the prompt in this layer: ``learn``, ``learn_of_keys`` and
            ``learn_of_steps`` write it in prefill, ``learned`` reads it in prefill and decoding, ``relearn`` changes it
            in decoding. Rows that have ended are removed from it.
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
    entered: Tensor | None = None
    memory: Memory = field(default_factory=Memory)

    @property
    def layer(self) -> int:
        """Returns the layer number, from 0; a compiled decoding step, which all layers share, has none."""
        if self.number is None:
            raise RuntimeError("a compiled decoding step that depends on the layer's number; learn it from the prompt")
        return self.number

    @property
    def prompt(self) -> int:
        """Returns T, the number of prompt tokens, padding included; only prefill knows it.

        A decoding step serves prompts of several lengths; it has ``answer_keys`` and what was learned from the prompt.
        """
        if not self.prefill:
            raise RuntimeError("a decoding step that depends on the prompt's length; use answer_keys, or learn it")
        return self.tokens

    @property
    def predicting(self) -> int:
        """Returns the index of the prompt's last row among the R edited rows; rows of generated tokens follow it.

        It is meaningful in prefill alone, and not for a ``blockwise`` edit.
        """
        return self.queries.shape[1] - 1 - (self.allowed.shape[-1] - self.prompt)

    def learn(self, name: str, values: Tensor) -> None:
        """Keeps (B, ...) values until the call ends."""
        self.memory.of_rows[name] = values

    def learn_of_keys(self, name: str, values: Tensor) -> None:
        """Keeps (B, ..., T) values of the prompt's tokens until the call ends; later tokens have zero."""
        self.memory.of_keys[name] = values

    def learn_of_steps(self, name: str, values: Tensor) -> None:
        """Keeps (B, ...) values that decoding steps change by ``relearn``; each beam has its own."""
        self.memory.of_steps[name] = values.clone()

    def relearn(self, name: str, values: Tensor) -> None:
        """Writes values, in decoding, over those that are kept.

        Args:
            name: As it was given to ``learn_of_steps`` or ``learn_of_keys``.
            values: (B, ...) of steps; (B, ..., K) of keys, of which those behind the prompt are dropped.
        """
        # in place: a recorded step has no other way to tell anything
        if name in self.memory.of_steps:
            self.memory.of_steps[name].copy_(values)
            return
        kept = self.memory.of_keys[name]
        kept.copy_(values[..., : kept.shape[-1]])

    def learned(self, name: str) -> Tensor:
        """Returns values that the edit learned from the prompt: (B, ...) of rows and steps, (B, ..., K) of keys.

        Raises:
            UnsupportedAttentionError: No prompt has passed.
        """
        if name in self.memory.of_rows:
            return self.memory.of_rows[name]
        if name in self.memory.of_steps:
            return self.memory.of_steps[name]
        if name not in self.memory.of_keys:
            raise UnsupportedAttentionError("a token came before its prompt", "let generate read the prompt itself")
        values = self.memory.of_keys[name]
        later = self.image_keys.shape[1] - values.shape[-1]
        return pad(values, (0, later)) if later else values

    def spread(self, values: Tensor) -> Tensor:
        """Copies each sample's values to the sample's rows of the pass, which are its beams.

        Args:
            values: (samples, ...).

        Returns:
            (B, ...); zeros for contrast rows.
        """
        each = values.repeat_interleave(self.live.shape[0] // values.shape[0], dim=0)  # (N, ...)
        return each.new_zeros(self.image_keys.shape[0], *values.shape[1:]).index_copy(0, self.live, each)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionEdit:
    """Changes attention in one way, by returning a new tensor; an edit never writes into its argument.

    ``torch.compile`` traces edits: no ``.item()``, no branching on a tensor's values.

    Args:
        layers: Layers it acts in.

    Class attributes:
        rows: Rows of the prompt that it acts on; it acts on all rows of generated tokens.
        blockwise: Whether the prompt's rows may come in several blocks, one after the other, so that memory grows with
            the keys and not with their square. A blockwise edit may use only the row it edits, and what an earlier
            ``PromptReading`` learned: every reading finishes all blocks before the next edit starts.
        needs_hidden: Whether it reads the residual stream.
        of_prompt: Names of its fields that are read in prefill, and not in decoding.
        together: Whether a prompt's last row depends on what it does to the other rows of the same pass, so that this
            row cannot pass again alone.

    Attributes:
        memory: Layer number -> ``Site.memory``, as prefill left it.
    """

    layers: LayerSet = field(default_factory=LayerSet)
    memory: dict[int, Memory] = field(default_factory=dict, init=False, repr=False)
    rows: ClassVar[Rows] = "text"
    blockwise: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    of_prompt: ClassVar[frozenset[str]] = frozenset()
    together: ClassVar[bool] = False


class BiasEdit(AttentionEdit, ABC):
    """Adds a bias to the scaled scores before the softmax; stays on SDPA."""

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
        """Returns the products, (B, 1 or H, R, K)."""
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
        """Returns (B, H, R, K) weights, changed by one factor for the keys apart and one for the others."""
        apart = self.keys(site)
        own, rest = (weights @ keys[..., None].to(weights.dtype) for keys in (apart, ~apart))  # (B, H, R, 1)
        factor, others = self.factors(own, rest)
        return weights * torch.where(apart[:, :, None], factor, others)


class SplitEdit(AttentionEdit, ABC):
    """Rewrites head outputs from the part that some keys have in them; materialises the edited rows.

    It acts on what weight edits have made of the weights, those behind it in the order included.
    """

    @abstractmethod
    def keys(self, site: Site) -> Tensor:
        """Returns (B, K) bool, the keys whose part is wanted."""

    def share(self, site: Site, weights: Tensor) -> Tensor:
        """Returns what of ``weights`` (B, H, R, K) float32 has that part: all that these keys get, or less of it."""
        return weights * self.keys(site)[:, None, None, : weights.shape[-1]]

    @abstractmethod
    def output(self, site: Site, whole: Tensor, part: Tensor, mass: Tensor) -> Tensor:
        """Returns new outputs.

        Args:
            site: Where it acts.
            whole: (B, H, R, D) float32 outputs.
            part: (B, H, R, D) float32, what the keys have in them.
            mass: (B, H, R, 1) float32, attention to the keys.
        """


class OutputEdit(AttentionEdit, ABC):
    """Rewrites the head outputs before the output projection; stays on SDPA."""

    @abstractmethod
    def output(self, site: Site, output: Tensor) -> Tensor:
        """Returns new outputs for ``output`` (B, R, H, D); R is Q for an edit of ``all`` rows."""


class Column(NamedTuple):
    """Holds what one layer's KV cache has of one token, or of some tokens one after the other.

    Attributes:
        keys: (B, G, 1, D), after rotary embedding.
        values: (B, G, 1, D).
    """

    keys: Tensor
    values: Tensor


class CacheEdit(AttentionEdit, ABC):
    """Changes what is kept of a generated token in the KV cache.

    The token's own row sees its key and value as the model made them; every later row sees what is kept. Prompts are
    kept as they are, so that rows can share their beginnings, and so are the contrast rows. An edit that depends on
    earlier steps begins its memory by ``learn_of_steps`` and changes it by ``relearn``.
    """

    rows: ClassVar[Rows] = "none"

    @abstractmethod
    def begin(self, site: Site) -> None:
        """Learns, at the end of prefill, what the first decoding step has to know."""

    @abstractmethod
    def kept(self, site: Site, weights: Tensor, newest: Column, before: Column) -> Column:
        """Returns what is kept of the newest token.

        Args:
            site: Where it acts, in decoding.
            weights: (B, H, 1, K) float32 attention of the token's row, as weight edits have made it.
            newest: What the model made of the token, or what an earlier cache edit kept of it.
            before: What the cache has of the token before it.
        """


class PromptCacheEdit(AttentionEdit, ABC):
    """Changes, once, what is kept of the prompt in the KV cache.

    The prompt's own rows see keys and values as the model made them, and generated tokens see what is kept. Contrast
    rows keep theirs; decoding steps skip the edit.

    Attributes:
        predicts: Whether the prompt's last row, which predicts the first token, sees what is kept, too.
    """

    predicts: bool
    rows: ClassVar[Rows] = "none"

    @abstractmethod
    def kept(self, site: Site, columns: Column) -> Column:
        """Returns what is kept of the prompt's columns, (B, G, T, D) each, in any precision.

        Args:
            site: Where it acts, in prefill.
            columns: What the model made of the prompt's tokens, or what an earlier such edit kept of them.
        """


class ResidualEdit(AttentionEdit, ABC):
    """Rewrites the residual stream that leaves a layer, or what the layer's MLP adds to it; stays on SDPA.

    Attributes:
        place: ``layer`` for the stream, ``mlp`` for the MLP's output.
    """

    place: Literal["layer", "mlp"]
    rows: ClassVar[Rows] = "all"

    @abstractmethod
    def stream(self, site: Site, stream: Tensor) -> Tensor:
        """Returns the new values of ``stream`` (B, Q, hidden size), in any precision."""


UNWEIGHTED = (OutputEdit, CacheEdit, PromptCacheEdit, ResidualEdit)
"""Kinds of edit that leave scores and weights as they are."""


class PromptReading(AttentionEdit, ABC):
    """Reads the attention weights of the prompt's rows and changes nothing; decoding steps skip it.

    It reads the weights that the weight edits before it in the order have made.
    """

    @abstractmethod
    def read(self, site: Site, weights: Tensor) -> None:
        """Reads ``weights`` (B, H, R, K) float32; must not write into them.

        The kernel calls a ``blockwise`` reading once for each block; the reading begins anew with block 0.
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
