"""What a checkpoint would bring into ``generate`` unasked: the settings of its generation configuration.

``generate`` takes every setting that a call leaves open from ``model.generation_config``, also when it is handed
another configuration. Where vlmfix generates, the model therefore has a new configuration in its place, which knows
the special tokens and nothing else: whatever a checkpoint says, and whatever a later transformers adds, stays out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from vlmfix.upstream.versions import missing

KEPT = ("eos_token_id", "pad_token_id")
"""Settings that stay as the checkpoint has them: where an answer ends, and what fills a batch up."""
IDLE = ("bos_token_id", "transformers_version")
"""Entries that change no answer: the first token stands in the prompt."""


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Keeps the model's own generation settings, but for its special tokens, out of ``generate`` inside the block.

    The thread must have the model: others would see it without its settings.
    """
    own = _configuration(model)
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in KEPT})
    try:
        yield
    finally:
        model.generation_config = own


def ends(model: PreTrainedModel) -> list[int]:
    """The tokens that end an answer; none when the model names no end."""
    found: Any = _configuration(model).eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def set_aside(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of the model's generation configuration that would act if they were let, in values that JSON can hold.

    Entries that the installed transformers does not know are no settings of its ``generate``.
    """
    default: Any = getattr(GenerationConfig, "_get_default_generation_params", None)
    if default is None:
        raise missing("GenerationConfig does not say its defaults")
    idle = {**GenerationConfig().to_dict(), **default()}
    return {
        name: _plain(value)
        for name, value in sorted(vars(_configuration(model)).items())
        if value is not None
        and name in idle
        and value != idle[name]
        and name not in (*KEPT, *IDLE)
        and not name.startswith("_")  # the configuration's own bookkeeping
    }


def _configuration(model: PreTrainedModel) -> Any:  # noqa: ANN401 (its settings have no types)
    return model.generation_config


def _plain(value: Any) -> Any:  # noqa: ANN401 (any setting)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value
