"""Panics of packages written in Rust, such as tokenizers: errors that are no ``Exception``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PANIC = "PanicException"
"""Their class; it has no module to import it from."""


@contextmanager
def as_errors() -> Iterator[None]:
    """Turns a panic inside the block into an error like any other.

    Raises:
        RuntimeError: There was one; a line of Rust's own about it is on the standard error.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise RuntimeError(f"a tokenizer or another reader gave up: {error}") from error
