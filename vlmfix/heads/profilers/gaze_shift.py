"""Gaze shift: how much a head's look moves over the picture while it reads the question."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import TextRows
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.gaze import gaze_shift
from vlmfix.insight.wording import question_columns
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class GazeShift(Profiler):
    """Image attention that a head gains, patch by patch, at the content words of the question.

        score = sum over tokens i of content words, over image patches j, of max(a[i, j] - a[i - 1, j], 0)

    A patch that gets the same attention at every word, such as a visual sink, adds nothing.

    Source: "Capturing Gaze Shifts for Guidance", arXiv 2510.22067; official code amazon-science/GIFT. *Differs*: every
    layer is scored, where the method looks at one; content words are told by a list of English function words, where
    the release asks spaCy's tagger; a word that occurs twice counts twice; a token whose predecessor is no text behind
    the picture is left out; without content words all tokens of the question count. *Cost*: the text rows of the
    shared pass.
    """

    name: ClassVar[str] = "gaze-shift"
    title: ClassVar[str] = "image attention gained at content words"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State()


class _State(State):
    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}
        self._content = torch.empty(0)

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        self._content = question_columns(work, content=True)  # (B, T)
        with edited(work.vlm, work.layout, [TextRows(reader=self._read)]):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        rows = site.queries[0]  # (R,)
        self._found[site.layer] = gaze_shift(weights, rows, site.image_keys, self._content[:, rows])

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        return work.stacked(self._found)
