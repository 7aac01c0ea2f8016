"""Zero ablation: what the model's next word, or the words of its captions, lose when one head is switched off.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads; here also N copies of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Rows
from vlmfix.attention.probe import Gates
from vlmfix.attention.session import edited
from vlmfix.heads.moments import Contrast, Moments, Tally, rank_correlation
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight import last_step
from vlmfix.insight.captions import Labels, Told, beginnings, tell
from vlmfix.insight.last_step import SCALE, LastStep
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint

PROMPT = 16
"""How often the embeddings of a prompt fit into what one layer holds while it reads the prompt, about."""
HALLUCINATED, REAL = 0, 2
"""Where ``Contrast`` keeps the two kinds of words."""


@dataclass(frozen=True, kw_only=True)
class Ablation(Profiler):
    """What a head adds to the probability of what the model says; for captions, of hallucinated words above real ones.

        I = p(y) - p(y | output of the head set to 0)

    Without ``labels``, y is the model's next token, and the score is I. Positive: the head supports what the model
    says. The head is switched off at the last position alone.

    With ``labels``, the model describes the picture greedily, and y is every token that begins an object word:

        score = mean of I over hallucinated words - mean of I over real words

    over all words of all captions that name something hallucinated; a word that is said twice counts twice. Positive:
    the head pushes hallucinated words more than real ones. The head is switched off in the one pass that chose the
    word, at all positions of that pass: the new one, and the whole prompt when the caption's first token begins the
    word. Keys and values of earlier passes are those of the whole model. ``details`` has the two means as
    ``hallucinated`` and ``real`` (L, H), and how many words there were as ``hallucinated_words`` and ``real_words``.
    The standard error takes pictures as units, since words of one caption are not independent.

    ``details`` also has the first-order estimate of the score, from one backward pass (d p(y) / d m of a gate m = 1 on
    every head), as ``first_order`` (L, H), and Spearman's correlation of the two over all heads as
    ``rank_correlation``; NaN when either gives all heads the same. The estimate's gates are at the last position, also
    for a caption's first token.

    Source: the attribution of AD-HH (Yang et al., ICLR 2025, code TianyunYoung/Hallucination-Attribution), which is the
    score with ``labels``; 3000 pictures and 128 new tokens there. *Differs*: an object word is found where the caption
    names it, not by the identity of its first token. *Cost*: for each y, L * H one-token steps, ``copies`` at a time as
    rows of one pass that share the keys and values before them, and one backward pass through one step; L * H prompts
    for a word at the very beginning of a caption. Captions without a hallucinated word cost their generation alone.

    Args:
        copies: Ablated copies per pass, at least 1; fewer when they would need too much memory.
        labels: Who says which words of a caption name objects, and which of these are there; None for the next token.
        max_new_tokens: Longest caption, at least 1; the next token needs none.
    """

    name: ClassVar[str] = "ablation"
    title: ClassVar[str] = "support of the next token, or of hallucinated words"

    copies: int = 32
    labels: Labels | None = field(default=None, repr=False)
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        self._require(self.copies >= 1, "copies", "at least 1")
        self._require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")

    def parameters(self) -> dict[str, Any]:
        """Says as ``target`` whether captions or the next token were measured."""
        if self.labels is None:
            return {"copies": self.copies, "target": "next-token"}
        given = {"copies": self.copies, "max_new_tokens": self.max_new_tokens}
        return {**given, "target": "captions", "labels": dict(self.labels.about)}

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        if self.labels is None:
            return _State(self.copies)
        return _CaptionState(self.copies, self.labels, self.max_new_tokens)


class _State(State):
    keeps_cache: ClassVar[bool] = True

    def __init__(self, copies: int) -> None:
        self._copies = copies
        self._exact: Moments | None = None
        self._first: Moments | None = None

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        if ran is None:
            raise RuntimeError("the shared pass did not run")
        shape = (work.layers, work.heads)
        steps = [LastStep.of(work, ran, row) for row in range(work.batch.rows)]
        exact = torch.stack([lost(step, *shape, self._copies) for step in steps])  # (B, L, H)
        first = torch.stack([first_order(step, *shape) for step in steps])
        none = Moments.empty(*shape)
        self._exact = (self._exact or none).added(exact.double().cpu())
        self._first = (self._first or none).added(first.double().cpu())
        return exact

    def details(self) -> dict[str, Tensor]:
        return {} if self._exact is None or self._first is None else _compared(self._exact.mean, self._first.mean)


class _CaptionState(State):
    shares: ClassVar[bool] = False
    advice: ClassVar[str] = "show more pictures: captions must name objects that are there and some that are not"

    def __init__(self, copies: int, labels: Labels, longest: int) -> None:
        self._copies, self._labels, self._longest = copies, labels, longest
        self._exact: Contrast | None = None
        self._first: Contrast | None = None

    def tally(self, layers: int, heads: int) -> Tally:
        return Contrast.empty(layers, heads)

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        told = tell(work, self._longest)
        found = [self._row(work, told, row) for row in range(work.batch.rows)]
        exact = torch.stack([one for one, _ in found])  # (B, L, H, 4)
        first = torch.stack([one for _, one in found])
        known = ~exact.isnan().flatten(1).any(dim=1)  # (B,)
        none = Contrast.empty(work.layers, work.heads)
        self._exact = (self._exact or none).added(exact[known])
        self._first = (self._first or none).added(first[known])
        return exact

    def _row(self, work: Work, told: Told, row: int) -> tuple[Tensor, Tensor]:
        """(L, H, 4) of one caption, exactly and to first order; NaN when it names nothing hallucinated."""
        shape = (work.layers, work.heads)
        words = beginnings(work, row, told.tokens[row], self._labels)
        exact = torch.zeros(*shape, 4, dtype=torch.float64)
        if all(words.values()):
            return exact + torch.nan, exact + torch.nan
        first = exact.clone()
        for place, real in words.items():
            step = told.step(work, row, place)
            kind = REAL if real else HALLUCINATED
            whole = lost(step, *shape, self._copies) if place else lost_in_prompt(work, step, self._copies)
            for total, one in ((exact, whole), (first, first_order(step, *shape))):
                total[..., kind] += one.double().cpu()
                total[..., kind + 1] += 1
        return exact, first

    def details(self) -> dict[str, Tensor]:
        if self._exact is None or self._first is None:
            return {}
        counts = self._exact.sums[0, 0].float()  # (4,)
        return {
            "hallucinated": self._exact.first.float(),
            "real": self._exact.second.float(),
            "hallucinated_words": counts[[HALLUCINATED + 1]],
            "real_words": counts[[REAL + 1]],
            **_compared(self._exact.mean, self._first.mean),
        }


def _compared(exact: Tensor, first: Tensor) -> dict[str, Tensor]:
    agreement = rank_correlation(exact, first)
    return {
        "first_order": first.float(),
        "rank_correlation": torch.tensor([torch.nan if agreement is None else agreement]),
    }


@torch.no_grad()
def lost(step: LastStep, layers: int, heads: int, copies: int) -> Tensor:
    """(L, H) loss of probability when each head is switched off alone, at most ``copies`` of them per pass."""
    return _lost(lambda gates: _probability(step, gates), layers, heads, step.copies(copies))


@torch.no_grad()
def lost_in_prompt(work: Work, step: LastStep, copies: int) -> Tensor:
    """(L, H) the same when each head is switched off in the whole prompt behind which ``step`` stands.

    Args:
        work: The batch.
        step: The step over the prompt's last token.
        copies: Most copies per pass.
    """
    batch, row = work.batch, step.row
    prompt = slice(row, row + 1)

    def probability(gates: Tensor) -> Tensor:
        count = gates.shape[1]
        questions, pictures = (batch.prompts or ())[prompt] * count, (batch.pictures or ())[prompt] * count
        copied = work.vlm.encode(questions, pictures, system=batch.system)
        model: Any = work.vlm.model
        with edited(work.vlm, work.vlm.layout(copied), [PromptGates(gates=gates.to(step.device))]):
            logits = model(**copied, use_cache=False, logits_to_keep=1).logits[:, -1].float()  # (N, V)
        return torch.as_tensor(logits.softmax(dim=-1)[:, step.token])

    embeddings: Any = work.vlm.model.get_input_embeddings()
    bytes_each = PROMPT * embeddings.weight[0].nbytes * batch.length
    return _lost(probability, work.layers, work.heads, max(1, min(copies, last_step.MEMORY // bytes_each - 1)))


def _lost(probability: Callable[[Tensor], Tensor], layers: int, heads: int, copies: int) -> Tensor:
    found = []
    for start in range(0, layers * heads, copies):
        off = torch.arange(start, min(start + copies, layers * heads))  # (N,)
        # the whole model is a row too: rounding depends on their number
        gates = torch.ones(layers, 1 + len(off), heads)
        gates[off // heads, 1 + torch.arange(len(off)), off % heads] = 0.0
        left = probability(gates)
        found.append(left[0] - left[1:])
    return torch.cat(found).view(layers, heads)


@torch.enable_grad()
def first_order(step: LastStep, layers: int, heads: int) -> Tensor:
    """(L, H) the same by the gradient of the gates."""
    gates = torch.ones(layers, 1, heads).requires_grad_()
    (slope,) = torch.autograd.grad(SCALE * _probability(step, gates).sum(), gates)
    return slope[:, 0] / SCALE  # (L, H)


def _probability(step: LastStep, gates: Tensor) -> Tensor:
    """(N,) probability of the next token in each of N copies, for (L, N, H) gates on the last token's head outputs."""
    logits = step.logits([Gates(gates=gates.to(step.device))], copies=gates.shape[1])
    return logits.softmax(dim=-1)[:, step.token]


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptGates(Gates):
    """The same gates on the head outputs of every row."""

    rows: ClassVar[Rows] = "all"
