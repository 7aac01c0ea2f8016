"""What a result must say about itself: versions, machine, and which weights made it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import vlmfix
from vlmfix.decoders import Decoder, parse
from vlmfix.errors import DataError, PluginError, UsageError, VlmfixError
from vlmfix.generation import VLM, check_settings
from vlmfix.images import Found, digest_of
from vlmfix.models.checkpoint import DIRECTIONS, HEADS
from vlmfix.parsing import some
from vlmfix.plugins import plugins_of, refuse_other_plugins
from vlmfix.records import to_json
from vlmfix.settings import EMBEDDED, LOADED, Settings

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
SETTINGS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".bpe", ".codes")
"""Endings of files that configure a model, its processor and its tokenizer."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Endings of files that hold weights."""
TEMPLATES = "additional_chat_templates"
"""Folder of a model's chat templates beside the usual one."""


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


@dataclass(frozen=True)
class Known:
    """What a job says of its model once that is loaded, wherever it was.

    Attributes:
        commit: Commit of its Hub snapshot; None for a local directory.
        reading: How its files were read; see ``Checkpoint.reading``.
        dtype: Precision of its weights.
        facts: What the decoder depends on, see ``Decoder.facts``, and where the model's family comes from when it is
            not vlmfix's own.
        device: Where it is, in words.
    """

    commit: str | None
    reading: Mapping[str, Any]
    dtype: str
    facts: Mapping[str, str]
    device: str


def known(vlm: VLM, decoder: Decoder) -> Known:
    """Describes a model for a job with a decoder that can act on it."""
    return Known(
        commit=vlm.revision,
        reading=vlm.reading,
        dtype=str(vlm.model.dtype).removeprefix("torch."),
        facts=decoder.facts(vlm) | plugins_of([type(vlm.family)]),
        device=device_name(vlm.device),
    )


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


def decoder_again(where: str, spec: str, plugins: Mapping[str, str] | None) -> Decoder:
    """Reads the decoder of a run again, and makes sure that what is not vlmfix's own in it is as it was.

    Args:
        where: The run, for the message.
        spec: What its card says of the decoder.
        plugins: What its card says of plug-ins; None when it says nothing.

    Raises:
        PluginError: A plug-in is missing, or another.
        DataError: The specification is not understood.
    """
    try:
        decoder = parse(spec)
    except UsageError as error:
        if not plugins:
            raise DataError(f"{where}: {error.message}", error.hint) from error
        listed = ", ".join(f"{name} ({made_by})" for name, made_by in plugins.items())
        raise PluginError(
            f"{where} was made with {listed}: {error.message}", "install that distribution, or put the file back"
        ) from error
    refuse_other_plugins(where, plugins, decoder.plugins())
    return decoder


def refuse_other_pictures(
    folder: Path, pictures: Path | None, files: Sequence[Found], known: Mapping[str, str], *, hint: str
) -> None:
    """Makes sure that pictures are those that a folder of answers is about.

    Args:
        folder: The folder, for the message.
        pictures: The pictures' folder, for the message.
        files: Each picture as it is now, by its name in the run.
        known: Hex sha256 of the bytes that the run was shown, by these names; others are not looked at.
        hint: What to do about it.

    Raises:
        DataError: Some have another content, or cannot be read.
    """
    changed = [file.name for file in files if file.name in known and digest_of(file) != known[file.name]]
    if changed:
        raise DataError(
            f"{len(changed)} of {len(files)} pictures in {pictures} are not those that the answers in {folder} are "
            f"about: {some(changed)}",
            hint,
        )


def settings_again(
    where: str,
    card: Mapping[str, Any],
    decoding: Mapping[str, Any],
    *,
    model: str | None,
    device: str,
    decoder: str = "greedy",
    decoders: Iterable[Decoder] = (),
) -> Settings:
    """Gives the settings that make a run again, and makes sure that a directory still has the model's files.

    Args:
        where: The run, for messages.
        card: What the run says of its model: its name, ``settings.MODEL``, and what ``refuse_other_model`` reads.
        decoding: What it says of decoding, by the names of ``Settings``.
        model: Where the model's directory is now; None for where it was.
        device: Where to run.
        decoder: The run's decoder, if it has one.
        decoders: The decoders that the settings must suit.

    Raises:
        UsageError: ``model`` is given for a model of the Hub.
        DataError: The directory is not there, its files are not those of the run, or a value is not allowed.
    """
    loaded: dict[str, Any] = {name: card.get(name) for name in LOADED}
    named = _model_again(where, card, model)
    try:
        settings = Settings(
            model=named,
            revision=card["commit"] or card["revision"],
            device=device,
            dtype=card["dtype"],
            decoder=decoder,
            **loaded,
            **decoding,
        )
        for one in decoders:
            check_settings(one, settings)
        return settings
    except VlmfixError as error:
        raise DataError(f"{where}: {error.message}", f"restore the run's card; {error.hint}") from error


