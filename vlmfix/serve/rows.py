"""The answers that are on their way: each a row of some batch, told to its request as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from vlmfix.decoding.choice import Choice
from vlmfix.decoding.loop import Said
from vlmfix.decoding.spelling import Spelling
from vlmfix.generation import Answer
from vlmfix.serve.protocol import Wanted
from vlmfix.serve.refusals import RefusedError
from vlmfix.serve.scores import Entry, Read

FINISH = {"eos": "stop", "length": "length", "context": "length"}
"""Why an answer ends, in the protocol's words."""
NOT_A_NUMBER = RefusedError(
    "the model's output was not a number", "ask in another way, or with another decoder", status=500
)


@dataclass(frozen=True)
class Piece:
    """Holds a part of an answer: its number among the request's, the text, and the tokens that begin in it."""

    number: int
    text: str
    entries: Sequence[Entry]


@dataclass(frozen=True)
class End:
    """Says that an answer is complete, and why."""

    number: int
    finish: str


Event = Piece | End | RefusedError


class Ticket:
    """Stands for a request that waits for its answers.

    Args:
        wanted: The request.

    Attributes:
        wanted: As given.
        events: What has come, for the thread that serves the request.
        gone: Whether nobody waits for it any more.
        prompt: Tokens of its prompt, pictures included; 0 before it is known.
        arrived: When it came, by the monotonic clock.
        rows: Its answers.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.gone = False
        self.prompt = 0
        self.arrived = time.monotonic()
        self.rows: list[Row] = []

    @property
    def said(self) -> int:
        """Counts the tokens of all answers."""
        return sum(row.tokens for row in self.rows)


class Row:
    """Holds one answer.

    Args:
        ticket: Its request.
        number: Its number among the request's answers.
        tokenizer: The model's.

    Attributes:
        ticket: As given.
        number: As given.
        seed: Its seed.
        tokens: How many tokens have come, the end token and those of a stop included.
        finish: Why it ended; None before.
    """

    def __init__(self, ticket: Ticket, number: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ticket, self.number, self.seed = ticket, number, ticket.wanted.seeds[number]
        self._tokenizer = tokenizer
        self.begin()

    def begin(self) -> None:
        """Forgets what has come, before the answer begins, or begins again."""
        self.tokens = 0
        self.finish: str | None = None
        self._spelling = Spelling(self._tokenizer, self.ticket.wanted.stops)
        self._entries: list[Entry] = []
        self._told = self._shown = 0

    @property
    def open(self) -> bool:
        """Returns whether somebody waits for more of it."""
        return self.finish is None and not self.ticket.gone

    @property
    def begun(self) -> bool:
        """Returns whether some of it was told, and cannot be taken back."""
        return self._told > 0

    @property
    def text(self) -> str:
        """Returns the answer."""
        return self._spelling.text

    def hear(self, token: int, ends: Collection[int], entry: Entry | None = None) -> None:
        """Takes the next token."""
        self.tokens += 1
        self._spelling.add(token)
        if token in ends or self._spelling.stopped:
            self.end("stop")
        elif self.tokens == self.ticket.wanted.tokens:
            self.end("length")
        most = self.ticket.wanted.alternatives
        if entry is not None and most is not None and token not in ends:
            self._entries.append(Entry(entry.token, entry.logprob, entry.top[:most]))

    def end(self, finish: str) -> None:
        """Ends the answer."""
        self.finish = finish
        self._spelling.end()

    def piece(self) -> Piece | None:
        """Returns what can be told and was not yet; None for nothing."""
        known = self._spelling.safe if self.finish is None else len(self.text)
        entries = self.entries[self._shown :] if self.finish is not None else self._beginning(known)[self._shown :]
        piece = Piece(self.number, self.text[self._told : known], entries)
        self._told, self._shown = max(self._told, known), self._shown + len(entries)
        return piece if piece.text or entries else None

    @property
    def entries(self) -> Sequence[Entry]:
        """Returns the tokens of the answer, without an end token and those of a stop."""
        return self._beginning(len(self.text)) if self._spelling.stopped else self._entries

    def _beginning(self, length: int) -> Sequence[Entry]:
        """The tokens that begin in the first characters."""
        starts = zip(self._spelling.starts, self._entries, strict=False)
        return [entry for start, entry in starts if start < length]


News = Sequence[tuple[Ticket, Event]]
"""What has come for which requests."""


class Following:
    """Hears of the tokens of a batch, and tells each request of its own.

    Args:
        rows: The answers.
        ends: Tokens that end an answer.
        tell: Tells requests, once for each step.
        first: Hears in which time a request's first token came.
    """

    def __init__(
        self, rows: Sequence[Row], ends: Collection[int], tell: Callable[[News], None], first: Callable[[float], None]
    ) -> None:
        self._rows, self._ends, self._tell, self._first = rows, ends, tell, first
        asked = [row.ticket.wanted.alternatives for row in rows]
        self._most = max((most for most in asked if most is not None), default=None)
        self._read: Read | None = None

    def began(self, prompts: Sequence[int]) -> None:
        """Hears how many tokens each prompt has."""
        for row, length in zip(self._rows, prompts, strict=True):
            row.ticket.prompt = length

    def following(self, choice: Choice) -> Choice:
        """Returns the choice, and around it what reads its scores where somebody asks for them."""
        if self._most is None:
            return choice
        self._read = Read(choice, len(self._rows), self._most)
        return self._read

    def said(self, said: Said) -> Collection[int]:
        """Hears the tokens of one step; returns the answers that nobody waits for any more."""
        entries = self._read.newest() if self._read is not None else {}
        news: list[tuple[Ticket, Event]] = []
        for sample, token, broken in zip(said.samples, said.tokens, said.broken, strict=True):
            row = self._rows[sample]
            if row.open:
                news += _failed(row) if broken else self._heard(row, [token], entries.get(sample))
        self._tell(news)
        return [sample for sample in said.samples if not self._rows[sample].open]

    def finished(self, answers: Sequence[Answer]) -> None:
        """Hears the whole answers, of which some were not heard token by token."""
        news: list[tuple[Ticket, Event]] = []
        for row, answer in zip(self._rows, answers, strict=True):
            if row.open and answer.finish == "nan":
                news += _failed(row)
            elif row.open:
                news += self._heard(row, answer.ids[row.tokens :], None, FINISH[answer.finish])
        self._tell(news)

    def _heard(
        self, row: Row, tokens: Sequence[int], entry: Entry | None, finish: str | None = None
    ) -> Iterator[tuple[Ticket, Event]]:
        """Takes tokens of a row, and gives what there is to tell of it."""
        if not row.ticket.said:
            self._first(time.monotonic() - row.ticket.arrived)
        for token in tokens:
            row.hear(token, self._ends, entry)
            if row.finish is not None:
                break
        if row.finish is None and finish is not None:
            row.end(finish)
        if row.ticket.wanted.stream and (piece := row.piece()):
            yield row.ticket, piece
        if row.finish is not None:
            yield row.ticket, End(row.number, row.finish)


def _failed(row: Row) -> Iterator[tuple[Ticket, Event]]:
    """Ends a request whose scores are not numbers."""
    row.ticket.gone = True
    yield row.ticket, NOT_A_NUMBER
