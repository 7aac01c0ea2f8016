"""Reads the body of a request for a chat completion, field by field; what would change the answer unseen is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from vlmfix.decoders import Chain, Decoder, Strategy, parse
from vlmfix.errors import UsageError, VlmfixError
from vlmfix.language.parameters import ranges
from vlmfix.language.recipe import SHIPPED
from vlmfix.models.layout import Turn
from vlmfix.parsing import UnreadableError, is_text, json_at, some, text_of, told
from vlmfix.request import SEEDS, penalty_of
from vlmfix.serve.limits import ALTERNATIVES, ANSWERS, STOP_LENGTH, STOPS, Limits
from vlmfix.serve.pictures import Gallery
from vlmfix.serve.refusals import RefusedError

READ = (
    "model",
    "decoder",
    "messages",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
)
"""Fields that decide the answer."""
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
"""Fields that no answer depends on."""
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that would change the answer, with the values that do not."""

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles in the protocol, and who that is for a chat template."""


@dataclass(frozen=True)
class Served:
    """Names what a server serves.

    Attributes:
        name: The model's name in requests.
        decoder: The decoder of requests that name none.
    """

    name: str
    decoder: Decoder


@dataclass(frozen=True, eq=False, kw_only=True)
class Wanted:
    """Holds a request for answers, checked.

    Attributes:
        model: The model as the request names it.
        prompt: The question.
        pictures: All pictures, those of earlier turns first.
        earlier: What was said before.
        decoder: How the model decodes.
        strategy: How tokens are chosen.
        repetition_penalty: What scores of tokens that were said are divided by; 1 for nothing.
        tokens: Longest answer in tokens.
        seeds: The seed of each answer.
        stops: Texts that end an answer.
        alternatives: How many probable tokens to show beside each token; None for no log-probabilities at all.
        stream: Whether the answer is sent as it comes.
        usage: Whether a stream ends with the counts of tokens.
    """

    model: str
    prompt: str
    pictures: tuple[Image.Image, ...]
    earlier: tuple[Turn, ...]
    decoder: Decoder
    strategy: Strategy
    repetition_penalty: float
    tokens: int
    seeds: tuple[int, ...]
    stops: tuple[str, ...]
    alternatives: int | None
    stream: bool
    usage: bool


def read(content: bytes, served: Served, limits: Limits, gallery: Gallery) -> Wanted:
    """Reads a request.

    Args:
        content: The body.
        served: What there is.
        limits: What is allowed.
        gallery: Opens pictures.

    Raises:
        RefusedError: The request is not one that this server answers.
    """
    body = _object(content)
    _check_fields(body)
    model, decoder = _decoder(body, served)
    prompt, earlier, pictures = _conversation(body, limits, gallery)
    if decoder.refines and earlier:
        raise RefusedError(
            f"{decoder.name} refines the pictures of one question, and this is a conversation",
            "ask without system message and earlier turns, or with another decoder",
            param="decoder",
        )
    strategy = _strategy(body, decoder)
    alternatives = _alternatives(body)
    if alternatives is not None and strategy.num_beams > 1:
        raise RefusedError("log-probabilities of a search with beams are not given", "leave them out", param="logprobs")
    stream = _flag(body, "stream")
    first, count = _whole(body, "seed", 0, 0, SEEDS - 1), _whole(body, "n", 1, 1, ANSWERS)
    return Wanted(
        model=model,
        prompt=prompt,
        pictures=pictures,
        earlier=earlier,
        decoder=decoder,
        strategy=strategy,
        repetition_penalty=_penalty(body),
        tokens=_tokens(body, limits),
        seeds=tuple((first + number) % SEEDS for number in range(count)),
        stops=_stops(body),
        alternatives=alternatives,
        stream=stream,
        usage=_usage(body, stream=stream),
    )


def _object(content: bytes) -> dict[str, Any]:
    try:
        text = text_of(content).strip()
        body, end = json_at(text)
    except UnreadableError as error:
        raise RefusedError(f"the body {error.problem}", "send one JSON object") from error
    if text[end:]:
        raise RefusedError("something stands behind the body's JSON", "send one JSON object")
    if not isinstance(body, dict):
        raise RefusedError(f"the body is {told(body)}", "send one JSON object")
    return {name: value for name, value in body.items() if value is not None}


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in READ or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            raise RefusedError(
                f"the field {told(name)} is not known to this server", "leave it out", param=_shown(name)
            )
        if not any(type(value) is not bool and value == one for one in NEUTRAL[name]):
            raise RefusedError(f"{name} is not supported: {told(value)}", "leave it out", param=name)


def _shown(name: str) -> str | None:
    """A field's name, where it can be shown."""
    return name if name.isprintable() and len(name) < 80 else None


