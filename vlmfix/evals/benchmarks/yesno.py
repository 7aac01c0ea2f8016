"""Every published way to read yes or no out of an answer.

They differ on ordinary answers: "No." counts as no, as yes or as nothing, depending on who reads it. A `Parser` is one
reader with its rule for the answers that it cannot read; `PARSERS` has them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Flag
from typing import Literal

from vlmfix.evals.benchmarks.vqa import closest, without_punctuation

WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class Reading(Flag):
    """What is found in an answer; `BOTH` holds `YES` and `NO`."""

    NEITHER = 0
    YES = 1
    NO = 2
    BOTH = 3

    def __str__(self) -> str:
        return str(self.name).lower()


Cell = Literal["tp", "fp", "tn", "fn", ""]


@dataclass(frozen=True)
class Parser:
    """One way to read answers.

    Attributes:
        read: Finds yes, no, neither or both in an answer.
        neither: Where an answer with neither belongs: it is ``wrong`` whatever the truth is, it is ``not yes`` (a
            missed yes, but never a false one), or it is ``left out`` of precision and recall. Accuracy counts it as
            wrong each time.
    """

    read: Callable[[str], Reading]
    neither: Literal["wrong", "not yes", "left out"] = "wrong"

    def cell(self, reading: Reading, label: Reading) -> Cell:
        """Cell of the confusion matrix with yes as the positive class; empty for an answer in none of them.

        An answer with both is right, whatever the label is.

        Args:
            reading: What `read` found.
            label: The truth, `YES` or `NO`.
        """
        if label in reading:
            return "tp" if label is Reading.YES else "tn"
        if reading is Reading.NEITHER and self.neither != "wrong":
            return "fn" if label is Reading.YES and self.neither == "not yes" else ""
        return "fn" if label is Reading.YES else "fp"


def has_word(answer: str) -> bool:
    """Whether an answer has the word yes or the word no in it, in any case.

    Where it has none, a parser that says yes or no goes by a default or by part of another word.
    """
    return WORD.search(answer) is not None


def _official(answer: str) -> Reading:
    pieces = answer.partition(".")[0].replace(",", "").split(" ")
    return Reading.NO if {"No", "no", "not"} & set(pieces) else Reading.YES


def _opera(answer: str) -> Reading:
    pieces = answer.replace(".", "").replace(",", "").split(" ")
    negated = any(piece in {"No", "not", "no", "NO"} or piece.endswith("n't") for piece in pieces)
    return Reading.NO if negated else Reading.YES


def _vcd(answer: str) -> Reading:
    lower = answer.lower()
    return (Reading.YES if "yes" in lower else Reading.NEITHER) | (Reading.NO if "no" in lower else Reading.NEITHER)


def _lmms_eval(answer: str) -> Reading:
    return {"yes": Reading.YES, "no": Reading.NO}.get(answer.strip().lower(), Reading.NEITHER)


def _vlmevalkit(answer: str) -> Reading:
    words = set(without_punctuation(answer.lower()).split())
    if ("yes" in words) is ("no" in words):
        return Reading.NEITHER
    return Reading.YES if "yes" in words else Reading.NO


def _first_found(text: str) -> Reading:
    if "yes" in text:
        return Reading.YES
    return Reading.NO if "no" in text else Reading.NEITHER


def _mme(answer: str) -> Reading:
    return _first_found(answer.lower()[:4])


def _dash_b(answer: str) -> Reading:
    return _first_found(answer.lower())


def _vicrop(answer: str) -> Reading:
    return (Reading.YES, Reading.NO)[closest(answer, ("yes", "no"))]


PARSERS: Mapping[str, Parser] = {
    "official": Parser(_official),
    "opera": Parser(_opera),
    "vcd": Parser(_vcd),
    "lmms-eval": Parser(_lmms_eval, neither="left out"),
    "vlmevalkit": Parser(_vlmevalkit, neither="not yes"),
    "mme": Parser(_mme, neither="left out"),
    "dash-b": Parser(_dash_b),
    "vicrop": Parser(_vicrop),
}
"""By the code base that it comes from: POPE's own and LLaVA's, OPERA's (also PAI's, VISTA's and SPIN's) and so on."""
