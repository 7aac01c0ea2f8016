"""Find COCO's objects in a text, as CHAIR does: with the original word table, or with our own.

Both tables go through the same steps: lower case, sentences, tokens, a normal form for each token, phrases, and a node
word (the category) for each word that is left. With the original table the normal form is pattern.en's singular, which
turns "bus" into "bu", and phrases have two words; with ours it undoes the plurals of the table's own words, phrases are
as long as they are, and their words may be joined by hyphens.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError
from vlmfix.evals.inputs import read_source
from vlmfix.extras import need
from vlmfix.world.categories import CATEGORIES

Phrase = tuple[str, ...]

HYPHENS = "-_\N{SOFT HYPHEN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{MINUS SIGN}"
"""What joins words with our own table."""
DASHED = re.compile(r"(\w+)[\N{FIGURE DASH}\N{EN DASH}](\w+)")
"""Words with a short dash between them: a hyphen in a phrase, else what parts a sentence."""
PARTING = re.compile(
    "[/|+=\N{MIDDLE DOT}\N{BULLET}\N{HORIZONTAL ELLIPSIS}\N{ZERO WIDTH SPACE}\N{EM DASH}\N{HORIZONTAL BAR}]|-{2,}"
)
"""What parts words with our own table, and not for every version of the tokenizer."""
APOSTROPHE = re.compile(
    r"(?<=\w)[\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}\N{FULLWIDTH APOSTROPHE}](?=\w)"
)
"""Apostrophes within a word; the same mark at its end is a closing quotation mark as well."""
AROUND = "*_#~`'\"\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
"""Marks around a word, such as those of Markdown."""


@dataclass(frozen=True)
class Token:
    """One token of a text.

    Attributes:
        text: In lower case, as the tokenizer gives it: a double quote is two marks.
        start: Where it begins in the raw text.
        end: Where it ends, exclusive.
        sentence: Number of its sentence, from 0.
    """

    text: str
    start: int
    end: int
    sentence: int


@dataclass(frozen=True)
class Mention:
    """One object that a text names.

    Attributes:
        word: What the table knows, such as "puppy".
        node: The category, such as "dog".
        start: Where it begins in the raw text.
        end: Where it ends, exclusive: ``text[start:end]`` are the words as written.
        sentence: Number of its sentence, from 0.
    """

    word: str
    node: str
    start: int
    end: int
    sentence: int


@dataclass(frozen=True)
class Reading:
    """What CHAIR sees in a text.

    Attributes:
        mentions: In the order of the text, repeats included.
        tokens: Number of tokens after phrases became one; CHAIR's length of a caption.
    """

    mentions: tuple[Mention, ...]
    tokens: int


@dataclass(frozen=True)
class Colours:
    """Fruits that are first of all colours, and beside which words they are the fruit; ``words.toml`` says how."""

    words: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Words:
    """A word table, ready to read with.

    Attributes:
        normal: Normal form of a token.
        phrases: For tokens in normal form the word that they stand for together; a word that has no node is how a
            phrase hides its parts. The longest phrase wins, from left to right.
        nodes: For each word of the table its category.
        colours: Which words may be colours.
        joints: Marks that join the words of a phrase into one token; a joined token that is no phrase, such as
            "dog-friendly", stays whole, and names nothing.
        spaced: Marks of a text that are read as others of the same length, such as a long dash as a blank.
    """

    normal: Callable[[str], str]
    phrases: Mapping[Phrase, str]
    nodes: Mapping[str, str]
    colours: Colours = Colours()
    joints: str = ""
    spaced: Callable[[str], str] = str

    def read(self, text: str) -> Reading:
        """Find every mention in a text."""
        raw = tokens(self.spaced(text))
        merged = list(self._merge([self._parts(token.text) for token in raw]))  # word, first token, last token
        length = len(merged)
        if {"toilet", "seat"} <= {word for word, _, _ in merged}:
            merged = [entry for entry in merged if entry[0] != "seat"]  # the seat of a toilet is no chair
        return Reading(
            tuple(
                Mention(word, self.nodes[word], raw[first].start, raw[last].end, raw[first].sentence)
                for word, first, last in merged
                if word in self.nodes and not (word in self.colours.words and self._is_colour(raw, first))
            ),
            length,
        )

    def nodes_of(self, texts: Iterable[str]) -> set[str]:
        """Categories that any of several texts names."""
        return {mention.node for text in texts for mention in self.read(text).mentions}

    def _parts(self, token: str) -> Phrase:
        """A token's words in normal form: one, unless hyphens join several."""
        for joint in self.joints:
            token = token.replace(joint, " ")
        words = token.split() if self.joints else [token]
        return tuple(filter(None, map(self.normal, words))) or (token,)

    def _merge(self, parts: Sequence[Phrase]) -> Iterable[tuple[str, int, int]]:
        longest = max(map(len, self.phrases), default=1)
        at = 0
        while at < len(parts):
            for size in range(min(longest, len(parts) - at), 0, -1):
                phrase = tuple(chain.from_iterable(parts[at : at + size]))
                word = self.phrases.get(phrase) if len(phrase) > 1 else None
                if word is not None:
                    break
            else:
                word, size = self._alone(parts[at]), 1
            yield word, at, at + size - 1
            at += size

    def _alone(self, parts: Phrase) -> str:
        """What a token says that is part of no phrase: its word, or that which its words give without hyphens."""
        return parts[0] if len(parts) == 1 else self.normal("".join(parts))

    def _is_colour(self, raw: Sequence[Token], at: int) -> bool:
        around = [token.text for token in raw]
        if around[at] not in self.colours.words:
            return False  # the plural
        if at == 0 or around[at - 1] not in self.colours.before:
            return True
        following = around[at + 1 :] or ["."]
        if following[0] in ("and", "or"):
            return len(following) == 1 or following[1] not in self.colours.joined
        return following[0][0].isalpha() and following[0] not in self.colours.after


