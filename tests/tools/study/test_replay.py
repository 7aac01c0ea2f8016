"""Captions that are replayed: what is seen and said is what the model saw and said, and a decoder's part shows."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tools.study.reasons import compared, named, reasons
from tools.study.replay import GROUPS, replayed
from tools.study.sinking import Dropping, measured
from tools.training.questions import DESCRIBE
from vlmfix.decoders import Greedy, parse
from vlmfix.errors import UsageError
from vlmfix.generation import load
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def vlm():
    return load("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(render([scene(9, 1)])[0].permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def said(vlm, picture):
    return list(vlm.generate([picture], DESCRIBE[0], max_new_tokens=24)[0].ids)


def test_a_plain_replay_says_what_was_said(vlm, picture, said):
    plain = replayed(vlm, [picture], said, Greedy())
    assert plain.probabilities.argmax(-1).tolist() == said
    assert plain.attention.shape == (len(said), 8, len(GROUPS))
    torch.testing.assert_close(plain.attention.sum(-1), torch.ones(len(said), 8), atol=1e-4, rtol=0)
    assert plain.attention[0, :, GROUPS.index("answer")].max() == 0


def test_what_a_decoder_does_shows_in_attention_and_probabilities(vlm, picture, said):
    plain, silent = (replayed(vlm, [picture], said, parse(spec)) for spec in ("greedy", "spin:suppression=1"))
    torch.testing.assert_close(plain.probabilities, silent.probabilities, atol=1e-4, rtol=0)
    words = [named(vlm, said, list(scene(9, 1).counts()))]
    assert any(word.there for word in words[0])
    same = compared([plain], [silent], [said], words)
    assert same["tokens that would be others"] == 0
    loud = replayed(vlm, [picture], said, parse("spin:suppression=0"))
    changed = compared([plain], [loud], [said], words)
    assert changed["distance of the next token's distribution"] > 0.01
    assert sum(changed["attention"]["edited"].values()) < 0.99


def test_a_hidden_token_gets_no_attention_and_hiding_all_blinds(vlm, picture, said):
    batch = vlm.encode([DESCRIBE[0]], [[picture]])
    image = vlm.layout(batch).tokens
    blind = replayed(vlm, [picture], said, Greedy(), hidden=image)
    assert blind.attention[..., GROUPS.index("other image tokens")].max() == 0
    answers = vlm.generate([picture], DESCRIBE[0], decoder=Dropping(hidden=(image[0],)), max_new_tokens=24)
    assert list(answers[0].ids) != said


def test_a_method_that_cannot_act_says_why_and_one_that_can_says_what_it_does(vlm):
    found = reasons(vlm, [parse("var"), parse("locore")], 1, 5)
    assert "sink" in found["decoders"][parse("var").spec()]["cannot act"]
    assert found["decoders"][parse("locore").spec()]["attention"]["edited"]["answer"] > 0


def test_a_model_without_sinks_is_refused(vlm):
    with pytest.raises(UsageError, match="no sink dimension"):
        measured(vlm, 1, 5)
