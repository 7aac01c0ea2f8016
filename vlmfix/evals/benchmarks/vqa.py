"""VQA accuracy, and the ways in which answers are made alike before they are compared.

Pure functions for benchmarks with short answers: TextVQA, GQA and V*. The code bases differ in what they delete from
an answer; each `Dialect` is one of them, to the letter and with its mistakes.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from vlmfix.errors import UsageError

LABELS = 10
"""Human answers to a question of VQA and TextVQA."""

MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,\d")
PERIODS = 32
"""Periods deleted at most: all three code bases pass a flag, 32, where the number of replacements belongs."""
BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
BETWEEN_NO_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS: Mapping[str, str] = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't
    could've might've must've not've should've they've we've what've where've who've would've you've
    he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll
    there're they're what're why're you're
    he's how's somebody's someone's that's there's what's when's where's who's why's
    ma'am o'clock 'twas y'all
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
"""
FIRST_PERSON = "i'm i've i'd've she's"
"""In the others' tables these stand with a capital or as they are, which a text in lower case never meets."""


def _without_one_apostrophe(words: str) -> dict[str, str]:
    """What each word looks like with any one of its apostrophes left out, and the word."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in words.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }


CONTRACTIONS = _without_one_apostrophe(CONTRACTED) | {
    "somebody'd": "somebodyd"  # the wrong way round in every copy of the table
}


@dataclass(frozen=True)
class Dialect:
    """How a code base makes an answer comparable.

    Attributes:
        before: What it does to the text first.
        period: The periods that it deletes.
        contractions: Words that get their apostrophe back.
    """

    before: Callable[[str], str]
    period: re.Pattern[str]
    contractions: Mapping[str, str]


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _m4c_words(text: str) -> str:
    return _stripped(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


DIALECTS: Mapping[str, Dialect] = {
    "m4c": Dialect(_m4c_words, BEFORE_NO_DIGIT, CONTRACTIONS | _without_one_apostrophe(FIRST_PERSON)),
    "vlmevalkit": Dialect(_stripped, BETWEEN_NO_DIGITS, CONTRACTIONS),
    "vicrop": Dialect(str, BEFORE_NO_DIGIT, CONTRACTIONS),
}
"""``m4c`` is LLaVA's and lmms-eval's."""


def normalise(text: str, dialect: str = "m4c") -> str:
    """Make an answer comparable: no punctuation, lower case, digits for number words, no articles.

    Args:
        text: An answer of a model or of a person.
        dialect: One of `DIALECTS`.

    Raises:
        UsageError: The dialect is unknown.
    """
    if dialect not in DIALECTS:
        raise UsageError(f"no VQA dialect is called {dialect!r}", f"use one of: {', '.join(DIALECTS)}")
    rules = DIALECTS[dialect]
    words = without_punctuation(rules.before(text), rules.period).lower().split()
    kept = [NUMBERS.get(word, word) for word in words]
    return " ".join(rules.contractions.get(word, word) for word in kept if word not in ARTICLES)


def without_punctuation(text: str, period: re.Pattern[str] = BETWEEN_NO_DIGITS) -> str:
    """Delete or blank 21 punctuation marks, then delete periods.

    A mark is deleted where it stands beside a space anywhere in the text, or where the text has a comma between digits;
    otherwise a space takes its place.

    Args:
        text: Any text.
        period: The periods to delete; of these the first 32 are.
    """
    found = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or DIGIT_COMMA.search(text) else " ")
    return period.sub("", found, count=PERIODS)


def official_accuracy(answer: str, labels: Sequence[str]) -> float:
    """VQA accuracy: for each label, a third for every match among the others, 1 at most; the mean of these.

    Args:
        answer: Normalised.
        labels: The human answers, normalised; at least one.

    Returns:
        In [0, 1].

    Raises:
        UsageError: There is no label.
    """
    if not labels:
        raise UsageError("VQA accuracy needs labels, there are none", "give the human answers")
    matches = sum(label == answer for label in labels)
    return sum(min(1.0, (matches - (label == answer)) / 3) for label in labels) / len(labels)


def closed_accuracy(matches: int) -> float:
    """What `official_accuracy` is for ten labels of which ``matches`` equal the answer, in [0, 1].

    Raises:
        UsageError: There cannot be so many matches.
    """
    if not 0 <= matches <= LABELS:
        raise UsageError(f"{matches} matches among {LABELS} labels", f"give 0 to {LABELS}")
    return min(10, 3 * matches) / 10


def vicrop_accuracy(answer: str, labels: Sequence[str]) -> float:
    """ViCrop's: 0.3 for every match, 1 at most; equal to the official one with exactly ten labels.

    Args:
        answer: Normalised.
        labels: Normalised, any number.

    Returns:
        In [0, 1].
    """
    return min(10, 3 * sum(label == answer for label in labels)) / 10


def closest(answer: str, options: Sequence[str]) -> int:
    """Number of the option that difflib finds most alike; the first one of equals.

    Raises:
        UsageError: There is no option.
    """
    if not options:
        raise UsageError("there is no option to choose from", "give one or more")
    ratios = [SequenceMatcher(None, answer, option).ratio() for option in options]
    return ratios.index(max(ratios))


def vstar_choice(question: str, answer: str) -> str:
    """Letter of the option of a V* question that a free answer is taken for, by ViCrop's rule.

    Args:
        question: First line the question, last line the instruction, the options between them.
        answer: What the model said.

    Raises:
        UsageError: The question has no options, or more than there are letters.
    """
    options = question.split("\n")[1:-1]
    if len(options) > len(string.ascii_uppercase):
        raise UsageError(
            f"a question with {len(options)} options", f"at most {len(string.ascii_uppercase)} have a letter"
        )
    return string.ascii_uppercase[closest(answer, options)]


def _bare(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


GQA: Mapping[str, Callable[[str, str], bool]] = {
    "official": lambda answer, label: answer == label,
    "llava": lambda answer, label: answer.rstrip(".").lower() == label,
    "lmms-eval": lambda answer, label: _bare(answer) == _bare(label),
    "vlmevalkit": lambda answer, label: answer.strip().lower() == label.strip().lower(),
    "vicrop": lambda answer, label: normalise(label, "vicrop") in normalise(answer, "vicrop"),
}
"""Whether an answer to a GQA question counts as right, by code base; arguments are the answer and the label."""
