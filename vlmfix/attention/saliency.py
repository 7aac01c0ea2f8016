"""Saliency: attention times gradient, for the one row of attention that chose a token.

For a token c that row r predicts, with attention A of one layer and loss ``-log softmax(logits of r)[c]``::

    S[j] = mean over heads of |A[h, r, j] * d loss / d A[h, r, j]|        Sbar = S / ||S||_2

A counts as a free variable (no gradient of the softmax), and a causal model leaves every row behind r without gradient.

Row r is the newest query of a cached step, so the keys and values before it are constants and one backward pass through
one row gives exactly what the full T x T computation gives, in memory that is linear in T. The prompt is read without
gradients; its last token is then taken back from the cache and passes once more, with them.

Shape letters (``docs/notation.md``): B rows, H query heads, K keys, V vocabulary; here also N recorded layers and R
rows of the pass, branches included.

Source: "Hallucination Begins Where Saliency Drops", ICLR 2026, arXiv 2601.20279, sec. 2, eq. 1-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from vlmfix.attention.edit import LayerSet, Rows, Site, WeightEdit
from vlmfix.attention.session import edited
from vlmfix.attention.windows import check_windows
from vlmfix.errors import DataError, IncompatibleDecodersError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import ImageLayout
from vlmfix.upstream import cache, steps

SCALE = 1024.0
"""The loss is multiplied by it and the gradients are divided by it, so that float16 does not lose small ones."""


def scoring_layers(count: int) -> LayerSet:
    """Layers 6 to 8, those of the authors' script for 32 layers; of fewer than nine, the same share of the depth.

    The paper itself says "middle-to-deep"; for shallow models it says nothing.
    """
    return LayerSet("6:9") if count >= 9 else LayerSet(f"{6 * count // 32}:{-(-9 * count // 32)}")


def row_saliency(weights: Tensor, gradient: Tensor) -> Tensor:
    """Merges heads and normalises one row of attention.

    Args:
        weights: (B, H, K) attention of the row.
        gradient: (B, H, K) gradient of the token's loss with respect to it.

    Returns:
        (B, K) of norm 1 in the last dimension, or all zero; float32, or float64 for float64 arguments.
    """
    exact = torch.promote_types(weights.dtype, torch.float32)
    merged = (weights.to(exact) * gradient.to(exact)).abs().mean(dim=1)  # (B, K)
    norm: Tensor = torch.linalg.vector_norm(merged, dim=-1, keepdim=True)
    return merged / norm.clamp(min=torch.finfo(exact).tiny)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """``-log softmax(logits)[token]``, written so that a token of probability almost 1 keeps its gradient.

    That gradient is ``p - 1`` for the token's own logit, which rounds to nothing in float32, while the normalised
    saliency depends on its direction alone.

    Args:
        logits: (B, V) float32.
        tokens: (B,) int64.

    Returns:
        (B,) losses.
    """
    own = logits.gather(1, tokens[:, None])[:, 0]  # (B,)
    others = logits.scatter(1, tokens[:, None], float("-inf")).logsumexp(dim=1)
    return torch.nn.functional.softplus(others - own)


def mean_over(saliency: Tensor, keys: Tensor) -> Tensor:
    """A token's score: the mean over layers and over some keys.

    Args:
        saliency: (N, B, K).
        keys: (B, K) bool.

    Returns:
        (B,) in [0, 1 / sqrt(number of keys)]; NaN where there are no keys.
    """
    return (saliency.mean(dim=0) * keys).sum(dim=-1) / keys.sum(dim=-1)


def after_picture(layout: ImageLayout) -> Tensor:
    """(B,) the column behind each row's last image token, or its first real column when it has no picture."""
    column = torch.arange(layout.tokens.shape[1], device=layout.tokens.device)
    after = torch.where(layout.tokens, column + 1, 0).amax(dim=1)
    first = torch.where(layout.text, column, len(column)).amin(dim=1)
    return torch.where(after > 0, after, first)


@dataclass(frozen=True, eq=False, kw_only=True)
class Recorder(WeightEdit):
    """Keeps the weights that are really used, as a node of the graph, and changes nothing.

    Attributes:
        seen: Layer number -> (R, H, 1, K) float32 of the last pass.
    """

    seen: dict[int, Tensor] = field(default_factory=dict)
    rows: ClassVar[Rows] = "last"

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """The same weights; the first layer's begin the graph when nothing before them has one."""
        node = weights if weights.requires_grad else weights.detach().requires_grad_()
        self.seen[site.layer] = node
        return node


