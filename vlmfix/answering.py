"""Runs questions in batches: isolates failing ones, stops when all fail, and halves a batch that memory cannot hold."""

from __future__ import annotations

import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmfix.asked import whole
from vlmfix.card import Known, known, peak_memory
from vlmfix.decoders import Decoder
from vlmfix.decoding.graphs import forget
from vlmfix.errors import DataError, LayoutError, PassingError, SystematicError, VlmfixError, passing
from vlmfix.generation import VLM, Answer
from vlmfix.models.layout import Prepared
from vlmfix.settings import Settings
from vlmfix.supply import THREADS, Question, Supply

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels that give the same bits every time. cuDNN's is left out: on a busy H200 it rounded otherwise from
run to run, which changed words in one caption of eighty."""

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")

FAILURES_IN_A_ROW = 8
"""Foreign errors without an answer in between after which a run tests whether the model still answers anything. One or
two odd pictures in a row are common and eight are not; the test costs an eighth at the worst. When trouble of the
machine keeps as many questions in a row from being answered, the run ends."""

Asked = tuple[Item, Question | str | PassingError]
"""A caller's item, and its question; or the reason or the trouble that keeps the question from being asked."""
Outcome = Answer | str | PassingError
"""Result of a question: an answer, the reason why it has none, or passing trouble, which is no fault of its own."""


@dataclass(frozen=True)
class Failure:
    """Describes an error in words.

    Attributes:
        reason: One line for the records.
        memory: Whether memory ran out.
        trouble: Passing trouble, such as lack of memory; None when the error is the question's own fault or foreign.
        place: File and line that raised the error; empty unless it is foreign.
        trace: Its traceback; empty unless it is foreign.
    """

    reason: str
    memory: bool = False
    trouble: PassingError | None = None
    place: str = ""
    trace: str = ""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Describes an error."""
        if not is_memory(error) and (trouble := passing(error)):
            return cls(trouble.message, trouble=trouble)
        if isinstance(error, VlmfixError):
            return cls(str(error))
        first = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first}"
        if is_memory(error):
            trouble = PassingError(f"out of memory: {reason}", "free some memory, or take smaller pictures")
            return cls(trouble.message, memory=True, trouble=trouble)
        *_, last = traceback.extract_tb(error.__traceback__)
        place = f"{last.filename.rpartition('-packages/')[2]}, line {last.lineno}"
        return cls(reason, place=place, trace="".join(traceback.format_exception(error)))

    @property
    def foreign(self) -> bool:
        """Returns whether the error may concern every question: it is not ours, and not passing trouble."""
        return bool(self.place)


Outcomes = Iterator[Answer | Failure]
"""Results of a batch's questions, one after the other."""


