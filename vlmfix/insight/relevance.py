"""Weights how unsure each token of an answer was by how much the answer's meaning depends on it (SAR).

"Shifting Attention to Relevance" (ACL 2024, arXiv 2307.01379), its token level: with the relevance of token i
``r_i = 1 - |similarity(question + answer, question + answer without token i)|``, the uncertainty of a token is
``-log p_i * r_i / sum of r``, and that of the answer is the sum over its tokens. The paper's sentence level, of several
drawn answers, is not offered. Shape letters (``docs/notation.md``): V vocabulary, d hidden size; here also n tokens.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from vlmfix.decoding.spelling import Spelling, spelled
from vlmfix.errors import UsageError
from vlmfix.insight.grounding import grounding
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.settings import GROUNDED, OWN

TOGETHER = 64
"""Texts that a sentence encoder reads at once."""


@dataclass(frozen=True)
class TokenConfidence:
    """Says of one token of an answer how sure it was, and how much it matters.

    Attributes:
        begin: Where the token begins in the answer's text, in characters.
        end: Where it ends; as large as ``begin`` for a token without text, such as the end token.
        logprob: Its natural log-probability.
        entropy: Entropy of the distribution that it was chosen from, in nats.
        relevance: Its share of the answer's relevance, in [0, 1]; all shares add up to 1.
        sar: ``-logprob * relevance``, at least 0.
        picture: What it owes to the picture, a saliency (see ``Grounding.picture``); None where it was not measured.
    """

    begin: int
    end: int
    logprob: float
    entropy: float
    relevance: float
    sar: float
    picture: float | None = None


@dataclass(frozen=True)
class Confidence:
    """Says how sure an answer was, token by token.

    Attributes:
        tokens: Of each generated token of the answer, in order.
    """

    tokens: tuple[TokenConfidence, ...]

    @property
    def sar(self) -> float:
        """Returns the answer's uncertainty: the mean of ``-logprob``, weighted by relevance; at least 0."""
        return sum(token.sar for token in self.tokens)

    def of(self, begin: int, end: int) -> tuple[float, float | None]:
        """Sums up the tokens that have a part of a span of the text.

        Args:
            begin: Where the span begins, in characters.
            end: Where it ends.

        Returns:
            The sum of their ``sar``, and the mean of their ``picture``; None where that was not measured.
        """
        own = [token for token in self.tokens if token.begin < end and token.end > begin]
        seen = [token.picture for token in own if token.picture is not None]
        return sum(token.sar for token in own), sum(seen) / len(seen) if seen else None


def flags(confidence: Confidence, words: Iterable[tuple[int, int]], named: Sequence[tuple[int, int]]) -> list[bool]:
    """Flags object words that were both unsure and little owed to the picture.

    No paper gives a rule that joins the two. This one has no threshold: a word is flagged when its uncertainty is above
    the median over all words of the same answer, and what it owes to the picture is below their median.

    Args:
        confidence: The answer's, with ``picture`` measured.
        words: Begin and end of all words of the answer.
        named: Begin and end of its object words.
    """
    found = [confidence.of(*span) for span in words]
    known = [(unsure, owed) for unsure, owed in found if owed is not None]
    if not known:
        return [False] * len(named)
    middle, seen = (median(column) for column in zip(*known, strict=True))
    own = [confidence.of(*span) for span in named]
    return [unsure > middle and owed is not None and owed < seen for unsure, owed in own]


class Similarity(ABC):
    """Compares the meaning of a question and its answer with the same text without one of the answer's tokens."""

    @abstractmethod
    def left_out(self, question: str, answer: Sequence[int]) -> Tensor:
        """Computes how similar the text stays when each token is left out.

        Args:
            question: The question.
            answer: The n tokens of the answer that have text, in the answering model's vocabulary.

        Returns:
            (n,) float64 similarities, in [-1, 1].
        """


