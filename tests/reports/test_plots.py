from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.evals.exam import exam
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.comparison.compare import Estimate, compare
from vlmfix.figures import check_target
from vlmfix.reports.files import save
from vlmfix.reports.plots import COLOURS, Point, differences, front, pareto


@pytest.fixture(scope="module")
def comparison():
    return compare([exam()], draws=1000)


def has(path, colour):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any())


def test_differences_are_a_thousand_pixels_wide_with_a_colour_for_each_arm(tmp_path, comparison):
    differences(comparison, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width == 1000
    assert [has(tmp_path / "plot.png", colour) for colour in COLOURS[:3]] == [True, True, False]


def test_differences_name_panels_groups_arms_and_better_sides(tmp_path, comparison):
    differences(comparison, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for said in ("accuracy: better to the right →", "← better to the left: misses", "length (shift)", "good", "wordy"):
        assert f"<!-- {said} -->" in text
    assert text.count("<!-- easy -->") == 5
    assert text.count("<!-- mean -->") == 1


def test_rounding_is_no_difference(tmp_path):
    found = compare([exam()], draws=1000)
    nothing = Estimate(0.0, -5e-17, 0.0)
    arms = [replace(arm, changes=tuple(replace(c, difference=nothing) for c in arm.changes)) for arm in found.arms]
    differences(replace(found, arms=tuple(arms)), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<!-- 1e" not in text


def test_many_arms_with_long_names_are_told_apart(tmp_path):
    run = exam()
    arms = run.answers | {f"vcd:contrast={number},noise_step=400+locore": run.answers["wordy"] for number in range(9)}
    differences(compare([exam(arms=arms)], draws=4400), tmp_path / "plot.png")
    assert all(has(tmp_path / "plot.png", colour) for colour in COLOURS)


NASTY = r"$\frac$ 中 <b>" + "\n\x1b[31m\udcff"


def test_names_are_drawn_as_they_are(tmp_path):
    """A broken formula would end the plot, and an arm whose name begins with an underscore would have no key."""
    run = exam(model=NASTY)
    group = {"easy": NASTY, "hard": "hard"}
    found = compare(
        [
            replace(
                run,
                answers={"greedy": run.answers["greedy"], f"_{NASTY}": run.answers["good"]},
                card=run.card | {"arms": {name: {"spec": name} for name in ("greedy", f"_{NASTY}")}},
            )
        ],
        draws=1000,
    )
    arms = [
        replace(arm, changes=tuple(replace(c, figure=f"{group.get(c.group, c.group)}/{c.label}") for c in arm.changes))
        for arm in found.arms
    ]
    for ending in ("png", "svg"):
        differences(replace(found, arms=tuple(arms)), tmp_path / f"plot.{ending}")
    text = (tmp_path / "plot.svg").read_text()
    said = r"$\frac$ 中 &lt;b&gt;\n\u001b[31m\udcff"
    assert text.count(f"<!-- {said} -->") == 5, "the group, in every panel"
    assert f"<!--  _{said} -->" in text
    point = [Point(0.7, 0.1, role="chosen", name=NASTY), Point(0.9, 0.2, role="plain", name="greedy")]
    pareto(point, tmp_path / "p.png", objective="$a$", guard="$b", objective_better="lower", title=NASTY)


def test_the_front_holds_what_nothing_beats():
    points = [Point(0.7, 0.2), Point(0.8, 0.3), Point(0.75, 0.3), Point(0.9, 0.35), Point(0.6, 0.2), Point(0.9, 0.36)]
    points.append(Point(0.95, 0.1, feasible=False))
    best = front(points, objective_better="lower", guard_better="higher")
    assert [(point.guard, point.objective) for point in best] == [(0.7, 0.2), (0.8, 0.3), (0.9, 0.35)]
    mirrored = [Point(-point.guard, -point.objective, point.feasible) for point in points]
    best = front(mirrored, objective_better="higher", guard_better="lower")
    assert [point.guard for point in best] == [-0.9, -0.8, -0.7]
    assert front([], objective_better="higher", guard_better="higher") == []


def test_pareto_shows_trials_limit_chosen_and_plain(tmp_path):
    points = [
        Point(0.7, 0.1, feasible=False),
        Point(0.78, 0.15),
        Point(0.78, 0.15, role="chosen", name="vcd:contrast=0.7"),
        Point(0.8, 0.2, role="plain", name="greedy"),
    ]
    for ending in ("png", "svg"):
        pareto(
            points,
            tmp_path / f"pareto.{ending}",
            objective="chair_i",
            guard="recall",
            objective_better="lower",
            limit=0.76,
            title="vcd, 2 trials",
        )
    text = (tmp_path / "pareto.svg").read_text()
    for said in (
        "infeasible trial",
        "feasible trial",
        "chosen",
        "plain decoding",
        "limit of recall",
        "Pareto front",
        "vcd:contrast=0.7",
        "greedy",
        "recall (higher is better)",
        "chair_i (lower is better)",
        "vcd, 2 trials",
    ):
        assert f"<!-- {said} -->" in text
    assert has(tmp_path / "pareto.png", COLOURS[1])


def test_a_long_name_stays_within_the_plot(tmp_path):
    name = "vcd:preset=paper,contrast=1.0,plausibility=0.1,noise_step=500,noise_seed=0"
    points = [Point(0.7, 0.1, role="chosen", name=name), Point(0.9, 0.2, role="plain", name="greedy")]
    pareto(points, tmp_path / "pareto.png", objective="chair_i", guard="recall", objective_better="lower")
    with Image.open(tmp_path / "pareto.png") as image:
        right = np.asarray(image.convert("L"))[: image.height * 9 // 10, -4:]  # above the axis
    assert (right > 200).all()  # the grid alone


def test_all_files_are_written_and_a_bad_folder_is_an_error(tmp_path, comparison):
    assert [path.name for path in save(comparison, tmp_path / "new")] == [
        f"comparison.{e}" for e in ("csv", "md", "png")
    ]
    assert all(path.stat().st_size > 100 for path in (tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the folder"):
        save(comparison, tmp_path / "file" / "below")
    with pytest.raises(DataError, match="cannot write"):
        differences(comparison, tmp_path / "plot.txt2")
    with pytest.raises(DataError, match="cannot write"):
        differences(comparison, tmp_path / "missing" / "plot.png")


def test_files_that_are_of_no_comparison_are_not_touched(tmp_path, comparison):
    for name in ("comparison.csv", "comparison.md", "comparison.png"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(DataError, match="is of no comparison"):
            save(comparison, tmp_path)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]
        (tmp_path / name).unlink()
    mine = tmp_path / "mine"
    mine.write_text("precious")
    save(comparison, tmp_path)
    (tmp_path / "comparison.md").unlink()
    (tmp_path / "comparison.md").symlink_to(mine)
    save(comparison, tmp_path)
    assert mine.read_text() == "precious"
    assert "|" in (tmp_path / "comparison.md").read_text()


def test_a_drawing_goes_over_no_other_file(tmp_path):
    for name in ("plot.png", "plot.svg", "plot.pdf"):
        check_target(tmp_path / name)
        pareto([Point(0.7, 0.1)], tmp_path / name, objective="f1", guard="recall", objective_better="higher")
        check_target(tmp_path / name)
        (tmp_path / name).write_text("precious")
        with pytest.raises(DataError, match="is there and is no drawing"):
            check_target(tmp_path / name)
    with pytest.raises(UsageError, match="ends in none of"):
        check_target(tmp_path / "plot.txt")
    with pytest.raises(UsageError, match="there is no folder"):
        check_target(tmp_path / "missing" / "plot.png")


def test_names_are_drawn_as_they_stand(tmp_path, comparison):
    name = "a$x^{2$\x1b[31m & <b>"
    arms = tuple(replace(arm, name=name) for arm in comparison.arms)
    odd = replace(comparison, arms=arms, card=comparison.card | {"model": "m$\\frac$\nn\udce9"})
    differences(odd, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert r"<!-- a$x^{2$\u001b[31m &amp; &lt;b&gt; -->" in text
    assert "m$\\frac$\\nn\\udce9" in text
    pareto(
        [Point(0.7, 0.1, role="chosen", name="$x^{$")],
        tmp_path / "pareto.svg",
        objective="f1",
        guard="recall",
        objective_better="higher",
        title="$y_{$",
    )
    assert "$x^{$" in (tmp_path / "pareto.svg").read_text()
