"""The front door: pictures and questions in, answers out."""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vlmfix.asked import Shown, number, pictures_of, questions_of, whole
from vlmfix.decoders import Decoder, Strategy, parse
from vlmfix.decoders.picture.refined import PictureMemo, Refined
from vlmfix.decoding.beams import search
from vlmfix.decoding.choice import Choice, Drawn, MostProbable
from vlmfix.decoding.draws import drawing, seed_of
from vlmfix.decoding.encoding import generation_inputs
from vlmfix.decoding.listening import Listener
from vlmfix.decoding.loop import Said, decode
from vlmfix.decoding.plan import Gate
from vlmfix.decoding.repetition import Repetition, RepetitionPenalty, Unrepeated
from vlmfix.decoding.running import Running, running
from vlmfix.decoding.spelling import Pieces, Spelling, spelled, words_of
from vlmfix.errors import DataError, IncompatibleDecodersError, UsageError
from vlmfix.models.checkpoint import Checkpoint, limited, said_before
from vlmfix.models.families import family_of
from vlmfix.models.layout import Batch, Earlier, Prepared, Turn
from vlmfix.models.turns import turn_of
from vlmfix.parsing import is_text
from vlmfix.settings import Settings
from vlmfix.upstream import defaults
from vlmfix.upstream.contracts import check_model
from vlmfix.upstream.wrappers import unwrapped, weights_of

logger = logging.getLogger(__name__)

SEEDS = 2**63
"""How many seeds there are, from 0."""

Pictures = Shown | Sequence[Shown]
"""The picture of one question, or its pictures."""
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


