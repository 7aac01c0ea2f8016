"""The addresses of the server, and what is sent from each."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import HTTPException
from starlette.exceptions import HTTPException as NoSuchPage
from starlette.requests import ClientDisconnect

from vlmfix.serve import replies
from vlmfix.serve.batcher import Batcher, unready
from vlmfix.serve.limits import Limits
from vlmfix.serve.metrics import Metrics
from vlmfix.serve.pictures import Gallery
from vlmfix.serve.protocol import Served, read
from vlmfix.serve.refusals import RefusedError, refusal_of
from vlmfix.serve.replies import Replies
from vlmfix.serve.rows import End, Piece, Ticket

logger = logging.getLogger(__name__)

READERS = 4
"""Requests that are read, with their pictures, at once."""
JSON = "application/json"
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Service:
    """Answers what is asked of each address.

    Args:
        batcher: Answers the questions.
        served: What there is.
        limits: What is allowed.
        metrics: What is counted.
        key: What requests must show; None for nothing.
        hosts: Names under which requests may ask, the ports left out; None for any name.
    """

    def __init__(
        self,
        batcher: Batcher,
        served: Served,
        limits: Limits,
        metrics: Metrics,
        *,
        key: str | None,
        hosts: Collection[str] | None,
    ) -> None:
        self._batcher, self._served, self._limits, self._metrics = batcher, served, limits, metrics
        self._key, self._hosts = key, hosts
        self._gallery = Gallery(limits.allowed, limits.body)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="vlmfix-requests")
        self._since = int(time.time())

    def app(self) -> FastAPI:
        """Makes the application."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(self.check_host)])
        guarded = APIRouter(dependencies=[Depends(self.check_key)])
        guarded.add_api_route("/v1/chat/completions", self.complete, methods=["POST"], response_model=None)
        guarded.add_api_route("/v1/models", self.models, methods=["GET"], response_model=None)
        guarded.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"], response_model=None)
        guarded.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        app.include_router(guarded)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_exception_handler(RefusedError, _refused)
        app.add_exception_handler(NoSuchPage, _no_such_page)
        app.add_exception_handler(HTTPException, _no_such_page)
        return app

    def close(self) -> None:
        """Reads no further requests."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def check_host(self, request: Request) -> None:
        """Refuses requests under another name than this machine's, as another site in a browser would send them."""
        name = re.sub(r":[0-9]*$", "", request.headers.get("host", ""))
        if self._hosts is not None and name.lower() not in self._hosts:
            raise RefusedError("this server answers to this machine alone", "ask 127.0.0.1, or give --host", status=403)

    async def check_key(self, request: Request) -> None:
        """Refuses requests without the key."""
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._key.encode()):
            raise RefusedError(
                "the API key is missing or wrong", "give the server's", status=401, code="invalid_api_key"
            )

    async def health(self) -> Response:
        """Says whether questions are answered."""
        state = self._batcher.state
        return Response(replies.written({"status": state}), 200 if state == "ready" else 503, media_type=JSON)

    async def metrics(self) -> Response:
        """Gives all counts."""
        return Response(self._metrics.text(), headers={"content-type": Metrics.kind})

    async def models(self) -> Response:
        """Lists the model."""
        return Response(replies.written(replies.models(self._served, self._since)), media_type=JSON)

    async def model(self, name: str) -> Response:
        """Describes the model."""
        if name != self._served.name:
            raise RefusedError(f"there is no model {name!r}", "see /v1/models", status=404, code="model_not_found")
        return Response(replies.written(replies.model(self._served, self._since)), media_type=JSON)

    async def complete(self, request: Request) -> Response:
        """Answers a question."""
        try:
            ticket = await self._taken(request)
        except ClientDisconnect:
            self._metrics.requests.labels("left").inc()
            return Response(status_code=400)
        except Exception as error:
            refusal = error if isinstance(error, RefusedError) else _fault(error)
            self._metrics.requests.labels(_result(refusal)).inc()
            raise refusal from error
        return Completion(ticket, self._batcher, self._metrics, self._limits.seconds)

    async def _taken(self, request: Request) -> Ticket:
        """Reads a request and puts it into the line."""
        try:
            async with asyncio.timeout(self._limits.seconds):
                content = await self._body(request)
                if self._batcher.state != "ready":
                    raise unready(self._batcher.state)
                ours = content, self._served, self._limits, self._gallery
                with self._batcher.announced():
                    wanted = await asyncio.get_running_loop().run_in_executor(self._readers, read, *ours)
                    return self._batcher.submit(wanted)
        except TimeoutError as error:
            raise RefusedError("the request took too long to come", "send it faster", status=408) from error

    async def _body(self, request: Request) -> bytes:
        content, most = bytearray(), self._limits.body
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise RefusedError(f"the body has more than {most} bytes", "send smaller pictures", status=413)
        return bytes(content)


