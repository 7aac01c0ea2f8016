"""A text decoder alone: what it was called with, and a call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from transformers import Cache

from vlmfix.upstream.names import TextNames


@dataclass(frozen=True, eq=False)
class TextInputs:
    """What a text decoder was called with.

    Attributes:
        embeds: (B, Q, hidden size) embeddings.
        positions: (B, Q) or (3 or 4, B, Q) position ids, or None when the model was told none.
    """

    embeds: Tensor
    positions: Tensor | None

    @classmethod
    def of(cls, decoder: nn.Module, kwargs: Mapping[str, Any]) -> Self:
        """Reads the arguments of a call.

        Raises:
            UpstreamError: The decoder takes them under no known name.
        """
        names = TextNames.of(decoder)
        return cls(embeds=kwargs[names.embeds], positions=kwargs.get(names.positions))

    def last(self) -> TextInputs:
        """A copy of what concerns the newest token alone."""
        positions = None if self.positions is None else self.positions[..., -1:].clone()
        return TextInputs(embeds=self.embeds[:, -1:].clone(), positions=positions)


@contextmanager
def watched(decoder: nn.Module, see: Callable[[TextInputs], None]) -> Iterator[None]:
    """Shows what a text decoder is called with inside the block.

    Args:
        decoder: The text decoder.
        see: Called before every pass.
    """

    def show(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        see(TextInputs.of(module, kwargs))

    with decoder.register_forward_pre_hook(show, with_kwargs=True):
        yield


def call(decoder: nn.Module, inputs: TextInputs, mask: Tensor, cache: Cache) -> Tensor:
    """Runs a text decoder behind a cache.

    Args:
        decoder: The text decoder.
        inputs: Embeddings and positions of Q new tokens.
        mask: (B, K) int64, 1 where a token is real, the new ones last.
        cache: Keys and values of the tokens before.

    Returns:
        (B, Q, hidden size) the last hidden state.
    """
    names = TextNames.of(decoder)
    given = {names.embeds: inputs.embeds, names.mask: mask, names.positions: inputs.positions, names.cache: cache}
    states: Tensor = decoder(**given, use_cache=True).last_hidden_state
    return states
