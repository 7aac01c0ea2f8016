"""Chooses gains and heads by trying them: on labelled questions, or without labels by the entropy of the answer.

A *measure* judges each trial: a function from a decoder to one number per sample (or per task), higher being better,
always over the same samples. With labels it tells whether the answer is right; without, use ``certainty``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from vlmfix.decoders.attention.act import ACT, Heads, write_heads
from vlmfix.decoders.attention.zerotuning import ZeroTuning
from vlmfix.decoders.base import Decoder, Greedy
from vlmfix.errors import UsageError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.upstream import defaults

Measure = Callable[[Decoder], Sequence[float]]
"""Function from a decoder to one number per sample; higher is better."""
GAINS = tuple(2 ** (step / 2) for step in range(-6, 7))
"""Gains that ``choose_gain`` tries: 1/8 to 8 in steps of a factor sqrt(2)."""


@dataclass(frozen=True)
class Gain:
    """Compares a change with none, over the same samples.

    Attributes:
        mean: Mean difference of the measure.
        error: Its standard error.
    """

    mean: float
    error: float

    @property
    def certain(self) -> bool:
        """Returns whether the change is better by more than one standard error."""
        return self.mean > self.error


def certainty(vlm: Checkpoint, batches: Sequence[Batch]) -> Measure:
    """Makes a measure without labels: minus the entropy of the answer's first token, in nats.

    Args:
        vlm: The model.
        batches: Encoded questions; 50 to 100 rows in all.
    """
    model: Any = vlm.model

    @torch.no_grad()
    def measure(decoder: Decoder) -> list[float]:
        found: list[float] = []
        for batch in batches:
            with decoder.applied(vlm, batch) as arguments, defaults.undisturbed(model):
                output = model.generate(
                    **batch,
                    **arguments,
                    do_sample=False,
                    max_new_tokens=1,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            log = output.logits[0].float().log_softmax(dim=-1)  # (B, V)
            found += (log.exp() * log).nan_to_num().sum(dim=-1).tolist()  # a cut token adds nothing
        return found

    return measure


@dataclass(frozen=True)
class GainChoice:
    """Holds the result of ``choose_gain``.

    Attributes:
        decoder: The method with the chosen gain; 1 when no gain beats it by more than a standard error.
        gains: Every tried gain, compared with gain 1.
    """

    decoder: ZeroTuning
    gains: dict[float, Gain]


def choose_gain(measure: Measure, *, method: ZeroTuning | None = None, gains: Sequence[float] = GAINS) -> GainChoice:
    """Finds the gain of ZeroTuning with the best mean.

    Args:
        measure: Judges a decoder.
        method: Its heads and layers are kept; None is all of them.
        gains: Gains to try.

    Raises:
        UsageError: The measure has fewer than two samples.
    """
    method = method or ZeroTuning()
    plain = measure(Greedy())
    tried = {gain: _gain(measure(replace(method, gain=gain)), plain) for gain in gains}
    best = max(tried, key=lambda gain: tried[gain].mean)
    return GainChoice(replace(method, gain=best if tried[best].certain else 1.0), tried)


@dataclass(frozen=True)
class HeadKinds:
    """Sorts heads by whether one alone helps when it attends more to the first token, in all layers.

    Attributes:
        up: Heads that help, the most helpful first; tune them with a gain above 1.
        down: Heads that hurt, the most harmful first; tune them with a gain below 1.
        gains: The measured effect of every head.
    """

    up: tuple[int, ...]
    down: tuple[int, ...]
    gains: dict[int, Gain]

    @property
    def dominant(self) -> tuple[int, ...]:
        """Returns the larger kind: the heads to tune."""
        return max(self.up, self.down, key=len)


def classify_heads(
    measure: Measure, vlm: Checkpoint, *, gain: float = 2.0, method: ZeroTuning | None = None
) -> HeadKinds:
    """Tells ZeroTuning's two kinds of heads apart, with one run per query head.

    Args:
        measure: Judges a decoder.
        vlm: The model that the measure runs.
        gain: Above 1, the gain at which heads are compared.
        method: Its layers are kept; None is all of them.

    Raises:
        UsageError: The measure has fewer than two samples, or the gain is not above 1.
    """
    if gain <= 1:
        raise UsageError(f"gain={gain} is not allowed", "heads are compared at a gain above 1, such as 2")
    method, plain = method or ZeroTuning(), measure(Greedy())
    gains = {head: _gain(measure(replace(method, gain=gain, heads=(head,))), plain) for head in range(vlm.heads)}
    order = sorted(gains, key=lambda head: -gains[head].mean)
    up = tuple(head for head in order if gains[head].mean > 0)
    down = tuple(head for head in reversed(order) if gains[head].mean < 0)
    return HeadKinds(up, down, gains)


@dataclass(frozen=True)
class HeadSearch:
    """Holds the result of ``search_heads``.

    Attributes:
        heads: Heads to calibrate, as ``ACT(heads=...)`` takes them; None when none is certain, or when together they
            are no better than none.
        gains: The measured effect of every head.
        together: The effect of all kept heads at once; None when there are none.
    """

    heads: str | None
    gains: dict[tuple[int, int], Gain]
    together: Gain | None


def search_heads(
    measure: Measure, vlm: Checkpoint, *, method: ACT | None = None, largest_share: float = 0.2
) -> HeadSearch:
    """Finds the heads that ACT should calibrate, with one run per layer and head.

    A head is kept when it alone makes the measure better by more than one standard error; when too many do, the best
    are kept. The authors released neither their margin nor how they merge tasks; this rule is this package's.

    Args:
        measure: Judges a decoder; this search means little without labels.
        vlm: The model that the measure runs.
        method: Its layers and thresholds are kept; None is the method's defaults.
        largest_share: Largest share of all heads to keep, in [0, 1].

    Raises:
        UsageError: The measure has fewer than two samples.
    """
    method = method or ACT(heads="all")
    count, width = vlm.layers, vlm.heads
    pairs = list(product(sorted(method.layers.resolve(count)), range(width)))
    plain = measure(Greedy())

    def worth(heads: Heads) -> Gain:
        return _gain(measure(replace(method, heads=write_heads(heads))), plain)

    gains = {pair: worth(frozenset({pair})) for pair in pairs}
    kept = sorted((pair for pair in pairs if gains[pair].certain), key=lambda pair: -gains[pair].mean)
    kept = kept[: math.floor(largest_share * count * width)]
    together = worth(frozenset(kept)) if kept else None
    better = together is not None and together.mean > 0
    return HeadSearch(write_heads(kept) if better else None, gains, together)


def _gain(values: Sequence[float], plain: Sequence[float]) -> Gain:
    if len(values) != len(plain) or len(plain) < 2:
        raise UsageError(
            f"the measure gave {len(values)} numbers, and {len(plain)} for plain decoding",
            "give one number per sample, for the same two samples or more every time",
        )
    difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(plain, dtype=torch.float64)
    return Gain(float(difference.mean()), float(difference.std()) / math.sqrt(len(difference)))
