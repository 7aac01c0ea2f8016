"""Relevance-weighted uncertainty: against the formula token by token, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from tests.contracts.support import PICTURES, PROMPTS, vlm_of
from vlmfix.decoders import Greedy
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.insight.grounding import grounding
from vlmfix.insight.relevance import (
    Confidence,
    OwnEmbeddings,
    TokenConfidence,
    Told,
    confidence_of,
    flags,
    similarity_of,
)
from vlmfix.request import check_settings
from vlmfix.settings import Settings

CALL = {"max_new_tokens": 6}
TOLD = ["a", "dog", "on", "the", "grass"]


def cosine(left, right):
    return sum(map(math.prod, zip(left, right, strict=True))) / (math.hypot(*left) * math.hypot(*right))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_answer_is_as_unsure_as_the_formula_says_token_by_token(family):
    vlm = vlm_of(family)
    answers = vlm.generate(PICTURES[:2], PROMPTS[:2], confidence="sar", words=True, **CALL)
    plain = vlm.generate(PICTURES[:2], PROMPTS[:2], words=True, **CALL)
    table = vlm.model.get_input_embeddings().weight.double().tolist()
    tokenizer = vlm.processor.tokenizer
    for answer, before, prompt in zip(answers, plain, PROMPTS[:2], strict=True):
        assert (answer.ids, answer.words, answer.logprob) == (before.ids, before.words, before.logprob)
        assert before.confidence is None
        said = [token for token in answer.ids if token not in tokenizer.all_special_ids]
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = [sum(column) for column in zip(*(table[token] for token in (*asked, *said)), strict=True)]
        drops = {}
        for token in said:
            rest = [number - own for number, own in zip(whole, table[token], strict=True)]
            drops[token] = 1 - abs(cosine(whole, rest))
        total = sum(drops[token] for token in said)
        tokens = answer.confidence.tokens
        for token, one in zip(answer.ids, tokens, strict=True):
            share = drops.get(token, 0.0) / total
            assert one.relevance == pytest.approx(share, rel=1e-6)
            assert one.sar == pytest.approx(-one.logprob * share, rel=1e-6)
            assert one.picture is None
        assert answer.confidence.sar == pytest.approx(sum(one.sar for one in tokens))
        assert sum(one.logprob for one in tokens) / len(tokens) == pytest.approx(answer.logprob)
        assert sum(one.entropy for one in tokens) / len(tokens) == pytest.approx(answer.entropy)
        assert "".join(answer.text[one.begin : one.end] for one in tokens) == answer.text


def test_a_word_counts_for_how_far_it_pulls_the_meaning():
    table = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.1, 0.0]])

    def tokenizer(text, add_special_tokens):
        return {"input_ids": []}

    found = OwnEmbeddings(table, tokenizer).left_out("", [0, 1, 2])
    whole = (1.1, 3.0)
    assert found.tolist() == pytest.approx([cosine(whole, rest) for rest in ((0.1, 3.0), (1.1, 0.0), (1.0, 3.0))])
    assert int(found.argmin()) == 1


def test_where_nothing_changes_the_meaning_all_tokens_count_alike():
    vlm = vlm_of("llava")
    tokenizer = vlm.processor.tokenizer
    same = OwnEmbeddings(torch.ones(len(tokenizer), 4), tokenizer)
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    sure = [(-1.0, 0.5)] * (len(ids) + 2)
    found = confidence_of(tokenizer, same, "What?", Told(str(tokenizer.decode(ids)).strip(), ids, sure))
    assert [one.relevance for one in found.tokens] == pytest.approx([1 / len(ids)] * len(ids))
    (end,) = confidence_of(tokenizer, same, "What?", Told("", [tokenizer.eos_token_id], sure)).tokens
    assert (end.begin, end.end, end.sar) == (0, 0, 1.0)


def test_grounding_is_that_of_the_plain_model_on_the_same_tokens():
    vlm = vlm_of("llava")
    (answer,) = vlm.generate(PICTURES[:1], PROMPTS[0], decoder="vcd", confidence="sar+grounding", **CALL)
    (expected,) = grounding(vlm, PICTURES[:1], PROMPTS[0], [answer.ids])
    assert [one.picture for one in answer.confidence.tokens] == pytest.approx(expected.picture.tolist())


def told(*scores):
    tokens = [
        TokenConfidence(2 * place, 2 * place + 1, -sar, 0.0, 1.0, sar, picture)
        for place, (sar, picture) in enumerate(scores)
    ]
    return Confidence(tuple(tokens))


def test_flags_want_both_doubt_and_too_little_of_the_picture():
    found = told((0.1, 0.5), (0.9, 0.1), (0.8, 0.9), (0.2, 0.2), (0.3, 0.4))
    words = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert flags(found, words, words) == [False, True, False, False, False]
    assert flags(found, words, [(2, 5)]) == [False]  # of two tokens: doubt together, what they owe on average
    assert found.of(2, 5) == (pytest.approx(1.7), pytest.approx(0.5))
    assert flags(told((0.5, None)), [(0, 1)], [(0, 1)]) == [False]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of two tiny sentence encoders: one of pairs, one whose means are compared; and one of two classes."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("encoders")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", *TOLD]
    (place / "vocab.txt").write_text("\n".join(words))
    small = {"vocab_size": len(words), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 8, "max_position_embeddings": 32}
    models = {
        "pairs": BertForSequenceClassification(BertConfig(**small, num_labels=1)),
        "means": BertModel(BertConfig(**small)),
        "classes": BertForSequenceClassification(BertConfig(**small, num_labels=2)),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
        BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place / name)
    return place


@pytest.mark.parametrize("kind", ["pairs", "means"])
def test_a_sentence_encoder_reads_the_text_without_each_token(encoders, kind):
    class Tokenizer:
        @staticmethod
        def decode(ids, skip_special_tokens):
            return " ".join(TOLD[token] for token in ids)

    found = similarity_of(str(encoders / kind), torch.zeros(1, 1), Tokenizer()).left_out("what", range(5))
    read = BertTokenizerFast.from_pretrained(encoders / kind)
    texts = [f"what {' '.join(word for word in TOLD if word != left)}" for left in ("", *TOLD)]
    if kind == "pairs":
        model = BertForSequenceClassification.from_pretrained(encoders / kind).eval()
        expected = [model(**read(texts[0], text, return_tensors="pt")).logits[0, 0].sigmoid() for text in texts[1:]]
    else:
        model = BertModel.from_pretrained(encoders / kind).eval()
        means = [model(**read(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
        expected = [torch.cosine_similarity(means[0], mean, dim=0) for mean in means[1:]]
    torch.testing.assert_close(found.float(), torch.stack(expected).detach(), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_measured_is_refused(encoders):
    vlm = vlm_of("llava")
    for options in ({"num_beams": 2}, {"static_cache": True}, {"decoder": "beam"}):
        with pytest.raises(IncompatibleDecodersError, match="nobody knows"):
            vlm.generate(PICTURES[:1], PROMPTS[0], confidence="sar", **options)
    with pytest.raises(UsageError, match="confidence='sure'"):
        vlm.generate(PICTURES[:1], PROMPTS[0], confidence="sure")
    with pytest.raises(UsageError, match="similarity is given, and no confidence"):
        vlm.generate(PICTURES[:1], PROMPTS[0], similarity="somewhere")
    with pytest.raises(UsageError, match="similarity is given, and no confidence"):
        check_settings(Greedy(), Settings(similarity="somewhere"))
    for similarity, reason in (
        (encoders / "none", "cannot be loaded"),
        (encoders / "classes", "tells 2 classes apart"),
    ):
        with pytest.raises(UsageError, match=reason):
            vlm.generate(PICTURES[:1], PROMPTS[0], confidence="sar", similarity=str(similarity), max_new_tokens=1)
