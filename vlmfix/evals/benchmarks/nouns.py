"""AMBER's nouns: which objects a description names that are there, that are not, and that people would expect.

The rules are here; tagging, lemmas and word similarity come from outside, in a `Language`. The published scores were
made with NLTK's tagger and WordNet and with spaCy's large English vectors, which `installed_language` loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from vlmfix.errors import DataError
from vlmfix.extras import need

SIMILAR = 0.8
"""Words are taken for one another above this."""
VECTORS = "en_core_web_lg"
RESOURCES = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")


@dataclass(frozen=True, eq=False)
class Language:
    """What AMBER's rules need to know about English.

    Attributes:
        nouns: Lemmas of the nouns of a text, in order, repeats included.
        similarity: Of two words, in [-1, 1].
    """

    nouns: Callable[[str], list[str]]
    similarity: Callable[[str, str], float]


@dataclass(frozen=True)
class Described:
    """What is in a description.

    Attributes:
        kept: Its nouns that AMBER knows, repeats included.
        hallucinated: Those of them that are not in the picture.
        covered: How many objects of the picture it names.
        expected: How many objects that people would expect, and that are not there, it names.
    """

    kept: tuple[str, ...]
    hallucinated: tuple[str, ...]
    covered: int
    expected: int


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """AMBER's word lists.

    Attributes:
        association: For each object the words that speak of it.
        safe: Words that are never held against a description.
    """

    association: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    def known(self) -> frozenset[str]:
        """Every word that counts as a mention."""
        return frozenset(self.association).union(*self.association.values())

    def describe(self, text: str, truth: Sequence[str], hallu: Sequence[str], language: Language) -> Described:
        """Compare a description with what is in the picture.

        Args:
            text: The description.
            truth: Objects of the picture; one that is listed twice counts twice.
            hallu: Objects that people would expect and that are not there.
            language: English.

        Raises:
            DataError: An object is not in the association list.
        """
        there, dreamt = self._entries(truth), self._entries(hallu)
        known = self.known()
        kept = [noun for noun in language.nouns(text) if noun in known]
        covered: set[int] = set()
        expected: set[int] = set()
        hallucinated = []
        for noun in kept:
            if noun in self.safe:
                continue
            if (at := _same(noun, there)) is not None:
                covered.add(at)
                continue
            # the same word and a similar one are both looked for, and may mark two objects
            expected |= {at for at in (_same(noun, dreamt), _alike(noun, dreamt, language)) if at is not None}
            if (at := _alike(noun, there, language)) is not None:
                covered.add(at)
            else:
                hallucinated.append(noun)
        return Described(tuple(kept), tuple(hallucinated), len(covered), len(expected))

    def _entries(self, objects: Sequence[str]) -> list[tuple[str, int]]:
        """Words with the number of the object that they speak of: all related ones first, then the objects."""
        lacking = [word for word in objects if word not in self.association]
        if lacking:
            raise DataError(
                f"the association list has no {', '.join(lacking)}",
                "give AMBER's relation.json, which belongs to the annotations",
            )
        related = [(word, at) for at, name in enumerate(objects) for word in self.association[name]]
        return [*related, *((name, at) for at, name in enumerate(objects))]


def _same(noun: str, entries: Iterable[tuple[str, int]]) -> int | None:
    return next((at for word, at in entries if word == noun), None)


def _alike(noun: str, entries: Iterable[tuple[str, int]], language: Language) -> int | None:
    return next((at for word, at in entries if language.similarity(noun, word) > SIMILAR), None)


@cache
def installed_language() -> Language:
    """English as AMBER's own script knows it; loaded once.

    Raises:
        MissingExtraError: The extra ``eval`` is not installed.
        DataError: spaCy or data are not installed; the message names all that are missing.
    """
    need("eval")
    missing = list(_missing())
    if missing:
        raise DataError(
            f"AMBER's descriptions cannot be scored without {', '.join(missing)}",
            f"pip install 'vlmfix[spacy]'; python -m spacy download {VECTORS}; "
            f"python -m nltk.downloader {' '.join(RESOURCES)}; AMBER's yes/no questions need none of them",
        )
    import nltk
    import spacy

    lemmas = nltk.stem.WordNetLemmatizer()
    document = cache(spacy.load(VECTORS))

    def nouns(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmas.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]

    @cache
    def similarity(one: str, other: str) -> float:
        return float(document(one).similarity(document(other)))

    return Language(nouns, similarity)


def _missing() -> Iterable[str]:
    """What of NLTK's data and spaCy is not there."""
    import nltk

    checks: dict[str, Callable[[], object]] = {
        "punkt_tab": lambda: nltk.word_tokenize("A dog."),
        "averaged_perceptron_tagger_eng": lambda: nltk.pos_tag(["dog"]),
        "wordnet": lambda: nltk.stem.WordNetLemmatizer().lemmatize("dogs"),
    }
    for name, check in checks.items():
        try:
            check()
        except LookupError:
            yield f"NLTK's {name}"
    try:
        import spacy
    except ImportError:
        yield f"spaCy with {VECTORS}"
    else:
        if not spacy.util.is_package(VECTORS):
            yield f"spaCy's {VECTORS}"
