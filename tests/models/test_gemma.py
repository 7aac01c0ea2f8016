"""Gemma 3: pooled squares, and pan-and-scan as its processor writes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from tests.models.spotlight import embeddings, painted, plain
from tests.tiny import tiny_vlm
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch

SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4}


@pytest.fixture
def vlm() -> Checkpoint:
    return tiny_vlm("gemma3")


def scanned(vlm: Checkpoint, pictures: list[list[Image.Image]], **settings: Any) -> Batch:
    """Inputs with pan-and-scan, which is asked for in the call."""
    texts = [vlm.render("?", len(row)) for row in pictures]
    inputs = vlm.processor(
        text=texts,
        images=pictures,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **SCAN,
        **settings,
    )
    sizes = tuple(tuple((picture.height, picture.width) for picture in row) for row in pictures)
    return Batch(inputs=dict(inputs), sizes=sizes)


def test_one_square_for_every_shape(vlm: Checkpoint) -> None:
    layout = vlm.layout(vlm.encode(["?"], [[plain(90, 30), plain(10, 80)]]))
    assert layout.grid(0, 0) == layout.grid(0, 1) == (4, 4)
    assert torch.allclose(layout.boxes[0][layout.image[0] == 1][5], torch.tensor([0.25, 0.25, 0.5, 0.5]))


def test_the_first_token_stands_once(vlm: Checkpoint) -> None:
    batch = vlm.encode(["?"], [[plain(40, 40)]])
    assert int((batch["input_ids"] == vlm.processor.tokenizer.bos_token_id).sum()) == 1


def test_the_first_token_stands_once_also_when_the_tokenizer_adds_it(vlm: Checkpoint) -> None:
    seen: dict[str, Any] = {}

    class Recorder:
        tokenizer = vlm.processor.tokenizer

        def __call__(self, **settings: Any) -> dict[str, Any]:
            seen.update(settings)
            return {}

    vlm.family.process(Recorder(), [vlm.render("?", 0)], [[]])
    assert seen["add_special_tokens"] is False
    vlm.family.process(Recorder(), ["USER: ?"], [[]])
    assert seen["add_special_tokens"] is True


@pytest.mark.parametrize(
    ("size", "crops"), [((90, 30), 3), ((30, 90), 3), ((100, 75), 2), ((64, 64), 0), ((97, 31), 3)]
)
def test_pan_and_scan_looks_where_its_boxes_are(vlm: Checkpoint, size: tuple[int, int], crops: int) -> None:
    before = scanned(vlm, [[plain(*size)]])
    layout = vlm.layout(before)
    assert int(layout.tokens.sum()) == 16 * (1 + crops)
    assert (layout.image[layout.tokens] == 0).all()
    plainly = embeddings(vlm, before)
    for x, y in ((0.1, 0.1), (0.45, 0.55), (0.9, 0.3), (0.6, 0.95)):
        cell = (x - 0.04, y - 0.04, x + 0.04, y + 0.04)
        moved = (embeddings(vlm, scanned(vlm, [[painted(*size, cell)]])) - plainly).norm(dim=-1)[0]
        x0, y0, x1, y1 = layout.boxes[0].T
        covers = (x0 < x) & (x < x1) & (y0 < y) & (y < y1)
        near = (x0 < x + 0.12) & (x - 0.12 < x1) & (y0 < y + 0.12) & (y - 0.12 < y1)
        assert int(covers.sum()) == (2 if crops else 1)
        assert (moved[covers] > 0.5).all()
        assert (moved[layout.tokens[0] & ~near] < 0.1).all()


def test_pan_and_scan_of_several_pictures_and_rows(vlm: Checkpoint) -> None:
    rows = [[plain(90, 30), plain(40, 40), plain(30, 90)], [], [plain(40, 40), plain(30, 61)]]
    batch = scanned(vlm, rows)
    layout = vlm.layout(batch)
    counts = [[int((row == image).sum()) // 16 for image in range(3)] for row in layout.image]
    assert counts == [[4, 1, 4], [0, 0, 0], [1, 3, 0]]
    assert layout.text.equal(
        batch.attention_mask.bool() & (batch["input_ids"] != vlm.family.image_token(vlm.model.config))
    )
    owners = vlm.family.pixel_rows(vlm.model, batch, [3, 0, 2])
    assert owners.tolist() == [0] * 9 + [2] * 4
    assert len(owners) == len(batch["pixel_values"])


def test_pan_and_scan_without_sizes_places_the_whole_picture_alone(vlm: Checkpoint) -> None:
    batch = scanned(vlm, [[plain(90, 30), plain(40, 40)]])
    known, bare = vlm.layout(batch), vlm.layout(Batch.of(dict(batch)))
    assert bare.tokens.equal(known.tokens)
    assert bare.image.equal(known.image)
    placed = bare.boxes.isfinite().all(dim=2)
    assert int(placed.sum()) == 32
    assert bare.boxes[placed].equal(known.boxes[placed])
    assert known.boxes[known.tokens].isfinite().all()
    assert known.grid(0, 1) == (4, 4)
    assert known.grid(0, 0) is None
