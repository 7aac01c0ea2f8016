"""From raw answers to figures, without the model that gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlmfix.evals.record import CARD, REPORT, RESULTS, EvalRun, digest, write_samples
from vlmfix.evals.task import Sample
from vlmfix.records import replace_json


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
