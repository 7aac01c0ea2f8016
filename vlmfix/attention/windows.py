"""Refuses edits and readings where a sliding window would drop the first keys.

An edit tells keys by their place in the prompt, so it must see all of them: it acts only until the window is full.
"""

from __future__ import annotations

from collections.abc import Iterable

from vlmfix.errors import WindowError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.attention import window


def narrowest(vlm: Checkpoint, layers: Iterable[int]) -> tuple[int, int] | None:
    """Finds the narrowest sliding window among some layers; returns the layer and the window, None without one."""
    modules = vlm.family.attention_modules(vlm.model)
    windows = [(size, layer) for layer in sorted(layers) if (size := window(modules[layer])) is not None]
    size, layer = min(windows, default=(0, -1))
    return None if layer < 0 else (layer, size)


def check_windows(vlm: Checkpoint, layers: Iterable[int], prompt: int, answer: int = 1) -> None:
    """Refuses a prompt and an answer that together would fill a sliding window.

    Args:
        vlm: The model.
        layers: Numbers of the layers that are edited or read.
        prompt: T, with padding, which takes room in the window too.
        answer: Tokens to generate; no pass follows the last of them.

    Raises:
        WindowError: They do not fit; it says how many do.
    """
    found = narrowest(vlm, layers)
    if found is None or prompt + answer - 1 < found[1]:
        return
    layer, size = found
    fitting = size - prompt
    wanted = f"{prompt} prompt tokens and {answer} new ones" if fitting > 0 else f"{prompt} prompt tokens"
    allowed = f"{fitting} new tokens fit" if fitting > 0 else f"at most {size - 1} fit"
    raise WindowError(
        f"{wanted} fill the sliding window of {size} in layer {layer}, which then forgets the first: {allowed}",
        "lower max_new_tokens, shorten the prompt, or edit only layers without a window (layers=...)",
    )
