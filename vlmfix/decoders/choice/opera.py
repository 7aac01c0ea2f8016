"""OPERA: searches with beams against attention that piles up on one token, and steps back where it has."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mode
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, Site, WeightEdit
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.beams import Course, Search, Stand
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.running import Running
from vlmfix.decoding.strategy import Strategy
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

EARLY = 10
"""Tokens, the candidate included, up to which attention to the picture is rewarded; none of them is gone back to."""
FACTOR = 1e-7
"""The authors' factor on products of attention."""
MOST = math.log(1e30)
"""Logarithm of the largest penalty, so that a sum of scores stays a number."""
FLOOR = -999.0
"""Score of tokens that are no candidates in the released code."""


@dataclass(frozen=True, kw_only=True)
class OPERA(Decoder):
    """Over-trust Penalty and Retrospection-Allocation: a beam search against answers that feed on one of their tokens.

    Before a model invents, later tokens of its answer often look at one earlier token that sums the rest up, and no
    longer at the picture. At every step each beam's ``candidates`` most probable tokens are passed on trial. Of the
    last layer the row of a candidate, the largest weight of all heads over its sum, joins the rows of the answer
    before it, w (n, n), and for each token c of the answer::

        score(c) = 1e-7 * product over rows i = c .. n - 1 of scale * w[i, c]
        logit of the candidate -= penalty * max over c of score(c)

    Up to the tenth token the penalty is minus the candidate's attention to the picture. Tokens that are no candidates
    are out, and the beams go on by log-probabilities.

    Each step notes for each beam the c that most of its candidates point at. Where the one that most beams point at
    has been noted more than ``threshold`` times for every beam, and is at least the eleventh token, the sample goes
    back to the end of c: its beams are again what they were, and choose by the plain logits, where each (beam, token)
    that was chosen there before has the logit of its row's worst token. To one place at most ``candidates`` returns are
    made, then to the place before it, then none.

    Args:
        preset: ``paper``; ``official-code``, which rounds scores to float16 and gives tokens that are no candidates
            -999, so that a token of them is taken where all scores are too large for float16; or ``fast``, the authors'
            quick settings, one candidate and threshold 25: it is greedy search until a sample goes back.
        num_beams: Beams, at least 2.
        scale: Factor on attention, sigma.
        threshold: r, notes of one place that no beam may exceed, at least 1; None is the preset's.
        candidates: Tokens on trial of each beam; None is the preset's.
        penalty: alpha.
        window: Most tokens that are gone back.

    *Source*: Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust
    Penalty and Retrospection-Allocation", CVPR 2024, arXiv 2311.17911; code shikiw/OPERA.

    *Differs*: the released code votes over all rows of a batch, so it takes one question at a time; here each sample
    has its own votes, notes and returns. Products are sums of logarithms in float32. Going back forgets what was
    chosen at later places; the released code forgets that of the next place alone (``official-code``). It computes the
    prompt and the answer again after going back; here the cache is cut. Tokens that are no candidates have -999 there,
    and no chance here but in ``official-code``. The search is that of ``beam``.

    *Cost*: ``num_beams * candidates`` rows per token. The pass of a candidate is that of the next step, so none is made
    twice; going back costs a pass for each token that no beam shares any more, one at least. No recorded steps, no
    static cache, and no call of the model's own ``generate``. In a chain the other methods act in all passes, and the
    attention is what they left.

    Example:
        >>> OPERA(preset="fast").spec()
        'opera:preset=fast,num_beams=5,scale=50.0,threshold=25,candidates=1,penalty=1.0,window=512'
    """

    name: ClassVar[str] = "opera"
    source: ClassVar[Source] = Source(
        title="Over-trust Penalty and Retrospection-Allocation",
        year=2024,
        arxiv="2311.17911",
        code="https://github.com/shikiw/OPERA",
    )
    acts_on: ClassVar[str] = "choice of tokens"
    passes: ClassVar[int] = 25
    compiles: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"threshold": 15, "candidates": 5},
        "official-code": {"threshold": 15, "candidates": 5},
        "fast": {"threshold": 25, "candidates": 1},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code", "fast"), help="numbers and arithmetic")
    num_beams: int = parameter(5, int, low=2, high=100, search=(2, 6), help="beams")
    scale: float = parameter(50.0, float, low=1, high=1e4, search=(10, 100), log=True, help="sigma, on attention")
    threshold: int = parameter(None, int, low=1, high=10000, search=(5, 30), help="r, notes before a sample goes back")
    candidates: int = parameter(None, int, low=1, high=100, search=(1, 6), help="tokens on trial of each beam")
    penalty: float = parameter(1.0, float, low=0, high=1000, search=(0.1, 10), log=True, help="alpha")
    window: int = parameter(512, int, low=1, high=100000, help="most tokens that are gone back")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "passes", self.num_beams * self.candidates)

    @property
    def strategy(self) -> Strategy:
        """Returns beam search as the strategy."""
        return Strategy(num_beams=self.num_beams)

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans a reading of the last layer, and what leads the search."""
        reader = NewestRow(layers=LayerSet("-1"))
        return DecodingPlan(edits=(reader,), leader=Allocation(self, reader), compiles=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class NewestRow(WeightEdit):
    """Keeps the newest row, the largest weight of all heads over its sum, and changes nothing."""

    rows: ClassVar[Rows] = "last"

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights unchanged."""
        newest = weights[:, :, -1].amax(dim=1)  # (B, K)
        newest = newest / newest.sum(dim=-1, keepdim=True)
        site.learn_of_keys("newest", newest)
        site.learn_of_keys("image", newest * site.image_keys[..., : newest.shape[-1]])
        return weights


