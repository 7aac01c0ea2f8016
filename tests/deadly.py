"""A process that dies at a chosen change of the file system, as by ``kill -9``."""

from __future__ import annotations

import os
import signal

CHANGES = ("write", "fsync", "ftruncate", "replace", "unlink")
"""The calls of ``os`` by which results are changed."""


def die_at(step: int, more: tuple[str, ...] = ()) -> None:
    """Kills this process just before one of the calls that change files, counted from 0.

    Args:
        step: Number of the call.
        more: Further calls that count.
    """
    left = [step]

    def deadly(call):
        def counted(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*arguments, **options)

        return counted

    for name in (*CHANGES, *more):
        setattr(os, name, deadly(getattr(os, name)))
