"""What a profiler is: parameters, and the state of one measurement that watches the shared passes.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.errors import UsageError
from vlmfix.heads.moments import Moments, Tally
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.cache import handed_over
from vlmfix.upstream.names import name_of
from vlmfix.upstream.positions import prompt_positions


class State(ABC):
    """One profiler's measurement: it watches each shared pass and then says what the batch's heads scored."""

    shares: ClassVar[bool] = True
    """Whether it needs the shared pass; one that runs passes of its own does not."""
    keeps_cache: ClassVar[bool] = False
    """Whether it reads the cache that the shared pass filled."""
    advice: ClassVar[str] = "try another question"
    """What to do when no picture says anything."""

    def tally(self, layers: int, heads: int) -> Tally:
        """An empty tally, which gathers the pictures' scores."""
        return Moments.empty(layers, heads)

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        """Has its readings at work inside the block, in which the shared pass runs once."""
        yield

    @abstractmethod
    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        """What the batch's heads scored.

        Args:
            work: The batch that was watched.
            ran: What its pass left; None when no state of the profile shares it.

        Returns:
            (B, L, H), or what the state's tally gathers; a picture that says nothing is NaN. A state that must see more
            pictures first may hold pictures back and return fewer, or none, and those of earlier batches later.
        """

    def rest(self, layers: int, heads: int) -> Tensor:
        """(N, L, H) scores that were held back to the end."""
        return torch.empty(0, layers, heads)

    def details(self) -> dict[str, Tensor]:
        """What else it found, at the end."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Profiler(ABC):
    """What is measured, with its parameters. One profiler is one file; ``profilers.PROFILERS`` lists them."""

    name: ClassVar[str]
    """Its name on the command line."""
    title: ClassVar[str]
    """What a high score means, for plots and tables."""

    def parameters(self) -> dict[str, Any]:
        """What the profile's card says of the parameters, in JSON values."""
        return asdict(self)

    def _require(self, allowed: bool, name: str, rule: str) -> None:
        """Checks a parameter.

        Raises:
            UsageError: It is not allowed.
        """
        if not allowed:
            raise UsageError(f"{self.name}: {name}={getattr(self, name)!r} is not allowed", f"{name} is {rule}")

    @abstractmethod
    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state.

        Raises:
            UnsupportedModelError: The model lacks what is measured.
        """


@torch.no_grad()
def run_pass(work: Work, states: list[State]) -> Ran | None:
    """Runs the prompts once, with all states watching; None when none of them needs the pass."""
    if not any(state.shares for state in states):
        return None
    model: Any = work.vlm.model
    cache = DynamicCache() if any(state.keeps_cache for state in states) else None
    positions = prompt_positions(model, work.batch)
    given: dict[str, Any] = {name_of(type(model), "positions"): positions}
    if cache is not None:
        given |= handed_over(model, cache)
    with ExitStack() as block:
        for state in states:
            block.enter_context(state.watching(work))
        output = model(**work.batch, **given, use_cache=cache is not None, logits_to_keep=1)
    return Ran(logits=output.logits[:, -1].float(), cache=cache, positions=positions)
