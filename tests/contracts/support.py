"""What the contracts share: inputs, parameters that change nothing or much, and one way to run."""

from __future__ import annotations

import atexit
import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.heads.made import made_directions
from tests.tiny import TINY, tiny_vlm
from vlmfix.attention import edit as edits
from vlmfix.attention.edit import OutputEdit, Site
from vlmfix.decoders import Decoder, DecodingPlan, Greedy, Strategy, parse
from vlmfix.generation import VLM
from vlmfix.heads.directions.kept import save_directions
from vlmfix.models.checkpoint import DIRECTIONS, Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.testing import PICTURES as PICTURES
from vlmfix.testing import PROMPTS as PROMPTS
from vlmfix.testing import Forced as Forced
from vlmfix.testing import close as close
from vlmfix.testing import logits as logits
from vlmfix.testing import picture as picture
from vlmfix.upstream.names import TYPES


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadGain(OutputEdit):
    gain: float = 1.7

    def output(self, site: Site, output: Tensor) -> Tensor:
        heads = torch.arange(site.heads, device=output.device)[None, None, :, None]
        return output * torch.where(heads % 2 == 0, self.gain, 1.0)


@dataclass(frozen=True, kw_only=True)
class HeadGains(Greedy):
    """An output edit of the text behind a picture as a decoder, so that all contracts hold for that kind."""

    gain: float = 1.7

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        return DecodingPlan(edits=(HeadGain(gain=self.gain),))


_ACT = "act:heads=all,layers=all,sink_factor=1"
_VAR = "var:sink_dims=1/2/3/4,sink_threshold=0.8,min_visual_mass=0,min_nonsink_ratio=0,layers=2:"
_ADHH = "adhh:heads=L0H0/L0H3/L0H5/L1H1/L1H6/L2H2/L2H7"
_GIFT = "gift:saliency_layers=0,layers=1:"

NEUTRAL: dict[str, str | Decoder] = {
    "greedy": "greedy",
    "var": f"{_VAR},moved_fraction=0",
    "locore": "locore:strength=0",
    "locore-score": "locore:strength=0,mode=score",
    "locore-post": "locore:strength=0,mode=post",
    "vcd": "vcd:contrast=0,plausibility=0",
    "inter": "inter:variance=inf,plausibility=0",
    "vhr": "vhr:alpha=1",
    "vhr-both": "vhr:alpha=1,reinforce_text_branch=true,keep_positions=true",
    "gift": "gift:alpha=0",
    "gift-no-heads": "gift:image_heads=0,saliency_layers=2,layers=0:2",
    "zerotuning": "zerotuning:gain=1",
    "act": f"{_ACT},kept_fraction=1",
    "spin": "spin:suppression=1",
    "spin-scores": "spin:preset=official-code,kept_share=1",
    "adhh": f"{_ADHH},threshold=1.1",
    "ph3": "ph3:share=0",
    "imbalance": "imbalance:significance=received,alpha=0,beta=0",
    "apc": "apc:plausibility=0",
    "icd": "icd:contrast=0,plausibility=0",
    "m3id": "m3id:decay=0,plausibility=0",
    "flb": "flb:strength=0,plausibility=0",
    "deco": "deco:strength=0,nucleus=1,candidates=1000",
    "avisc": "avisc:contrast=0,plausibility=0",
    "sid": "sid:contrast=0,plausibility=0",
    "mod": "mod:contrast=0,complement=0,plausibility=0",
    "pai": "pai:gain=0,guidance=1",
    "vaf": "vaf:image=1,system=1,layers=all",
    "acg": "acg:strength=0",
    "kvsmooth": "kvsmooth:strength=0,spread=0,layers=all",
    "vista": "vista:strength=0,augmentation=0",
    "vista-layer": "vista:strength=0,augmentation=0,place=layer",
    "revisit": "revisit:strength=0,plausibility=0",
    "amplify": "amplify:heads=L0H2/L1H6,by=1",
    "only": "only:contrast=0,complement=0,plausibility=0",
    "memvr": "memvr:ratio=0",
    "vti": "vti:text=0,image=0",
    "nullu": "nullu:rank=0",
    "pti": "pti:keys=0,values=0",
    "head-gains": HeadGains(gain=1.0),
}
"""Parameters under which a method does nothing."""

