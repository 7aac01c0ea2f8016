"""Bodies of requests, read by the letter: what is answered, and what is refused by which name."""

from __future__ import annotations

import base64
import json
import os
import zlib

import pytest
from PIL import Image

from tests.serve.support import about, drawn, png, url, user
from vlmfix import Turn
from vlmfix.decoders import Strategy, parse
from vlmfix.serve.limits import Limits
from vlmfix.serve.pictures import Gallery
from vlmfix.serve.protocol import Served, read
from vlmfix.serve.refusals import RefusedError, refusal_of

HELLO = [{"role": "user", "content": "hello"}]
BODY = {"model": "tiny", "messages": HELLO}


def wanted(body, *, decoder="greedy", allowed=None, **limits):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    limits = Limits(allowed=allowed, **limits)
    return read(content, Served("tiny", parse(decoder)), limits, Gallery(limits.allowed, limits.body))


def refused(body, **how):
    with pytest.raises(RefusedError) as caught:
        wanted(body, **how)
    return caught.value


def test_a_plain_request():
    asked = wanted(BODY, tokens=77)
    assert (asked.prompt, asked.pictures, asked.earlier) == ("hello", (), ())
    assert (asked.decoder, asked.strategy) == (parse("greedy"), Strategy())
    assert (asked.tokens, asked.seeds, asked.stops, asked.alternatives) == (77, (0,), (), None)
    assert (asked.stream, asked.usage) == (False, False)


def test_a_whole_conversation():
    messages = [
        {"role": "developer", "content": "be brief"},
        user("what is here?", drawn(0)),
        {"role": "assistant", "content": "a dog", "refusal": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "and"}, *user("here?", drawn(1))["content"]]},
    ]
    asked = wanted({"model": "tiny", "messages": messages})
    assert asked.prompt == "and\nhere?"
    turns = (Turn("system", "be brief"), Turn("user", "what is here?", 1), Turn("assistant", "a dog"))
    assert asked.earlier == turns
    assert [picture.tobytes() for picture in asked.pictures] == [drawn(0).tobytes(), drawn(1).tobytes()]


