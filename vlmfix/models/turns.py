"""One thread at a time with a model: what edits, branches and readings put on its modules, every thread would see."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


class Turn:
    """Who has a model; a thread that has it may take it again.

    Attributes:
        owner: Identifier of the thread that has it, or None.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self.owner: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Waits until no other thread has the model, and has it inside the block."""
        with self._lock:
            self.owner, self._depth = threading.get_ident(), self._depth + 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self.owner = None

    @property
    def mine(self) -> bool:
        """Whether the thread that asks has the model."""
        return self.owner == threading.get_ident()


_TURNS: WeakKeyDictionary[nn.Module, Turn] = WeakKeyDictionary()
_MAKING = threading.Lock()


def turn_of(model: nn.Module) -> Turn:
    """Gives the one turn of a model, however many wrappers it has."""
    with _MAKING:
        return _TURNS.setdefault(model, Turn())
