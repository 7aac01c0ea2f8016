"""Sink tokens: the first token's sink, secondary sinks that form in the middle of the model, and visual sinks.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, T prompt tokens; here also P candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import TextRows, leaving, mean_of_rows
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.sinks import find_sinks, sink_strength, tabulated_sinks, threshold_of
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint

CANDIDATES = 3
"""First positions among which the primary sink is sought: a chat template may put tokens before it."""
DEEP = 20
"""Layers above which the published limits on lifetimes apply."""


@dataclass(frozen=True, kw_only=True)
class SinkTokens(Profiler):
    """Attention that a head gives to sink tokens.

        score = mean over the prompt's text rows behind the picture of  sum over primary and secondary sinks j of a[j]

    The primary sink is the one of the first three tokens with the largest norm, mean over layers. It is active from the
    largest rise of its norm, ``on``, to the largest fall behind that. In these layers a later token is hit where its
    state is parallel to the primary sink's, |cos| > ``cosine``; by the number of layers n in which it is hit it is
    noise (n <= 4), secondary, or primary again (n >= L - 15). Up to 20 layers, where these limits leave no room, noise
    is n < max(2, 0.12 L), primary n >= 0.7 of the active layers, and a token is secondary when it is first hit later
    than on + 1. ``details``, of the states that leave each layer, mean over pictures: ``primary_norm`` (norm of the
    primary sink over the median norm of the tokens), ``secondary_text`` and ``secondary_image`` (tokens that are hit as
    secondary sinks), ``visual`` (image tokens with ``sink_strength`` above the threshold); and ``dims``, the model's
    sink dimensions.

    Source: Wong et al., "On the Existence and Behavior of Secondary Attention Sinks", arXiv 2512.22213; official code
    JeffreyWong20/Secondary-Attention-Sinks at 11eefcc. *Differs*: the first sink is primary by definition, however
    short it is active; an active range that never ends is one to the last layer; padding is no token; the head score
    is this package's own. *Cost*: text rows and states of the shared pass.

    Args:
        cosine: Smallest |cos| of a hit, in [0, 1].
        visual_threshold: tau of visual sinks; None is ``ratio_threshold`` of the model.
    """

    name: ClassVar[str] = "sinks"
    title: ClassVar[str] = "attention to sink tokens"

    cosine: float = 0.9
    visual_threshold: float | None = None

    def __post_init__(self) -> None:
        self._require(0 <= self.cosine <= 1, "cosine", "in [0, 1]")
        self._require(self.visual_threshold is None or self.visual_threshold >= 0, "visual_threshold", "at least 0")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        threshold = threshold_of(vlm) if self.visual_threshold is None else self.visual_threshold
        dims = tabulated_sinks(vlm) or find_sinks(vlm, threshold=self.visual_threshold).dims
        return _State(self.cosine, threshold, dims)


class _State(State):
    def __init__(self, cosine: float, threshold: float, dims: tuple[int, ...]) -> None:
        self._cosine, self._threshold, self._dims = cosine, threshold, dims
        self._received: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._cosines: dict[int, Tensor] = {}
        self._massive: dict[int, Tensor] = {}
        self._begins = torch.empty(0)
        self._pictures = 0
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        self._begins = work.batch.attention_mask.int().argmax(dim=1)  # (B,), prompts are padded on the left
        with edited(work.vlm, work.layout, [TextRows(reader=self._read)]), leaving(work.vlm, self._look):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        self._received[site.layer] = mean_of_rows(weights, site.acts)  # (B, H, K)

    def _look(self, layer: int, hidden: Tensor) -> None:
        state = hidden.float()
        norm = state.norm(dim=-1)  # (B, T)
        rows = torch.arange(len(state), device=state.device)[:, None]
        first = self._begins[:, None] + torch.arange(CANDIDATES, device=state.device)  # (B, P)
        unit = torch.nn.functional.normalize(state, dim=-1)
        self._norms[layer] = norm
        self._cosines[layer] = unit[rows, first] @ unit.transpose(1, 2)  # (B, P, T)
        if self._dims:
            self._massive[layer] = sink_strength(state, self._dims) > self._threshold  # (B, T)

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        norms = torch.stack([self._norms[layer] for layer in range(work.layers)])  # (L, B, T)
        cosines = torch.stack([self._cosines[layer] for layer in range(work.layers)])  # (L, B, P, T)
        real = work.batch.attention_mask.bool()
        found = {layer: torch.zeros_like(value[..., 0]) for layer, value in self._received.items()}  # (B, H)
        for row in range(work.batch.rows):
            start = int(self._begins[row])
            sinks = label(norms[:, row, start:], cosines[:, row, :, start:], self._cosine)
            marked = sinks.tokens()  # (T - start,)
            for layer, received in self._received.items():
                found[layer][row] = received[row, :, start:] @ marked.to(received.dtype)
            self._count(work, row, start, norms[:, row, start:], sinks, real)
        self._pictures += work.batch.rows
        return work.stacked(found)

    def _count(self, work: Work, row: int, start: int, norms: Tensor, sinks: Sinks, real: Tensor) -> None:
        image = work.layout.tokens[row, start:]
        massive = torch.stack([self._massive.get(layer, torch.zeros_like(real))[row] for layer in range(work.layers)])
        counts = {
            "primary_norm": norms[:, sinks.primary] / norms.median(dim=1).values,
            "secondary_text": (sinks.secondary & ~image).sum(dim=1),
            "secondary_image": (sinks.secondary & image).sum(dim=1),
            "visual": (massive[:, start:] & image).sum(dim=1),
        }
        for name, value in counts.items():  # each (L,)
            self._sums[name] = self._sums.get(name, 0.0) + value.float().cpu()

    def details(self) -> dict[str, Tensor]:
        means = {name: total / max(self._pictures, 1) for name, total in self._sums.items()}
        return means | {"dims": torch.tensor(self._dims, dtype=torch.int64)}


@dataclass(frozen=True, eq=False)
class Sinks:
    """The sinks of one prompt without its padding.

    Attributes:
        primary: Position of the primary sink.
        active: Layers in which it is active, the second excluded.
        secondary: (L, T) bool, tokens that are secondary sinks, in the layers in which they are hit.
        lasting: (T,) bool, later tokens that live as long as a primary sink.
    """

    primary: int
    active: tuple[int, int]
    secondary: Tensor
    lasting: Tensor

    def tokens(self) -> Tensor:
        """(T,) bool, every sink, in whichever layers."""
        marked = self.secondary.any(dim=0) | self.lasting
        marked[self.primary] = True
        return marked


def label(norms: Tensor, cosines: Tensor, threshold: float) -> Sinks:
    """Finds the sinks of one prompt.

    Args:
        norms: (L, T) norm of the state that leaves each layer.
        cosines: (L, P, T) its cosine with each of the first P tokens' states in the same layer.
        threshold: Smallest |cosine| of a hit.
    """
    layers, length = norms.shape
    primary = int(norms[:, : min(cosines.shape[1], length)].mean(dim=0).argmax())
    start, end = active_range(norms[:, primary])
    later = torch.arange(length, device=norms.device) > primary
    hit = (cosines[:, primary].abs() > threshold) & later  # (L, T)
    hit[:start] = False
    hit[end:] = False
    lives, born = hit.sum(dim=0), hit.int().argmax(dim=0)  # (T,)
    if layers > DEEP:
        lasting = lives >= layers - 15
        secondary = (lives > 4) & ~lasting
    else:
        noise = lives < max(2.0, 0.12 * layers)
        lasting = ~noise & (lives >= 0.7 * (end - start))
        secondary = ~noise & ~lasting & (born > start + 1)
    return Sinks(primary=primary, active=(start, end), secondary=hit & secondary, lasting=lasting)


def active_range(norms: Tensor) -> tuple[int, int]:
    """Layers in which a norm is high: from its largest rise to its largest fall behind that, the second excluded.

    Args:
        norms: (L,).
    """
    steps = norms.diff()
    if len(steps) == 0:
        return 0, len(norms)
    start = int(steps.argmax()) + 1
    behind = steps[start:]
    if len(behind) == 0 or float(behind.min()) >= 0:
        return start, len(norms)
    return start, start + int(behind.argmin()) + 1
