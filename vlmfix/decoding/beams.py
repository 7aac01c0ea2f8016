"""Searches with beams: several answers to each prompt grow in parallel, and the best mean log-probability wins.

It finds what transformers' search finds with its defaults (``length_penalty=1``, ``early_stopping=False``): the score
of an answer is the sum of its log-probabilities over the number of its tokens, end token included; and a sample is done
when no growing answer is better by that measure than the worst of its ``beams`` ended ones. Contrasts act on the scores
before they become log-probabilities, and a beam's branches and edits move with it. The prompt passes once per sample.

Shape letters (``docs/notation.md``): B samples that go on, V vocabulary; here also C candidates.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch

from vlmfix.decoding.loop import broken
from vlmfix.decoding.repetition import Repetition
from vlmfix.decoding.running import Running


@dataclass(eq=False)
class Search:
    """Holds the state of the search for one sample.

    Attributes:
        number: Number of the sample in the batch.
        beams: Most ended answers that the search keeps.
        growing: The unfinished answers, one for each beam.
        ended: The best ended answers with their scores, at most ``beams``.
        broken: Steps, from 0, at which scores were not numbers.
    """

    number: int
    beams: int
    growing: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    ended: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)

    def end(self, score: float, tokens: tuple[int, ...]) -> None:
        """Adds an ended answer; of equal scores the earlier one ranks first."""
        self.ended = heapq.nlargest(self.beams, [*self.ended, (score, tokens)], key=lambda pair: pair[0])

    def is_done(self, best: float) -> bool:
        """Returns whether the best growing answer, of score ``best``, can no longer improve the ended ones."""
        return len(self.ended) == self.beams and best <= self.ended[-1][0]

    @property
    def answer(self) -> tuple[int, ...]:
        """Returns the best ended answer."""
        return self.ended[0][1]

    @property
    def score(self) -> float:
        """Returns the score of the best ended answer."""
        return self.ended[0][0]


def search(call: Running, beams: int, ends: Collection[int], repetition: Repetition | None = None) -> list[Search]:
    """Searches for the best answer to each prompt.

    Args:
        call: The samples at work.
        beams: Answers that grow side by side, at least 2.
        ends: Tokens that end an answer; an answer without room for more tokens ends too.
        repetition: Lowers log-probabilities of what was said; None for none.

    Returns:
        The finished search of each sample.
    """
    samples = len(call.room)
    every = [Search(number, beams) for number in range(samples)]
    scores = call.prompt()  # (B, V), from here on (B * beams, V)
    spread = torch.arange(samples, device=scores.device).repeat_interleave(beams)
    call.keep(spread, width=beams)
    sums = scores.new_zeros(samples, 1)  # (B, beams)
    going, step = every, 0
    while going:
        step += 1
        for place, odd in enumerate(broken(scores).tolist()):
            searched = going[place * len(going) // len(scores)]
            searched.broken += [step - 1] * odd
        logs = scores.log_softmax(dim=-1)
        if repetition is not None:
            logs = repetition.lowered(logs)
        totals = logs.view(len(going), -1, scores.shape[-1]) + sums[..., None]  # (B, beams, V)
        # Each beam can end with each end token: this many candidates leave ``beams`` that go on.
        count = min(max(2, 1 + len(ends)) * beams, totals[0].numel())
        values, places = totals.flatten(1).topk(count)  # (B, C)
        lines, tokens, kept, stay = [], [], [], []
        for row, one in enumerate(going):
            candidates = zip(values[row].tolist(), places[row].tolist(), strict=True)
            last = step == call.room[one.number]
            grown = _grow(one, candidates, totals.shape[-1], ends, step, last=last)
            if not last and not one.is_done(grown[0][0] / step):
                stay.append(one)
                lines += [row * beams + beam for _, beam, _ in grown]
                tokens += [token for _, _, token in grown]
                kept.append([total for total, _, _ in grown])
        going, sums = stay, torch.tensor(kept, device=scores.device)
        if going:
            chosen, newest = (torch.tensor(numbers, device=scores.device) for numbers in (lines, tokens))
            if repetition is not None:
                repetition.keep(spread[chosen] if step == 1 else chosen)  # of a sample, before it has beams
                repetition.add(newest)
            call.keep(chosen, width=beams)
            scores = call.token(newest)
    return every


def _grow(
    one: Search,
    candidates: Iterable[tuple[float, int]],
    vocabulary: int,
    ends: Collection[int],
    step: int,
    *,
    last: bool,
) -> list[tuple[float, int, int]]:
    """Lets a sample's answers grow by a token.

    Args:
        one: The sample.
        candidates: Sum of log-probabilities, and beam times vocabulary plus token; the best first.
        vocabulary: V.
        ends: Tokens that end an answer.
        step: Tokens of the grown answers.
        last: Whether the grown answers have no room for more tokens.

    Returns:
        For each answer that goes on, its sum, the beam that it continues, and its new token; the best first.
    """
    grown: list[tuple[float, int, int]] = []
    answers: list[tuple[int, ...]] = []
    for rank, (total, place) in enumerate(candidates):
        beam, token = divmod(place, vocabulary)
        answer = (*one.growing[beam], token)
        if last or token in ends:
            if rank < one.beams:
                one.end(total / step, answer)
        elif len(grown) < one.beams:
            grown.append((total, beam, token))
            answers.append(answer)
    one.growing = answers
    return grown
