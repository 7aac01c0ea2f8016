"""ViCrop: cuts out where the model itself looks for the answer, and asks again with both pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from vlmfix.attention.edit import LayerSet
from vlmfix.decoders.base import Refiner, Source
from vlmfix.decoders.picture.pixels import View, edge_gradients, no_pixel_places, views
from vlmfix.decoders.picture.probing import attention_gradients, compared, missing_layers, pixel_gradients
from vlmfix.decoders.picture.prompts import GENERAL, check_wording, worded
from vlmfix.decoders.picture.refined import (
    Array,
    Look,
    PictureMap,
    PictureMemo,
    Refined,
    clean,
    pixel_box,
    places,
    token_map,
)
from vlmfix.decoders.picture.regions import enlarged
from vlmfix.decoders.picture.windows import best_window, block_grid, blocks, mosaic
from vlmfix.errors import UsageError
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.pixels import digest

logger = logging.getLogger(__name__)

OWN_RESOLUTION = 224
"""Base side, in pixels of the picture, for models that see pictures at their own resolution."""

RELATIVE, GRADIENTS, OF_PIXELS = ({"method": method} for method in ("rel-att", "grad-att", "pure-grad"))

Rows = Sequence[Sequence[Image.Image]]


@dataclass(frozen=True, kw_only=True)
class ViCrop(Refiner):
    """ViCrop: the model's own attention or gradient chooses a window of the picture, which is shown beside the whole.

    With A (H, N) the attention of the row that chooses the first token of the answer, to the N image tokens, and v the
    log-probability of that token::

        rel-att    mean over heads of A(question) / (mean over heads of A(general instruction) + epsilon)      (N,)
        grad-att   mean over heads of A * max(0, dv/dA)                                                        (N,)
        pure-grad  mean over each token's pixels of ||dv/dpixel||_2 on edges                                   (N,)

    The window is the square of ``base`` to 2 x ``base`` pixels whose sum stands out most from that of its neighbours;
    see ``windows.best_window``. It is cut from the original pixels and shown as a further picture.

    Args:
        preset: ``official-code``, the default, which the published figures come from (sharpness per cell; for pure-grad
            a 7 x 7 median and division by the general instruction's gradient; blocks by the picture's shape), or
            ``paper``, to its letter (sharpness of the sum, which favours large windows; 3 x 3; no division; blocks
            never above ``block``).
        method: ``rel-att``, ``grad-att`` or ``pure-grad``.
        layers: Layers that attention is read in; the maps of several are averaged. None takes the layer at 0.45 of the
            decoder's depth (14 of LLaVA-1.5's 32), or at 0.61 for Qwen-VL (22 of 36).
        base: b, smallest side of the window in pixels of the picture; None takes the size of the vision tower's input,
            or 224 for Qwen-VL, which sees pictures at their own resolution.
        by_area: Compares windows of different size by their sharpness per cell.
        high_resolution: A picture with a side above ``block`` is cut into blocks that are looked at one by one; their
            maps are put together as they are.
        block: Side of a block in pixels.
        covering: Cuts either side by itself, so that no block is larger than ``block``.
        median: Side of the median filter of pure-grad's edges, odd.
        against_general: pure-grad is divided by the same gradient under the general instruction.
        epsilon: Added to what is divided by in rel-att.
        enlarge: Enlarges the window to the picture's size. Vision towers with a fixed input do so themselves; Qwen-VL
            does not, and gets few tokens for a small window.
        terse: Probes end with "Answer the question using a single word or phrase."
        general_prompt: The general instruction.
        drop_sinks: Leaves out of the mean over layers the patches that draw attention before the question is read: mean
            over heads, and over the rows up to the last image token, above 5 / N of N. pure-grad reads no attention.

    *Source*: Zhang et al., "MLLMs Know Where to Look: Training-free Perception of Small Visual Details with Multimodal
    LLMs", ICLR 2025, arXiv 2502.17422; code saccharomycetes/mllms_know.

    *Differs*: the map is put where the processor really cut and resized the picture, so that for LLaVA's middle crop
    the window lies in what was seen; the official code stretches it over the whole picture. Families without a
    rectangle of tokens are painted from their tokens' boxes. Blocks are at least one a side, cells larger than the base
    count as one, and what is no number in a map is replaced: the official code fails or ends in a corner there. The
    question is asked as it is given. All pictures of a question are looked at, and all windows follow the pictures.
    In a flat map the first window is taken, as published, and the look says so.

    *Cost*: the answer with twice the pictures, and beforehand, for each question and block: rel-att one part of a
    forward up to the last layer that is read, with one more row per picture (kept for later questions); grad-att one
    forward and one backward for a single token, whose activations are kept; pure-grad one forward and one backward that
    keep the activations of the vision tower and of all tokens in all layers, row by row, and the same per picture with
    ``against_general``. Memory: rel-att and grad-att keep one row of attention per layer and head, grad-att also one
    token's activations; pure-grad's grows with tokens x layers, about 2 x (10 x width + 4 x inner width) bytes for each
    of them in bfloat16 (LLaVA-1.5-7B at 620 tokens: counted, 3.4 GB). A row without a picture is left as it is.

    Example:
        >>> ViCrop(method="grad-att").by_area
        True
    """

    name: ClassVar[str] = "vicrop"
    source: ClassVar[Source] = Source(
        title="ViCrop: MLLMs Know Where to Look",
        year=2025,
        arxiv="2502.17422",
        code="https://github.com/saccharomycetes/mllms_know",
    )
    acts_on: ClassVar[str] = "the picture: adds a window of it"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"by_area": False, "covering": True, "median": 3, "against_general": False},
        "official-code": {"by_area": True, "covering": False, "median": 7, "against_general": True},
    }

    preset: str = parameter("official-code", str, choices=("paper", "official-code"), help="named set of parameters")
    method: str = parameter(
        "rel-att",
        str,
        choices=("rel-att", "grad-att", "pure-grad"),
        search=("rel-att", "grad-att"),
        help="what the window is chosen by",
    )
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, idle=(OF_PIXELS,), help="layers read; none: by the model's depth"
    )
    base: int | None = parameter(
        None, int, low=1, high=16384, optional=True, help="b, smallest side of the window; none: by the model"
    )
    by_area: bool = parameter(None, bool, help="sharpness per cell of the window")
    high_resolution: bool = parameter(False, bool, help="looks at large pictures block by block")
    block: int = parameter(
        1024, int, low=16, high=16384, idle=({"high_resolution": False},), help="side of a block in pixels"
    )
    covering: bool = parameter(None, bool, idle=({"high_resolution": False},), help="no block is larger than that")
    median: int = parameter(
        None, int, low=1, high=31, idle=(RELATIVE, GRADIENTS), help="side of the median filter of the edges, odd"
    )
    against_general: bool = parameter(
        None, bool, idle=(RELATIVE, GRADIENTS), help="divides by the general instruction's gradient"
    )
    epsilon: float = parameter(
        0.0, float, low=0, high=1, idle=(GRADIENTS, OF_PIXELS), help="added to what is divided by"
    )
    enlarge: bool = parameter(False, bool, search=(False, True), help="enlarges the window to the picture's size")
    terse: bool = parameter(True, bool, help="probes ask for a single word or phrase")
    general_prompt: str = parameter(
        GENERAL,
        str,
        idle=(GRADIENTS, {**OF_PIXELS, "against_general": False}),
        help="the general instruction",
    )
    drop_sinks: bool = parameter(
        False,
        bool,
        later=True,
        idle=(OF_PIXELS,),
        help="leaves out patches that draw attention before the question is read",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_wording(self.name, self.general_prompt)
        if self.median % 2 == 0:
            raise UsageError(f"{self.name}: median={self.median} is not allowed", "allowed: odd numbers up to 31")

    def refine(self, vlm: Checkpoint, pictures: Rows, prompts: Sequence[str], memo: PictureMemo) -> list[Refined]:
        """Looks at the pictures of all rows and adds a window for each; see ``Decoder.refine``."""
        wanted = [worded(prompt, self.terse) for prompt in prompts]
        if self.high_resolution:
            maps = [
                [self._of_blocks(vlm, picture, prompt, memo, len(pictures)) for picture in row]
                for row, prompt in zip(pictures, wanted, strict=True)
            ]
        else:
            about = [number for number, row in enumerate(pictures) if row]
            found = self._maps(vlm, [pictures[n] for n in about], [wanted[n] for n in about], memo) if about else []
            by_row = dict(zip(about, found, strict=True))
            maps = [by_row.get(number, []) for number in range(len(pictures))]
        return [self._refined(vlm, row, own) for row, own in zip(pictures, maps, strict=True)]

    def layers_of(self, vlm: Checkpoint) -> LayerSet:
        """Returns the layers that attention is read in."""
        if self.layers is not None:
            return self.layers
        count = vlm.layers
        share = 0.61 if _own_resolution(vlm) else 0.45
        return LayerSet(str(min(round(share * count), count - 1)))

    def base_of(self, vlm: Checkpoint) -> int:
        """Returns the smallest side of a window in pixels of the picture."""
        if self.base is not None:
            return self.base
        if _own_resolution(vlm):
            return OWN_RESOLUTION
        size = vlm.model.config.vision_config.image_size
        return int(size if isinstance(size, int) else max(size))

    def _maps(
        self, vlm: Checkpoint, pictures: Rows, prompts: Sequence[str], memo: PictureMemo
    ) -> list[list[PictureMap]]:
        """Makes a map for each picture of each row; every row has pictures."""
        if self.method == "pure-grad":
            return [self._of_pixels(vlm, *row, memo) for row in zip(pictures, prompts, strict=True)]
        layout, values = (self._relative if self.method == "rel-att" else self._gradients)(vlm, pictures, prompts, memo)
        return [
            [token_map(layout, places(layout.tokens[row], own), row=row, image=image) for image in range(len(shown))]
            for row, (own, shown) in enumerate(zip(values, pictures, strict=True))
        ]

    def _relative(
        self, vlm: Checkpoint, pictures: Rows, prompts: Sequence[str], memo: PictureMemo
    ) -> tuple[ImageLayout, list[Tensor]]:
        """Computes rel-att, (image tokens,) for each row, and the layout with these tokens."""
        general = worded(self.general_prompt, self.terse)
        found = compared(vlm, pictures, prompts, general, self.layers_of(vlm), memo, drop_sinks=self.drop_sinks)
        sinks: Sequence[Tensor | None] = found.sinks or [None] * len(prompts)
        return found.layout, [
            _mean(own[0].double() / (other[0].double() + self.epsilon), out)
            for own, other, out in zip(found.asked, found.general, sinks, strict=True)
        ]

    def _gradients(
        self, vlm: Checkpoint, pictures: Rows, prompts: Sequence[str], memo: PictureMemo
    ) -> tuple[ImageLayout, list[Tensor]]:
        """Computes grad-att, (image tokens,) for each row, and the layout with these tokens."""
        batch = vlm.encode(prompts, pictures)
        layout = vlm.layout(batch)
        found, sinks = attention_gradients(vlm, batch, self.layers_of(vlm), drop_sinks=self.drop_sinks)
        return layout, [
            _mean(values[:, own].double(), None if sinks is None else sinks[row][:, own])
            for row, (values, own) in enumerate(zip(found, layout.tokens.cpu(), strict=True))
        ]

    def _of_pixels(
        self, vlm: Checkpoint, pictures: Sequence[Image.Image], prompt: str, memo: PictureMemo
    ) -> list[PictureMap]:
        """Computes pure-grad, one map for each picture of one row."""
        general: list[Array] = []
        if self.against_general:
            wording = worded(self.general_prompt, self.terse)

            def ask_generally(rows: list[int]) -> list[list[Array]]:
                return [[view.strength for view in _views(vlm, wording, pictures)[1]]]

            (general,) = memo.recall([("pixels", digest(pictures), wording)], ask_generally)
        batch, seen = _views(vlm, prompt, pictures)
        values = torch.zeros(batch.length, dtype=torch.float64)  # (T,)
        for number, view in enumerate(seen):
            noise = general[number] if self.against_general else None
            values[view.columns] = edge_gradients(view, pictures[view.image], self.median, noise)
        layout = vlm.layout(batch)
        return [token_map(layout, values, row=0, image=image) for image in range(len(pictures))]

    def _of_blocks(
        self, vlm: Checkpoint, picture: Image.Image, prompt: str, memo: PictureMemo, most: int
    ) -> PictureMap:
        """Assembles the map of one picture from maps of its blocks, ``most`` of which run at once."""
        grid = block_grid(*picture.size, self.block, covering=self.covering)
        parts = [picture] if grid == (1, 1) else blocks(picture, grid)
        found: list[PictureMap] = []
        for start in range(0, len(parts), most):
            some = parts[start : start + most]
            found += [own[0] for own in self._maps(vlm, [[part] for part in some], [prompt] * len(some), memo)]
        if grid == (1, 1):
            return found[0]
        return PictureMap(mosaic([part.over_whole() for part in found], grid))

    def _refined(self, vlm: Checkpoint, pictures: Sequence[Image.Image], maps: Sequence[PictureMap]) -> Refined:
        looks = tuple(self.look(vlm, picture, own) for picture, own in zip(pictures, maps, strict=True))
        return Refined((*pictures, *(look.picture for look in looks)), looks)

    def look(self, vlm: Checkpoint, picture: Image.Image, found: PictureMap) -> Look:
        """Cuts the window out of one picture.

        Args:
            vlm: The model, for the window's size.
            picture: RGB.
            found: The map over it.
        """
        width, height = picture.size
        values, replaced = clean(found.values)
        x0, y0, x1, y1 = pixel_box(found.box, width, height)
        window = best_window(values, x1 - x0, y1 - y0, self.base_of(vlm), by_area=self.by_area)
        left, top, right, bottom = window.box
        box = (x0 + left, y0 + top, x0 + right, y0 + bottom)
        problem = "" if window.peaked else "the map is flat; the first window was taken"
        if replaced:
            logger.info("vicrop: a map held values that are no numbers; they were replaced")
        part = picture.crop(box)
        return Look(
            picture=enlarged(part, picture.size) if self.enlarge else part,
            box=(box[0] / width, box[1] / height, box[2] / width, box[3] / height),
            map=PictureMap(values, found.box),
            problem=problem,
        )

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the model has the layers, and for pure-grad that its pixels have a place."""
        if self.method == "pure-grad":
            return no_pixel_places(vlm)
        return missing_layers(self.layers_of(vlm), vlm.layers)


def _mean(values: Tensor, sinks: Tensor | None) -> Tensor:
    """Averages (layers, N) values over layers, without those in which a patch is a sink, (N,); 0 where it always is."""
    if sinks is None:
        return values.mean(dim=0)
    return values.masked_fill(sinks, 0.0).sum(dim=0) / (~sinks).sum(dim=0).clamp(min=1)


def _own_resolution(vlm: Checkpoint) -> bool:
    return "qwen" in str(vlm.model.config.model_type)


def _views(vlm: Checkpoint, prompt: str, pictures: Sequence[Image.Image]) -> tuple[Batch, list[View]]:
    batch = vlm.encode([prompt], [pictures])
    return batch, views(vlm, batch, pixel_gradients(vlm, batch))
