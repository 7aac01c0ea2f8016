"""A name that is gone is never taken for a value that is None."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.contracts.support import batch_of, picture, plain, vlm_of
from vlmfix.errors import UpstreamError
from vlmfix.upstream import names
from vlmfix.upstream.names import ModelNames, TextNames, hidden
from vlmfix.upstream.versions import say_once


class Renamed(nn.Module):
    def forward(self, input_ids, attention_mask, position_ids, kv_store, mm_encoder_outputs=None, inputs_embeds=None):
        """Takes a cache under a name that nobody knows."""


def test_an_unknown_name_is_refused_with_class_and_value():
    for kind in (ModelNames, TextNames):
        with pytest.raises(UpstreamError, match=r"Renamed.forward takes no cache or past_key_values.*the cache"):
            kind.of(Renamed())


def test_names_are_those_of_the_forward_under_its_decorators():
    vlm = vlm_of("qwen3_vl")
    found = TextNames.of(vlm.family.decoder(vlm.model))
    assert found.cache == ModelNames.of(vlm.model).cache
    assert found.cache in names.KNOWN["cache"]
    assert None not in (found.deep, found.picture_tokens)
    llava = vlm_of("llava")
    assert TextNames.of(llava.family.decoder(llava.model)).deep is None


def test_the_residual_stream_is_found_by_place_and_by_name():
    stream = torch.zeros(1, 2, 3)
    assert hidden((stream,), {}) is stream
    assert hidden((), {"hidden_states": stream}) is stream
    for args, kwargs in (((), {"states": stream}), ((None,), {})):
        with pytest.raises(UpstreamError):
            hidden(args, kwargs)


@pytest.mark.parametrize("value", ["cache", "features", "mask"])
@pytest.mark.parametrize("decoder", ["vcd", "inter"])
def test_a_contrast_refuses_where_a_name_is_gone(value, decoder, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setitem(names.KNOWN, value, ("under_another_name",))
    with pytest.raises(UpstreamError, match="under_another_name"):
        vlm.generate([picture(1, (60, 80))], "what?", decoder=decoder, max_new_tokens=2)
    assert "forward" not in vlm.model.__dict__


@pytest.mark.parametrize("decoder", ["locore", "spin", "sgrs"])
def test_an_edit_refuses_where_its_guard_cannot_see_the_cache(decoder, monkeypatch):
    vlm = vlm_of("llava")
    monkeypatch.setitem(names.KNOWN, "cache", ("under_another_name",))
    with pytest.raises(UpstreamError, match="under_another_name"):
        vlm.generate([picture(1, (60, 80))], "what?", decoder=decoder, max_new_tokens=2)


def test_beginnings_that_can_no_longer_be_shared_are_told_once_and_the_answers_stay(monkeypatch, caplog):
    vlm = vlm_of("llava")
    shown = picture(1, (60, 80))
    ask = {"pictures": [shown, shown], "prompts": ["a cat?", "and a dog?"], "max_new_tokens": 3}
    expected = [answer.ids for answer in vlm.generate(**ask)]
    say_once.cache_clear()
    monkeypatch.setitem(names.KNOWN, "embeds", ("under_another_name",))
    for _ in range(2):
        assert [answer.ids for answer in vlm.generate(**ask)] == expected
    (record,) = caplog.records
    assert "prompts pass whole and apart, which costs time and memory: " in record.getMessage()
    say_once.cache_clear()


def test_an_argument_with_entries_for_tokens_that_nobody_knows_is_not_cut(monkeypatch, caplog):
    vlm = vlm_of("qwen3_vl")
    batch = batch_of(vlm)
    say_once.cache_clear()
    expected = plain(vlm, batch)
    monkeypatch.setitem(names.KNOWN, "deep", ("under_another_name",))
    got = vlm.generate([batch.pictures[0][0]] * 2, ["a cat?", "and a dog?"], max_new_tokens=2)
    assert len(got) == 2
    assert "deepstack" in caplog.text
    say_once.cache_clear()
    monkeypatch.undo()
    torch.testing.assert_close(plain(vlm, batch), expected)


def test_a_run_on_a_changed_transformers_ends_with_one_line_and_leaves_the_folder_clean(tmp_path, vlmfix, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        picture(number, (60, 80)).save(pictures / f"{number}.png")
    run = ("run", pictures, "--out", tmp_path / "out", "--decoder", "vcd", "--max-new-tokens", 4)
    with monkeypatch.context() as changed:
        changed.setitem(names.KNOWN, "cache", ("under_another_name",))
        code, _, told = vlmfix(*run)
    assert code == 1
    assert "under_another_name" in told
    assert "pip install" in told
    assert "Traceback" not in told
    failed = tmp_path / "out" / "failed.jsonl"
    assert not failed.exists() or failed.read_text() == ""
    code, _, _ = vlmfix(*run)
    assert code == 0
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3
