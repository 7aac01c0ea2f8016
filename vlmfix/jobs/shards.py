"""Splits a run over pictures into shards by the pictures' names, and finds the folders that shards were written to."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vlmfix.errors import DataError, UsageError
from vlmfix.shapes import simple

SHARDS = "shards"
"""Folder of the shards' folders, below the folder that they have in common."""
WRITTEN = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)
FOLDER = re.compile(r"(\d{1,9})-of-(\d{1,9})", re.ASCII)


def _is_shard(value: Any) -> bool:  # noqa: ANN401 (any JSON value)
    found = WRITTEN.fullmatch(value) if isinstance(value, str) else None
    return found is not None and int(found[1]) < int(found[2])


SHARD = simple("a shard, as 0/8", _is_shard)
"""Shape of a shard in a card."""


@dataclass(frozen=True, order=True)
class Shard:
    """Names one of several parts of a run, which together ask about every picture once.

    Attributes:
        index: Number of the part, from 0.
        count: Number of parts.
    """

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Reads ``I/N``.

        Raises:
            UsageError: It is something else, or I is not below N.
        """
        if not _is_shard(text):
            raise UsageError(f"{text!r} is no shard", "write I/N, with I from 0 to N - 1: 0/8, 1/8, ..., 7/8")
        index, count = map(int, text.split("/"))
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, name: str) -> bool:
        """Says whether a picture belongs to the part, which depends on its name alone."""
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest, "big") % self.count == self.index

    def folder(self, out: Path) -> Path:
        """Returns the folder of the part, below the folder that all parts have in common."""
        return out / SHARDS / f"{self.index}-of-{self.count}"


def shards_in(out: Path) -> list[Shard]:
    """Finds the shards that have a folder, in order.

    Args:
        out: The folder that they have in common.

    Raises:
        DataError: The folder cannot be listed.
    """
    try:
        names = [path.name for path in (out / SHARDS).iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a zero byte in the name
        return []
    except OSError as error:
        raise DataError(f"cannot list {out / SHARDS}: {error.strerror}", "check the path") from error
    found = [Shard(int(match[1]), int(match[2])) for name in names if (match := FOLDER.fullmatch(name))]
    return sorted(shard for shard in found if shard.index < shard.count and shard.folder(out).name in names)
