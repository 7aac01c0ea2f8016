"""The front door: pictures and questions in, answers out."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn
from transformers import ProcessorMixin

from vlmfix.answer import Answer, Found, read
from vlmfix.decoders import Decoder, Strategy
from vlmfix.decoders.picture.refined import PictureMemo, Refined
from vlmfix.decoding.beams import search
from vlmfix.decoding.listening import Listener
from vlmfix.decoding.repetition import Repetition
from vlmfix.decoding.running import running
from vlmfix.decoding.spelling import Pieces
from vlmfix.engines import decoded, generated
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.insight.relevance import Told, confidences
from vlmfix.models.chat import said_before
from vlmfix.models.checkpoint import Checkpoint, limited
from vlmfix.models.families import family_of
from vlmfix.models.layout import Prepared, Turn
from vlmfix.models.turns import turn_of
from vlmfix.request import (
    SEEDS,
    Pictures,
    Request,
    check_prepared,
    check_settings,
    check_similarity,
    each,
    method_of,
    more_than_a_question,
    questions,
    stops_of,
    strategy_of,
)
from vlmfix.settings import OWN
from vlmfix.upstream import defaults
from vlmfix.upstream.contracts import check_model
from vlmfix.upstream.wrappers import unwrapped, weights_of

__all__ = ["SEEDS", "VLM", "Answer", "check_settings", "load", "wrap"]

logger = logging.getLogger(__name__)


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
        confidence: str | None = None,
        similarity: str = OWN,
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
            confidence: ``sar`` weights how unsure each token was by its relevance; ``sar+grounding`` also measures what
                it owes to the picture, by the plain model, which takes a backward pass for each token.
            similarity: What tells the relevance of tokens: ``own``, the model's own token embeddings, or a folder or
                Hub id of a sentence encoder.

        Raises:
            DataError: The numbers of pictures and prompts differ, or are zero, or something else is among them; a
                prompt leaves no room for an answer in the model's context; or an answer could outgrow a sliding window
                in which the decoder edits attention.
            UsageError: A parameter is out of range, or contradicts the decoder; or other pictures or questions were
                prepared.
            IncompatibleDecodersError: The decoder cannot act on this model or kind of run; it refines pictures and
                something was said before; a listener is to follow a static cache, or a model inside ``applied``, or
                confidence is asked for there or of beams; or grounding is asked for after earlier turns.
            UnsupportedModelError: The chat template has no place for a system message or for earlier turns.
        """
        check_similarity(confidence, similarity)
        rows, asked = questions(pictures, prompts)
        method = method_of(decoder)
        request = Request(
            rows=rows,
            prompts=asked,
            decoder=method,
            limits=each(max_new_tokens, len(rows), "max_new_tokens"),
            strategy=strategy_of(
                method, Strategy(num_beams=num_beams, temperature=temperature, top_p=top_p, top_k=top_k)
            ),
            repetition_penalty=repetition_penalty,
            stops=stops_of(stop),
            seeds=each(seed, len(rows), "seed"),
            system=system,
            earlier=said_before(earlier, rows),
            static_cache=static_cache,
            prepared=prepared,
            listener=listener,
            words=words,
            confidence=confidence,
        )
        if prepared is not None:
            check_prepared(prepared, request)
        with turn_of(self.model).taken():
            started = time.perf_counter()
            request, refined = self._refined(request)
            found = self._found(request)
            seconds = (time.perf_counter() - started) / len(rows)
            answers = [self._answer(said, request, seconds) for said in found]
            if confidence is not None:
                known = [row for row, answer in enumerate(answers) if answer.logprob is not None]
                told = [Told(answers[row].text, answers[row].ids, found[row].sure) for row in known]
                about = [(request.rows[row], request.prompts[row]) for row in known]
                for row, own in zip(known, confidences(self, about, told, confidence, similarity, system), strict=True):
                    answers[row] = replace(answers[row], confidence=own)
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
        method = method_of(decoder)
        if not method.refines:
            raise IncompatibleDecodersError(f"{method.name} leaves pictures as they are", "use carve or vicrop")
        rows, asked = questions(pictures, prompts)
        request = Request(rows=rows, prompts=asked, decoder=method, limits=[1] * len(rows), seeds=[0] * len(rows))
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
        rows, asked = questions([picture], prompt)
        method = method_of(decoder)
        request = Request(
            rows=rows,
            prompts=asked,
            decoder=method,
            limits=[max_new_tokens],
            strategy=strategy_of(method, Strategy(temperature=temperature, top_p=top_p, top_k=top_k)),
            repetition_penalty=repetition_penalty,
            stops=stops_of(stop),
            seeds=[seed],
            system=system,
            earlier=said_before([earlier], rows) if earlier else None,
        )
        return self._streamed(request)

    def _streamed(self, request: Request) -> Generator[str]:
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
        streamer = Pieces(self.processor.tokenizer, request.stops)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with turn.taken():
                    refined, _ = self._refined(request)
                    (said,) = self._found(refined, streamer, left)
                    if self._answer(said, request).finish == "context":
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

    def _refined(self, request: Request) -> tuple[Request, Sequence[Refined | None]]:
        """The request with the pictures that the model is to see, and how they came about."""
        if not request.decoder.refines:
            return request, [None] * len(request.rows)
        if request.system is not None or request.earlier is not None:
            raise more_than_a_question(request.decoder)
        found = request.decoder.refine(self, request.rows, request.prompts, self.memo.of(weights_of(self.model)))
        rows = [refined.pictures for refined in found]
        return replace(request, rows=rows, decoder=request.decoder.decoding, prepared=None), found

    def _found(
        self, request: Request, streamer: Pieces | None = None, left: threading.Event | None = None
    ) -> list[Found]:
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
        if request.confidence is not None and shadowed:
            raise IncompatibleDecodersError(
                "confidence inside a block that has put a decoder to work on the same model",
                "leave the block, or leave confidence out",
            )
        if request.listener is not None and (request.static_cache or shadowed):
            raise IncompatibleDecodersError(
                "a listener with a static cache, or inside a block that has put a decoder to work on the same model",
                "leave the block, the static cache or the listener out",
            )
        if request.static_cache or shadowed:
            with method.at_work(self, batch, num_beams=beams, planned=(layout, plan)) as (given, watch):
                return generated(self, request, batch, given, watch.room, streamer, left)
        limits, name = request.limits, method.spec()
        with running(self, batch, layout, plan, limit=limits, name=name, reorders=beams > 1) as call:
            if beams > 1:
                penalty = request.repetition_penalty
                repetition = None if penalty == 1 else Repetition(penalty, batch["input_ids"], batch.attention_mask)
                course = None if plan.leader is None else plan.leader(call)
                found = search(call, beams, defaults.ends(self.model), course, repetition)
                said = [Found(one.answer, one.broken) for one in found]
            else:
                said = decoded(self, call, plan.gate, request, batch, streamer, left)
        rooms = zip(said, call.room, limits, strict=True)
        return [replace(one, full=len(one.ids) == room < limit) for one, room, limit in rooms]

    def _answer(self, said: Found, request: Request, seconds: float = 0.0) -> Answer:
        """Reads the answer of one row, whose batch took so many seconds for each."""
        tokenizer, ends = self.processor.tokenizer, defaults.ends(self.model)
        return read(said, tokenizer, ends, seconds=seconds, stops=request.stops, words=request.words)


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
