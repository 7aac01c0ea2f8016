"""Searches with beams: several answers to each prompt grow in parallel, and the best mean log-probability wins.

It finds what transformers' search finds with its defaults (``length_penalty=1``, ``early_stopping=False``): the score
of an answer is the sum of its log-probabilities over the number of its tokens, end token included; and a sample is done
when no growing answer is better by that measure than the worst of its ``beams`` ended ones. Contrasts act on the scores
before they become log-probabilities, and a beam's branches and edits move with it. The prompt passes once per sample.

A ``Course`` says by which scores tokens are chosen, and may take a sample back to where it stood; the search has no
other state than its samples'.

Shape letters (``docs/notation.md``): B samples that go on, L lines, V vocabulary; here also C candidates.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlmfix.decoding.loop import broken
from vlmfix.decoding.repetition import Repetition
from vlmfix.decoding.running import Running


@dataclass(frozen=True)
class Stand:
    """Holds where a search stands.

    Attributes:
        growing: The unfinished answers, one for each beam: at first one, without tokens.
        sums: The sum of log-probabilities of each.
        ended: The best ended answers with their scores.
        chosen: How each unfinished answer was made of those of the step before: its beam, and the token behind it.
    """

    growing: tuple[tuple[int, ...], ...] = ((),)
    sums: tuple[float, ...] = (0.0,)
    ended: tuple[tuple[float, tuple[int, ...]], ...] = ()
    chosen: tuple[tuple[int, int], ...] = ()

    @property
    def said(self) -> int:
        """Returns how many tokens each unfinished answer has."""
        return len(self.growing[0])


@dataclass(eq=False)
class Search:
    """Searches for one sample.

    Attributes:
        number: Number of the sample in the batch.
        beams: Most ended answers that the search keeps.
        stand: Where it stands.
        broken: Steps, from 0, at which scores were not numbers.
    """

    number: int
    beams: int
    stand: Stand = field(default_factory=Stand)
    broken: list[int] = field(default_factory=list)

    @property
    def ended(self) -> Sequence[tuple[float, tuple[int, ...]]]:
        """Returns the best ended answers with their scores, at most ``beams``."""
        return self.stand.ended

    def end(self, score: float, tokens: tuple[int, ...]) -> None:
        """Adds an ended answer; of equal scores the earlier one ranks first."""
        ended = heapq.nlargest(self.beams, [*self.ended, (score, tokens)], key=lambda pair: pair[0])
        self.stand = replace(self.stand, ended=tuple(ended))

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


class Course:
    """Leads a search from step to step: here by the scores that the model's passes give.

    Args:
        call: The samples at work.
    """

    def __init__(self, call: Running) -> None:
        self.call = call

    def begin(self) -> Tensor:
        """Runs prefill; returns the scores that follow each prompt, (B, V) float32."""
        return self.call.prompt()

    def weigh(self, going: Sequence[Search], scores: Tensor) -> Tensor:
        """Returns the scores by which the next tokens are chosen.

        It may take samples back: their ``stand`` is then an earlier one of as many beams, and their scores follow that.

        Args:
            going: The samples that go on, in the order of their lines.
            scores: (L, V) float32, as ``begin`` or ``follow`` returned them.
        """
        return scores

    def follow(self, going: Sequence[Search], lines: Tensor, tokens: Tensor) -> Tensor:
        """Lets the chosen lines go on with the chosen tokens.

        Args:
            going: The samples that still go on, in the order of their lines.
            lines: (L',) int64, numbers of the present lines.
            tokens: (L',) int64.

        Returns:
            The (L', V) float32 scores that follow.
        """
        self.call.keep(lines)
        return self.call.token(tokens)


def search(
    call: Running,
    beams: int,
    ends: Collection[int],
    course: Course | None = None,
    repetition: Repetition | None = None,
) -> list[Search]:
    """Searches for the best answer to each prompt.

    Args:
        call: The samples at work.
        beams: Answers that grow side by side, at least 2.
        ends: Tokens that end an answer; an answer without room for more tokens ends too.
        course: Leads the search; None leaves it to the scores of the passes.
        repetition: Lowers log-probabilities of what was said; None for none.

    Returns:
        The finished search of each sample.
    """
    course = Course(call) if course is None else course
    every = [Search(number, beams) for number in range(len(call.room))]
    scores = course.begin()  # (B, V), from the second step on (B * beams, V)
    going = every
    while going:
        width = len(scores) // len(going)  # lines of each sample
        for place, odd in enumerate(broken(scores).tolist()):
            searched = going[place // width]
            searched.broken += [searched.stand.said] * odd
        scores = course.weigh(going, scores)
        sums = scores.new_tensor([one.stand.sums for one in going])  # (B, beams)
        logs = scores.log_softmax(dim=-1)
        if repetition is not None:
            answers = [(one.number, answer) for one in going for answer in one.stand.growing]
            logs = repetition.lowered_behind(logs, *zip(*answers, strict=True))
        totals = logs.view(len(going), width, -1) + sums[..., None]  # (B, beams, V)
        # Each beam can end with each end token: this many candidates leave ``beams`` that go on.
        count = min(max(2, 1 + len(ends)) * beams, totals[0].numel())
        values, places = totals.flatten(1).topk(count)  # (B, C)
        lines, tokens, stay = [], [], []
        for row, one in enumerate(going):
            candidates = zip(values[row].tolist(), places[row].tolist(), strict=True)
            last = one.stand.said + 1 == call.room[one.number]
            _grow(one, candidates, totals.shape[-1], ends, last=last)
            if not last and not one.is_done(one.stand.sums[0] / one.stand.said):
                stay.append(one)
                lines += [row * width + beam for beam, _ in one.stand.chosen]
                tokens += [token for _, token in one.stand.chosen]
        going = stay
        if going:
            device = scores.device
            scores = course.follow(going, torch.tensor(lines, device=device), torch.tensor(tokens, device=device))
    return every


def _grow(
    one: Search,
    candidates: Iterable[tuple[float, int]],
    vocabulary: int,
    ends: Collection[int],
    *,
    last: bool,
) -> None:
    """Lets a sample's answers grow by a token; those that go on stand the best first.

    Args:
        one: The sample.
        candidates: Sum of log-probabilities, and beam times vocabulary plus token; the best first.
        vocabulary: V.
        ends: Tokens that end an answer.
        last: Whether the grown answers have no room for more tokens.
    """
    before = one.stand
    grown: list[tuple[tuple[int, ...], float, tuple[int, int]]] = []
    for rank, (total, place) in enumerate(candidates):
        beam, token = divmod(place, vocabulary)
        answer = (*before.growing[beam], token)
        if last or token in ends:
            if rank < one.beams:
                one.end(total / len(answer), answer)
        elif len(grown) < one.beams:
            grown.append((answer, total, (beam, token)))
    if grown:
        growing, sums, chosen = zip(*grown, strict=True)
        one.stand = replace(one.stand, growing=growing, sums=sums, chosen=chosen)
