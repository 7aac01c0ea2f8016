from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from tests.evals.exam import answers, exam, samples
from vlmfix.evals.comparison.compare import Change, Estimate, compare
from vlmfix.evals.record import PLAIN
from vlmfix.reports.tables import csv_text, json_text, markdown, sheets, terminal
from vlmfix.reports.words import difference_text, heading, interval_text, value_text
from vlmfix.terminal import rendered

LONG = "vcd:contrast=0.5,noise_step=400+locore:beta=0.15"


@pytest.fixture(scope="module")
def comparison():
    run = exam()
    return compare([exam(arms=run.answers | {LONG: run.answers["wordy"]})], draws=2000)


def shown(comparison, width=110):
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal(comparison))
    return console.file.getvalue().splitlines()


def cell(comparison, arm, figure):
    return next(c for a in comparison.arms if a.name == arm for c in a.changes if c.figure == figure)


def test_the_terminal_shows_value_difference_interval_and_mark(comparison):
    lines = shown(comparison)
    assert max(map(len, lines)) <= 110
    change = cell(comparison, "good", "easy/accuracy")
    row = lines.index(next(line for line in lines if line.startswith("good ")))
    assert change.direction == "better"
    assert f" {change.arm.value:.3f} {change.difference.value:+.3f} ✓ " in lines[row]
    assert f" [{change.difference.low:+.3f},{change.difference.high:+.3f}] " in lines[row + 1]


def test_the_plain_arm_stands_first_and_alone(comparison):
    lines = [line for line in shown(comparison) if line.strip()]
    assert "easy" in lines[2]
    assert lines[3].split()[0] == PLAIN
    assert lines[3].split()[1:] == [f"{change.arm.value:.3f}" for change in comparison.plain[0].changes[:5]]


def test_the_header_names_better_sides_and_ends_with_the_shifts(comparison):
    header = shown(comparison)[2].replace(" ↑", "↑").replace(" ↓", "↓").split()
    assert header == ["accuracy↑", "precision↑", "misses↓", "yes_ratio", "length"]


def test_figures_of_one_figure_groups_have_a_table_of_their_own(comparison):
    lines = shown(comparison)
    (header,) = (number for number, line in enumerate(lines) if "mean/accuracy ↑" in line)
    assert "easy" not in lines[header]
    assert lines[header + 1].split() == [PLAIN, f"{comparison.plain[0].changes[-1].arm.value:.3f}"]


def test_where_figures_do_not_fit_the_shifts_stand_in_every_table(comparison):
    lines = shown(comparison, width=82)
    assert max(map(len, lines)) <= 82
    headers = [line.split() for line in lines if "yes_ratio" in line and "Shifts" not in line]
    assert headers == [
        ["accuracy", "↑", "precision", "↑", "yes_ratio", "length"],
        ["misses", "↓", "yes_ratio", "length"],
    ]


def test_groups_with_other_figures_and_figures_without_a_value(comparison):
    def other(arm):
        changes = [c for c in arm.changes if c.figure != "hard/misses"]
        empty = Estimate(None, None, None)
        changes = [replace(c, arm=empty, difference=empty) if c.label == "precision" else c for c in changes]
        return replace(arm, changes=(*changes, replace(changes[0], figure="total")))

    found = sheets(
        replace(comparison, plain=tuple(map(other, comparison.plain)), arms=tuple(map(other, comparison.arms)))
    )
    assert [(sheet.merits, {row.group for row in sheet.rows}) for sheet in found] == [
        (["accuracy ↑", "misses ↓"], {"easy"}),
        (["accuracy ↑"], {"hard"}),
        (["mean/accuracy ↑", "total ↑"], {""}),
    ]


def test_a_long_name_is_called_by_its_decoders(comparison):
    lines = shown(comparison)
    assert any(line.split()[:1] == ["vcd+locore"] for line in lines)
    assert f"vcd+locore stands for {LONG}." in " ".join(lines)
    assert f"| `{LONG}` |" in markdown(comparison), "files have it whole"


@pytest.mark.parametrize("width", [82, 100, 110])
def test_long_names_alike_are_folded_and_not_cut(width):
    run = exam()
    other = LONG.replace("vcd:", "vcd:plausibility=0.5,")
    lines = shown(compare([exam(arms=run.answers | {LONG: run.answers["wordy"], other: run.answers["wordy"]})]), width)
    start = next(number for number, line in enumerate(lines) if line.startswith("vcd:"))
    room = lines[start].index(next(part for part in lines[start].split() if part[0].isdigit()))
    assert "".join(line[:room].strip() for line in lines[start : start + 6]).startswith(LONG)


def test_the_legend_says_how_it_was_done(comparison):
    text = " ".join(" ".join(shown(comparison)).split())
    assert "paired bootstrap over 60 pictures, 2000 draws" in text
    assert "swapped by pictures, corrected for 7 merits (Westfall and Young) and 3 arms (Bonferroni)" in text
    assert "where nothing differs, at most one comparison in twenty has a mark" in text
    assert "a gain may come from them alone: yes_ratio, length" in text
    alone = compare([exam(arms={name: exam().answers[name] for name in (PLAIN, "good")})], draws=2000)
    assert "Bonferroni" not in " ".join(shown(alone))


