import json
import re

import pytest

from tests.view.made import picture, run


@pytest.fixture
def pictures(tmp_path):
    for number, colour in enumerate(("red", "green", "blue")):
        picture(tmp_path / "pictures" / f"{number}.png", colour)
    return tmp_path / "pictures"


@pytest.fixture
def runs(pictures, tmp_path):
    """Two runs about three pictures; the second drops a dog, adds two cats, and fails once."""
    first = [("0.png", "What?", "A dog and a cup."), ("1.png", "What?", "A cup."), ("2.png", "What?", "A dog.")]
    second = [("0.png", "What?", "A cat and a cup.", {"finish": "length"}), ("1.png", "What?", "A cup and a kitten.")]
    failed = [{"image": "2.png", "prompt": "What?", "reason": "odd"}]
    return (
        run(tmp_path / "first", pictures, first),
        run(tmp_path / "second", pictures, second, failed, decoder="vcd:contrast=0.5"),
    )


def test_runs_without_a_truth_are_compared_by_what_changed(vlmfix, runs):
    code, told, err = vlmfix("compare", *runs, "--json")
    assert (code, err) == (0, "")
    (found,) = json.loads(told)
    assert found == {
        "before": "greedy",
        "now": "vcd",
        "answered": 2,
        "same": 0,
        "shared": pytest.approx(1 - (1 + 1 + 0 + 3) / (6 + 6 + 3 + 6)),
        "longer": 1,
        "shorter": 0,
        "words": [3.5, 5.0],
        "objects": [1.5, 2.0],
        "cut": [0, 1],
        "failed": [0, 1],
        "dropped": {"dog": 1},
        "added": {"cat": 2},
    }


def test_the_table_says_the_same(vlmfix, runs):
    code, told, _ = vlmfix("compare", *runs)
    assert code == 0
    rows = [tuple(re.split(r"\s{2,}", line.strip())) for line in told.splitlines()]
    assert ("answered by both", "2") in rows
    assert ("the same answer", "0 (0.0 %)") in rows
    assert ("words per answer", "3.5 → 5.0") in rows
    assert ("objects added", "2: cat 2") in rows


def test_what_cannot_be_compared_is_refused(vlmfix, runs, pictures, tmp_path):
    first, second = runs
    other = run(tmp_path / "other", pictures, [("0.png", "Where?", "Here.")])
    for arguments, message in (
        ((first,), "there is one decoder, and nothing to compare it with"),
        ((first, other), "no question is answered by both first: greedy and other: greedy"),
        ((first, second, "--draws", "2000"), "--draws does not go with folders of vlmfix run"),
        ((first, tmp_path), f"{tmp_path} is no folder of vlmfix run, as others are"),
    ):
        code, _, err = vlmfix("compare", *arguments)
        assert (code, message in err) == (2, True), err