@dataclass(frozen=True, eq=False)
class VLM(Checkpoint):
    """A model that answers, with any decoder.

    Attributes:
        memo: What refining decoders found out about single pictures, for further questions about them.
    """

    memo: PictureMemo = field(default_factory=PictureMemo, repr=False)

    def generate(
        self,
        pictures: Sequence[Pictures],
        prompts: str | Sequence[str],
        *,
        decoder: Decoder | str = "greedy",
        max_new_tokens: int | Sequence[int] = 128,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        system: str | None = None,
        earlier: Sequence[Sequence[Turn]] | None = None,
        static_cache: bool = False,
        prepared: Prepared | None = None,
        listener: Listener | None = None,
        words: bool = False,
    ) -> list[Answer]:
        """Answers questions about pictures, as one batch.

        An answer does not depend on its neighbours: thresholds, noise and sampling are per row. Threads that use one
        model are answered one after the other. Prompt and answer together are no longer than the model's context.

        Args:
            pictures: B pictures, or B lists of them: PIL pictures, the right way up, for EXIF's orientation is not
                looked at; paths and URLs of files, which are turned as EXIF says; or uint8 arrays, (height, width, 3).
                What is not RGB becomes RGB as in a file.
            prompts: One question for all, or B questions.
            decoder: A decoder, or its specification such as ``vcd:contrast=0.5``.
            max_new_tokens: Longest answer in tokens, or that of each row.
            num_beams: Beams; 1 is greedy search or sampling, or what the decoder says (``beam``).
            temperature: 0 takes the most probable token, or what the decoder says (``sample``); above, samples at this
                temperature.
            top_p: Nucleus of sampling, in (0, 1].
            top_k: How many of the most probable tokens are sampled from; 0 for all.
            repetition_penalty: Above 0. Scores of tokens that stand in the prompt or the answer so far are divided by
                it where they are positive, and multiplied where they are negative, after the decoder has made them and
                before a token is chosen; 1 leaves them.
            stop: A text, or several, that end an answer and do not belong to it. A search with beams and a static cache
                look for them when their answers are complete.
            seed: Seed of sampling, or that of each row, together with the row's question and pixels.
            system: System message of all rows; None keeps the chat template's own.
            earlier: For each row, what was said before its question, oldest first, which may begin with a system
                message of the row's own. Pictures of these turns are the first of the row's.
            static_cache: Preallocates the cache; on a GPU decoding is then compiled, which pays over many batches.
            prepared: What ``prepared`` has made of the same pictures and questions; None makes it here. A decoder that
                refines pictures has no use for it.
            listener: Follows the answers token by token; not where beams search, which know theirs at the end.
            words: Says of every word of an answer how sure it was.

        Raises:
            DataError: The numbers of pictures and prompts differ, or are zero, or something else is among them; a
                prompt leaves no room for an answer in the model's context; or an answer could outgrow a sliding window
                in which the decoder edits attention.
            UsageError: A parameter is out of range, or contradicts the decoder; or other pictures or questions were
                prepared.
            IncompatibleDecodersError: The decoder cannot act on this model or kind of run; it refines pictures and
                something was said before; or a listener is to follow a static cache, or a model inside ``applied``.
            UnsupportedModelError: The chat template has no place for a system message or for earlier turns.
        """
        rows, asked = _questions(pictures, prompts)
        method = _method(decoder)
        request = _Request(
            rows=rows,
            prompts=asked,
            decoder=method,
            limits=_each(max_new_tokens, len(rows), "max_new_tokens"),
            strategy=_strategy(
                method, Strategy(num_beams=num_beams, temperature=temperature, top_p=top_p, top_k=top_k)
            ),
            repetition_penalty=repetition_penalty,
            stops=stops_of(stop),
            seeds=_each(seed, len(rows), "seed"),
            system=system,
            earlier=said_before(earlier, rows),
            static_cache=static_cache,
            prepared=prepared,
            listener=listener,
            words=words,
        )
        if prepared is not None:
            _check_prepared(prepared, request)
        with turn_of(self.model).taken():
            started = time.perf_counter()
            request, refined = self._refined(request)
            found = self._found(request)
        seconds = (time.perf_counter() - started) / len(rows)
        answers = [self._answer(said, seconds, request) for said in found]
        return [replace(answer, refined=look) for answer, look in zip(answers, refined, strict=True)]

    def refine(
        self, pictures: Sequence[Pictures], prompts: str | Sequence[str], *, decoder: Decoder | str
    ) -> list[Refined]:
        """Shows where a refining decoder looks: what ``generate`` would let the model see, without answering.

        Args:
            pictures: B pictures, or B lists of pictures.
            prompts: One question for all, or B questions.
            decoder: A decoder that refines pictures, such as ``vicrop``, or a chain that begins with one.

        Raises:
            DataError: The numbers of pictures and prompts differ, or are zero, or something else is among them.
            IncompatibleDecodersError: The decoder leaves pictures as they are, or cannot act on this model.
        """
        method = _method(decoder)
        if not method.refines:
            raise IncompatibleDecodersError(f"{method.name} leaves pictures as they are", "use carve or vicrop")
        rows, asked = _questions(pictures, prompts)
        request = _Request(rows=rows, prompts=asked, decoder=method, limits=[1] * len(rows), seeds=[0] * len(rows))
        with turn_of(self.model).taken():
            return method.refine(self, request.rows, request.prompts, self.memo.of(weights_of(self.model)))

    def stream(
        self,
        picture: Pictures,
        prompt: str,
        *,
        decoder: Decoder | str = "greedy",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        system: str | None = None,
        earlier: Sequence[Turn] = (),
    ) -> Generator[str]:
        """Answers one question and yields the text as it comes; parameters as in ``generate``, ``earlier`` for the one.

        A decoder that searches with beams knows its answer at the end, and the text then comes in one piece. The model
        is this stream's until the answer is complete, or the generator is closed, which ends generation: other calls
        wait.

        Raises:
            DataError: Picture and prompt are something else.
            UsageError: A parameter is out of range, or contradicts the decoder.
            IncompatibleDecodersError: The calling thread has the model already, in a block of ``applied``; raised where
                the text is read.
        """
        rows, asked = _questions([picture], prompt)
        method = _method(decoder)
        request = _Request(
            rows=rows,
            prompts=asked,
            decoder=method,
            limits=[max_new_tokens],
            strategy=_strategy(method, Strategy(temperature=temperature, top_p=top_p, top_k=top_k)),
            repetition_penalty=repetition_penalty,
            stops=stops_of(stop),
            seeds=[seed],
            system=system,
            earlier=said_before([earlier], rows) if earlier else None,
        )
        return self._streamed(request)

    def _streamed(self, request: _Request) -> Generator[str]:
        """The text of a request for one answer, as it comes."""
        if request.strategy.num_beams > 1:
            (answer,) = self.generate(
                request.rows,
                request.prompts,
                decoder=request.decoder,
                max_new_tokens=request.limits,
                repetition_penalty=request.repetition_penalty,
                stop=request.stops,
                system=request.system,
                earlier=request.earlier,
            )
            if answer.text:
                yield answer.text
            return
        turn = turn_of(self.model)
        if turn.mine:
            given = "a stream inside a block that has put a decoder to work on the same model"
            raise IncompatibleDecodersError(given, "leave the block first, or name the decoder in stream(...)")
        left = threading.Event()
        streamer = Pieces(_tokenizer(self.processor), request.stops)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with turn.taken():
                    refined, _ = self._refined(request)
                    (said,) = self._found(refined, streamer, left)
                    if self._answer(said, 0.0, request).finish == "context":
                        logger.warning("vlmfix: the model's context is full, which cut the answer")
            except BaseException as error:  # handed to the caller's thread
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)

        def end() -> None:
            left.set()
            thread.join()

        thread.start()
        atexit.register(end)  # an interpreter that ends under a thread at work is aborted
        try:
            yield from streamer
        finally:  # also where the reader leaves early: the model is then as it was before anybody else gets it
            end()
            atexit.unregister(end)
        if failure:
            raise failure[0]

    def _refined(self, request: _Request) -> tuple[_Request, Sequence[Refined | None]]:
        """The request with the pictures that the model is to see, and how they came about."""
        if not request.decoder.refines:
            return request, [None] * len(request.rows)
        if request.system is not None or request.earlier is not None:
            raise _more_than_a_question(request.decoder)
        found = request.decoder.refine(self, request.rows, request.prompts, self.memo.of(weights_of(self.model)))
        rows = [refined.pictures for refined in found]
        return replace(request, rows=rows, decoder=request.decoder.decoding, prepared=None), found

    def _found(
        self, request: _Request, streamer: Pieces | None = None, left: threading.Event | None = None
    ) -> list[_Found]:
        """What the model says to a request.

        Args:
            request: The request, with the pictures that the model is to see.
            streamer: Gets the tokens of the one answer as they come, and is told its end.
            left: Set when nobody reads any more.
        """
        prepared = request.prepared or self.prepared(
            request.prompts, request.rows, system=request.system, earlier=request.earlier
        )
        if request.listener is not None:
            request.listener.began(prepared.lengths)
        batch = self.placed(prepared)
        method, beams = request.decoder, request.strategy.num_beams
        layout, plan = method.planned(self, batch, num_beams=beams)
        shadowed = "generate" in vars(self.model)  # by a block of ``applied`` around this call, or by whoever
        if request.listener is not None and (request.static_cache or shadowed):
            raise IncompatibleDecodersError(
                "a listener with a static cache, or inside a block that has put a decoder to work on the same model",
                "leave the block, the static cache or the listener out",
            )
        if request.static_cache or shadowed:
            with method.at_work(self, batch, num_beams=beams, planned=(layout, plan)) as (given, watch):
                return self._generated(request, batch, given, watch.room, streamer, left)
        limits, name = request.limits, method.spec()
        with running(self, batch, layout, plan, limit=limits, name=name, reorders=beams > 1) as call:
            if beams > 1:
                penalty = request.repetition_penalty
                repetition = None if penalty == 1 else Repetition(penalty, batch["input_ids"], batch.attention_mask)
                course = None if plan.leader is None else plan.leader(call)
                found = search(call, beams, defaults.ends(self.model), course, repetition)
                said = [_Found(one.answer, one.broken) for one in found]
            else:
                said = self._decoded(call, plan.gate, request, batch, streamer, left)
        rooms = zip(said, call.room, limits, strict=True)
        return [replace(one, full=len(one.ids) == room < limit) for one, room, limit in rooms]

    def _decoded(
        self,
        call: Running,
        gate: Gate | None,
        request: _Request,
        batch: Batch,
        streamer: Pieces | None,
        left: threading.Event | None,
    ) -> list[_Found]:
        """The answers of our own loop, with tokens chosen as the request says, through the gate where there is one."""
        ids: list[list[int]] = [[] for _ in request.rows]
        broken: list[list[int]] = [[] for _ in request.rows]
        sure: list[list[tuple[float, float]]] = [[] for _ in request.rows]
        draws = self._draws(request)
        choice: Choice = Drawn(draws) if draws else MostProbable()
        if gate is not None:
            choice = gate(call.newest, draws, sampling=False)
        if request.repetition_penalty != 1:
            penalty = request.repetition_penalty
            choice = Unrepeated(choice, Repetition(penalty, batch["input_ids"], batch.attention_mask))
        if request.listener is not None:
            choice = request.listener.following(choice)
        stops = request.stops
        spelled = [Spelling(_tokenizer(self.processor), stops) for _ in request.rows] if stops else []
        unwanted: set[int] = set()
        for step, said in enumerate(decode(call, choice, defaults.ends(self.model), unwanted)):
            for sample, token, odd in zip(said.samples, said.tokens, said.broken, strict=True):
                ids[sample].append(token)
                broken[sample] += [step] * odd
            for sample, *numbers in zip(said.samples, said.logprobs, said.entropies, strict=True):
                sure[sample].append((numbers[0], numbers[1]))
            if spelled:
                unwanted.update(_stopped(spelled, said))
            if streamer is not None:
                streamer.put(torch.tensor(said.tokens))
            if left is not None and left.is_set():
                break
            if request.listener is not None:
                unwanted.update(request.listener.said(said))
        if streamer is not None:
            streamer.end()
        return [_Found(tuple(own), odd, sure=both) for own, odd, both in zip(ids, broken, sure, strict=True)]

    @torch.no_grad()
    def _generated(
        self,
        request: _Request,
        batch: Batch,
        given: dict[str, Any],
        room: Tensor | None,
        streamer: Pieces | None,
        left: threading.Event | None,
    ) -> list[_Found]:
        """The answers of the model's own ``generate``: with a static cache, or in another's block."""
        model: Any = self.model
        watch, most = NumberWatch(batch.length), max(request.limits)
        own: dict[str, Any] = {"max_new_tokens": most, **Strategy(num_beams=request.strategy.num_beams).arguments()}
        # A decoder that samples lets transformers draw, here each row does.
        penalty = request.repetition_penalty
        lower = [] if penalty == 1 else [RepetitionPenalty(penalty, batch["input_ids"], batch.attention_mask)]
        own["logits_processor"] = LogitsProcessorList([watch, *lower, *self._draws(request)])
        if request.static_cache:
            own["cache_implementation"] = "static"
        if left is not None:
            own["stopping_criteria"] = StoppingCriteriaList([_Left(left)])
        if streamer is not None:
            streamer.skip_prompt = True  # which transformers, and loops, put first
            # transformers hands its own streamer to no loop, so a loop takes it under another name
            own["token_streamer" if "custom_generate" in given else "streamer"] = streamer
        with defaults.undisturbed(model):
            sequences: Tensor = model.generate(**generation_inputs(self, batch), **given | own)
        limits = request.limits
        cut = limits if room is None else [min(pair) for pair in zip(limits, room.tolist(), strict=True)]
        answers = zip(sequences[:, batch.length :].tolist(), watch.steps(batch.rows), cut, limits, strict=True)
        return [_Found(tuple(ids[:end]), broken, full=len(ids) >= end < limit) for ids, broken, end, limit in answers]

    def _draws(self, request: _Request) -> list[LogitsProcessor]:
        """What makes the greatest score a draw of each row's own; nothing for a request that does not draw."""
        kind = request.strategy
        if kind.temperature == 0:
            return []
        return drawing(
            _row_seeds(request), self.device, temperature=kind.temperature, top_p=kind.top_p, top_k=kind.top_k
        )

    def _answer(self, said: _Found, seconds: float, request: _Request) -> Answer:
        """The answer of one row, whose batch took so many seconds for each."""
        ends = defaults.ends(self.model)
        last = next((place for place, token in enumerate(said.ids) if token in ends), None)
        own = said.ids if last is None else said.ids[: last + 1]
        finish: Finish = "eos" if last is not None else "context" if said.full else "length"
        spelling = None
        if request.stops or request.words:
            spelling = spelled(Spelling(_tokenizer(self.processor), request.stops), own)
        if spelling is not None and spelling.stopped:
            own, text, finish = own[: len(spelling.starts)], spelling.text, "stop"
        else:
            text = str(_tokenizer(self.processor).decode(list(own), skip_special_tokens=True)).strip()
        if any(step < len(own) for step in said.broken):  # a row that has ended may still run
            finish = "nan"
        sure = () if finish == "nan" else said.sure[: len(own)]
        logprob, entropy = _means(sure)
        words = _words(spelling, [pair[0] for pair in sure]) if request.words and spelling and sure else None
        return Answer(text, len(own), finish, seconds, own, logprob=logprob, entropy=entropy, words=words)


