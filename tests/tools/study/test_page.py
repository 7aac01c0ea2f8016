"""The page of effects: what it says of results, and what it leaves alone."""

import pytest

from tools.study.page import BEGIN, END, text, write
from tools.study.results import reach
from tools.study.study import STAGES
from tools.study.summary import summary
from vlmfix.errors import DataError


def change(value, difference, direction=""):
    return {
        "value": value,
        "value_low": value - 0.01,
        "value_high": value + 0.01,
        "difference": difference,
        "low": difference - 0.01,
        "high": difference + 0.01,
        "direction": direction,
        "shifted": False,
    }


def captions(wrong, recall):
    figures = {"chair_s": change(0.4, 0.0), "chair_i": change(wrong, wrong - 0.2, "better")}
    return figures | {"recall": change(0.9 + recall, recall), "length": change(30.0, -1.25)}


def model(**rows):
    """A model's results with defaults alone."""
    pope = {
        f"{split}/{name}": change(0.9, 0.0)
        for split in ("random", "popular", "adversarial")
        for name in ("f1", "yes_ratio")
    }
    listed = [
        {
            "name": name,
            "source": "",
            "reason": "",
            "problem": "",
            "captions": found,
            "pope": found and pope,
            "changed": 0.5,
        }
        for name, found in rows.items()
    ]
    return {
        "weights": "sha256:1",
        "dtype": "float32",
        "devices": {"chair": ["cuda:0", "cpu"], "pope": ["cpu"], "small": []},
        "versions": ["vlmfix 1"],
        "plain": {"captions": captions(0.2, 0.0), "pope": pope},
        "rows": listed,
        "tuned": [],
        "small": None,
        "speed": {},
    }


def test_how_far_each_came():
    found = reach(model(good=captions(0.1, -0.02), dear=captions(0.05, -0.1), idle=captions(0.2, 0.0), none=None))
    assert [row["name"] for row in found] == ["good", "idle", "dear"]
    assert [row["reached"] for row in found] == [True, False, False]
    assert found[0]["share"] == pytest.approx(0.5)


RESULTS = {
    "command": "python -m tools.study",
    "stages": ["defaults", "small", "tuned", "speed"],
    "count": 5,
    "seed": 1,
    "tuning_count": 4,
    "tuning_seed": 2,
    "trials": 3,
    "limits": {"max_recall_loss": 0.01, "max_length_loss": 0.1, "max_f1_loss": 0.01},
    "goal": {"chair_i": 0.5, "recall_loss": 0.02},
    "draws": 10000,
}


SEARCH = {
    "spec": "beam+vcd:contrast=0.3",
    "plain": {"value": 0.2, "recall": 0.9},
    "chosen": {"value": 0.1, "recall": 0.895},
    "chosen_brief": "beam+vcd:contrast=0.3",
    "furthest": {"value": 0.05, "recall": 0.5},
    "furthest_brief": "beam+vcd:contrast=2.0",
    "trials": 3,
    "feasible": 2,
    "turned_down": 0,
}


def test_the_page_says_what_was_chosen():
    row = {"search": SEARCH, "name": "one", "source": "", "reason": "", "captions": None, "pope": None}
    whole = text(RESULTS | {"stages": ["tuned"], "models": {"tiny": model(idle=None) | {"tuned": [row]}}})
    assert "| `one` | chosen | `beam+vcd:contrast=0.3` | 0.200 to 0.100 | 0.900 to 0.895 | 2 of 3 |" in whole
    assert "| `one` | chosen, but not run yet on the reported scenes |" in whole


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"feasible": 0}, "none of 3 trials keeps within the limits"),
        ({}, "none of 2 trials within the limits (3 in all) beats plain decoding"),
        ({"turned_down": 2}, "the 2 of 3 trials that help captions harm POPE beyond its limit"),
    ],
)
def test_the_page_says_why_nothing_was_chosen(found, said):
    row = {"search": SEARCH | {"spec": "", "chosen": {}, "chosen_brief": ""} | found, "name": "one", "source": ""}
    row |= {"reason": "", "captions": None, "pope": None}
    whole = text(RESULTS | {"stages": ["tuned"], "models": {"tiny": model(idle=None) | {"tuned": [row]}}})
    assert f"| `one` | {said} |" in whole
    assert "| `one` | lowest CHAIR_i, not chosen | `beam+vcd:contrast=2.0` |" in whole


