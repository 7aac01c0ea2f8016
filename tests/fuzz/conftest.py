"""The frame as a fixture, and what was run at the end of the session."""

from __future__ import annotations

import pytest

from tests.fuzz.frame import MINUTES, Rounds


@pytest.fixture
def rounds(request):
    return Rounds(request.node)


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    lines = [text for report in reports for name, text in report.user_properties if name == "fuzz"]
    if lines and MINUTES:
        terminalreporter.section("what was run")
        for line in lines:
            terminalreporter.line(line)
