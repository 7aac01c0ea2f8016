"""Recorded steps, with recordings that run the step again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.contracts.support import STRONG, UNLIKE, batch_of, close, crossed, method_of, vlm_of
from tests.decoding.again import recording_on_cpu
from tests.tiny import TINY
from vlmfix.attention.edit import LayerSet
from vlmfix.decoders import DecodingPlan, Greedy
from vlmfix.decoders.picture import probing
from vlmfix.decoders.picture.probing import NewestRows, attention_maps
from vlmfix.decoding import loop
from vlmfix.decoding.choice import MostProbable
from vlmfix.decoding.graphs import forget, recordings_of
from vlmfix.decoding.running import running
from vlmfix.upstream.compiling import compiled
from vlmfix.upstream.versions import say_once

STEPS = 16
COMPILES = {name: spec for name, spec in STRONG.items() if method_of(spec).compiles or name in ("revisit", "only")}
"""Methods whose steps are alike, and two whose rules act outside of the step."""


@pytest.fixture
def recording():
    """Lets a CPU record, counted."""
    with recording_on_cpu([vlm_of(family) for family in TINY]) as made:
        yield made


@torch.no_grad()
def scores(vlm, method, monkeypatch, *, recorded, room=256, keys=512, shown=(0, 1, 0, 1)):
    """Scores of four rows, of which one leaves and then another, while given tokens pass."""
    monkeypatch.setattr("vlmfix.decoding.running.RECORDING", ("cpu",) if recorded else ())
    monkeypatch.setattr("vlmfix.decoding.graphs.ROOM", room)
    monkeypatch.setattr("vlmfix.decoding.passes.ROOM", room)
    monkeypatch.setattr("vlmfix.decoding.graphs.KEYS", keys)
    batch = batch_of(vlm, shown)
    layout = vlm.layout(batch)
    tokens = torch.arange(5, 5 + 4 * STEPS).view(STEPS, 4)
    lines, found = torch.arange(4), []
    plan = method.plan(vlm, batch, layout)
    with running(vlm, batch, layout, plan, limit=STEPS + 2, name=method.spec()) as call:
        call.prompt()
        for step, column in enumerate(tokens):
            if step in (6, 10):
                kept = torch.arange(1, len(lines))
                call.keep(kept)
                lines = lines[kept]
            found.append(call.token(column[lines]))
    return found


@pytest.mark.parametrize(("family", "name"), crossed(COMPILES, families=UNLIKE, turn=1))
def test_recorded_steps_give_the_scores_of_others(family, name, recording, monkeypatch):
    """In the call that records them, and in later ones with other pictures and longer prompts."""
    vlm, method = vlm_of(family), method_of(STRONG[name])
    for shown in ((0, 1, 0, 1), (1, 1, 1, 1)):
        for one, other in zip(
            scores(vlm, method, monkeypatch, recorded=True, shown=shown),
            scores(vlm, method, monkeypatch, recorded=False, shown=shown),
            strict=True,
        ):
            close(one, other)
    assert len(recording) == (0 if family == "gemma3" else 2), "four rows, and two when half of them have left"


def test_a_recording_serves_later_calls_and_what_has_changed_none(recording, monkeypatch):
    vlm, method = vlm_of("llava"), method_of(STRONG["var"])
    for expected in (2, 2):  # four rows, and two when half of them have left
        scores(vlm, method, monkeypatch, recorded=True)
        assert len(recording) == expected
    scores(
        vlm,
        method_of(STRONG["var"].replace("moved_fraction=1", "moved_fraction=0.5")),
        monkeypatch,
        recorded=True,
    )
    assert len(recording) == 4, "another parameter is another step"
    with torch.no_grad():
        vlm.model.lm_head.weight.mul_(1)
    scores(vlm, method, monkeypatch, recorded=True)
    assert len(recording) == 6, "weights were written to"
    assert forget(vlm.model)
    assert not forget(vlm.model)


def test_without_a_compiler_steps_are_recorded_with_the_edits_as_they_are(recording, monkeypatch, caplog):
    def fails(function, kind):
        raise RuntimeError("Failed to find a compiler\nand much more")

    monkeypatch.setattr("vlmfix.attention.kernel.compiled", fails)
    say_once.cache_clear()
    vlm, method = vlm_of("llava"), method_of(STRONG["var"])
    for _ in range(2):
        for one, other in zip(
            scores(vlm, method, monkeypatch, recorded=True),
            scores(vlm, method, monkeypatch, recorded=False),
            strict=True,
        ):
            close(one, other)
    assert len(recording) == 2
    said = [record.getMessage() for record in caplog.records]
    assert said == ["vlmfix: edits are not compiled in recorded steps, which costs time: Failed to find a compiler"]


def test_what_a_broken_answer_leaves_in_the_memory_reaches_no_later_one(recording, monkeypatch):
    vlm, method = vlm_of("llava"), method_of(STRONG["var"])
    scores(vlm, method, monkeypatch, recorded=True)
    for layer in recordings_of(vlm).arena.fixed(4, 64, torch.zeros(1, dtype=torch.long)).layers:
        layer.keys.untyped_storage().fill_(255)  # bytes of numbers that are none
        layer.values.untyped_storage().fill_(255)
    made = len(recording)
    for one, other in zip(
        scores(vlm, method, monkeypatch, recorded=True), scores(vlm, method, monkeypatch, recorded=False), strict=True
    ):
        close(one, other)
    assert len(recording) == made


GATED = ("sgrs:strictness=1", "vcd+sgrs:layers=0:-1", "sgrs:layers=1+spin:kept_share=0.9,suppression=0.3,layers=all")


def saliency_of_steps(vlm, spec, monkeypatch, *, recorded, shown, device="cpu"):
    """Scores of four rows, of which two leave, and the saliency of two tokens behind each step."""
    monkeypatch.setattr("vlmfix.decoding.running.RECORDING", (device,) if recorded else ())
    batch, method, found = batch_of(vlm, shown), method_of(spec), []
    layout = vlm.layout(batch)
    plan = method.plan(vlm, batch, layout)
    tokens = torch.arange(5, 5 + 4 * STEPS, device=device).view(STEPS, 4)
    lines = torch.arange(4, device=device)
    with running(vlm, batch, layout, plan, limit=STEPS + 2, name=spec) as call:
        call.prompt()
        for step, column in enumerate(tokens):
            if step in (6, 10):
                kept = torch.arange(1, len(lines), device=device)
                call.keep(kept)
                lines = lines[kept]
            found.append(call.token(column[lines]))
            for judged in (column[lines] + 1, column[lines] + 9):
                found.append(call.owed.saliency(judged, judged % 3 != 1))
        assert call._passes.recorded == recorded
    return found


@pytest.mark.parametrize("spec", GATED)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_recorded_steps_give_the_gradients_of_others(family, spec, recording, monkeypatch):
    vlm = vlm_of(family)
    for shown in ((0, 1, 0, 1), (1, 1, 1, 1)):
        for one, other in zip(
            saliency_of_steps(vlm, spec, monkeypatch, recorded=True, shown=shown),
            saliency_of_steps(vlm, spec, monkeypatch, recorded=False, shown=shown),
            strict=True,
        ):
            assert bool(other.any())
            close(one, other)
    assert len(recording) == 4, "a step and the way back, for four rows and for two"


def test_gradients_of_a_recorded_step_end_with_the_next(recording, monkeypatch):
    vlm = vlm_of("llava")
    batch, plan = batch_of(vlm), method_of("sgrs").plan(vlm, batch_of(vlm), vlm.layout(batch_of(vlm)))
    token = torch.full((batch.rows,), 7)
    with running(vlm, batch, vlm.layout(batch), plan, limit=STEPS, name="sgrs") as call:
        call.prompt()
        call.token(token)
        assert not call.replays, "the gate must have chosen before the next step"
        with torch.enable_grad():
            loss = call._passes.token(token).sum()
            nodes = list(call.owed.recorder.seen.values())
            torch.autograd.grad(loss, nodes, retain_graph=True)
            call._passes.token(token)
            with pytest.raises(RuntimeError, match="a later step has taken the place"):
                torch.autograd.grad(loss, nodes)


SHORT, LONG = (0, 0, 0, 0), (0, 1, 0, 1)
"""Pictures whose prompts have 56 and 117 tokens."""


@pytest.mark.parametrize(
    ("calls", "made"), [((SHORT, LONG, SHORT), [2, 4, 6]), ((LONG, SHORT, LONG, SHORT), [2, 4, 4, 4])]
)
def test_a_recording_is_for_as_many_keys_and_for_the_memory_it_was_made_over(calls, made, recording, monkeypatch):
    """Longer prompts move the memory; shorter ones leave it, and have their own, whatever came before."""
    vlm, method = vlm_of("llava"), method_of(STRONG["locore"])
    for shown, expected in zip(calls, made, strict=True):
        found = scores(vlm, method, monkeypatch, recorded=True, keys=64, shown=shown)
        assert len(recording) == expected
        for one, other in zip(found, scores(vlm, method, monkeypatch, recorded=False, shown=shown), strict=True):
            close(one, other)


@pytest.mark.parametrize("room", [1, 3])
def test_a_recording_that_is_full_is_made_anew(room, recording, monkeypatch):
    vlm, method = vlm_of("qwen2_5_vl"), method_of(STRONG["chain"])
    recorded = scores(vlm, method, monkeypatch, recorded=True, room=room, keys=4)
    assert len(recording) >= 3
    for one, other in zip(recorded, scores(vlm, method, monkeypatch, recorded=False), strict=True):
        close(one, other)


def test_short_answers_and_beams_are_not_recorded(recording):
    vlm = vlm_of("llava")
    shown = batch_of(vlm, [0]).pictures[0][0]
    vlm.generate([shown], "what is it?", max_new_tokens=4)
    assert not recording
    vlm.generate([shown], "what is it?", max_new_tokens=24, num_beams=2)
    assert not recording
    long = vlm.generate([shown], "what is it?", max_new_tokens=24)
    assert len(recording) == 1 or long[0].tokens < 2


@dataclass(frozen=True, kw_only=True)
class Looks(Greedy):
    """Keeps rows of attention, in place of which a compiled step has to write."""

    def plan(self, vlm, batch, layout):
        return DecodingPlan(edits=(NewestRows(),))


@pytest.mark.parametrize("name", ["var", "locore", "spin", "looks"])
def test_edits_are_compiled_once_for_each_kind_of_layer_and_any_numbers_of_rows_and_keys(name, recording, monkeypatch):
    kinds, graphs, plain = set(), [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counted(function, kind):
        kinds.add((function, kind))
        return compiled(function, kind)

    compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: plain(function, fullgraph=True, backend=backend))
    monkeypatch.setattr("vlmfix.attention.kernel.compiled", counted)
    vlm, method = vlm_of("llava"), Looks() if name == "looks" else method_of(STRONG[name])
    for keys in (512, 64):  # with four rows and then two
        scores(vlm, method, monkeypatch, recorded=True, keys=keys)
    assert len(recording) == 4
    assert 0 < len(graphs) == len(kinds)
    compiled.cache_clear()


@torch.no_grad()
def answers(spec, ends, *, limit, on=lambda call: None):
    """Answers of four samples with limits of their own, greedily chosen by our loop."""
    vlm, method, said = vlm_of("llava"), method_of(spec), [[] for _ in limit]
    batch = batch_of(vlm, (0, 1, 0, 1))
    plan = method.plan(vlm, batch, vlm.layout(batch))
    with running(vlm, batch, vlm.layout(batch), plan, limit=limit, name=spec) as call:
        on(call)
        for one in loop.decode(call, MostProbable(), ends):
            for sample, token in zip(one.samples, one.tokens, strict=True):
                said[sample].append(token)
    return said


@pytest.mark.parametrize("name", ["var", "vcd"])
def test_a_recorded_step_starts_before_the_tokens_of_the_last_one_are_read(name, recording, monkeypatch):
    """Answers that end at different steps, by an end token or their own limit, stay the same."""
    spec, limit = STRONG[name], [12, 7, 12, 12]
    monkeypatch.setattr("vlmfix.decoding.running.RECORDING", ())
    whole = answers(spec, (), limit=limit)
    end = whole[0][3]
    cut = [own[: own.index(end) + 1] if end in own else own for own in whole]
    assert cut != whole
    monkeypatch.setattr("vlmfix.decoding.running.RECORDING", ("cpu",))
    started, seen = [], []
    read = loop._Told.read
    monkeypatch.setattr(loop._Told, "read", lambda told, going: seen.append(len(started)) or read(told, going))

    def counted(call):
        token = call.token
        call.token = lambda tokens: started.append(tokens) or token(tokens)

    assert answers(spec, (end,), limit=limit, on=counted) == cut
    assert seen[:2] == [0, 2], "the second step is at work when the first one's tokens are read"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_recorded_steps_show_where_the_newest_row_looked(family, recording, monkeypatch):
    """Of samples that end at different steps, in answers that the next step has begun before they are read."""
    vlm = vlm_of(family)
    batch, layers = batch_of(vlm, (0, 1, 1, 0)), LayerSet("0/2")
    monkeypatch.setattr(probing.defaults, "ends", lambda model: range(0, 1000, 7))
    monkeypatch.setattr("vlmfix.decoding.running.RECORDING", ())
    whole = attention_maps(vlm, batch, layers, steps=STEPS)
    assert len({len(row) for row in whole}) > 1
    monkeypatch.setattr("vlmfix.decoding.running.RECORDING", ("cpu",))
    for _ in range(2):  # recorded, and replayed in a later call
        for row, other in zip(attention_maps(vlm, batch, layers, steps=STEPS), whole, strict=True):
            close(row, other)
    assert recording