def test_settings_are_taken_over():
    asked = wanted(
        BODY
        | {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "repetition_penalty": 1.2,
            "n": 3,
            "seed": 2**63 - 2,
            "max_completion_tokens": 5,
        }
        | {"stop": ["a", "b"], "logprobs": True, "top_logprobs": 4, "stream": True}
        | {"stream_options": {"include_usage": True}, "user": "me", "metadata": {"a": "b"}, "store": True}
        | {"frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}, "tools": None}
    )
    assert asked.strategy == Strategy(temperature=0.7, top_p=0.9, top_k=40)
    assert asked.seeds == (2**63 - 2, 2**63 - 1, 0)
    assert asked.repetition_penalty == 1.2
    assert wanted(BODY | {"temperature": 1, "top_k": -1}).strategy == wanted(BODY | {"temperature": 1}).strategy
    assert (asked.tokens, asked.stops, asked.alternatives) == (5, ("a", "b"), 4)
    assert (asked.stream, asked.usage) == (True, True)


def test_a_request_names_its_decoder():
    assert wanted(BODY | {"model": "tiny@vcd:contrast=0.5"}).decoder == parse("vcd:contrast=0.5")
    assert wanted(BODY | {"decoder": "vcd+spin"}).decoder == parse("vcd+spin")
    for model in ("tiny@keep-recall", "tiny@@keep-recall"):
        assert wanted(BODY | {"model": model}).decoder == parse("@keep-recall")
    assert wanted(BODY | {"model": "tiny@fast+vcd"}).decoder == parse("@fast+vcd")
    assert wanted(BODY | {"model": "tiny@fast", "decoder": "@fast"}).decoder == parse("@fast")
    assert wanted(BODY, decoder="vcd").decoder == parse("vcd")
    drawn_ = wanted(BODY | {"decoder": "sample:temperature=0.5", "temperature": 0})
    assert drawn_.strategy == Strategy(temperature=0.5)
    with_file = "adhh:profile=/etc/heads.safetensors"
    assert wanted(BODY | {"decoder": with_file}, decoder=with_file).decoder == parse(with_file)


def test_equal_pictures_are_one_object():
    gallery, limits = Gallery(None, 1 << 20), Limits()
    body = json.dumps({"model": "tiny", "messages": about(0)}).encode()
    one, two = (read(body, Served("tiny", parse("greedy")), limits, gallery).pictures[0] for _ in range(2))
    assert one is two


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "model is missing"),
        ({"model": 7}, "model", "no text"),
        ({"model": "gpt-4o"}, "model", "there is no model 'gpt-4o'"),
        ({"model": "tiny@nonsense"}, "model", "unknown decoder 'nonsense'"),
        ({"model": "tiny@vcd", "decoder": "spin"}, "decoder", "name 'vcd' and 'spin'"),
        ({"decoder": "@/etc/passwd.toml"}, "decoder", "files are not read here"),
        ({"decoder": "vcd+/tmp/mine.py:Mine"}, "decoder", "files are not read here"),
        ({"decoder": "vcd+adhh:profile=/etc/passwd"}, "decoder", "adhh: profile names a file"),
        ({"decoder": "imbalance:vit=some/model"}, "decoder", "imbalance: vit names a file"),
        ({"decoder": "vcd:contrast=nan"}, "decoder", "not allowed"),
        ({"messages": None}, "messages", "no list|not a list"),
        ({"messages": []}, "messages", "not a list"),
        ({"messages": [3]}, "messages[0]", "is 3"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "a list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "None"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0]", "no text"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0]", "'name'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]", "no image_url"),
        ({"messages": [*HELLO, *HELLO]}, "messages", "roles user, user"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages", "roles user, assistant"),
        ({"messages": [*HELLO, {"role": "system", "content": "x"}, *HELLO]}, "messages", "roles"),
        ({"messages": [user("x", drawn(0)) | {"role": "system"}, *HELLO]}, "messages[0]", "picture"),
        ({"max_tokens": 0}, "max_tokens", r"\[1, 1024\]"),
        ({"max_tokens": 1025}, "max_tokens", r"\[1, 1024\]"),
        ({"max_tokens": 5.0}, "max_tokens", "whole number"),
        ({"max_tokens": True}, "max_tokens", "whole number"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"n": 17}, "n", r"\[1, 16\]"),
        ({"seed": -1}, "seed", "whole number"),
        ({"seed": 10**200}, "seed", "whole number"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 10**299}, "temperature", "not allowed"),
        ({"temperature": -0.1}, "temperature", "not allowed"),
        ({"top_p": 0.5}, "temperature", "greedy search has no nucleus"),
        ({"temperature": 1, "top_k": -2}, "top_k", "whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"repetition_penalty": "1"}, "repetition_penalty", "number"),
        ({"temperature": 1, "decoder": "beam"}, "temperature", "chooses by 5 beams"),
        ({"logprobs": True, "decoder": "beam"}, "logprobs", "beams"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", r"\[0, 20\]"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "1 to 1000"),
        ({"stop": [3]}, "stop", "no text"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "not supported"),
        ({"frequency_penalty": False}, "frequency_penalty", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not known"),
        ({"guided_json": {}}, "guided_json", "not known"),
        ({"decoder": "vicrop", "messages": [{"role": "system", "content": "x"}, *HELLO]}, "decoder", "conversation"),
    ],
)  # fmt: skip
def test_what_is_refused(change, param, message):
    refusal = refused(BODY | change)
    assert refusal.param == param
    with pytest.raises(RefusedError, match=message):
        raise refusal
    assert refusal.status == (404 if refusal.code == "model_not_found" else 400)
    assert refusal.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", "is a list"),
        (b"hello", "is not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"model": "tiny"} x', "behind the body"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"a":' * 100_000, "nests too deeply"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": 1e999}', "not a number"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "10000 digits"),
        (b'{"model": "tiny", "model": "tiny"}', "stands twice"),
        (b'{"\\ud800": 1}', "is not known"),
    ],
)
def test_bodies_that_are_no_requests(body, message):
    assert message in str(refused(body))