@dataclass(frozen=True)
class _Found:
    """What the model said in one row.

    Attributes:
        ids: Generated tokens; what fills them up behind an end token may stand there.
        broken: Steps, from 0, whose scores were not numbers.
        full: Whether the model's context left less room than was asked for.
        sure: Of each token its log-probability, and the entropy of what it was chosen from; empty where nobody looked.
    """

    ids: tuple[int, ...]
    broken: Sequence[int]
    full: bool = False
    sure: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class _Request:
    """The parameters of ``VLM.generate``, checked."""

    rows: Sequence[Sequence[Image.Image]]
    prompts: Sequence[str]
    decoder: Decoder
    limits: Sequence[int]
    seeds: Sequence[int]
    strategy: Strategy = field(default_factory=Strategy)
    repetition_penalty: float = 1.0
    stops: Sequence[str] = ()
    system: str | None = None
    earlier: Earlier | None = None
    static_cache: bool = False
    prepared: Prepared | None = None
    listener: Listener | None = None
    words: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", [whole("max_new_tokens", limit, 1) for limit in self.limits])
        object.__setattr__(self, "seeds", [whole("seed", seed, 0, SEEDS - 1) for seed in self.seeds])
        object.__setattr__(self, "repetition_penalty", _penalty(self.repetition_penalty))
        if self.system is not None and not is_text(self.system):
            raise DataError("system is no text", "give one system message for all questions")


