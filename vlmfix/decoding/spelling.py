"""Spells answers while they come: characters that are whole, and none of a text that ends the answer."""

from __future__ import annotations

import queue
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmfix.parsing import WORD

UNFINISHED = "\ufffd"
"""What the tokens of a character decode to before its last one has come."""


class Spelling:
    """Spells one answer token by token; the joined pieces are what ``VLM.generate`` gives as text.

    Tokens are decoded a few at a time, behind those before them, because many write their white space only there.

    Args:
        tokenizer: The model's.
        stops: Texts that end the answer, and do not belong to it.

    Attributes:
        text: What was said so far, without white space at its beginning; cut before the first stop.
        stopped: Whether a stop was met.
        starts: Where in ``text`` each token begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._behind = self._spelled = 0
        self.text = ""
        self.stopped = False
        self.starts: list[int] = []

    def add(self, token: int) -> None:
        """Takes the next token, unless a stop was met."""
        self.starts.append(len(self.text))
        self._ids.append(token)
        self._spell(last=False)

    def end(self) -> None:
        """Spells what is left, whole or not, when no token comes any more."""
        if not self.stopped:
            self._spell(last=True)
        self.text = self.text.rstrip()

    @property
    def safe(self) -> int:
        """Counts the first characters of the text that no further token can take back."""
        longest = max((_overlap(self.text, stop) for stop in self._stops), default=0)
        return len(self.text[: len(self.text) - longest].rstrip())

    def _spell(self, *, last: bool) -> None:
        before = self._decoded(self._ids[self._behind : self._spelled])
        now = self._decoded(self._ids[self._behind :])
        piece = now[len(before) :]
        if not piece or (now.endswith(UNFINISHED) and not last):
            return
        self._behind, self._spelled = self._spelled, len(self._ids)
        known = len(self.text)
        self.text += piece if self.text else piece.lstrip()
        longest = max((len(stop) for stop in self._stops), default=0)
        found = [at for stop in self._stops if (at := self.text.find(stop, max(0, known - longest + 1))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """Counts the characters at the end of a text that may be the beginning of a stop."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def words_of(text: str, starts: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Finds the words of a text, and which tokens each is made of.

    Args:
        text: The text.
        starts: Where in it each token begins, ascending; as of ``Spelling``.

    Yields:
        Begin and end of each word in characters, and the numbers of the tokens that have a part of it.
    """
    ends = [*starts[1:], len(text)]
    for found in WORD.finditer(text):
        begin, end = found.span()
        near = range(bisect_left(ends, begin), bisect_left(starts, end))
        # of a character with several tokens the last one has it, and the others have nothing
        yield begin, end, [token for token in near if ends[token] > begin or starts[token] == ends[token]]


def spelled(spelling: Spelling, ids: Iterable[int]) -> Spelling:
    """Returns the spelling with the tokens of a whole answer, up to a text that ends the answer."""
    for token in ids:
        spelling.add(token)
        if spelling.stopped:
            break
    spelling.end()
    return spelling


class Pieces:
    """Hands the text of an answer from the thread that decodes it to the one that reads, piece by piece.

    Args:
        tokenizer: The model's.
        stops: Texts that end the answer, and do not belong to it.

    Attributes:
        skip_prompt: Whether what is put first is the prompt, as transformers' ``generate`` does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.skip_prompt = False
        self._spelling, self._told = Spelling(tokenizer, stops), 0
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def put(self, value: Tensor) -> None:
        """Takes the next tokens of the answer, int64 of any shape."""
        if self.skip_prompt:
            self.skip_prompt = False
            return
        for token in value.flatten().tolist():
            if not self._spelling.stopped:
                self._spelling.add(token)
        self._tell(len(self._spelling.text) if self._spelling.stopped else self._spelling.safe)

    def end(self) -> None:
        """Hears that no token comes any more."""
        self._spelling.end()
        self._tell(len(self._spelling.text))
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces as they come, in the thread that reads."""
        while (piece := self._queue.get()) is not None:
            yield piece

    def _tell(self, known: int) -> None:
        if known > self._told:
            self._queue.put(self._spelling.text[self._told : known])
            self._told = known


class Words:
    """Writes single tokens, each as it stands behind another.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._skipped = len(str(tokenizer.decode(self._before)))
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token: int) -> str:
        return str(self._tokenizer.decode([*self._before, token]))[self._skipped :]
