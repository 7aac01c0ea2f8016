"""The task that the tests of evaluations ask, known by its name."""

from __future__ import annotations

import pytest

from vlmfix.evals import tasks


@pytest.fixture(autouse=True)
def _known_task(monkeypatch):
    monkeypatch.setitem(tasks.TASKS.homes, "says", "tests.evals.fake:Says")
