"""The benchmarks by name."""

from __future__ import annotations

from vlmfix.evals.benchmarks.amber import Amber
from vlmfix.evals.benchmarks.chair import Chair
from vlmfix.evals.benchmarks.clipscore import ClipScore
from vlmfix.evals.benchmarks.hallusion import Hallusion
from vlmfix.evals.benchmarks.mme import Mme
from vlmfix.evals.benchmarks.pope import Pope
from vlmfix.evals.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Pope, Chair, Amber, Mme, Hallusion, ClipScore)}
"""Every benchmark by its name on the command line."""
