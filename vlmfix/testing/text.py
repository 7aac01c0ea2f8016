"""Makes what every tiny model shares: a byte-level tokenizer, decoder sizes and random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
"""Decoder sizes that every text config takes."""

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def byte_tokenizer(
    special: Sequence[str] = (),
    *,
    named: Mapping[str, str] | None = None,
    pad: str = PAD,
    bos: str = BOS,
    eos: str = EOS,
) -> PreTrainedTokenizerFast:
    """Makes a fast tokenizer of 256 byte tokens, so that any text encodes, and special tokens.

    Args:
        special: Further special tokens, such as ``<|im_start|>``.
        named: Special tokens that become attributes, such as ``{"image_token": "<image>"}``.
        pad: Padding token, id 0.
        bos: First token, id 1; it is not added to the text.
        eos: Last token, id 2.
    """
    named = dict(named or {})
    tokens = list(dict.fromkeys([pad, bos, eos, *special, *named.values()]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(tokens + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=named,
        model_max_length=DECODER["max_position_embeddings"],
    )


def drawn(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    std: float = 0.15,
) -> Any:  # noqa: ANN401 (an instance of ``kind``)
    """Makes a model of a class with random weights: matrices with a wide normal, so that logits are far from flat.

    Args:
        kind: The model class.
        config: Its config.
        tokenizer: Its tokenizer, for the special ids of the generation config.
        seed: Seed of the weights; the process's own random state is left alone.
        std: Standard deviation of every weight with two or more dimensions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, std)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model.float().eval()
