"""The most memory that torch's tensors take on the CPU while something runs, as its profiler sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

EVENT = "[memory]"
"""Name of the profiler's events that say how many bytes were taken, or, below zero, given back."""


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that tensors on the CPU hold during a call, above what they held before it.

    Args:
        work: The call; it takes longer than usual meanwhile.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to standard error when it begins and ends
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    found: Any = seen.profiler
    held = most = 0
    for event in found.kineto_results.events():
        if event.name() == EVENT:
            held += event.nbytes()
            most = max(most, held)
    return most
