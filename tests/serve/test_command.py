"""`vlmfix serve`: where it listens, how signals end it, and what it says when it cannot begin."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import urllib.request
from contextlib import suppress

import openai
import pytest

from tests.serve.support import ENDLESS, about, tiny, until
from vlmfix import extras


def ready(port):
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        return answer.status == 200


@pytest.fixture
def hearing():
    """Hears Ctrl-C, to which a shell starts its background jobs deaf."""
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, heard)


@pytest.mark.usefixtures("hearing")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_within_the_grace_time(vlmfix, monkeypatch, number, code):
    monkeypatch.setattr("vlmfix.display.loading", lambda model, **how: tiny())
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the thread that decodes did not end"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = []

    def ask():
        until(lambda: ready(port))
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
            stream = client.chat.completions.create(model="tiny", messages=about(0), stream=True, **ENDLESS)
            next(stream)
            os.kill(os.getpid(), number)
            try:
                list(stream)
            except openai.APIError as error:
                told.append(str(error))

    asker = threading.Thread(target=ask)
    asker.start()
    former = signal.getsignal(signal.SIGTERM)
    found, out, err = vlmfix("serve", "--port", port, "--grace", 0.3, "--max-tokens", 1500)
    asker.join()
    assert (found, out, told) == (code, "", ["the server is being stopped; ask again later"])
    assert f"vlmfix: http://127.0.0.1:{port}/v1 until Ctrl-C\n" in err
    assert "vlmfix: tiny is ready\n" in err
    assert signal.getsignal(signal.SIGTERM) == former


def test_what_is_wrong_is_said_before_and_while_it_begins(vlmfix, monkeypatch, tmp_path):
    code, out, err = vlmfix("serve", "--port", 0, "--model", tmp_path)
    assert (code, out) == (1, "")
    assert "config.json" in err
    assert re.search(r"vlmfix: http://127\.0\.0\.1:[0-9]+/v1 until Ctrl-C\n", err)
    assert vlmfix("serve", "--allow", tmp_path / "missing")[0] == 2
    assert vlmfix("serve", "--api-key", "two\nlines")[0] == 2
    assert "unknown decoder" in vlmfix("serve", "--decoder", "nonsense")[2]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = vlmfix("serve", "--port", taken.getsockname()[1])
    assert (code, "cannot listen on 127.0.0.1" in err) == (2, True)
    code, _, err = vlmfix("serve", "--port", 0, "--decoder", "adhh:profile=missing.safetensors", "--device", "cpu")
    assert (code, "cannot act on tiny" in err) == (2, True)
    monkeypatch.setitem(extras.EXTRAS, "serve", ("no_such_package",))
    code, _, err = vlmfix("serve")
    assert code in (1, 2)
    assert err.count("vlmfix[serve]") == 1
