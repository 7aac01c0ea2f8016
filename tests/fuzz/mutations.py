"""What is done to a whole file, to its bytes or to its structure, and the strategies that draw it."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass

from hypothesis import strategies as st

NAN = 0x7FC00000  # as float32
NUMBERS = (0, 1, 2, 255, 256, 4096, 20_000, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, NAN)
"""Sizes and offsets that decoders stumble over."""


@dataclass(frozen=True)
class Change:
    """One change of some bytes.

    Attributes:
        kind: One of ``KINDS``.
        place: Where, modulo the length.
        length: How much.
        value: What is written there.
        data: What is put in.
    """

    kind: str
    place: int
    length: int
    value: int
    data: bytes

    def __call__(self, content: bytes) -> bytes:
        place = self.place % (len(content) + 1)
        head, middle, tail = content[:place], content[place : place + self.length], content[place + self.length :]
        return {
            "flip": lambda: head + bytes([self.value & 255]) + content[place + 1 :],
            "cut": lambda: head,
            "insert": lambda: head + self.data + content[place:],
            "remove": lambda: head + tail,
            "repeat": lambda: head + middle + middle + tail,
            "zeros": lambda: head + bytes(len(middle)) + tail,
            "swap": lambda: head + tail[: self.length] + middle + tail[self.length :],
            "big": lambda: head + self.value.to_bytes(4, "big") + content[place + 4 :],
            "little": lambda: head + self.value.to_bytes(4, "little") + content[place + 4 :],
            "short": lambda: head + (self.value & 0xFFFF).to_bytes(2, "big") + content[place + 2 :],
            "append": lambda: content + self.data,
        }[self.kind]()


KINDS = ("flip", "cut", "insert", "remove", "repeat", "zeros", "swap", "big", "little", "short", "append")


def changes(*other: bytes) -> st.SearchStrategy[list[Change]]:
    """Up to four changes, mostly near the beginning, where sizes stand.

    Args:
        *other: Bytes that are put in whole.
    """
    change = st.builds(
        Change,
        kind=st.sampled_from(KINDS),
        place=st.integers(0, 80) | st.integers(0, 1 << 16),
        length=st.integers(1, 64),
        value=st.sampled_from(NUMBERS) | st.integers(0, 2**32 - 1),
        data=st.sampled_from([b"\0", b"\xff\xfe", b"\n", b'"', *other]) | st.binary(max_size=40),
    )
    return st.lists(change, min_size=1, max_size=4)


def changed(content: bytes, how: list[Change]) -> bytes:
    for change in how:
        content = change(content)
    return content


def checked_again(png: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right, so that what was changed is read and not refused at once."""
    place, parts = 8, [png[:8]]
    while place + 12 <= len(png):
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        if end + 4 > len(png):
            break
        parts += [png[place:end], zlib.crc32(png[place + 4 : end]).to_bytes(4, "big")]
        place = end + 4
    return b"".join([*parts, png[place:]])


DEEP = 100_000
ODD = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "float": "1.5",
    "huge": "9" * 5000,
    "large": "9" * 400,
    "overflow": "1e400",
    "nan": "NaN",
    "infinity": "-Infinity",
    "empty": '""',
    "text": '"x"',
    "number in text": '"7"',
    "long": json.dumps("x" * 100_000),
    "nul": r'"a\u0000b"',
    "control": r'"\u001b[31mred\nsecond line\r\u0007"',
    "surrogate": r'"\ud800.png"',
    "markup": '"[link=http://elsewhere]a[/link][/bold]"',
    "upwards": '"../../etc/passwd"',
    "rooted": '"/dev/zero"',
    "long name": json.dumps("n" * 300 + ".png"),
    "list": "[]",
    "of list": "[[1]]",
    "object": "{}",
    "of object": '{"a": {"b": null}}',
    "deep": "[" * 60 + "]" * 60,
    "deeper": "[" * 2000 + "]" * 2000,
    "deepest": "[" * DEEP,
    "no JSON": "'single'",
}
"""What takes the place of a value, as it stands in the file."""
MARK = "\u2603"


@dataclass(frozen=True)
class Edit:
    """One change of the structure of a JSON document.

    Attributes:
        place: Which of its values, modulo their number.
        what: Key of ``ODD``, or ``remove``, ``twice`` (the key stands there twice) or ``more`` (an unknown key).
    """

    place: int
    what: str


