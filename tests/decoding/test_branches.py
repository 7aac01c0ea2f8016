"""Branches as rows of one pass: each gives the logits of a run of its own, whatever stands beside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
import torch

from tests.attention.test_session import snapshot
from tests.contracts.support import STRONG, Forced, batch_of, close, logits, method_of, plain, vlm_of
from tests.tiny import TINY
from vlmfix.decoders import Chain, DecodingPlan, Greedy, parse
from vlmfix.decoding.branches import (
    Contrast,
    with_instruction,
    with_pixels,
    without_picture,
    without_question,
)
from vlmfix.decoding.stack import stacked
from vlmfix.errors import DataError, IncompatibleDecodersError
from vlmfix.upstream.positions import OFFSETS


@dataclass(frozen=True, eq=False, kw_only=True)
class Watched(Contrast):
    """Keeps what it is given and leaves the clean logits alone."""

    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def fuse(self, clean, others, scores):
        self.seen.append((clean.clone(), others.clone()))
        return scores


def four_branches(vlm, batch):
    return (
        without_picture(vlm, batch),
        without_question(vlm, batch),
        with_instruction(vlm, batch, "You are confused and see much that is not there."),
        with_pixels(vlm, batch, lambda pixels, owners: -pixels),
    )


class Watch(Greedy):
    """All four kinds of branch at once."""

    def plan(self, vlm, batch, layout):
        watched = Watched(branches=four_branches(vlm, batch), rows=torch.ones(batch.rows, dtype=torch.bool))
        WATCHED.append(watched)
        return DecodingPlan(contrasts=(watched,))


WATCHED: list[Watched] = []


@pytest.mark.parametrize("family", TINY)
def test_every_branch_equals_a_run_of_its_own(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    WATCHED.clear()
    clean = plain(vlm, batch)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 90, (2, 3), generator=generator)
    forced = [Forced(tokens, batch.length)]
    watched = logits(vlm, batch, Watch(), logits_processor=forced)
    close(watched, plain(vlm, batch, logits_processor=forced))
    close(watched[0], clean[0])
    seen = WATCHED[0].seen
    for number, branch in enumerate(WATCHED[0].branches):
        alone = plain(vlm, branch.batch, logits_processor=[Forced(tokens, branch.batch.length)])
        for step in range(3):
            close(seen[step][1][number], alone[step])
        if number:
            assert (alone[0] - clean[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_longer_instruction_needs_a_dynamic_cache(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    plain(vlm, batch, cache_implementation="static")  # transformers notes the cache's length on the model
    before = snapshot(vlm)
    with pytest.raises(IncompatibleDecodersError, match="the cache is static"):
        logits(vlm, batch, Watch(), cache_implementation="static")
    assert snapshot(vlm) == before


@pytest.mark.parametrize("family", TINY)
def test_the_model_is_left_as_it_was_found(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    plain(vlm, batch, steps=1)  # transformers hooks some vision towers on their first pass
    before, keys = snapshot(vlm), set(vlm.model.__dict__)
    logits(vlm, batch, Watch(), steps=2)
    assert snapshot(vlm) == before
    assert set(vlm.model.__dict__) == keys
    assert "forward" not in vlm.model.__dict__
    with pytest.raises(ZeroDivisionError), Watch().applied(vlm, batch):
        raise ZeroDivisionError
    assert snapshot(vlm) == before


def test_positions_of_the_clean_rows_survive():
    """Qwen keeps position offsets on the model; making branches must not overwrite a user's."""
    vlm = vlm_of("qwen2_5_vl")
    batch = batch_of(vlm)
    plain(vlm, batch, steps=1)
    before = getattr(vlm.model.model, OFFSETS).clone()
    with Watch().applied(vlm, batch):
        assert torch.equal(getattr(vlm.model.model, OFFSETS), before)


def test_pictures_are_encoded_once_and_shared(monkeypatch):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    calls = []
    original = vlm.model.model.get_image_features

    @functools.wraps(original)
    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(vlm.model.model, "get_image_features", counted)
    logits(vlm, batch, "inter", steps=2)
    assert len(calls) == 2  # the clean pictures, and the noise that two branches share


def test_a_wrapped_forward_of_the_user_is_kept():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    calls = []
    original = vlm.model.forward

    @functools.wraps(original)
    def mine(**kwargs):
        calls.append(1)
        return original(**kwargs)

    vlm.model.forward = mine
    try:
        logits(vlm, batch, Watch(), steps=2)
        assert vlm.model.forward is mine
    finally:
        del vlm.model.forward
    assert len(calls) == 2


def test_stacks_do_not_nest():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    contrast = Watched(branches=four_branches(vlm, batch), rows=torch.ones(2, dtype=torch.bool))
    with (
        stacked(vlm, batch, [contrast]),
        pytest.raises(IncompatibleDecodersError, match="already at work"),
        stacked(vlm, batch, [contrast]),
    ):
        pass


def test_another_number_of_rows_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with (
        parse("vcd").applied(vlm, batch) as arguments,
        pytest.raises(IncompatibleDecodersError, match="num_beams=2 makes 2 rows of each sample"),
    ):
        vlm.model.generate(**batch, **arguments, num_beams=2, max_new_tokens=2)


def test_chunked_prefill_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with pytest.raises(IncompatibleDecodersError, match="chunked prefill"):
        logits(vlm, batch, "vcd", prefill_chunk_size=8)


def test_unknown_pictures_say_what_to_do():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    foreign = type(batch).of(dict(batch))
    with pytest.raises(DataError, match=r"vlm\.encode"):
        with_instruction(vlm, foreign, "be confused")
    with pytest.raises(DataError, match=r"vlm\.encode"):
        without_picture(vlm, foreign)


def test_a_chain_of_contrasts_starts_from_the_scores_of_the_first():
    """VCD then INTER: the scores are (1+a) clean - a noised + interaction, as INTER's specification combines
    them."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    vcd, inter = parse("vcd:plausibility=0"), parse("inter:variance=0,plausibility=0")
    base = plain(vlm, batch, steps=1)
    both = logits(vlm, batch, Chain(decoders=(vcd, inter)), steps=1)
    close(
        both - base,
        (logits(vlm, batch, vcd, steps=1) - base) + (logits(vlm, batch, inter, steps=1) - base),
        1e-3,
    )


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", ["locore", "locore-post", "head-gains"])
def test_edits_of_a_chain_leave_contrast_rows_alone(family, name):
    """The clean rows change with the edit at every step; the branches' logits never do."""
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    forced = [Forced(torch.tensor([[40, 50, 60], [70, 45, 33]]), batch.length)]
    runs = []
    for method in (Greedy(), method_of(STRONG[name])):
        WATCHED.clear()
        logits(vlm, batch, Chain(decoders=(method, Watch())), logits_processor=forced)
        runs.append(WATCHED[0].seen)
    for (clean, others), (edited, beside) in zip(*runs, strict=True):
        close(others, beside, 1e-5)
        assert (clean - edited).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("prompt", ["", None])
def test_the_question_of_a_users_own_inputs_is_cut_as_if_it_had_not_been_asked(family, prompt):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    cut = without_question(vlm, type(batch).of(dict(batch)), prompt=prompt).batch
    want = without_question(vlm, batch, prompt=prompt).batch
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        assert (name in cut) == (name in want)
        if name in want:
            assert torch.equal(cut[name], want[name])
