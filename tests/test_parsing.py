"""What somebody else wrote: read by the letter, and refused in one plain sentence."""

from __future__ import annotations

import pytest

from vlmfix.parsing import LONGEST, UnreadableError, is_text, json_at, some, text_of, told, toml_of


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_has_line_feeds_and_no_byte_order_mark(mark, ends):
    assert text_of(f"{mark}a{ends}b é{ends}".encode()) == "a\nb é\n"


@pytest.mark.parametrize(
    ("raw", "problem", "line"),
    [
        ("a".encode("utf-16"), "is not UTF-8 text", 1),
        ("a\nb".encode("utf-16-le"), "is not UTF-8 text: it holds a zero byte", 1),
        (b"a\nb\n\xe4\n", "is not UTF-8 text", 3),
        (b"a\nb\0\n", "is not UTF-8 text: it holds a zero byte", 2),
    ],
)
def test_what_is_no_text_is_named_with_its_line(raw, problem, line):
    with pytest.raises(UnreadableError) as caught:
        text_of(raw)
    assert caught.value.problem.startswith(problem)
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("\n{]", "is not JSON: ", 2),
        ('\n{"a": ' + "9" * 5000 + "}", "is not JSON: a number of 5000 digits", 2),
        ('{"a": -' + "9" * 400 + "}", "is not JSON: a number of 401 digits", 1),
        ('{"a": 1e999}', "is not JSON: 1e999 is not a number", 1),
        ('{"a": NaN}', "is not JSON: NaN is not a number", 1),
        ('{"a": [-Infinity]}', "is not JSON: -Infinity is not a number", 1),
        ('{"a": 1, "b": 2, "a": 3}', "is not JSON: 'a' stands twice in one object", 1),
        ("[" * 100_000, "nests too deeply", 1),
        ('{"a":' * 100_000, "nests too deeply", 1),
    ],
)
def test_what_is_no_json_is_named_with_its_line(text, problem, line):
    with pytest.raises(UnreadableError) as caught:
        json_at(text, len(text) - len(text.lstrip()))
    assert caught.value.problem.startswith(problem)
    assert len(caught.value.problem) < 2 * LONGEST
    assert caught.value.line == line


def test_json_is_read_with_its_end():
    assert json_at('{"a": [1, 2.5, "é", null, true]} x') == ({"a": [1, 2.5, "é", None, True]}, 32)
    assert json_at('[{"a": 1}, {"a": 1}]')[0] == [{"a": 1}, {"a": 1}]


@pytest.mark.parametrize(
    "raw",
    [
        b"x = " + b"[" * 5000 + b"]" * 5000,
        b"x = " + b"9" * 5000,
        b"x = 1\nx = 2",
        b"\xff\xfe",
        'x = "a"'.encode("utf-16-le"),
        b"x = \x00",
    ],
)
def test_what_is_no_toml_is_said_in_one_sentence(raw):
    with pytest.raises(UnreadableError, match=r"^is not TOML: ") as caught:
        toml_of(raw)
    assert len(caught.value.problem) < 2 * LONGEST


def test_toml_is_read_whatever_ends_its_lines():
    assert toml_of(b"\xef\xbb\xbfx = 1\r\ny = 'a'\r\n") == {"x": 1, "y": "a"}


def test_halves_of_surrogate_pairs_are_no_text():
    assert is_text("é\U0001f600")
    assert not is_text(json_at(r'"a\ud800"')[0])
    assert not is_text(3)


def test_values_in_messages_are_short_and_on_one_line():
    assert told([[]]) == "a list"
    assert told({}) == "an object"
    assert told("a\nb") == r"'a\nb'"
    assert told(True) == "True"
    assert len(told("x" * 10**6)) == LONGEST
    assert some(["a b", "c\n\x1b[31m", *"defg"]) == r"a b, 'c\n\x1b[31m', d, e, f and 1 more"
    assert some(["x" * 300], shown=1) == f"'{'x' * (LONGEST - 4)}..."
