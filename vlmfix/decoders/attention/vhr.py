"""VHR: doubles the heads whose output moves most when the picture is taken away."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.edit import LayerSet, OutputEdit, Rows, Site
from vlmfix.attention.probe import LastOutputs
from vlmfix.attention.session import bare, edited
from vlmfix.decoders.attention.profiled import profile_facts, profile_for, why_no_profile
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.branches import TOKENS
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.heads.profilers.vhd import without_image_tokens
from vlmfix.language.parameters import Given, Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream.positions import prompt_positions

ALPHAS = {"internvl": 1.5}
"""Gain by ``model_type``; 2, the paper's for its three models, for all others."""
PROFILER = "vhd"
SHARE = 14 / 32
"""Share of the layers, counted from the last, that the paper reinforces in LLaVA-1.5-7B."""
ROUNDING = 1e-5
"""Share of a head's output below which a change is rounding, so that the head counts as unmoved."""


def upper_half(scores: Tensor) -> Tensor:
    """Selects the heads whose score (L, H) is above their layer's median, the lower of two; returns (L, H) bool."""
    return scores > scores.median(dim=1, keepdim=True).values


def _high(values: Tensor) -> Tensor:
    return values > values.mean(dim=1, keepdim=True) + values.std(dim=1, keepdim=True)


MEASURED = {"profile": Given}
"""Where heads were measured before, and nothing is measured for a row."""


