"""Times ways of answering in turns: in every round each of them is asked, so that a machine's drift meets all alike."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from PIL import Image

from vlmfix.bench.shapes import QUESTION
from vlmfix.decoders import Decoder, Greedy
from vlmfix.decoders.picture.refined import PictureMemo
from vlmfix.decoding.graphs import forget
from vlmfix.decoding.running import RECORDING
from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.generation import VLM
from vlmfix.models.places import device_named
from vlmfix.skips import Skips
from vlmfix.upstream.memory import peak_of

Way = Literal["vlmfix", "transformers"]
"""Whose loop decodes."""
SHORT = 12
"""Least tokens of the short answer; shorter ones are not recorded."""
LEAST = SHORT + 4
"""Least tokens of the long answer."""
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Bytes that are copied to measure a device's bandwidth: more than its caches hold."""
COPIES = 5


@dataclass(frozen=True)
class Said:
    """One answer.

    Attributes:
        ids: Its tokens.
        skipped: How many of them a contrast left to the clean row; None without a rule that leaves any.
    """

    ids: Sequence[int]
    skipped: int | None = None


@dataclass(frozen=True)
class Arm:
    """One way of answering.

    Attributes:
        name: What tables call it.
        decoder: The decoder with all its parameters.
        way: Whose loop decodes; an arm is compared with the plain one of the same way.
        plain: Whether it is that one.
        answer: Answers ``QUESTION`` about each of some pictures with so many tokens.
    """

    name: str
    decoder: str
    way: Way
    plain: bool
    answer: Callable[[VLM, Sequence[Image.Image], int], Sequence[Said]]


@dataclass
class Timed:
    """An arm with a number of rows, and what was measured of it.

    Attributes:
        arm: The arm.
        rows: Questions that are answered at once.
        begins: Whether the arm answers for the first time; its warm-up is measured then.
        cold: Seconds of the arm's first answer, a long one.
        first: Seconds until the first token, one for each round.
        short: Seconds of the short answer.
        long: Seconds of the long answer.
        memory: Most bytes that torch held above the model's weights.
        skips: Tokens of the answers, the long and the short, that a contrast left to the clean row.
        error: Why it cannot be measured.
    """

    arm: Arm
    rows: int
    begins: bool = False
    cold: float | None = None
    first: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)
    memory: int | None = None
    skips: Skips = field(default_factory=Skips)
    error: str | None = None


@dataclass(frozen=True)
class Task:
    """What every arm is asked.

    Attributes:
        vlm: The model.
        pictures: One for each row of the largest number of rows.
        tokens: Tokens of the long answer, ``LEAST`` or more.
    """

    vlm: VLM
    pictures: Sequence[Image.Image]
    tokens: int

    @property
    def short(self) -> int:
        """Tokens of the short answer."""
        return max(SHORT, self.tokens // 4)


@dataclass(frozen=True)
class Measured:
    """What is known after a round.

    Attributes:
        timed: Every arm with every number of rows.
        bandwidth: Bytes per second that the device reads and writes, one for each round.
        finished: Whether no round is left.
    """

    timed: Sequence[Timed]
    bandwidth: Sequence[float]
    finished: bool


def measured(
    task: Task,
    arms: Sequence[Arm],
    rows: Sequence[int],
    *,
    rounds: int,
    until: float = math.inf,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Measured]:
    """Measures all arms, round by round.

    Args:
        task: What they are asked.
        arms: The arms.
        rows: Numbers of rows.
        rounds: How often each arm with each number of rows is measured.
        until: When, on ``time.monotonic``, no new measurement begins.
        report: Told how many measurements are done, and how many there are.

    Yields:
        What is known, after each round; the last may be cut short.
    """
    timed = [Timed(arm, count, begins=count == rows[0]) for count in rows for arm in arms]
    total, counted = rounds * len(timed), itertools.count(1)
    bandwidths: list[float] = []
    gc.freeze()  # what is there now need not be searched through before every turn
    try:
        for number in range(1, rounds + 1):
            bandwidths.append(bandwidth(task.vlm.device))
            for one in timed:
                if time.monotonic() >= until:
                    yield Measured(timed, bandwidths, finished=False)
                    return
                if one.error is None:
                    _take_turn(task, one)
                report(next(counted), total)
            yield Measured(timed, bandwidths, finished=number == rounds)
    finally:
        gc.unfreeze()


def _take_turn(task: Task, one: Timed) -> None:
    """Measures one arm with its number of rows once; what keeps it from answering is noted."""
    gc.collect()  # what the arm before has left is no part of this one's memory
    try:
        _measure(task, one)
    except Exception as error:  # of whatever package: the other arms can still be measured
        one.error = reason(error)
        error.with_traceback(None)  # a frame that holds its error would keep its tensors alive
    if one.error is not None and task.vlm.device.type == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, VlmfixError):
        return error.message
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _measure(task: Task, one: Timed) -> None:
    device = task.vlm.device
    asked = partial(_seconds, task.vlm, one, task.pictures[: one.rows])
    begins, records = not one.long, one.arm.way == "vlmfix" and device.type in RECORDING
    forget(task.vlm.model)  # the memory of other arms' recorded steps is none of this one's
    if begins and one.begins:
        one.cold = asked(task.tokens)
    elif records:
        asked(task.tokens)
    if records or (begins and not one.begins):
        asked(task.short)  # kernels are chosen by the number of rows, steps are recorded by the length of an answer
    if begins and device.type != "cuda":
        one.memory = peak_of(lambda: asked(task.short))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, short, long = (asked(tokens) for tokens in (1, task.short, task.tokens))
    one.first.append(first)
    one.short.append(short)
    one.long.append(long)
    if device.type == "cuda":
        above = torch.cuda.max_memory_allocated(device) - weight_bytes(task.vlm)
        one.memory = max(above, one.memory or 0)


