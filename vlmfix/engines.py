"""The two ways in which a batch is decoded: our own loop over the model's passes, and the model's own ``generate``."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vlmfix.answer import Found
from vlmfix.decoders import Strategy
from vlmfix.decoding.choice import Choice, Drawn, MostProbable
from vlmfix.decoding.draws import drawing
from vlmfix.decoding.encoding import generation_inputs
from vlmfix.decoding.loop import Said, decode
from vlmfix.decoding.plan import Gate
from vlmfix.decoding.repetition import Repetition, RepetitionPenalty, Unrepeated
from vlmfix.decoding.running import Running
from vlmfix.decoding.spelling import Pieces, Spelling
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.request import Request
from vlmfix.upstream import defaults


def decoded(
    vlm: Checkpoint,
    call: Running,
    gate: Gate | None,
    request: Request,
    batch: Batch,
    streamer: Pieces | None,
    left: threading.Event | None,
) -> list[Found]:
    """Decodes a batch in our own loop, with tokens chosen as the request says.

    Args:
        vlm: The model.
        call: The batch's passes.
        gate: What else decides on tokens; None for nothing.
        request: What is asked for.
        batch: The model's inputs.
        streamer: Gets the tokens of the one answer as they come, and is told its end.
        left: Set when nobody reads any more.

    Returns:
        What was said in each of B rows.
    """
    ids: list[list[int]] = [[] for _ in request.rows]
    broken: list[list[int]] = [[] for _ in request.rows]
    sure: list[list[tuple[float, float]]] = [[] for _ in request.rows]
    alone: list[list[bool]] = [[] for _ in request.rows]
    draws = _draws(vlm, request)
    choice: Choice = Drawn(draws) if draws else MostProbable()
    if gate is not None:
        choice = gate(call.newest, draws, sampling=False)
    if request.repetition_penalty != 1:
        penalty = request.repetition_penalty
        choice = Unrepeated(choice, Repetition(penalty, batch["input_ids"], batch.attention_mask))
    if request.listener is not None:
        choice = request.listener.following(choice)
    stops = request.stops
    spelled = [Spelling(vlm.processor.tokenizer, stops) for _ in request.rows] if stops else []
    unwanted: set[int] = set()
    for step, said in enumerate(decode(call, choice, defaults.ends(vlm.model), unwanted)):
        for sample, token, odd in zip(said.samples, said.tokens, said.broken, strict=True):
            ids[sample].append(token)
            broken[sample] += [step] * odd
        for sample, *numbers in zip(said.samples, said.logprobs, said.entropies, strict=True):
            sure[sample].append((numbers[0], numbers[1]))
        for sample, left_alone in zip(said.samples, said.alone, strict=bool(said.alone)):
            alone[sample].append(left_alone)
        if spelled:
            unwanted.update(_stopped(spelled, said))
        if streamer is not None:
            streamer.put(torch.tensor(said.tokens))
        if left is not None and left.is_set():
            break
        if request.listener is not None:
            unwanted.update(request.listener.said(said))
    if streamer is not None:
        streamer.end()
    return [
        Found(tuple(own), odd, sure=both, alone=left_alone)
        for own, odd, both, left_alone in zip(ids, broken, sure, alone, strict=True)
    ]


@torch.no_grad()
def generated(
    vlm: Checkpoint,
    request: Request,
    batch: Batch,
    given: Mapping[str, Any],
    room: Tensor | None,
    streamer: Pieces | None,
    left: threading.Event | None,
) -> list[Found]:
    """Decodes a batch by the model's own ``generate``: with a static cache, or in a block of ``applied``.

    Args:
        vlm: The model, in a block that has put the request's decoder to work.
        request: What is asked for.
        batch: The model's inputs.
        given: What the block wants ``generate`` to be given.
        room: (B,) tokens that the model's context has room for behind each prompt; None for any number.
        streamer: Gets the tokens of the one answer as they come, and is told its end.
        left: Set when nobody reads any more.

    Returns:
        What was said in each of B rows.
    """
    model: Any = vlm.model
    watch, most = NumberWatch(batch.length), max(request.limits)
    own: dict[str, Any] = {"max_new_tokens": most, **Strategy(num_beams=request.strategy.num_beams).arguments()}
    # A decoder that samples lets transformers draw, here each row does.
    penalty = request.repetition_penalty
    lower = [] if penalty == 1 else [RepetitionPenalty(penalty, batch["input_ids"], batch.attention_mask)]
    own["logits_processor"] = LogitsProcessorList([watch, *lower, *_draws(vlm, request)])
    if request.static_cache:
        own["cache_implementation"] = "static"
    if left is not None:
        own["stopping_criteria"] = StoppingCriteriaList([_Left(left)])
    if streamer is not None:
        streamer.skip_prompt = True  # which transformers, and loops, put first
        # transformers hands its own streamer to no loop, so a loop takes it under another name
        own["token_streamer" if "custom_generate" in given else "streamer"] = streamer
    with defaults.undisturbed(model):
        sequences: Tensor = model.generate(**generation_inputs(vlm, batch), **dict(given) | own)
    limits = request.limits
    cut = limits if room is None else [min(pair) for pair in zip(limits, room.tolist(), strict=True)]
    answers = zip(sequences[:, batch.length :].tolist(), watch.steps(batch.rows), cut, limits, strict=True)
    return [Found(tuple(ids[:end]), broken, full=len(ids) >= end < limit) for ids, broken, end, limit in answers]


def _draws(vlm: Checkpoint, request: Request) -> list[LogitsProcessor]:
    """Makes what turns the greatest score into a draw of each row's own; nothing for a request that does not draw."""
    kind = request.strategy
    if kind.temperature == 0:
        return []
    return drawing(request.row_seeds(), vlm.device, temperature=kind.temperature, top_p=kind.top_p, top_k=kind.top_k)


def _stopped(spelled: Sequence[Spelling], said: Said) -> Iterator[int]:
    """Spells the newest token of each sample, and gives the samples in which a text that ends the answer has come."""
    for sample, token in zip(said.samples, said.tokens, strict=True):
        spelled[sample].add(token)
        if spelled[sample].stopped:
            yield sample


class _Left(StoppingCriteria):
    """Ends generation when nobody reads any more."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(B,) bool, all True once the reader has left."""
        return torch.full(input_ids.shape[:1], self._left.is_set(), dtype=torch.bool, device=input_ids.device)


class NumberWatch(LogitsProcessor):
    """Remembers at which steps scores were NaN or +inf; it changes nothing, and the device is not waited for.

    Args:
        prompt: T, number of prompt tokens, padding included.
    """

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self._seen: list[tuple[int, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Looks at (B, V) scores."""
        self._seen.append((input_ids.shape[1] - self.prompt, ~(scores < math.inf).all(dim=1)))  # (B,)
        return scores

    def steps(self, samples: int) -> list[list[int]]:
        """For each sample, the steps, from 0, at which scores of its row, or of one of its beams, were no numbers."""
        flags = torch.stack([flag for _, flag in self._seen]).view(len(self._seen), samples, -1).any(dim=2).tolist()
        places = [place for place, _ in self._seen]
        return [[place for place, flag in zip(places, flags, strict=True) if flag[row]] for row in range(samples)]
