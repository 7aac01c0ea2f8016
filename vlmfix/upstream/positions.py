"""Position ids of a prompt, and what a rotary embedding depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmfix.upstream.names import name_of
from vlmfix.upstream.versions import missing

OFFSETS = "rope_deltas"
"""Attribute of some models in which a prompt's positions leave what the next ones are counted from."""
GROWING = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on the length of the pass."""
STRETCHING = frozenset({"linear", "dynamic", "yarn"})
"""Rotary embeddings that take ``factor`` times as many tokens as the model was trained with."""


def prompt_positions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Position ids of a prompt, as ``generate`` makes them; what that leaves on the model is put back.

    Args:
        model: The model.
        inputs: The inputs of a ``generate`` call, with (B, T) token ids.

    Returns:
        (B, T), or (4, B, T) for rotary embeddings of several axes.

    Raises:
        UpstreamError: The model makes no positions in the known way.
    """
    base: Any = model.base_model
    prepare: Any = getattr(model, "_prepare_position_ids_for_generation", None)
    if prepare is None:
        raise missing(f"{type(model).__name__} has no _prepare_position_ids_for_generation")
    name = name_of(type(model), "ids")
    ids = inputs[name]
    former = getattr(base, OFFSETS, None)
    positions: Tensor = prepare(ids, {other: value for other, value in inputs.items() if other != name})
    if hasattr(base, OFFSETS):
        setattr(base, OFFSETS, former)
    return positions.expand(*positions.shape[:-2], ids.shape[0], -1)


def context(decoder: nn.Module) -> int | None:
    """Tokens that a text decoder takes, prompt and answer together; None when its configuration names no limit.

    ``max_position_embeddings`` says it, but where the one rotary embedding is stretched by a factor: that number may
    then be the one of training. Where kinds of layers have an embedding each (Gemma 3), it is the stretched one.
    """
    config: Any = decoder.config
    named: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if named is None or rope.get("rope_type") not in STRETCHING:
        return named
    return max(named, int((rope.get("factor") or 1.0) * (rope.get("original_max_position_embeddings") or named)))


def frequencies(decoder: nn.Module, attention: nn.Module) -> Tensor:
    """The angles, (D / 2,), by which a step to the next position turns the pairs of a key's dimensions.

    Dimension i and dimension i + D / 2 are a pair.

    Args:
        decoder: The text decoder.
        attention: One of its attention modules; some decoders have an embedding for each kind of layer.

    Raises:
        UpstreamError: The rotary embedding has no frequencies under a known name, or turns a part of the dimensions.
    """
    embedding = getattr(decoder, "rotary_emb", None)
    names = ("inv_freq", f"{getattr(attention, 'layer_type', None)}_inv_freq")
    found = next((getattr(embedding, name) for name in names if hasattr(embedding, name)), None)
    if not isinstance(found, Tensor) or 2 * len(found) != getattr(attention, "head_dim", None):
        raise missing(f"the rotary embedding of {type(decoder).__name__} has no frequencies of all dimensions")
    return found.float()


def grows(decoder: nn.Module) -> bool:
    """Whether a text decoder's rotary embedding depends on the length of the pass.

    Raises:
        UpstreamError: Its configuration does not say which kind of rotary embedding it has.
    """
    config: Any = decoder.config
    given = getattr(config, "rope_parameters", None)
    if given is None:
        raise missing(f"{type(config).__name__} has no rope_parameters")
    each = [given, *(value for value in given.values() if isinstance(value, dict))]  # some models have one per kind
    kinds = [part["rope_type"] for part in each if "rope_type" in part]
    if not kinds:
        raise missing(f"rope_parameters of {type(config).__name__} have no rope_type")
    return not GROWING.isdisjoint(kinds)
