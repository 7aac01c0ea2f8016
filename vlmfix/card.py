"""What a result must say about itself: versions, machine, and which weights made it."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import vlmfix
from vlmfix.decoders.parameters import Value, written
from vlmfix.errors import DataError, UsageError
from vlmfix.models.checkpoint import EMBEDDED, HEADS

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "safetensors",
    "pillow",
    "opencv-python",
    "numpy",
)
"""Packages whose version can change an answer."""


def versions() -> dict[str, str | None]:
    """Versions of vlmfix, Python and the packages that the answers depend on.

    None for a package that was installed under another name, as opencv-python-headless is.
    """
    mine = {"vlmfix": vlmfix.__version__, "python": platform.python_version()}
    return mine | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the machine has: system, cores, memory and GPUs; memory in bytes."""
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory": memory.total,
        "memory_available": memory.available,
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
    }


def _gpu(number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    return {"device": f"cuda:{number}", "name": properties.name, "memory": properties.total_memory}


def device_name(device: torch.device) -> str:
    """A device in words: its torch name, and the product's name for a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by torch on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plain(value: Value) -> bool | int | float | str | None:
    """A decoder's parameter as JSON holds it; a layer set or a tuple is written as on the command line."""
    return value if value is None or isinstance(value, bool | int | float | str) else written(value)


def changed_facts(
    before: Mapping[str, str] | None, now: Mapping[str, str] | None
) -> dict[str, tuple[str | None, str | None]]:
    """What decoders depended on in one run and not in another; see ``Decoder.facts``.

    Args:
        before: Facts of the first run; None when it kept none.
        now: Facts of the second, likewise.

    Returns:
        Name -> (before, now) of those that differ; None for one that is missing. Nothing when a run kept none.
    """
    if before is None or now is None:
        return {}
    both = ((name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now]))
    return {name: (first, second) for name, first, second in both if first != second}


def changed_pictures(files: Mapping[str, Path], known: Mapping[str, str]) -> list[str]:
    """Finds the pictures whose files are not those that a run was shown.

    Args:
        files: Where each picture is now, by its name in the run.
        known: Hex sha256 of the files that the run was shown, by the same names; others are not looked at.

    Returns:
        Names of the pictures with another content, or that cannot be read, in the order of ``files``.
    """
    return [name for name, path in files.items() if name in known and _file_digest(path) != known[name]]


def _file_digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def model_again(model: str, commit: str | None, weights: str, elsewhere: str | None = None) -> str:
    """Finds what to load a run's model by, and makes sure that a directory still has the run's weights.

    Args:
        model: What the run loaded it by.
        commit: Commit of its Hub snapshot; None for a local directory.
        weights: Digest of the run's weights.
        elsewhere: Where the directory is now; None for where it was.

    Raises:
        UsageError: ``elsewhere`` is given for a model of the Hub.
        DataError: The directory is not there, or has other weights.
    """
    if commit is not None:
        if elsewhere is not None:
            raise UsageError(
                f"the run's model is {model} at commit {commit} of the Hub, not a directory",
                "leave --model out; the model comes from the Hub or its cache",
            )
        return model
    name = model if elsewhere is None else elsewhere
    if not EMBEDDED.get(name, Path(name)).is_dir():
        raise DataError(f"the model's directory {name} is not there", "give the directory that it is in with --model")
    if (found := weights_digest(name, None)) != weights:
        raise DataError(
            f"the weights of {name} are not those of the run: {found}, then {weights}", "put the former weights back"
        )
    return name


def weights_digest(model: str, commit: str | None) -> str:
    """Which weights a model name stands for, so that two runs can be told apart.

    Args:
        model: What the model was loaded by.
        commit: Commit of its Hub snapshot; None for a local directory.

    Returns:
        ``commit:`` and the Hub's commit, or ``sha256:`` and the digest of the directory's weight files, names
        included; profiles of heads are no weights.

    Raises:
        DataError: A local directory without weight files.
    """
    if commit is not None:
        return f"commit:{commit}"
    folder = EMBEDDED.get(model, Path(model))
    files = sorted(set(folder.glob("*.safetensors")) - {folder / HEADS}) or sorted(folder.glob("*.bin"))
    if not files:
        raise DataError(f"no weight files in {folder}", "a model directory holds *.safetensors")
    return _digest(tuple((path, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int], ...]) -> str:
    """Digest of files; the time of change is part of the key, so that a changed file is read again."""
    whole = hashlib.sha256()
    for path, _ in files:
        with path.open("rb") as file:
            whole.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"
