"""Single steps between the passes of ``generate``, for loops that are handed to it as ``custom_generate``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vlmfix.upstream.names import name_of, parameters
from vlmfix.upstream.versions import missing

__all__ = ["BaseStreamer", "GenerateDecoderOnlyOutput", "cache_of", "first", "kept_between", "next_token"]

HANDED = ("logits_processor", "stopping_criteria", "generation_config")
"""What ``generate`` hands to a loop beside the inputs and arguments of the model."""


def handed(kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Takes the logits processors, stopping criteria and generation configuration out of a loop's arguments.

    Raises:
        UpstreamError: ``generate`` did not hand them over.
    """
    if absent := [name for name in HANDED if name not in kwargs]:
        raise missing(f"generate hands no {' and '.join(absent)} to a loop of another's")
    processors, stops, config = (kwargs.pop(name) for name in HANDED)
    return processors, stops, config


def cache_of(model: PreTrainedModel, kwargs: dict[str, Any]) -> Cache | None:
    """The cache among what ``generate`` keeps between passes; None when there is none.

    Raises:
        UpstreamError: The model takes a cache under no known name.
    """
    cache: Cache | None = kwargs.get(name_of(type(model), "cache"))
    return cache


def first(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model for the pass over the prompt, (B, T)."""
    return whole(model, input_ids, kwargs, first=True)


def whole(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """Arguments of the model for a pass over all of (B, T + generated) tokens, without a cache.

    Args:
        model: The model.
        input_ids: (B, T + generated) tokens.
        kwargs: What ``generate`` keeps between passes.
        first: Whether no token was generated yet, so that pictures are still to be encoded.
    """
    return _prepared(model, input_ids, kwargs, is_first_iteration=first)


def next_token(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the model for the pass over the newest of (B, T + generated) tokens."""
    return _prepared(model, input_ids, kwargs, next_sequence_length=1)


def kept_between(model: PreTrainedModel, output: Any, kwargs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """What ``generate`` keeps after a pass: the cache, a longer mask, later positions.

    Raises:
        UpstreamError: The model does not say it in the known way.
    """
    update: Any = getattr(model, "_update_model_kwargs_for_generation", None)
    if update is None:
        raise missing(f"{type(model).__name__} has no _update_model_kwargs_for_generation")
    kept: dict[str, Any] = update(output, kwargs)
    return kept


def _prepared(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any], **step: Any) -> dict[str, Any]:
    prepare: Any = model.prepare_inputs_for_generation
    if not step.keys() <= parameters(prepare) and "kwargs" not in parameters(prepare):
        raise missing(f"prepare_inputs_for_generation takes no {' and '.join(step)}")
    inputs: dict[str, Any] = prepare(input_ids, **step, **kwargs)
    return inputs
