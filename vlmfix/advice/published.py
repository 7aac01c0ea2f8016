"""Reads what others published of methods that vlmfix has; none of it was measured here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vlmfix.parsing import toml_of

FILE = Path(__file__).with_name("published.toml")
TOKENS = 512
"""Most tokens of an answer, where a source says no others."""


@dataclass(frozen=True)
class Published:
    """Holds what one source says of one method.

    Attributes:
        decoder: The method's name in vlmfix.
        source: Who published it: the paper's method.
        how: ``copied`` from the source, or ``second hand``.
        decoding: Greedy, beam or sampling, of both rows.
        tokens: Most tokens of an answer.
        plain: CHAIR_s of plain decoding: of 100 answers so many name something that is not there.
        mitigated: The same of the method.
    """

    decoder: str
    source: str
    how: str
    decoding: str
    tokens: int
    plain: float
    mitigated: float

    @property
    def known_from(self) -> str:
        """Returns who published it, and how it is known; with the most tokens where these are not the others'."""
        return "; ".join(filter(None, (self.source, self._limit, self.how)))

    @property
    def way(self) -> str:
        """Returns the decoding of both rows, with the most tokens likewise."""
        return ", ".join(filter(None, (self.decoding, self._limit)))

    @property
    def _limit(self) -> str:
        return "" if self.tokens == TOKENS else f"up to {self.tokens} tokens"

    @property
    def change(self) -> float:
        """Returns the difference in points."""
        return self.mitigated - self.plain


def published(known: Collection[str]) -> list[Published]:
    """Reads the figures of some decoders, those first whose mean difference is the lowest.

    Args:
        known: Names of the decoders that are wanted.
    """
    found = [
        Published(
            decoder=name,
            source=one["source"],
            how=one["how"],
            decoding=one["decoding"],
            tokens=one.get("tokens", TOKENS),
            plain=one["plain"],
            mitigated=figure,
        )
        for one in toml_of(FILE.read_bytes())["sources"]
        for name, figure in one["methods"].items()
        if name in known
    ]
    changes = {name: [one.change for one in found if one.decoder == name] for name in {one.decoder for one in found}}
    return sorted(found, key=lambda one: (sum(changes[one.decoder]) / len(changes[one.decoder]), one.decoder))


def about() -> tuple[str, str]:
    """Returns the model and the task that the figures are of."""
    content = toml_of(FILE.read_bytes())
    return content["model"], content["task"]
