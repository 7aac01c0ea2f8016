"""Active and dormant heads: heads that carry something, and heads that rest on a sink with a small value.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, G key/value heads, K keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import LastRows
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.cache import keys_and_values


@dataclass(frozen=True, kw_only=True)
class Active(Profiler):
    """What a head reads of tokens that are not the first, by the length of their values.

        score = sum over tokens j behind the first of a[last, j] ||v_j||

    A head without anything to do looks at the first token, whose value is small: it is dormant. ``details``, means over
    pictures, (L, H): ``sink_mass``, attention to the first token; ``sink_value``, the length of its value as a share
    of the mean length; ``dormant``, the share of pictures in which the head gives it at least ``mass`` while its value
    is at most ``value`` of the mean.

    Source: dormant heads, value-state drains and sinks of Guo et al., "Active-Dormant Attention Heads", arXiv
    2410.13835; attention times the value's length is that of Kobayashi et al., "Attention is Not Only a Weight", EMNLP
    2020. *Differs*: the account gives no limits; ``mass`` and ``value`` are this package's. *Cost*: the last row and
    the cache of the shared pass.

    Args:
        mass: Attention to the first token from which a head may be dormant, in [0, 1].
        value: Length of the first token's value, as a share of the mean length, up to which it may be; at least 0.
    """

    name: ClassVar[str] = "active"
    title: ClassVar[str] = "reads what is no sink"

    mass: float = 0.5
    value: float = 0.5

    def __post_init__(self) -> None:
        self._require(0 <= self.mass <= 1, "mass", "in [0, 1]")
        self._require(self.value >= 0, "value", "at least 0")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self.mass, self.value)


class _State(State):
    keeps_cache: ClassVar[bool] = True

    def __init__(self, mass: float, value: float) -> None:
        self._mass, self._value = mass, value
        self._rows: dict[int, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._pictures = 0

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        with edited(work.vlm, work.layout, [LastRows(reader=self._read)]):
            yield

    def _read(self, site: Site, weights: Tensor) -> None:
        self._rows[site.layer] = weights[:, :, -1]  # (B, H, K)

    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        if ran is None or ran.cache is None:
            raise RuntimeError("the shared pass kept no cache")
        real = work.batch.attention_mask.bool()  # (B, T)
        first = real.int().argmax(dim=1)  # prompts are padded on the left
        found: dict[str, dict[int, Tensor]] = {name: {} for name in ("score", "sink_mass", "sink_value", "dormant")}
        stored = keys_and_values(ran.cache)
        for layer, rows in self._rows.items():
            values = stored[layer][1].float().norm(dim=-1)  # (B, G, K), of a sliding window its last keys alone
            seen = values.shape[-1]
            lengths = values.repeat_interleave(rows.shape[1] // values.shape[1], dim=1)  # (B, H, K)
            own = real[:, None, -seen:].to(lengths.dtype)
            sink = torch.zeros_like(real).scatter_(1, first[:, None], True)[:, None, -seen:]  # (B, 1, K)
            mean = (lengths * own).sum(dim=-1) / own.sum(dim=-1)  # (B, H)
            mass, value = (rows[..., -seen:] * sink).sum(dim=-1), (lengths * sink).sum(dim=-1) / mean
            found["score"][layer] = (rows[..., -seen:] * lengths * ~sink).sum(dim=-1)
            found["sink_mass"][layer], found["sink_value"][layer] = mass, value
            found["dormant"][layer] = ((mass >= self._mass) & (value <= self._value)).float()
        stacked = {name: work.stacked(part) for name, part in found.items()}
        for name in ("sink_mass", "sink_value", "dormant"):
            self._sums[name] = self._sums.get(name, 0.0) + stacked[name].sum(dim=0).cpu()
        self._pictures += work.batch.rows
        return stacked["score"]

    def details(self) -> dict[str, Tensor]:
        return {name: total / self._pictures for name, total in self._sums.items()}
