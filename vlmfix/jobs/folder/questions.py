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
from vlmfix.files import resolved
from vlmfix.images import Found
from vlmfix.parsing import UnreadableError, some, text_of
from vlmfix.sources import Source

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
        tabled: Whether the file of the pictures has the prompts, too.
    """

    everywhere: tuple[str, ...] = ()
    named: dict[str, tuple[str, ...]] = field(default_factory=dict)
    about: dict[str, str | None] = field(default_factory=dict)
    file_name: str = ""
    tabled: bool = False

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
            file_name=str(resolved(path)),
        )

    @classmethod
    def of(cls, source: Source, prompt: str | None = None, file: Path | None = None) -> Self:
        """Takes the prompts of a CSV file of pictures, or else those that are given.

        Args:
            source: The pictures.
            prompt: A prompt for every picture; None for the usual one.
            file: A file of prompts.

        Raises:
            UsageError: Prompts come from two places, or cannot be read.
        """
        if prompt is not None and file is not None:
            raise UsageError("--prompt and --prompts are both given", "give one of them")
        if source.prompts is not None:
            if prompt is not None or file is not None:
                raise UsageError(
                    f"{source.place} has a column of prompts, and others are given",
                    "leave --prompt and --prompts out, or give the column another name",
                )
            about = {"prompt": None, "prompts": source.prompts}
            return cls(about=about, file_name=str(resolved(source.place)), tabled=True)
        return cls.text(DESCRIBE if prompt is None else prompt) if file is None else cls.file(file)

    def of_picture(self, file: Found) -> tuple[str, ...]:
        """Returns the prompts for one picture, in order."""
        if self.tabled:
            return file.prompts
        return self.named.get(file.name, ()) if self.named else self.everywhere

    def check(self, files: Iterable[Found]) -> None:
        """Checks that every picture that a question names exists.

        Args:
            files: The pictures of the run; looked through only when questions name any.

        Raises:
            UsageError: Some are not; the message lists them.
        """
        missing = sorted(set(self.named).difference(file.name for file in files)) if self.named else []
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
