"""Functions of tensors, compiled by inductor for any number of rows and keys."""

from __future__ import annotations

import atexit
import threading
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Result = TypeVar("Result")

OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {"triton.autotune_pointwise": False}
"""Of inductor: no trial of several forms of a kernel, which would double the time that compiling takes."""


@cache
def compiled(function: Callable[Given, Result], kind: Hashable) -> Callable[Given, Result]:
    """A function as one compiled graph, in a copy for each kind of arguments.

    A function is compiled anew for arguments of another kind, and only so often: many decoders would share the limit.

    Args:
        function: A function of tensors, and of objects that hold tensors.
        kind: Equal for arguments that differ in tensors alone.
    """
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{function} is not written in Python")
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    made: Callable[Given, Result] = torch.compile(own, fullgraph=True, options=OPTIONS)
    return made


_STARTING: list[threading.Thread] = []


def start(device: torch.device) -> None:
    """Starts the compiler in a thread of its own, once a process, since its first use takes seconds.

    Args:
        device: For what it is to compile.
    """
    if not _STARTING:
        thread = threading.Thread(target=_compile_something, args=(device,), daemon=True)
        _STARTING.append(thread)
        thread.start()
        atexit.register(thread.join)  # an interpreter that ends under a thread at work is aborted


def settle() -> None:
    """Waits until the compiler has started, if it was: what it does on a GPU must not be recorded."""
    for thread in _STARTING:
        thread.join()


def _compile_something(device: torch.device) -> None:
    with suppress(Exception):  # told by whoever needs the compiler
        torch.compile(lambda x: x * 2 + 1, fullgraph=True, options=OPTIONS)(
            torch.zeros(8, dtype=torch.int, device=device)
        )


def of_any_size(tensor: Tensor, *axes: int) -> Tensor:
    """The tensor, some of whose sizes compiled functions must not take for fixed."""
    for axis in axes:
        if tensor.shape[axis] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, axis % tensor.dim())
    return tensor


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps inductor's advice about speed from users, who can do nothing about it, inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch._inductor")
        yield
