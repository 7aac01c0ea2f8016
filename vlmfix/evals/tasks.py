"""The benchmarks by name."""

from __future__ import annotations

from vlmfix.evals.amber import Amber
from vlmfix.evals.chair import Chair
from vlmfix.evals.clipscore import ClipScore
from vlmfix.evals.hallusion import Hallusion
from vlmfix.evals.mme import Mme
from vlmfix.evals.pope import Pope
from vlmfix.evals.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Pope, Chair, Amber, Mme, Hallusion, ClipScore)}
"""Every benchmark by its name on the command line."""