@dataclass(frozen=True, eq=False)
class Allocation:
    """Leads the searches of a decoder.

    Attributes:
        method: The decoder.
        reader: Reads the rows.
    """

    method: OPERA
    reader: NewestRow

    @property
    def rows(self) -> int:
        """Returns the number of candidates."""
        return self.method.candidates

    def __call__(self, call: Running) -> Course:
        """Starts a call."""
        return Retrospection(call, self.method, self.reader)


@dataclass(eq=False)
class Past:
    """Holds what a search knows of one sample; w beams, n tokens of each answer.

    Attributes:
        sums: (w, n) float32, for each token of an answer the sum of logarithms of scaled attention to it.
        trial: (w * candidates, n + 1), the same with each candidate.
        stands: Where the sample stood with as many tokens as the place in the list, and its sums there.
        noted: For each step, the token that each beam's candidates point at.
        returns: How often it went back to a place.
        rejected: Place -> beams and tokens that were chosen there.
    """

    sums: Tensor
    trial: Tensor = field(init=False)
    stands: list[tuple[Stand, Tensor]] = field(default_factory=list)
    noted: list[Sequence[int]] = field(default_factory=list)
    returns: Counter[int] = field(default_factory=Counter)
    rejected: defaultdict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def place(self, method: OPERA) -> int | None:
        """Decides whether the sample goes back, and takes note of it.

        Returns:
            The number of tokens that its answers then have, fewer than now; None to go on.
        """
        said, summary = len(self.stands) - 1, _most(self.noted[-1])
        if summary < EARLY or any(notes.count(summary) <= method.threshold for notes in zip(*self.noted, strict=True)):
            return None
        for place in (summary + 1, summary):
            if self.returns[place] < method.candidates:
                self.returns[place] += 1
                return max(min(place, said - 1), said - method.window, 1)
        return None

    def take_back(self, place: int, *, forgets: bool) -> Stand:
        """Goes back to a number of tokens, and returns where the sample stood.

        Args:
            place: The number.
            forgets: Whether what was chosen at all later places is forgotten, and not at the next alone.
        """
        self.rejected[place] += self.stands[place + 1][0].chosen
        for later in [later for later in self.rejected if later == place + 1 or (forgets and later > place)]:
            del self.rejected[later]
        del self.stands[place + 1 :], self.noted[place + 1 :]
        stand, self.sums = self.stands[place]
        return stand


