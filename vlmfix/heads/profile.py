"""The profile of a model's heads: one number per head, its uncertainty, and where both come from.

Shape letters (``docs/notation.md``): L layers, H query heads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlmfix.errors import DataError, ProfileMismatchError, UsageError
from vlmfix.files import replacing
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.records import parse_json, to_json
from vlmfix.shapes import FLAG, NUMBER, OBJECT, SEED, SIZE, TEXT, fault, fields, mapping_of
from vlmfix.upstream.wrappers import present

KEY, FORMAT, VERSION = "vlmfix", "head-profiles", 1
"""The metadata entry of a file that holds the cards, and what it says about itself."""
CALLED = {FORMAT: "profile", "directions": "file of directions"}
"""What messages call a file that says so about itself."""
FINGERPRINT = "fingerprint"
HINT = "give a file that vlmfix profile wrote"
MATRICES, ENTRIES = 32, 8
"""Weight matrices, and entries of each, that a model is told apart by."""
TOLERANCE = 0.01
"""Relative difference that rounding to another dtype explains: bfloat16 rounds by 0.004 at most."""


@dataclass(frozen=True, kw_only=True)
class ProfileCard:
    """Where a profile comes from.

    Attributes:
        profiler: Its name.
        parameters: The profiler's parameters.
        model: What the model was loaded by.
        revision: Commit of the Hub snapshot, or None.
        model_type: ``config.model_type``.
        dtype: The weights' dtype during the profile.
        layers: L.
        heads: H.
        question: What was asked about every picture.
        pictures: Number of pictures that the scores come from.
        data: SHA-256 of the pixels of the pictures, in order; of all that were shown, also those without a score.
        seed: Seed of what the profiler draws.
        reliability: Rank correlation that a profile of as many other pictures would have with this one, estimated as
            in ``moments.Halves``; None with fewer than two pictures or when no head differs.
        stable: Whether the profile ended because its ranking was stable.
        versions: Versions of the packages that made it.
    """

    profiler: str
    parameters: Mapping[str, Any]
    model: str
    revision: str | None
    model_type: str
    dtype: str
    layers: int
    heads: int
    question: str
    pictures: int
    data: str
    seed: int
    reliability: float | None
    stable: bool
    versions: Mapping[str, str]


CARD_FIELDS = {known.name for known in fields_of(ProfileCard)}
CARD = fields(
    {
        "profiler": TEXT,
        "parameters": OBJECT,
        "model": TEXT,
        "revision": TEXT.or_null(),
        "model_type": TEXT,
        "dtype": TEXT,
        "layers": SIZE,
        "heads": SIZE,
        "question": TEXT,
        "pictures": SIZE,
        "data": TEXT,
        "seed": SEED,
        "reliability": NUMBER.or_null(),
        "stable": FLAG,
        "versions": mapping_of(TEXT),
    }
)
"""What a card in a file must say."""


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """What one profiler found out about a model's heads.

    Attributes:
        scores: (L, H) float32 mean over the pictures; higher is more of what the profiler measures.
        stderr: (L, H) float32 standard error of that mean; NaN with one picture.
        card: Where it comes from.
        fingerprint: Some of the model's weights, (n,) float32; see ``fingerprint``.
        details: What else the profiler found, by name.
    """

    scores: Tensor
    stderr: Tensor
    card: ProfileCard
    fingerprint: Tensor
    details: Mapping[str, Tensor] = field(default_factory=dict)

    def top(self, count: int) -> tuple[tuple[int, int], ...]:
        """The strongest heads, strongest first; of equal ones that of the lower layer, then of the lower number.

        Args:
            count: How many, from 0 to L * H.

        Returns:
            (layer, head) of each.

        Raises:
            UsageError: ``count`` is out of range.
        """
        if not 0 <= count <= self.scores.numel():
            raise UsageError(f"count={count} is not allowed", f"the profile has {self.scores.numel()} heads")
        order = self.scores.flatten().sort(descending=True, stable=True).indices[:count].tolist()
        heads = self.scores.shape[1]
        return tuple((place // heads, place % heads) for place in order)

    def check(self, vlm: Checkpoint) -> None:
        """Makes sure that the profile is of this model: its type, its numbers of layers and heads, and its weights.

        The dtype in which the model was loaded, its name and its place do not matter.

        Raises:
            ProfileMismatchError: It is of another one.
        """
        check_model(vlm, self.card, self.fingerprint)

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> HeadProfile:
        """Reads one profile of a file.

        Args:
            path: A file that ``save_profiles`` wrote.
            name: The profiler; None when the file holds one profile.

        Raises:
            DataError: The file cannot be read, is no profile, lacks that profile, or holds several and none is named.
        """
        profiles = load_profiles(path)
        if name is None and len(profiles) == 1:
            return next(iter(profiles.values()))
        if name not in profiles:
            held = ", ".join(profiles)
            raise DataError(f"{path} holds the profiles {held}, not {name or 'one alone'}", "name one of them")
        return profiles[name]

    def save(self, path: str | Path) -> None:
        """Writes the profile to a file of its own; see ``save_profiles``."""
        save_profiles({self.card.profiler: self}, path)


def check_model(vlm: Checkpoint, card: ProfileCard, marks: Tensor) -> None:
    """Makes sure that something was measured on this model; see ``HeadProfile.check``.

    Args:
        vlm: The model.
        card: Of what was measured.
        marks: The fingerprint that is kept with it.

    Raises:
        ProfileMismatchError: It was measured on another one.
    """
    config = vlm.model.config
    for what, mine, yours in (
        ("model type", card.model_type, config.model_type),
        ("layers", card.layers, vlm.layers),
        ("heads", card.heads, vlm.heads),
    ):
        if mine != yours:
            raise _mismatch(card, f"{what} {mine}", f"{yours}")
    now = fingerprint(vlm)
    if now.shape != marks.shape or not torch.allclose(now, marks, TOLERANCE, 1e-6):
        raise _mismatch(card, f"weights of {card.model}", f"other weights ({vlm.name})")


def save_profiles(profiles: Mapping[str, HeadProfile], path: str | Path) -> None:
    """Writes profiles of one model to one file: tensors by safetensors, the cards as JSON in its metadata.

    Args:
        profiles: By profiler.
        path: The file; replaced whole when it is there.

    Raises:
        UsageError: There is no profile, or they are of different models.
        DataError: The file cannot be written, or holds something else than profiles.
    """
    path, every = Path(path), list(profiles.values())
    if not every or not all(torch.equal(part.fingerprint, every[0].fingerprint) for part in every):
        raise UsageError(f"{len(every)} profiles cannot share a file", "give profiles of one model")
    tensors = {FINGERPRINT: every[0].fingerprint}
    for name, part in profiles.items():
        tensors |= {f"{name}/scores": part.scores, f"{name}/stderr": part.stderr}
        tensors |= {f"{name}/details/{key}": value for key, value in part.details.items()}
    cards = {name: asdict(part.card) for name, part in profiles.items()}
    about = to_json({"format": FORMAT, "version": VERSION, "profiles": cards})
    content = save({key: value.contiguous() for key, value in tensors.items()}, metadata={KEY: about})
    refuse_foreign(path)
    with replacing(path) as file:
        file.write(content)


def load_profiles(path: str | Path) -> dict[str, HeadProfile]:
    """Reads all profiles of a file, by profiler.

    Raises:
        DataError: The file cannot be read, is no profile, or was damaged: a card or a tensor is not what it should be.
    """
    path = Path(path)
    about, tensors = read_file(path)
    cards = about["profiles"]
    owners = {key.split("/")[0] for key in tensors} - {FINGERPRINT}
    if strange := sorted(owners - cards.keys()):
        raise damaged(path, f"it holds tensors of {', '.join(strange)}, and no card of them")
    found = {name: _profile(path, name, card, tensors) for name, card in cards.items()}
    if wrong := _wrong(tensors[FINGERPRINT], (tensors[FINGERPRINT].numel(),)):
        raise damaged(path, f"{FINGERPRINT} {wrong}")
    return found


def refuse_foreign(path: Path, form: str = FORMAT) -> None:
    """Refuses to write profiles, or directions, over a file that holds something else.

    Args:
        path: The file.
        form: A key of ``CALLED``.

    Raises:
        DataError: There is such a file, with content that is not of that form.
    """
    if os.path.exists(path) and (not os.path.isfile(path) or path.stat().st_size):
        try:
            about_of(path, form)
        except DataError as error:
            held = {FORMAT: "profiles"}.get(form, form)
            raise DataError(
                f"{path} is there and holds no {held}", "choose another file, or remove that one"
            ) from error


def read_file(path: Path, form: str = FORMAT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what a file says of itself, and its tensors; ``refuse_foreign`` has the arguments.

    Raises:
        DataError: The file cannot be read, is not of that form, or was damaged.
    """
    about = about_of(path, form)
    if wrong := fault(about, fields({"profiles": mapping_of(CARD)})):
        raise damaged(path, f"its card{wrong}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}", HINT) from error
    if not about["profiles"] or FINGERPRINT not in tensors:
        raise damaged(path, f"it holds no profile, or no {FINGERPRINT}")
    return about, tensors