STRONG: dict[str, str | Decoder] = {
    "var": f"{_VAR},moved_fraction=1",
    "locore": "locore:strength=4",
    "locore-score": "locore:strength=4,mode=score",
    "locore-post": "locore:strength=4,mode=post",
    "vcd": "vcd:contrast=1.5,plausibility=0",
    "inter": "inter:variance=0,plausibility=0",
    "vhr": "vhr:alpha=4,layers=all",
    "gift": f"{_GIFT},alpha=6",
    "zerotuning": "zerotuning:gain=20,heads=0/3/4/7",
    "zerotuning-text": "zerotuning:gain=20,heads=0/3/4/7,rows=text",
    "act": f"{_ACT},kept_fraction=0",
    "act-text": f"{_ACT},kept_fraction=0,rows=text",
    "spin": "spin:kept_share=0.5",
    "spin-scores": "spin:preset=official-code,kept_share=0.5,suppression=0.2",
    "adhh": f"{_ADHH},threshold=0.2",
    "ph3": "ph3:heads=L0H2/L1H0/L1H6/L2H5",
    "imbalance": "imbalance:significance=received,alpha=1,beta=0.8,local_share=0.5,layers=all",
    "icd": "icd:contrast=1.5,plausibility=0,place=question",
    "m3id": "m3id:decay=1,plausibility=0",
    "flb": "flb:strength=3,decay=5,plausibility=0",
    "dola": "dola:layers=0:,plausibility=0",
    "deco": "deco:strength=2,nucleus=1,candidates=1000,layers=0:",
    "avisc": "avisc:contrast=1.5,plausibility=0",
    "sid": "sid:contrast=1.5,plausibility=0,kept=0.3,layer=0",
    "mod": "mod:kept=0.3,agreement=0.001,contrast=1.5,plausibility=0",
    "pai": "pai:gain=3,guidance=2,plausibility=0,layers=all",
    "vaf": "vaf:image=3,system=0.2,layers=all",
    "acg": "acg:strength=4",
    "kvsmooth": "kvsmooth:strength=0.6,spread=0.4,window=3,layers=all",
    "kvsmooth-before": "kvsmooth:strength=0.6,spread=0.4,window=3,layers=all,rotary=before",
    "vista": "vista:strength=1",
    "vista-layer": "vista:strength=0.5,augmentation=0,place=layer",
    "revisit": "revisit:strength=3,plausibility=0",
    "amplify": "amplify:heads=L0H2/L1H0/L1H6/L2H5,by=3,identity=0.6",
    "only": "only:agreement=0.7,contrast=1.5,plausibility=0",
    "memvr": "memvr:ratio=0.7,threshold=0.5,layers=0:2",
    "vti": "vti:text=6,image=6",
    "nullu": "nullu:rank=5,layers=all",
    "pti": "pti:keys=2,values=3",
    "chain-attention": f"zerotuning:gain=0,heads=1/2+{_ACT},kept_fraction=0.2+spin:preset=official-code,kept_share=0.5",
    "head-gains": HeadGains(),
    "chain": f"{_VAR},moved_fraction=1+{_GIFT}+locore:strength=2+vcd:plausibility=0+inter:variance=0,plausibility=0",
    "chain-heads": "vhr:alpha=4,layers=all+gift:saliency_layers=2,layers=1:+vcd:plausibility=0",
}
"""Parameters under which it does much, and three chains."""

EVERY_ROW = (
    *("vhr", "ph3", "chain-heads", "zerotuning", "act", "sid"),
    *("chain-attention", "vista", "vista-layer", "revisit", "amplify", "memvr", "vti", "nullu"),
)
"""Methods that change or read every row of a prompt, the picture's too, so that prompts cannot share them."""


def method_of(spec: str | Decoder) -> Decoder:
    """A decoder, or the one that a specification names."""
    return parse(spec) if isinstance(spec, str) else spec


