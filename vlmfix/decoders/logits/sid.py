"""SID: contrasts the logits with those of a row that sees only what it looks at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, ProductBias, Rows, Site, WeightEdit
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoders.logits.steps import lead, margin_of, steps
from vlmfix.decoders.logits.vcd import ImageContrast
from vlmfix.decoding.branches import with_edits
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


def most_seen(seen: Tensor, image: Tensor, kept: float) -> Tensor:
    """Marks the image tokens that get most attention, all but the share ``kept`` that gets least.

    Args:
        seen: (..., K) attention of rows.
        image: (..., K) bool, image tokens.
        kept: In [0, 1]; at least one token stays, of equals the earlier.

    Returns:
        (..., K) bool.
    """
    place = seen.masked_fill(~image, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 for the least
    count = (image.sum(dim=-1, keepdim=True) * kept).round().clamp(min=1)
    return image & (place >= count)


@dataclass(frozen=True, kw_only=True)
class SID(Decoder):
    """Self-Introspective Decoding: subtracts the logits of a second row that sees only what it looks at least.

    Both rows read the same prompt. In every step the second one asks where its newest token looks in ``layer``, mean
    over heads, and keeps the share ``kept`` of the image tokens that get least; in all later layers it does not see the
    others. Then ``scores = (1 + contrast) * clean - contrast * second``, and tokens whose clean probability is below
    ``plausibility`` times the largest are cut. In the prompt the choice of its last token holds for every row.

    Args:
        preset: ``paper`` (contrast 1) or ``official-code`` (0.5: the released wrappers never hand the contrast to the
            sampler, which then has 0.5).
        contrast: alpha >= 0, weight of the contrast.
        plausibility: beta in [0, 1]; 0 cuts nothing.
        kept: Share of the image tokens that the second row sees, in (0, 1]; the authors' 100 of 576.
        layer: Number of the layer that chooses, from 0; the first layer that hides tokens is the next.
        when: ``always``, or ``uncertain``: steps whose best token leads by less than ``margin``.
        margin: Lead of the best token over the second, in clean probability, in [0, 1].

    *Source*: Huo et al., "Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models",
    ICLR 2025, arXiv 2408.02032; code huofushuo/SID.

    *Differs*: the released code keeps 100 tokens of any picture, here it is a share; its greedy search leaves the cut
    out (``plausibility=0`` does). The second row chooses by its own attention: up to ``layer`` both rows have the same
    states, so that is the clean row's too, unless another method of a chain edits the clean row there. Keys of hidden
    tokens stay in the cache, because the next token may choose them.

    *Cost*: two rows per sample, one pass per token; a row of attention in one layer.

    Example:
        >>> SID(preset="official-code").contrast
        0.5
    """

    name: ClassVar[str] = "sid"
    source: ClassVar[Source] = Source(
        title="Self-Introspective Decoding",
        year=2025,
        arxiv="2408.02032",
        code="https://github.com/huofushuo/SID",
    )
    acts_on: ClassVar[str] = "logits of 2 branches"
    passes: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"contrast": 1.0},
        "official-code": {"contrast": 0.5},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="whose contrast")
    contrast: float = parameter(
        None, float, low=0, high=10, search=(0.05, 3.0), log=True, help="alpha, weight of the contrast"
    )
    plausibility: float = parameter(
        0.1, float, low=0, high=1, search=(0.01, 0.5), log=True, help="beta, cut below this share of the best token"
    )
    kept: float = parameter(
        100 / 576, float, low=0, high=1, search=(0.05, 0.6), help="share of the image tokens that the second row sees"
    )
    layer: int = parameter(1, int, low=0, high=1000, help="layer whose attention chooses them")
    when: str = steps()
    margin: float = lead()

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one branch that sees some of its picture, for rows that have one."""
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"sid cannot act: {reason}", "give a smaller layer")
        pictured = layout.tokens.any(dim=1)
        if not bool(pictured.any()):
            return DecodingPlan()
        looking = LeastSeen(layers=LayerSet(str(self.layer)), kept=self.kept)
        hiding = Hiding(layers=LayerSet(f"{self.layer + 1}:"), chosen=looking)
        rule = ImageContrast(
            branches=(with_edits(batch, looking, hiding),),
            rows=pictured,
            contrast=self.contrast,
            plausibility=self.plausibility,
            margin=margin_of(self.when, self.margin),
        )
        return DecodingPlan(contrasts=(rule,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that a layer is left to hide tokens in."""
        if self.layer + 1 < vlm.layers:
            return None
        return f"layer {self.layer} chooses what later layers hide, and the model has {vlm.layers} layers"


@dataclass(frozen=True, eq=False, kw_only=True)
class LeastSeen(WeightEdit):
    """Chooses the image tokens that the newest row looks at most, which others are to hide; it changes nothing.

    Attributes:
        kept: Share of the image tokens that stay.
    """

    kept: float
    rows: ClassVar[Rows] = "last"

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights as they were."""
        hidden = most_seen(weights.mean(dim=1), site.image_keys[:, None], self.kept)  # (B, R, K)
        if not site.prefill:
            site.relearn("hidden", hidden[:, -1])
            return weights
        site.learn_of_keys("hidden", hidden[:, site.predicting, : site.prompt].contiguous())
        if hidden.shape[2] > site.prompt:  # a pass without a cache: each later token has chosen too
            site.learn_of_keys("later", hidden[:, site.predicting + 1 :])
        return weights


@dataclass(frozen=True, eq=False, kw_only=True)
class Hiding(ProductBias):
    """Hides image tokens from every row.

    Attributes:
        chosen: Chooses them, in an earlier layer of the same pass.
    """

    chosen: LeastSeen
    rows: ClassVar[Rows] = "prompt"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"chosen"})
    blockwise: ClassVar[bool] = True

    def factors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Returns 1 for each row, and -inf for the hidden keys."""
        if site.prefill:  # one tensor for all layers, which the next step writes
            site.learn_of_keys("hidden", self._learned["hidden"])
        hidden = site.learned("hidden")  # (B, K)
        rows = site.allowed.new_ones(len(hidden), 1, site.queries.shape[1], dtype=torch.float32)
        return rows, torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -torch.inf)

    def bias(self, site: Site) -> Tensor:
        """Returns (B, 1, R, K); in a pass without a cache, each generated token's row hides what it chose itself."""
        bias = super().bias(site)
        if site.prefill and (later := self._learned.get("later")) is not None:
            own = torch.zeros_like(later, dtype=bias.dtype).masked_fill(later, -torch.inf)[:, None]  # (B, 1, A, K)
            row = (site.queries - site.prompt)[0]  # (R,), below 0 for the prompt's
            bias = torch.where((row < 0)[:, None], bias, own[:, :, row.clamp(min=0)])
        return bias

    @property
    def _learned(self) -> Mapping[str, Tensor]:
        """Returns what was chosen in this pass."""
        (memory,) = self.chosen.memory.values()
        return memory.of_keys