class Retrospection(Course):
    """Leads the search of one call.

    Args:
        call: The samples at work.
        method: The decoder.
        reader: Reads the rows, at work in the call.
    """

    def __init__(self, call: Running, method: OPERA, reader: NewestRow) -> None:
        super().__init__(call)
        self._method, self._reader, self._exact = method, reader, method.preset != "official-code"
        self._pasts: list[Past] = []
        self._tokens: Tensor | None = None  # (L, N) candidates, of which the newest pass was one on trial
        self._ahead = torch.empty(0)  # (L * N, V), the scores that follow them
        self._samples, self._went_back = 0, False

    def begin(self) -> Tensor:
        """Runs prefill; returns the scores that follow each prompt, (B, V) float32."""
        scores = super().begin()
        self._pasts = [Past(scores.new_zeros(1, 0)) for _ in self.call.room]
        return scores

    def weigh(self, going: Sequence[Search], scores: Tensor) -> Tensor:
        """Returns scores with the penalty, or those of samples that go back."""
        self._samples = len(going)
        count, width = self._method.candidates, len(scores) // len(going)
        values, tokens = scores.topk(count)  # (L, N)
        self.call.keep(torch.arange(len(scores), device=scores.device).repeat_interleave(count))
        self._tokens, self._ahead = tokens, self.call.token(tokens.flatten())
        rows, image = self._newest(scores.device)
        penalties, places = [], {}
        for number, one in enumerate(going):
            past, own = self._pasts[one.number], slice(number * width * count, (number + 1) * width * count)
            past.trial = self._longer(past.sums.repeat_interleave(count, dim=0), rows[own])
            penalty, summaries = self._penalty(past.trial, image[own])
            penalties.append(penalty)
            past.stands.append((one.stand, past.sums))
            notes = [_most(pointed) for pointed in summaries.view(width, count).tolist()]
            past.noted.append(notes * (one.beams // width))  # beams of the first step are one
            place = past.place(self._method)
            if place is not None:
                places[number] = place
        weighed = torch.full_like(scores, -math.inf if self._exact else FLOOR)
        weighed = weighed.scatter(1, tokens, values - torch.cat(penalties).view_as(values))
        return self._taken_back(going, places, weighed) if places else weighed

    def follow(self, going: Sequence[Search], lines: Tensor, tokens: Tensor) -> Tensor:
        """Goes on with candidates that have passed; lets other tokens pass."""
        count = self._method.candidates
        if self._tokens is not None:
            hits = self._tokens[lines] == tokens[:, None]  # (L', N)
            rank = hits.int().argmax(dim=1)
            if bool(hits.any(dim=1).all()):
                kept = lines * count + rank
                self._keep(going, kept)
                for one, ranks in self._parts(going, rank):
                    past = self._pasts[one.number]
                    past.sums = past.trial[self._beams(one, ranks) * count + ranks]
                return self._ahead[kept]
            lines = lines * count
        self._keep(going, lines)
        if self._tokens is not None:
            self.call.back(torch.ones_like(lines))
        scores = self.call.token(tokens)
        rows, _ = self._newest(scores.device)
        for one, own in self._parts(going, rows[: len(lines)]):
            past = self._pasts[one.number]
            past.sums = self._longer(past.sums[self._beams(one, own)], own)
        return scores

    def _keep(self, going: Sequence[Search], lines: Tensor) -> None:
        """Keeps lines; columns that were left free for samples that have ended are given up, for a window's sake."""
        self.call.keep(lines)
        if self._went_back and len(going) < self._samples:
            self.call.back(torch.zeros_like(lines))

    def _parts(self, going: Sequence[Search], of_lines: Tensor) -> Sequence[tuple[Search, Tensor]]:
        return list(zip(going, of_lines.chunk(len(going)), strict=True))

    def _beams(self, one: Search, like: Tensor) -> Tensor:
        """Returns which beams the present ones continue, (w,) int64."""
        return torch.tensor([beam for beam, _ in one.stand.chosen], device=like.device)

    def _newest(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the newest row of each line and branch, (R, K), and its attention to the picture, (R,)."""
        ((rows,), (image,)) = (self.call.learned(self._reader, name).values() for name in ("newest", "image"))
        return rows.to(device), image.to(device).sum(dim=-1)

    def _longer(self, sums: Tensor, rows: Tensor) -> Tensor:
        """Adds to (w, n) sums the rows of the tokens behind, (w, K) of which the last n + 1 are the answer's."""
        own = rows[:, -sums.shape[1] - 1 :]
        return torch.cat([sums, sums.new_zeros(len(sums), 1)], dim=1) + (self._method.scale * own).log()

    def _penalty(self, sums: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Computes what candidates lose.

        Args:
            sums: (C, n) of each candidate, C of them.
            image: (C,) its attention to the picture.

        Returns:
            (C,) penalties times their weight, and the (C,) tokens of the answer that have the highest scores.
        """
        products = sums + math.log(FACTOR)
        if self._exact:
            most, places = products.max(dim=1)
            most = most.clamp(max=MOST).exp()
        else:
            most, places = products.exp().half().max(dim=1)
        penalty = -image if sums.shape[1] <= EARLY else most.float()
        return penalty * self._method.penalty if self._method.penalty else torch.zeros_like(image), places

    def _taken_back(self, going: Sequence[Search], places: Mapping[int, int], weighed: Tensor) -> Tensor:
        """Takes samples back, and returns the scores with those of their earlier steps.

        A beam of then continues the present beam that has most of its tokens; what is left passes again, the last token
        in any case, whose scores are wanted. Samples that go on wait.

        Args:
            going: All samples.
            places: Number in ``going`` -> tokens that its answers have from now on.
            weighed: (L, V) scores of all.
        """
        count, width = self._method.candidates, len(weighed) // len(going)
        sources, wanted, have, back = [], [], [], []
        for number, one in enumerate(going):
            before = one.stand
            if number in places:
                one.stand = self._pasts[one.number].take_back(places[number], forgets=self._exact)
            for beam, answer in enumerate(one.stand.growing):
                shared = [_shared(answer, other) for other in before.growing]
                source = beam if one.stand is before else shared.index(max(shared))
                sources.append((number * width + source) * count)
                wanted.append(answer)
                have.append(shared[source] - (one.stand is not before and shared[source] == len(answer)))
                back.append(before.said + 1 - have[-1])
        device = weighed.device
        self.call.keep(torch.tensor(sources, device=device))
        self.call.back(torch.tensor(back, device=device))
        while any(known < len(answer) for known, answer in zip(have, wanted, strict=True)):
            waits = [known == len(answer) for known, answer in zip(have, wanted, strict=True)]
            tokens = [answer[min(known, len(answer) - 1)] for known, answer in zip(have, wanted, strict=True)]
            scores = self.call.token(torch.tensor(tokens, device=device))
            have = [known + (not wait) for known, wait in zip(have, waits, strict=True)]
            done = [not w and known == len(answer) for w, known, answer in zip(waits, have, wanted, strict=True)]
            weighed = torch.where(torch.tensor(done, device=device)[:, None], scores, weighed)
            if any(waits):
                self.call.back(torch.tensor(waits, device=device).long())
        for number, place in places.items():
            for beam, token in self._pasts[going[number].number].rejected[place]:
                line = number * width + beam
                weighed[line, token] = weighed[line].min()
        self._tokens, self._went_back = None, True
        return weighed


def _most(values: Sequence[int]) -> int:
    """Returns the most frequent value, of several the smallest."""
    return mode(sorted(values))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Counts the first tokens that two answers have in common."""
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
