"""The text decoder of models whose configuration holds several."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from vlmfix.testing.text import DECODER


def text_config(model_type: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The entries of a decoder with plain rotary embeddings, in a configuration that holds several."""
    return {
        **DECODER,
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
