"""Image attention mass: how much of what a head looks at is picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import LastRows, mass
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ImageMass(Profiler):
    """Attention of the token that predicts the answer's first word to the image patches, summed.

        score = sum over image patches j of a[last, j], in [0, 1]

    Source: the common base of most head scores, as in Bi et al., "Unveiling Visual Perception in Language Models",
    CVPR 2025. *Differs*: they read the row of the first generated token, this reads the row that predicts it.
    *Cost*: one row of the shared pass. It says where a head looks, not whether that matters; layers 0 and 1 usually
    look everywhere.
    """

    name: ClassVar[str] = "image-mass"
    title: ClassVar[str] = "attention to the picture"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State()


class _State(State):
    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        with edited(work.vlm, work.layout, [LastRows(reader=self._read)]):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        self._found[site.layer] = mass(weights[:, :, -1:], site.image_keys)[..., 0]  # (B, H)

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        return work.stacked(self._found)
