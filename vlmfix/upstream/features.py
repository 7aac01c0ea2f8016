"""What a model's pictures became: computed, joined, picked and handed over in place of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmfix.upstream.names import KNOWN, PIXELS, name_of, parameters
from vlmfix.upstream.versions import missing

Features = BaseModelOutputWithPooling
"""What the pictures became: ``pooler_output``, and ``deepstack_features`` in some families."""


def encoded(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Features:
    """The features of all pictures of the inputs, as ``generate`` would compute them.

    Raises:
        UpstreamError: The model does not return them in the known form.
    """
    encoder: Any = _encoder(model)
    features: Features = encoder(**{name: inputs[name] for name in read_by_tower(model, inputs)}, return_dict=True)
    if getattr(features, "pooler_output", None) is None:
        raise missing(f"get_image_features of {type(model).__name__} returns no pooler_output")
    if _is_deep(model) and getattr(features, "deepstack_features", None) is None:
        raise missing(f"get_image_features of {type(model).__name__} returns no deepstack_features")
    return features


def read_by_tower(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[str]:
    """Names of the inputs that the vision tower reads.

    Raises:
        UpstreamError: It takes no pixels under a known name.
    """
    taken = parameters(_encoder(model))
    if taken.isdisjoint(KNOWN["pixels"]):
        raise missing(f"get_image_features of {type(model).__name__} takes no {' or '.join(KNOWN['pixels'])}")
    return [name for name in inputs if name in taken and name in PIXELS]


def handed_over(model: PreTrainedModel, features: Features) -> dict[str, dict[str, Features]]:
    """The argument that gives a model features in place of pixels.

    Raises:
        UpstreamError: The model takes features under no known name.
    """
    return {name_of(type(model), "features"): {"image": features}}


def sizes(features: Features) -> list[int]:
    """Image tokens of every part that the features consist of."""
    parts: Any = features.pooler_output
    return [len(part) for part in parts]


def joined(parts: Sequence[Any]) -> Features:
    """One encoder output with the pictures of all parts, in order; only what decoders read of it."""
    whole: Any = type(parts[0])(pooler_output=_chained([part.pooler_output for part in parts]))
    if getattr(parts[0], "deepstack_features", None) is not None:
        levels = zip(*(part.deepstack_features for part in parts), strict=True)
        whole.deepstack_features = [_chained(level) for level in levels]
    features: Features = whole
    return features


def picked(features: Any, order: Sequence[int]) -> Features:  # noqa: ANN401 (families add fields)
    """The parts of an encoder output in another order, repeated or left out; only what decoders read of it."""

    def pick(parts: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(parts, Tensor):
            return parts[torch.tensor(order, device=parts.device)]
        return [parts[number] for number in order]

    whole: Any = type(features)(pooler_output=pick(features.pooler_output))
    if getattr(features, "deepstack_features", None) is not None:
        whole.deepstack_features = [pick(level) for level in features.deepstack_features]
    chosen: Features = whole
    return chosen


def for_beams(model: PreTrainedModel, ids: Tensor, features: Features, beams: int) -> Features:
    """The features of every row, repeated for its beams.

    Args:
        model: The model.
        ids: (B, T) prompts that the features belong to.
        features: Their features.
        beams: Number of beams.

    Raises:
        UpstreamError: The model cannot repeat features.
    """
    expand = getattr(model, "_expand_multimodal_outputs", None)
    if expand is None:
        raise missing(f"{type(model).__name__} has no _expand_multimodal_outputs, by which beams get their features")
    wide: Features = expand(ids, {"image": features}, beams)["image"]
    return wide


def _encoder(model: PreTrainedModel) -> Any:  # noqa: ANN401 (a bound method)
    encoder = getattr(model.base_model, "get_image_features", None)
    if encoder is None:
        raise missing(f"{type(model.base_model).__name__} has no get_image_features")
    return encoder


def _is_deep(model: PreTrainedModel) -> bool:
    """Whether the text decoder takes features of several depths of the vision tower."""
    vision = getattr(model.config, "vision_config", None)
    return bool(getattr(vision, "deepstack_visual_indexes", None))


def _chained(parts: Sequence[Tensor | Sequence[Tensor]]) -> Tensor | list[Tensor]:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    return [feature for part in parts for feature in part]