def bomb():
    """A PNG of a few bytes that says it has more pixels than may be read."""
    content = bytearray(png(Image.new("L", (1, 1))))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture_message(address, **more):
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": address, **more}}]}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://example.org/cat.png", "fetches nothing from outside"),
        ("cat.png", "fetches nothing from outside"),
        ("", "fetches nothing from outside"),
        ("data:image/png;base64", "begins with"),
        ("data:text/html;base64,AAAA", "begins with"),
        ("data:image/png;base64,???", "not base64"),
        ("data:image/png;base64,", "empty file"),
        ("data:image/png;base64,AAAA", "not a picture"),
        (url(drawn(0))[:-2000], "broken picture|cannot be read|not base64"),
        (bomb(), "too large"),
        ("file:///etc/passwd", "reads no local files"),
        (7, "has no URL"),
        ("\ud800", "has no URL"),
    ],
)
def test_pictures_that_are_refused(address, message):
    refusal = refused({"model": "tiny", "messages": [picture_message(address)]})
    assert refusal.param == "messages[0].content[0]"
    with pytest.raises(RefusedError, match=message):
        raise refusal


def test_how_pictures_stand_in_a_message():
    text, picture = user("x", drawn(0))["content"]
    between = {"role": "user", "content": [picture, text, picture]}
    assert "text between its pictures" in str(refused({"model": "tiny", "messages": [between]}))
    both = {"role": "user", "content": [text, picture, picture, text]}
    assert wanted({"model": "tiny", "messages": [both]}).prompt == "x\nx"
    high = picture_message(url(drawn(0)), detail="high")
    assert "detail is 'high'" in str(refused({"model": "tiny", "messages": [high]}))
    assert "2 pictures, at most 1" in str(refused({"model": "tiny", "messages": [both]}, pictures=1))


def test_local_files_below_the_allowed_folder(tmp_path):
    inside, outside = tmp_path / "in side", tmp_path / "outside.png"
    inside.mkdir()
    for path in (outside, inside / "a b.png"):
        path.write_bytes(png(drawn(0)))
    (inside / "link.png").symlink_to(outside)
    (inside / "folder").mkdir()
    os.mkfifo(inside / "pipe")

    def asked(address):
        return {"body": {"model": "tiny", "messages": [picture_message(address)]}, "allowed": inside}

    root = inside.as_uri()
    for address in (f"{root}/a%20b.png", f"{root}/folder/../a%20b.png", f"file://localhost{root[7:]}/a%20b.png"):
        (picture,) = wanted(**asked(address)).pictures
        assert picture.tobytes() == drawn(0).tobytes()
    for address in (outside.as_uri(), f"{root}/../outside.png", f"{root}/link.png", root, f"file://host{root[7:]}/a",
                    f"{root}/%00", f"{root}/%ff", "file:///etc/passwd", "file:///missing", "file://["):  # fmt: skip
        assert "not below the folder" in str(refused(**asked(address)))
    assert "a video, and only still pictures are read" in str(refused(**asked(f"{root}/missing.mp4")))
    for name in ("missing.png", "folder", "pipe"):
        assert "there is no file" in str(refused(**asked(f"{root}/{name}")))
    with pytest.raises(RefusedError, match="has more than 100 bytes"):
        Gallery(inside, 100).open(f"{root}/a%20b.png", "messages")


def test_errors_of_others_are_one_line_without_a_traceback():
    refusal = refusal_of(ValueError("first\nsecond"))
    assert refusal.status == 500
    assert "ValueError: first;" in refusal.body["error"]["message"]
    assert "second" not in json.dumps(refusal.body)
