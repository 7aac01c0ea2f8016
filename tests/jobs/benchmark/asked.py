"""An evaluation with a model that answers at once, and what it leaves."""

from __future__ import annotations

from tests.evals.fake import Says
from vlmfix.decoders import parse
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.settings import Settings


def go(
    out,
    work,
    vlm,
    *,
    arms=(),
    batch_size=4,
    task=None,
    retry_failed=False,
    report=lambda done, total: None,
    **settings,
):
    return evaluate(
        out,
        task or Says(),
        work,
        Settings(**settings),
        {name: parse(name) for name in arms},
        batch_size=batch_size,
        retry_failed=retry_failed,
        report=report,
        loader=vlm.load,
    )


def files(out):
    """What the files of lines hold."""
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*.jsonl"))}
