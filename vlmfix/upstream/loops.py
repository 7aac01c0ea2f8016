"""What ``generate`` hands to a loop that it is given as ``custom_generate``, and what it keeps from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vlmfix.upstream.cache import can_step_back, length
from vlmfix.upstream.names import KNOWN, name_of
from vlmfix.upstream.versions import missing

__all__ = ["LOST", "BaseStreamer", "GenerateDecoderOnlyOutput", "cache_of", "handed", "is_fresh", "padding", "unusual"]

HANDED = ("logits_processor", "stopping_criteria", "generation_config")
"""What ``generate`` hands to a loop beside the inputs and arguments of the model."""
LOST: Mapping[str, str] = {
    "streamer": "hand the streamer over as token_streamer",
    "assistant_model": "generate without an assistant",
    **dict.fromkeys(KNOWN["cache"], "leave use_cache on, which makes a dynamic cache, and hand none over"),
}
"""Arguments that ``generate`` keeps from such a loop, or of which the loop makes no use, and what to do instead."""
MODES = ("greedy_search", "sample")
"""Modes of generation, by name, in which one token at a time is chosen from the scores of its step."""
UNUSUAL = ("output_attentions", "output_hidden_states", "token_healing", "prefill_chunk_size")
"""Settings, off by default, of whose effect such a loop would have to know."""


def handed(kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Takes the logits processors, stopping criteria and generation configuration out of a loop's arguments.

    Raises:
        UpstreamError: ``generate`` did not hand them over.
    """
    if absent := [name for name in HANDED if name not in kwargs]:
        raise missing(f"generate hands no {' and '.join(absent)} to a loop of another's")
    processors, stops, config = (kwargs.pop(name) for name in HANDED)
    return processors, stops, config


def unusual(config: Any) -> list[str]:  # noqa: ANN401 (settings have no types)
    """What a configuration asks for beside single tokens chosen from scores: names of settings, or a mode."""
    mode = str(getattr(config.get_generation_mode(), "value", ""))
    return [*([] if mode in MODES else [mode]), *(name for name in UNUSUAL if getattr(config, name, None))]


def padding(config: Any) -> int:  # noqa: ANN401
    """What stands behind a row's end, as in transformers: the padding token, or else the first end token."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return int(ends[0] or 0) if config.pad_token_id is None else int(config.pad_token_id)


def cache_of(model: PreTrainedModel, kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a loop's arguments; None when there is none.

    Raises:
        UpstreamError: The model takes a cache under no known name.
    """
    cache: Cache | None = kwargs.get(name_of(type(model), "cache"))
    return cache


def is_fresh(cache: Cache | None) -> bool:
    """Whether a cache is an empty dynamic one."""
    return cache is not None and can_step_back(cache) and length(cache) == 0
