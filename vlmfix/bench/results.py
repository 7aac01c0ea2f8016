"""The figures of a measurement, from its seconds and bytes to what the table shows and the JSON file holds."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmfix.bench.measure import COPIED, Measured, Task, Timed, step_bytes, weight_bytes
from vlmfix.bench.shapes import QUESTION
from vlmfix.card import device_name, machine, versions
from vlmfix.errors import DataError, UsageError
from vlmfix.records import read_json

KIND = "vlmfix bench"
"""What a file of these results says that it is."""
LATE = "the time was over before the first round"


def about(task: Task, name: str, rounds: int, command: str) -> dict[str, Any]:
    """What does not change from round to round: what was asked of what, and on what.

    Args:
        task: What is asked.
        name: What the model was asked for by.
        rounds: Rounds that were asked for.
        command: The command line.
    """
    vlm, picture = task.vlm, task.pictures[0]
    return {
        "kind": KIND,
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "model": {
            "name": name,
            "weights": "its own" if vlm.model.config.name_or_path else "random",
            "family": vlm.family.title,
            "layers": vlm.layers,
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "device": device_name(vlm.device),
            "weight_bytes": weight_bytes(vlm),
            "step_bytes": step_bytes(vlm),
        },
        "question": QUESTION,
        "picture": [picture.width, picture.height],
        "prompt_tokens": vlm.encode([QUESTION], [[picture]]).length,
        "tokens": task.tokens,
        "short_tokens": task.short,
        "rounds": rounds,
        "copied_bytes": COPIED[vlm.device.type],
    }


def results(facts: dict[str, Any], found: Measured) -> dict[str, Any]:
    """What is known so far, in JSON values.

    Args:
        facts: See ``about``.
        found: What was measured; each way has its plain arm.

    Returns:
        The facts; ``bandwidth``, bytes per second in the median and for each round; ``weights_ms``, what reading a
        step's weights once takes at that; ``finished``; and ``lines``, one for each arm and number of rows. Of a line,
        ``first_ms``, ``step_ms``, ``tokens_per_second``, ``weights_share``, ``memory`` and ``memory_above_weights``
        (bytes) are the arm's; ``first_ratio``, ``step_ratio`` and ``memory_above_plain`` compare it with plain decoding
        by the same way and as many rows; ``warm_up_s`` stands in the lines with the fewest rows. ``skip_rate`` is the
        share of tokens that a decoder with ``when=uncertain`` left to the clean row. ``reason`` says why there are no
        figures, and is None where there are.
    """
    rate = statistics.median(found.bandwidth)
    weights_ms = 1000 * facts["model"]["step_bytes"] / rate
    lines = [_line(facts, one, weights_ms) for one in found.timed]
    plain = {(line["way"], line["rows"]): line for one, line in zip(found.timed, lines, strict=True) if one.arm.plain}
    for line in lines:
        beside = plain[line["way"], line["rows"]]
        line["first_ratio"] = _ratio(line["first_ms"], beside["first_ms"])
        line["step_ratio"] = _ratio(line["step_ms"], beside["step_ms"])
        both = None not in (line["memory"], beside["memory"])
        line["memory_above_plain"] = line["memory"] - beside["memory"] if both else None
    speed = {"median": rate, "samples": list(found.bandwidth)}
    return facts | {"bandwidth": speed, "weights_ms": weights_ms, "finished": found.finished, "lines": lines}


def _line(facts: dict[str, Any], one: Timed, weights_ms: float) -> dict[str, Any]:
    """The figures of an arm with a number of rows that need no other line."""
    line: dict[str, Any] = {
        "arm": one.arm.name,
        "decoder": one.arm.decoder,
        "way": one.arm.way,
        "rows": one.rows,
        "rounds": len(one.long),
        "reason": one.error or (None if one.long else LATE),
        "skip_rate": one.skips.rate,
        "samples": {"cold_s": one.cold, "first_s": one.first, "short_s": one.short, "long_s": one.long},
    }
    names = ("first_ms", "step_ms", "tokens_per_second", "weights_share", "memory", "memory_above_weights", "warm_up_s")
    if line["reason"] is not None or one.memory is None:
        return line | dict.fromkeys(names)
    long, more = statistics.median(one.long), facts["tokens"] - facts["short_tokens"]
    step_ms = statistics.median(_steps(one, more))
    figures = (
        1000 * statistics.median(one.first),
        step_ms,
        one.rows * facts["tokens"] / long,
        weights_ms / step_ms if step_ms > 0 else None,
        facts["model"]["weight_bytes"] + one.memory,
        one.memory,
        None if one.cold is None else one.cold - long,
    )
    return line | dict(zip(names, figures, strict=True))


def _steps(one: Timed, more: int) -> Sequence[float]:
    """Milliseconds per decoding step in each round: what the long answer takes beyond the short one."""
    return [1000 * (long - short) / more for short, long in zip(one.short, one.long, strict=True)]


def _ratio(value: float | None, plain: float | None) -> float | None:
    """How many times as much; None without figures, or where the clock's noise has left nothing of a time."""
    return None if value is None or plain is None or min(value, plain) <= 0 else value / plain


def refuse_other_file(path: Path) -> None:
    """Makes sure, before anything is measured, that results can be written to a file.

    Raises:
        UsageError: There is no such folder, or something else has this name.
    """
    if not os.path.isdir(path.parent):
        raise UsageError(f"--json {path}: there is no folder {path.parent}", "make it, or choose another")
    if not os.path.exists(path):
        return
    try:
        ours = read_json(path).get("kind") == KIND
    except DataError:
        ours = False
    if not ours:
        raise UsageError(f"--json {path}: this is no file of vlmfix bench", "choose another name")
