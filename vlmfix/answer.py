"""What one row was answered: tokens as the model said them, and the answer that is read from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from vlmfix.decoders.picture.refined import Refined
from vlmfix.decoding.spelling import Spelling, spelled, words_of
from vlmfix.insight.relevance import Confidence

Finish = Literal["eos", "stop", "length", "context", "nan"]
"""Why an answer ends."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: What the model said, without special tokens and outer white space.
        tokens: Number of generated tokens, the end token included.
        finish: ``eos`` when the model ended it, ``stop`` when it came to a text that was to end it, ``length`` when
            ``max_new_tokens`` cut it, ``context`` when prompt and answer filled the model's context before, ``nan``
            when some score behind it was not a number: text and tokens then mean nothing.
        seconds: Wall-clock time of its batch, divided by the batch's rows.
        ids: The generated tokens, ``tokens`` many: the end token, or those of a stop, included, what comes behind not.
        logprob: Mean natural log-probability of its tokens, under the scores that the decoder made and before any
            temperature; at most 0. None for beams, a static cache and answers whose scores were not numbers.
        entropy: Mean entropy, in nats, of the distributions that its tokens were chosen from; None likewise.
        refined: What a refining decoder made of the question's pictures; None for other decoders.
        words: Of each word, or punctuation mark, begin and end in ``text`` and the natural log-probability of the
            tokens that have a part of it, together; None unless it was asked for, and where ``logprob`` is.
        confidence: Relevance-weighted uncertainty of the answer and of its tokens; None likewise.
        skipped: How many of its tokens a decoder with ``when=uncertain`` left to the clean row; None for other
            decoders, beams and a static cache.
    """

    text: str
    tokens: int
    finish: Finish
    seconds: float
    ids: tuple[int, ...]
    logprob: float | None = None
    entropy: float | None = None
    refined: Refined | None = None
    words: tuple[tuple[int, int, float], ...] | None = None
    confidence: Confidence | None = None
    skipped: int | None = None


@dataclass(frozen=True)
class Found:
    """Holds the tokens that the model said in one row.

    Attributes:
        ids: Generated tokens; what fills them up behind an end token may stand there.
        broken: Steps, from 0, whose scores were not numbers.
        full: Whether the model's context left less room than was asked for.
        sure: Of each token its log-probability, and the entropy of what it was chosen from; empty where nobody looked.
        alone: Of each token whether it was left to the clean row; empty without a rule that asks.
    """

    ids: tuple[int, ...]
    broken: Sequence[int]
    full: bool = False
    sure: Sequence[tuple[float, float]] = ()
    alone: Sequence[bool] = ()


def read(
    said: Found,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    *,
    seconds: float = 0.0,
    stops: Sequence[str] = (),
    words: bool = False,
) -> Answer:
    """Reads the answer of one row from the tokens that the model said.

    Args:
        said: The tokens.
        tokenizer: Turns them into text.
        ends: Tokens that end an answer.
        seconds: Wall-clock time of the row's batch, divided by its rows.
        stops: Texts that end an answer.
        words: Whether to tell of every word how sure it was.
    """
    last = next((place for place, token in enumerate(said.ids) if token in ends), None)
    own = said.ids if last is None else said.ids[: last + 1]
    finish: Finish = "eos" if last is not None else "context" if said.full else "length"
    spelling = spelled(Spelling(tokenizer, stops), own) if stops or words else None
    if spelling is not None and spelling.stopped:
        own, text, finish = own[: len(spelling.starts)], spelling.text, "stop"
    else:
        text = str(tokenizer.decode(list(own), skip_special_tokens=True)).strip()
    if any(step < len(own) for step in said.broken):  # a row that has ended may still run
        finish = "nan"
    sure = () if finish == "nan" else said.sure[: len(own)]
    logprob, entropy = _means(sure)
    found = _words(spelling, [pair[0] for pair in sure]) if words and spelling and sure else None
    skipped = sum(said.alone[: len(own)]) if said.alone else None
    return Answer(text, len(own), finish, seconds, own, logprob=logprob, entropy=entropy, words=found, skipped=skipped)


def _words(spelling: Spelling, logprobs: Sequence[float]) -> tuple[tuple[int, int, float], ...]:
    """Gives of each word of an answer its place and the log-probability of its tokens."""
    found = words_of(spelling.text, spelling.starts)
    return tuple((begin, end, sum(logprobs[token] for token in own)) for begin, end, own in found)


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | tuple[None, None]:
    """Averages both numbers, where there are any."""
    if not pairs:
        return None, None
    first, second = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return first, second
