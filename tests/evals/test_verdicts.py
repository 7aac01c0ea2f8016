"""How often comparisons call something better or worse: seldom by chance, often where there is something."""

from __future__ import annotations

import pytest

from tools.verdicts import EXAMS, compared, marks

REPEATS = 40
"""Of which 5 % are 2, give or take 1.4; when every figure was tested by itself, there were 13."""


@pytest.mark.parametrize("name", EXAMS)
@pytest.mark.parametrize("arms", [1, 2])
def test_marks_are_rare_where_nothing_differs(name, arms):
    marked = sum(bool(marks(compared(name, 30, arms, 0.0, 1000, seed))) for seed in range(REPEATS))
    assert marked <= 6


@pytest.mark.parametrize("name", EXAMS)
def test_an_arm_that_is_better_is_called_so(name):
    figure, repeats = EXAMS[name].figure, 10
    found = [marks(compared(name, 150, 1, 0.8, 1000, 100 + seed)) for seed in range(repeats)]
    assert sum((figure, "better") in marked for marked in found) >= 0.8 * repeats
    assert not any(direction == "worse" for marked in found for _, direction in marked)


def test_nothing_is_marked_on_a_handful_of_pictures():
    assert not any(marks(compared("pope", 12, 1, 3.0, 1000, seed)) for seed in range(5))
