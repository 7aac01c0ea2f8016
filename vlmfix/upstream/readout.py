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
    head: Any = model.get_output_embeddings()
    norm = getattr(decoder, "norm", None)
    if head is None or not isinstance(norm, nn.Module):
        raise missing(f"{type(model).__name__} has no output head, or {type(decoder).__name__} no norm")
    logits: Tensor = head(norm(states) if normed else states).float()
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()
