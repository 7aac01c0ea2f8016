"""Keeps the newest decoding step with its autograd graph, to compute a possible next token's saliency over the keys.

Prefill runs without gradients; the prompt's last token is then dropped from the KV cache and passes once more, as
every later token does: alone, behind keys and values that are constants. The graph of such a step begins with the
attention of the first layer that is asked about; earlier layers have none. It lives until the next step. On a GPU the
step and the backward pass through it are recorded (``decoding/graphs.py``).

Shape letters (``docs/notation.md``): L lines, R rows of the pass, branches included, H query heads, K keys, V
vocabulary; here also N layers that are asked about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, Site, WeightEdit
from vlmfix.attention.saliency import SCALE, row_saliency, token_loss
from vlmfix.attention.windows import check_windows
from vlmfix.errors import DataError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch


@dataclass(frozen=True, eq=False, kw_only=True)
class Recorder(WeightEdit):
    """Keeps the attention weights of a step as nodes of its graph, which begins there; it changes no weight.

    Attributes:
        first: Number of the first of its layers.
        seen: Layer number -> (R, H, 1, K) float32 of the newest step; written, and never read by a step.
    """

    first: int
    seen: dict[int, Tensor] = field(default_factory=dict)
    rows: ClassVar[Rows] = "none"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"seen"})

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the same weights as a node of the graph."""
        if site.layer == self.first:
            torch.set_grad_enabled(True)  # whoever takes the step puts it back
        node = weights if weights.requires_grad else weights.detach().requires_grad_()
        self.seen[site.layer] = node
        return node


class Newest:
    """Keeps the newest step of a call, and computes the saliency of tokens that could follow it.

    Args:
        vlm: The model.
        layers: The layers that are asked about.

    Attributes:
        recorder: The edit that keeps these layers' attention; it must come last.
    """

    def __init__(self, vlm: Checkpoint, layers: LayerSet) -> None:
        self.recorder = Recorder(layers=layers, first=min(layers.resolve(vlm.layers), default=0))
        self._scores: Tensor | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keeps the graph of the step that runs inside the block, in place of the previous step's."""
        self.forget()
        with torch.no_grad():
            yield

    def scored(self, scores: Tensor) -> Tensor:
        """Keeps the (L, V) float32 scores of the step with their graph, and returns a copy without it."""
        self._scores = scores
        return scores.detach().clone()

    def forget(self) -> None:
        """Frees the graph."""
        self._scores = None
        self.recorder.seen.clear()

    @property
    def keys(self) -> int:
        """Returns K."""
        return int(next(iter(self.recorder.seen.values())).shape[-1])

    def gradients(self, tokens: Tensor, wanted: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Differentiates the loss of one token per line, in one backward pass for all lines.

        Args:
            tokens: (L,) int64.
            wanted: (L,) bool, lines to compute; elsewhere gradients are zero.

        Returns:
            For each of the N layers, in order, the weights (L, H, K) of the row that predicts, and the gradient of
            ``-log softmax(scores)[token]`` with respect to them, a free variable. Both float32.
        """
        if self._scores is None:
            raise RuntimeError("no step was taken")
        seen = [self.recorder.seen[layer] for layer in sorted(self.recorder.seen)]
        with torch.enable_grad():
            losses = token_loss(self._scores, tokens)
            loss = SCALE * (losses if wanted is None else losses[wanted]).sum()
        found = torch.autograd.grad(loss, seen, retain_graph=True)
        lines = len(tokens)  # rows of branches come after these
        return [
            (weights[:lines, :, 0].detach(), gradient[:lines, :, 0] / SCALE)
            for weights, gradient in zip(seen, found, strict=True)
        ]

    def saliency(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Computes the saliency of each line's token over the keys.

        Args:
            tokens: (L,) int64, the judged token of each line.
            wanted: (L,) bool, lines to compute; elsewhere the result is zero.

        Returns:
            (N, L, K) ``Sbar`` of the layers, in order.
        """
        return torch.stack([row_saliency(*pair).to(tokens.device) for pair in self.gradients(tokens, wanted)])


def check_prompts(vlm: Checkpoint, batch: Batch, length: int) -> None:
    """Refuses prompts whose last token cannot pass alone.

    Args:
        vlm: The model.
        batch: The samples.
        length: Tokens of the longest prompt, branches and padding included.

    Raises:
        DataError: A prompt ends with a picture, or fills a sliding window, which cannot give back its last token.
    """
    if bool((batch["input_ids"][:, -1] == vlm.family.image_token(vlm.model.config)).any()):
        raise DataError(
            "a prompt ends with a picture, and saliency begins at its last token, which must be text",
            "put the question, or the assistant's turn, behind the picture",
        )
    check_windows(vlm, range(vlm.layers), length)
