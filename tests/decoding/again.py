"""Recordings for a CPU, which run the step again: what is in buffers must be what a step of its own sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch

from vlmfix.attention.kernel import PLAN
from vlmfix.decoding.graphs import forget
from vlmfix.generation import VLM


class Again:
    """A recording that runs the step.

    Like a graph it writes its result where the first one stands, and finds the edits of the call that it was made in.
    """

    def __init__(self, once, vlms):
        self.vlms = vlms
        self.once, self.result = once, once()
        self.plans = planned(vlms)

    def replay(self):
        present = planned(self.vlms)
        put(self.plans)
        result = self.once()
        with torch.no_grad():
            self.result.detach().copy_(result)
        put(present)


def planned(vlms):
    """The layers of some models with their attention modules and MLPs, and what is planned in them."""
    layers = [layer for vlm in vlms for layer in vlm.family.layers(vlm.model)]
    owners = [owner for layer in layers for owner in (layer, layer.self_attn, layer.mlp)]
    plans = [(owner, getattr(owner, PLAN, None)) for owner in owners]
    return [(owner, plan, plan and (plan.steps, plan.fused)) for owner, plan in plans]


def put(plans):
    """Puts plans where they belong."""
    for owner, plan, content in plans:
        if plan is not None:
            plan.steps, plan.fused = content
            setattr(owner, PLAN, plan)
        elif getattr(owner, PLAN, None) is not None:
            delattr(owner, PLAN)


@contextmanager
def recording_on_cpu(vlms: Sequence[VLM]) -> Iterator[list[Again]]:
    """Lets a CPU record the steps of some models inside the block; yields the recordings as they are made."""
    made: list[Again] = []

    def captured(once, device, after=None):
        made.append(Again(once, vlms))
        return made[-1], made[-1].result

    with (
        patch("vlmfix.decoding.running.RECORDING", ("cpu",)),
        patch("vlmfix.decoding.graphs.captured", captured),
        patch("vlmfix.decoding.running.start", lambda device: None),
        patch("vlmfix.attention.kernel.compiled", lambda function, kind: function),
    ):
        yield made
    for vlm in vlms:
        forget(vlm.model)
