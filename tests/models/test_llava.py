"""LLaVA-1.5: crops, padding, stretching and class tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessor,
    LlavaProcessor,
    SiglipImageProcessor,
)

from tests.models.spotlight import embeddings, painted, plain
from tests.tiny import tiny_vlm
from vlmfix.errors import LayoutError, UnsupportedModelError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.models.llava import _resized

SHORT = {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
IMAGE_PROCESSORS = {
    "crop": CLIPImageProcessor(**SHORT),
    "crop by PIL": CLIPImageProcessorPil(**SHORT),
    "narrow crop": CLIPImageProcessor(size={"shortest_edge": 60}, crop_size={"height": 40, "width": 40}),
    "filled crop": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 40, "width": 40}),
    "stretch": SiglipImageProcessor(size={"height": 40, "width": 40}),
    "square": LlavaImageProcessor(do_pad=True, do_center_crop=False, size={"height": 40, "width": 40}),
    "square by edge": LlavaImageProcessor(do_pad=True, **SHORT),
}


def with_processor(**changed: Any) -> Checkpoint:
    vlm = tiny_vlm("llava")
    settings = {
        "image_processor": vlm.processor.image_processor,
        "tokenizer": vlm.processor.tokenizer,
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": vlm.processor.chat_template,
    }
    return replace(vlm, processor=LlavaProcessor(**{**settings, **changed}))


def boxes_of(vlm: Checkpoint, width: int, height: int) -> torch.Tensor:
    layout = vlm.layout(vlm.encode(["?"], [[plain(width, height)]]))
    return layout.boxes[layout.image == 0]


@pytest.mark.parametrize("size", [(90, 60), (60, 150), (64, 64), (30, 20)])
@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_tokens_look_where_their_boxes_are(kind: str, size: tuple[int, int]) -> None:
    vlm = with_processor(image_processor=IMAGE_PROCESSORS[kind])
    empty = vlm.encode(["?"], [[plain(*size)]])
    layout = vlm.layout(empty)
    placed = layout.boxes[0].isfinite().all(dim=1)
    before = embeddings(vlm, empty)
    cells = [(x / 6, y / 6, (x + 1) / 6, (y + 1) / 6) for x in range(6) for y in range(6)]
    after = embeddings(vlm, vlm.encode(["?"] * 36, [[painted(*size, cell)] for cell in cells]))
    for cell, moved in zip(cells, (after - before).norm(dim=-1), strict=True):
        x, y = (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2
        x0, y0, x1, y1 = layout.boxes[0].T
        covers = (x0 < x) & (x < x1) & (y0 < y) & (y < y1)
        near = (x0 < cell[2] + 0.15) & (cell[0] - 0.15 < x1) & (y0 < cell[3] + 0.15) & (cell[1] - 0.15 < y1)
        assert (moved[covers] > 0.5).all()
        assert (moved[~near & placed] < 0.1).all()
        assert (moved[layout.tokens[0] & ~placed] < 0.1).all()  # padding


def test_the_middle_of_a_wide_picture_is_shown() -> None:
    boxes = boxes_of(with_processor(), 120, 60)
    assert boxes[:, 0].min() == pytest.approx(0.25)
    assert boxes[:, 2].max() == pytest.approx(0.75)
    assert boxes[:, 1].min() == 0
    assert boxes[:, 3].max() == 1
    assert torch.allclose(boxes[1], torch.tensor([0.35, 0.0, 0.45, 0.2]))


@pytest.mark.parametrize("processor", ["crop", "crop by PIL"])
@pytest.mark.parametrize("size", [(63, 40), (40, 63), (65, 40), (66, 40)])
def test_the_crop_begins_at_the_very_pixel(processor: str, size: tuple[int, int]) -> None:
    """Nothing is resized, and every pixel's red and green say where it stood."""
    vlm = with_processor(image_processor=IMAGE_PROCESSORS[processor])
    picture = Image.new("RGB", size)
    picture.putdata([(3 * x, 3 * y, 0) for y in range(size[1]) for x in range(size[0])])
    batch = vlm.encode(["?"], [[picture]])
    settings = vlm.processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
    shown = ((batch["pixel_values"][0] * std + mean) * 255 / 3).round()
    layout = vlm.layout(batch)
    boxes = layout.boxes[layout.image == 0]
    assert (boxes[:, 0].min() * size[0]).round() == shown[0].min()
    assert (boxes[:, 1].min() * size[1]).round() == shown[1].min()
    assert (boxes[:, 2].max() * size[0]).round() == shown[0].max() + 1
    assert (boxes[:, 3].max() * size[1]).round() == shown[1].max() + 1


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (31, 90), (47, 46)])
def test_the_longer_edge_is_rounded_down(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, do_center_crop=False)
    pixels = processor(plain(*size), return_tensors="pt")["pixel_values"]
    assert _resized(size[::-1], {"shortest_edge": 40}) == tuple(pixels.shape[-2:])


