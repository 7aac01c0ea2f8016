"""What a call of ``VLM.generate`` asks for, checked before anything is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from vlmfix.asked import Shown, number, pictures_of, questions_of, whole
from vlmfix.decoders import Decoder, Strategy, parse
from vlmfix.decoding.draws import seed_of
from vlmfix.decoding.listening import Listener
from vlmfix.errors import DataError, IncompatibleDecodersError, UsageError
from vlmfix.models.layout import Earlier, Prepared
from vlmfix.parsing import is_text
from vlmfix.settings import GROUNDED, MEASURES, OWN, Settings

SEEDS = 2**63
"""How many seeds there are, from 0."""

Pictures = Shown | Sequence[Shown]
"""The picture of one question, or its pictures."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """Holds the parameters of ``VLM.generate``, checked."""

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
    confidence: str | None = None

    def __post_init__(self) -> None:
        if self.confidence is not None:
            self._check_confidence()
        object.__setattr__(self, "limits", [whole("max_new_tokens", limit, 1) for limit in self.limits])
        object.__setattr__(self, "seeds", [whole("seed", seed, 0, SEEDS - 1) for seed in self.seeds])
        object.__setattr__(self, "repetition_penalty", penalty_of(self.repetition_penalty))
        if self.system is not None and not is_text(self.system):
            raise DataError("system is no text", "give one system message for all questions")

    def _check_confidence(self) -> None:
        if self.confidence not in MEASURES:
            raise UsageError(f"confidence={self.confidence!r} is not allowed", f"it is {' or '.join(MEASURES)}")
        if self.strategy.num_beams > 1 or self.static_cache:
            given = "a static cache" if self.static_cache else "beams"
            raise IncompatibleDecodersError(
                f"nobody knows how sure the tokens of {given} were", "leave confidence out, or answer without"
            )
        if self.earlier is not None and self.confidence == GROUNDED:
            raise IncompatibleDecodersError(
                "grounding is of one question, and more than that was said", "ask for confidence='sar'"
            )

    def row_seeds(self) -> list[int]:
        """Makes of every row's seed, question and pixels the seed that the row draws with."""
        rows = zip(self.seeds, self.prompts, self.rows, strict=True)
        return [row_seed(seed, prompt, row) for seed, prompt, row in rows]


def row_seed(seed: int, prompt: str, pictures: Sequence[Image.Image]) -> int:
    """Makes of a row's seed, question and pixels the seed that the row draws with.

    Pictures of the same bytes and another shape draw alike, which does no harm: the seed stays as it has been, since
    runs are repeated from their cards.
    """
    return seed_of(seed, [prompt.encode(), *(picture.tobytes() for picture in pictures)])


def more_than_a_question(decoder: Decoder) -> IncompatibleDecodersError:
    """Says why a refining decoder takes no system message and no earlier turns."""
    return IncompatibleDecodersError(
        f"{decoder.name} looks where one question makes the model look, and more than that was said",
        "ask without system message and earlier turns, or with a decoder that leaves pictures as they are",
    )


def penalty_of(value: float) -> float:
    """Checks a penalty on repetition.

    Raises:
        UsageError: It is no number, or out of range.
    """
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


def questions(pictures: Sequence[Pictures], prompts: str | Sequence[str]) -> tuple[list[list[Image.Image]], list[str]]:
    """Checks pictures and questions, and gives every row its own; see ``vlmfix.asked``."""
    rows = pictures_of(pictures)
    return rows, questions_of(prompts, len(rows))


def each(value: int | Sequence[int], rows: int, name: str) -> list[int]:
    """Gives a value to each row.

    Raises:
        UsageError: There are several values, and not one for each row.
    """
    values = list(value) if isinstance(value, Sequence) else [value] * rows
    if len(values) != rows:
        raise UsageError(f"{len(values)} values of {name} for {rows} questions", "give one for all, or one for each")
    return values


def check_prepared(prepared: Prepared, request: Request) -> None:
    """Refuses rows that were prepared from other pictures or questions.

    Raises:
        UsageError: They were.
    """
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


def method_of(decoder: Decoder | str) -> Decoder:
    """Returns a decoder as it is, and the one that a specification names.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(decoder, str):
        return parse(decoder)
    if not isinstance(decoder, Decoder):
        raise UsageError(
            f"decoder is of type {type(decoder).__name__}", "give a decoder, or its specification such as 'vcd'"
        )
    return decoder


def strategy_of(decoder: Decoder, options: Strategy) -> Strategy:
    """Combines the options of a call with how its decoder chooses tokens, where the options leave that open.

    Raises:
        IncompatibleDecodersError: They ask for beams, and the decoder does not work with them.
    """
    strategy = options.combined(decoder.strategy)
    if strategy.num_beams > 1 and not decoder.beams:
        raise IncompatibleDecodersError(f"{decoder.spec()} does not work with beam search", "use num_beams=1")
    return strategy


def check_similarity(confidence: str | None, similarity: str) -> None:
    """Refuses a similarity model that nothing asks.

    Raises:
        UsageError: One is named, and no confidence is asked for.
    """
    if confidence is None and similarity != OWN:
        raise UsageError("similarity is given, and no confidence", "ask for confidence sar, too, or leave it out")


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
    check_similarity(settings.confidence, settings.similarity)
    strategy = strategy_of(decoder, options)
    Request(
        rows=(),
        prompts=(),
        decoder=decoder,
        limits=(settings.max_new_tokens,),
        seeds=(settings.seed,),
        strategy=strategy,
        confidence=settings.confidence,
        repetition_penalty=1.0 if settings.repetition_penalty is None else settings.repetition_penalty,
        stops=stops_of(settings.stop or ()),
        system=settings.system,
    )
    if decoder.refines and settings.system is not None:
        raise more_than_a_question(decoder)
    for name, limit in (("max_pixels", settings.max_pixels), ("min_pixels", settings.min_pixels)):
        if limit is not None:
            whole(name, limit, 1)