def tokens(text: str) -> list[Token]:
    """Sentences by an untrained Punkt splitter, words by NLTK's tokenizer; needs no downloaded data."""
    splitter, tokenizer = _nltk()
    lowered = text.lower()
    origin = [at for at, letter in enumerate(text) for _ in letter.lower()]  # a letter can become two
    origin.append(len(text))
    found = []
    for number, (start, end) in enumerate(splitter.span_tokenize(lowered)):
        at = start
        for token in tokenizer.tokenize(lowered[start:end]):
            while lowered[at].isspace():
                at += 1
            # the tokenizer writes " as two marks; all else it leaves as it stands
            size = 1 if token in ("``", "''") and lowered[at] == '"' else len(token)
            found.append(Token(token, origin[at], origin[at + size], number))
            at += size
    return found


@cache
def words_of(synonyms: str | None) -> Words:
    """The original's rules with a table, or our own table for None; made once.

    Raises:
        DataError: The text is no such table.
    """
    return own_words() if synonyms is None else original_words(synonyms)


def read_synonyms(path: Path) -> str:
    """A table in the format of the original ``synonyms.txt``, checked.

    Raises:
        DataError: The file cannot be read, or is no such table.
    """
    text = read_source(path).text
    try:
        words_of(text)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from error
    return text