def _model_again(where: str, card: Mapping[str, Any], elsewhere: str | None) -> str:
    """What to load a run's model by."""
    if (commit := card["commit"]) is not None:
        if elsewhere is not None:
            raise UsageError(
                f"the run's model is {card['model']} at commit {commit} of the Hub, not a directory",
                "leave --model out; the model comes from the Hub or its cache",
            )
        return str(card["model"])
    name = str(card["model"] if elsewhere is None else elsewhere)
    if not os.path.isdir(EMBEDDED.get(name, name)):
        raise DataError(f"the model's directory {name} is not there", "give the directory that it is in with --model")
    try:
        refuse_other_model(name, card)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.hint) from error
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
        DataError: A local directory without weight files, or a file that cannot be read.
    """
    if commit is not None:
        return f"commit:{commit}"
    folder = EMBEDDED.get(model, Path(model))
    found = _files(folder)
    names = [name for name in found if name.endswith(".safetensors")] or [name for name in found if _is_weights(name)]
    if not names:
        raise DataError(f"no weight files in {folder}", "a model directory holds *.safetensors")
    whole = hashlib.sha256()
    for name in names:
        # a name with a line break must not pass for two files
        whole.update(f"{to_json(name)[1:-1]}\n{_file_digest(found[name]).removeprefix('sha256:')}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def model_files(model: str, commit: str | None) -> dict[str, str]:
    """What else than its name decides the answers of a model: the files that transformers reads, each with a digest.

    Args:
        model: What the model was loaded by.
        commit: Commit of its Hub snapshot; None for a local directory.

    Returns:
        Name below the directory -> ``sha256:`` and the digest of the content, sorted by name: configurations,
        tokenizer, chat templates and weights, profiles of heads left out. Nothing for a snapshot of the Hub, whose
        files the commit stands for.

    Raises:
        DataError: A file cannot be read.
    """
    if commit is not None:
        return {}
    return {name: _file_digest(path) for name, path in _files(EMBEDDED.get(model, Path(model))).items()}


def refuse_other_model(model: str, card: Mapping[str, Any]) -> None:
    """Makes sure that a model's files are those that a run was made with.

    Args:
        model: What the model is loaded by now.
        card: What the run says of its model: ``commit``, ``weights`` and, but for cards of earlier versions, ``files``.

    Raises:
        DataError: They are not; the message names the files that differ.
    """
    if card["commit"] is not None:
        return
    if (found := weights_digest(model, None)) != card["weights"]:
        raise DataError(
            f"the weights of {model} are not those of the run: {found}, then {card['weights']}",
            "put the former weights back",
        )
    before, now = card.get("files"), model_files(model, None)
    if before is not None and before != now:
        words = {name: "is new" if name not in before else "was changed" for name in now}
        changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
        listed = ", ".join(f"{name} {words.get(name, 'is gone')}" for name in sorted(changed))
        raise DataError(f"the files of {model} are not those of the run: {listed}", "put the former files back")


def refuse_older_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Makes sure that a folder which is to be gone on with says what decides its answers.

    Versions before 0.2 noted the weights alone, and let a checkpoint's own generation settings act.

    Args:
        folder: The folder, for the message.
        card: What it says of its model.

    Raises:
        UsageError: It does not say which files the model had.
    """
    if "files" not in card:
        raise UsageError(
            f"{folder} was begun by an earlier vlmfix, which noted no files of the model beside its weights and let "
            "the checkpoint's generation settings act",
            "choose another --out, or finish it with that version",
        )


def changed_reading(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, None]]:
    """Generation settings of a checkpoint that acted in a run of an earlier version, and do not in one of now.

    Args:
        before: What the card of the first run says of its model.
        now: What that of the second says.

    Returns:
        Name -> (value, None), in the form of ``changed_facts``.
    """
    if "checkpoint" in before:
        return {}
    return {f"generation.{name}": (str(value), None) for name, value in now["checkpoint"]["set_aside"].items()}


def reading_notes(reading: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know about how a checkpoint's files were read, in sentences; see ``Checkpoint.reading``."""
    if not reading:
        return []
    notes = []
    if aside := reading["set_aside"]:
        listed = ", ".join(f"{name} {value}" for name, value in aside.items())
        notes.append(f"Generation settings of the checkpoint that do not act: {listed}.")
    if added := reading["completed"]:
        listed = ", ".join(f"{name} {value}" for name, value in added.items())
        notes.append(f"What the checkpoint's files leave out was taken from its other files: {listed}.")
    if not reading["ends"]:
        notes.append("The checkpoint names no end token: every answer has the longest length that is allowed.")
    return notes


def _files(folder: Path) -> dict[str, Path]:
    """The files of a model's directory that transformers may read, by name below it, sorted.

    Weights may lie elsewhere: an index names its shards, and config.json may name the weights.
    """
    here = [path for path in folder.glob("*") if path.suffix in (*SETTINGS, *WEIGHTS) and path.name[0] != "."]
    names = {path.name for path in here} - {HEADS, DIRECTIONS}
    names |= {f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")}
    named = [_entry(folder / "config.json", "transformers_weights")]
    for name in [*names, *named]:
        if isinstance(name, str) and name.endswith(".index.json"):
            shards = _entry(folder / name, "weight_map")
            named += shards.values() if isinstance(shards, dict) else []
    names |= {name for name in named if isinstance(name, str)}
    return {name: folder / name for name in sorted(names) if os.path.isfile(folder / name)}


def _entry(path: Path, name: str) -> Any:  # noqa: ANN401 (any JSON value)
    """An entry of a JSON file; None when there is none, or the file is no JSON object, which loading will say."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found.get(name) if isinstance(found, dict) else None


def _is_weights(name: str) -> bool:
    return Path(name).suffix in WEIGHTS


def _file_digest(path: Path) -> str:
    """``sha256:`` and the digest of a file's content; a file that was changed is read again."""
    try:
        about = path.stat()
        return _digest(path, about.st_mtime_ns, about.st_size, about.st_ino)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "a model's files must be readable") from error


@lru_cache(maxsize=1024)
def _digest(path: Path, *_state: int) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
