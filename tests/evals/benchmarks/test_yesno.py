"""Every parser on every kind of answer, cell by cell."""

from __future__ import annotations

import pytest

from vlmfix.evals.benchmarks.yesno import PARSERS, Reading, has_word

LETTERS = {"Y": Reading.YES, "N": Reading.NO, "·": Reading.NEITHER, "B": Reading.BOTH}

# One letter per parser: official, opera, vcd, lmms-eval, vlmevalkit, mme, dash-b, vicrop.
MATRIX = [
    ("Yes", "YYYYYYYY"),
    ("No", "NNNNNNNN"),
    ("Yes.", "YYY·YYYY"),
    ("No.", "NNN·NNNN"),
    ("NO", "YNNNNNNY"),
    ("No, there is no dog.", "NNN·NNNN"),
    ("No\n", "YYNNNNNN"),
    ("\nNo", "YYNNNNNN"),
    ("No\nThere is", "YYN·NNNY"),
    ("There is not.", "NNN···NN"),
    ("There is. Not sure.", "YYN···NY"),
    ("I cannot see it.", "YYN···NN"),
    ("There isn't a dog.", "YN·····N"),
    ("There is a dog in the image.", "YY·····Y"),
    ("", "YY·····Y"),
    ("Nope", "YYN··NNN"),
    ("None", "YYN··NNN"),
    ("Not really", "YYN··NNN"),
    ("Unknown", "YYN···NN"),
    ("Yes and no", "NNB··YYN"),
    ("Yes, I know", "YYB·YYYN"),
    ("The answer is no", "NNN·N·NN"),
    ("Mr. No", "YNN·N·NN"),
    ("**No**", "YYN··NNN"),
    ('"No"', "YYN·NNNN"),
    ("No!", "YYN·NNNN"),
    ("No;", "YYN·NNNN"),
]


@pytest.mark.parametrize(("answer", "row"), MATRIX)
def test_every_cell_of_the_matrix(answer: str, row: str) -> None:
    found = {name: parser.read(answer) for name, parser in PARSERS.items()}
    assert found == dict(zip(PARSERS, (LETTERS[letter] for letter in row), strict=True))


@pytest.mark.parametrize("name", PARSERS)
def test_plain_answers_fill_the_same_cells_everywhere(name: str) -> None:
    parser = PARSERS[name]
    cells = [
        parser.cell(reading, label) for label in (Reading.YES, Reading.NO) for reading in (Reading.YES, Reading.NO)
    ]
    assert cells == ["tp", "fn", "fp", "tn"]


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("vcd", ["fn", "fp"]),
        ("dash-b", ["fn", "fp"]),
        ("vlmevalkit", ["fn", ""]),
        ("lmms-eval", ["", ""]),
        ("mme", ["", ""]),
    ],
)
def test_where_an_unreadable_answer_goes(name: str, cells: list[str]) -> None:
    parser = PARSERS[name]
    assert [parser.cell(Reading.NEITHER, label) for label in (Reading.YES, Reading.NO)] == cells


def test_vcd_judges_the_same_words_by_the_label() -> None:
    parser = PARSERS["vcd"]
    reading = parser.read("Yes, I know")
    assert parser.cell(reading, Reading.YES) == "tp"
    assert parser.cell(reading, Reading.NO) == "tn"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("NO!", True), ("**yes**", True), ("", False), ("There is not.", False), ("I know", False), ("Nope, none", False)],
)
def test_has_word(answer: str, expected: bool) -> None:
    assert has_word(answer) is expected


def test_readings_have_plain_names() -> None:
    assert [str(reading) for reading in LETTERS.values()] == ["yes", "no", "neither", "both"]
