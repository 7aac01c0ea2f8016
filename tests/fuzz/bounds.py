"""What a reader may use: time, memory, file handles, and no word on standard error."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

STATUS, RESET, HANDLES = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/fd")
LINUX = sys.platform == "linux"


PANIC = re.compile(rb"\n?thread '.*' (\(\d+\) )?panicked at .*\n.*\n(note: run with .*\n)?")
"""What a reader written in Rust says before its error can be handled."""


class TooSlow(BaseException):
    """A reader does not end; no handler for exceptions is to catch this."""


@contextmanager
def bounded(*, seconds: float, mebibytes: float, allowed: tuple[type[Warning], ...] = ()):
    """Makes sure of what is done inside.

    Args:
        seconds: Of this process's own time, and ten times that on the clock.
        mebibytes: By which the memory of the process may grow for a moment (on Linux, where it can be told).
        allowed: Warnings that may be given.

    Raises:
        AssertionError: Too much of something, a warning, a handle left open, or something written to standard error.
        TooSlow: It went on for too long.
    """

    def late(*_):
        raise TooSlow(f"more than {10 * seconds:g} s")

    before, handles, spent = _memory("VmRSS", reset=True), _handles(), time.process_time()
    former, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    most = int((_memory("VmData") + 4 * mebibytes) * 2**20) if LINUX else limits[0]
    resource.setrlimit(
        resource.RLIMIT_DATA, (most, limits[1])
    )  # so that too much is an error and not the machine's end
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        with _no_words(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    spent = time.process_time() - spent
    assert spent < seconds, f"{spent:.1f} s"
    grown = _memory("VmHWM") - before
    assert grown < mebibytes, f"{grown:.0f} MiB"
    strange = [str(warning.message) for warning in warned if not issubclass(warning.category, allowed)]
    assert not strange, f"warnings: {strange}"
    if _handles() != handles:
        gc.collect()  # an error that goes round in a circle keeps what its frames held
    assert _handles() == handles, "a file is still open"


@contextmanager
def _no_words():
    """Catches what is written to the file of standard error, by C libraries too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        words = PANIC.sub(b"", said.read())
    assert not words, f"on standard error: {words[:200]!r}"


def _memory(field: str, *, reset: bool = False) -> float:
    """Memory of this process in MiB; ``reset`` lets the highest begin anew."""
    if not LINUX:
        return 0.0
    if reset:
        RESET.write_text("5")
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


def _handles() -> set[str]:
    return set(os.listdir(HANDLES)) if LINUX else set()