class Settling(ABC):
    """Decides for questions answered in batches whether each failure is the question's own or concerns all of them.

    Args:
        decoder: The decoder that answers.
        model: Name of the model, for messages.
    """

    def __init__(self, decoder: Decoder, model: str) -> None:
        self._decoder = decoder
        self._model = model

    @property
    @abstractmethod
    def rows(self) -> int:
        """Returns the rows of a batch."""

    @property
    @abstractmethod
    def ahead(self) -> int:
        """Returns the most pictures that are taken at once."""

    @property
    @abstractmethod
    def known(self) -> Known:
        """Returns the identity of the model."""

    @property
    @abstractmethod
    def peak_memory(self) -> int:
        """Returns the most bytes held so far."""

    @abstractmethod
    def outcomes(self, batches: Iterable[Sequence[Asked[Item]]]) -> Generator[tuple[Sequence[Asked[Item]], Outcomes]]:
        """Yields every batch, in order, with the results of its questions that can be asked."""

    @abstractmethod
    def outcome(self, question: Question) -> Answer | Failure:
        """Asks one more question."""

    def __call__(
        self, batches: Iterable[Sequence[Asked[Item]]], answered: Callable[[], Question | None]
    ) -> Generator[list[tuple[Item, Outcome]]]:
        """Answers questions, and stops when something other than the questions is at fault.

        An error that is neither this package's own nor a lack of memory is *foreign*: it may belong to one odd picture,
        or to every question, such as a name that another library has changed. A foreign failure is held back until an
        answer shows that the model works. When ``FAILURES_IN_A_ROW`` are held back, or the questions have come to an
        end, a question that was answered before is asked again; only if it is answered again do the failures belong to
        their questions. Errors in a row need not be equal: a text may hold a picture's size, and one fault may be met
        at several places.

        While a batch is answered, the next one is prepared in the background; closing the generator ends that.

        Passing trouble, such as too little memory for a single row, is no fault of its question, which is left for
        another start; when it meets ``FAILURES_IN_A_ROW`` questions without an answer in between, it ends this one.

        Args:
            batches: Batches of questions.
            answered: Returns a question that has been answered with the same model, decoder and settings; None when
                there is none.

        Yields:
            Settled items in the order of the questions, each with its answer, the reason why there is none, or the
            trouble for which it is to be asked again.

        Raises:
            SystematicError: Every question fails; nothing was yielded about the last failures.
            PassingError: Passing trouble keeps every question from being answered.
            VlmfixError: The settings can work with no batch.
        """
        with closing(self.outcomes(batches)) as answers:
            yield from self._settled(answers, answered)

    def _settled(
        self, answers: Iterable[tuple[Sequence[Asked[Item]], Outcomes]], answered: Callable[[], Question | None]
    ) -> Iterator[list[tuple[Item, Outcome]]]:
        held: list[tuple[Item, Outcome]] = []
        row: list[Failure] = []
        stuck = 0
        for batch, outcomes in answers:
            settled: list[tuple[Item, Outcome]] = []
            for item, question in batch:
                outcome = next(outcomes) if isinstance(question, Question) else question
                found = _settled(outcome)
                held.append((item, found))
                if isinstance(found, PassingError):
                    stuck += 1
                    if stuck == FAILURES_IN_A_ROW:
                        if settled:
                            yield settled
                        raise PassingError(f"{stuck} questions in a row are left open: {found.message}", found.hint)
                elif isinstance(outcome, Failure) and outcome.foreign:
                    row.append(outcome)
                    if len(row) == FAILURES_IN_A_ROW:
                        if settled:
                            yield settled
                        settled = []
                        self._check_that_it_answers(answered, row)
                        row = []
                elif isinstance(outcome, Answer):
                    row, stuck = [], 0
                if not row:
                    settled += held
                    held = []
            if settled:
                yield settled
        if held:
            self._check_that_it_answers(answered, row)
            yield held

    def _check_that_it_answers(self, answered: Callable[[], Question | None], row: Sequence[Failure]) -> None:
        """Raises unless a question that was answered before is answered again."""
        question = answered()
        outcome = None if question is None else _settled(self.outcome(question))
        if isinstance(outcome, PassingError):
            raise outcome
        if not isinstance(outcome, Answer):
            raise self._systematic(row)

    def _systematic(self, row: Sequence[Failure]) -> SystematicError:
        last = row[-1]
        counted = f"{len(row)} questions in a row" if len(row) > 1 else "one question"
        error = SystematicError(
            f"{counted} failed with {self._decoder.spec()} and no other is answered: {last.reason} ({last.place})",
            f"nothing is recorded of them; see what vlmfix doctor {self._model} says, try another picture, "
            "or use --debug for the traceback",
        )
        error.add_note(last.trace)
        return error


