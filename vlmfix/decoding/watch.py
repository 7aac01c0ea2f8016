"""Checks that a user's calls of ``generate`` are the ones that a decoder was planned for, and that it really acts.

A plan is made for one batch: its layout, its branches and their pictures belong to these rows. While a decoder is at
work, the model's ``generate`` refuses other inputs, ends each row where the model's context is full, and checks at
every step whether branches and edits took part. Otherwise a wrapper that passes ``generate`` to another object, a
replaced attention module, or a batch in another order would give plain or wrong answers without an error.

Shape letters (``docs/notation.md``): B rows, T prompt tokens, T' the length of the prompts with branches, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vlmfix.attention.session import Acting
from vlmfix.attention.windows import check_windows
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.stack import Stack
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch
from vlmfix.models.turns import turn_of
from vlmfix.upstream import cache as caches
from vlmfix.upstream.loops import LOST
from vlmfix.upstream.names import handed

logger = logging.getLogger(__name__)

USUAL = 20
"""New tokens that ``generate`` makes when no argument or setting limits them."""


class Full(StoppingCriteria):
    """Ends every row where the model's context is full.

    Args:
        prompt: T, padding included.
        room: (B,) tokens that each row may get.
    """

    def __init__(self, prompt: int, room: Tensor) -> None:
        self._prompt, self._room = prompt, room

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Returns the rows that are full, (rows,) bool; rows of one sample, such as beams, are adjacent."""
        full = input_ids.shape[1] - self._prompt >= self._room.to(input_ids.device)  # (B,)
        return full.repeat_interleave(input_ids.shape[0] // len(full))


class Step(LogitsProcessor):
    """Calls a watch's check at every step, and leaves the scores unchanged."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the (B, V) scores unchanged."""
        self._watch.check_step()
        return scores


@dataclass(eq=False, kw_only=True)
class Watch:
    """Holds the calls of one block to the decoder's plan.

    Attributes:
        vlm: The model.
        decoder: How the decoder is written, for messages.
        handed: Whether ``generate`` gets our loop as ``custom_generate``.
        batch: The clean rows that the decoder was planned for.
        beams: Beams that it was planned for.
        prompt: T' of all rows, branches included.
        lengths: (B,) real tokens of the longest among each row's prompt and its branches' prompts.
        layers: Numbers of the layers that are edited.
        acting: The edits at work, or None.
        stack: The branches at work, or None.
        plain: Whether the plan changes nothing, so that any inputs are right.
        room: (B,) tokens of the model's context that are left for each row's answer; None without a limit.
        steps: Steps that were checked.
        passes: Passes over a prompt that the model made.
    """

    vlm: Checkpoint
    decoder: str
    handed: bool
    batch: Batch
    beams: int
    prompt: int
    lengths: Tensor
    layers: frozenset[int]
    acting: Acting | None
    stack: Stack | None
    plain: bool
    room: Tensor | None = field(init=False)
    steps: int = 0
    passes: int = 0

    def __post_init__(self) -> None:
        if not self.plain:  # a copy, in case the caller writes into the tensors
            self.batch = self.batch.with_inputs(**{name: value.clone() for name, value in self.batch.items()})
        self.room = room_for_answers(self.vlm, self.lengths)
        check_windows(self.vlm, self.layers, self.prompt)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Checks every call of the model's ``generate`` inside the block, and restores it on leaving."""
        model: Any = self.vlm.model
        owned = "generate" in model.__dict__
        original = model.generate
        names = list(inspect.signature(original).parameters)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (tokens, or an output)
            return self._generated(original, kwargs | dict(zip(names, args, strict=False)))

        hook = None if self.plain else model.register_forward_pre_hook(self._check_pass, with_kwargs=True)
        model.generate = generate
        try:
            yield
            if not self.plain and not self.passes:
                logger.warning("vlmfix: %s was put to work, and the model made no pass", self.decoder)
        finally:
            if hook is not None:
                hook.remove()
            if owned:
                model.generate = original
            else:
                del model.generate

    def check_step(self) -> None:
        """Checks that branches and edits took part in the pass that gave the newest scores.

        Raises:
            IncompatibleDecodersError: They did not.
        """
        self.steps += 1
        if self.stack is not None:
            if not self.stack.passed:
                raise idle(self.decoder, "the model's pass went round its branches")
            self.stack.passed = False
        if self.acting is not None and (layer := self.acting.idle()) is not None:
            raise idle(self.decoder, f"attention of layer {layer} was computed without it")

    def _generated(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:  # noqa: ANN401
        ids = given.get("inputs")
        ids = handed("ids", given) if ids is None else ids
        if self.plain:
            room = None if ids is None else room_for_answers(self.vlm, _lengths(ids, handed("mask", given)))
            return original(**_ended(given, ids, room))
        turn = turn_of(self.vlm.model)
        if wrong := self._wrong(ids, given):
            turn.check()
            raise self._unplanned(wrong)
        if turn.helper not in (None, threading.get_ident()):
            turn.check()  # the planned call is under way
        if self.handed:
            self._check_arguments(given)
        else:
            self._check_rows(given)
        answer = self._longest_answer(given)
        check_windows(self.vlm, self.layers, self.prompt, answer)
        processors, before = list(given.get("logits_processor") or ()), self.steps
        inner = any(
            isinstance(processor, Step) for processor in processors
        )  # the inner block's watch checks this block's edits too
        if not inner:
            given["logits_processor"] = LogitsProcessorList([Step(self), *processors])
        with turn.helped():
            output = original(**_ended(given, ids, self.room))
        if not inner and self.steps == before:  # a loop that calls no processor
            self.check_step()
        return output

    def _check_arguments(self, given: Mapping[str, Any]) -> None:
        """Refuses arguments that ``generate`` would accept but not pass to our loop."""
        for argument, advice in LOST.items():
            if given.get(argument) is not None:
                what = f"{self.decoder} decodes in a loop of its own, which gets no {argument}"
                raise IncompatibleDecodersError(what, advice)

    def _check_rows(self, given: Mapping[str, Any]) -> None:
        """Refuses a call that makes more or fewer rows of each sample than were planned for."""
        config = given.get("generation_config") or self.vlm.model.generation_config
        names = ("num_beams", "num_return_sequences")
        asked = {name: int(given.get(name) or getattr(config, name, None) or 1) for name in names}
        name = max(names, key=asked.__getitem__)
        if asked[name] != self.beams:
            raise IncompatibleDecodersError(
                f"{name}={asked[name]} makes {asked[name]} rows of each sample, and {self.decoder} was planned for "
                f"{self.beams}",
                f"give num_beams={asked[name]} to decoder.applied(...), which plans for as many rows",
            )

    def _unplanned(self, wrong: str) -> IncompatibleDecodersError:
        return IncompatibleDecodersError(
            f"{self.decoder} was planned for other inputs: {wrong}",
            "enter a block of decoder.applied(...) for each batch, with the inputs that generate gets",
        )

    def _wrong(self, ids: Tensor | None, given: Mapping[str, Any]) -> str | None:
        """Says how the inputs of a call differ from the planned ones; None when they do not."""
        own = self.batch
        if ids is None:
            return "generate was called without token ids"
        if ids.shape != own["input_ids"].shape:
            rows, length = ids.shape
            return f"{own.rows} rows of {own.length} tokens, and not {rows} of {length}"
        if not _same(own["input_ids"], ids):
            return "their tokens are others, or in another order"
        if "pixel_values" in own and handed("pixels", given) is None and handed("features", given) is None:
            return "they have pictures, and generate was called without"
        changed = [name for name in own if given.get(name) is not None and not _same(own[name], given[name])]
        return f"their {changed[0]} are others, or in another order" if changed else None

    def _longest_answer(self, given: Mapping[str, Any]) -> int:
        """Returns the most tokens that a call may generate in any row."""
        config = given.get("generation_config") or self.vlm.model.generation_config
        new, whole = (given.get(name) or getattr(config, name, None) for name in ("max_new_tokens", "max_length"))
        if new is None:
            new = whole - self.batch.length if whole and whole > self.batch.length else USUAL
        return int(new) if self.room is None else min(int(new), int(self.room.max()))

    def _check_pass(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        """Refuses passes of other threads, and passes over prompts other than the planned ones."""
        if torch.compiler.is_compiling():  # a compiled step has one token, and its call was checked uncompiled
            return
        turn_of(model).check()
        ids, cache = handed("ids", kwargs), handed("cache", kwargs)
        if ids is None or ids.shape[1] < self.batch.length or (cache is not None and caches.length(cache) > 0):
            return
        self.passes += 1
        own, prompt = self.batch["input_ids"].repeat_interleave(self.beams, dim=0), ids[:, : self.batch.length]
        if own.shape == prompt.shape and not _same(own, prompt):
            raise self._unplanned("their tokens are others, or in another order")


def idle(decoder: str, what: str) -> IncompatibleDecodersError:
    """Makes the error of a decoder that did not act, from a clause that says what bypassed it."""
    return IncompatibleDecodersError(
        f"{decoder} did not act: {what}",
        "hand vlmfix.wrap the model whose generate runs, with the modules that transformers gave it",
    )


def longest_prompts(batch: Batch, contrasts: Sequence[Contrast]) -> tuple[int, Tensor]:
    """Returns T', and the real tokens of the longest among each row's prompt and its branches' prompts, (B,)."""
    parts = [batch, *(branch.batch for contrast in contrasts for branch in contrast.branches)]
    return max(part.length for part in parts), torch.stack([part.lengths for part in parts]).amax(dim=0)


def _lengths(ids: Tensor, mask: Tensor | None) -> Tensor:
    return (torch.ones_like(ids) if mask is None else mask).bool().sum(dim=1)


def _ended(given: dict[str, Any], ids: Tensor | None, room: Tensor | None) -> dict[str, Any]:
    """Adds to a call's arguments the criterion that ends rows where the context is full."""
    if room is None or ids is None:
        return given
    full = Full(ids.shape[1], room)
    return given | {"stopping_criteria": StoppingCriteriaList([*(given.get("stopping_criteria") or ()), full])}


def _same(own: Tensor, value: Tensor) -> bool:
    """Returns whether two inputs are equal at the precision of the coarser of their types."""
    if own.shape != value.shape:
        return False
    kind = min(own.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.to(kind), value.to(own.device).to(kind))