@cache
def own_words() -> Words:
    """Our own table, ``words.toml``.

    It differs from the original on purpose: "bus", "ties" and "hair dryer" are objects; "toilet paper", "train
    station" and the colour orange are none; words that a picture without the category can deserve ("desk", "computer",
    "glass") are in no row. Figures made with it are not comparable with figures made with the original.
    """
    table = tomllib.loads((files("vlmfix.evals.benchmarks") / "words.toml").read_text(encoding="utf-8"))
    plurals: dict[str, str] = {}
    phrases: dict[Phrase, str] = {}
    nodes: dict[str, str] = {}

    def add(entry: str) -> str:
        singular, *more = _numbers(entry)
        if len(_split(singular)) == 1:
            plurals.update(dict.fromkeys(more, singular))
        else:
            phrases.update(dict.fromkeys(map(_split, (singular, *more)), singular))
        return singular

    for name, entries in table["objects"].items():
        words = [add(entry) for entry in entries]
        for word in words if name in words else [add(name), *words]:
            nodes[word] = name
    for name in table["young"]["animals"]:
        for word in [word for word, node in nodes.items() if node == name]:
            phrases |= {(young, *_split(word)): word for young in table["young"]["words"]}
    for entry in table["nothing"]["phrases"]:
        add(entry)

    def normal(token: str) -> str:
        bare = token.strip(AROUND)
        return plurals.get(bare, bare)

    phrases = {tuple(map(normal, phrase)): word for phrase, word in phrases.items()}
    colours = Colours(**{name: frozenset(found) for name, found in table["colours"].items()})

    def hyphenated(words: re.Match[str]) -> str:
        phrase = tuple(normal(word.lower()) for word in words.groups())
        return ("-" if phrase in phrases else " ").join(words.groups())

    def spaced(text: str) -> str:
        return DASHED.sub(hyphenated, APOSTROPHE.sub("'", PARTING.sub(lambda mark: " " * len(mark[0]), text)))

    return Words(normal, phrases, nodes, colours, HYPHENS, spaced)


def original_words(text: str) -> Words:
    """The original scorer's rules with a table in its own format.

    Args:
        text: Content of ``synonyms.txt``: a row for each category, words apart by commas, the category first. One
            space after a comma is passed over; a second belongs to the word, which then never matches.

    Raises:
        DataError: The text is no such table.
    """
    lines = [line.strip() for line in text.split("\n")]
    rows = [[word.removeprefix(" ") for word in line.split(",")] for line in lines if line]
    if not rows:
        raise DataError("the table of synonyms is empty", "give the original scorer's synonyms.txt")
    nodes: dict[str, str] = {}
    for row in rows:
        for word in row:
            if word and nodes.setdefault(word, row[0]) != row[0]:
                raise DataError(
                    f"the table of synonyms has {word!r} in the rows of {nodes[word]!r} and {row[0]!r}",
                    "put each word into one row",
                )
    return Words(_singular, _original_phrases(nodes), nodes)


def _original_phrases(nodes: Mapping[str, str]) -> dict[Phrase, str]:
    """The original's pairs: every entry of two words but one, what hides a word, and rewrites."""
    pairs = {" ".join(parts) for word in nodes if len(parts := word.split()) == 2}
    found = {pair: pair for pair in (pairs - {"dining table"}) | {"home plate", "train track"}}
    animals = [category.name for category in CATEGORIES if category.supercategory == "animal"]
    found |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in [*animals, "animal", "cub"]}
    found |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
    found |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    return {tuple(pair.split()): word for pair, word in found.items()}


@cache
def _singular(token: str) -> str:
    """Singular as pattern.en has it; textblob's rules are the same but for these endings."""
    need("eval")
    from textblob.en.inflect import singularize

    if token.endswith(("collies", "doggies")):
        return token
    if token.endswith("buses"):
        return token[:-2]
    return str(singularize(token))


def _numbers(entry: str) -> list[str]:
    """The singular, and the plurals that are written out or the regular one."""
    singular, *plurals = entry.split("/")
    return [singular, *(plurals or [_plural(singular)])]


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def _split(words: str) -> Phrase:
    return tuple(token.text for token in tokens(words))


@cache
def _nltk() -> tuple[Any, Any]:
    """NLTK's splitter and tokenizer; imported here because NLTK takes a second to import."""
    need("eval")
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer(), NLTKWordTokenizer()
