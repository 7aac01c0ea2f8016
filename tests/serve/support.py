"""A server on a free port of this machine, its clients, and what they ask."""

from __future__ import annotations

import base64
import io
import threading
import time
from contextlib import contextmanager
from functools import cache

import openai
from PIL import Image

from vlmfix.decoders import parse
from vlmfix.generation import load
from vlmfix.serve.limits import Limits
from vlmfix.serve.protocol import Served
from vlmfix.serve.server import Server, listening
from vlmfix.settings import Settings
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

KEY = "a-key"
DESCRIBE = "Please describe this image in detail."
ENDLESS = {"temperature": 100.0, "seed": 1}
"""Draws nearly any token, so seldom the one that ends an answer."""


@cache
def tiny():
    return load("tiny", device="cpu")


@cache
def drawn(number):
    """A scene of the drawn world, small, so that it is quickly sent."""
    pixels = render([scene(0, number)])[0].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((128, 128))


def png(picture):
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def url(picture):
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def user(text, *pictures):
    """A user's message: the text, and pictures behind it, as clients like to send them."""
    shown = [{"type": "image_url", "image_url": {"url": url(picture)}} for picture in pictures]
    return {"role": "user", "content": [{"type": "text", "text": text}, *shown]}


def about(number, text=DESCRIBE):
    return [user(text, drawn(number))]


@contextmanager
def serving(vlm=None, *, key=KEY, decoder="greedy", loaded=True, **limits):
    """Runs a server in a thread."""
    model = (lambda: tiny()) if vlm is None else vlm
    limits = Limits(**{"tokens": 512, "rows": 32, "grace": 5.0} | limits)
    settings = Settings(max_new_tokens=limits.tokens)
    sock = listening("127.0.0.1", 0)
    server = Server(model, Served("tiny", parse(decoder)), settings, limits, key=key, open_socket=sock)
    ends = []
    thread = threading.Thread(target=lambda: ends.append(_ended(server)))
    thread.start()
    try:
        while loaded and server.batcher.state == "loading" and thread.is_alive():
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join()
        server.ends = ends


def _ended(server):
    try:
        return server.work()
    except BaseException as error:
        return error


def client_of(server, key=KEY):
    return openai.OpenAI(base_url=server.address, api_key=key, max_retries=0, timeout=60)


def until(true, seconds=20.0):
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
