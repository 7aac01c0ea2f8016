"""Reads the attention and the gradients of the rows that choose tokens, for decoders that refine pictures.

Each step materialises one row of attention in the layers that are read, and none elsewhere. Shape letters
(``docs/notation.md``): B rows, H query heads, T prompt tokens, K keys; here also S generated tokens and N layers that
are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vlmfix.attention.edit import LayerSet, Rows, Site, WeightEdit
from vlmfix.attention.probe import Enough, ending_at
from vlmfix.attention.saliency import SCALE, token_loss
from vlmfix.decoders.picture.refined import PictureMemo
from vlmfix.decoding.choice import MostProbable
from vlmfix.decoding.loop import decode
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.running import Running, running
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.insight.question import speaking
from vlmfix.insight.sinks import ImageSinks
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.models.turns import turn_of
from vlmfix.pixels import digest
from vlmfix.upstream import defaults


def missing_layers(layers: LayerSet, count: int) -> str | None:
    """Says in one sentence which of the layers a model with ``count`` lacks; None when it has them all."""
    chosen = layers.resolve(count)
    counted = layers.spec != "all" and not any(sign in f"{layers.spec}/" for sign in ("-", ":/"))  # no open end
    missing = layers.resolve(max(count, 1 << 16)) - chosen if counted else set()
    if missing or not chosen:
        return f"layers {layers} are asked for, but the model has {count}, 0 to {count - 1}"
    return None


def existing_layers(layers: LayerSet, count: int) -> tuple[int, ...]:
    """Returns the numbers of the layers, in order; unlike for edits, none may be missing.

    Raises:
        UnsupportedAttentionError: The model does not have them all.
    """
    reason = missing_layers(layers, count)
    if reason is not None:
        raise UnsupportedAttentionError(reason, "give layers that exist")
    return tuple(sorted(layers.resolve(count)))


@dataclass(frozen=True, eq=False, kw_only=True)
class NewestRows(WeightEdit):
    """Keeps the head mean of the newest row, of the prompt's tokens alone, and changes nothing."""

    rows: ClassVar[Rows] = "last"

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights unchanged."""
        newest = weights[:, :, -1].mean(dim=1)  # (B, K)
        if site.prefill:
            site.learn_of_keys("newest", newest[:, : site.prompt].contiguous())
        else:
            site.relearn("newest", newest)
        return weights


class Looking(MostProbable):
    """Takes the token with the highest score, and sees where the row that chooses it looked.

    Args:
        call: The call, with ``reader`` at work.
        reader: Keeps the rows.
        prompt: T.

    Attributes:
        seen: (B, N, T) float32 of the newest token.
    """

    def __init__(self, call: Running, reader: NewestRows, prompt: int) -> None:
        self._call, self._reader, self._prompt = call, reader, prompt

    def __call__(self, scores: Tensor) -> Tensor:
        """Chooses (B,) int64 tokens from (B, V) float32 scores."""
        self.seen = self.look()  # before the next step begins
        return super().__call__(scores)

    def look(self) -> Tensor:
        """Returns where the newest row looked, (B, N, T) float32."""
        found = [values for _, values in sorted(self._call.learned(self._reader, "newest").items())]
        return torch.stack([values[:, : self._prompt].to(found[0].device) for values in found], dim=1)


def attention_maps(vlm: Checkpoint, batch: Batch, layers: LayerSet, *, steps: int = 1) -> list[Tensor]:
    """Lets the model answer greedily and keeps where the row that chose each token looked.

    Rows that share pictures share their encoding and the pass over the common beginning of their prompts. With one
    step, nothing behind the last layer that is asked for is run.

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
    return _looks(vlm, batch, vlm.layout(batch), layers, steps, drop_sinks=False).maps


@dataclass(frozen=True, eq=False)
class _Looks:
    """Where the rows of a batch looked.

    Attributes:
        maps: See ``attention_maps``.
        said: The tokens of each row; none with one step, which chooses none.
        sinks: (B, N, T) bool on the CPU, image tokens that are sinks in a layer that was read; None unless asked for.
    """

    maps: list[Tensor]
    said: list[list[int]]
    sinks: Tensor | None


@torch.no_grad()
def _looks(
    vlm: Checkpoint, batch: Batch, layout: ImageLayout, layers: LayerSet, steps: int, *, drop_sinks: bool
) -> _Looks:
    read = existing_layers(layers, vlm.layers)
    chosen = LayerSet("/".join(map(str, read)))
    reader, search = NewestRows(layers=chosen), ImageSinks(layers=chosen)
    plan = DecodingPlan(edits=(search, reader) if drop_sinks else (reader,))
    said: list[list[int]] = [[] for _ in range(batch.rows)]
    found: list[list[Tensor]] = [[] for _ in range(batch.rows)]
    with running(vlm, batch, layout, plan, limit=steps, name="a look at the picture") as call:
        choice = Looking(call, reader, batch.length)
        if steps == 1:
            with ending_at(vlm, read[-1]), suppress(Enough):
                call.prompt()
            found = [[seen] for seen in choice.look()]
        else:
            for step in decode(call, choice, defaults.ends(vlm.model)):
                for row, token, seen in zip(step.samples, step.tokens, choice.seen, strict=True):
                    found[row].append(seen)
                    said[row].append(token)
    return _Looks([torch.stack(own).cpu() for own in found], said, search.found().cpu() if drop_sinks else None)


