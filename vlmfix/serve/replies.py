"""Writes the bodies of replies: completions, their pieces in a stream, and the list of models."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from vlmfix.decoding.spelling import UNFINISHED, Words
from vlmfix.serve.protocol import Served
from vlmfix.serve.rows import End, Piece, Ticket
from vlmfix.serve.scores import Entry


class Replies:
    """Writes what is sent about one request.

    Args:
        ticket: The request.
        words: Writes tokens.
    """

    def __init__(self, ticket: Ticket, words: Words) -> None:
        self._ticket, self._words = ticket, words
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self) -> dict[str, Any]:
        """Writes the completion, when all answers have ended."""
        choices = [
            {
                "index": row.number,
                "message": {"role": "assistant", "content": row.text, "refusal": None},
                "logprobs": self._logprobs(row.entries),
                "finish_reason": row.finish,
            }
            for row in self._ticket.rows
        ]
        return self._body("chat.completion", choices) | {"usage": self._usage()}

    def begins(self, number: int) -> dict[str, Any]:
        """Writes what an answer in a stream begins with."""
        return self._chunk([_choice(number, {"role": "assistant", "content": ""})])

    def piece(self, piece: Piece) -> dict[str, Any]:
        """Writes a piece of an answer."""
        choice = _choice(piece.number, {"content": piece.text})
        return self._chunk([choice | {"logprobs": self._logprobs(piece.entries)}])

    def end(self, end: End) -> dict[str, Any]:
        """Writes that an answer has ended."""
        return self._chunk([_choice(end.number, {}) | {"finish_reason": end.finish}])

    def usage(self) -> dict[str, Any]:
        """Writes the counts of tokens, which a stream ends with where that is asked for."""
        return self._chunk([]) | {"usage": self._usage()}

    def _chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        body = self._body("chat.completion.chunk", choices)
        return body | {"usage": None} if self._ticket.wanted.usage else body

    def _body(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        wanted = self._ticket.wanted
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": wanted.model,
            "decoder": wanted.decoder.spec(),
            "choices": list(choices),
        }

    def _usage(self) -> dict[str, int]:
        prompt, said = self._ticket.prompt, self._ticket.said
        return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if self._ticket.wanted.alternatives is None:
            return None
        content = [
            self._token(entry.token, entry.logprob) | {"top_logprobs": [self._token(*one) for one in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._words.of(token)
        whole = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}


def _choice(number: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}


def models(served: Served, since: int) -> dict[str, Any]:
    """Writes the list of models, which has one."""
    return {"object": "list", "data": [model(served, since)]}


def model(served: Served, since: int) -> dict[str, Any]:
    """Writes the model, with the decoder of requests that name none.

    Args:
        served: What there is.
        since: When the server began, in seconds since 1970.
    """
    return {
        "id": served.name,
        "object": "model",
        "created": since,
        "owned_by": "vlmfix",
        "decoder": served.decoder.spec(),
    }


def written(body: dict[str, Any]) -> bytes:
    """Writes JSON as it is sent."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(body: dict[str, Any]) -> bytes:
    """Writes one event of a stream."""
    return b"data: " + written(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""What a stream ends with."""