def edits() -> st.SearchStrategy[Edit]:
    return st.builds(Edit, place=st.integers(0, 400), what=st.sampled_from([*ODD, "remove", "twice", "more"]))


def edited(text: str, edit: Edit) -> str:
    """A JSON document, or JSON lines, with one value changed."""
    lines = text.split("\n")
    try:
        documents = [json.loads(text)]
        lines = [""]
    except ValueError:
        documents = [json.loads(line) if line.strip() else None for line in lines]
    places = [(number, path) for number, document in enumerate(documents) for path in _paths(document)]
    number, path = places[edit.place % len(places)]
    written = [json.dumps(document, ensure_ascii=False) if document is not None else "" for document in documents]
    written[number] = _with(documents[number], path, edit.what)
    return "\n".join(written)


def _paths(value, path=()):
    if value is not None or path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _paths(part, (*path, key))


def _with(document, path, what):
    if not path:
        return ODD.get(what, "")
    copy = json.loads(json.dumps(document))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    if what == "remove":
        del parent[key]
    elif what == "more" or (what == "twice" and isinstance(parent, list)):
        parent.insert(key, parent[key]) if isinstance(parent, list) else parent.update({"unknown": parent[key]})
    else:
        parent[key] = MARK
    text = json.dumps(copy, ensure_ascii=False)
    if what == "twice":
        name = json.dumps(key, ensure_ascii=False)
        return text.replace(f'{name}: "{MARK}"', f'{name}: 1, {name}: "x"')
    return text.replace(f'"{MARK}"', ODD.get(what, ""))


FIELD = re.compile(r"[^\s,=][^,=\t\n]*")


def refilled(text: str, edit: Edit) -> str:
    """A text of lines and fields (CSV, TOML, tables, lists) with one field changed."""
    fields = list(FIELD.finditer(text))
    if not fields:
        return ODD.get(edit.what, "")
    field = fields[edit.place % len(fields)]
    told = {"remove": "", "twice": f"{field[0]}\n{field[0]}", "more": f"{field[0]},{field[0]}\t{field[0]}"}
    return text[: field.start()] + told.get(edit.what, ODD.get(edit.what, "")) + text[field.end() :]


WHOLE = {
    "empty": lambda content: b"",
    "blank": lambda content: b" \n\n\t\n",
    "marked": lambda content: b"\xef\xbb\xbf" + content,
    "wide": lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    "packed": gzip.compress,
    "zeros": lambda content: bytes(len(content)),
    "doubled": lambda content: content + content,
    "no last line break": lambda content: content.rstrip(b"\n"),
    "other line breaks": lambda content: content.replace(b"\n", b"\r\n"),
    "not UTF-8": lambda content: content + b"\xff\n",
    "latin": lambda content: content.replace(b"e", b"\xe9"),
}


@dataclass(frozen=True)
class Damage:
    """What is done to a text file.

    Attributes:
        how: Changes of its bytes, an edit of its structure, or a key of ``WHOLE``.
    """

    how: tuple[Change, ...] | Edit | str

    def __call__(self, content: bytes, suffix: str) -> bytes:
        """The damaged file.

        Args:
            content: The whole one.
            suffix: Of its name; tells where its structure is.
        """
        if isinstance(self.how, str):
            return WHOLE[self.how](content)
        if not isinstance(self.how, Edit):
            return changed(content, list(self.how))
        if suffix == ".safetensors":
            return _with_header(content, self.how)
        change = edited if suffix in (".json", ".jsonl") else refilled
        return change(content.decode(), self.how).encode("utf-8", "surrogatepass")


def _with_header(content: bytes, edit: Edit) -> bytes:
    """A safetensors file with an edit in its header: of the tensors, or of the JSON text among its metadata."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if edit.place % 4:
        (key,) = header["__metadata__"]
        header["__metadata__"][key] = edited(header["__metadata__"][key], Edit(edit.place // 4, edit.what))
        text = json.dumps(header)
    else:
        text = edited(json.dumps(header), Edit(edit.place // 4, edit.what))
    written = text.encode("utf-8", "surrogatepass")
    return len(written).to_bytes(8, "little") + written + content[end:]


def damages() -> st.SearchStrategy[Damage]:
    """Structure twice as often as bytes."""
    return (edits() | edits() | changes().map(tuple) | st.sampled_from(list(WHOLE))).map(Damage)
