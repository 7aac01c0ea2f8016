"""What a refining decoder reads off the model: where the rows that choose tokens look, and what they depend on.

Attention is computed for one row a step in the layers that are read, and nowhere else in full. Shape letters
(``docs/notation.md``): B rows, H query heads, T prompt tokens, K keys; here also S generated tokens and N layers that
are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmfix.attention.edit import LayerSet, Rows, Site, WeightEdit
from vlmfix.attention.saliency import SCALE, token_loss
from vlmfix.decoding.choice import MostProbable
from vlmfix.decoding.loop import decode
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.running import running
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch
from vlmfix.models.turns import turn_of
from vlmfix.upstream import defaults


def missing_layers(layers: LayerSet, count: int) -> str | None:
    """Which of the layers a model with ``count`` does not have, in one sentence; None when it has them all."""
    chosen = layers.resolve(count)
    counted = layers.spec != "all" and not any(sign in f"{layers.spec}/" for sign in ("-", ":/"))  # no open end
    missing = layers.resolve(max(count, 1 << 16)) - chosen if counted else set()
    if missing or not chosen:
        return f"layers {layers} are asked for, but the model has {count}, 0 to {count - 1}"
    return None


def existing_layers(layers: LayerSet, count: int) -> tuple[int, ...]:
    """The numbers of the layers, in order; unlike for edits, none may be missing.

    Raises:
        UnsupportedAttentionError: The model does not have them all.
    """
    reason = missing_layers(layers, count)
    if reason is not None:
        raise UnsupportedAttentionError(reason, "give layers that exist")
    return tuple(sorted(layers.resolve(count)))


class _Enough(Exception):  # noqa: N818 (a signal, not an error)
    """The pass has shown what was asked for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NewestRows(WeightEdit):
    """Keeps the head mean of the newest row, and changes nothing.

    Attributes:
        read: The layers that are read, in order; those of ``layers``.
        prompt: T.
        stop: Whether the first step is all that is wanted: the layers behind the last one are then not run.
        newest: Layer -> (B, T) of the newest step.
    """

    read: tuple[int, ...]
    prompt: int
    stop: bool
    newest: dict[int, Tensor] = field(default_factory=dict)
    rows: ClassVar[Rows] = "last"

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """The weights, as they were."""
        self.newest[site.layer] = weights[:, :, -1, : self.prompt].mean(dim=1)  # (B, T)
        if self.stop and site.layer == self.read[-1]:
            raise _Enough
        return weights

    def maps(self) -> Tensor:
        """(B, N, T) float32 on the CPU, of the newest step."""
        return torch.stack([self.newest[layer] for layer in self.read], dim=1).cpu()


@torch.no_grad()
def attention_maps(vlm: Checkpoint, batch: Batch, layers: LayerSet, *, steps: int = 1) -> list[Tensor]:
    """Lets the model answer greedily and keeps where the row that chose each token looked.

    Rows that share pictures share their encoding and the pass over the common beginning of their prompts. With one
    step, the layers behind the last one asked for are not run.

    Args:
        vlm: The model; edits at work when this is called are at work in the passes too.
        batch: B rows.
        layers: Layers to read.
        steps: Longest answer in tokens.

    Returns:
        For each row (S, N, T) float32 on the CPU, the mean over heads of the attention to each prompt token. S is the
        number of its generated tokens, its end token included, and at most ``steps``.

    Raises:
        UnsupportedAttentionError: A layer does not exist, or its attention cannot be read.
        DataError: A prompt is longer than the model's context, or with its answer than a sliding window of the layers.
    """
    read = existing_layers(layers, vlm.layers)
    chosen = LayerSet("/".join(map(str, read)))
    reader = NewestRows(layers=chosen, read=read, prompt=batch.length, stop=steps == 1)
    found: list[list[Tensor]] = [[] for _ in range(batch.rows)]
    plan = DecodingPlan(edits=(reader,), compiles=False)
    with running(vlm, batch, vlm.layout(batch), plan, limit=steps, name="a look at the picture") as call:
        try:
            for said in decode(call, MostProbable(), defaults.ends(vlm.model)):
                for row, seen in zip(said.samples, reader.maps(), strict=True):
                    found[row].append(seen)
        except _Enough:
            return [seen[None] for seen in reader.maps()]
    return [torch.stack(own) for own in found]


def image_attention(vlm: Checkpoint, batch: Batch, layers: LayerSet, *, steps: int = 1) -> list[Tensor]:
    """The same, for each row at its image-patch tokens alone: (S, N, patch tokens of the row)."""
    maps, tokens = attention_maps(vlm, batch, layers, steps=steps), vlm.layout(batch).tokens.cpu()
    return [found[..., own] for found, own in zip(maps, tokens, strict=True)]


def attention_gradients(vlm: Checkpoint, batch: Batch, layers: LayerSet) -> list[Tensor]:
    """What the most probable first token owes to each prompt token: attention times the helpful part of its gradient.

    ``mean over heads of A[h, j] * max(0, d v / d A[h, j])`` with ``v`` the log-probability of that token and A the
    weights of the row that chooses it, as a free variable.

    The prompt is read without gradients; its last token then passes once more, with them. That gives exactly the
    gradient of the full computation, in memory for one token's activations and one row of attention in each layer.

    Args:
        vlm: The model.
        batch: B rows.
        layers: Layers to read.

    Returns:
        For each row (N, T) float32 on the CPU, not negative.

    Raises:
        UnsupportedAttentionError: A layer does not exist, or its attention cannot be read.
        DataError: A prompt ends with a picture, or fills a sliding window.
    """
    read = existing_layers(layers, vlm.layers)
    chosen = LayerSet("/".join(map(str, read)))
    room_for_answers(vlm, batch.lengths)
    plan, found = DecodingPlan(asks=chosen), list[Tensor]()
    with running(vlm, batch, vlm.layout(batch), plan, limit=1, name="a gradient") as call:
        for weights, gradient in call.owed.gradients(call.prompt().argmax(dim=1)):  # (B, H, T) each
            owed = weights * (-gradient).clamp(min=0)  # the gradient is that of -v
            found.append(owed.float().mean(dim=1).cpu())  # (B, T)
    return list(torch.stack(found, dim=1))  # (N, T) each


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Parameters want no gradient inside the block."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def pixel_gradients(vlm: Checkpoint, batch: Batch) -> Tensor:
    """How the log-probability of the most probable first token changes with each number in ``pixel_values``.

    The whole pass keeps its activations, of the vision tower and of every token in every layer.

    Args:
        vlm: The model.
        batch: Rows with pictures; give one at a time to bound the memory.

    Returns:
        A tensor like ``pixel_values``, float32, on the CPU.
    """
    room_for_answers(vlm, batch.lengths)
    model: Any = vlm.model
    with turn_of(model).taken(), _frozen(model), torch.enable_grad():
        pixels = batch["pixel_values"].detach().clone().requires_grad_()
        inputs = {**batch, "pixel_values": pixels}
        logits = model(**inputs, use_cache=False, logits_to_keep=1, return_dict=True).logits[:, -1].float()
        certainty = -SCALE * token_loss(logits, logits.argmax(dim=1)).sum()
        (gradient,) = torch.autograd.grad(certainty, pixels)
    return (gradient.float() / SCALE).cpu()