class Answerer(Settling):
    """Answers batches with a model, a decoder and settings, in this process.

    Args:
        vlm: The model.
        decoder: How it decodes.
        settings: Its generation settings; the model's own fields are not read.
        batch_size: Rows at a time.
        threads: Pictures that are prepared at once in the background.
    """

    def __init__(
        self, vlm: VLM, decoder: Decoder, settings: Settings, batch_size: int, *, threads: int = THREADS
    ) -> None:
        super().__init__(decoder, settings.model)
        self._vlm = vlm
        self._settings = settings
        self._threads = threads
        self._rows = whole("batch_size", batch_size, 1)

    @property
    def rows(self) -> int:
        """Returns the rows of a batch; halved when memory runs out."""
        return self._rows

    @property
    def ahead(self) -> int:
        """Returns the rows of a batch."""
        return self._rows

    @property
    def known(self) -> Known:
        """Returns the identity of the model."""
        return known(self._vlm, self._decoder)

    @property
    def peak_memory(self) -> int:
        """Returns the most bytes held so far, on the model's device."""
        return peak_memory(self._vlm.device)

    def supply(self) -> Supply:
        """Makes the supply that prepares questions for ``part``."""
        return Supply(self._vlm, self._threads, system=self._settings.system)

    def outcomes(self, batches: Iterable[Sequence[Asked[Item]]]) -> Generator[tuple[Sequence[Asked[Item]], Outcomes]]:
        """Answers one batch while the next is prepared; see ``Settling.outcomes``."""
        with self.supply() as supply:
            for batch, coming in self._with_next(batches):
                yield batch, self.part(asked(batch), supply, coming)

    def outcome(self, question: Question) -> Answer | Failure:
        """Asks one more question; see ``Settling.outcome``."""
        return next(self.part([question]))

    def _with_next(
        self, batches: Iterable[Sequence[Asked[Item]]]
    ) -> Iterator[tuple[Sequence[Asked[Item]], list[Question]]]:
        """Yields each batch with the next batch's questions, which it fetches before the batch is answered.

        A decoder that refines pictures encodes other pictures than those of the batch, so it gets none ahead.
        """
        coming = iter(batches)
        batch = next(coming, None)
        while batch is not None:
            following = None if self._decoder.refines else next(coming, None)
            yield batch, [] if following is None else asked(following)
            batch = next(coming, None) if self._decoder.refines else following

    def part(
        self, part: Sequence[Question], supply: Supply | None = None, coming: Sequence[Question] = ()
    ) -> Iterator[Answer | Failure]:
        """Yields outcomes one after the other; it splits a failing batch until the question at fault is alone.

        Args:
            part: The questions.
            supply: Prepares the next batch; None to prepare every batch when it is asked.
            coming: The questions that come after them.
        """
        if self._decoder.refines:
            supply = None
        while part:
            rows = part[: self._fitting(part)]
            part = part[len(rows) :]
            prepared = None
            if supply is not None:
                prepared = supply.take(rows)
                supply.begin((part or coming)[: self._fitting(part or coming)])
            outcomes = self._attempt(rows, prepared)
            if isinstance(outcomes, Failure) and outcomes.trouble and len(rows) == 1:
                outcomes = self._attempt(rows, None)  # another process may have freed memory
            if not isinstance(outcomes, Failure):
                yield from outcomes
            elif len(rows) == 1:
                yield outcomes
            elif outcomes.memory:
                self._rows = len(rows) // 2
                logger.warning("out of memory with %d rows: going on with %d", len(rows), self._rows)
                yield from self.part(rows, supply)
            else:
                for question in rows:
                    yield from self.part([question])

    def _fitting(self, part: Sequence[Question]) -> int:
        """Counts the rows that go together: at most ``rows``, and no more pixels than one picture may have."""
        shown = [[] if question.picture is None else [question.picture] for question in part[: self.rows]]
        return min(self.rows, going_together(self._vlm, shown)) if shown else self.rows

    def _attempt(self, part: Sequence[Question], prepared: Prepared | None) -> list[Answer] | Failure:
        """Answers a batch; returns a failure that concerns this batch, and raises one that concerns every batch."""
        settings = self._settings
        try:
            with sdpa_kernel(REPEATABLE):
                return self._vlm.generate(
                    [[] if question.picture is None else question.picture for question in part],
                    [question.prompt for question in part],
                    decoder=self._decoder,
                    **settings.decoding(),
                    words=settings.words,
                    confidence=settings.confidence,
                    similarity=settings.similarity,
                    prepared=prepared,
                )
        except Exception as error:
            if not (is_memory(error) or passing(error)) and _concerns_every_batch(error):
                raise
            failure = Failure.of(error)
            error.with_traceback(None)  # a frame that holds its error would keep its tensors alive
        if failure.memory and torch.cuda.is_available():
            forget(self._vlm.model)  # a smaller batch needs the room that this one's KV cache took
            torch.cuda.empty_cache()
        return failure


def going_together(vlm: VLM, shown: Sequence[Sequence[Image.Image]]) -> int:
    """Counts the first rows whose pictures make together no more pixels than one picture may have, at least 1.

    A processor that keeps a picture's shape can make as many pixels of several thin or large pictures as of one that
    would be refused; a picture that rows share is counted once.

    Args:
        vlm: The model.
        shown: The pictures of each row.
    """
    limit, made = Image.MAX_IMAGE_PIXELS, 0
    seen: set[int] = set()
    for place, pictures in enumerate(shown):
        for picture in pictures:
            if id(picture) not in seen:
                seen.add(id(picture))
                made += vlm.enlarged(picture, len(pictures))
        if place and limit is not None and made > limit:
            return place
    return len(shown)


def asked(batch: Iterable[Asked[Any]]) -> list[Question]:
    """Returns the questions of a batch that can be asked."""
    return [question for _, question in batch if isinstance(question, Question)]


def _settled(outcome: Failure | Outcome) -> Outcome:
    if isinstance(outcome, Failure):
        return outcome.trouble or outcome.reason
    if isinstance(outcome, Answer) and outcome.finish == "nan":
        return "the model's output was not a number"
    return outcome


def is_memory(error: Exception) -> bool:
    """Returns whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _concerns_every_batch(error: Exception) -> bool:
    """Returns whether an error concerns every batch: settings that cannot work, or a GPU lost to this process."""
    if isinstance(error, VlmfixError):
        return not isinstance(error, DataError | LayoutError)
    return isinstance(error, torch.AcceleratorError)
