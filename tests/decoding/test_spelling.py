"""Answers spelled token by token: what whole decoding gives, and nothing of a stop."""

from __future__ import annotations

import random

import pytest

from vlmfix.decoding.spelling import Spelling, Words, spelled, words_of
from vlmfix.generation import load


@pytest.fixture(scope="module", params=["tiny", "tiny-qwen"])
def tokenizer(request):
    return load(request.param, device="cpu").processor.tokenizer


def pieces(tokenizer, ids, stops=()):
    spelling, told = Spelling(tokenizer, stops), [""]
    for token in ids:
        if spelling.stopped:
            break
        spelling.add(token)
        known = len("".join(told))
        told.append(spelling.text[known : spelling.safe])
    spelling.end()
    return spelling, [*told, spelling.text[len("".join(told)) :]]


def test_joined_pieces_are_the_whole_text(tokenizer):
    dice = random.Random(0)
    special = set(tokenizer.all_special_ids)
    usual = [token for token in range(len(tokenizer)) if token not in special]
    texts = ["A cup, and a café: 日本語 👍🏽!\n\n  So it is. ", "x" * 30, " ", ""]
    samples = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    samples += [dice.choices(usual, k=dice.randint(1, 30)) for _ in range(200)]
    for ids in samples:
        spelling, told = pieces(tokenizer, ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert "".join(told) == spelling.text == whole
        assert len(spelling.starts) == len(ids)


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (["cow"], "a dog and a"),
        ([" and a co"], "a dog"),
        (["w on", "nothing"], "a dog and a co"),
        (["dog and", "and"], "a"),
        (["a"], ""),
        (["farms"], "a dog and a cow on a farm"),
        (["x", "y"], "a dog and a cow on a farm"),
    ],
)
def test_a_stop_ends_the_answer_and_nothing_of_it_is_told(tokenizer, stops, left):
    ids = tokenizer.encode("a dog and a cow on a farm", add_special_tokens=False)
    spelling, told = pieces(tokenizer, ids, stops)
    assert "".join(told) == spelling.text == left
    assert spelling.stopped == (left != "a dog and a cow on a farm")


def test_a_beginning_of_a_stop_waits(tokenizer):
    ids = tokenizer.encode("a dog and a cat", add_special_tokens=False)
    spelling = Spelling(tokenizer, ["dog and a cow"])
    for token in ids[:-1]:
        spelling.add(token)
    assert (spelling.safe, spelling.text) == (1, "a dog and a")
    for token in ids[-1:]:
        spelling.add(token)
    assert spelling.safe == len(spelling.text)


def test_single_tokens_have_their_white_space(tokenizer):
    ids = tokenizer.encode("two cups and dogs", add_special_tokens=False)
    assert "".join(map(Words(tokenizer).of, ids)).strip() == "two cups and dogs"
    assert Words(tokenizer).of(tokenizer.eos_token_id) == tokenizer.eos_token


def test_words_know_their_tokens(tokenizer):
    text = "a dog, a café-bar: 日本 👍 it's"
    ids = tokenizer.encode(text, add_special_tokens=False)
    spelling = spelled(Spelling(tokenizer, []), ids)
    assert spelling.text == text
    found = list(words_of(text, spelling.starts))
    assert [text[begin:end] for begin, end, _ in found] == ["a", "dog", ",", "a", "café-bar", ":", "日本", "👍", "it's"]
    forgotten = set(range(len(ids))).difference(token for _, _, own in found for token in own)
    assert not any(tokenizer.decode(ids[token]).strip() for token in forgotten)
    for begin, end, own in found:
        assert text[begin:end] in tokenizer.decode(ids[own[0] : own[-1] + 1])
