"""Runs contrast branches as extra rows of the forward passes of transformers' ``generate``.

A decoding step is bound by reading the weights, so a second row costs almost nothing where a second forward pass costs
a whole step. The rows of the clean prompt and of each branch are stacked, left-padded to one length, and share one KV
cache; their logits are fused into one row per sample. ``generate`` sees B rows from outside, so greedy search,
sampling, beams, processors and stopping criteria are its own.

Shape letters (``docs/notation.md``): B rows (after beam expansion), N branches, T prompt tokens, T' the length of the
stacked prompts, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from vlmfix.decoding.blanks import blanked
from vlmfix.decoding.branches import Branch, Contrast, fused, viewed
from vlmfix.decoding.encoding import encoded_once
from vlmfix.decoding.exits import Reader, Views
from vlmfix.decoding.rows import alone, blank_of
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream import cache as caches
from vlmfix.upstream.features import Features, encoded, for_beams, joined
from vlmfix.upstream.names import PIXELS, TYPES, ModelNames
from vlmfix.upstream.positions import prompt_positions

STACK = "_vlmfix_stack"
"""Attribute of the model that holds the stacked rows while a ``with`` block lasts."""


@dataclass(eq=False)
class Stack:
    """Holds clean rows and branches as rows of one pass, (1 + N) * B in branch-major order: clean rows first.

    Attributes:
        forward: The model's own forward.
        names: Names of the arguments that ``generate`` gives it.
        contrasts: The rules, in order.
        clean: B, rows of the clean batch after beam expansion.
        prompt: T of the clean batch, as ``generate`` sees it.
        ids: (N*B, T') prompts of the branches, left-padded to the common length T'.
        mask: ((1+N)*B, T') int64, 1 where a prompt token is real.
        positions: (N*B, T') or (4, N*B, T') position ids of the branches.
        shift: Offset of each row's next position from its clean row's, ((1+N)*B, 1) or (4, (1+N)*B, 1).
        features: Features of each branch's pictures; None where it has none or shares the clean rows' features.
        shares: Which branches share the clean rows' features.
        types: Under each name in ``TYPES`` that the clean batch has, (N*B, T') of the branches.
        blank: ((1+N)*B, T') bool, prompt tokens that are zeros; None without any.
        reader: Reads early layers, where a rule takes their logits.
        views: Reads the prompts' columns, where a rule looks at them.
        passed: Whether a pass went through the stack since this was last set to False.
    """

    forward: Callable[..., Any]
    names: ModelNames
    contrasts: tuple[Contrast, ...]
    clean: int
    prompt: int
    ids: Tensor
    mask: Tensor
    positions: Tensor
    shift: Tensor
    features: tuple[Features | None, ...]
    shares: tuple[bool, ...]
    types: dict[str, Tensor]
    blank: Tensor | None = None
    reader: Reader | None = None
    views: Views | None = None
    passed: bool = False

    @property
    def copies(self) -> int:
        """Returns the rows per sample, 1 + N."""
        return 1 + len(self.shares)

    @property
    def length(self) -> int:
        """Returns the common prompt length, T'."""
        return int(self.mask.shape[1])


def stack_layout(layout: ImageLayout, stack: Stack) -> tuple[ImageLayout, Tensor]:
    """Extends the clean rows' layout to all stacked rows, and marks the clean ones, which edits may change.

    Args:
        layout: (B, T) layout of the clean rows, beams expanded.
        stack: The stacked rows.

    Returns:
        The ((1+N)*B, T') layout, whose contrast rows are empty, and ((1+N)*B,) bool.
    """
    return alone(layout, 0, stack.copies, stack.length)


@contextmanager
def stacked(vlm: Checkpoint, batch: Batch, contrasts: Sequence[Contrast], *, beams: int = 1) -> Iterator[Stack]:
    """Runs every branch as extra rows of the model's forward inside the block.

    Args:
        vlm: The model; its ``forward`` is restored on leaving, also after an exception.
        batch: The clean rows that ``generate`` is called with.
        contrasts: The rules, in the order in which they act.
        beams: Number of beams that ``generate`` is called with.

    Raises:
        IncompatibleDecodersError: Stacks do not nest.
    """
    model = vlm.model
    if hasattr(model, STACK):
        raise IncompatibleDecodersError("contrast branches are already at work on this model", "chain them with +")
    owned = "forward" in model.__dict__
    original = model.forward
    stack = _stack(vlm, batch, tuple(contrasts), beams, original)
    reordered: list[caches.Reordered] = []

    @functools.wraps(original)
    def forward(*, mm_token_type_ids: Tensor | None = None, token_type_ids: Tensor | None = None, **kwargs: Any) -> Any:  # noqa: ANN401 (families differ)
        # Generated tokens are text, so token types matter only in the prompt. Decoding steps must not read them:
        # before 5.23 transformers passes types that grow at every step, and each new shape would recompile the step.
        stack: Stack = getattr(model, STACK)
        ids = kwargs.get(stack.names.ids)
        if ids is not None and ids.shape[1] > 1:
            kwargs |= {"mm_token_type_ids": mm_token_type_ids, "token_type_ids": token_type_ids}
        return _forward(model, stack, reordered, kwargs)

    try:
        setattr(model, STACK, stack)
        model.forward = forward
        with blanked(vlm, stack.blank):
            yield stack
    finally:
        for cache in reordered:
            cache.restore()
        if owned:
            model.forward = original
        else:
            del model.forward
        delattr(model, STACK)


@torch.no_grad()
def _stack(
    vlm: Checkpoint,
    batch: Batch,
    contrasts: tuple[Contrast, ...],
    beams: int,
    forward: Callable[..., Any],
) -> Stack:
    branches = [branch for contrast in contrasts for branch in contrast.branches]
    batches = [branch.batch for branch in branches]
    length = max(b.length for b in (batch, *batches))
    masks = [_wide(_left(b.attention_mask, length), beams) for b in (batch, *batches)]
    positions = [_wide(_left(prompt_positions(vlm.model, b), length), beams) for b in (batch, *batches)]
    clean = positions[0][..., -1:]
    exits = [place for contrast in contrasts for place in contrast.exits]
    views = [place for contrast in contrasts for place in contrast.views]
    blank = blank_of(batch, branches, length)
    return Stack(
        reader=Reader(vlm, exits) if exits else None,
        views=Views(vlm, views) if views else None,
        blank=None if blank is None else _wide(blank, beams),
        forward=forward,
        names=ModelNames.of(vlm.model),
        contrasts=tuple(replace(c, rows=c.rows.repeat_interleave(beams)) for c in contrasts),
        clean=batch.rows * beams,
        prompt=batch.length,
        ids=torch.cat(
            [batch["input_ids"].new_empty(0, length), *(_wide(_left(b["input_ids"], length), beams) for b in batches)]
        ),
        mask=torch.cat(masks),
        positions=torch.cat([positions[0][..., :0, :], *positions[1:]], dim=-2),
        shift=torch.cat([p[..., -1:] - clean for p in positions], dim=-2),
        features=_features(vlm, branches, beams),
        shares=tuple(branch.same_pictures for branch in branches),
        types={
            name: torch.cat(
                [
                    batch[name].new_empty(0, length),
                    *(_wide(_left(b.get(name, torch.zeros_like(b["input_ids"])), length), beams) for b in batches),
                ]
            )
            for name in TYPES
            if name in batch
        },
    )


def _forward(model: PreTrainedModel, stack: Stack, reordered: list[caches.Reordered], given: Mapping[str, Any]) -> Any:  # noqa: ANN401 (families differ)
    kwargs = {name: value for name, value in given.items() if value is not None}
    ids = kwargs.get(stack.names.ids)
    if ids is None or ids.shape[0] != stack.clean:
        raise IncompatibleDecodersError(
            f"the branches were made for {stack.clean} rows of token ids, the model was called otherwise",
            "with beam search, give num_beams to decoder.applied(...); inputs_embeds are not supported",
        )
    begins = ids.shape[1] == stack.prompt > 1  # without a cache every later pass has more tokens
    if ids.shape[1] > 1:
        if begins:
            stack.contrasts = tuple(contrast.begun() for contrast in stack.contrasts)
        _prefill(model, stack, reordered, kwargs)
    else:
        _decode(stack, kwargs)
    views = stack.views if begins else None
    with (
        stack.reader.listening() if stack.reader else nullcontext(),
        views.listening() if views else nullcontext(),
    ):
        output = stack.forward(**kwargs)
    if views is not None:
        viewed(stack.contrasts, views.take(stack.clean))
    stack.passed = True
    return _fused(stack, output)


def _prefill(model: PreTrainedModel, stack: Stack, reordered: list[caches.Reordered], kwargs: dict[str, Any]) -> None:
    """Replaces the clean prompt by the stacked prompts; without a cache, each row gets the tokens past the prompt."""
    names, copies, extra = stack.names, stack.copies, stack.length - stack.prompt
    ids, cache = kwargs[names.ids], kwargs.get(names.cache)
    if ids.shape[1] < stack.prompt or (cache is not None and caches.length(cache) > 0):
        raise IncompatibleDecodersError(
            f"a pass over {ids.shape[1]} tokens of a prompt of {stack.prompt}",
            "chunked prefill, assisted decoding and a cache from an earlier call do not go with contrast branches",
        )
    if cache is not None:
        _check_capacity(cache, stack)
        reordered.append(caches.Reordered(cache, functools.partial(_all_rows, stack)))
    tail = ids[:, stack.prompt :]
    clean_positions = kwargs.get(names.positions)
    if clean_positions is None:
        mask = stack.mask[: stack.clean, extra:]
        clean_positions = _counted(torch.cat([mask, mask.new_ones(tail.shape)], dim=1))
    after = _repeat(clean_positions[..., stack.prompt :], copies, -2) + stack.shift
    before = torch.cat([_left(clean_positions[..., : stack.prompt], stack.length), stack.positions], dim=-2)
    kwargs[names.positions] = torch.cat([before, after], dim=-1)
    kwargs[names.ids] = torch.cat(
        [torch.cat([_left(ids[:, : stack.prompt], stack.length), stack.ids]), tail.repeat(copies, 1)], dim=1
    )
    kwargs[names.mask] = torch.cat([stack.mask, stack.mask.new_ones(stack.mask.shape[0], tail.shape[1])], dim=1)
    kwargs[names.features] = _all_features(model, stack, kwargs)
    for name, others in stack.types.items():
        if (types := kwargs.get(name)) is not None:
            rows = torch.cat([_left(types[:, : stack.prompt], stack.length), others.to(types.dtype)])
            kwargs[name] = torch.cat([rows, rows.new_zeros(rows.shape[0], tail.shape[1])], dim=1)


def _decode(stack: Stack, kwargs: dict[str, Any]) -> None:
    names, copies = stack.names, stack.copies
    kwargs[names.ids] = kwargs[names.ids].repeat(copies, 1)
    positions, mask, cache = (kwargs.get(name) for name in (names.positions, names.mask, names.cache))
    if positions is None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise IncompatibleDecodersError("a decoding step came without positions", "pass a 2D attention_mask")
        positions = _counted(mask)[:, -1:]
    kwargs[names.positions] = _repeat(positions, copies, -2) + stack.shift
    if isinstance(mask, dict):
        kwargs[names.mask] = {name: _decode_mask(stack, part, cache) for name, part in mask.items()}
    elif mask is None and cache is not None and not caches.is_static(cache):
        kwargs[names.mask] = _seen(stack, cache)  # the model tells layers with a sliding window from others
    else:
        kwargs[names.mask] = _decode_mask(stack, mask, cache)


def _seen(stack: Stack, cache: Cache) -> Tensor:
    """Returns the mask of real tokens, (B', tokens with the new one); every generated token is real."""
    answer = stack.mask.new_ones(stack.mask.shape[0], caches.length(cache) + 1 - stack.length)
    return torch.cat([stack.mask, answer], dim=1)


def _decode_mask(stack: Stack, mask: Tensor | None, cache: Cache | None) -> Tensor:
    if mask is None:
        if cache is None:
            raise IncompatibleDecodersError("one token came without a cache", "leave use_cache on")
        # no mask: the clean rows see every key, since they have no padding and a static cache is full
        mask = stack.mask.new_ones(stack.clean, 1, 1, caches.mask_width(cache), dtype=torch.bool)
    if mask.dim() == 2:
        tail = mask[:, stack.prompt :].repeat(stack.copies, 1)
        return torch.cat([stack.mask, tail.to(stack.mask.dtype)], dim=1)
    if cache is not None and not caches.is_static(cache):  # layers with a sliding window hold the last K tokens
        return _seen(stack, cache).bool()[:, None, None, -mask.shape[-1] :]
    wide = mask.repeat(stack.copies, 1, 1, 1)  # (B', 1, 1, K) of a static cache
    prompt = stack.mask.bool()[:, None, None, :]  # (B', 1, 1, T)
    return torch.cat([prompt, wide[..., stack.length :]], dim=-1)


def _fused(stack: Stack, output: Any) -> Any:  # noqa: ANN401 (families differ)
    logits = torch.as_tensor(output.logits)  # ((1+N)*B, Q, V)
    rows = logits[:, -1].float().view(stack.copies, stack.clean, -1)  # (1+N, B, V)
    early = None if stack.reader is None else stack.reader.logits()[: stack.clean].transpose(0, 1)  # (E, B, V)
    scores = fused(stack.contrasts, rows, early)
    # Fused scores stay in float32: rounded to bfloat16, a contrast would tie where the clean logits do not.
    output.logits = torch.cat([logits[: stack.clean, :-1].float(), scores[:, None]], dim=1)
    for name in ("hidden_states", "attentions"):
        if (states := output.get(name)) is not None:
            output[name] = tuple(None if s is None else s[: stack.clean] for s in states)
    return output


def _features(vlm: Checkpoint, branches: Sequence[Branch], beams: int) -> tuple[Features | None, ...]:
    """Encodes the pictures of each branch; branches with the same pixel tensor share the features."""
    made: dict[int, Features] = {}
    found: list[Features | None] = []
    for branch in branches:
        pixels = None if branch.same_pictures else branch.batch.get("pixel_values")
        if pixels is not None and id(pixels) not in made:
            made[id(pixels)] = _widened(vlm, branch.batch, encoded_once(vlm, branch.batch), beams)
        found.append(None if pixels is None else made[id(pixels)])
    return tuple(found)


def _widened(vlm: Checkpoint, batch: Batch, features: Features, beams: int) -> Features:
    return features if beams == 1 else for_beams(vlm.model, batch["input_ids"], features, beams)


def _all_features(model: PreTrainedModel, stack: Stack, kwargs: dict[str, Any]) -> dict[str, Features] | None:
    given = kwargs.pop(stack.names.features, None) or {}
    clean = given.get("image")
    if clean is None and kwargs.get("pixel_values") is not None:
        clean = encoded(model, kwargs)
    for name in PIXELS:
        kwargs.pop(name, None)
    parts = [clean, *(clean if share else own for share, own in zip(stack.shares, stack.features, strict=True))]
    present = [part for part in parts if part is not None]
    return {"image": joined(present)} if present else None


def _counted(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _left(rows: Tensor, length: int) -> Tensor:
    """Pads the last dimension on the left with zeros, which the mask hides."""
    return torch.nn.functional.pad(rows, (length - rows.shape[-1], 0))


def _wide(rows: Tensor, beams: int) -> Tensor:
    return rows if beams == 1 else rows.repeat_interleave(beams, dim=-2)


def _repeat(rows: Tensor, copies: int, dim: int) -> Tensor:
    return torch.cat([rows] * copies, dim=dim)


def _check_capacity(cache: Cache, stack: Stack) -> None:
    if not caches.is_static(cache):
        return
    if stack.length > stack.prompt:
        raise IncompatibleDecodersError(
            f"a branch's prompt has {stack.length} tokens, the clean one {stack.prompt}, and the cache is static",
            "use the dynamic cache, or a shorter instruction",
        )
    capacity, window = caches.capacities(cache)
    if window < capacity:
        raise IncompatibleDecodersError(
            f"the static cache of {capacity} tokens has layers with a window of {window}",
            "use the dynamic cache with contrast branches on this model",
        )


def _all_rows(stack: Stack, beams: Tensor) -> Tensor:
    """Extends beam search's choice among the clean rows to all stacked rows: branches move with their beam."""
    offsets = torch.arange(stack.copies, device=beams.device)[:, None] * stack.clean
    return (beams[None] + offsets).flatten()
