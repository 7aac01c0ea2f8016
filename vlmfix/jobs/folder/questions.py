"""Reads which prompts to ask about which picture: one prompt for all, or a CSV file."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vlmfix.errors import UsageError
from vlmfix.parsing import UnreadableError, some, text_of

DESCRIBE = "Please describe this image in detail."
"""Prompt when no other is given."""

SHOWN = 10
"""Most missing pictures named in the message; the rest are counted."""


@dataclass(frozen=True)
class Questions:
    """Holds prompts for every picture, or for named pictures.

    Attributes:
        everywhere: Prompts about every picture.
        named: Path relative to the folder -> prompts about that picture; empty unless a file names any.
        about: Identity of these prompts: the prompt, and the digest of the file.
        file_name: Name of the file with the prompts; empty for a single prompt.
    """

    everywhere: tuple[str, ...] = ()
    named: dict[str, tuple[str, ...]] = field(default_factory=dict)
    about: dict[str, str | None] = field(default_factory=dict)
    file_name: str = ""

    @classmethod
    def text(cls, prompt: str = DESCRIBE) -> Self:
        """Makes questions with one prompt for every picture.

        Raises:
            UsageError: The prompt is empty.
        """
        if not prompt.strip():
            raise UsageError("the prompt is empty", "write a question or an instruction")
        return cls(everywhere=(prompt,), about={"prompt": prompt, "prompts": None})

    @classmethod
    def file(cls, path: Path) -> Self:
        """Reads questions from a CSV file with a header: ``prompt``, or ``image,prompt``.

        With ``prompt`` alone every picture gets every prompt; with ``image`` each row is one question
        about the picture at that path, relative to the folder.

        Raises:
            UsageError: The file cannot be read, has other columns, an empty field, a repeated row, or no row.
        """
        rows, digest = _read(path)
        named: dict[str, dict[str, None]] = {}
        first: dict[tuple[str, str], int] = {}
        for line, image, prompt in rows:
            earlier = first.setdefault((image, prompt), line)
            if earlier != line:
                raise UsageError(f"{path}, line {line} repeats line {earlier}", "remove one of them")
            named.setdefault(image, {})[prompt] = None
        everywhere = tuple(named.pop("", ()))
        return cls(
            everywhere=everywhere,
            named={image: tuple(prompts) for image, prompts in named.items()},
            about={"prompt": None, "prompts": f"sha256:{digest}"},
            file_name=str(path.resolve()),
        )

    def about_picture(self, name: str) -> tuple[str, ...]:
        """Returns the prompts for one picture, in order."""
        return self.named.get(name, ()) if self.named else self.everywhere

    def check(self, names: Iterable[str]) -> None:
        """Checks that every picture that a question names exists.

        Args:
            names: The pictures of the folder.

        Raises:
            UsageError: Some are not; the message lists them.
        """
        missing = sorted(set(self.named).difference(names))
        if missing:
            raise UsageError(
                f"the prompts name {len(missing)} pictures that are not in the folder: {some(missing, shown=SHOWN)}",
                "write each path relative to the folder, with forward slashes",
            )


def _read(path: Path) -> tuple[list[tuple[int, str, str]], str]:
    """Reads (line, image or "", prompt) of each row, and the digest of the file."""
    try:
        raw = path.read_bytes()
        text = text_of(raw)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "give a CSV file") from error
    except UnreadableError as error:
        raise UsageError(f"{path}, line {error.line} {error.problem}", "save it as CSV in UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if sorted(columns) not in (["prompt"], ["image", "prompt"]):
            raise UsageError(
                f"{path} has the columns {some(columns) or '(none)'}",
                "the first line must be prompt or image,prompt",
            )
        rows = [_row(path, reader.line_num, row, "image" in columns) for row in reader]
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.reader.line_num}: {error}", "write it as standard CSV") from error
    if not rows:
        raise UsageError(f"{path} has no prompt", "write one prompt per line under the header")
    return rows, hashlib.sha256(raw).hexdigest()


def _row(path: Path, line: int, row: dict[str, str], named: bool) -> tuple[int, str, str]:
    image, prompt = row.get("image") or "", row.get("prompt") or ""
    if None in row:
        raise UsageError(f"{path}, line {line} has too many fields", "put text that holds a comma in double quotes")
    if not prompt.strip() or (named and not image):
        raise UsageError(f"{path}, line {line} has an empty field", "fill in every column")
    return line, image, prompt