@dataclass(frozen=True, eq=False)
class Compared:
    """Where the model looks under B questions, and where under an instruction that says nothing.

    Attributes:
        layout: Its first B rows are the questions.
        asked: For each question (S, N, its patch tokens), as ``attention_maps`` gives them.
        general: The same under the instruction, with its own S.
        sinks: For each question (N, its patch tokens) bool, sinks of ``ImageSinks``; None unless they were
            asked for.
        speaking: For each question, which of its answer's tokens write content words; None unless it was asked for, and
            with one step.
    """

    layout: ImageLayout
    asked: list[Tensor]
    general: list[Tensor]
    sinks: list[Tensor] | None = None
    speaking: list[list[bool]] | None = None


def compared(
    vlm: Checkpoint,
    pictures: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    general: str,
    layers: LayerSet,
    memo: PictureMemo,
    *,
    steps: int = 1,
    drop_sinks: bool = False,
) -> Compared:
    """Reads where the model looks under each question, and where under an instruction that says nothing.

    The instruction is one more row of the same passes for each list of pictures that the memo does not know.

    Args:
        vlm: The model.
        pictures: B lists of pictures.
        prompts: B questions.
        general: The instruction.
        layers: Layers to read.
        memo: What is known of pictures under the instruction.
        steps: Longest answer in tokens.
        drop_sinks: Whether sinks are looked for, and stop words among the answers' tokens.
    """
    layout: list[ImageLayout] = []
    asked: list[Tensor] = []
    sinks: list[Tensor] = []
    said: list[list[int]] = []

    def ask(beside: list[int]) -> list[Tensor]:
        shown = [*pictures, *(pictures[row] for row in beside)]
        batch = vlm.encode([*prompts, *[general] * len(beside)], shown)
        layout.append(vlm.layout(batch))
        tokens = layout[0].tokens.cpu()
        looks = _looks(vlm, batch, layout[0], layers, steps, drop_sinks=drop_sinks)
        found = [seen[..., own] for seen, own in zip(looks.maps, tokens, strict=True)]
        asked.extend(found[: len(pictures)])
        said.extend(looks.said[: len(pictures)])
        if looks.sinks is not None:
            sinks.extend(own[:, shown] for own, shown in zip(looks.sinks, tokens[: len(pictures)], strict=False))
        return found[len(pictures) :]

    keys = [("attention", digest(row), general, str(layers), steps) for row in pictures]
    noise = memo.recall(keys, ask)
    if not asked:  # all pictures are known
        ask([])
    if not drop_sinks:
        return Compared(layout[0], asked, noise)
    words = [speaking(vlm, ids) for ids in said] if steps > 1 else None
    return Compared(layout[0], asked, noise, sinks[: len(pictures)], words)


def attention_gradients(
    vlm: Checkpoint, batch: Batch, layers: LayerSet, *, drop_sinks: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Computes, for the most probable first token, attention times the positive part of its gradient, per prompt token.

    ``mean over heads of A[h, j] * max(0, d v / d A[h, j])`` with ``v`` the log-probability of that token and A the
    weights of the row that chooses it, as a free variable.

    Prefill runs without gradients; the prompt's last token then passes once more, with them. That gives exactly the
    gradient of the full computation, in memory for one token's activations and one row of attention in each layer.

    Args:
        vlm: The model.
        batch: B rows.
        layers: Layers to read.
        drop_sinks: Whether sinks are looked for.

    Returns:
        For each row (N, T) float32 on the CPU, not negative. And (B, N, T) bool, image tokens that are sinks in a
        layer; None unless they were looked for.

    Raises:
        UnsupportedAttentionError: A layer does not exist, or its attention cannot be read.
        DataError: A prompt ends with a picture, or fills a sliding window.
    """
    read = existing_layers(layers, vlm.layers)
    chosen = LayerSet("/".join(map(str, read)))
    room_for_answers(vlm, batch.lengths)
    search, found = ImageSinks(layers=chosen), list[Tensor]()
    plan = DecodingPlan(edits=(search,) if drop_sinks else (), asks=chosen)
    with running(vlm, batch, vlm.layout(batch), plan, limit=1, name="a gradient") as call:
        for weights, gradient in call.owed.gradients(call.prompt().argmax(dim=1)):  # (B, H, T) each
            owed = weights * (-gradient).clamp(min=0)  # the gradient is that of -v
            found.append(owed.float().mean(dim=1).cpu())  # (B, T)
    sinks = search.found().cpu() if drop_sinks else None
    return list(torch.stack(found, dim=1)), sinks  # (N, T) each


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Turns off the gradients of parameters inside the block."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def pixel_gradients(vlm: Checkpoint, batch: Batch) -> Tensor:
    """Computes the gradient of the most probable first token's log-probability with respect to ``pixel_values``.

    The pass keeps all activations, of the vision tower and of every token in every layer.

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
