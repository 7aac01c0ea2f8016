"""Follows the answers of a call token by token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from vlmfix.decoding.choice import Choice
from vlmfix.decoding.loop import Said


class Listener(Protocol):
    """Hears of every token of a call, in the thread that decodes, and says which answers nobody waits for any more."""

    def began(self, prompts: Sequence[int]) -> None:
        """Hears how many tokens each prompt has, pictures included."""

    def following(self, choice: Choice) -> Choice:
        """Returns what chooses the tokens: the given choice, or one around it that looks at the scores."""

    def said(self, said: Said) -> Collection[int]:
        """Hears the tokens of one step; returns samples that are to leave."""