def test_padding_has_no_place_but_stays_a_token() -> None:
    vlm = with_processor(image_processor=IMAGE_PROCESSORS["square"])
    boxes = boxes_of(vlm, 100, 20)  # one line of five shows the picture
    assert boxes.isfinite().all(dim=1).nonzero().squeeze(1).tolist() == [10, 11, 12, 13, 14]
    assert torch.allclose(boxes[10], torch.tensor([0.0, 0.0, 0.2, 1.0]))
    layout = vlm.layout(vlm.encode(["?"], [[plain(100, 20)]]))
    assert int(layout.tokens.sum()) == 25
    assert layout.grid(0, 0) is None


@pytest.mark.parametrize(("kind", "known"), [("crop", False), ("square", False), ("stretch", True)])
def test_without_sizes_only_a_stretched_picture_has_boxes(kind: str, known: bool) -> None:
    vlm = with_processor(image_processor=IMAGE_PROCESSORS[kind])
    batch = vlm.encode(["?"], [[plain(90, 50)]])
    bare = vlm.layout(Batch.of(dict(batch)))
    assert int(bare.tokens.sum()) == 25
    assert bool(bare.boxes[bare.tokens].isfinite().all()) is known
    if known:
        assert bare.boxes[bare.tokens].equal(vlm.layout(batch).boxes[bare.tokens])
    else:
        with pytest.raises(LayoutError, match="no place"):
            bare.heatmap(torch.zeros(batch.length), row=0, image=0, size=(8, 8))


def test_a_class_token_is_an_image_token_without_a_part() -> None:
    vlm = with_processor(vision_feature_select_strategy="full")
    batch = vlm.encode(["?"], [[plain(64, 64), plain(64, 64)]])
    layout = vlm.layout(batch)
    marked = (batch["input_ids"][0] == vlm.processor.image_token_id).nonzero().squeeze(1)
    assert len(marked) == 52
    assert (~layout.tokens[0, marked]).nonzero().squeeze(1).tolist() == [0, 26]
    assert not layout.text[0, marked].any()
    assert layout.grid(0, 1) == (5, 5)


def test_a_tower_without_a_class_token_loses_its_first_patch() -> None:
    boxes = boxes_of(with_processor(num_additional_image_tokens=0), 64, 64)
    assert len(boxes) == 24
    assert torch.allclose(boxes[0], torch.tensor([0.2, 0.0, 0.4, 0.2]))


def test_grid() -> None:
    layout = with_processor().layout(with_processor().encode(["?"], [[plain(200, 90)]]))
    assert layout.grid(0, 0) == (5, 5)


def test_unknown_resizing_is_refused() -> None:
    vlm = with_processor(image_processor=CLIPImageProcessor(size={"shortest_edge": 40, "longest_edge": 80}))
    batch = tiny_vlm("llava").encode(["?"], [[plain(60, 40)]])
    with pytest.raises(LayoutError, match="longest_edge"):
        vlm.layout(batch)


def test_a_picture_without_tokens_is_refused() -> None:
    vlm = with_processor()
    batch = vlm.encode(["?"], [[plain(60, 40), plain(60, 40)]])
    ids = batch["input_ids"].clone()
    where = (ids[0] == vlm.processor.image_token_id).nonzero().squeeze(1)
    ids[0, where[25:]] = 0
    with pytest.raises(LayoutError, match="25 image tokens but its pictures fill 50"):
        vlm.layout(batch.with_inputs(input_ids=ids))


def test_another_processor_is_refused() -> None:
    vlm = replace(tiny_vlm("llava"), processor=tiny_vlm("llava_next").processor)
    with pytest.raises(UnsupportedModelError, match="LlavaNextProcessor"):
        vlm.layout(tiny_vlm("llava").encode(["?"], [[plain(60, 40)]]))
