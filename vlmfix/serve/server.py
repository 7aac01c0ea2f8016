"""Runs the server until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from vlmfix.errors import UsageError
from vlmfix.generation import VLM
from vlmfix.serve.app import Service
from vlmfix.serve.batcher import Batcher
from vlmfix.serve.limits import Limits
from vlmfix.serve.metrics import Metrics
from vlmfix.serve.protocol import Served
from vlmfix.settings import Settings

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine for itself."""
CLOSING = 5.0
"""Seconds that connections have, after running requests were refused, to take what was sent; and that the thread which
decodes has to end its step."""


def listening(host: str, port: int) -> socket.socket:
    """Opens the socket that requests come to.

    Args:
        host: Address of this machine.
        port: Port; 0 for any that is free.

    Raises:
        UsageError: It cannot be opened.
    """
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(kind[4][:2], family=kind[0], backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror}", "give another --host or --port"
        ) from error


class Server(uvicorn.Server):
    """Serves one model.

    Args:
        load: Loads the model.
        served: Its name in requests, and the decoder of those that name none.
        settings: How it is loaded; ``max_new_tokens`` is the longest answer.
        limits: What is allowed.
        key: What requests must show; None for nothing.
        open_socket: What requests come to.

    Attributes:
        batcher: Answers the questions.
        address: Where clients find it.
    """

    def __init__(
        self,
        load: Callable[[], VLM],
        served: Served,
        settings: Settings,
        limits: Limits,
        *,
        key: str | None,
        open_socket: socket.socket,
    ) -> None:
        metrics = Metrics()
        host, port = open_socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{port}/v1"
        self.batcher = Batcher(load, settings, limits, metrics)
        self._grace, self._socket = limits.grace, open_socket
        hosts = LOOPBACK if shown in LOOPBACK else None
        self._service = Service(self.batcher, served, limits, metrics, key=key, hosts=hosts)
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # clients that send no HTTP are no news
        config = uvicorn.Config(
            self._service.app(),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(limits.grace + CLOSING),
        )
        super().__init__(config)

    def work(self) -> bool:
        """Serves until it is told to end by a signal or by ``should_exit``; returns whether its thread has ended.

        Raises:
            KeyboardInterrupt: It was told by Ctrl-C.
            BaseException: What loading the model, or the loss of a GPU, ended with.
        """
        ended = False
        try:
            with _terminable():
                self.run(sockets=[self._socket])
        finally:
            self._service.close()
            ended = self.batcher.close(CLOSING)
        if self.batcher.error is not None:
            raise self.batcher.error
        return ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to take requests, and to load the model."""
        await super().startup(sockets)
        self.batcher.start(asyncio.get_running_loop(), self._end)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends taking requests; those that run have the grace time."""
        if self.batcher.busy:
            logger.warning("vlmfix: ending; running requests have %g seconds", self._grace)
        asyncio.get_running_loop().call_later(self._grace, self.batcher.give_up)
        await super().shutdown(sockets)

    def _end(self) -> None:
        self.should_exit = True


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the server inside the block, and not the process behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