class OwnEmbeddings(Similarity):
    """Compares texts by the sum of the answering model's own token embeddings, by the cosine.

    Every model has this table, so nothing is downloaded, and all similarities of an answer are one matrix product. It
    knows no order and no context: a word counts for how far it pulls the sum, which is little for words that stand in
    the text several times or whose vectors are short.

    Args:
        table: (V, d) embeddings.
        tokenizer: The model's.
    """

    def __init__(self, table: Tensor, tokenizer: Tokenizer) -> None:
        self._table, self._tokenizer = table.detach(), tokenizer

    def left_out(self, question: str, answer: Sequence[int]) -> Tensor:
        """Computes the cosines; see ``Similarity.left_out``."""
        asked = self._vectors(self._tokenizer(question, add_special_tokens=False)["input_ids"])
        said = self._vectors(answer)  # (n, d)
        whole = asked.sum(dim=0) + said.sum(dim=0)  # (d,)
        return cosine_similarity(whole[None], whole[None] - said, dim=-1)

    def _vectors(self, ids: Sequence[int]) -> Tensor:
        return self._table[torch.tensor([*ids], dtype=torch.long, device=self._table.device)].double().cpu()


class Encoder(Similarity):
    """Compares texts by a sentence encoder: one that reads a pair, as in the paper, or one whose means are compared.

    Args:
        compare: Function of a text and of others; returns how similar each of these is to it, in [-1, 1].
        tokenizer: The answering model's.
    """

    def __init__(self, compare: Callable[[str, Sequence[str]], Tensor], tokenizer: Tokenizer) -> None:
        self._compare, self._tokenizer = compare, tokenizer

    def left_out(self, question: str, answer: Sequence[int]) -> Tensor:
        """Reads the text once for each token, without it; see ``Similarity.left_out``."""
        whole, *others = (
            f"{question} {self._tokenizer.decode(ids, skip_special_tokens=True)}"
            for ids in ([*answer], *([*answer[:place], *answer[place + 1 :]] for place in range(len(answer))))
        )
        return self._compare(whole, others).double().cpu()


def similarity_of(name: str, table: Tensor, tokenizer: Tokenizer) -> Similarity:
    """Returns the similarity model of a name.

    Args:
        name: ``own``, or a folder or Hub id of a sentence encoder of transformers.
        table: (V, d) token embeddings of the answering model.
        tokenizer: The answering model's.

    Raises:
        UsageError: It cannot be loaded.
    """
    return OwnEmbeddings(table, tokenizer) if name == OWN else Encoder(_comparing(name, table.device), tokenizer)


@lru_cache(maxsize=2)
def _comparing(name: str, device: torch.device) -> Callable[[str, Sequence[str]], Tensor]:
    try:
        config = AutoConfig.from_pretrained(name)
        kinds = config.architectures or []
        pairs = any(kind.endswith("ForSequenceClassification") for kind in kinds)
        model = (AutoModelForSequenceClassification if pairs else AutoModel).from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"the similarity model {name} cannot be loaded: {first}",
            f"give {OWN}, or a folder or Hub id of a sentence encoder that transformers loads",
        ) from error
    if pairs and config.num_labels != 1:
        raise UsageError(
            f"the similarity model {name} tells {config.num_labels} classes apart",
            "give a model of pairs with one score, such as cross-encoder/stsb-roberta-large, or an encoder",
        )
    model = model.to(device).eval()
    return _Pairs(model, tokenizer) if pairs else _Means(model, tokenizer)


