"""What one request, and all of them together, may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ANSWERS = 16
"""Most answers to one request, ``n``."""
ALTERNATIVES = 20
"""Most tokens that ``top_logprobs`` shows beside each token."""
STOPS = 4
"""Most stop strings."""
STOP_LENGTH = 1000
"""Longest stop string in characters."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Holds what a server allows.

    Attributes:
        body: Most bytes of a request.
        pictures: Most pictures of a request.
        tokens: Longest answer in tokens.
        waiting: Most requests that wait for their turn; one more is refused.
        seconds: Longest time from a request's arrival to its answer's end.
        rows: Most answers that are decoded at once; None for as many as the free memory has room for.
        grace: Seconds that running requests have when the server is told to end.
        allowed: Folder whose files requests may name; None to refuse all files.
    """

    body: int = 32 << 20
    pictures: int = 16
    tokens: int = 1024
    waiting: int = 256
    seconds: float = 300.0
    rows: int | None = None
    grace: float = 30.0
    allowed: Path | None = None