def test_the_legend_says_what_contrasts_left_alone(comparison):
    assert "clean row" not in " ".join(shown(comparison))
    arms = exam().answers
    sure = {name: replace(one, ids=(1, 2, 3), skipped=2) for name, one in arms["good"].items()}
    told = compare([exam(arms=arms | {"good": sure})], draws=2000)
    said = "Tokens that a contrast left to the clean row, which was sure of them: good 66.7 %."
    assert said in " ".join(" ".join(shown(told)).split())
    assert said in markdown(told)
    rows = {row["arm"]: row["skip_rate"] for row in csv.DictReader(io.StringIO(csv_text(told)))}
    assert rows == {"greedy": "", "good": "0.6667", "wordy": ""}
    assert {arm["name"]: arm["skip_rate"] for arm in json.loads(json_text(told))["arms"]} == {
        "good": 0.6667,
        "wordy": None,
    }


def test_a_mark_beside_a_clear_shift_has_a_sign_of_it(comparison):
    assert "†" not in " ".join(shown(comparison))
    assert "†" not in markdown(comparison)
    good = next(arm for arm in comparison.arms if arm.name == "good")
    changed = [replace(c, shifted=("easy/length",)) if c.figure == "easy/accuracy" else c for c in good.changes]
    shifted = replace(comparison, arms=(replace(good, changes=tuple(changed)),))
    line = next(line for line in shown(shifted) if line.startswith("good "))
    assert line.split()[3] == "✓†"
    assert "†: such a shift is beside it" in " ".join(shown(shifted))
    assert markdown(shifted).count("✓†") == 1
    written = {
        (line["arm"], line["group"], line["figure"]): line for line in csv.DictReader(io.StringIO(csv_text(shifted)))
    }
    assert written["good", "easy", "accuracy"]["shifted"] == "easy/length"
    assert written["good", "hard", "accuracy"]["shifted"] == ""


def test_notes_unparsed_answers_and_specifications_are_told():
    run = exam(arms=exam().answers)
    first, second = list(run.answers["good"])[:2]
    run.answers["good"][first] = replace(run.answers["good"][first], answer="maybe")
    del run.answers["good"][second]
    run.card["arms"]["good"]["spec"] = "vcd:contrast=1"
    comparison = compare([run], draws=2000)
    text = " ".join(" ".join(shown(comparison)).split())
    for said in (
        "good is vcd:contrast=1.",
        "scored by the benchmark's rule: good 1.",
        "good is incomplete: 1 not asked yet",
    ):
        assert said in text
        assert said in markdown(comparison)


def test_markdown_rows_have_as_many_cells_as_the_header(comparison):
    tables = [part.splitlines() for part in markdown(comparison).split("\n\n")[:2]]
    for table in tables:
        assert {line.count("|") for line in table} == {table[0].count("|")}
    assert tables[0][0] == "| group | arm | accuracy ↑ | precision ↑ | misses ↓ | yes_ratio | length |"
    assert [line.split(" | ")[0] for line in tables[0][2:]] == ["| easy", "| ", "| ", "| ", "| hard", "| ", "| ", "| "]
    change = cell(comparison, "good", "hard/misses")
    expected = f"{change.arm.value:.3f}<br>{change.difference.value:+.3f} [{change.difference.low:+.3f}, "
    assert expected in tables[0][7]


def test_the_markdown_caption_says_model_size_decoding_and_correction(comparison):
    caption = markdown(comparison).split("\n\n")[2]
    for said in (
        "exam: tiny, float32, up to 8 tokens, 240 samples about 60 pictures.",
        "Bonferroni",
        "2000 draws",
        "Shifts",
    ):
        assert said in caption


def test_csv_has_every_number_of_every_arm_and_figure(comparison):
    lines = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert len(lines) == 4 * len(comparison.plain[0].changes)
    by_name = {(line["arm"], line["group"], line["figure"]): line for line in lines}
    change, line = cell(comparison, "good", "hard/accuracy"), by_name["good", "hard", "accuracy"]
    assert float(line["value"]) == change.arm.value
    assert float(line["plain_high"]) == change.plain.high
    assert float(line["difference_low"]) == change.difference.low
    assert float(line["p_corrected"]) == change.corrected
    assert (line["test"], line["direction"], line["samples"]) == (change.test, change.direction, "240")
    assert by_name[PLAIN, "easy", "n"]["difference"] == ""
    assert by_name[LONG, "mean", "accuracy"]["kind"] == "merit"


def test_json_is_the_whole_comparison(comparison):
    assert json.loads(json_text(comparison)) == json.loads(json.dumps(asdict(comparison)))


def test_a_figure_without_a_value_is_a_dash():
    asked = samples()
    mute = {
        name: replace(record, answer="no") for name, record in answers(asked, {"easy": 1, "hard": 1}, seed=0).items()
    }
    comparison = compare([exam(asked=asked, arms=exam(asked=asked).answers | {"mute": mute})], draws=2000)
    row = next(line for line in markdown(comparison).splitlines() if line.startswith("|  | `mute`"))
    assert row.split(" | ")[3] == "-<br>-"
    line = next(line for line in shown(comparison) if line.startswith("mute"))
    assert " - - " in line


