"""ReVisiT: multiplies the model's distribution with that of the image token that agrees with it most."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.dola import distances
from vlmfix.decoding.branches import Contrast
from vlmfix.decoding.exits import Exit
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.language.parameters import parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream.readout import of_tokens


@dataclass(frozen=True, kw_only=True)
class ReVisiT(Decoder):
    """Revisits the picture's tokens: each of them names, through the output head, what it stands for.

    Once, as the prompt passes, the residual stream h of the image tokens is kept. At every step, among the candidates A
    (tokens whose probability is at least ``plausibility`` times the largest), with p the model's distribution and q_i
    that of ``head(h_i)``, both over A::

        i* = argmin over image tokens of JSD(p, q_i)
        score = logit + strength * log q_i*        on A; all other tokens are cut

    Args:
        strength: Weight of the image token's distribution; 1 is a product of two experts.
        plausibility: alpha in [0, 1]; 0 makes all tokens candidates.
        layers: Where h is taken: behind the ``last`` layer and its norm, ``all`` layers, or ``every-second`` from the
            last back. At earlier layers the head takes h without the norm, as released. With several, the image token
            is chosen among all of them.
        mode: ``divergence``, or ``official``: the released code swaps the arguments of the divergence and averages over
            the vocabulary, which ranks image tokens otherwise.

    *Source*: "Revisit What You See: Disclose Language Prior in Vision Tokens for LVLM Decoding", arXiv 2506.09522, and
    its released code; the share of the candidates is that of its script for captions.

    *Differs*: the released code takes one row, or the first row's candidates for all; here each row has its own. It
    keeps logits of all image tokens, here h is kept and the head's rows of the candidates alone are multiplied. Rows
    without a picture are left alone. In a chain candidates are those of the model's own logits, and the image token's
    part is added to what earlier methods made of them.

    *Cost*: one pass per token, and for each row the output head's rows of the candidates times the image tokens. The
    prompt passes whole, in one piece, and rows about one picture do not share its beginning.

    Example:
        >>> ReVisiT(strength=0.5).spec()
        'revisit:strength=0.5,plausibility=1e-05,layers=last,mode=divergence'
    """

    name: ClassVar[str] = "revisit"
    source: ClassVar[Source] = Source(title="Revisit What You See", year=2025, arxiv="2506.09522")
    acts_on: ClassVar[str] = "logits of image tokens"
    compiles: ClassVar[bool] = False

    strength: float = parameter(1.0, float, low=0, high=10, search=(0.1, 3.0), log=True, help="weight of the picture")
    plausibility: float = parameter(
        1e-5, float, low=0, high=1, search=(1e-6, 0.1), log=True, help="alpha, cut below this share of the best token"
    )
    layers: str = parameter("last", str, choices=("last", "all", "every-second"), help="where image tokens are read")
    mode: str = parameter("divergence", str, choices=("divergence", "official"), help="how agreement is measured")

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans the product, for rows that have a picture."""
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        last = vlm.layers
        places = {"last": [last], "all": range(1, last + 1), "every-second": range(last, 0, -2)}[self.layers]
        rule = Product(
            branches=(),
            rows=pictured,
            views=tuple(Exit(place, normed=place == last) for place in sorted(places)),
            model=vlm.model,
            tokens=layout.tokens,
            strength=self.strength,
            plausibility=self.plausibility,
            swapped=self.mode == "official",
        )
        return DecodingPlan(contrasts=(rule,))


@dataclass(frozen=True, eq=False, kw_only=True)
class Product(Contrast):
    """Adds the log-probabilities of the image token that agrees most.

    Attributes:
        model: The model, for its output head.
        tokens: (B, T) bool, the samples' image tokens.
        strength: Weight of what is added.
        plausibility: alpha.
        swapped: Whether agreement is measured as in the released code.
        seen: Nothing, or of each sample the states of its image tokens at all places, (views * tokens, hidden size),
            and for each row the number of its sample.
    """

    model: Any
    tokens: Tensor
    strength: float
    plausibility: float
    swapped: bool
    seen: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)
    steps_alike: ClassVar[bool] = False

    def view(self, states: Tensor) -> None:
        """Keeps the states of the image tokens, once for all beams of a sample."""
        beams = states.shape[1] // len(self.tokens)
        later = states.shape[2] - self.tokens.shape[1]
        kept = [states[:, row * beams, later:][:, own].flatten(0, 1) for row, own in enumerate(self.tokens)]
        owners = torch.arange(len(self.tokens), device=states.device).repeat_interleave(beams)
        self.seen[:] = [(kept, owners)]

    def fuse(self, clean: Tensor, others: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores + strength * log q``, and -inf where a token is no candidate."""
        ((kept, owners),) = self.seen
        floor = clean.max(dim=-1, keepdim=True).values + (
            math.log(self.plausibility) if self.plausibility else -math.inf
        )
        new = torch.full_like(scores, -math.inf)
        for row, owner in enumerate(owners.tolist()):
            if len(kept[owner]):
                tokens = (clean[row] >= floor[row]).nonzero().squeeze(1)  # (N,) candidates
                said = of_tokens(self.model, kept[owner], tokens).log_softmax(dim=-1)  # (views * tokens, N)
                own = clean[row, tokens].log_softmax(dim=-1)
                nearest = distances(own, said, swapped=self.swapped).argmin()
                new[row, tokens] = scores[row, tokens] + self.strength * said[nearest]
        return new

    def begun(self) -> Product:
        """Returns the rule before the first step."""
        return replace(self, seen=[])

    def keep(self, rows: Tensor) -> Product:
        """Returns the rule for some of the rows, which look at their samples' image tokens."""
        return replace(self, rows=self.rows[rows], seen=[(kept, owners[rows]) for kept, owners in self.seen])
