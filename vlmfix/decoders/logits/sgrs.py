"""SGRS: rejects candidate tokens whose saliency over the earlier text is too low, and draws again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmfix.attention.edit import LayerSet
from vlmfix.attention.saliency import after_picture, mean_over, scoring_layers
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.branches import picture_counts
from vlmfix.decoding.draws import RowSampler, gumbel, rounded, seed_of
from vlmfix.decoding.newest import Newest
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

ZEROS, LENIENT, ONE = {"query_row": "candidate"}, {"strictness": 0.0}, {"top_k": 1}
UNJUDGED = (ZEROS, LENIENT, ONE)
"""Where nothing is ever rejected, and no score is computed."""


@dataclass(frozen=True, kw_only=True)
class SGRS(Decoder):
    """Saliency-Guided Rejection Sampling: rejects tokens that owe earlier text too little, compared with recent ones.

    At every step tokens are drawn one after the other, without replacement, from the ``top_k`` most probable ones. For
    a drawn token c, with the attention A (H, K) of the row that predicts it and ``loss = -log softmax(logits)[c]``::

        S = mean over heads |A * d loss / d A|,  Sbar = S / ||S||_2      (K,) per layer
        score(c) = mean over layers, mean over history keys of Sbar        in [0, 1 / sqrt(number of keys)]
        tau = strictness * mean of the last ``window`` committed scores    0 before the first

    The first of at most ``tries`` tokens with ``score >= tau`` is committed; when all are rejected, the one of the
    ``top_k`` with the highest score, and among equals the more probable. History is the text behind the picture, up
    to and with the predicting row (``post_image``), or the answer alone (``generated``, where the first token has none
    and is committed as drawn, without a score). Each row of a batch has scores, draws and rejections of its own.

    Draws are those of ``generate`` when it samples (``temperature > 0`` or ``do_sample=True``, whose temperature and
    nucleus then shape the candidates). Otherwise they are this decoder's: ``sample`` at temperature 1, as published,
    or ``greedy``, always the most probable token that is left.

    In a chain the other methods act in every pass, wherever the gate is named: saliency is that of the attention that
    they left, of the logits that they fused. ``sgrs+locore`` is the paper's full method.

    Args:
        preset: ``paper`` (the method), ``semantic`` (history is the answer alone, as the paper's prose has it and its
            equation has not), or ``official-code`` (the released script: it reads the attention row of the candidate
            itself, which no loss depends on, so every score is 0, nothing is ever rejected and what remains is
            sampling from the ``top_k``).
        strictness: alpha >= 0; 0 rejects nothing.
        top_k: K >= 1, candidates per step; 1 is greedy search.
        tries: R >= 1, draws before the best candidate is taken; from ``top_k`` on, all are tried.
        window: W >= 0, committed scores in the mean; 0 takes all. The paper's formula counts one more.
        scope: Which keys count as history.
        include_self: The predicting row's own key, the token just before, counts as history.
        query_row: ``predictor``, or the released script's ``candidate``.
        layers: Layers of the score; None is the released script's 6:9 (the paper: "middle-to-deep"), and for a model
            with fewer than nine layers the same share of its depth (not in the paper).
        draw: How this decoder draws while ``generate`` does not sample.
        draw_seed: Seed of its draws, together with the row's tokens and pixels.

    *Source*: "Hallucination Begins Where Saliency Drops", ICLR 2026, arXiv 2601.20279, sec. 3, eq. 6-7, algorithm 1;
    code zhangbaijin/LVLMs-Saliency at 05c0d0d, ``do_reject_sample.py``.

    *Differs*: the paper names no value for K, R and W and no layers; these are the released script's. Its "row P" is
    the row that predicts P, because a causal model gives row P no gradient. The norm is the script's, over the row; the
    matrix norm that the paper prints would need every row. A row counts as zero only when it is: the script's smallest
    norm of 1e-9 would make the scores of nearly certain tokens vanish and reject them. Without history a score would be
    1 in the script and raise the threshold for W tokens; here it is left out.

    *Cost*: one pass per token, with a graph of one row from the first of ``layers`` on, and one backward pass per tried
    candidate (for the whole batch, ``top_k`` at most); the prompt's last token passes twice. Memory is linear in the
    prompt. No beams, no compiled decoding, no static cache. ``official-code``, ``strictness=0`` and ``top_k=1`` need no
    backward pass.

    Example:
        >>> SGRS(preset="semantic").scope
        'generated'
    """

    name: ClassVar[str] = "sgrs"
    source: ClassVar[Source] = Source(
        title="Saliency-Guided Rejection Sampling",
        year=2026,
        arxiv="2601.20279",
        code="https://github.com/zhangbaijin/LVLMs-Saliency",
    )
    acts_on: ClassVar[str] = "choice of tokens"
    beams: ClassVar[bool] = False
    compiles: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"scope": "post_image", "query_row": "predictor"},
        "semantic": {"scope": "generated", "query_row": "predictor"},
        "official-code": {"scope": "post_image", "query_row": "candidate"},
    }

    preset: str = parameter(
        "paper", str, choices=("paper", "semantic", "official-code"), help="named set of parameters"
    )
    strictness: float = parameter(
        0.6,
        float,
        low=0,
        high=100,
        search=(0.05, 1.2),
        log=True,
        idle=(ZEROS, ONE),
        help="alpha, least score as a share of recent ones",
    )
    top_k: int = parameter(5, int, low=1, high=1000, search=(1, 10), help="K, candidates per step")
    tries: int = parameter(
        3, int, low=1, high=1000, search=(1, 5), idle=UNJUDGED, help="R, draws before the best score is taken"
    )
    window: int = parameter(
        5, int, low=0, high=10**6, search=(1, 20), log=True, idle=UNJUDGED, help="W, recent scores; 0: all"
    )
    scope: str = parameter(
        None,
        str,
        choices=("post_image", "generated"),
        search=("post_image", "generated"),
        idle=UNJUDGED,
        help="which keys count as history",
    )
    include_self: bool = parameter(True, bool, idle=UNJUDGED, help="the predicting row's own key counts as history")
    query_row: str = parameter(
        None,
        str,
        choices=("predictor", "candidate"),
        idle=(LENIENT, ONE),
        help="row of attention that is read; candidate reads zeros",
    )
    layers: LayerSet | None = parameter(
        None,
        LayerSet,
        optional=True,
        idle=UNJUDGED,
        help="layers of the score; none: 6:9, or the same share of a shallow model",
    )
    draw: str = parameter(
        "sample",
        str,
        choices=("sample", "greedy"),
        search=("sample", "greedy"),
        help="order of candidates when generate does not sample",
    )
    draw_seed: int = parameter(0, int, low=0, high=2**31 - 1, idle=({"draw": "greedy"}, ONE), help="seed of the draws")

    @property
    def judges(self) -> bool:
        """Returns whether a score can reject anything; if not, no score is computed."""
        return self.query_row == "predictor" and self.strictness > 0 and self.top_k > 1

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans a gate, which reads the saliency of its layers unless nothing can be rejected."""
        history = layout.tokens.shape[1] - after_picture(layout)  # (B,)
        if self.scope == "generated":
            history = torch.zeros_like(history)
        gate = RejectionGate(settings=self, seeds=_row_seeds(vlm, batch, self.draw_seed), history=history)
        asks = self.layers or scoring_layers(vlm.layers)
        return DecodingPlan(gate=gate, asks=asks if self.judges else None, beams=False)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Holds the tokens that each row may take, in the order of drawing; k is ``top_k`` or the vocabulary.

    Attributes:
        tokens: (B, k) int64.
        scores: (B, k) their processed scores, -inf for tokens that are forbidden; these stand last.
    """

    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RejectionGate:
    """Starts the rejection sampling of a call; the gate of a plan.

    Attributes:
        settings: The method.
        seeds: A seed per row, for draws of its own.
        history: (B,) int64, number of each prompt's last tokens that are history.
    """

    settings: SGRS
    seeds: Sequence[int]
    history: Tensor

    def __call__(self, newest: Newest | None, processors: Sequence[LogitsProcessor], *, sampling: bool) -> Rejection:
        """Starts a call; see ``Gate``.

        Raises:
            IncompatibleDecodersError: ``draw=greedy`` while tokens are to be drawn.
        """
        return Rejection(self, newest, Draws(self.settings, processors, self.seeds, sampling=sampling))


class Rejection:
    """Chooses the tokens of one call; see ``Gated``.

    Args:
        plan: The gate.
        newest: The newest step with its graph; None when nothing can be rejected.
        draws: Makes the candidates.
    """

    def __init__(self, plan: RejectionGate, newest: Newest | None, draws: Draws) -> None:
        self._settings, self._history = plan.settings, plan.history
        self._newest, self._draws, self._memory = newest, draws, Memory(plan.settings, len(plan.seeds))

    def __call__(self, scores: Tensor) -> Tensor:
        """Chooses (B,) int64 tokens from (B, V) float32 scores."""
        nothing = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)  # no draw reads it
        return self.chosen(nothing, scores, torch.ones(len(scores), dtype=torch.bool, device=scores.device))[1]

    def keep(self, samples: Tensor) -> None:
        """Keeps some of the samples, (S,) int64 numbers of the present ones."""
        self._history = self._history[samples]
        self._draws.keep(samples)
        self._memory.keep(samples)

    def chosen(self, said: Tensor, scores: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, V) processed scores and (B,) int64 tokens; see ``Gated``."""
        processed, candidates = self._draws(said, scores)
        if self._newest is None:
            return processed, candidates.tokens[:, 0]
        return processed, self._judged(self._newest, candidates, going)

    def _judged(self, newest: Newest, candidates: Candidates, going: Tensor) -> Tensor:
        """Commits a token of each row, (B,), and adds its score to the memory."""
        column = torch.arange(newest.keys, device=going.device)
        history = column >= newest.keys - self._history[:, None]  # (B, K)
        if not self._settings.include_self:
            history = history & (column < newest.keys - 1)
        judged = going & history.any(dim=1)

        def score(place: int, wanted: Tensor) -> Tensor:
            return mean_over(newest.saliency(candidates.tokens[:, place], wanted), history)

        thresholds = self._memory.thresholds(going.device)
        picked, scores = gate(candidates.scores, thresholds, judged, self._settings.tries, score)
        self._memory.add(scores, judged)
        self._history = self._history + 1  # counts the token chosen now
        return candidates.tokens.gather(1, picked[:, None])[:, 0]


