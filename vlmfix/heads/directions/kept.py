"""Keeps directions in files, with the card of their measurement and the model's fingerprint.

Shape letters (``docs/notation.md``): L layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from vlmfix.errors import DataError, UsageError
from vlmfix.files import replacing
from vlmfix.heads.profile import (
    CARD_FIELDS,
    FINGERPRINT,
    KEY,
    VERSION,
    ProfileCard,
    check_model,
    damaged,
    read_file,
    refuse_foreign,
)
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.records import to_json

FORMAT = "directions"
"""What a file of directions says about itself; a key of ``profile.CALLED``."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Holds the directions that one method reads.

    Attributes:
        tensors: By name, in float32 or float16; which there are is the method's, see ``vlmfix/heads/directions/``.
        card: Where they come from; ``profiler`` is the method's name, ``pictures`` the number of those that were used.
        fingerprint: Some of the model's weights, (n,) float32; see ``profile.fingerprint``.
    """

    tensors: Mapping[str, Tensor]
    card: ProfileCard
    fingerprint: Tensor

    def check(self, vlm: Checkpoint) -> None:
        """Makes sure that they were measured on this model, as ``HeadProfile.check`` does.

        Raises:
            ProfileMismatchError: They were measured on another one.
        """
        check_model(vlm, self.card, self.fingerprint)

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """Returns one tensor in float32.

        Args:
            name: Its name.
            shape: The shape that it should have; None for any size of an axis.

        Raises:
            DataError: There is no such tensor, or it has another shape.
        """
        found = self.tensors.get(name)
        if (
            found is None
            or len(found.shape) != len(shape)
            or any(wanted not in (None, size) for wanted, size in zip(shape, found.shape, strict=True))
        ):
            size = "none" if found is None else f"one of {tuple(found.shape)}"
            raise DataError(
                f"the {self.card.profiler} directions should have a tensor {name} of {shape}, and have {size}",
                "measure the directions again",
            )
        return found.float()


def save_directions(directions: Mapping[str, Directions], path: str | Path) -> None:
    """Writes directions of one model to one file: tensors by safetensors, the cards as JSON in its metadata.

    Args:
        directions: By method.
        path: The file; replaced whole when it is there.

    Raises:
        UsageError: There are none, or they are of different models.
        DataError: The file cannot be written, or holds something else than directions.
    """
    path, every = Path(path), list(directions.values())
    if not every or not all(torch.equal(part.fingerprint, every[0].fingerprint) for part in every):
        raise UsageError(f"directions for {len(every)} methods cannot share a file", "give directions of one model")
    tensors = {FINGERPRINT: every[0].fingerprint}
    tensors |= {f"{name}/{key}": value for name, part in directions.items() for key, value in part.tensors.items()}
    cards = {name: asdict(part.card) for name, part in directions.items()}
    about = to_json({"format": FORMAT, "version": VERSION, "profiles": cards})
    content = save({key: value.contiguous() for key, value in tensors.items()}, metadata={KEY: about})
    refuse_foreign(path, FORMAT)
    with replacing(path) as file:
        file.write(content)


def load_directions(path: str | Path) -> dict[str, Directions]:
    """Reads all directions of a file, by method.

    Raises:
        DataError: The file cannot be read, holds no directions, or was damaged: a card or a tensor is not what it
            should be.
    """
    path = Path(path)
    about, tensors = read_file(path, FORMAT)
    cards, marks = about["profiles"], tensors.pop(FINGERPRINT)
    if strange := sorted({key.split("/")[0] for key in tensors} - cards.keys()):
        raise damaged(path, f"it holds tensors of {', '.join(strange)}, and no card of them")
    for name, card in cards.items():
        if card.keys() != CARD_FIELDS or card["profiler"] != name:
            raise damaged(path, f"the card of {name} is none of directions for {name}")
    if marks.dtype != torch.float32 or marks.dim() != 1:
        raise damaged(path, f"{FINGERPRINT} is no list of float32 numbers")
    for key, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16) or not bool(tensor.isfinite().all()):
            raise damaged(path, f"{key} holds other values than finite numbers")
    return {
        name: Directions(
            {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")},
            ProfileCard(**card),
            marks,
        )
        for name, card in cards.items()
    }
