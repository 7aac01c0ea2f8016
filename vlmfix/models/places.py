"""Reads where a model is to be loaded and in which precision, by the names of the command line."""

from __future__ import annotations

import torch

from vlmfix.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_named(name: str) -> torch.device:
    """Reads a device by its name; ``auto`` is the GPU when there is one.

    Raises:
        UsageError: torch knows or sees no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} asked for, but torch sees no GPU", "use --device cpu")
    return place


def check_device_map(name: str | None, device: str) -> None:
    """Checks a device map beside the device that was asked for.

    Raises:
        UsageError: There is no such map, or both are given.
    """
    if name not in (None, "auto"):
        raise UsageError(f"unknown device_map {name!r}", "use auto, or leave it out")
    if name is not None and device != "auto":
        raise UsageError(f"device_map={name} and device={device} are both given", "give one of them")


def dtype_named(name: str, device: torch.device) -> torch.dtype | str:
    """Reads a precision by its name; ``auto`` is float32 on the CPU, and stays ``auto``, what the files say, elsewhere.

    Raises:
        UsageError: There is no such precision.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]