@dataclass(frozen=True, eq=False)
class SaliencySteps:
    """Single-token passes behind a cache, whose newest row keeps its graph until the next pass.

    Attributes:
        model: The transformers model.
        cache: Keys and values of the tokens before.
        kwargs: What ``generate`` keeps between passes; replaced after each of them.
        recorder: Where the weights are kept.
        newest: The newest pass's logits, one entry of (B, V) float32 with their graph.
    """

    model: Any
    cache: Cache
    kwargs: dict[str, Any]
    recorder: Recorder
    newest: list[Tensor] = field(default_factory=list)

    def advance(self, input_ids: Tensor) -> Tensor:
        """Runs the newest token.

        Args:
            input_ids: (B, T + generated) all tokens.

        Returns:
            (B, V) float32 logits without their graph.
        """
        self.release()
        with torch.enable_grad():
            output = self.model(**steps.next_token(self.model, input_ids, self.kwargs), return_dict=True)
            logits = output.logits[:, -1].float()  # (B, V)
            self.newest.append(logits)
        self.kwargs.update(steps.kept_between(self.model, output, self.kwargs))
        return torch.as_tensor(logits).detach().clone()

    @property
    def length(self) -> int:
        """K, keys of the newest pass."""
        return int(next(iter(self.recorder.seen.values())).shape[-1])

    def saliency(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """What each row's token owes to each key: one backward pass for all rows.

        Args:
            tokens: (B,) int64, the judged token of each row.
            wanted: (B,) bool, rows to compute; elsewhere the result is zero.

        Returns:
            (N, B, K) ``Sbar`` of the recorded layers, in order.
        """
        seen = [self.recorder.seen[layer] for layer in sorted(self.recorder.seen)]
        with torch.enable_grad():
            losses = token_loss(self.newest[0], tokens)
            loss = SCALE * (losses if wanted is None else losses[wanted]).sum()
        gradients = torch.autograd.grad(loss, seen, retain_graph=True)
        rows = len(tokens)  # branches stand behind the clean rows
        place = tokens.device
        return torch.stack(
            [
                row_saliency(weights[:rows, :, 0].detach(), gradient[:rows, :, 0] / SCALE).to(place)
                for weights, gradient in zip(seen, gradients, strict=True)
            ]
        )

    def release(self) -> None:
        """Forgets the newest graph, in the cache too."""
        self.newest.clear()
        self.recorder.seen.clear()
        cache.detach(self.cache)


@contextmanager
def saliency_steps(
    vlm: Checkpoint,
    layout: ImageLayout,
    layers: LayerSet,
    input_ids: Tensor,
    kwargs: dict[str, Any],
    *,
    answer: int = 1,
    live: Tensor | None = None,
) -> Iterator[SaliencySteps]:
    """Reads the prompt; inside the block tokens pass one by one, the prompt's last one first.

    Edits that are at work when the block begins come before the recorder, so saliency is that of the edited attention.

    Args:
        vlm: The model.
        layout: Layout of the rows that the model runs, with contrast rows if there are any.
        layers: Layers to record.
        input_ids: (B, T) prompts, left-padded.
        kwargs: What ``generate`` hands to a ``custom_generate`` for the model.
        answer: Tokens that may follow the prompt.
        live: (R,) bool, False for contrast rows.

    Raises:
        DataError: A prompt ends with a picture, whose last token cannot pass alone; or prompt and answer fill a sliding
            window of the layers.
        IncompatibleDecodersError: The cache cannot give back its last token.
        UnsupportedAttentionError: The model's attention cannot be recorded; see ``edited``.
    """
    model: Any = vlm.model
    if bool((input_ids[:, -1] == vlm.family.image_token(model.config)).any()):
        raise DataError(
            "a prompt ends with a picture, and saliency begins at its last token, which must be text",
            "put the question, or the assistant's turn, behind the picture",
        )
    length = layout.tokens.shape[1]
    check_windows(vlm, range(vlm.layers), length)  # a full window cannot give back its last token
    check_windows(vlm, layers.resolve(vlm.layers), length, answer)
    filled = _checked(steps.cache_of(model, kwargs), length)
    with torch.no_grad():
        model(**steps.first(model, input_ids, kwargs), return_dict=True)
    cache.drop_last(filled)
    recorder = Recorder(layers=layers)
    with edited(vlm, layout, (recorder,), live=live):
        passes = SaliencySteps(model, filled, dict(kwargs), recorder)
        try:
            yield passes
        finally:
            passes.release()


def _checked(found: Cache | None, prompt: int) -> Cache:
    """The cache that ``generate`` made, which must be able to give back a prompt's last token."""
    if found is None or not cache.can_step_back(found) or cache.length(found) > 0:
        raise IncompatibleDecodersError(
            f"saliency steps back by one token and needs an empty dynamic cache, not {type(found).__name__}",
            "leave use_cache on, static_cache and cache_implementation at their defaults, and hand no cache over",
        )
    window = cache.smallest_window(found)
    if window is not None and window <= prompt:
        raise IncompatibleDecodersError(
            f"a prompt of {prompt} tokens fills the sliding window of {window}, which then forgets its first one",
            "shorten the prompt",
        )
    return found