_FOLDERS = Path(mkdtemp())
atexit.register(shutil.rmtree, _FOLDERS, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Tiny(VLM):
    """A tiny model in whose folder lie directions that a test makes up, for the methods that read some."""

    seed: int = 0

    @property
    def folder(self) -> Path:
        return _folder(self.name, self.seed)


@functools.cache
def _folder(family: str, seed: int) -> Path:
    folder = _FOLDERS / f"{family}-{seed}"
    folder.mkdir()
    save_directions(made_directions(tiny_vlm(family, seed=seed)), folder / DIRECTIONS)
    return folder


def vlm_of(family: str, seed: int = 0) -> VLM:
    """The tiny model of a family, with random weights of a seed, as a model that answers."""
    tiny = tiny_vlm(family, seed=seed)
    return Tiny(model=tiny.model, processor=tiny.processor, family=tiny.family, name=family, seed=seed)


def batch_of(vlm: VLM, rows: Sequence[int] = (0, 1)) -> Batch:
    """The chosen rows, encoded together."""
    return vlm.encode([PROMPTS[row] for row in rows], [PICTURES[row] for row in rows])


def extended(batch: Batch, tokens: Tensor) -> dict[str, Tensor]:
    """Inputs of a pass over prompts and (B, n) tokens behind them."""

    def longer(name: str, fill: Tensor) -> dict[str, Tensor]:
        return {name: torch.cat([batch[name], fill], dim=1)} if name in batch else {}

    types = {name: value for kind in TYPES for name, value in longer(kind, torch.zeros_like(tokens)).items()}
    return {**batch, **longer("input_ids", tokens), **longer("attention_mask", torch.ones_like(tokens)), **types}


PAIR = ("llava", "qwen2_5_vl")
"""The families that every method meets: pictures of one size and of their own, plain and multimodal positions."""


UNLIKE = (*PAIR, "gemma3")
"""Families that differ in what a pass is told: positions, and masks by kind of layer."""


def unlike(families: Sequence[str] = TINY) -> list:
    """Families for ``parametrize`` of a property that their layouts do not touch; others are marked ``product``."""
    return [pytest.param(name, marks=() if name in UNLIKE else pytest.mark.product) for name in families]


def crossed(
    table: Mapping[str, str | Decoder],
    *,
    families: Sequence[str] = TINY,
    pair: Sequence[str] = PAIR,
    turn: int | None = None,
) -> list:
    """Pairs (family, name) of a table's methods, for ``parametrize``.

    Families differ in layouts, positions and towers, methods in mathematics, so few pairs say more than their parts:
    every method meets the families of ``pair``, and every family meets each method whose plan has a part that no method
    before it in the table has. Tests that ask much the same of a pair share the pairs between them, by a number of
    their own: such a method meets one family in three beside ``pair``, another one in each of three tests, and a method
    that brings nothing new meets one family of ``pair``. The other pairs are marked ``product`` and left to
    ``pytest -m product``.

    Args:
        table: Methods by name.
        families: Names of tiny models, or of whatever stands for a family.
        pair: Those of them that every method meets.
        turn: Number of the test among those that share the pairs; None for one that shares with nobody.
    """
    seen: set[str] = set()
    others = [family for family in families if family not in pair]
    pairs, kinds = [], 0
    for place, (name, spec) in enumerate(table.items()):
        parts = parts_of(method_of(spec))
        spread = not parts <= seen
        seen |= parts
        met = {*pair, *(others if spread else ())}
        if turn is not None:
            third = {family for number, family in enumerate(others) if (number + kinds + turn) % 3 == 0}
            half = {family for number, family in enumerate(pair) if (number + place + turn) % 2 == 0}
            met = {*pair, *third} if spread else half
        kinds += spread
        pairs += [pytest.param(family, name, marks=() if family in met else pytest.mark.product) for family in families]
    return pairs


def few(table: Mapping[str, str | Decoder]) -> list[str]:
    """Names of a table's methods that together have every part that any of them has: the richest first."""
    parts = {name: parts_of(method_of(spec)) for name, spec in table.items()}
    chosen: list[str] = []
    missing = frozenset().union(*parts.values())
    while missing:
        chosen.append(max(table, key=lambda name: len(parts[name] & missing)))
        missing -= parts[chosen[-1]]
    return chosen


def parts_beside(plan: DecodingPlan) -> set[str]:
    """What a plan has beside edits of the text decoder, branches and a choice."""
    return ({"gate"} if plan.gate else set()) | ({"tower"} if plan.tower else set())


@functools.cache
def parts_of(method: Decoder) -> frozenset[str]:
    """What a method consists of: the kinds of its edits and branches, the rows that it edits, gate and choice.

    A method that refines pictures has no plan: it is told by its class and by what it looks at.
    """
    if method.refines:
        return frozenset({type(method).__name__, f"looks at {method.parameters().get('method')}"})
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    plan = method.plan(vlm, batch, vlm.layout(batch))
    kinds = {base.__name__ for edit in plan.edits for base in type(edit).__mro__ if base.__module__ == edits.__name__}
    rows = {f"{edit.rows} rows" for edit in plan.edits}
    branches = [branch for contrast in plan.contrasts for branch in contrast.branches]
    asked = {f"pictures: {'pixel_values' in branch.batch}, clean: {branch.same_pictures}" for branch in branches}
    chosen = set(asdict(method.strategy or Strategy()).items()) - set(asdict(Strategy()).items())
    return frozenset(kinds | rows | asked | {name for name, _ in chosen} | parts_beside(plan))


def plain(vlm: VLM, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The same without any decoder of ours."""
    return logits(vlm, batch, Greedy(), **options)
