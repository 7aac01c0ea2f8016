"""Takes specifications of decoders apart: names, parameters and recipes, before anybody knows what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vlmfix.plugins import FILE

_FILE = re.sub(r"\(\?P<\w+>", "(?:", FILE.pattern)
PART = re.compile(
    rf"(@.*?\.toml\s*(?=\+|$)|(?:\s*{_FILE}(?=\s*(?:[:+]|$)))?.*?)(?:\+(?=\s*(?:[a-zA-Z@]|{_FILE}))|$)", re.DOTALL
)
"""A part of a chain and the ``+`` after it. The path of a recipe or of a file may hold a ``+``, and so may a number."""


@dataclass(frozen=True)
class Words:
    """Holds one part of a specification, as it is written.

    Attributes:
        name: The decoder: a name, or a file and a class; empty for a recipe.
        given: Its parameters, each as (name, ``=`` or nothing, text).
        recipe: The path behind ``@``; None for a decoder.
    """

    name: str
    given: tuple[tuple[str, str, str], ...] = ()
    recipe: str | None = None


def split(spec: str) -> Iterator[Words]:
    """Yields the parts of a specification, at least one."""
    for text in [found[1].strip() for found in PART.finditer(spec) if found[0]] or [""]:
        if text.startswith("@"):
            yield Words("", recipe=text[1:])
            continue
        file = FILE.match(text)
        name, _, rest = (file[0], ":", text[file.end() + 1 :]) if file else text.partition(":")
        items = (item.partition("=") for item in rest.split(",") if item)
        yield Words(name.strip(), tuple((key.strip(), equals, value.strip()) for key, equals, value in items))
