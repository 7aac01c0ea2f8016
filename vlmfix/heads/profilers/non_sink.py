"""Image-centric heads: heads whose image attention goes to content and not to visual sinks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfix.attention.edit import LayerSet, Site
from vlmfix.attention.probe import TextRowsAndStates, mass, mean_of_rows
from vlmfix.attention.session import edited
from vlmfix.errors import UnsupportedModelError
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.sinks import find_sinks, sink_strength, tabulated_sinks, threshold_of
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class NonSink(Profiler):
    """Image attention of the heads that spend most of it on tokens other than visual sinks.

        total   = sum over image patches of a
        portion = sum over visual sinks of a / total
        score   = mean over the prompt's text rows behind the picture of  total * [portion <= largest_sink_share]

    A visual sink is an image patch with ``sink_strength > sink_threshold`` in the state that enters the layer. A layer
    without one accepts no head and scores 0, and so do layers 0 and 1, where sinks have not formed yet.

    Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv
    2503.03321; official code seilk/VisAttnSink at 98e62d6. *Differs*: there, heads are accepted or not, from an image
    mass of 0.2 on; here the mass itself is the score. *Cost*: the text rows of the shared pass.

    Args:
        largest_sink_share: 1 - rho, in [0, 1]; the paper's rho is 0.5 for hallucination, 0.8 for general tasks.
        sink_threshold: tau; None is ``ratio_threshold`` of the model, which is the paper's 20 at its width.
        sink_dims: Sink dimensions; None takes them from the literature's table, or from a probe of the model.
    """

    name: ClassVar[str] = "non-sink"
    title: ClassVar[str] = "attention to picture content, sinks left out"

    largest_sink_share: float = 0.5
    sink_threshold: float | None = None
    sink_dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._require(0 <= self.largest_sink_share <= 1, "largest_sink_share", "in [0, 1]")
        self._require(self.sink_threshold is None or self.sink_threshold >= 0, "sink_threshold", "at least 0")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state.

        Raises:
            UnsupportedModelError: The model has no sink dimensions.
        """
        threshold = threshold_of(vlm) if self.sink_threshold is None else self.sink_threshold
        dims = self.sink_dims or tabulated_sinks(vlm) or find_sinks(vlm, threshold=self.sink_threshold).dims
        if not dims:
            raise UnsupportedModelError(
                "the model has no sink dimensions, so no head can avoid its sinks",
                "profile image-mass instead, or give sink_dims",
            )
        return _State(dims, threshold, self.largest_sink_share)


class _State(State):
    def __init__(self, dims: tuple[int, ...], threshold: float, share: float) -> None:
        self._dims, self._threshold, self._share = dims, threshold, share
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        with edited(work.vlm, work.layout, [TextRowsAndStates(reader=self._read, layers=LayerSet("2:"))]):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        if site.hidden is None:
            raise RuntimeError("the residual stream was not recorded")
        sinks = (sink_strength(site.hidden, self._dims) > self._threshold) & site.image_keys  # (B, K)
        total, spent = mass(weights, site.image_keys), mass(weights, sinks)  # (B, H, R)
        accepted = (spent <= self._share * total) & sinks.any(dim=1)[:, None, None]
        self._found[site.layer] = mean_of_rows(total * accepted, site.acts)  # (B, H)

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        return work.stacked(self._found)
