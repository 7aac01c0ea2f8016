"""Heterogeneity: how far a head's output is from the mean of the heads beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import LastOutputs
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.contributions import contributions
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Heterogeneity(Profiler):
    """Distance of what a head adds from the mean of what the heads of its layer add, where the answer is predicted.

        c[h] = A[last, h] W_O,h
        score = || c[h] - mean over heads g of c[g] ||_2 / mean over heads g of || c[g] ||_2

    Heads have spaces of their own before the output projection, so they are compared behind it. Outputs grow with
    depth, so the distance is a share of the layer's mean length. A score near 0 says that the head adds what all
    others of its layer add.

    Source: this package's own form of the distance between a head and the mean of heads. *Cost*: head outputs of the
    shared pass, H rows through each output projection.
    """

    name: ClassVar[str] = "heterogeneity"
    title: ClassVar[str] = "distance from the mean head"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State()


class _State(State):
    def __init__(self) -> None:
        self._outputs: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        def read(site: Site, output: Tensor) -> None:
            self._outputs[site.layer] = output  # (B, H, D)

        with edited(work.vlm, work.layout, [LastOutputs(reader=read)]):
            yield

    @torch.no_grad()
    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        layers = work.vlm.family.layers(work.vlm.model)
        found = {}
        for layer, outputs in self._outputs.items():
            parts = contributions(layers[layer], outputs)  # (B, H, d)
            apart = (parts - parts.mean(dim=1, keepdim=True)).norm(dim=-1)  # (B, H)
            length = parts.norm(dim=-1).mean(dim=1, keepdim=True)
            found[layer] = apart / length.clamp(min=torch.finfo(length.dtype).tiny)
        return work.stacked(found)