def _seconds(vlm: VLM, one: Timed, pictures: Sequence[Image.Image], tokens: int) -> float:
    """Seconds of one call, whose skips are counted; what refining decoders know of the pictures is forgotten before.

    Raises:
        DataError: An answer has another length than was asked for.
    """
    fresh = replace(vlm, memo=PictureMemo())
    _wait(vlm.device)
    started = time.perf_counter()
    answers = one.arm.answer(fresh, pictures, tokens)
    _wait(vlm.device)
    seconds = time.perf_counter() - started
    for said in answers:
        one.skips.count(said.skipped, len(said.ids))
    if odd := [len(said.ids) for said in answers if len(said.ids) != tokens]:
        raise DataError(f"an answer ends after {odd[0]} of {tokens} tokens", "take fewer --tokens, or a shorter prompt")
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(name: str, decoder: Decoder) -> Arm:
    """The arm of a decoder by ``vlm.generate``, as the commands answer.

    Args:
        name: What tables call it.
        decoder: The decoder.
    """

    def answer(vlm: VLM, pictures: Sequence[Image.Image], tokens: int) -> list[Said]:
        answers = vlm.generate(pictures, QUESTION, decoder=decoder, max_new_tokens=tokens)
        return [Said(found.ids, found.skipped) for found in answers]

    return Arm(name, decoder.spec(), "vlmfix", isinstance(decoder, Greedy), answer)


def refuse_other_device(name: str) -> None:
    """Makes sure that a device can be measured, before a model is made there.

    Args:
        name: As ``Checkpoint.load`` takes it.

    Raises:
        UsageError: There is no such device, or it is neither a GPU that speaks CUDA nor the CPU.
    """
    if (device := device_named(name)).type not in COPIED:
        raise UsageError(f"device {device} cannot be measured", "use cuda or cpu")


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a device reads and writes when it copies a large tensor, median of some copies."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(COPIES):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds)


def weight_bytes(vlm: VLM) -> int:
    """Bytes of all weights and buffers of a model."""
    return sum(part.nbytes for part in (*vlm.model.parameters(), *vlm.model.buffers()))


def step_bytes(vlm: VLM) -> int:
    """Bytes of the weights that a decoding step reads: the text decoder's and the output's.

    Of the table of embeddings a step reads one line per row, so it counts only where the output shares it.
    """
    table = vlm.model.get_input_embeddings().get_parameter("weight")
    read = [weight for weight in vlm.family.decoder(vlm.model).parameters() if weight is not table]
    return sum(weight.nbytes for weight in (*read, *vlm.model.get_output_embeddings().parameters()))
