"""Where questions stand among the tokens, and which words count."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from tests.contracts.support import PICTURES, PROMPTS, batch_of, vlm_of
from tests.tiny import TINY
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.insight import question
from vlmfix.insight.question import asked, content_words, has_tagger, rule_in_words


def words(text, rule="stop-words"):
    return [text[word.start : word.end] for word in content_words(text, rule)]


def said(vlm, batch, mask):
    """Text of the marked tokens of each row."""
    return [vlm.processor.tokenizer.decode(ids[row]) for ids, row in zip(batch["input_ids"], mask, strict=True)]


def test_words_that_say_something():
    assert words("Is there a red dog on the left of the table?") == ["red", "dog", "left", "table"]
    assert words("What is it?") == []
    assert words("What is it?", "all") == ["What", "is", "it"]
    assert words("Сколько собак?") == ["Сколько", "собак"]
    assert words("") == []


@pytest.mark.parametrize("family", TINY)
def test_questions_are_found_by_the_chat_template(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    found = asked(vlm, batch, "stop-words", last_only=False)
    assert said(vlm, batch, found.question) == list(PROMPTS)
    assert said(vlm, batch, found.content) == [PROMPTS[0], "dogonetwopictures"]


@pytest.mark.parametrize(("family", "before", "after"), [("llava", 1, 11), ("qwen2_vl", 1, 13)])
def test_the_span_is_what_fixed_offsets_give(family, before, after):
    """A newline behind LLaVA's picture, the end marker behind Qwen's; then the turn's end, in tokens of one letter."""
    vlm = vlm_of(family)
    batch = batch_of(vlm, [0])
    end = int(vlm.layout(batch).tokens[0].nonzero().max())
    columns = asked(vlm, batch, "all", last_only=False).question[0].nonzero().flatten()
    assert columns[0] == end + 1 + before
    assert batch.length - 1 - columns[-1] == after


def test_a_word_that_occurs_twice():
    vlm = vlm_of("llava")
    batch = vlm.encode(["a dog or a big dog?"], [PICTURES[0]])
    for last_only, want in ((False, "dogbigdog"), (True, "bigdog")):
        found = asked(vlm, batch, "stop-words", last_only=last_only)
        assert said(vlm, batch, found.content) == [want]
    assert found.content[0].nonzero()[-1] - found.content[0].nonzero()[0] == len("big dog") - 1


def test_rows_without_picture_or_question_have_none():
    vlm = vlm_of("llava")
    batch = vlm.encode(["a dog?", "", "a cat?"], [[], PICTURES[0], PICTURES[0]])
    found = asked(vlm, batch, "stop-words", last_only=False)
    assert found.question.any(dim=1).tolist() == [False, False, True]
    assert said(vlm, batch, found.content)[2] == "cat"


def test_inputs_from_elsewhere_must_follow_the_template():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    own = type(batch).of(dict(batch))
    assert asked(vlm, own, "all", last_only=False).question.equal(asked(vlm, batch, "all", last_only=False).question)
    cut = own.with_inputs(**{name: own[name][:, :-2] for name in ("input_ids", "attention_mask")})
    with pytest.raises(IncompatibleDecodersError, match="row 0 does not follow the model's chat template"):
        asked(vlm, cut, "all", last_only=False)


@pytest.fixture
def tagger(monkeypatch):
    """A spaCy that tags by a table."""
    tags = {"red": "ADJ", "dog": "NOUN", "is": "AUX", "barks": "VERB", "a": "DET", "saw": "NOUN"}
    loaded = []

    def load(name, disable):
        loaded.append((name, tuple(disable)))

        def tag(text):
            place, found = 0, []
            for part in text.split():
                place = text.index(part, place)
                found.append(SimpleNamespace(idx=place, text=part, pos_=tags.get(part, "X")))
                place += len(part)
            return found

        return tag

    for name in ("spacy", "en_core_web_sm"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["spacy"].load = load
    monkeypatch.setattr(question, "version", lambda name: f"{len(name)}.0")
    question._tagger.cache_clear()
    yield loaded
    question._tagger.cache_clear()


def test_the_tagger_says_which_words_count(tagger):
    assert has_tagger()
    assert words("a red dog barks is saw", "spacy") == ["red", "dog", "barks", "saw"]
    assert [word.key for word in content_words("red dog", "spacy")] == ["red (ADJ)", "dog (NOUN)"]
    assert tagger == [("en_core_web_sm", ("parser", "ner"))]
    assert rule_in_words("spacy") == "spacy 5.0, en_core_web_sm 14.0"


def test_without_the_tagger_the_rule_says_so():
    assert rule_in_words("stop-words") == "list of English function words"
    assert rule_in_words("all") == "every word"
