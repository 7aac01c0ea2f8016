"""The most memory that torch's tensors take on the CPU while something runs, as its profiler sees it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile

EVENT = "[memory]"
"""Name of the profiler's events that say how many bytes were taken, or, below zero, given back."""


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that tensors on the CPU hold during a call, above what they held before it.

    Args:
        work: The call; it takes longer than usual meanwhile.
    """
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    found: Any = seen.profiler
    held = most = 0
    for event in found.kineto_results.events():
        if event.name() == EVENT:
            held += event.nbytes()
            most = max(most, held)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps standard error free of what the profiler writes there: that it begins and ends, and what it did not see."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
