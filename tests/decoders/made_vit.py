"""Small ViTs with random weights, as timm writes them to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
"""4 x 4 patches."""


def made_vit(folder: Path, **changed: Any) -> Path:
    """Writes a ViT to a folder, drawn wide so that its attention is far from flat.

    Args:
        folder: Where to; made when it is not there.
        **changed: Other arguments of the model than ``SMALL``.
    """
    arguments = {**SMALL, **changed}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **arguments)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    side = arguments["img_size"]
    about = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "pretrained_cfg": {"input_size": [3, side, side], "fixed_input_size": True, "num_classes": 0},
        "model_args": arguments,
    }
    (folder / "config.json").write_text(json.dumps(about))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder
