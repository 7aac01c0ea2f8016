"""The task that the tests of evaluations ask, known by its name."""

from __future__ import annotations

import pytest

from tests.evals.fake import Says
from vlmfix.evals import tasks


@pytest.fixture(autouse=True)
def _known_task(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "says", Says)
