"""A server on 127.0.0.1 that stands for the web."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web(ThreadingHTTPServer):
    """Gives what ``pages`` holds, path -> bytes, or (status, headers, bytes), or a function of the handler."""

    daemon_threads = True

    def __init__(self, pages):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.asked = pages, []

    def url(self, path):
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        page = self.server.pages.get(self.path, (404, {}, b""))
        if callable(page):
            page(self)
            return
        status, headers, content = page if isinstance(page, tuple) else (200, {}, page)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def drips(handler):
    """A reply without end, of which something comes now and then."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x" * 1000)
            time.sleep(0.01)
    except OSError:
        handler.close_connection = True


@contextmanager
def web(pages):
    """Serves pages inside the block, past any proxy that the environment names."""
    server = Web(pages)
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        os.environ.pop("no_proxy") if before is None else os.environ.update(no_proxy=before)
