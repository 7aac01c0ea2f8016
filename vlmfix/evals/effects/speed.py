"""What a token costs under each decoder, against plain decoding of the same batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmfix.card import device_name
from vlmfix.decoders import Decoder, Greedy
from vlmfix.errors import VlmfixError
from vlmfix.evals.chair import PROTOCOLS
from vlmfix.evals.effects.clock import Clock
from vlmfix.evals.effects.runs import loaded
from vlmfix.generation import VLM
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings

REPEATS = 3


def time_tokens(
    file: Path, settings: Settings, pictures: Sequence[Path], arms: Mapping[str, Decoder], clock: Clock
) -> None:
    """Times captions of the same pictures, one batch, under every decoder; nothing else should run meanwhile.

    A time is that of the whole call, reading the prompt included, divided by the tokens of all answers; the median of
    several calls after one to warm up. Plain decoding is timed anew before every decoder, so that a machine that
    changes its pace does not favour one.

    Args:
        file: JSON that gets each decoder's milliseconds as it is timed; what another device left there is dropped.
        settings: Model and generation settings.
        pictures: The batch.
        arms: Decoders by name.
        clock: When to stop.

    Raises:
        OutOfTimeError: The time is over.
    """
    vlm = loaded(settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype)
    head = {"device": device_name(vlm.device), "rows": len(pictures), "repeats": REPEATS}
    before = read_json(file) if file.exists() else {}
    same = all(before.get(name) == value for name, value in head.items())
    found: dict[str, Any] = dict(before["arms"]) if same and before else {}
    shown = [Image.open(path).convert("RGB") for path in pictures]
    for name, decoder in arms.items():
        if found.get(name, {}).get("spec") == decoder.spec():
            continue
        clock.check()
        try:
            plain, own = (_per_token(vlm, shown, one, settings) for one in (Greedy(), decoder))
        except VlmfixError:  # its row in the table of captions has the reason
            continue
        found[name] = {"spec": decoder.spec(), "ms": own, "plain_ms": plain, "times": own / plain}
        replace_json(file, head | {"arms": found})


def _per_token(vlm: VLM, pictures: Sequence[Image.Image], decoder: Decoder, settings: Settings) -> float:
    """Milliseconds."""
    samples = []
    for _ in range(1 + REPEATS):
        vlm.memo.clear()  # a second call would find what refining decoders learned of the pictures in the first
        _wait(vlm)
        started = time.perf_counter()
        answers = vlm.generate(
            pictures, PROTOCOLS["chair-512"].prompt, decoder=decoder, max_new_tokens=settings.max_new_tokens
        )
        _wait(vlm)
        samples.append(1000 * (time.perf_counter() - started) / sum(answer.tokens for answer in answers))
    return statistics.median(samples[1:])


def _wait(vlm: VLM) -> None:
    if vlm.device.type == "cuda":
        torch.cuda.synchronize(vlm.device)
