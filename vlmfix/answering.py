"""Batches of questions through a model: failures of single questions, failures of every question, and memory."""

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
"""Foreign errors without an answer in between after which a run asks whether the model still answers anything. One or
two odd pictures beside each other are common and eight are not; asking once more costs an eighth at the worst. After as
many questions that trouble of the machine keeps from being answered it ends."""

Asked = tuple[Item, Question | str | PassingError]
"""Whatever stands for a question, and the question; or the reason or the trouble for which it cannot be asked."""
Outcome = Answer | str | PassingError
"""What becomes of a question: an answer, the reason why it has none, or trouble that passes and says nothing of it."""


@dataclass(frozen=True)
class Failure:
    """What went wrong, in words.

    Attributes:
        reason: One line for the records.
        memory: Whether memory ran out.
        trouble: What passes, memory that ran out included; None when it is the question's own fault or foreign.
        place: Where the error was raised; empty unless it is foreign.
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
        """Whether the error may be a fault of every question: it is not ours, and nothing that passes."""
        return bool(self.place)


Outcomes = Iterator[Answer | Failure]
"""What became of the questions of a batch, one after the other."""


class Settling(ABC):
    """Settles what becomes of questions that somebody answers in batches: theirs, or the fault of all.

    Args:
        decoder: How they are answered.
        model: What the model is called, for messages.
    """

    def __init__(self, decoder: Decoder, model: str) -> None:
        self._decoder = decoder
        self._model = model

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of a batch."""

    @property
    @abstractmethod
    def ahead(self) -> int:
        """Pictures that are taken at once, at most."""

    @property
    @abstractmethod
    def known(self) -> Known:
        """What the model is."""

    @property
    @abstractmethod
    def peak_memory(self) -> int:
        """The most bytes held so far."""

    @abstractmethod
    def outcomes(self, batches: Iterable[Sequence[Asked[Item]]]) -> Generator[tuple[Sequence[Asked[Item]], Outcomes]]:
        """Gives every batch back, in order, with what became of those of its questions that can be asked."""

    @abstractmethod
    def outcome(self, question: Question) -> Answer | Failure:
        """Asks one more question."""

    def __call__(
        self, batches: Iterable[Sequence[Asked[Item]]], answered: Callable[[], Question | None]
    ) -> Generator[list[tuple[Item, Outcome]]]:
        """Answers questions, and stops when it is not the questions that are at fault.

        An error that is neither this package's own nor a lack of memory is *foreign*: it may belong to one odd picture,
        or to every question, such as a name that another library has changed. A foreign failure is held back until an
        answer shows that the model works. When ``FAILURES_IN_A_ROW`` are held back, or the questions have come to an
        end, a question that was answered before is asked again; only if it is answered again do the failures belong to
        their questions. Errors in a row need not be equal: a text may hold a picture's size, and one fault may be met
        at several places.

        While a batch is answered, the next is had and prepared in the background; closing the generator ends that.

        Trouble that passes, such as too little memory for a single row, is no fault of its question, which is left for
        another start; when it meets ``FAILURES_IN_A_ROW`` questions without an answer in between, it ends this one.

        Args:
            batches: Batches of questions.
            answered: Gives a question that has been answered with the same model, decoder and settings; None when there
                is none.

        Yields:
            What has been settled: in the order of the questions what stands for each, with its answer, the reason why
            there is none, or the trouble for which it is to be asked again.

        Raises:
            SystematicError: Every question fails; nothing was yielded about those that failed in the end.
            PassingError: Trouble that passes keeps every question from being answered.
            VlmfixError: Settings that can work with no batch.
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
    """A model with a decoder and settings, which answers batches.

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
        """Rows that go through at a time; halved when memory runs out."""
        return self._rows

    @property
    def ahead(self) -> int:
        """Those of a batch."""
        return self._rows

    @property
    def known(self) -> Known:
        """What the model is."""
        return known(self._vlm, self._decoder)

    @property
    def peak_memory(self) -> int:
        """The most bytes held so far, on the model's device."""
        return peak_memory(self._vlm.device)

    def supply(self) -> Supply:
        """What prepares questions for ``part``."""
        return Supply(self._vlm, self._threads)

    def outcomes(self, batches: Iterable[Sequence[Asked[Item]]]) -> Generator[tuple[Sequence[Asked[Item]], Outcomes]]:
        """Answers one batch while the next is had and prepared; see ``Settling.outcomes``."""
        with self.supply() as supply:
            for batch, coming in self._with_next(batches):
                yield batch, self.part(asked(batch), supply, coming)

    def outcome(self, question: Question) -> Answer | Failure:
        """Asks one more question; see ``Settling.outcome``."""
        return next(self.part([question]))

    def _with_next(
        self, batches: Iterable[Sequence[Asked[Item]]]
    ) -> Iterator[tuple[Sequence[Asked[Item]], list[Question]]]:
        """Each batch with the questions of the next, which are had before the batch is answered.

        A decoder that refines pictures encodes others than those that it is given, so it gets none ahead.
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
        """Outcomes one after the other; where a batch fails, smaller ones, until the question at fault is alone.

        Args:
            part: The questions.
            supply: Prepares what comes next; None to prepare every batch when it is asked.
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
                outcomes = self._attempt(rows, None)  # whoever took the memory may have given it back
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
        """Rows that go together: ``rows`` at most, and no more pixels than one picture may have.

        A processor that keeps a picture's shape makes as much of several thin pictures, or several large ones, as of
        one that would be refused; a picture that rows share is counted once.
        """
        limit, made = Image.MAX_IMAGE_PIXELS, 0
        seen: set[int] = set()
        for place, question in enumerate(part[: self.rows]):
            if question.picture is None or id(question.picture) in seen:
                continue
            seen.add(id(question.picture))
            made += self._vlm.enlarged(question.picture)
            if place and limit is not None and made > limit:
                return place
        return self.rows

    def _attempt(self, part: Sequence[Question], prepared: Prepared | None) -> list[Answer] | Failure:
        """The answers, or what went wrong with this batch; what would go wrong with every batch is raised."""
        settings = self._settings
        try:
            with sdpa_kernel(REPEATABLE):
                return self._vlm.generate(
                    [[] if question.picture is None else question.picture for question in part],
                    [question.prompt for question in part],
                    decoder=self._decoder,
                    max_new_tokens=settings.max_new_tokens,
                    num_beams=settings.num_beams,
                    temperature=settings.temperature,
                    seed=settings.seed,
                    prepared=prepared,
                )
        except Exception as error:
            if not (is_memory(error) or passing(error)) and _concerns_every_batch(error):
                raise
            failure = Failure.of(error)
            error.with_traceback(None)  # a frame that holds its error would keep its tensors alive
        if failure.memory and torch.cuda.is_available():
            forget(self._vlm.model)  # a smaller batch is to have the room that this one's keys and values took
            torch.cuda.empty_cache()
        return failure


def asked(batch: Iterable[Asked[Any]]) -> list[Question]:
    """Those of a batch that can be asked."""
    return [question for _, question in batch if isinstance(question, Question)]


def _settled(outcome: Failure | Outcome) -> Outcome:
    if isinstance(outcome, Failure):
        return outcome.trouble or outcome.reason
    if isinstance(outcome, Answer) and outcome.finish == "nan":
        return "the model's output was not a number"
    return outcome


def is_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _concerns_every_batch(error: Exception) -> bool:
    """Settings that cannot work, and a GPU that is lost until the process ends."""
    if isinstance(error, VlmfixError):
        return not isinstance(error, DataError | LayoutError)
    return isinstance(error, torch.AcceleratorError)
