"""Reads head profiles for decoders, from a named file or from the one beside the model's weights.

A decoder that reads one declares

    profile: str | None = parameter(None, str, optional=True, help=...)

A file's name cannot hold a comma, a ``+`` before a letter or a line break, because specifications are written with
them; ``Range.check`` refuses such a name. A leading ``~`` is the home directory, and a relative name is looked for in
the working directory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlmfix.errors import DataError, VlmfixError
from vlmfix.heads.profile import HeadProfile, load_profiles
from vlmfix.heads.reading import file_for, read_once
from vlmfix.models.checkpoint import HEADS, Checkpoint


def profile_for(vlm: Checkpoint, decoder: str, profiler: str, file: str | None) -> HeadProfile | None:
    """Reads the profile for a decoder, measured on this model; it reads a file again only when the file changes.

    Args:
        vlm: The model.
        decoder: The decoder's name, for messages.
        profiler: Profiler that measured the heads, such as ``vhd``.
        file: A file that ``vlmfix profile`` wrote; None takes ``heads.safetensors`` in the model's folder.

    Returns:
        The profile; None when no file is named and the model's folder has none, or none of that profiler.

    Raises:
        DataError: The file cannot be read or is no profile, or the one that was named lacks that profiler.
        ProfileMismatchError: It was measured on another model.
    """
    path = profile_file(vlm, file)
    if path is None:
        return None
    hint = how_to_measure(vlm, profiler)
    held = read_once(vlm, path, load_profiles, failed=f"{decoder}: cannot read the profile", hint=hint)
    if file is not None and profiler not in held:
        raise DataError(f"{decoder} reads the profile {profiler}, and {path} holds {', '.join(held)}", hint)
    return held.get(profiler)


def why_no_profile(vlm: Checkpoint, decoder: str, profiler: str, file: str | None) -> str | None:
    """Says why a decoder has no profile, in one sentence with the command that makes one; None when it has one.

    Args:
        vlm: The model.
        decoder: The decoder's name.
        profiler: Profiler that must have measured the heads.
        file: The file that was named, or None.
    """
    try:
        if profile_for(vlm, decoder, profiler, file) is not None:
            return None
    except VlmfixError as error:
        return str(error)
    return f"it has no {profiler} profile of the model; {how_to_measure(vlm, profiler)}, and give profile={HEADS}"


def profile_facts(vlm: Checkpoint, decoder: str, profiler: str, file: str | None) -> dict[str, str]:
    """Returns a run card's facts of the profile that a decoder reads; empty when it reads none.

    The digest is SHA-256 of the scores alone, (L, H) float32 in order of layers: other content of a file, such as an
    added profile, changes no answer.

    Raises:
        DataError: As ``profile_for``.
        ProfileMismatchError: As ``profile_for``.
    """
    path, profile = profile_file(vlm, file), profile_for(vlm, decoder, profiler, file)
    if path is None or profile is None:
        return {}
    digest = hashlib.sha256(profile.scores.float().contiguous().numpy().tobytes()).hexdigest()
    return {"profile": f"{profiler} in {path.name}", "profile_digest": f"sha256:{digest}"}


def profile_file(vlm: Checkpoint, file: str | None) -> Path | None:
    """Returns the file to read: the one that is named, or ``heads.safetensors`` in the model's folder if it exists."""
    return file_for(vlm, file, HEADS)


def how_to_measure(vlm: Checkpoint, profiler: str) -> str:
    """Returns the command that makes a profile."""
    model = vlm.name or "MODEL"
    return f"measure one: vlmfix profile --model {model} --profiler {profiler} --images DIR --out {HEADS}"
