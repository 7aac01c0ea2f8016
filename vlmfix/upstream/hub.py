"""Where a checkpoint's files lie: a local directory, or a snapshot of the Hub in the local cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

CONFIG = "config.json"


def settings(path: str, revision: str | None) -> dict[str, Any]:
    """What a checkpoint's ``config.json`` says; it is downloaded when it is not in the cache.

    Args:
        path: A Hub id or a local directory.
        revision: Branch, tag or commit on the Hub.
    """
    found, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    return found


def commit(path: str, revision: str | None) -> str | None:
    """The commit of the Hub's snapshot in the local cache; None for a local directory, or without a snapshot.

    Args:
        path: A Hub id or a local directory.
        revision: Branch, tag or commit on the Hub; None is its main branch.
    """
    if os.path.isdir(path):
        return None
    found = try_to_load_from_cache(path, CONFIG, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None  # snapshots/COMMIT/config.json


def folder(path: str, revision: str | None) -> Path | None:
    """The local folder of a checkpoint's files: the directory itself, or the Hub's snapshot in the local cache.

    Args:
        path: A Hub id or a local directory.
        revision: Commit of the snapshot; without one a Hub id has no folder, as the main branch moves.

    Returns:
        The folder, or None when it is gone.
    """
    if path and os.path.isdir(path):
        return Path(path)
    if not path or revision is None:
        return None
    found = try_to_load_from_cache(path, CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None