class Completion(Response):
    """Sends the answers to one request, whole or as they come, and takes it out of the line when its client leaves.

    Args:
        ticket: The request.
        batcher: Where it waits.
        metrics: What is counted.
        seconds: Longest time from its arrival to its end.
    """

    def __init__(self, ticket: Ticket, batcher: Batcher, metrics: Metrics, seconds: float) -> None:
        super().__init__()
        self._ticket, self._batcher, self._metrics, self._seconds = ticket, batcher, metrics, seconds
        self._replies = Replies(ticket, batcher.words)
        self._begun = self._complete = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Sends all, unless the client leaves or the time is over."""
        talk, left = asyncio.create_task(self._talk(send)), asyncio.create_task(_left(receive))
        result = "left"
        try:
            until = self._ticket.arrived + self._seconds - time.monotonic()
            done, _ = await asyncio.wait({talk, left}, timeout=until, return_when=asyncio.FIRST_COMPLETED)
            if talk in done or self._complete:
                result = await talk
            elif not done:
                result = "late"
                talk.cancel()
                await self._refuse(
                    RefusedError(f"no answer within {self._seconds:g} seconds", "ask for a shorter one", status=504),
                    send,
                )
        finally:
            for task in (talk, left):
                task.cancel()
            self._batcher.leave(self._ticket)
            self._metrics.requests.labels(result).inc()
            self._metrics.tokens.labels("prompt").inc(self._ticket.prompt)
            self._metrics.tokens.labels("answer").inc(self._ticket.said)

    async def _talk(self, send: Send) -> str:
        """Sends what comes; returns how the request ended."""
        try:
            await (self._stream(send) if self._ticket.wanted.stream else self._whole(send))
        except RefusedError as refusal:
            await self._refuse(refusal, send)
            return _result(refusal)
        except Exception as error:
            await self._refuse(_fault(error), send)
            return "failed"
        return "answered"

    async def _whole(self, send: Send) -> None:
        ended = 0
        while ended < len(self._ticket.rows):
            event = await self._ticket.events.get()
            if isinstance(event, RefusedError):
                raise event
            ended += isinstance(event, End)
        await self._send(send, 200, [(b"content-type", JSON.encode())], replies.written(self._replies.whole()))

    async def _stream(self, send: Send) -> None:
        ended, begun = 0, set[int]()
        while ended < len(self._ticket.rows):
            events = [await self._ticket.events.get()]
            while not self._ticket.events.empty():
                events.append(self._ticket.events.get_nowait())
            for event in events:
                if isinstance(event, RefusedError):
                    raise event
                ended += isinstance(event, End)
            content = b"".join(self._written(event, begun) for event in events if not isinstance(event, RefusedError))
            if ended == len(self._ticket.rows):
                if self._ticket.wanted.usage:
                    content += replies.event(self._replies.usage())
                content += replies.DONE
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            self._complete = ended == len(self._ticket.rows)
            await send({"type": "http.response.body", "body": content, "more_body": not self._complete})

    def _written(self, event: Piece | End, begun: set[int]) -> bytes:
        content = b""
        if event.number not in begun:
            begun.add(event.number)
            content += replies.event(self._replies.begins(event.number))
        body = self._replies.piece(event) if isinstance(event, Piece) else self._replies.end(event)
        return content + replies.event(body)

    async def _refuse(self, refusal: RefusedError, send: Send) -> None:
        """Sends why there is no answer, or no rest of it."""
        if self._begun:
            self._complete = True
            await send({"type": "http.response.body", "body": replies.event(refusal.body), "more_body": False})
            return
        headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        headers.append((b"content-type", JSON.encode()))
        await self._send(send, refusal.status, headers, replies.written(refusal.body))

    async def _send(self, send: Send, status: int, headers: list[tuple[bytes, bytes]], content: bytes) -> None:
        self._begun = self._complete = True
        headers = [*headers, (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": False})


async def _left(receive: Receive) -> None:
    """Waits until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _result(refusal: RefusedError) -> str:
    """How a refused request is counted."""
    return "overloaded" if refusal.status == 503 else "failed" if refusal.status >= 500 else "refused"


def _fault(error: Exception) -> RefusedError:
    """Makes a refusal of a fault of ours, and says it once in the terminal."""
    logger.error("vlmfix: a request failed: %s: %s", type(error).__name__, error)
    return refusal_of(error)


async def _refused(request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, RefusedError) else _fault(error)
    return Response(replies.written(refusal.body), refusal.status, refusal.headers, media_type=JSON)


async def _no_such_page(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, NoSuchPage) else 500
    said = "there is no such address" if status == 404 else f"{request.method} is not answered here"
    refusal = RefusedError(said, "see /v1/chat/completions, /v1/models, /health and /metrics", status=status)
    return await _refused(request, refusal)