NASTY = "a|b *c* `d` <b>e</b> [f](g) $h$ _i_ ~j~ &amp;\nk\x1b[31m[red]\udcff"


@pytest.fixture(scope="module")
def nasty():
    """A comparison whose group, arm and model have such a name."""
    asked = [replace(sample, group=NASTY if sample.group == "easy" else "hard") for sample in samples()]
    easy = {NASTY: 0.8, "hard": 0.5}
    arms = {PLAIN: answers(asked, easy, seed=0), NASTY: answers(asked, {NASTY: 0.95, "hard": 0.8}, seed=0)}
    return compare([exam(asked=asked, arms=arms, model=NASTY)], draws=2000)


def test_names_do_nothing_to_the_terminal(nasty):
    lines = shown(nasty, width=300)
    assert all(line.isprintable() for line in lines)
    text = " ".join(lines)
    assert r"&amp;\nk\u001b[31m[red]\udcff" in text, "neither an escape of the terminal nor markup of rich"
    assert any(r"[red]\udcff/f" in line or r"[red]\udcff" in line for line in lines)
    "\n".join(lines).encode()


def test_names_are_text_in_markdown(nasty):
    text = markdown(nasty)
    text.encode()
    tables = [part.splitlines() for part in text.split("\n\n")[:-1]]
    for table in tables:
        cells = [len(re.split(r"(?<!\\)\|", line)) for line in table]
        assert len(set(cells)) == 1, "no name begins a cell or a line"
    row = next(line for line in tables[0] if line.startswith("| a"))
    group = re.split(r"(?<!\\) \| ", row)[0]
    assert group == (r"| a\|b \*c\* \`d\` \<b>e\</b> \[f\](g) \$h\$ \_i\_ \~j\~ \&amp;\\nk\\u001b\[31m\[red\]\\udcff")
    arm = next(line for line in tables[0] if "| `` a" in line)
    assert r"| `` a\|b *c* `d` <b>e</b> [f](g) $h$ _i_ ~j~ &amp;\nk\u001b[31m[red]\udcff `` |" in arm
    caption = text.split("\n\n")[-1]
    assert r"\<b>e\</b>" in caption
    assert "yes_ratio" in caption, "an underscore within a word is one"
    assert "p < 0.05" in caption


def test_names_are_one_field_of_one_line_in_csv(nasty):
    lines = csv_text(nasty).splitlines()
    assert len(lines) == 1 + 2 * len(nasty.plain[0].changes)
    "\n".join(lines).encode()
    assert json.loads(json_text(nasty))["arms"][0]["name"] == NASTY, "for programs it is what it is"


def change(value, plain, low, high):
    return Change(
        figure="length",
        kind="shift",
        better="",
        plain=Estimate(plain, plain, plain),
        arm=Estimate(value, value, value),
        difference=Estimate(value - plain, low, high),
    )


def test_decimals_suit_the_figure():
    length = change(97.04, 94.91, -0.16, 4.43)
    assert (value_text(length, length.arm.value), difference_text(length)) == ("97.0", "+2.1")
    assert interval_text(length) == "[-0.2, +4.4]"
    share = change(0.5, 0.5003, -0.0004, 0.0)
    assert (difference_text(share), interval_text(share)) == ("+0.000", "[+0.000, +0.000]")


def test_the_heading_tells_beams_sampling_and_commit():
    decoding = {"max_new_tokens": 64, "num_beams": 5, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    run = exam(decoding=decoding, commit="0123456789abcdef", model="org/model")
    said = heading(compare([run], draws=2000))
    assert "org/model (0123456789ab)" in said
    assert "up to 64 tokens, 5 beams, sampling (temperature 0.7, top_p 0.9, seed 3)" in said


ODD = "a|b`c[/bold]\x1b[31m*d*\nnext <b> $x$ _y_"


def named_oddly(comparison):
    arms = tuple(
        replace(arm, name=ODD, changes=tuple(replace(c, figure=f"{ODD}/{c.label}") for c in arm.changes))
        for arm in comparison.arms
    )
    return replace(comparison, arms=arms, card=comparison.card | {"model": ODD})


def test_names_are_text_in_the_terminal(comparison):
    shown = rendered(terminal(named_oddly(comparison)))
    assert "[/bold]" in shown
    assert r"\u001b[31m" in shown
    assert "\x1b" not in shown


def test_odd_names_are_text_in_markdown(comparison):
    lines = markdown(named_oddly(comparison)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    for table in markdown(named_oddly(comparison)).split("\n\n")[:-1]:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert any(r"`` a\|b`c[/bold]\u001b[31m*d*\nnext <b> $x$ _y_ ``" in row for row in rows)
    caption = lines[-1]
    assert r"a\|b\`c\[/bold\]\\u001b\[31m\*d\*\\nnext \<b> \$x\$ \_y\_" in caption
    assert "\x1b" not in markdown(named_oddly(comparison))
    assert markdown(comparison).count("p < ") == 1
