"""Remembers which questions a run has met, in some dozen bytes for each, however long names and prompts are."""

from __future__ import annotations

import hashlib
from typing import Self

BUCKETS = 1 << 14
"""Buckets that digests are spread over: at ten million, one is searched through in two microseconds."""
WIDTH = 10
"""Bytes of a digest that a bucket keeps; that two of ten million texts share one has a chance below 1e-13."""


class Seen:
    """Holds which texts, or tuples of texts, were added; none can be had back."""

    def __init__(self) -> None:
        self._buckets: dict[int, bytearray] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, texts: str | tuple[str, ...]) -> bool:
        number, digest = _digest(texts)
        bucket = self._buckets.get(number)
        return bucket is not None and _holds(bucket, digest)

    def add(self, texts: str | tuple[str, ...]) -> bool:
        """Adds a text, or texts that belong together, and returns whether they are new."""
        number, digest = _digest(texts)
        bucket = self._buckets.setdefault(number, bytearray())
        if _holds(bucket, digest):
            return False
        bucket += digest
        self._count += 1
        return True

    def copy(self) -> Self:
        """Returns what is held now, to which nothing is added later."""
        other = type(self)()
        other._buckets = {number: bytearray(bucket) for number, bucket in self._buckets.items()}
        other._count = self._count
        return other


def _digest(texts: str | tuple[str, ...]) -> tuple[int, bytes]:
    joined = texts if isinstance(texts, str) else "".join(f"{len(text)}:{text}" for text in texts)
    digest = hashlib.blake2b(joined.encode(errors="surrogatepass"), digest_size=WIDTH + 2).digest()
    return int.from_bytes(digest[:2], "big") % BUCKETS, digest[2:]


def _holds(bucket: bytearray, digest: bytes) -> bool:
    place = bucket.find(digest)
    while place % WIDTH > 0:  # it lies across two digests; -1 % WIDTH is positive too
        if place < 0:
            return False
        place = bucket.find(digest, place + 1)
    return place >= 0
