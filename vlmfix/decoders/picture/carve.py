"""CARVE: shows the model the part of the picture at which the question, unlike a bland instruction, makes it look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmfix.attention.edit import LayerSet
from vlmfix.decoders.base import Refiner, Source
from vlmfix.decoders.picture.probing import compared, missing_layers
from vlmfix.decoders.picture.prompts import GENERAL, check_wording, worded
from vlmfix.decoders.picture.refined import WHOLE, Look, PictureMap, PictureMemo, Refined, places, token_map
from vlmfix.decoders.picture.regions import Ranking, Rule, best_regions, bounding_box, carved, grown, threshold
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint

PUBLISHED = LayerSet("20:26")
"""The layers of all four models of the paper, which have 28 to 40."""

Steps = Literal["first", "all", "last", "own-last"]


@dataclass(frozen=True, kw_only=True)
class CARVE(Refiner):
    """Contrastive Attention Refinement for Visual Enhancement: shows the part to which the question draws attention.

    The picture is asked about twice, with the question Q and with a general instruction G. With A (N,) the attention of
    the row that chooses token t to the N image tokens in layer l, averaged over heads::

        contrast[l, t] = A_Q[l, t] / (A_G[l, t] + ridge)           (N,)
        S = sum over t of w[t] * sum over l of contrast[l, t]      w = 1, 2, 3, ...   at the picture's size, bilinear

    The ``kept_share`` of pixels with the largest S falls into 4-connected regions; those with the largest sum of S
    stay, the rest turns black, and their bounding box, enlarged to cover the picture's size, is shown to the model.

    Args:
        preset: ``paper`` (last step, 2 regions at most, 0.4 of the pixels, the refined picture alone: the best cells of
            its tables, as it does not name one setting) or ``official-code`` (all steps, 3 regions at least, 0.2 of the
            pixels, the original and the refined picture, terse probes).
        layers: Layers that are read; None takes 20 to 25 for a decoder of 28 to 40 layers, as published, and the same
            share of its depth, 0.71 to 0.89, for others.
        steps: Tokens whose rows are read: ``first``; ``all`` that both answers have, later ones weighted higher;
            ``last``, the last that both have; or ``own-last``, each answer's own.
        ridge: lambda > 0, added to the general attention. Attention to one of N tokens is about 1/N: from there on the
            contrast fades into A_Q.
        relative_ridge: Adds this share of the mean general attention to ``ridge``, against tokens that the general
            instruction does not look at at all.
        kept_share: p in (0, 1], share of the pixels that pass the threshold.
        regions: K, number of regions.
        region_rule: ``at-most`` K regions, or ``at-least`` K: then the share p of all regions, when that is more.
        ranking: ``attention`` (sum of S), ``size`` (area), or ``remove-small``, which keeps all but specks.
        shown: The pictures that the model is asked about: ``refined``, or ``both``, the original picture before it.
        smallest_side: Fewest pixels along a side of the box that is cut out.
        largest_aspect: Longest over shortest side of the box; a thinner one is widened.
        terse: Both probes end with "Answer the question using a single word or phrase."
        probe_tokens: Longest answer of a probe in tokens; with ``steps=first`` it is not read.
        general_prompt: The general instruction.
        drop_sinks: Leaves out patches that draw attention before the question is read, layer by layer (mean over heads,
            and over the rows up to the last image token, above 5 / N of N), and rows that choose no part of a content
            word.

    *Source*: Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", 2025, arXiv 2509.06461;
    code YuyaoGe/CARVE, which has no licence and was not used.

    *Differs*: the map is put where the processor really cut and resized the picture, instead of over all of it, and is
    zero where the model saw nothing; families without a rectangle of tokens are painted from their tokens' boxes.
    Rows are read with a cache, in the named layers alone, and averaged in float32. Layers that do not exist, and a map
    that is not finite, are reported and not passed over. Boxes longer than 4:1 are widened. The question itself is
    asked as it is given; the official code appends the terse sentence there too. A question about several pictures
    refines each by its own part of the map.

    *Cost*: one answer of at most ``probe_tokens`` tokens to the question, beside it in the same passes one to the
    general instruction for each distinct picture (kept for later questions), and the answer itself, with two pictures
    when ``both`` are shown. With ``steps=first`` a probe is a part of a forward: layers behind the last one that is
    read are not run. Memory:
    S x N x T floats of a row. A row without a picture is left as it is.

    Example:
        >>> CARVE().kept_share, CARVE(preset="official-code").kept_share
        (0.4, 0.2)
    """

    name: ClassVar[str] = "carve"
    source: ClassVar[Source] = Source(
        title="Contrastive Attention Refinement for Visual Enhancement",
        year=2025,
        arxiv="2509.06461",
        code="https://github.com/YuyaoGe/CARVE",
    )
    acts_on: ClassVar[str] = "the picture: masks, crops and enlarges it"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {
            "steps": "last",
            "kept_share": 0.4,
            "regions": 2,
            "region_rule": "at-most",
            "shown": "refined",
            "terse": False,
        },
        "official-code": {
            "steps": "all",
            "kept_share": 0.2,
            "regions": 3,
            "region_rule": "at-least",
            "shown": "both",
            "terse": True,
        },
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="named set of parameters")
    layers: LayerSet | None = parameter(None, LayerSet, optional=True, help="layers read; none: by the model's depth")
    steps: str = parameter(
        None,
        str,
        choices=("first", "all", "last", "own-last"),
        search=("first", "all", "last"),
        help="tokens whose rows are read",
    )
    ridge: float = parameter(
        1e-8, float, low=1e-12, high=1e3, search=(1e-8, 1e-2), log=True, help="lambda, added to the general attention"
    )
    relative_ridge: float = parameter(
        0.0, float, low=0, high=1e3, help="added to lambda, as a share of the mean general attention"
    )
    kept_share: float = parameter(
        None, float, low=1e-6, high=1, search=(0.05, 0.8), help="p, share of the pixels above the threshold"
    )
    regions: int = parameter(
        None, int, low=1, high=10000, search=(1, 5), idle=({"ranking": "remove-small"},), help="K, number of regions"
    )
    region_rule: str = parameter(
        None,
        str,
        choices=("at-most", "at-least"),
        idle=({"ranking": "remove-small"},),
        help="whether K is the most or the least",
    )
    ranking: str = parameter(
        "attention", str, choices=("attention", "size", "remove-small"), help="what regions are chosen by"
    )
    shown: str = parameter(
        None,
        str,
        choices=("refined", "both"),
        search=("refined", "both"),
        help="pictures that the model is asked about",
    )
    smallest_side: int = parameter(1, int, low=1, high=4096, help="fewest pixels along a side of the box")
    largest_aspect: float = parameter(4.0, float, low=1, high=1e4, help="longest over shortest side of the box")
    terse: bool = parameter(None, bool, help="probes ask for a single word or phrase")
    probe_tokens: int = parameter(
        32, int, low=1, high=1024, idle=({"steps": "first"},), help="longest answer of a probe, in tokens"
    )
    general_prompt: str = parameter(GENERAL, str, help="the general instruction")
    drop_sinks: bool = parameter(
        False,
        bool,
        later=True,
        help="leaves out patches that draw attention whatever is asked, and stop words",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_wording(self.name, self.general_prompt)

    def refine(
        self, vlm: Checkpoint, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str], memo: PictureMemo
    ) -> list[Refined]:
        """Probes all rows that have a picture, and carves their pictures; see ``Decoder.refine``."""
        refined = [Refined(tuple(row)) for row in pictures]
        about = [number for number, row in enumerate(pictures) if row]
        if not about:
            return refined
        shown = [pictures[number] for number in about]
        layers, general = self.layers_of(vlm), worded(self.general_prompt, self.terse)
        budget = 1 if self.steps == "first" else self.probe_tokens
        asking = [worded(prompts[number], self.terse) for number in about]
        found = compared(vlm, shown, asking, general, layers, memo, steps=budget, drop_sinks=self.drop_sinks)
        for row, number in enumerate(about):
            asked = found.asked[row] if found.sinks is None else found.asked[row].masked_fill(found.sinks[row], 0.0)
            words = None if found.speaking is None else found.speaking[row]
            values = places(found.layout.tokens[row], self.fused(asked, found.general[row], words))
            maps = [token_map(found.layout, values, row=row, image=image) for image in range(len(shown[row]))]
            refined[number] = self._refined(shown[row], maps)
        return refined

    def layers_of(self, vlm: Checkpoint) -> LayerSet:
        """Returns the layers to read in a model."""
        count = vlm.layers
        if self.layers is not None:
            return self.layers
        if 28 <= count <= 40:
            return PUBLISHED
        first, last = (min(round(share * count), count - 1) for share in (0.71, 0.89))
        return LayerSet(f"{first}:{last + 1}")

    def fused(self, question: Tensor, general: Tensor, speaking: Sequence[bool] | None = None) -> Tensor:
        """Computes S on the image tokens.

        Args:
            question: (S, layers, N) attention under the question.
            general: (S', layers, N) attention under the general instruction; of another length, as a rule.
            speaking: Which of the S steps count, if they can; None for all.

        Returns:
            (N,) float64.
        """
        common = min(len(question), len(general))
        own = [step for step in range(len(question)) if speaking is None or speaking[step]]
        both = [step for step in own if step < common] or list(range(common))
        chosen = {
            "first": ([0], [0]),
            "all": (both, both),
            "last": (both[-1:], both[-1:]),
            "own-last": (own[-1:], [-1]),
        }[cast(Steps, self.steps)]
        image, noise = question[chosen[0]].double(), general[chosen[1]].double()
        ridge = self.ridge + self.relative_ridge * noise.mean(dim=-1, keepdim=True)
        contrast = (image / (noise + ridge)).sum(dim=1)  # (S, N)
        weights = torch.tensor(both if self.steps == "all" else [0], dtype=torch.float64) + 1
        return weights @ contrast

    def _refined(self, pictures: Sequence[Image.Image], maps: Sequence[PictureMap]) -> Refined:
        looks = tuple(self.look(picture, found) for picture, found in zip(pictures, maps, strict=True))
        new = tuple(look.picture for look in looks)
        return Refined((*pictures, *new) if self.shown == "both" else new, looks)

    def look(self, picture: Image.Image, found: PictureMap) -> Look:
        """Carves one picture by its map.

        Args:
            picture: RGB.
            found: S on a grid over it.
        """
        width, height = picture.size
        if not np.isfinite(found.values).all():
            return Look(picture, WHOLE, found, "the map is not finite; the picture is left as it is")
        values = found.pixels(height, width)
        mask = best_regions(
            values,
            threshold(values, self.kept_share),
            count=self.regions,
            rule=cast(Rule, self.region_rule),
            ranking=cast(Ranking, self.ranking),
            share=self.kept_share,
        )
        box = grown(bounding_box(mask), width, height, smallest=self.smallest_side, aspect=self.largest_aspect)
        x0, y0, x1, y1 = box
        part = (x0 / width, y0 / height, x1 / width, y1 / height)
        return Look(carved(picture, mask, box), part, found)

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the model has the layers that are named."""
        return missing_layers(self.layers_of(vlm), vlm.layers)
