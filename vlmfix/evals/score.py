"""From raw answers to figures, without the model that gave them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.record import (
    ANSWERS,
    CARD,
    REPORT,
    RESULTS,
    EvalRun,
    arm_folder,
    digest,
    read_run,
    skips_of,
    write_samples,
)
from vlmfix.evals.task import Sample, Workload
from vlmfix.files import resolved
from vlmfix.parsing import some
from vlmfix.records import read_lines, replace_json, to_json


def score(run: EvalRun, *, samples: Sequence[Sample] | None = None, **options: str | bool | None) -> EvalRun:
    """Score every arm and write ``results.json`` and ``report.json`` into the run's folder.

    Args:
        run: Arms may be unfinished; what is missing is counted in the report.
        samples: The run's samples with other truths, such as judgements made since; the run then keeps these.
        **options: Rules of scoring to change, such as ``parser="vcd"``; the card then says so.

    Returns:
        The run under the rules that it was scored with.

    Raises:
        UsageError: The task has no such option, or refuses the value.
    """
    changed: dict[str, Any] = {}
    if samples is not None or options:
        samples = run.samples if samples is None else list(samples)
        changed = {"options": run.task.options() | options, "samples": digest(samples)}
        run = replace(run, task=replace(run.task, **options), card=run.card | changed, samples=samples)
    results: dict[str, Any] = {}
    report: dict[str, Any] = {}
    for arm in run.answers:
        judged = run.judged(arm)
        results[arm] = run.task.results(judged)
        report[arm] = {
            "answers": len(judged),
            "failed": run.failed(arm),
            "missing": run.missing(arm),
            "unparsed": sum(not verdict.parsed for _, verdict in judged),
            "cut": sum(record.finish in ("length", "context") for record in run.answers[arm].values()),
            **run.skips(arm).noted(),
            **run.task.details(judged, run.texts(arm)),
        }
    head = {name: run.card[name] for name in ("task", "options", "data", "count", "model", "decoding")}
    if changed:  # only now: rules that cannot score the answers do not become the run's
        write_samples(run.folder, run.samples)
        replace_json(run.folder / CARD, run.card)
    replace_json(run.folder / RESULTS, results)
    pictures = list(dict.fromkeys(sample.image for sample in run.samples if sample.image is not None))
    replace_json(run.folder / REPORT, head | {"arms": report, "pictures": pictures})
    return run


def answered_before(run: EvalRun, workload: Workload, out: Path) -> EvalRun:
    """Make a run of questions with other truths from the answers that a run has to them.

    Args:
        run: A run that was asked these questions, and perhaps more, which are then left out.
        workload: The questions with their truths, by the run's ids, such as those of RePOPE for a run of POPE.
        out: Folder of the new run; made when it is missing.

    Raises:
        UsageError: The folder is not empty.
        DataError: Some of the questions were not asked, or the folder cannot be written.
    """
    asked = {sample.id: (sample.image, sample.prompt) for sample in run.samples}
    if strangers := [sample.id for sample in workload.samples if asked.get(sample.id) != (sample.image, sample.prompt)]:
        raise DataError(
            f"{len(strangers)} of {len(workload.samples)} questions were not asked in {run.folder}: {some(strangers)}",
            "give files whose questions, pictures and numbers are those of the run; only their truths may be others",
        )
    wanted = {sample.id for sample in workload.samples}
    card = run.card | {
        "arms": {arm: about | _skipped(run, arm, wanted) for arm, about in run.card["arms"].items()},
        "data": dict(workload.about),
        "samples": digest(workload.samples),
        "count": len(workload.samples),
        "answers_from": str(resolved(run.folder)),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UsageError(f"{out} is not empty", "choose another --out")
        write_samples(out, workload.samples)
        for arm in run.answers:
            lines = read_lines(run.folder / arm_folder(arm) / ANSWERS)
            kept = "".join(f"{to_json(line)}\n" for line in lines if line["id"] in wanted)
            (out / arm_folder(arm)).mkdir()
            (out / arm_folder(arm) / ANSWERS).write_text(kept, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}", "choose another --out") from error
    replace_json(out / CARD, card)
    return read_run(out)


def _skipped(run: EvalRun, arm: str, wanted: Collection[str]) -> dict[str, Any]:
    """What a card says of the tokens that a contrast left to the clean row, over some of the samples."""
    return skips_of(record for name, record in run.answers[arm].items() if name in wanted).noted()
