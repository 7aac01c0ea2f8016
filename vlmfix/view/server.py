"""A server of this machine alone that shows a sheet of any size, page by page; pictures are read when they are seen."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from vlmfix.view.page import FILTERS, Heating, Part, Source, page, template
from vlmfix.view.pictures import small_pictures
from vlmfix.view.sheet import Card, Row, Sheet

HOST = "127.0.0.1"
PICTURES = "/picture/"


class SheetServer(ThreadingHTTPServer):
    """Serves one sheet on a free port of 127.0.0.1.

    A picture is asked for by its number in the sheet, so no request names a file.

    Args:
        sheet: What there is to show.
        size: Pictures per page.
        heat: Gives the words of the cards of a page their maps, when it is asked for.
    """

    daemon_threads = True

    def __init__(self, sheet: Sheet, size: int, heat: Heating = list) -> None:
        super().__init__((HOST, 0), _Handler)
        self.sheet, self._heat, self._heating = sheet, heat, threading.Lock()
        self.size = size
        self._numbers = {id(card.picture): number for number, card in enumerate(sheet.cards)}

    def handle_error(self, request: object, client_address: object) -> None:
        """Tells an error, unless the browser has left before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def part(self, show: str, find: str, number: int) -> str:
        """One page of what a filter and a search leave.

        Args:
            show: Name of the filter; empty for all.
            find: Words that a question, its picture's name or its answers must hold.
            number: Number of the page; the nearest that there is.
        """
        words = find.casefold().split()
        left: list[Card] = []
        for card in self.sheet.cards:
            rows = tuple(row for row in card.rows if (not show or show in row.flags) and _holds(card, row, words))
            if rows:
                left.append(Card(card.picture, rows))
        pages = max(1, -(-len(left) // self.size))
        number = min(max(1, number), pages)
        with self._heating:
            shown = self._heat(left[(number - 1) * self.size : number * self.size])
        about = Part(show, find, number, pages, sum(len(card.rows) for card in left))
        return page(self.sheet, [(card, self._source(card)) for card in shown], part=about)

    def _source(self, card: Card) -> Source:
        return Source() if card.picture is None else Source(f"{PICTURES}{self._numbers[id(card.picture)]}")

    def picture(self, number: str) -> bytes | str | None:
        """The picture of a number as a JPEG, or why it cannot be shown; None when the sheet has no such picture."""
        if not number.isascii() or not number.isdigit() or len(number) > len(str(len(self.sheet.cards))):
            return None
        cards: Sequence[Card] = self.sheet.cards[int(number) :][:1]
        picture = cards[0].picture if cards else None
        return None if picture is None else next(small_pictures([picture]))


def _holds(card: Card, row: Row, words: Sequence[str]) -> bool:
    if not words:
        return True
    name = "" if card.picture is None else card.picture.name
    said = (f"{answer.text}\n{answer.failed}" for answer in row.said if answer is not None)
    text = "\n".join((name, row.prompt, *said)).casefold()
    return all(word in text for word in words)


class _Handler(BaseHTTPRequestHandler):
    server: SheetServer

    def do_GET(self) -> None:
        """Answers with a page or a picture, and with nothing else."""
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):  # another site, under our address
            self._send(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", b"this server answers to 127.0.0.1 alone\n")
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            self._page({name: values[-1] for name, values in parse_qs(asked.query, max_num_fields=10).items()})
            return
        found = self.server.picture(asked.path.removeprefix(PICTURES)) if asked.path.startswith(PICTURES) else None
        if isinstance(found, bytes):
            self._send(HTTPStatus.OK, "image/jpeg", found)
        elif found is not None:
            drawn: str = template("gone.svg.jinja").render(text=found)
            self._send(HTTPStatus.GONE, "image/svg+xml; charset=utf-8", drawn.encode())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such page\n")

    def _page(self, asked: dict[str, str]) -> None:
        show = asked.get("show", "")
        number = asked.get("page", "1")
        if show not in ("", *(name for name, _ in FILTERS)) or not number.isascii() or not number.isdigit():
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such page\n")
            return
        text = self.server.part(show, asked.get("find", ""), int(number[:9]))
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", text.encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: whoever looks at pages need not read of them in the terminal."""