@dataclass(frozen=True, eq=False)
class _Reader:
    """Holds a sentence encoder and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def read(self, *texts: Sequence[str]) -> dict[str, Tensor]:
        found = self.tokenizer(*map(list, texts), padding=True, truncation=True, return_tensors="pt")
        return dict(found.to(next(self.model.parameters()).device))


class _Pairs(_Reader):
    """Scores pairs by a model with one output, the sigmoid of which is the similarity."""

    @torch.no_grad()
    def __call__(self, text: str, others: Sequence[str]) -> Tensor:
        parts = [others[start : start + TOGETHER] for start in range(0, len(others), TOGETHER)]
        scores = [self.model(**self.read([text] * len(part), part)).logits[:, 0].sigmoid() for part in parts]
        return torch.cat(scores)


class _Means(_Reader):
    """Compares the means of last hidden states over tokens, by the cosine."""

    @torch.no_grad()
    def __call__(self, text: str, others: Sequence[str]) -> Tensor:
        texts = [text, *others]
        means = torch.cat([self._mean(texts[start : start + TOGETHER]) for start in range(0, len(texts), TOGETHER)])
        return cosine_similarity(means[:1], means[1:], dim=-1)

    def _mean(self, texts: Sequence[str]) -> Tensor:
        read = self.read(texts)
        states, kept = self.model(**read).last_hidden_state, read["attention_mask"][..., None]
        mean: Tensor = (states * kept).sum(dim=1) / kept.sum(dim=1)
        return mean


@dataclass(frozen=True)
class Told:
    """Holds an answer as it was decoded.

    Attributes:
        text: Its text.
        ids: Its tokens.
        sure: Log-probability and entropy of each; what is behind the answer's end does not count.
    """

    text: str
    ids: Sequence[int]
    sure: Sequence[tuple[float, float]]


def confidences(
    vlm: Checkpoint,
    asked: Sequence[tuple[Sequence[Image.Image], str]],
    told: Sequence[Told],
    measure: str,
    similarity: str,
    system: str | None = None,
) -> list[Confidence]:
    """Weights how unsure the tokens of answers were by their relevance.

    Args:
        vlm: The model that answered.
        asked: Pictures and question of each answer.
        told: The answers.
        measure: One of ``MEASURES``: whether to measure, too, what tokens owe to the picture.
        similarity: The name of what tells the relevance; see ``similarity_of``.
        system: System message of all.

    Raises:
        UsageError: The similarity model cannot be loaded.
    """
    model: Any = vlm.model
    tokenizer = vlm.processor.tokenizer
    compare = similarity_of(similarity, model.get_input_embeddings().weight, tokenizer)
    owed: list[list[float] | None] = [None] * len(told)
    if measure == GROUNDED and told:
        pictures, prompts = [shown for shown, _ in asked], [question for _, question in asked]
        found = grounding(vlm, pictures, prompts, [one.ids for one in told], system=system)
        owed = [one.picture.tolist() for one in found]
    return [
        confidence_of(tokenizer, compare, question, one, seen)
        for (_, question), one, seen in zip(asked, told, owed, strict=True)
    ]


def confidence_of(
    tokenizer: Tokenizer, similarity: Similarity, question: str, told: Told, owed: Sequence[float] | None = None
) -> Confidence:
    """Weights how unsure an answer's n tokens were by their relevance.

    A token without text of its own, such as the end token, has no relevance. Where no token changes the similarity, all
    count alike.

    Args:
        tokenizer: The answering model's.
        similarity: Tells the relevance.
        question: The question.
        told: The answer.
        owed: What each token owes to the picture; NaN where there is none.
    """
    text, ids = told.text, told.ids
    starts = spelled(Spelling(tokenizer, ()), ids).starts
    edges = [min(start, len(text)) for start in (*starts, len(text))]
    silent = [
        token in tokenizer.all_special_ids or begin == len(text) for token, begin in zip(ids, edges, strict=False)
    ]
    heard = [token for token, mute in zip(ids, silent, strict=True) if not mute]
    drops = iter((1 - similarity.left_out(question, heard).abs()).clamp(min=0).tolist() if heard else ())
    found = [0.0 if mute else next(drops) for mute in silent]
    total = sum(found)
    shares = [drop / total for drop in found] if total > 0 else [1 / len(found)] * len(found)
    seen = [None] * len(ids) if owed is None else [None if math.isnan(score) else score for score in owed]
    rows = zip(itertools.pairwise(edges), told.sure[: len(ids)], shares, seen, strict=True)
    return Confidence(
        tuple(
            TokenConfidence(begin, end, logprob, entropy, share, 0.0 - logprob * share, score)
            for (begin, end), (logprob, entropy), share, score in rows
        )
    )
