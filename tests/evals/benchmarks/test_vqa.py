"""VQA accuracy, the three dialects of normalisation, and the scorers of GQA and V*."""

from __future__ import annotations

import pytest

from vlmfix.errors import UsageError
from vlmfix.evals.benchmarks.vqa import (
    CONTRACTIONS,
    DIALECTS,
    GQA,
    closed_accuracy,
    closest,
    normalise,
    official_accuracy,
    vicrop_accuracy,
    vstar_choice,
)


@pytest.mark.parametrize(
    ("text", "m4c", "vlmevalkit", "vicrop"),
    [
        ("3.", "3", "3.", "3"),
        ("it's", "it 's", "it's", "it's"),
        ("St. John's", "st john 's", "st john's", "st john's"),
        ("The 1,000 dogs", "1000 dogs", "1000 dogs", "1000 dogs"),
        ("coca-cola", "coca cola", "coca cola", "coca cola"),
        ("10 %", "10 %", "10 %", "10 %"),
        ("$5.00", "$5.00", "$5.00", "$5.00"),
        ("a", "", "", ""),
        ("dont", "don't", "don't", "don't"),
        ("NONE", "0", "0", "0"),
        ("Two", "2", "2", "2"),
        # Where each rule shows alone.
        ("red, white", "red white", "red white", "red white"),
        ("what?now", "whatnow", "what now", "what now"),
        ("red - white-blue", "red whiteblue", "red whiteblue", "red whiteblue"),
        ("1,000-2", "1000 2", "10002", "10002"),
        ("5.a", "5a", "5.a", "5a"),
        ("a.5", "a.5", "a.5", "a.5"),
        ("ten  o'clock: the\tend\n", "10 o'clock: end", "10 o'clock: end", "10 o'clock: end"),
        ("im", "i'm", "im", "im"),
    ],
)
def test_three_dialects(text: str, m4c: str, vlmevalkit: str, vicrop: str) -> None:
    assert {name: normalise(text, name) for name in DIALECTS} == {
        "m4c": m4c,
        "vlmevalkit": vlmevalkit,
        "vicrop": vicrop,
    }


def test_only_vicrop_sees_the_space_at_the_end() -> None:
    assert normalise("red-blue- ", "vicrop") == "redblue"
    assert normalise("red-blue- ", "vlmevalkit") == normalise("red-blue- ", "m4c") == "red blue"


def test_at_most_32_periods_are_deleted() -> None:
    for dialect in DIALECTS:
        assert normalise("x" + "." * 40, dialect) == "x" + "." * 8


def test_contractions_lack_any_one_apostrophe() -> None:
    assert len(CONTRACTIONS) > 100
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert CONTRACTIONS["oclock"] == "o'clock"
    assert not {"its", "were", "well", "ill", "wed", "shed", "lets"} & set(CONTRACTIONS)  # words of their own


def test_unknown_dialect() -> None:
    with pytest.raises(UsageError, match="'vqa'"):
        normalise("x", "vqa")


@pytest.mark.parametrize("matches", range(11))
def test_accuracy_in_three_ways_with_ten_labels(matches: int) -> None:
    labels = ["cat"] * matches + ["dog"] * (10 - matches)
    expected = [0, 0.3, 0.6, 0.9, 1][min(matches, 4)]
    assert closed_accuracy(matches) == expected
    assert official_accuracy("cat", labels) == pytest.approx(expected, abs=1e-12)
    assert vicrop_accuracy("cat", labels) == expected


def test_accuracies_part_with_other_numbers_of_labels() -> None:
    assert official_accuracy("cat", ["cat"] * 3) == pytest.approx(2 / 3)
    assert vicrop_accuracy("cat", ["cat"] * 3) == 0.9
    assert vicrop_accuracy("cat", []) == 0
    with pytest.raises(UsageError, match="labels"):
        official_accuracy("cat", [])
    with pytest.raises(UsageError, match="11"):
        closed_accuracy(11)


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("dog", "dog", "official llava lmms-eval vlmevalkit vicrop"),
        ("Dog.", "dog", "llava lmms-eval vicrop"),
        (" Dog", "dog", "vlmevalkit vicrop"),
        ("t-shirt", "tshirt", "lmms-eval"),
        ("a black dog", "dog", "vicrop"),
        ("cat", "dog", ""),
    ],
)
def test_gqa_in_every_code_base(answer: str, label: str, right: str) -> None:
    assert [name for name, scorer in GQA.items() if scorer(answer, label)] == right.split()


def test_vstar_choice() -> None:
    question = (
        "What is the colour of the hat?\nThe hat is red.\nThe hat is blue.\nThe hat is grey.\nAnswer with the letter."
    )
    assert vstar_choice(question, "It is blue.") == "B"
    assert vstar_choice(question, "") == "A"  # equals: the first
    with pytest.raises(UsageError, match="no option"):
        vstar_choice("What?\nAnswer.", "red")
    with pytest.raises(UsageError, match="30 options"):
        vstar_choice("\n".join(["What?"] + ["x"] * 30 + ["Answer."]), "x")


def test_vstar_needs_four_copies_of_the_letter() -> None:
    letters = ["A"] * 4
    label = [normalise(letter, "vicrop") for letter in letters]
    assert label == [""] * 4  # an article: equal on both sides all the same
    assert vicrop_accuracy(normalise("A", "vicrop"), label) == 1
    assert vicrop_accuracy(normalise("B", "vicrop"), label) == 0


def test_closest_takes_the_first_of_equals() -> None:
    assert closest("NO", ("yes", "no")) == 0
    assert closest("Nope", ("yes", "no")) == 1
