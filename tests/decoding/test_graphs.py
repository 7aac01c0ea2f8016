"""Recorded steps, with a recording that runs the step again: what is in buffers must be what a step of its own sees."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import STRONG, batch_of, close, crossed, method_of, vlm_of
from tests.tiny import TINY
from vlmfix.attention.kernel import PLAN
from vlmfix.decoding.running import running

STEPS = 16
COMPILES = {name: spec for name, spec in STRONG.items() if method_of(spec).compiles}


class Again:
    """A recording that runs the step.

    Like a graph it writes its result where the first one stands, and edits know in it what they knew at first.
    """

    def __init__(self, once, plans):
        self.once, self.result = once, once()
        self.steps = [(plan, plan.steps) for plan in plans]

    def replay(self):
        present = [plan.steps for plan, _ in self.steps]
        for plan, steps in self.steps:
            plan.steps = steps
        self.result.copy_(self.once())
        for (plan, _), steps in zip(self.steps, present, strict=True):
            plan.steps = steps


@pytest.fixture
def recording(monkeypatch):
    """Lets a CPU record, counted."""
    made = []

    def captured(once, device):
        owners = [module for family in TINY for module in vlm_of(family).family.attention_modules(vlm_of(family).model)]
        plans = [plan for owner in owners if (plan := getattr(owner, PLAN, None)) is not None]
        made.append(Again(once, plans))
        return made[-1], made[-1].result

    monkeypatch.setattr("vlmfix.decoding.passes.RECORDING", ("cpu",))
    monkeypatch.setattr("vlmfix.decoding.graphs.captured", captured)
    return made


@torch.no_grad()
def scores(vlm, method, monkeypatch, *, after, room=256):
    """Scores of four rows, of which one leaves and then another, while given tokens pass."""
    monkeypatch.setattr("vlmfix.decoding.passes.AFTER", after)
    monkeypatch.setattr("vlmfix.decoding.passes.ROOM", room)
    batch = batch_of(vlm, [0, 1, 0, 1])
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


@pytest.mark.parametrize(("family", "name"), crossed(COMPILES))
def test_recorded_steps_give_the_scores_of_others(family, name, recording, monkeypatch):
    vlm, method = vlm_of(family), method_of(STRONG[name])
    recorded = scores(vlm, method, monkeypatch, after=2)
    made, windows = len(recording), family == "gemma3"
    for one, other in zip(recorded, scores(vlm, method, monkeypatch, after=99), strict=True):
        close(one, other)
    assert made == (0 if windows else 2), "once, and anew when half of the rows have left"
    assert len(recording) == made


@pytest.mark.parametrize("room", [1, 3, 5])
def test_a_recording_that_is_full_is_made_anew(room, recording, monkeypatch):
    vlm, method = vlm_of("qwen2_5_vl"), method_of(STRONG["chain"])
    recorded = scores(vlm, method, monkeypatch, after=2, room=room)
    assert len(recording) >= 3
    for one, other in zip(recorded, scores(vlm, method, monkeypatch, after=99), strict=True):
        close(one, other)


def test_short_answers_and_beams_are_not_recorded(recording):
    vlm = vlm_of("llava")
    shown = batch_of(vlm, [0]).pictures[0][0]
    vlm.generate([shown], "what is it?", max_new_tokens=8)
    assert not recording
    vlm.generate([shown], "what is it?", max_new_tokens=24, num_beams=2)
    assert not recording
    long = vlm.generate([shown], "what is it?", max_new_tokens=24)
    assert len(recording) == 1 or long[0].tokens < 6
