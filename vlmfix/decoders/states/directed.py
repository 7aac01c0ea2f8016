"""Reads directions for decoders, from a named file or from the one beside the model's weights.

A decoder that reads them declares

    profile: str | None = parameter(None, str, optional=True, file=True, help=...)

as those that read profiles of heads do; see ``vlmfix/decoders/attention/profiled.py``.
"""

from __future__ import annotations

import hashlib

from vlmfix.errors import DataError, VlmfixError
from vlmfix.heads.directions.kept import Directions, load_directions
from vlmfix.heads.reading import file_for, read_once
from vlmfix.models.checkpoint import DIRECTIONS, Checkpoint


def directions_for(vlm: Checkpoint, decoder: str, file: str | None) -> Directions:
    """Reads the directions of a decoder, measured on this model; it reads a file again only when the file changes.

    Args:
        vlm: The model.
        decoder: The decoder's name.
        file: A file that ``vlmfix profile --directions`` wrote; None takes ``directions.safetensors`` in the model's
            folder.

    Raises:
        DataError: There is no such file, or it cannot be read, or lacks directions for this decoder.
        ProfileMismatchError: They were measured on another model.
    """
    path, hint = file_for(vlm, file, DIRECTIONS), how_to_measure(vlm, decoder)
    if path is None:
        raise DataError(f"{decoder} has no directions of the model", hint)
    held = read_once(vlm, path, load_directions, failed=f"{decoder}: cannot read the directions", hint=hint)
    if decoder not in held:
        raise DataError(f"{decoder} reads its own directions, and {path} holds those for {', '.join(held)}", hint)
    return held[decoder]


def why_no_directions(vlm: Checkpoint, decoder: str, file: str | None) -> str | None:
    """Says why a decoder has no directions, in one sentence with the command that measures them; None when it has."""
    try:
        directions_for(vlm, decoder, file)
    except DataError as error:
        return f"{error.message}; {error.hint}" if error.hint else error.message
    except VlmfixError as error:
        return str(error)
    return None


def directions_facts(vlm: Checkpoint, decoder: str, file: str | None) -> dict[str, str]:
    """Returns a run card's facts of the directions that a decoder reads: the file's name, and a digest of the tensors.

    Raises:
        DataError: As ``directions_for``.
        ProfileMismatchError: As ``directions_for``.
    """
    found, path, digest = directions_for(vlm, decoder, file), file_for(vlm, file, DIRECTIONS), hashlib.sha256()
    for name, tensor in sorted(found.tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return {
        "directions": f"{decoder} in {'' if path is None else path.name}",
        "directions_digest": f"sha256:{digest.hexdigest()}",
    }


def how_to_measure(vlm: Checkpoint, decoder: str) -> str:
    """Returns the command that measures directions."""
    return (
        f"measure them: vlmfix profile --model {vlm.name or 'MODEL'} --directions {decoder} --images DIR "
        f"--instances FILE --captions FILE --out {DIRECTIONS}"
    )
