"""One thread at a time with a model, and the model as it answers: what is on its modules, every thread would see."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from vlmfix.errors import IncompatibleDecodersError
from vlmfix.upstream.wrappers import compiled


class Turn:
    """Who has a model; a thread that has it may take it again.

    Args:
        model: The model.

    Attributes:
        owner: Identifier of the thread that has it, or None.
        helper: Identifier of a thread that runs the owner's passes, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._lock = threading.RLock()
        self._depth = 0
        self.owner: int | None = None
        self.helper: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Waits until no other thread has the model, and has it inside the block, without dropout and not compiled.

        Submodules that were training, and code that others compiled, are as before on leaving.
        """
        if self.helper == threading.get_ident() != self.owner:
            yield  # the thread that has the model lets this one run its passes
            return
        with self._lock, ExitStack() as block:
            self.owner, self._depth = threading.get_ident(), self._depth + 1
            try:
                model = self._model()
                if self._depth == 1 and model is not None:
                    block.enter_context(_answering(model))
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self.owner = None

    @contextmanager
    def helped(self) -> Iterator[None]:
        """Lets the calling thread run passes inside the block, in the place of the thread that has the model."""
        former, self.helper = self.helper, threading.get_ident()
        try:
            yield
        finally:
            self.helper = former

    @contextmanager
    def guarded(self, module: nn.Module) -> Iterator[None]:
        """Refuses passes of other threads through a module inside the block, in which what passes is read."""

        def check(module: nn.Module, args: object) -> None:
            self.check()

        with self.taken(), module.register_forward_pre_hook(check):
            yield

    @property
    def mine(self) -> bool:
        """Whether the thread that asks has the model."""
        return self.owner == threading.get_ident()

    def check(self) -> None:
        """Refuses a pass of a thread that does not have the model, while another has.

        Raises:
            IncompatibleDecodersError: The passes are another thread's; this one would be changed with them.
        """
        if self.owner is not None and threading.get_ident() not in (self.owner, self.helper):
            raise IncompatibleDecodersError(
                "another thread decodes with this model, and what it changes would change this thread's passes too",
                "answer by vlm.generate(...) or inside decoder.applied(...), which wait for each other",
            )


@contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """Has a model without dropout, and with the code that is written and not what others compiled of it."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as block:
        if compiled(model):
            block.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


_TURNS: WeakKeyDictionary[nn.Module, Turn] = WeakKeyDictionary()
_MAKING = threading.Lock()


def turn_of(model: nn.Module) -> Turn:
    """Gives the one turn of a model, however many wrappers it has."""
    with _MAKING:
        if model not in _TURNS:
            _TURNS[model] = Turn(model)
        return _TURNS[model]