def gate(
    scores: Tensor, thresholds: Tensor, judged: Tensor, tries: int, score: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Tries the candidates of every row in order, until one is good enough or the tries are used up.

    Args:
        scores: (B, k) log-probabilities of the candidates up to a constant, in the order of trial; -inf stands last.
        thresholds: (B,) tau.
        judged: (B,) bool; elsewhere the first candidate is taken.
        tries: R.
        score: Given a place in the order and the rows that need its score, (B,) bool, returns (B,) saliency scores.
            It is called at most once for each candidate.

    Returns:
        (B,) int64 place of the committed candidate, and (B,) float64 its saliency score, NaN where none was computed.
    """
    found = torch.full(scores.shape, float("nan"), dtype=torch.float64, device=scores.device)  # (B, k)
    picked = torch.zeros_like(judged, dtype=torch.long)
    rejected = judged
    for place in range(scores.shape[1]):
        wanted = rejected & (scores[:, place] > float("-inf"))
        if not bool(wanted.any()):
            break
        found[:, place] = torch.where(wanted, score(place, wanted).double(), float("nan"))
        if place < tries:  # after the last try, the rest competes for the best score only
            accepted = wanted & (found[:, place] >= thresholds)
            picked = torch.where(accepted, place, picked)
            rejected = rejected & ~accepted
    known = found.nan_to_num(nan=-1.0)  # a score that is not a number is worse than any
    best = known == known.amax(dim=1, keepdim=True)
    picked = torch.where(rejected, torch.where(best, scores, float("-inf")).argmax(dim=1), picked)
    return picked, found.gather(1, picked[:, None])[:, 0]


class Memory:
    """Remembers the saliency scores of committed tokens, row by row.

    Args:
        settings: The method.
        rows: B.
    """

    def __init__(self, settings: SGRS, rows: int) -> None:
        self.settings = settings
        self.scores: list[list[float]] = [[] for _ in range(rows)]

    def thresholds(self, device: torch.device) -> Tensor:
        """Computes tau of each row, (B,) float64; 0 without a score."""
        recent = [scores[-self.settings.window :] for scores in self.scores]  # -0 takes all
        values = [self.settings.strictness * sum(scores) / len(scores) if scores else 0.0 for scores in recent]
        return torch.tensor(values, dtype=torch.float64, device=device)

    def add(self, scores: Tensor, rows: Tensor) -> None:
        """Adds (B,) scores of the given (B,) rows; it leaves out scores that are not numbers."""
        for own, score, judged in zip(self.scores, scores.tolist(), rows.tolist(), strict=True):
            if judged and not math.isnan(score):
                own.append(score)

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows, (R,) int64 numbers of the present ones."""
        self.scores = [self.scores[number] for number in rows.tolist()]


class Draws:
    """Makes the candidates, in the order in which they are drawn.

    The order of scores with Gumbel noise is that of draws without replacement, each from the remaining tokens.

    Args:
        settings: The method.
        processors: All processors of the scores; those that sample decide the order and not the candidates.
        seeds: A seed per row.
        sampling: Whether ``generate`` was told to sample by transformers' own draw.

    Raises:
        IncompatibleDecodersError: ``draw=greedy`` while ``generate`` samples.
    """

    def __init__(
        self, settings: SGRS, processors: Sequence[LogitsProcessor], seeds: Sequence[int], *, sampling: bool
    ) -> None:
        self.settings, self.sampling = settings, sampling
        self.drawing = [processor for processor in processors if isinstance(processor, RowSampler)]
        self.processors = [processor for processor in processors if not isinstance(processor, RowSampler)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if settings.draw == "greedy" and (sampling or self.drawing):
            raise IncompatibleDecodersError(
                "sgrs: draw=greedy takes the most probable token first, but generate was told to sample",
                "use draw=sample, or neither temperature nor do_sample",
            )

    def __call__(self, input_ids: Tensor, logits: Tensor) -> tuple[Tensor, Candidates]:
        """Returns the (B, V) processed scores without noise, and the candidates among them."""
        scores = logits
        for processor in self.processors:
            scores = processor(input_ids, scores)
        top = scores.topk(min(self.settings.top_k, scores.shape[1]), dim=1)
        order = self._noisy(input_ids, scores, top.values, top.indices).argsort(dim=1, descending=True, stable=True)
        return scores, Candidates(top.indices.gather(1, order), top.values.gather(1, order))

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows, (R,) int64 numbers of the present ones."""
        self.generators = [self.generators[number] for number in rows.tolist()]
        for processor in self.drawing:
            processor.keep(rows)

    def _noisy(self, input_ids: Tensor, scores: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
        """Adds the noise of whoever draws to the candidates' values, (B, k)."""
        if self.drawing:
            for processor in self.drawing:
                scores = processor(input_ids, scores)
            return scores.gather(1, tokens)
        if self.sampling:
            return values + gumbel(torch.rand_like(values))
        if self.settings.draw == "greedy":
            return values
        uniform = torch.stack([torch.rand(values.shape[1], generator=one) for one in self.generators])
        return values + gumbel(uniform.to(values.device))


def _row_seeds(vlm: Checkpoint, batch: Batch, seed: int) -> list[int]:
    """Makes a seed for each row from its tokens and pixels, independent of its neighbours."""
    told = zip(batch["input_ids"].cpu(), batch.attention_mask.bool().cpu(), strict=True)
    contents = [[ids[mask].numpy().tobytes()] for ids, mask in told]
    pixels = batch.get("pixel_values")
    if pixels is not None:
        owners = vlm.family.pixel_rows(vlm.model, batch, picture_counts(vlm, batch)).to(pixels.device)
        for row, content in enumerate(contents):
            mine = pixels[owners == row].to(torch.bfloat16)
            if mine.dim() == 5:  # (n, tiles, channels, height, width), filled up with empty tiles to the batch's most
                mine = mine.flatten(0, 1)
                mine = mine[(mine != 0).flatten(1).any(dim=1)]
            content.append(rounded(mine))
    return [seed_of(seed, content) for content in contents]
