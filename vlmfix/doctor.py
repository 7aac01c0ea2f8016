"""Which decoders work with a model, and what the machine has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmfix.card import device_name, machine, versions
from vlmfix.decoders import DECODERS
from vlmfix.generation import VLM, load


def diagnose(model: str, *, revision: str | None = None, loader: Callable[..., VLM] = load) -> dict[str, Any]:
    """Loads a model and asks every decoder whether it can act on it.

    Args:
        model: ``tiny``, a Hub id or a local directory.
        revision: Branch, tag or commit on the Hub.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.

    Returns:
        ``versions``; ``machine``; ``model`` (id, revision, family, layers, dtype, device);
        ``decoders``, which maps each name to None, or to the reason why it does not work.

    Raises:
        UnsupportedModelError: The model's family is not known.
        DataError: The model cannot be loaded.
    """
    vlm = loader(model, revision=revision)
    return {
        "versions": versions(),
        "machine": machine(),
        "model": {
            "id": model,
            "revision": vlm.revision,
            "family": vlm.family.title,
            "layers": vlm.layers,
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "device": device_name(vlm.device),
        },
        "decoders": {name: decoder().check(vlm) for name, decoder in DECODERS.items()},
    }