def _more_than_a_question(decoder: Decoder) -> IncompatibleDecodersError:
    return IncompatibleDecodersError(
        f"{decoder.name} looks where one question makes the model look, and more than that was said",
        "ask without system message and earlier turns, or with a decoder that leaves pictures as they are",
    )


def _penalty(value: float) -> float:
    """A penalty on repetition, checked."""
    if not 0 < (found := number("repetition_penalty", value)) <= 100:
        raise UsageError(f"repetition_penalty={value} is not allowed", "it is above 0 and at most 100; 1 is none")
    return found


def stops_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """Checks the texts that end an answer.

    Raises:
        UsageError: One is no text, or empty.
    """
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else (None,)
    stops = tuple(stop for stop in found if is_text(stop) and stop)
    if len(stops) < len(found):
        raise UsageError("stop is no text, or an empty one", "give a text that ends an answer, or a list of such texts")
    return stops


def _stopped(spelled: Sequence[Spelling], said: Said) -> Iterator[int]:
    """Spells the newest token of each sample, and gives the samples in which a text that ends the answer has come."""
    for sample, token in zip(said.samples, said.tokens, strict=True):
        spelled[sample].add(token)
        if spelled[sample].stopped:
            yield sample


def _words(spelling: Spelling, logprobs: Sequence[float]) -> tuple[tuple[int, int, float], ...]:
    """Of each word of an answer its place and the log-probability of its tokens."""
    found = words_of(spelling.text, spelling.starts)
    return tuple((begin, end, sum(logprobs[token] for token in own)) for begin, end, own in found)


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | tuple[None, None]:
    """The means of both numbers, where there are any."""
    if not pairs:
        return None, None
    first, second = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return first, second


