"""Evaluations that differ in their seed: mean and deviation of what every run says alone."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evals.exam import exam
from vlmfix.errors import UsageError
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.comparison.seeds import over_seeds
from vlmfix.reports.pages import report_table, seeds_json, seeds_report
from vlmfix.terminal import rendered


def seeded(seed, answers=None, **changed):
    decoding = {"max_new_tokens": 64, "num_beams": 1, "temperature": 0.7, "seed": seed}
    run = exam(decoding=decoding, **changed)
    arms = run.answers if answers is None else answers(run.answers)
    return replace(run, folder=Path(f"seed{seed}"), answers=arms)


def swapped(arms):
    return arms | {"good": arms["wordy"], "wordy": arms["good"]}


@pytest.fixture(scope="module")
def runs():
    return [seeded(0), seeded(1, swapped), seeded(7)]


def test_mean_and_deviation_are_those_of_the_runs(runs):
    found = over_seeds(runs)
    assert found.seeds == (0, 1, 7)
    alone = [compare([run], draws=2000) for run in runs]
    for figure in found.arms["good"]:
        values = [
            next(c for arm in one.arms if arm.name == "good" for c in arm.changes if c.figure == figure.first.figure)
            for one in alone
        ]
        assert figure.value.values == tuple(change.arm.value for change in values)
        if None not in figure.value.values:
            assert figure.value.mean == pytest.approx(statistics.fmean(figure.value.values))
            assert figure.value.deviation == pytest.approx(statistics.stdev(figure.value.values))
            assert figure.difference.mean == pytest.approx(statistics.fmean(c.difference.value for c in values))


def test_the_reports_show_them(runs):
    found = over_seeds(runs)
    figure = next(one for one in found.arms["good"] if one.first.figure == "easy/accuracy")
    said = f"{figure.value.mean:.3f} ± {figure.value.deviation:.3f}"
    report = seeds_report(found)
    text = rendered(*report_table(report))
    assert said in text
    assert f"{figure.difference.mean:+.3f} ± {figure.difference.deviation:.3f}" in text
    assert "over 3 seeds (0, 1, 7)" in text.replace("\n", " ")
    assert "seed 0" not in text
    assert said in report.page()
    assert said.replace("±", "$\\pm$") in report.latex()
    assert seeds_json(found)["arms"]["good"]["easy/accuracy"]["value"]["values"] == figure.value.values


def test_runs_must_differ_in_their_seed_and_in_nothing_else(runs):
    for given, message in (
        ([runs[0]], "the runs have the seeds 0"),
        ([runs[0], runs[0]], "the runs have the seeds 0, 0"),
        ([runs[0], seeded(1, dtype="bfloat16")], "dtype is"),
        ([runs[0], seeded(1, lambda arms: {k: v for k, v in arms.items() if k != "good"})], "has the arms"),
    ):
        with pytest.raises(UsageError, match=message):
            over_seeds(given)
