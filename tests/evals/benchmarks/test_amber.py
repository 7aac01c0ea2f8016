"""AMBER: the published digits of its questions, and its descriptions worked out by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nltk
import numpy as np
import pytest

from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks import amber, nouns
from vlmfix.evals.benchmarks.amber import Amber, read, rules
from vlmfix.evals.benchmarks.nouns import Described, Language, Vocabulary, installed_language
from vlmfix.evals.task import Sample

# questions of the official files by group: answer yes, answer no
QUESTIONS = {
    "existence": (0, 4924),
    "state": (2382, 2382),
    "number": (1036, 1036),
    "action": (396, 396),
    "relation": (975, 689),
}
ALL = tuple({group: counts[label] for group, counts in QUESTIONS.items()} for label in (0, 1))


def question(name: str, group: str, label: str) -> Sample:
    return Sample(id=name, image="AMBER_1.jpg", prompt="?", target={"label": label}, group=group)


def answered(no_to_yes: dict[str, int], no_to_no: dict[str, int], yes: str = "Yes", no: str = "No") -> dict[str, Any]:
    """Results when "No" answers so many questions of either kind, and "Yes" the others."""
    task, samples, answers = Amber(), [], []
    for group, counts in QUESTIONS.items():
        for label, count, times in zip(
            ("yes", "no"), counts, (no_to_yes.get(group, 0), no_to_no.get(group, 0)), strict=True
        ):
            samples += [question(f"{group}{label}{number}", group, label) for number in range(count)]
            answers += [no] * times + [yes] * (count - times)
    return task.results(list(zip(samples, task.judge_all(samples, answers), strict=True)))


def digits(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(row[name] for name in ("accuracy", "precision", "recall", "f1"))


def test_always_no() -> None:
    found = answered(*ALL)
    rows = found["discriminative"]
    assert digits(rows["all"]) == (66.3, 66.3, 100.0, 79.7)
    assert digits(rows["existence"]) == (100, 100, 100, 100.0)
    assert digits(rows["attribute"]) == (50, 50, 100, 66.7)
    assert [row["n"] for row in rows.values()] == [14216, 4924, 7628, 4764, 2072, 792, 1664]
    assert list(rows) == ["all", "existence", "attribute", "state", "number", "action", "relation"]
    assert found["amber_score"] is None


def test_no_to_every_third() -> None:
    """No where (id - 1) is divisible by 3: counts of No by part from the ids, split as the published digits imply."""

    def thirds(first: int, last: int) -> int:
        return sum((number - 1) % 3 == 0 for number in range(first, last + 1))

    attribute, existence, relation = thirds(1005, 8632), thirds(8633, 13556), thirds(13557, 15220)
    assert (attribute, existence, relation) == (2543, 1641, 555)
    # of the attribute questions 1272 noes are right and of the state ones 804 of 1578: no other counts give the digits
    right = {"existence": existence, "state": 804, "number": 348, "action": 120, "relation": 219}
    wrong = {"state": 1578 - 804, "number": 358, "action": 139, "relation": relation - 219}
    assert sum(right[group] + wrong[group] for group in ("state", "number", "action")) == attribute
    rows = answered(wrong, right)["discriminative"]
    assert digits(rows["all"]) == (44.4, 66.1, 33.2, 44.2)
    assert digits(rows["existence"]) == (33.3, 100.0, 33.3, 49.9)
    assert digits(rows["attribute"]) == (50.0, 50.0, 33.4, 40.0)
    assert digits(rows["state"]) == (50.6, 51.0, 33.8, 40.7)


def test_answers_that_are_not_exactly_yes_or_no_score_nothing() -> None:
    rows = answered(*ALL, no="No.")["discriminative"]
    assert all(digits(row) == (0.0, 0.0, 0.0, 0.0) for row in rows.values())
    assert all(row["unparsed"] == row["n"] for row in rows.values())


@pytest.mark.parametrize(
    ("parser", "answer", "right", "parsed"),
    [
        ("exact", "No", True, True),
        ("exact", "No.", False, False),
        ("exact", "no", False, False),
        ("exact", " No", False, False),
        ("official", "No, there is none.", True, True),
        ("official", "Yes", False, True),
    ],
)
def test_parsers(parser: str, answer: str, right: bool, parsed: bool) -> None:
    verdict = Amber(parser=parser).judge(question("1", "state", "no"), answer)
    assert (verdict.right, verdict.parsed) == (right, parsed)


def test_an_unknown_parser() -> None:
    with pytest.raises(UsageError, match="no yes/no parser is called 'gpt'"):
        Amber(parser="gpt")


WORDS = Vocabulary(
    association={
        "dog": ["puppy", "animal"],
        "cat": ["animal", "kitten"],
        "ball": [],
        "tree": ["forest"],
        "frisbee": ["disc"],
        "light": [],
    },
    safe=frozenset({"light"}),
)
ALIKE = {("puppy", "dog"), ("disc", "ball"), ("forest", "tree"), ("kitten", "cat"), ("disc", "frisbee")}


def similarity(one: str, other: str) -> float:
    return 0.81 if (one, other) in ALIKE or one == other else 0.8


LANGUAGE = Language(nouns=str.split, similarity=similarity)


@pytest.mark.parametrize(
    ("text", "truth", "hallu", "kept", "hallucinated", "covered", "expected"),
    [
        ("dog dog sky", ["dog", "ball"], ["cat"], "dog dog", "", 1, 0),  # sky is unknown; repeats are kept
        ("puppy", ["dog", "dog"], ["cat"], "puppy", "", 1, 0),  # a related word marks its own object, the first one
        ("animal", ["dog", "cat"], ["tree"], "animal", "", 1, 0),  # the first of two objects that share it
        ("animal", ["ball"], ["cat", "dog"], "animal", "animal", 0, 1),  # of the expected ones, too, the first
        ("light", ["dog"], ["light"], "light", "", 0, 0),  # safe: a mention, and nothing else
        ("tree frisbee", ["dog"], ["tree"], "tree frisbee", "tree frisbee", 0, 1),
        ("disc", ["ball"], ["cat"], "disc", "", 1, 0),  # similar to an object that is there
        ("disc", ["ball"], ["frisbee"], "disc", "", 1, 1),  # and related to one that is not: both are marked
        ("kitten", ["dog"], ["ball", "tree"], "kitten", "kitten", 0, 0),  # exactly 0.8 is not similar
        ("", ["dog"], ["cat"], "", "", 0, 0),
    ],
)
def test_descriptions_by_hand(
    text: str, truth: Sequence[str], hallu: Sequence[str], kept: str, hallucinated: str, covered: int, expected: int
) -> None:
    found = WORDS.describe(text, truth, hallu, LANGUAGE)
    assert found == Described(tuple(kept.split()), tuple(hallucinated.split()), covered, expected)


def test_a_noun_may_mark_two_expected_objects() -> None:
    language = Language(str.split, lambda one, other: float((one, other) == ("disc", "tree")))
    assert WORDS.describe("disc", ["dog"], ["tree", "frisbee"], language).expected == 2


def test_objects_without_association() -> None:
    with pytest.raises(DataError, match="association list has no car, bus"):
        WORDS.describe("", ["car", "dog", "bus"], [], LANGUAGE)


def description(name: str, truth: list[str], hallu: list[str]) -> Sample:
    return Sample(id=name, image=f"{name}.jpg", prompt="?", target={"truth": truth, "hallu": hallu}, group="generative")


@pytest.fixture
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amber, "installed_language", lambda: LANGUAGE)


@pytest.fixture
def task() -> Amber:
    return Amber(association=WORDS.association, safe=sorted(WORDS.safe))


@pytest.mark.usefixtures("english")
def test_both_parts_together(task: Amber) -> None:
    samples = [
        description("a", ["dog", "ball"], ["cat"]),
        description("b", ["dog"], ["tree", "cat"]),
        description("c", ["tree"], ["cat"]),
        question("1", "existence", "no"),
        question("2", "relation", "yes"),
        question("3", "relation", "no"),
    ]
    answers = ["dog dog light", "tree dog", "frisbee", "No", "Yes", "Yes"]
    judged = list(zip(samples, task.judge_all(samples, answers), strict=True))
    assert [verdict.right for _, verdict in judged] == [None, None, None, True, True, False]
    found = task.results(judged)
    # mentions 3 + 2 + 1, of them tree and frisbee hallucinated; 2 of 4 objects covered; 1 of 4 expected ones named
    assert found["generative"] == {"chair": 33.3, "cover": 50.0, "hal": 66.7, "cog": 25.0, "n": 3}
    assert digits(found["discriminative"]["all"]) == (66.6, 99.9, 50.0, 66.6)
    assert digits(found["discriminative"]["relation"]) == (50.0, 0.0, 0.0, 0.0)
    assert "attribute" not in found["discriminative"]
    assert found["amber_score"] == round((100 - 33.3 + 66.6) / 2, 1)
    figures = task.figures(task.tally(judged).sums())
    expected = {
        "generative/chair": 2 / 6,
        "generative/cover": 2 / 4,
        "generative/hal": 2 / 3,
        "generative/cog": 1 / 4,
        "generative/length": 2,
        "existence/accuracy": 1,
        "all/accuracy": 2 / 3,
        "all/precision": 1,
        "all/recall": 1 / 2,
        "all/f1": 2 / 3,
        "all/no_ratio": 1 / 3,
        "amber_score": (1 - 2 / 6 + 2 / 3) / 2,
    }
    assert {name: float(figures[name]) for name in expected} == pytest.approx(expected)
    assert np.isnan(figures["relation/precision"])
    details = task.details(judged, answers)
    assert details["hallucinated_words"] == [{"word": "tree", "count": 1}, {"word": "frisbee", "count": 1}]
    assert details["parsers"]["exact"] == found["discriminative"]["all"]
    assert details["parsers"]["official"]["accuracy"] == 66.6


@pytest.mark.usefixtures("english")
def test_figures_of_many_draws_at_once(task: Amber) -> None:
    samples = [description("a", ["dog"], ["cat"]), question("1", "state", "no"), question("2", "action", "no")]
    judged = list(zip(samples, task.judge_all(samples, ["tree", "No", "Yes"]), strict=True))
    sums = {name: np.stack([values.sum(), 2 * values[0]]) for name, values in task.tally(judged).counts.items()}
    figures = task.figures(sums)
    assert {values.shape for values in figures.values()} == {(2,)}
    assert figures["attribute/recall"][0] == 0.5
    assert np.isnan(figures["attribute/recall"][1])


def test_options_make_an_equal_task(task: Amber) -> None:
    assert Amber(**json.loads(json.dumps(task.options()))) == task
    assert Amber(**json.loads(json.dumps(Amber().options()))) == Amber()


def test_without_language_data_the_error_names_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    installed_language.cache_clear()
    with pytest.raises(DataError, match=r"punkt_tab, NLTK's averaged_perceptron_tagger_eng, NLTK's wordnet") as caught:
        nouns.installed_language()
    assert "python -m nltk.downloader punkt_tab" in caught.value.hint


def test_language_is_put_together_from_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"Dogs": "NNS", "run": "VBP", "Rome": "NNP", "the": "DT"}
    monkeypatch.setattr(nltk, "word_tokenize", str.split)
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(word, tags.get(word, "X")) for word in words])
    lemmas = SimpleNamespace(lemmatize=lambda word: word.removesuffix("s"))
    monkeypatch.setattr(nltk.stem, "WordNetLemmatizer", lambda: lemmas)
    loaded = []

    def load(name: str) -> Any:
        loaded.append(name)
        return lambda word: SimpleNamespace(similarity=lambda other: 0.5, word=word)

    util = SimpleNamespace(is_package=lambda name: name == "en_core_web_lg")
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load, util=util))
    installed_language.cache_clear()
    try:
        language = installed_language()
        assert language.nouns("the Dogs run Rome") == ["Dog", "Rome"]
        assert language.similarity("dog", "cat") == 0.5
        assert loaded == ["en_core_web_lg"]
    finally:
        installed_language.cache_clear()


ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
    {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-relation", "truth": "yes"},
    {"id": 5, "type": "relation", "truth": "no"},
]
QUERIES = [{"id": n, "image": f"AMBER_{n}.jpg", "query": f"Query {n}?"} for n in range(1, 6)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "query").mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (folder / "query" / "query_all.json").write_text(json.dumps(QUERIES))
    (folder / "relation.json").write_text(json.dumps(WORDS.association))
    (folder / "safe_words.txt").write_text("light\nline\n")
    return folder


def test_questions_need_no_language(data: Path) -> None:
    found = read(data, data / "image", part="discriminative", suffix=" Yes or no?")
    assert [(entry.id, entry.group, entry.target) for entry in found.samples] == [
        ("2", "state", {"label": "yes"}),
        ("3", "existence", {"label": "no"}),
        ("4", "relation", {"label": "yes"}),
        ("5", "relation", {"label": "no"}),
    ]
    assert (found.samples[0].prompt, found.samples[0].image) == ("Query 2? Yes or no?", "AMBER_2.jpg")
    assert found.images == data / "image"
    assert found.about["suffix"] == " Yes or no?"
    assert json.loads(json.dumps(found.about)) == found.about


def test_files_by_dimension_below_the_repository(data: Path) -> None:
    queries = data / "query"
    (queries / "query_all.json").unlink()
    (queries / "query_discriminative-existence.json").write_text(json.dumps(QUERIES[2:3]))
    (queries / "query_discriminative-relation.json").write_text(json.dumps(QUERIES[3:]))
    found = read(data.parent, data, part="discriminative")
    assert [entry.id for entry in found.samples] == ["3", "4", "5"]
    (queries / "query_discriminative.json").write_text(json.dumps(QUERIES[1:]))
    assert len(read(data.parent, data, part="discriminative").samples) == 4


def test_descriptions_are_checked_before_the_model(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    installed_language.cache_clear()
    with pytest.raises(DataError, match="cannot be scored without"):
        read(data, data)
    monkeypatch.setattr(amber, "installed_language", lambda: LANGUAGE)
    assert [entry.group for entry in read(data, data, part="generative").samples] == ["generative"]
    assert len(read(data, data).samples) == 5
    (data / "relation.json").write_text('{"dog": ["puppy"]}')
    with pytest.raises(DataError, match="association list has no cat"):
        read(data, data)
    (data / "relation.json").unlink()
    with pytest.raises(DataError, match=r"has no relation\.json"):
        read(data, data)


def test_word_lists_become_the_tasks_options(data: Path) -> None:
    found = rules(data, parser="official")
    assert found == Amber(parser="official", association=WORDS.association, safe=["light", "line"])
    (data / "relation.json").write_text("[]")
    with pytest.raises(DataError, match="is no association list"):
        rules(data)


@pytest.mark.parametrize(
    ("name", "document", "problem"),
    [
        ("annotations.json", [*ANNOTATIONS, ANNOTATIONS[0]], "id 1 is no whole number, or stands twice"),
        ("annotations.json", [{"id": 1, "type": "new", "truth": "no"}], "type is 'new'"),
        ("annotations.json", [{"id": 2, "type": "relation", "truth": "No"}], "truth is 'No'"),
        ("annotations.json", [{"id": 1, "type": "generative", "truth": ["a"]}], "must be lists of words"),
        ("annotations.json", [{"id": 1, "type": "generative"}], "has no truth"),
        ("annotations.json", ANNOTATIONS[:3], "2 ids of queries are not in .*: 4, 5"),
        ("query/query_all.json", [{"id": 1, "query": "?"}], "has no image"),
        ("query/query_all.json", [QUERIES[0] | {"id": "1"}, QUERIES[0] | {"id": [1]}], r"2 ids of .*: 1, \[1\]"),
        ("query/query_all.json", [*QUERIES, QUERIES[2] | {"query": "x"}], "id 3 is asked twice"),
        ("query/query_all.json", QUERIES[:1], "no query of the part 'discriminative'"),
        ("query/query_all.json", [], "no query of the part"),
    ],
)
def test_wrong_shapes(data: Path, name: str, document: Any, problem: str) -> None:
    (data / name).write_text(json.dumps(document))
    with pytest.raises(DataError, match=problem):
        read(data, data, part="discriminative")


def test_missing_files_and_parts(data: Path) -> None:
    with pytest.raises(UsageError, match="no part 'half'"):
        read(data, data, part="half")
    (data / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"has no annotations\.json"):
        read(data, data)
    with pytest.raises(DataError, match=r"has no annotations\.json"):
        read(data / "query", data)
