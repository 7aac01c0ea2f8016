"""What a model's output head makes of the residual stream at some depth."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmfix.upstream.versions import missing


def read_out(model: PreTrainedModel, decoder: nn.Module, states: Tensor, *, normed: bool) -> Tensor:
    """The logits of a residual stream, (..., V) float32.

    Args:
        model: The model.
        decoder: Its text decoder.
        states: (..., hidden size).
        normed: Whether the decoder's last norm comes first, as it does for the last layer.

    Raises:
        UpstreamError: The model has no output head, or its decoder no norm, under a known name.
    """
    norm = last_norm(decoder)
    return _capped(model, _head(model)(norm(states) if normed else states))


def of_tokens(model: PreTrainedModel, states: Tensor, tokens: Tensor) -> Tensor:
    """The logits of some tokens alone, (..., N) float32, of a residual stream as the output head takes it.

    Args:
        model: The model.
        states: (..., hidden size), behind the last norm where that is wanted.
        tokens: (N,) int64.

    Raises:
        UpstreamError: The model has no output head.
    """
    head = _head(model)
    if type(head) is not nn.Linear:  # one with adapters, for instance, whose weights alone do not make its output
        return _capped(model, head(states)[..., tokens])
    bias = None if head.bias is None else head.bias[tokens]
    return _capped(model, nn.functional.linear(states.to(head.weight.dtype), head.weight[tokens], bias))


def blended(model: PreTrainedModel, decoder: nn.Module, states: Tensor, *, behind: Tensor, share: float) -> Tensor:
    """The logits of a residual stream to which, behind the last norm, a share of another's is added, (..., V) float32.

    Args:
        model: The model.
        decoder: Its text decoder.
        states: (..., hidden size).
        behind: (..., hidden size), the other.
        share: The share.

    Raises:
        UpstreamError: The model has no output head, or its decoder no norm, under a known name.
    """
    norm = last_norm(decoder)
    return _capped(model, _head(model)(norm(states) + share * norm(behind)))


def with_attention(layer: nn.Module, stream: Tensor, output: Tensor) -> Tensor:
    """A layer's residual stream behind its attention.

    Args:
        layer: A layer of a text decoder.
        stream: (..., hidden size) that enters it.
        output: (..., hidden size), the output of its attention module.

    Raises:
        UpstreamError: The layer has not the norms that layers have.
    """
    added: Tensor = _part(layer, "post_attention_layernorm")(output) if _is_sandwiched(layer) else output
    return stream + added


def with_mlp(layer: nn.Module, stream: Tensor) -> Tensor:
    """The residual stream that leaves a layer.

    Args:
        layer: A layer of a text decoder.
        stream: (..., hidden size) behind its attention.

    Raises:
        UpstreamError: The layer has no MLP, or not the norms that layers have.
    """
    mlp = _part(layer, "mlp")
    if _is_sandwiched(layer):
        before, behind = (_part(layer, f"{place}_feedforward_layernorm") for place in ("pre", "post"))
        added: Tensor = behind(mlp(before(stream)))
    else:
        added = mlp(_part(layer, "post_attention_layernorm")(stream))
    return stream + added


def first_norm(layer: nn.Module) -> nn.Module:
    """The norm before a layer's attention.

    Raises:
        UpstreamError: The layer has none under a known name.
    """
    return _part(layer, "input_layernorm")


def _is_sandwiched(layer: nn.Module) -> bool:
    """Whether a layer has norms before and behind both of its parts, as Gemma's have."""
    return hasattr(layer, "pre_feedforward_layernorm")


def _part(layer: nn.Module, name: str) -> nn.Module:
    found = getattr(layer, name, None)
    if not isinstance(found, nn.Module):
        raise missing(f"{type(layer).__name__} has no {name}")
    return found


def last_norm(decoder: nn.Module) -> nn.Module:
    """The norm before the output head.

    Raises:
        UpstreamError: The text decoder has none under a known name.
    """
    norm = getattr(decoder, "norm", None)
    if not isinstance(norm, nn.Module):
        raise missing(f"{type(decoder).__name__} has no norm")
    return norm


def _head(model: PreTrainedModel) -> Any:  # noqa: ANN401 (a linear layer, or what stands for one)
    head: Any = model.get_output_embeddings()
    if head is None:
        raise missing(f"{type(model).__name__} has no output head")
    return head


def _capped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    logits = logits.float()
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()
