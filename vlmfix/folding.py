"""Folds what a decoder does to every row alike into a model's weights, and writes the model as a plain checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfix.card import versions, weights_digest
from vlmfix.decoders import Decoder
from vlmfix.errors import DataError, UsageError
from vlmfix.files import cannot_write
from vlmfix.generation import VLM
from vlmfix.records import replace_json
from vlmfix.upstream.attention import down_projection, output_projection

CARD = "vlmfix.json"
"""File in the checkpoint's folder that says what was folded into it."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
ASKED = ("Describe this picture.", "What is in the picture?")
TOKENS = 24


@dataclass(frozen=True)
class Folded:
    """Says what was written.

    Attributes:
        out: The checkpoint's folder.
        heads: (layer, head, factor) of each head whose output is multiplied.
        removed: Layer number -> how many directions its MLP's output has lost.
        answers: How many answers of the folded model were compared with the decoder's.
    """

    out: Path
    heads: Sequence[tuple[int, int, float]]
    removed: Mapping[int, int]
    answers: int


def export(vlm: VLM, decoder: Decoder, out: Path) -> Folded:
    """Writes a checkpoint that gives without vlmfix the tokens that the model gives with a decoder.

    The model's weights are changed in place. Before anything is written, its answers to made-up questions about made-up
    pictures are compared with the decoder's, token by token.

    Args:
        vlm: The model, in the precision that the checkpoint is to have.
        decoder: The decoder.
        out: Folder of the checkpoint; it must not be there, or be empty.

    Raises:
        IncompatibleDecodersError: The decoder does something else than to multiply outputs of heads by constants, or
            to take directions out of outputs of MLPs.
        UsageError: The folder holds something, or the model's weights are quantized.
        DataError: The folded model answers otherwise than the decoder, or the disk refuses.
        UpstreamError: The model's attention has no output projection, or its MLP none, under a known name.
    """
    gains, removed = decoder.folded(vlm), decoder.removed(vlm)
    if os.path.exists(out) and (not os.path.isdir(out) or any(out.iterdir())):
        raise UsageError(f"{out} is there already", "name a new folder; nothing is overwritten")
    if getattr(vlm.model.config, "quantization_config", None) is not None:
        raise UsageError(
            f"the weights of {vlm.name} are quantized, and cannot be multiplied exactly", "load them whole"
        )
    counts = {layer: sum(len(vectors) for vectors in parts) for layer, parts in removed.items()}
    card = _card(vlm, decoder, gains, counts)
    expected = _answers(vlm, decoder)
    fold(vlm, gains)
    remove(vlm, removed)
    if _answers(vlm, "greedy") != expected:
        raise DataError(
            f"with {decoder.name} folded in, {vlm.name} gives other tokens", "report this as a fault of vlmfix"
        )
    _write(vlm, card, out)
    heads = [(layer, head, gain) for layer, row in gains.items() for head, gain in enumerate(row.tolist()) if gain != 1]
    return Folded(out, heads, counts, len(expected))


@torch.no_grad()
def fold(vlm: VLM, gains: Mapping[int, Tensor]) -> None:
    """Multiplies, in place, the columns of output projections that read a head by the head's factor.

    Args:
        vlm: The model.
        gains: Layer number -> (H,) factors.
    """
    modules = vlm.family.attention_modules(vlm.model)
    for layer, gain in gains.items():
        weight = output_projection(modules[layer]).weight  # (hidden size, H * D)
        width = weight.shape[1] // len(gain)
        weight.mul_(gain.to(weight).repeat_interleave(width))


@torch.no_grad()
def remove(vlm: VLM, directions: Mapping[int, Sequence[Tensor]]) -> None:
    """Takes directions, in place, out of what MLPs write onto the residual stream.

    Args:
        vlm: The model.
        directions: Layer number -> (k, hidden size) of orthogonal unit vectors, one tensor after the other.
    """
    layers = vlm.family.layers(vlm.model)
    for layer, parts in directions.items():
        module = down_projection(layers[layer])
        for weight in (module.weight, *(() if module.bias is None else (module.bias,))):  # (hidden size, ...)
            exact = weight.double()
            for vectors in (part.to(exact) for part in parts):
                exact = exact - vectors.T @ (vectors @ exact)
            weight.copy_(exact)


def _answers(vlm: VLM, decoder: Decoder | str) -> list[tuple[int, ...]]:
    dice = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (48, 64, 3), generator=dice, dtype=torch.uint8).numpy()
    pictures = [Image.fromarray(noise), Image.new("RGB", (64, 48), "teal")]
    vlm.memo.clear()
    answers = vlm.generate(pictures, list(ASKED), decoder=decoder, max_new_tokens=TOKENS)
    return [answer.ids for answer in answers]


def _card(vlm: VLM, decoder: Decoder, gains: Mapping[int, Tensor], removed: Mapping[int, int]) -> dict[str, Any]:
    weights = None if vlm.folder is None else weights_digest(str(vlm.folder), None)
    return {
        "folded": decoder.spec(),
        "facts": decoder.facts(vlm),
        "model": {"id": vlm.name, "commit": vlm.revision, "weights": weights},
        "head_factors": {str(layer): gain.tolist() for layer, gain in gains.items()},
        "mlp_directions_removed": {str(layer): count for layer, count in removed.items()},
        "without_picture": "a question without a picture is changed too; the decoder leaves such rows alone",
        "versions": versions(),
    }


def _write(vlm: VLM, card: Mapping[str, Any], out: Path) -> None:
    """Writes the checkpoint beside its place, and moves it there when all of it is on the disk."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            whole = Path(scratch) / "whole"
            vlm.model.save_pretrained(whole)
            vlm.processor.save_pretrained(whole)
            for pattern in LICENCES:
                for path in vlm.folder.glob(pattern) if vlm.folder is not None else ():
                    shutil.copy(path, whole / path.name)
            replace_json(whole / CARD, card)
            whole.replace(out)
    except OSError as error:
        raise cannot_write(out, error) from error
