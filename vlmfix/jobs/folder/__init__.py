"""Turns a folder of pictures into a file of answers."""

from __future__ import annotations

from vlmfix.jobs.folder.job import Progress, run
from vlmfix.jobs.folder.questions import DESCRIBE, Questions
from vlmfix.jobs.folder.worker import Shared, steal

__all__ = ["DESCRIBE", "Progress", "Questions", "Shared", "run", "steal"]