def _questions(pictures: Sequence[Pictures], prompts: str | Sequence[str]) -> tuple[list[list[Image.Image]], list[str]]:
    rows = pictures_of(pictures)
    return rows, questions_of(prompts, len(rows))


def _each(value: int | Sequence[int], rows: int, name: str) -> list[int]:
    """A value for each row."""
    values = list(value) if isinstance(value, Sequence) else [value] * rows
    if len(values) != rows:
        raise UsageError(f"{len(values)} values of {name} for {rows} questions", "give one for all, or one for each")
    return values


def _check_prepared(prepared: Prepared, request: _Request) -> None:
    """Refuses what was made of other pictures or questions."""
    asked = prepared.prompts, prepared.system, prepared.earlier
    shown = [[id(picture) for picture in row] for row in request.rows]
    if (
        asked != (tuple(request.prompts), request.system, request.earlier)
        or [[id(picture) for picture in row] for row in prepared.pictures] != shown
    ):
        raise UsageError(
            "other pictures or questions were prepared",
            "prepare the same RGB pictures and questions, in the same order",
        )


def _method(decoder: Decoder | str) -> Decoder:
    """A decoder, or the one that a specification names."""
    if isinstance(decoder, str):
        return parse(decoder)
    if not isinstance(decoder, Decoder):
        raise UsageError(
            f"decoder is of type {type(decoder).__name__}", "give a decoder, or its specification such as 'vcd'"
        )
    return decoder


