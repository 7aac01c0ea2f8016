"""A folder of pictures to a file of answers."""

from __future__ import annotations

from vlmfix.folder.job import Progress, run
from vlmfix.folder.questions import DESCRIBE, Questions

__all__ = ["DESCRIBE", "Progress", "Questions", "run"]
