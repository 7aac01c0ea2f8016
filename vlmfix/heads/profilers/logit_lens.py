"""Logit lens of heads: how far each head's output speaks for the token that is said.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, D head dimension; here also d, the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import LastOutputs, leaving
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.contributions import contributions, held
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class LogitLens(Profiler):
    """Direct attribution of the most probable token's logit to each head.

        c[h] = A[last, h] W_O,h        score = (W_U[y] - mean over tokens of W_U) . (c[h] * gain / rms(x))

    with ``y`` the most probable answer token, ``x`` the residual stream that leaves the last layer there, and ``gain``
    that of the last norm, whose scale is held. Positive: the head itself raises the token above the others. What the
    head does through later layers is not in it: for that, see ``ablation``.

    Source: the logit lens and direct logit attribution of interpretability; AllPath (arXiv 2511.17254) scores heads by
    a lens, too. *Differs*: AllPath takes the state before the attention block through the raw unembedding and
    compares log-probabilities of labelled words; this holds the last norm, so that the scores of all heads, MLPs and
    the embedding add up to the logit less the mean logit. A cap on logits is left out. *Cost*: head outputs of the
    shared pass, H rows through each output projection.
    """

    name: ClassVar[str] = "logit-lens"
    title: ClassVar[str] = "direct effect on the answer's logit"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State()


class _State(State):
    def __init__(self) -> None:
        self._outputs: dict[int, Tensor] = {}
        self._last = torch.empty(0)

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        def read(site: Site, output: Tensor) -> None:
            self._outputs[site.layer] = output  # (B, H, D)

        with edited(work.vlm, work.layout, [LastOutputs(reader=read)]), leaving(work.vlm, self._keep):
            yield

    def _keep(self, layer: int, hidden: Tensor) -> None:
        self._last = hidden[:, -1]  # (B, d), in the end that of the last layer

    @torch.no_grad()
    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        if ran is None:
            raise RuntimeError("the shared pass did not run")
        model: Any = work.vlm.model
        words = model.get_output_embeddings().weight  # (V, d)
        norm = work.vlm.family.decoder(model).get_submodule("norm")
        said = words[ran.logits.argmax(dim=-1)].float() - words.mean(dim=0, dtype=torch.float32)  # (B, d)
        towards = said * held(norm, self._last)
        layers = work.vlm.family.layers(model)
        found = {
            layer: torch.einsum("bhd,bd->bh", contributions(layers[layer], outputs), towards)
            for layer, outputs in self._outputs.items()
        }
        return work.stacked(found)
