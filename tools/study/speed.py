"""What a token costs under each decoder, against plain decoding of the same batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tools.study.runs import loaded
from vlmfix.card import device_name
from vlmfix.decoders import Decoder, Greedy
from vlmfix.evals.benchmarks.chair import PROTOCOLS
from vlmfix.generation import VLM
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings

REPEATS = 3


def time_arm(file: Path, settings: Settings, pictures: Sequence[Path], name: str, decoder: Decoder) -> None:
    """Times captions of pictures, as one batch, under a decoder; nothing else should run meanwhile.

    A time is that of the whole call, reading the prompt included, divided by the tokens of all answers; the median of
    several calls after one to warm up. Plain decoding is timed anew beside every decoder, so that a machine that
    changes its pace does not favour one.

    Args:
        file: JSON with the milliseconds of every decoder; what another device left there is dropped.
        settings: Model and generation settings.
        pictures: The batch.
        name: What the decoder is called there; one that is there is not timed again.
        decoder: What is timed.
    """
    vlm = loaded(settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype)
    head = {"device": device_name(vlm.device), "rows": len(pictures), "repeats": REPEATS}
    before = read_json(file) if file.exists() else {}
    found: dict[str, Any] = before["arms"] if {**before, "arms": None} == {**head, "arms": None} else {}
    if found.get(name, {}).get("spec") == decoder.spec():
        return
    shown = [Image.open(path).convert("RGB") for path in pictures]
    plain, own = (_per_token(vlm, shown, one, settings) for one in (Greedy(), decoder))
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