def _strategy(decoder: Decoder, options: Strategy) -> Strategy:
    """How a call chooses tokens; that of the decoder where the options leave it open."""
    strategy = options.combined(decoder.strategy)
    if strategy.num_beams > 1 and not decoder.beams:
        raise IncompatibleDecodersError(f"{decoder.spec()} does not work with beam search", "use num_beams=1")
    return strategy


def check_settings(decoder: Decoder, settings: Settings) -> None:
    """Finds before a model is loaded what is wrong with the settings of a run.

    Raises:
        UsageError: A setting is out of range, or contradicts the decoder.
        IncompatibleDecodersError: The settings ask for beams and the decoder does not work with them.
    """
    options = Strategy(
        num_beams=settings.num_beams,
        temperature=settings.temperature,
        top_p=1.0 if settings.top_p is None else settings.top_p,
        top_k=settings.top_k or 0,
    )
    _strategy(decoder, options)
    _Request(
        rows=(),
        prompts=(),
        decoder=decoder,
        limits=(settings.max_new_tokens,),
        seeds=(settings.seed,),
        repetition_penalty=1.0 if settings.repetition_penalty is None else settings.repetition_penalty,
        stops=stops_of(settings.stop or ()),
        system=settings.system,
    )
    if decoder.refines and settings.system is not None:
        raise _more_than_a_question(decoder)
    for name, limit in (("max_pixels", settings.max_pixels), ("min_pixels", settings.min_pixels)):
        if limit is not None:
            whole(name, limit, 1)


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
    attention: str | None = None,
) -> VLM:
    """Loads a model; see ``Checkpoint.load``. ``load("tiny")`` is the model that comes with the package."""
    return VLM.load(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        max_pixels=max_pixels,
        min_pixels=min_pixels,
        device_map=device_map,
        quantize=quantize,
        attention=attention,
    )


def wrap(
    model: nn.Module, processor: ProcessorMixin, *, max_pixels: int | None = None, min_pixels: int | None = None
) -> VLM:
    """A model and processor of your own, already loaded by transformers, for ``decoder.applied``.

    Args:
        model: A transformers model, or one inside ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` or
            PEFT adapters that sit in its modules (LoRA, for instance): the one whose ``generate`` these run is taken.
        processor: Its processor; it is left as it was found.
        max_pixels: See ``Checkpoint.load``.
        min_pixels: Likewise.

    Raises:
        UnsupportedModelError: The model's family is not one that vlmfix knows, the model does not generate, or it is
            inside a wrapper that vlmfix cannot see through.
        UsageError: A limit on pixels that the processor does not know or cannot keep.
        UpstreamError: The installed transformers hands masks over in an unknown way.
    """
    own = unwrapped(model)
    family = family_of(own.config.model_type)
    check_model(own, family.decoder(own))
    whole, completed = family.completed(own, limited(family, processor, most=max_pixels, least=min_pixels))
    return VLM(model=own, processor=whole, family=family, name=str(own.config.name_or_path), completed=completed)


class _Left(StoppingCriteria):
    """Ends generation when nobody reads any more."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(B,) bool, all True once the reader has left."""
        return torch.full(input_ids.shape[:1], self._left.is_set(), dtype=torch.bool, device=input_ids.device)


class NumberWatch(LogitsProcessor):
    """Remembers at which steps scores were NaN or +inf; it changes nothing, and the device is not waited for.

    Args:
        prompt: T, number of prompt tokens, padding included.
    """

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self._seen: list[tuple[int, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Looks at (B, V) scores."""
        self._seen.append((input_ids.shape[1] - self.prompt, ~(scores < math.inf).all(dim=1)))  # (B,)
        return scores

    def steps(self, samples: int) -> list[list[int]]:
        """For each sample, the steps, from 0, at which scores of its row, or of one of its beams, were no numbers."""
        flags = torch.stack([flag for _, flag in self._seen]).view(len(self._seen), samples, -1).any(dim=2).tolist()
        places = [place for place, _ in self._seen]
        return [[place for place, flag in zip(places, flags, strict=True) if flag[row]] for row in range(samples)]


def _row_seeds(request: _Request) -> list[int]:
    rows = zip(request.seeds, request.prompts, request.rows, strict=True)
    return [_row_seed(seed, prompt, row) for seed, prompt, row in rows]


def _row_seed(seed: int, prompt: str, pictures: Sequence[Image.Image]) -> int:
    return seed_of(seed, [prompt.encode(), *(picture.tobytes() for picture in pictures)])


def _tokenizer(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    return tokenizer