def test_the_page_says_what_was_reached_and_what_is_missing():
    whole = text(RESULTS | {"models": {"tiny": model(good=captions(0.1, -0.02), late=None)}})
    assert "The goal is reached by `good` (defaults, 0.50, recall -0.020)." in whole
    assert "| `good` | 0.400: +0.000 [-0.010, +0.010] | 0.100: -0.100 [-0.110, -0.090] ✓ |" in whole
    assert "30.0: -1.2 [-1.3, -1.2]" in whole
    assert "| `late` | not run yet |" in whole
    assert "captions on cuda:0, cpu; POPE on cpu; vlmfix 1." in whole
    poor = text(RESULTS | {"models": {"tiny": model(idle=captions(0.2, 0.0))}})
    assert "Nothing reaches the goal; nearest, with recall kept: `idle`" in poor
    assert "Plain decoding: not run yet." in text(RESULTS | {"models": {"tiny": {"rows": []}}})


def test_the_page_shows_the_stages_that_are_asked_for():
    chosen = {"search": SEARCH, "name": "beam+vcd", "source": "", "reason": "", "changed": 0.5}
    figures = {key: model(one=captions(0.1, 0.0))["rows"][0][key] for key in ("captions", "pope")}
    found = model(good=captions(0.1, -0.02)) | {"tuned": [chosen | figures]}
    told = {stage: text(RESULTS | {"stages": [stage], "models": {"tiny": found}}) for stage in STAGES}
    assert [stage for stage in told if "`good`" in told[stage]] == ["defaults"]
    assert [stage for stage in told if "| `beam+vcd` | chosen | `beam+vcd:contrast=0.3` |" in told[stage]] == ["tuned"]
    assert "The goal is reached by `beam+vcd` (tuned" in told["tuned"]
    assert [stage for stage in told if "### Time" in told[stage]] == ["speed"]
    assert [stage for stage in told if "swapped by pictures" in told[stage]] == ["small", "defaults", "tuned"]


def test_the_summary_has_methods_and_models_beside_each_other():
    found = {"tiny": model(vcd=captions(0.1, -0.02), var=None), "small": model(vcd=captions(0.3, 0.0))}
    found["tiny"]["rows"][1]["reason"] = "no sinks"
    found["tiny"]["rows"] += model(**{"vcd+spin": captions(0.1, 0.0)})["rows"]
    head, _, *rows = summary(RESULTS | {"models": found}).splitlines()
    assert head.endswith("| CHAIR_i ↓, tiny | recall ↑, tiny | CHAIR_i ↓, small | recall ↑, small |")
    assert rows[0] == "| [`greedy`](methods/greedy.md) | nothing | 0.200 | 0.900 | 0.200 | 0.900 |"
    assert [row.split("`")[1] for row in rows] == ["greedy", "var", "vcd"]
    assert rows[1].endswith("| cannot act | cannot act | not run yet | not run yet |")
    assert "| -0.100 [-0.110, -0.090] ✓ | -0.020 [-0.030, -0.010] |" in rows[2]


def test_the_page_keeps_what_people_wrote(tmp_path):
    page = tmp_path / "docs" / "effects.md"
    results = RESULTS | {"models": {}}
    write(page, results)
    page.write_text(f"# Mine\n\nbefore\n\n{BEGIN}\nearlier figures\n{END}\n\nafter\n")
    write(page, results)
    said = page.read_text()
    assert said.startswith("# Mine\n\nbefore\n\n")
    assert said.endswith(f"{END}\n\nafter\n")
    assert "earlier figures" not in said
    assert "5 scenes of seed 1" in said
    page.write_text("# Mine\n")
    with pytest.raises(DataError, match="figures: begin"):
        write(page, results)
    assert page.read_text() == "# Mine\n"
