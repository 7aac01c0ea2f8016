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
from vlmfix.evals.record import arm_folder
from vlmfix.generation import VLM
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings

REPEATS = 3


def time_arm(folder: Path, settings: Settings, pictures: Sequence[Path], name: str, decoder: Decoder) -> None:
    """Times captions of pictures, as one batch, under a decoder; nothing else should run on the device meanwhile.

    A time is that of the whole call, reading the prompt included, divided by the tokens of all answers; the median of
    several calls after one to warm up. Plain decoding is timed anew beside every decoder, so that a machine that
    changes its pace does not favour one.

    Args:
        folder: Gets a file with the milliseconds of the decoder; what another device left there is dropped.
        settings: Model and generation settings.
        pictures: The batch.
        name: What the decoder is called there; one that is there is not timed again.
        decoder: What is timed.
    """
    vlm = loaded(settings.model, revision=settings.revision, device=settings.device, dtype=settings.dtype)
    head = {"device": device_name(vlm.device), "rows": len(pictures), "repeats": REPEATS}
    known = head | {"name": name, "spec": decoder.spec()}
    file = folder / f"{arm_folder(name)}.json"
    before = read_json(file) if file.exists() else {}
    if before.items() >= known.items():
        return
    shown = [Image.open(path).convert("RGB") for path in pictures]
    plain, own = (_per_token(vlm, shown, one, settings) for one in (Greedy(), decoder))
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(file, known | {"ms": own, "plain_ms": plain, "times": own / plain})


def times(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads what was timed, by the decoders' names.

    Args:
        folder: Given to `time_arm`.
        names: Which, in this order; those that were not timed are left out.
    """
    files = {name: folder / f"{arm_folder(name)}.json" for name in names}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


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
