"""Lists what the edits at work do to the attention of one layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from vlmfix.attention.edit import (
    UNWEIGHTED,
    BiasEdit,
    CacheEdit,
    ColumnReading,
    PartEdit,
    ProductBias,
    PromptCacheEdit,
    PromptReading,
    ResidualEdit,
    ScoreEdit,
    Site,
    SplitEdit,
    WeightEdit,
)
from vlmfix.attention.rows import Step


@dataclass(eq=False)
class LayerPlan:
    """Lists one layer's edits in order, and the prompt rows that any of them edits or reads.

    Attributes:
        layer: Layer number; None for all layers.
        rows: (R,) int64, positions of these prompt rows; those of an edit of all rows are not among them.
        prompt: T, number of prompt tokens, padding included.
        steps: The edits.
        hidden: Residual stream that enters the layer, between the layer's entry and its attention.
        sites: Those of the steps, between the layer's attention and its exit, when some edit acts in between.
        start: Prompt columns that are in the KV cache before the prompt's own pass; see ``session.continued``.
        past: Returns the residual stream that entered the layer at those columns, (B, start, hidden size), when an
            edit reads it.
        acted: Whether this plan has computed the layer's attention since this was last set to False.
        fused: Key of the compiled form of decoding steps, which has fewer and larger kernels; equal for edits of one
            kind. None runs the edits as they are written.
    """

    layer: int | None
    rows: Tensor
    prompt: int
    steps: tuple[Step, ...]
    hidden: Tensor | None = None
    sites: list[Site] | None = None
    start: int = 0
    past: Callable[[], Tensor] | None = None
    acted: bool = False
    fused: Hashable = None

    @property
    def materialises(self) -> bool:
        """Returns whether some edit needs the scores, the weights or parts of the output."""
        return any(isinstance(step.edit, ScoreEdit | WeightEdit | SplitEdit) for step in self.steps)

    @property
    def stores(self) -> bool:
        """Returns whether some edit changes what is kept in the KV cache."""
        return any(isinstance(step.edit, CacheEdit) for step in self.steps)

    @property
    def rewrites(self) -> bool:
        """Returns whether some edit changes what is kept of the prompt in the KV cache."""
        return any(isinstance(step.edit, PromptCacheEdit) for step in self.steps)

    @property
    def steers(self) -> bool:
        """Returns whether some edit changes the residual stream."""
        return any(isinstance(step.edit, ResidualEdit) for step in self.steps)

    @property
    def steers_mlp(self) -> bool:
        """Returns whether some edit changes what the layer's MLP adds to the residual stream."""
        return any(isinstance(step.edit, ResidualEdit) and step.edit.place == "mlp" for step in self.steps)

    @property
    def biases(self) -> bool:
        """Returns whether some edit adds to the scores."""
        return any(isinstance(step.edit, BiasEdit) for step in self.steps)

    @property
    def products(self) -> bool:
        """Returns whether the edits do nothing to a prompt's scores but add products of a row's and a key's number."""
        scored = [step.edit for step in self.steps if not isinstance(step.edit, UNWEIGHTED)]
        return bool(scored) and all(isinstance(edit, ProductBias) for edit in scored)

    @property
    def parts(self) -> bool:
        """Returns whether the edits leave a prompt's scores, read columns of weights, and then change parts of outputs.

        A few rows are computed anew in less time than SDPA takes for all.
        """
        scored = [step.edit for step in self.steps if not isinstance(step.edit, UNWEIGHTED)]
        kinds = [PartEdit if isinstance(edit, PartEdit) else ColumnReading for edit in scored]
        return (
            bool(scored)
            and all(edit.rows == "prompt" and isinstance(edit, ColumnReading | PartEdit) for edit in scored)
            and PartEdit not in kinds[:-1]
        )

    @property
    def reads(self) -> bool:
        """Returns whether some reading needs the prompt's weights."""
        return any(isinstance(step.edit, PromptReading) for step in self.steps)
