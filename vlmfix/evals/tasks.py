"""The benchmarks by name, written by hand; each is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmfix.plugins import Table

if TYPE_CHECKING:
    from vlmfix.evals.task import Task

TASKS: Table[Task] = Table(
    "benchmark",
    "vlmfix.benchmarks",
    "vlmfix.evals.task:Benchmark",
    {
        "pope": "vlmfix.evals.benchmarks.pope:Pope",
        "chair": "vlmfix.evals.benchmarks.chair:Chair",
        "amber": "vlmfix.evals.benchmarks.amber:Amber",
        "mme": "vlmfix.evals.benchmarks.mme:Mme",
        "hallusion": "vlmfix.evals.benchmarks.hallusion:Hallusion",
        "clipscore": "vlmfix.evals.benchmarks.clipscore:ClipScore",
    },
    reserved=("score",),  # which is a command beside them
    needs=("name", "better", "max_new_tokens"),
)
"""Every benchmark by its name on the command line, those of other distributions included."""
