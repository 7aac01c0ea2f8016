"""The benchmarks by name."""

from __future__ import annotations

from vlmfix.evals.task import Task

TASKS: dict[str, type[Task]] = {}
