"""Attention functions in transformers' registries: registering one, switching to it and back, plain SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmfix.errors import UnsupportedAttentionError
from vlmfix.upstream.versions import missing

SETTING = "_attn_implementation_internal"
"""Attribute of a configuration that names the attention function; the public setter would rebuild every part's."""


def register(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Enters an attention function into transformers' tables, together with SDPA's mask rule.

    Without a mask rule transformers passes no mask, and padding would be ignored.
    """
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


def unregister(name: str) -> None:
    """Takes an attention function out of transformers' tables again."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


@contextmanager
def switched(owners: Sequence[nn.Module], name: str) -> Iterator[None]:
    """Lets modules compute attention by a registered function inside the block.

    Args:
        owners: Modules whose configurations are changed; each configuration is put back on leaving, also after an
            exception.
        name: Name of the function.

    Raises:
        UpstreamError: The configurations do not say in the known way which function is used.
    """
    configs: dict[int, Any] = {id(owner.config): owner.config for owner in owners}
    if not all(hasattr(config, SETTING) for config in configs.values()):
        raise missing(f"configurations have no {SETTING}, by which vlmfix switches the attention function")
    former = [(config, getattr(config, SETTING)) for config in configs.values()]
    try:
        for config in configs.values():
            setattr(config, SETTING, name)
        if any(config._attn_implementation != name for config in configs.values()):
            raise missing(f"setting {SETTING} does not change the attention function")
        yield
    finally:
        for config, before in former:
            setattr(config, SETTING, before)


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> Tensor:
    """Plain attention as transformers computes it.

    Args:
        module: The attention module.
        query: (B, H, Q, D).
        key: (B, G, K, D).
        value: (B, G, K, D).
        mask: (B, 1, Q, K) bool, or None for plain causality.
        **options: ``scaling``, ``dropout``, what transformers called the attention function with, and
            ``position_bias``, (B, H, Q, K) or what broadcasts to it, which is added to the scores.

    Returns:
        (B, Q, H, D).
    """
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output


def check_mathematics(module: nn.Module) -> None:
    """Refuses an attention module that computes something else than softmax attention with causal masks.

    Raises:
        UnsupportedAttentionError: It caps its scores, has learned sinks, or is not causal.
    """
    name = type(module).__name__
    if getattr(module, "attn_logit_softcapping", None) is not None:
        raise UnsupportedAttentionError(f"{name} caps its scores", "edits assume plain softmax attention")
    if getattr(module, "sinks", None) is not None:
        raise UnsupportedAttentionError(f"{name} has learned sinks", "edits assume plain softmax attention")
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedAttentionError(f"{name} is not causal", "edits act on a text decoder's self-attention")


def output_projection(module: nn.Module) -> nn.Linear:
    """The projection of an attention module's head outputs, one behind the other, onto the residual stream.

    Raises:
        UpstreamError: The module has none under a known name.
    """
    found = getattr(module, "o_proj", None)
    if not isinstance(found, nn.Linear):
        raise missing(f"{type(module).__name__} has no o_proj")
    return found


def down_projection(layer: nn.Module) -> nn.Linear:
    """The last weights of a decoder layer's MLP, which write onto the residual stream.

    Raises:
        UpstreamError: The layer has none under a known name.
    """
    found = getattr(getattr(layer, "mlp", None), "down_proj", None)
    if not isinstance(found, nn.Linear):
        raise missing(f"the MLP of {type(layer).__name__} has no down_proj")
    return found


def window(module: nn.Module) -> int | None:
    """Number of keys that an attention module looks back, itself included; None without a limit.

    A module says it itself, or, where all layers have one (Mistral), its configuration does.
    """
    owner = module if hasattr(module, "sliding_window") else getattr(module, "config", None)
    found: int | None = getattr(owner, "sliding_window", None)
    return found
