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