def about_of(path: Path, form: str = FORMAT) -> dict[str, Any]:
    """Reads what a file of profiles, or of directions, says of itself; ``refuse_foreign`` has the arguments.

    Raises:
        DataError: The file cannot be read, or is not of that form.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"cannot read {path}: it is not a file", HINT)
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get(KEY, "{}"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", HINT) from error
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path} is no {CALLED[form]}: {error}", HINT) from error
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (form, VERSION):
        raise DataError(f"{path} is no {CALLED[form]} of version {VERSION}", HINT)
    return about


def _profile(path: Path, name: str, card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HeadProfile:
    if (strange := sorted(card.keys() - CARD_FIELDS)) or card["profiler"] != name:
        about = f"has {', '.join(strange)} besides" if strange else f"is of {card['profiler']}"
        raise damaged(path, f"the card of {name} {about}")
    shape = (card["layers"], card["heads"])
    needed, start = (f"{name}/scores", f"{name}/stderr"), f"{name}/details/"
    details = {key: tensor for key, tensor in tensors.items() if key.startswith(start)}
    for key in needed:
        if key not in tensors:
            raise damaged(path, f"it has no {key}")
    if strange := sorted({key for key in tensors if key.startswith(f"{name}/")} - details.keys() - {*needed}):
        raise damaged(path, f"it holds {', '.join(strange)}, which is nothing of a profile")
    scores, stderr = (tensors[key] for key in needed)
    unknown = card["pictures"] == 1  # one picture has no standard error
    if wrong := _wrong(scores, shape):
        raise damaged(path, f"{needed[0]} {wrong}")
    if wrong := _wrong(stderr.nan_to_num() if unknown and stderr.is_floating_point() else stderr, shape):
        raise damaged(path, f"{needed[1]} {wrong}")
    if bool((stderr < 0).any()):
        raise damaged(path, f"{needed[1]} holds numbers below 0")
    for key, tensor in details.items():
        if not tensor.is_floating_point() or bool(tensor.isinf().any()):
            raise damaged(path, f"{key} holds other values than numbers")
    return HeadProfile(
        scores=scores,
        stderr=stderr,
        card=ProfileCard(**card),
        fingerprint=tensors[FINGERPRINT],
        details={key.removeprefix(start): value for key, value in details.items()},
    )


def _wrong(tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that should hold finite float32 numbers in some shape."""
    if tensor.dtype != torch.float32:
        return f"is of {str(tensor.dtype).removeprefix('torch.')}, not float32"
    if tuple(tensor.shape) != shape or not tensor.numel():
        return f"has the shape {tuple(tensor.shape)}, not {shape}"
    return None if bool(tensor.isfinite().all()) else "holds values that are no numbers"


