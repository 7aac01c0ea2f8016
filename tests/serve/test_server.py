"""A server at work, asked by OpenAI's own client: right answers in any company, leaving clients, and garbage."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import openai
import pytest
import torch

from tests.serve.support import DESCRIBE, ENDLESS, KEY, about, client_of, drawn, serving, tiny, until, user
from vlmfix import Turn
from vlmfix.errors import DataError
from vlmfix.generation import VLM

SHORT = 14


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
    assert running.ends == [True]


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as found:
        yield found


@pytest.fixture(scope="module")
def vlm():
    """The same model with a tokenizer of its own, so that a test may ask it beside the server."""
    return tiny().beside()


def ask(client, messages, *, model="tiny", tokens=SHORT, **more):
    return client.chat.completions.create(model=model, messages=messages, max_tokens=tokens, **more)


def text(completion, number=0):
    return completion.choices[number].message.content


def fetched(server, path, *, key=KEY, body=None, headers=None):
    """Status and content of an address."""
    given = {"Authorization": f"Bearer {key}"} | (headers or {})
    request = urllib.request.Request(server.address.removesuffix("/v1") + path, data=body, headers=given)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def counted(server, name):
    lines = fetched(server, "/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


KINDS = (
    {},
    {"model": "tiny@vcd"},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.3},
    {"decoder": "sample:temperature=0.8"},
)
"""Settings of the crowd; a batch is of one kind."""


def test_64_clients_at_once_have_the_answers_that_they_would_have_alone(server, client, vlm):
    batches = counted(server, "vlmfix_batch_rows_count")

    def asked(number):
        kind = dict(KINDS[number % 4])
        extra = {name: kind.pop(name, None) for name in ("decoder", "top_k", "repetition_penalty")}
        messages = about(number % 8, DESCRIBE if number % 3 else "Is there a dog in the image?")
        call = {"seed": number % 8, "extra_body": extra, "tokens": 6 + number % 5, **kind}
        if number % 2:
            found = ask(client, messages, **call)
            return text(found), found.usage.completion_tokens
        *chunks, last = ask(client, messages, stream=True, stream_options={"include_usage": True}, **call)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), last.usage.completion_tokens

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(asked, range(64)))
    for number in range(0, 64, 3):
        kind = {name: value for name, value in KINDS[number % 4].items() if name != "model"}
        if number % 4 == 1:
            kind["decoder"] = "vcd"
        question = DESCRIBE if number % 3 else "Is there a dog in the image?"
        (alone,) = vlm.generate([drawn(number % 8)], question, max_new_tokens=6 + number % 5, seed=number % 8, **kind)
        assert found[number] == (alone.text, alone.tokens)
    assert counted(server, "vlmfix_batch_rows_count") - batches < 32  # they were decoded together


def test_a_stream_is_the_answer_in_pieces(client, vlm):
    (alone,) = vlm.generate([drawn(1)], DESCRIBE, max_new_tokens=100)
    stream = ask(client, about(1), tokens=100, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == alone.text == text(ask(client, about(1), tokens=100))
    assert sum(map(bool, pieces)) > alone.tokens // 2
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", "stop")
    assert all(chunk.usage is None for chunk in chunks)
    prompt = int(vlm.encode(DESCRIBE, [[drawn(1)]]).lengths)
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], prompt, alone.tokens)


def test_a_conversation_with_two_pictures(client, vlm):
    messages = [
        {"role": "system", "content": "be brief"},
        user("What is here?", drawn(2)),
        {"role": "assistant", "content": "A dog."},
        user("And here?", drawn(3)),
    ]
    earlier = [[Turn("system", "be brief"), Turn("user", "What is here?", 1), Turn("assistant", "A dog.")]]
    (alone,) = vlm.generate([[drawn(2), drawn(3)]], "And here?", earlier=earlier, max_new_tokens=SHORT)
    assert text(ask(client, messages)) == alone.text


def test_beams(client, vlm):
    (alone,) = vlm.generate([drawn(1)], DESCRIBE, decoder="beam:num_beams=3", max_new_tokens=SHORT)
    found = ask(client, about(1), model="tiny@beam:num_beams=3", n=2)
    assert text(found, 0) == text(found, 1) == alone.text
    (chunk,) = [
        c for c in ask(client, about(1), model="tiny@beam:num_beams=3", stream=True) if c.choices[0].delta.content
    ]
    assert chunk.choices[0].delta.content == alone.text


def test_several_answers_have_seeds_that_follow(client, vlm):
    found = ask(client, about(4), n=3, temperature=1.5, seed=7)
    alone = [vlm.generate([drawn(4)], DESCRIBE, max_new_tokens=SHORT, temperature=1.5, seed=7 + k)[0] for k in range(3)]
    assert [choice.message.content for choice in found.choices] == [answer.text for answer in alone]
    assert found.usage.completion_tokens == sum(answer.tokens for answer in alone)
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(client, about(4), n=3, temperature=1.5, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == [answer.text for answer in alone]


def test_a_stop_spans_tokens_and_is_never_sent(client, vlm):
    whole = text(ask(client, about(1), tokens=60))
    stop = whole[10:25]  # begins and ends inside words
    cut = whole[: whole.index(stop)].rstrip()
    found = ask(client, about(1), tokens=60, stop=["never", stop])
    assert (text(found), found.choices[0].finish_reason) == (cut, "stop")
    chunks = list(ask(client, about(1), tokens=60, stop=stop, stream=True, logprobs=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert "".join(entry.token for entry in entries).strip().startswith(cut)
    assert len(entries) < found.usage.completion_tokens


@pytest.mark.parametrize("decoder", ["greedy", "vcd"])
def test_log_probabilities_are_those_of_the_decoders_scores(client, vlm, decoder):
    found = ask(client, about(5), logprobs=True, top_logprobs=3, extra_body={"decoder": decoder}, tokens=5)
    (alone,) = vlm.generate([drawn(5)], DESCRIBE, decoder=decoder, max_new_tokens=5)

    class Scores:
        """Keeps the scores of a call."""

        def __init__(self):
            self.seen = []

        def began(self, prompts):
            pass

        def following(self, choice):
            self.choice = choice
            return self

        def __call__(self, scores):
            self.seen.append(scores.log_softmax(dim=-1)[0])
            return self.choice(scores)

        def keep(self, samples):
            self.choice.keep(samples)

        def said(self, said):
            return ()

    kept = Scores()
    vlm.generate([drawn(5)], DESCRIBE, decoder=decoder, max_new_tokens=5, listener=kept)
    content = found.choices[0].logprobs.content
    assert len(content) == len(alone.ids) == len(kept.seen)
    for entry, token, logs in zip(content, alone.ids, kept.seen, strict=True):
        assert entry.logprob == pytest.approx(float(logs[token]), abs=1e-4)
        best = logs.topk(3).values.clamp(min=-9999.0).tolist()
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(best, abs=1e-3)
        assert bytes(entry.bytes).decode() == entry.token
    assert "".join(entry.token for entry in content).strip() == alone.text


def test_a_length_ends_an_answer(client):
    found = ask(client, about(1), tokens=3)
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 3)


def test_one_that_is_too_long_does_not_spoil_the_others(client, vlm):
    (alone,) = vlm.generate([drawn(6)], DESCRIBE, max_new_tokens=SHORT)

    def asked(number):
        try:
            return text(ask(client, about(6, "dog " * 3000 if number == 4 else DESCRIBE)))
        except openai.BadRequestError as error:
            return error.code, error.param

    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(asked, range(9)))
    assert found.pop(4) == ("context_length_exceeded", "messages")
    assert set(found) == {alone.text}


def raw(server, body):
    """Sends a question by hand; returns the socket."""
    host, port = server.address.split("/")[2].split(":")
    sock = socket.create_connection((host, int(port)), timeout=30)
    head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {KEY}"]
    sock.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return sock


@pytest.fixture
def slow_model():
    """The model takes twenty milliseconds for a step, and more."""
    hook = tiny().model.lm_head.register_forward_hook(lambda module, args, output: time.sleep(0.02))
    yield
    hook.remove()


def endless(stream):
    return json.dumps({"model": "tiny", "messages": about(0), "stream": stream, "max_tokens": 512} | ENDLESS).encode()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_in_the_middle_is_dropped(server, slow_model, stream):
    gone, said = 'vlmfix_requests_total{result="left"}', 'vlmfix_tokens_total{kind="answer"}'
    left, tokens = counted(server, gone), counted(server, said)
    with raw(server, endless(stream)) as sock:
        if stream:
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        else:
            until(lambda: any(row.tokens for row in server.batcher._running))
    until(lambda: counted(server, gone) == left + 1)
    until(lambda: not server.batcher._running, seconds=4)
    assert 0 < counted(server, said) - tokens < 100


def test_garbage_has_an_error_body_and_the_server_goes_on(server, client):
    bodies = [b"", b"{", b"[]", b"\xff" * 100, b"[" * 50_000, b'{"model": "tiny", "messages": [{"role": "user"}]}']
    for body in bodies:
        status, content = fetched(server, "/v1/chat/completions", body=body)
        assert (status, set(json.loads(content)["error"])) == (400, {"message", "type", "param", "code"})
        assert "Traceback" not in content
    for sent in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n",
    ):
        host, port = server.address.split("/")[2].split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(sent)
    with raw(server, b"x" * 10) as sock:
        assert b" 400 " in sock.recv(4096)
    assert fetched(server, "/nothing")[0] == 404
    assert json.loads(fetched(server, "/v1/chat/completions")[1])["error"]["message"].startswith("GET is not answered")
    with pytest.raises(openai.BadRequestError, match="<image> in a question stands for a picture"):
        ask(client, about(1, "what is <image> here?"))
    assert text(ask(client, about(1), tokens=2))


def test_what_is_there(server, client):
    (model,) = client.models.list().data
    assert (model.id, model.decoder) == ("tiny", "greedy")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert fetched(server, "/health", key="") == (200, '{"status":"ready"}')
    ask(client, about(1), tokens=2)
    for name in ('requests_total{result="answered"}', 'tokens_total{kind="prompt"}', "first_token_seconds_count"):
        assert counted(server, f"vlmfix_{name}") > 0
    assert counted(server, "vlmfix_waiting_requests") == 0


def test_who_may_ask(server):
    for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
        status, content = fetched(server, path, key="wrong", body=b"{}" if "chat" in path else None)
        assert (status, json.loads(content)["error"]["code"]) == (401, "invalid_api_key")
    assert fetched(server, "/v1/models", key="\xe4")[0] == 401
    status, content = fetched(server, "/v1/models", headers={"Host": "evil.example:80"})
    assert (status, "this machine alone" in content) == (403, True)
    for name in ("localhost", "LOCALHOST:80", "[::1]", "[::1]:8000", "127.0.0.1:1"):
        assert fetched(server, "/v1/models", headers={"Host": name})[0] == 200


def test_scores_that_are_no_numbers(server, client):
    hook = tiny().model.lm_head.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(openai.InternalServerError, match="not a number"):
            ask(client, about(1))
    finally:
        hook.remove()
    assert text(ask(client, about(1), tokens=2))


class Narrow(VLM):
    """A model that has memory for two rows, and fails at one question."""

    batches = ()

    def generate(self, pictures, prompts, **call):
        Narrow.batches += (len(pictures),)
        if len(pictures) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if "fail" in prompts:
            raise ValueError("odd")
        if "odd picture" in prompts:
            raise DataError("it is odd")
        return super().generate(pictures, prompts, **call)


def test_less_goes_on_when_memory_runs_out_and_only_what_fails_fails(caplog):
    def narrow():
        return Narrow(**{field.name: getattr(tiny(), field.name) for field in fields(VLM)})

    with serving(narrow, rows=8) as server, client_of(server) as client:
        questions = [DESCRIBE, "fail", DESCRIBE, "odd picture", DESCRIBE, DESCRIBE]

        def asked(question):
            try:
                return text(ask(client, about(1, question), tokens=3))
            except openai.APIStatusError as error:
                return error.status_code

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(asked, questions))
        assert [found[1], found[3]] == [500, 400]
        assert len({found[0], found[2], found[4], found[5]}) == 1
        Narrow.batches = ()
        with ThreadPoolExecutor(6) as pool:
            assert len(set(pool.map(asked, [DESCRIBE] * 6))) == 1
        assert max(Narrow.batches) <= 3  # it has learnt


def test_limits_of_time_of_those_that_wait_and_of_a_body(slow_model):
    with serving(rows=1, waiting=1, seconds=2.0, body=60_000, grace=0.3) as server, client_of(server) as client:
        first = raw(server, endless(True))
        assert first.recv(4096).startswith(b"HTTP/1.1 200")  # it runs
        second = raw(server, endless(False))
        until(lambda: counted(server, "vlmfix_waiting_requests") == 1)
        with pytest.raises(openai.InternalServerError, match="1 requests wait already") as caught:
            ask(client, about(1))
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
        content = b""
        while part := first.recv(65536):
            content += part
            if b'"error"' in content or b"[DONE]" in content:
                break
        assert b"no answer within 2 seconds" in content
        assert b" 504 " in second.recv(4096)
        first.close(), second.close()
        with raw(server, b"x" * 60_001) as sock:
            assert b" 413 " in sock.recv(4096)
        third = raw(server, endless(True))
        third.recv(4096)
        server.should_exit = True  # as SIGTERM asks for
        content = b""
        while part := third.recv(65536):
            content += part
        assert b"the server is being stopped" in content
        third.close()
    assert server.ends == [True]


def test_while_the_model_is_loaded_and_when_it_cannot_be():
    go = threading.Event()

    def slow():
        go.wait(20)
        raise DataError("there is no such model")

    with serving(slow, loaded=False, key=None) as server, client_of(server) as client:
        until(lambda: server.started)
        assert fetched(server, "/health") == (503, '{"status":"loading"}')
        with pytest.raises(openai.InternalServerError, match="the model is being loaded"):
            ask(client, about(1))
        go.set()
    assert [str(end) for end in server.ends] == ["there is no such model"]