def _decoder(body: Mapping[str, Any], served: Served) -> tuple[str, Decoder]:
    """The model as the request names it, and the decoder."""
    model = body.get("model")
    if not isinstance(model, str) or not is_text(model):
        raise RefusedError(
            "model is missing" if model is None else "model is no text", f"give {served.name}", param="model"
        )
    spec: str | None = None
    if model != served.name:
        if not model.startswith(f"{served.name}@"):
            raise RefusedError(
                f"there is no model {told(model)}",
                f"this server has {told(served.name)}; {told(served.name + '@vcd')} names a decoder too",
                status=404,
                param="model",
                code="model_not_found",
            )
        spec = model.removeprefix(f"{served.name}@")
        if spec.partition("+")[0] in SHIPPED:  # llava@keep-recall, where a command has --decoder @keep-recall
            spec = f"@{spec}"
    given, where = body.get("decoder"), "model" if spec is not None else "decoder"
    if given is not None and not (isinstance(given, str) and is_text(given)):
        raise RefusedError("decoder is no text", "write one such as vcd+spin", param="decoder")
    if given is not None and spec not in (None, given):
        raise RefusedError(f"model and decoder name {told(spec)} and {told(given)}", "name one", param="decoder")
    chosen = given if given is not None else spec
    return model, served.decoder if chosen is None else _parsed(chosen, where, served)


def _parsed(spec: str, param: str, served: Served) -> Decoder:
    """The decoder of a request, which must not make the server read files or fetch anything."""
    try:
        decoder = parse(spec, files=False)
    except VlmfixError as error:
        raise RefusedError(error.message, error.hint, param=param) from error
    if decoder == served.decoder:
        return decoder
    for part in decoder.decoders if isinstance(decoder, Chain) else (decoder,):
        for name, allowed in ranges(type(part)).items():
            if allowed.file and getattr(part, name) is not None:
                raise RefusedError(
                    f"{part.name}: {name} names a file, and a request cannot",
                    "leave it out, or start the server with this decoder",
                    param=param,
                )
    return decoder


def _conversation(
    body: Mapping[str, Any], limits: Limits, gallery: Gallery
) -> tuple[str, tuple[Turn, ...], tuple[Image.Image, ...]]:
    """The question, what was said before it, and all pictures."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages is not a list of messages", "send at least one", param="messages")
    said: list[tuple[Turn, list[tuple[str, str]]]] = []
    for number, message in enumerate(messages):
        said.append(_message(message, f"messages[{number}]"))
    roles = [turn.role for turn, _ in said]
    own = roles[1:] if roles[0] == "system" else roles
    if own != (["user", "assistant"] * len(own))[: len(own)] or len(own) % 2 == 0:
        raise RefusedError(
            f"messages have the roles {some(roles, shown=8)}",
            "after at most one system message, user and assistant take turns, and the user comes last",
            param="messages",
        )
    shown = [url for _, urls in said for url in urls]
    if len(shown) > limits.pictures:
        raise RefusedError(
            f"{len(shown)} pictures, at most {limits.pictures} are allowed", "send fewer", param="messages"
        )
    question = said[-1][0]
    if not question.text.strip() and not question.pictures:
        raise RefusedError("the last message is empty", "ask something", param="messages")
    pictures = tuple(gallery.open(url, param) for url, param in shown)
    return question.text, tuple(turn for turn, _ in said[:-1]), pictures


def _message(message: Any, place: str) -> tuple[Turn, list[tuple[str, str]]]:  # noqa: ANN401 (whatever was sent)
    """What one message says, and the URLs of its pictures, each with its place."""
    if not isinstance(message, dict):
        raise RefusedError(f"{place} is {told(message)}", "a message is an object", param=place)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RefusedError(f"{place} has the role {told(role)}", f"roles are {', '.join(ROLES)}", param=f"{place}.role")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            raise RefusedError(f"{place} has a field {told(name)}, which is not supported", "leave it out", param=place)
    texts, urls = _parts(message.get("content"), place)
    if urls and ROLES[role] != "user":
        raise RefusedError(f"{place} has a picture of the {role}", "only the user shows pictures", param=place)
    return Turn(ROLES[role], "\n".join(texts), len(urls)), urls


def _parts(content: Any, place: str) -> tuple[list[str], list[tuple[str, str]]]:  # noqa: ANN401
    """The texts of a message's content, and the URLs of its pictures."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RefusedError(
            f"{place}.content is {told(content)}", "give a text, or a list of parts", param=f"{place}.content"
        )
    texts: list[str] = []
    urls: list[tuple[str, str]] = []
    kinds: list[str] = []
    for number, part in enumerate(content):
        where = f"{place}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str) or not is_text(text):
                raise RefusedError(f"{where} is no text", "a text is a string of whole characters", param=where)
            texts.append(text)
        elif kind == "image_url":
            urls.append((_url(part.get("image_url"), where), where))
        else:
            raise RefusedError(f"{where} is no text and no image_url", "other parts are not supported", param=where)
        kinds.append("t" if kind == "text" else "p")
    if re.search("pt+p", "".join(kinds)):
        raise RefusedError(
            f"{place} has text between its pictures",
            "a message's pictures stand before its text: put the text behind them, and count them there",
            param=f"{place}.content",
        )
    return texts, urls