@dataclass(frozen=True, kw_only=True)
class VHR(Decoder):
    """Vision-aware Head Reinforcement: multiplies the outputs of the heads that carry the picture.

    With A[l, i] (D,) the output of head i in layer l for the prompt's last row, before the output projection:

        VHD[l, i] = || A[l, i | picture, question] - A[l, i | question] ||_2
        VHD[l, i] = 0   where VHD[l, i] > mean + std  and  TA[l, i] > mean + std,  TA = || A[l, i | question] ||_2^2
        heads[l]  = those with VHD[l, i] > median over i
        A[l, i]  *= alpha   for the heads of layer l, in every row of the prompt and every row after it

    Mean, std (unbiased) and median (the lower of two) are over the heads of one layer. Heads are chosen once, per row
    of the batch, while the prompt is read and layer by layer: the VHD of a layer is measured with the layers before it
    reinforced. "Without the picture" means that the tokens that stand for it are deleted and positions counted anew.

    Args:
        preset: ``paper`` (Euclidean distance, the test for outliers always) or ``official-code`` (the release squares
            the distance, tests a layer only where the squares deviate by more than 1, and takes the last 14 layers).
        alpha: Gain in [0, 10]; None takes 2, and 1.5 for InternVL (not in the paper). The paper finds 2 and 3 helpful
            and 4 destructive; 1 is the plain model and 0 removes the heads.
        layers: Layers to act in; None takes layer 1 and the last 14 of 32, in other depths the same share of them (not
            in the paper), or with ``official-code`` the last 14 of any model.
        distance: ``euclidean`` or ``squared``; they choose alike but for the test for outliers.
        drop_outliers: Whether heads that flare up without the picture are passed over.
        outlier_guard: Smallest deviation of a layer's squared distances at which that test is made; depends on the
            model's scale.
        keep_positions: The prompt without the picture keeps the positions that its tokens have behind one. A head that
            ignores the picture then has VHD 0, which the shift of positions otherwise hides.
        reinforce_text_branch: The pass without the picture is reinforced as well. The paper does not say; the release
            does not.
        profile: File with a ``vhd`` profile (``vlmfix profile --profiler vhd``): in every row the heads whose mean VHD
            over its pictures is above the median of their layer, instead of a measurement for each row (not in the
            paper). There is no test for outliers then, and ``preset`` sets nothing but the layers.

    *Source*: He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025,
    arXiv 2412.13949, eq. 4-7, algorithm 1; code jinghan1he/VHR.

    *Differs*: the released script serves one row; how it measures is known from ports that say they follow it. The
    paper does not say which deviation it means. Heads are query heads also where key/value heads are shared. A row
    without a picture is decoded plainly. InstructBLIP, for which the paper leaves out layer 1, is no known family.

    *Cost*: one pass over the prompt without its picture, and none with a profile; then a multiplication. With
    ``reinforce_text_branch`` one more pass with the picture, because both must run side by side; edits of other methods
    in a chain are not in it. Attention stays on SDPA. As the heads act on the picture's rows too, questions about one
    picture do not share the pass over it. Beams and compiled decoding work.

    Example:
        >>> VHR(preset="official-code").distance
        'squared'
    """

    name: ClassVar[str] = "vhr"
    source: ClassVar[Source] = Source(
        title="Vision-aware Head Reinforcement",
        year=2025,
        arxiv="2412.13949",
        code="https://github.com/jinghan1he/VHR",
    )
    acts_on: ClassVar[str] = "head outputs"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"distance": "euclidean", "outlier_guard": 0.0},
        "official-code": {"distance": "squared", "outlier_guard": 1.0},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="named set of parameters")
    alpha: float | None = parameter(
        None, float, low=0, high=10, optional=True, search=(1.0, 3.0), help="alpha, gain; none: the model's, mostly 2"
    )
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="layers to act in; none: layer 1 and the last 14 of 32"
    )
    distance: str = parameter(
        None,
        str,
        choices=("euclidean", "squared"),
        search=("euclidean", "squared"),
        idle=(MEASURED, {"drop_outliers": False}),
        help="how far an output moved",
    )
    drop_outliers: bool = parameter(
        True, bool, search=(True, False), idle=(MEASURED,), help="pass over heads that flare up without the picture"
    )
    outlier_guard: float = parameter(
        None,
        float,
        low=0,
        high=1e6,
        idle=(MEASURED, {"drop_outliers": False}),
        help="least deviation of squared distances for that test",
    )
    keep_positions: bool = parameter(
        False, bool, idle=(MEASURED,), help="keep positions when the picture is taken away"
    )
    reinforce_text_branch: bool = parameter(
        False, bool, idle=(MEASURED,), help="reinforce the pass without the picture too"
    )
    profile: str | None = parameter(
        None,
        str,
        optional=True,
        file=True,
        help="file with a vhd profile to take heads from; none: measured for each row",
    )

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one edit of all rows, or none when no row has a picture."""
        reason = self.check(vlm)
        if reason is not None:
            raise IncompatibleDecodersError(f"vhr cannot act: {reason}", "give layers that exist, or a vhd profile")
        pictured = layout.tokens.any(dim=1, keepdim=True)  # (B, 1)
        if not bool(pictured.any()):
            return DecodingPlan()
        layers, gain = self._layers(vlm), self._alpha(vlm)
        profile = None if self.profile is None else profile_for(vlm, self.name, PROFILER, self.profile)
        if profile is not None:
            known = {layer: heads & pictured for layer, heads in enumerate(upper_half(profile.scores).to(vlm.device))}
            return DecodingPlan(edits=(GivenHeads(layers=layers, gain=gain, given=known),))
        rule = Choice(squared=self.distance == "squared", drop=self.drop_outliers, guard=self.outlier_guard)
        blind = _without_picture(vlm, batch, keep_positions=self.keep_positions)
        edit: Reinforcement
        if self.reinforce_text_branch:
            edit = GivenHeads(layers=layers, gain=gain, given=_chosen_together(vlm, batch, blind, layers, gain, rule))
        else:
            edit = DivergentHeads(layers=layers, gain=gain, rule=rule, blind=_last_outputs(vlm, blind, layers))
        return DecodingPlan(edits=(edit,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the model has any of the layers, and that the profile is the model's."""
        count, layers = vlm.layers, self._layers(vlm)
        if not layers.resolve(count):
            return f"layers {layers} are none of the model's {count}"
        return None if self.profile is None else why_no_profile(vlm, self.name, PROFILER, self.profile)

    def folded(self, vlm: Checkpoint) -> dict[int, Tensor]:
        """Returns the gain for each head of a profile; heads that are measured for each question cannot be folded."""
        if self.profile is None:
            raise IncompatibleDecodersError(
                "vhr cannot be folded into weights: it measures its heads for each question",
                "give profile=FILE with a vhd profile, which are the same heads everywhere",
            )
        if reason := self.check(vlm):
            raise IncompatibleDecodersError(f"vhr cannot act: {reason}", "give layers that exist, or a vhd profile")
        profile, gain = profile_for(vlm, self.name, PROFILER, self.profile), self._alpha(vlm)
        chosen = () if profile is None or gain == 1 else enumerate(upper_half(profile.scores))
        acting = self._layers(vlm).resolve(vlm.layers)
        return {layer: torch.where(heads, gain, 1.0) for layer, heads in chosen if layer in acting}

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns the profile's facts, when heads come from one."""
        return {} if self.profile is None else profile_facts(vlm, self.name, PROFILER, self.profile)

    def _layers(self, vlm: Checkpoint) -> LayerSet:
        if self.layers is not None:
            return self.layers
        share = max(1, round(SHARE * vlm.layers))
        return LayerSet(f"1/-{14 if self.preset == 'official-code' else share}:")

    def _alpha(self, vlm: Checkpoint) -> float:
        return ALPHAS.get(vlm.model.config.model_type, 2.0) if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Chooses heads; see ``VHR`` for its parameters."""

    squared: bool
    drop: bool
    guard: float

    def heads(self, shown: Tensor, blind: Tensor) -> Tensor:
        """Chooses the heads of one layer, row by row.

        Args:
            shown: (B, H, D) outputs with the picture.
            blind: (B, H, D) outputs without it.

        Returns:
            (B, H) bool; at most half of a row's heads.
        """
        blind = blind.float()  # squares of float16 would overflow
        squares = (shown.float() - blind).square().sum(dim=-1)  # (B, H)
        moved = squares if self.squared else squares.sqrt()
        flares = blind.square().sum(dim=-1)  # (B, H)
        moved = moved.masked_fill(squares <= ROUNDING**2 * flares, 0.0)
        if self.drop:
            tested = squares.std(dim=1, keepdim=True) > self.guard
            moved = moved.masked_fill(_high(moved) & _high(flares) & tested, 0.0)
        return moved > moved.median(dim=1, keepdim=True).values


@dataclass(frozen=True, eq=False, kw_only=True)
class Reinforcement(OutputEdit):
    """Multiplies the outputs of the heads that were chosen in prefill.

    Attributes:
        gain: alpha.
    """

    gain: float
    rows: ClassVar[Rows] = "all"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"rule", "blind", "given"})

    @abstractmethod
    def chosen(self, site: Site, output: Tensor) -> Tensor:
        """Chooses heads of a layer, (B, H) bool, from its outputs for the prompt, (B, Q, H, D)."""

    def output(self, site: Site, output: Tensor) -> Tensor:
        """Returns the reinforced outputs, (B, Q, H, D)."""
        if site.prefill:
            site.learn("heads", self.chosen(site, output))  # (B, H)
        return torch.where(site.learned("heads")[:, None, :, None], output * self.gain, output)


@dataclass(frozen=True, eq=False, kw_only=True)
class DivergentHeads(Reinforcement):
    """Chooses the heads whose output differs most from the pass without the picture.

    Attributes:
        rule: How to choose.
        blind: Layer number -> (samples, H, D) outputs of the last row without the picture.
    """

    rule: Choice
    blind: Mapping[int, Tensor]

    def chosen(self, site: Site, output: Tensor) -> Tensor:
        """Chooses heads, (B, H) bool; none in a row without a picture."""
        heads = self.rule.heads(output[:, site.predicting], site.spread(self.blind[site.layer]))
        return heads & site.image_keys.any(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedHeads(Reinforcement):
    """Chooses heads by comparing each row with its copy without a picture, in the second half; reinforces both."""

    rule: Choice

    def chosen(self, site: Site, output: Tensor) -> Tensor:
        """Chooses heads, (B, H) bool, the same in both halves."""
        shown, blind = output[:, site.predicting].chunk(2)  # (B / 2, H, D)
        heads = self.rule.heads(shown, blind) & site.image_keys.chunk(2)[0].any(dim=1, keepdim=True)
        return torch.cat([heads, heads])  # (B, H)


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenHeads(Reinforcement):
    """Reinforces heads that are given.

    Attributes:
        given: Layer number -> (samples, H) bool.
    """

    given: Mapping[int, Tensor]

    def chosen(self, site: Site, output: Tensor) -> Tensor:
        """Returns the given heads, (B, H) bool."""
        return site.spread(self.given[site.layer])


def _without_picture(vlm: Checkpoint, batch: Batch, *, keep_positions: bool) -> Batch:
    """Deletes the pictures' tokens from the prompts; the other tokens keep their positions if wished."""
    blind = without_image_tokens(vlm, batch)
    if not keep_positions:
        return blind
    kept = batch.attention_mask.bool() & (batch["input_ids"] != vlm.family.image_token(vlm.model.config))
    positions = prompt_positions(vlm.model, batch)  # (..., B, T)
    rows = [pad(positions[..., row, mask], (blind.length - int(mask.sum()), 0)) for row, mask in enumerate(kept)]
    return blind.with_inputs(position_ids=torch.stack(rows, dim=-2))  # (..., B, T')