def damaged(path: Path, why: str) -> DataError:
    """Makes the error of a file that holds something else than it should."""
    return DataError(f"{path} is damaged: {why}", "measure the profile again")


def fingerprint(vlm: Checkpoint) -> Tensor:
    """Some of the text decoder's weights: the same model gives the same numbers, but for the rounding of its dtype.

    Returns:
        (n,) float32 on the CPU, at most ``MATRICES * ENTRIES`` entries of matrices spread over the decoder.
    """
    matrices = [
        (module, name)
        for module in vlm.family.decoder(vlm.model).modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1
    ]
    step = max(1, len(matrices) // MATRICES)
    # Without the shift, a decoder of 32 layers would show the same matrix of each, and no other could tell two apart.
    places = [number * len(matrices) // MATRICES + number % step for number in range(min(MATRICES, len(matrices)))]
    entries: list[Tensor] = []
    for module, name in (matrices[place] for place in places):
        with present(module, name) as matrix:
            entries.append(matrix.detach().flatten()[_places(matrix.numel(), matrix.device)].float().cpu())
    return torch.cat(entries)


def _places(size: int, device: torch.device) -> Tensor:
    return torch.arange(1, ENTRIES + 1, device=device) * size // (ENTRIES + 1)


def _mismatch(card: ProfileCard, mine: str, yours: str) -> ProfileMismatchError:
    return ProfileMismatchError(
        f"the {card.profiler} profile was measured on {mine}, this model has {yours}",
        "measure this model: vlmfix profile --model ... --profiler ...",
    )
