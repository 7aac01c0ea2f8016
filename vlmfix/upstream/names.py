"""Names under which transformers hands values to a model and to its text decoder; they change between versions.

A name is looked up in the signature of the class that takes it, so a value that is None and a name that is gone are
told apart: the first is for the caller to judge, the second raises.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from vlmfix.upstream.versions import missing

KNOWN: Mapping[str, tuple[str, ...]] = {
    "ids": ("input_ids",),
    "embeds": ("inputs_embeds",),
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "cache": ("cache", "past_key_values"),  # 5.24 renamed it
    "features": ("mm_encoder_outputs",),
    "pixels": ("pixel_values",),
    "picture_tokens": ("visual_pos_masks",),
    "deep": ("deepstack_visual_embeds",),
    "hidden": ("hidden_states",),
}
"""For each value, the names that some tested version has for it, the newest first."""

PROCESSED = ("input_ids", "attention_mask", "pixel_values")
"""What processors return; without pictures there are no pixels."""
TYPES = ("mm_token_type_ids", "token_type_ids")
"""Inputs that mark each token as text or picture; models use one of the names."""
PIXELS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "batch_num_images", "num_crops")
"""Inputs that belong to the pictures."""


@dataclass(frozen=True)
class ModelNames:
    """Names under which a model's ``forward`` takes what ``generate`` hands to it.

    Attributes:
        ids: (B, Q) token ids.
        mask: (B, K) mask of real tokens, (B, 1, Q, K), or a dictionary of such masks.
        positions: (B, Q) or (3 or 4, B, Q) position ids.
        cache: Keys and values of earlier tokens.
        features: What the pictures became, by modality.
    """

    ids: str
    mask: str
    positions: str
    cache: str
    features: str

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The names of a model.

        Raises:
            UpstreamError: Its ``forward`` takes one of these values under no known name.
        """
        return cls(*(name_of(type(model), value) for value in ("ids", "mask", "positions", "cache", "features")))


@dataclass(frozen=True)
class TextNames:
    """Names under which a text decoder's ``forward`` takes what the model around it hands to it.

    Attributes:
        embeds: (B, Q, hidden size) embeddings.
        mask: As in ``ModelNames``.
        positions: As in ``ModelNames``.
        cache: As in ``ModelNames``.
        picture_tokens: (B, Q) bool, which tokens show a picture; None where a decoder takes no deep features.
        deep: Features that are added in the first layers, (picture tokens, hidden size) each; None likewise.
    """

    embeds: str
    mask: str
    positions: str
    cache: str
    picture_tokens: str | None
    deep: str | None

    @classmethod
    def of(cls, decoder: nn.Module) -> Self:
        """The names of a text decoder.

        Raises:
            UpstreamError: Its ``forward`` takes one of the first four values under no known name.
        """
        kind = type(decoder)
        needed = [name_of(kind, value) for value in ("embeds", "mask", "positions", "cache")]
        return cls(*needed, *(_known(kind, value) for value in ("picture_tokens", "deep")))


def name_of(kind: type[Any], value: str) -> str:
    """The name under which a class's ``forward`` takes a value.

    Args:
        kind: A module's class.
        value: A key of ``KNOWN``.

    Raises:
        UpstreamError: It takes the value under no known name.
    """
    name = _known(kind, value)
    if name is None:
        known = " or ".join(KNOWN[value])
        raise missing(f"{kind.__name__}.forward takes no {known}, by which vlmfix hands over and reads the {value}")
    return name


def handed(value: str, given: Mapping[str, Any]) -> Any:  # noqa: ANN401 (of any kind)
    """What a call was given for a value under one of its known names; None when it was given nothing.

    Args:
        value: A key of ``KNOWN``.
        given: The arguments by name.
    """
    return next((given[name] for name in KNOWN[value] if given.get(name) is not None), None)


def hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The residual stream that a layer was called with, (B, Q, hidden size).

    Raises:
        UpstreamError: It was called without one under a known name.
    """
    if args:
        return _stream(args[0])
    for name in KNOWN["hidden"]:
        if name in kwargs:
            return _stream(kwargs[name])
    raise missing(f"layers are called with {', '.join(kwargs)}, and none of these is the residual stream")


def _stream(value: Any) -> Tensor:  # noqa: ANN401 (checked here)
    if not isinstance(value, Tensor):
        raise missing("the first argument of a layer is no residual stream")
    return value


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters, decorators looked through."""
    return frozenset(inspect.signature(function).parameters)


def _known(kind: type[Any], value: str) -> str | None:
    return next((name for name in KNOWN[value] if name in _taken(kind.forward)), None)


_taken = functools.cache(parameters)
