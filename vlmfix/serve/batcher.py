"""Answers requests in batches: the one thread that decodes, and the line of those that wait for it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch.nn.attention import sdpa_kernel

from vlmfix.answering import REPEATABLE, going_together, is_memory
from vlmfix.asked import MOST
from vlmfix.decoders import Decoder, Strategy
from vlmfix.decoding.graphs import forget
from vlmfix.decoding.spelling import Words
from vlmfix.errors import DataError, LayoutError, PassingError, UnsupportedModelError, VlmfixError
from vlmfix.fitting import SAMPLED, fitting_batch
from vlmfix.generation import VLM
from vlmfix.serve.limits import Limits
from vlmfix.serve.metrics import Metrics
from vlmfix.serve.protocol import Wanted
from vlmfix.serve.refusals import RefusedError, refusal_of
from vlmfix.serve.rows import Following, News, Row, Ticket
from vlmfix.settings import Settings
from vlmfix.supply import THREADS, Question

logger = logging.getLogger(__name__)

QUIET = 0.005
"""Seconds without a further request after which a batch begins."""
GATHERING = 0.1
"""Most seconds that a batch waits for requests whose pictures are being opened, or that keep coming."""
SIZES = 64
"""Decoders whose number of rows is remembered."""

State = Literal["loading", "ready", "stopping"]
Group = tuple[Decoder, Strategy, float]
"""What answers of one batch have in common; the last is the penalty on repetition."""


class Batcher:
    """Owns the model, in a thread of its own.

    Args:
        load: Loads the model; called in that thread.
        settings: How it was asked for; ``max_new_tokens`` is the longest answer that may be.
        limits: What is allowed.
        metrics: What is counted.

    Attributes:
        state: Whether the model is there.
        error: What ended the thread; None while it works.
        vlm: The model; None before it is loaded.
        words: Writes its tokens, for the thread that serves requests; there when requests are taken.
    """

    words: Words

    def __init__(self, load: Callable[[], VLM], settings: Settings, limits: Limits, metrics: Metrics) -> None:
        self._load, self._settings, self._limits, self._metrics = load, settings, limits, metrics
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.vlm: VLM | None = None
        self._ended: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._waiting: dict[Ticket, list[Row]] = {}  # oldest first, each with the answers that have not begun
        self._running: Sequence[Row] = ()
        self._arrivals = self._coming = 0
        self._sizes: dict[Decoder, int] = {}
        self._thread = threading.Thread(target=self._work, name="vlmfix-model", daemon=True)
        self._pictures = ThreadPoolExecutor(THREADS, thread_name_prefix="vlmfix-prepared")

    def start(self, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
        """Starts the thread.

        Args:
            loop: Where requests are served.
            ended: Called, in the thread, when it cannot go on.
        """
        self._loop, self._ended = loop, ended
        self._thread.start()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Lets a batch wait a little for a request that is read inside the block."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify()

    def submit(self, wanted: Wanted) -> Ticket:
        """Puts a request into the line.

        Raises:
            RefusedError: The model is not there, or too many wait.
        """
        with self._changed:
            if self.vlm is None or self.state != "ready":
                raise unready(self.state)
            if len(self._waiting) >= self._limits.waiting:
                raise RefusedError(
                    f"{self._limits.waiting} requests wait already", "ask again later", status=503, code="overloaded"
                )
            ticket = Ticket(wanted)
            ticket.rows = [Row(ticket, number, self.vlm.processor.tokenizer) for number in range(len(wanted.seeds))]
            self._waiting[ticket] = list(ticket.rows)
            self._arrivals += 1
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Takes a request out of the line, or out of its batch at the next step."""
        with self._changed:
            ticket.gone = True
            self._waiting.pop(ticket, None)
            self._metrics.waiting.set(len(self._waiting))

    def give_up(self) -> None:
        """Refuses all requests that are not answered yet, and takes no further ones."""
        with self._changed:
            self.state = "stopping"
            tickets = {row.ticket for row in self._running if row.open} | set(self._waiting)
            self._waiting.clear()
            self._changed.notify()
            for ticket in tickets:
                ticket.gone = True
        self._tell([(ticket, unready("stopping")) for ticket in tickets])

    def close(self, seconds: float) -> bool:
        """Ends the thread; returns whether it has ended within some seconds."""
        self.give_up()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._pictures.shutdown(wait=False, cancel_futures=True)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            self.vlm = self._load()
            self.words = Words(self.vlm.beside().processor.tokenizer)
            with self._changed:
                if self.state == "loading":
                    self.state = "ready"
            while (rows := self._next()) is not None:
                try:
                    self._answer(rows)
                except torch.AcceleratorError:
                    raise
                except Exception as error:
                    self._refuse(rows, error)
                self._running = ()
        except BaseException as error:  # handed to the thread that started this one
            self.error = error
            self.give_up()
            self._ended()

    def _next(self) -> list[Row] | None:
        """Waits for requests, and takes those that go together, the oldest and its like; None when there is an end."""
        while True:
            with self._changed:
                while not self._waiting and self.state != "stopping":
                    self._changed.wait()
                if self.state == "stopping":
                    return None
                self._gather()
                if not self._waiting:
                    continue
                group = _group(next(iter(self._waiting)))
                some = [row for ticket, rows in self._waiting.items() if _group(ticket) == group for row in rows[:1]]
            try:
                size = self._size(group, some)
            except Exception as error:
                self._refuse(self._taken(group, MOST), error)
                continue
            if rows := self._taken(group, size):
                return rows

    def _gather(self) -> None:
        """Waits while requests keep coming, but not for long."""
        end = time.monotonic() + GATHERING
        most = self._limits.rows or SIZES
        while (left := end - time.monotonic()) > 0 and sum(map(len, self._waiting.values())) < most:
            before = self._arrivals
            self._changed.wait(min(QUIET, left))
            if self._arrivals == before and not self._coming:
                return

    def _taken(self, group: Group, size: int) -> list[Row]:
        """Takes the oldest answers of a group out of the line; they run from now on."""
        rows: list[Row] = []
        with self._changed:
            for ticket in [ticket for ticket in self._waiting if _group(ticket) == group]:
                own, room = self._waiting.pop(ticket), size - len(rows)
                rows += own[:room]
                if own[room:]:
                    self._waiting = {ticket: own[room:], **self._waiting}  # it stays the oldest
                if len(rows) == size:
                    break
            self._running = rows
            self._metrics.waiting.set(len(self._waiting))
        return rows

    def _size(self, group: Group, some: Sequence[Row]) -> int:
        """How many rows a batch of a group has at most."""
        decoder = group[0]
        if decoder not in self._sizes:
            while len(self._sizes) >= SIZES:
                del self._sizes[next(iter(self._sizes))]
            self._sizes[decoder] = self._limits.rows or self._fitting(decoder, some[:SAMPLED])
        return self._sizes[decoder]

    def _fitting(self, decoder: Decoder, some: Sequence[Row]) -> int:
        wanted = [row.ticket.wanted for row in some]
        questions = [Question(asked.pictures[0] if asked.pictures else None, asked.prompt) for asked in wanted]
        return fitting_batch(self._model, decoder, self._settings, questions)

    @property
    def busy(self) -> bool:
        """Returns whether some request is not answered yet."""
        return bool(self._running or self._waiting)

    @property
    def _model(self) -> VLM:
        if self.vlm is None:
            raise RuntimeError("the model is not loaded")
        return self.vlm

    def _answer(self, rows: Sequence[Row]) -> None:
        """Answers a batch; what fails in company is tried in halves, until the request at fault is alone."""
        parts = [list(rows)]
        while parts:
            part = [row for row in parts.pop() if row.open]
            if not part:
                continue
            fits = going_together(self._model, [row.ticket.wanted.pictures for row in part])
            if fits < len(part):
                parts.append(part[fits:])
                part = part[:fits]
            error = self._attempt(part)
            failing = [row for row in part if row.open]
            if error is None or not failing:
                continue
            if isinstance(error, torch.AcceleratorError):
                self._refuse(part, error)
                raise error  # the GPU is lost to this process
            memory = is_memory(error)
            if memory and len(part) > 1:
                self._sizes[_group(part[0].ticket)[0]] = len(part) // 2
                logger.warning("out of memory with %d rows: going on with %d", len(part), len(part) // 2)
            if len(part) == 1 or not (memory or _concerns_a_row(error)):
                self._refuse(failing, error)
                continue
            self._refuse([row for row in failing if row.begun], error)
            again = [row for row in failing if row.open]
            for row in again:
                row.begin()
            half = (len(again) + 1) // 2
            parts += [again[half:], again[:half]]

    def _attempt(self, rows: Sequence[Row]) -> Exception | None:
        """Answers rows together; returns what it ended with before all were answered."""
        vlm, (decoder, strategy, penalty) = self._model, _group(rows[0].ticket)
        wanted = [row.ticket.wanted for row in rows]
        following = Following(rows, vlm.reading["ends"], self._tell, self._metrics.first.observe)
        self._metrics.rows.observe(len(rows))
        try:
            shown = [list(asked.pictures) for asked in wanted]
            prompts = [asked.prompt for asked in wanted]
            earlier = [asked.earlier for asked in wanted] if any(asked.earlier for asked in wanted) else None
            prepared = None
            if not decoder.refines:
                prepared = vlm.prepared(prompts, shown, earlier=earlier, each=self._pictures.map)
            with sdpa_kernel(REPEATABLE):
                answers = vlm.generate(
                    shown,
                    prompts,
                    decoder=decoder,
                    max_new_tokens=[asked.tokens for asked in wanted],
                    num_beams=strategy.num_beams,
                    temperature=strategy.temperature,
                    top_p=strategy.top_p,
                    top_k=strategy.top_k,
                    repetition_penalty=penalty,
                    seed=[row.seed for row in rows],
                    earlier=earlier,
                    prepared=prepared,
                    listener=following,
                )
            following.finished(answers)
            return None
        except Exception as error:
            error.with_traceback(None)  # a frame that holds its error would keep its tensors alive
            failure = error
        if is_memory(failure) and torch.cuda.is_available():
            forget(vlm.model)  # a smaller batch needs the room that this one's KV cache took
            torch.cuda.empty_cache()
        return failure

    def _refuse(self, rows: Sequence[Row], error: Exception) -> None:
        if is_memory(error):
            error = PassingError("out of memory", "ask again later")
        refusal = refusal_of(error)
        if refusal.status == 500:
            logger.error("vlmfix: %s", refusal.message)
        tickets = {row.ticket for row in rows if not row.ticket.gone}
        for ticket in tickets:
            ticket.gone = True
        self._tell([(ticket, refusal) for ticket in tickets])

    def _tell(self, news: News) -> None:
        """Brings what there is to tell to the thread that serves requests, all at once."""
        if news and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                self._loop.call_soon_threadsafe(_put, news)


def unready(state: State) -> RefusedError:
    """Makes the refusal of a request to a server that is not ready."""
    said = "the model is being loaded" if state == "loading" else "the server is being stopped"
    return RefusedError(said, "ask again later", status=503, code=state)


def _group(ticket: Ticket) -> Group:
    wanted = ticket.wanted
    return wanted.decoder, wanted.strategy, wanted.repetition_penalty


def _concerns_a_row(error: Exception) -> bool:
    """Returns whether an error may be the fault of one request, and not of what all have in common."""
    if isinstance(error, VlmfixError):
        return isinstance(error, DataError | LayoutError | UnsupportedModelError)
    return True


def _put(news: News) -> None:
    for ticket, event in news:
        ticket.events.put_nowait(event)