def _url(given: Any, where: str) -> str:  # noqa: ANN401
    url = given.get("url") if isinstance(given, dict) else None
    if not isinstance(url, str) or not is_text(url):
        raise RefusedError(f"{where} has no URL", 'write {"type": "image_url", "image_url": {"url": ...}}', param=where)
    if given.get("detail") not in (None, "auto"):
        raise RefusedError(
            f"{where}: detail is {told(given['detail'])}",
            "leave it out: how many tokens a picture becomes is the processor's matter",
            param=where,
        )
    return url


def _strategy(body: Mapping[str, Any], decoder: Decoder) -> Strategy:
    """How tokens are chosen: as the request says, or as the decoder does where the request leaves it open."""
    temperature = _number(body, "temperature", 0.0)
    top_p = _number(body, "top_p", 1.0)
    top_k = max(_whole(body, "top_k", 0, -1, 2**31 - 1), 0)  # -1 is all tokens, as vLLM's clients write it
    try:
        return Strategy(temperature=temperature, top_p=top_p, top_k=top_k).combined(decoder.strategy)
    except VlmfixError as error:
        raise RefusedError(error.message, error.hint, param="temperature") from error


def _penalty(body: Mapping[str, Any]) -> float:
    """Reads what scores of tokens that were said are divided by."""
    try:
        return penalty_of(_number(body, "repetition_penalty", 1.0))
    except UsageError as error:
        raise RefusedError(error.message, error.hint, param="repetition_penalty") from error


def _alternatives(body: Mapping[str, Any]) -> int | None:
    most = _whole(body, "top_logprobs", 0, 0, ALTERNATIVES)
    if _flag(body, "logprobs"):
        return most
    if "top_logprobs" in body:
        raise RefusedError("top_logprobs without logprobs", "set logprobs to true", param="top_logprobs")
    return None


def _tokens(body: Mapping[str, Any], limits: Limits) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in body]
    if not names:
        return limits.tokens
    found = {_whole(body, name, limits.tokens, 1, limits.tokens) for name in names}
    if len(found) > 1:
        raise RefusedError("max_tokens and max_completion_tokens differ", "give one of them", param="max_tokens")
    return found.pop()


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > STOPS
        or not all(isinstance(one, str) and is_text(one) and 0 < len(one) <= STOP_LENGTH for one in stops)
    ):
        raise RefusedError(
            "stop is no text and no list of texts",
            f"give up to {STOPS} texts of 1 to {STOP_LENGTH} characters",
            param="stop",
        )
    return tuple(stops)


def _usage(body: Mapping[str, Any], *, stream: bool) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise RefusedError(
            "stream_options holds something unknown", "it may hold include_usage", param="stream_options"
        )
    if options and not stream:
        raise RefusedError("stream_options without stream", "set stream to true", param="stream_options")
    if options.get("include_obfuscation"):
        raise RefusedError("include_obfuscation is not supported", "leave it out", param="stream_options")
    return _flag(options, "include_usage")


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{name} is {told(value)}", f"{name} is true or false", param=name)
    return bool(value)


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedError(f"{name} is {told(value)}", f"{name} is a number", param=name)
    try:
        return float(value)
    except OverflowError as error:
        raise RefusedError(f"{name} is {told(value)}", f"{name} is a number of usual size", param=name) from error


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RefusedError(f"{name} is {told(value)}", f"{name} is a whole number in [{least}, {most}]", param=name)
    return value
