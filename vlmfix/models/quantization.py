"""Weights of eight or four bits, quantized while they are loaded, through transformers' own configuration for it."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from vlmfix.errors import UsageError

QUANTIZED = ("int8", "int4")
PACKAGE = "bitsandbytes"


def check_quantize(name: str | None, place: torch.device) -> None:
    """Finds before anything is loaded what is wrong with a quantization.

    Args:
        name: ``int8``, ``int4`` or None for none.
        place: Device of the weights.

    Raises:
        UsageError: It is another, or the device or the package that it needs is not there.
    """
    if name is None:
        return
    if name not in QUANTIZED:
        raise UsageError(f"unknown quantization {name!r}", f"use {' or '.join(QUANTIZED)}, or leave it out")
    if place.type != "cuda":
        raise UsageError(f"quantize={name} needs a CUDA GPU, and the device is {place}", "leave it out, or use a GPU")
    if find_spec(PACKAGE) is None:
        raise UsageError(f"quantize={name} needs the package {PACKAGE}", "install it: pip install bitsandbytes")


def quantization(name: str, config: PreTrainedConfig, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """What transformers is told: LLM.int8, or four bits in the NF4 format.

    Args:
        name: ``int8`` or ``int4``.
        config: What config.json describes.
        dtype: Precision of what is not quantized, and of the computation with four bits; ``auto`` for the checkpoint's.

    Raises:
        UsageError: The checkpoint is quantized already.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"quantize={name}: the checkpoint is quantized already", "leave it out")
    if name == "int8":
        # It computes in float16 whatever the rest has, and says so at every matrix of every step.
        logging.getLogger(f"{PACKAGE}.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    own = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=own)


def waits_for_the_host(model: PreTrainedModel) -> bool:
    """Returns whether a model's matrices ask the host at every product, as LLM.int8 does when it looks for outliers.

    Its decoding steps cannot be recorded as CUDA graphs.
    """
    told = getattr(model.config, "quantization_config", None)
    return told is not None and bool(getattr(told, "load_in_8bit", False))