@torch.no_grad()
def _last_outputs(vlm: Checkpoint, batch: Batch, layers: LayerSet) -> dict[int, Tensor]:
    """Computes the last row's head outputs without any edit, layer number -> (B, H, D)."""
    found: dict[int, Tensor] = {}

    def read(site: Site, output: Tensor) -> None:
        found[site.layer] = output

    model: Any = vlm.model
    with bare(vlm), edited(vlm, vlm.layout(batch), [LastOutputs(layers=layers, reader=read)]):
        model(**batch, use_cache=False, logits_to_keep=1)
    return found


@torch.no_grad()
def _chosen_together(
    vlm: Checkpoint, batch: Batch, blind: Batch, layers: LayerSet, gain: float, rule: Choice
) -> dict[int, Tensor]:
    """Chooses heads in one pass that also reinforces the rows without a picture, layer number -> (B, H) bool."""
    both = _stacked(vlm, batch, blind)
    edit = PairedHeads(layers=layers, gain=gain, rule=rule)
    model: Any = vlm.model
    with bare(vlm), edited(vlm, vlm.layout(both), [edit]):
        model(**both, use_cache=False, logits_to_keep=1)
    return {layer: memory.of_rows["heads"].chunk(2)[0] for layer, memory in edit.memory.items()}


def _stacked(vlm: Checkpoint, batch: Batch, blind: Batch) -> Batch:
    """Stacks both batches; the second, which has no pictures, is padded to the first's length."""
    missing = batch.length - blind.length
    fill = {"input_ids": vlm.processor.tokenizer.pad_token_id or 0}
    both = {
        name: torch.cat([batch[name], pad(blind[name], (missing, 0), value=fill.get(name, 0))])
        for name in TOKENS
        if name in batch
    }
    both["attention_mask"] = torch.cat([batch.attention_mask, pad(blind.attention_mask, (missing, 0))])
    own = prompt_positions(vlm.model, batch)  # (..., B, T)
    others = blind["position_ids"] if "position_ids" in blind else prompt_positions(vlm.model, blind)
    both["position_ids"] = torch.cat([own, pad(others, (missing, 0))], dim=-2)  # (..., 2B, T)
    sizes = None if batch.sizes is None else (*batch.sizes, *[()] * batch.rows)
    return replace(batch.with_inputs(**both), prompts=None, pictures=None, sizes=sizes)
