"""Declares how tokens are chosen from scores: the most probable one, a draw, or the best of several beams."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vlmfix.asked import number, whole
from vlmfix.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Says how tokens are chosen; without arguments, by greedy search.

    Attributes:
        num_beams: Beams of the search, at least 1; 1 is greedy search or sampling.
        temperature: In [0, 100]; 0 takes the most probable token, a higher one draws tokens.
        top_p: Nucleus of the draw, in (0, 1].
        top_k: How many of the most probable tokens are drawn from, those of equal scores included; 0 for all.

    Raises:
        UsageError: A value is out of range, or values that do not go together.
    """

    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_beams", whole("num_beams", self.num_beams, 1))
        object.__setattr__(self, "temperature", number("temperature", self.temperature))
        object.__setattr__(self, "top_p", number("top_p", self.top_p))
        object.__setattr__(self, "top_k", whole("top_k", self.top_k, 0))
        if not 0 <= self.temperature <= 100 or not 0 < self.top_p <= 1:
            given = f"temperature={self.temperature}, top_p={self.top_p}"
            raise UsageError(f"{given} are not allowed", "temperature is in [0, 100], top_p in (0, 1]")
        if self.temperature > 0 and self.num_beams > 1:
            given = f"temperature={self.temperature} with num_beams={self.num_beams}"
            raise UsageError(given, "sample with num_beams=1, or use temperature=0")
        if self.top_p < 1 and self.temperature == 0:
            given = f"top_p={self.top_p} with temperature=0"
            raise UsageError(given, "greedy search has no nucleus; give a temperature, or sample:top_p=P")
        if self.top_k and self.temperature == 0:
            given = f"top_k={self.top_k} with temperature=0"
            raise UsageError(given, "greedy search draws from no tokens; give a temperature, or sample:top_k=N")

    def __str__(self) -> str:
        if self.num_beams > 1:
            return f"{self.num_beams} beams"
        if self.temperature > 0:
            nucleus = f", top_p {self.top_p:g}" if self.top_p < 1 else ""
            best = f", top_k {self.top_k}" if self.top_k else ""
            return f"sampling at temperature {self.temperature:g}{nucleus}{best}"
        return "the most probable token"

    def combined(self, decoders: Strategy | None) -> Strategy:
        """Merges the options of a call with the decoder's own strategy (None if it has none).

        Options at their defaults (one beam, temperature 0, top_p 1, top_k 0) leave the choice to the decoder.

        Raises:
            UsageError: An option is neither at its default nor the decoder's own.
        """
        if decoders is None:
            return self
        plain, own = asdict(Strategy()), asdict(decoders)
        for name, value in asdict(self).items():
            if value not in (plain[name], own[name]):
                raise UsageError(
                    f"{name}={value} is asked for with a decoder that chooses by {decoders}",
                    f"leave {name} out, or leave the choice of tokens to the options alone",
                )
        return decoders

    def arguments(self) -> dict[str, Any]:
        """Returns this strategy as arguments of transformers' ``generate``, which override the model's defaults."""
        drawn = self.temperature > 0
        return {
            "num_beams": self.num_beams,
            "do_sample": drawn,
            "temperature": self.temperature if drawn else None,
            "top_p": self.top_p if drawn else None,
            "top_k": self.top_k if drawn else None,
        }
