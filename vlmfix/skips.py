"""Counts the tokens that contrasts left to the clean row; every figure of them in cards and reports is made here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Skips:
    """Holds how many tokens of some answers a decoder with ``when=uncertain`` left to the clean row.

    Attributes:
        skipped: The tokens left; None where no answer says.
        tokens: All tokens of the answers that say.
    """

    skipped: int | None = None
    tokens: int = 0

    def count(self, skipped: int | None, tokens: int) -> None:
        """Adds an answer.

        Args:
            skipped: How many of its tokens were left; None where it does not say, and then it does not count.
            tokens: How many tokens it has.
        """
        if skipped is not None:
            self.skipped = (self.skipped or 0) + skipped
            self.tokens += tokens

    @property
    def rate(self) -> float | None:
        """Returns the share of the tokens that were left, rounded to 4 decimals; None where no answer says."""
        return round(self.skipped / self.tokens, 4) if self.skipped is not None and self.tokens else None

    def noted(self) -> dict[str, Any]:
        """Returns both figures as cards and reports have them; nothing where no answer says."""
        return {} if self.rate is None else {"skipped": self.skipped, "skip_rate": self.rate}
