"""Qwen-VL: the merged grid covers the whole picture, row by row, at any shape."""

from __future__ import annotations

import pytest
import torch

from tests.models.planted import around, plain, responses
from tests.tiny import tiny_vlm
from vlmfix.errors import LayoutError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(params=NAMES)
def vlm(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_vlm(request.param)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 48), (4, 5)), ((240, 24), (1, 15)), ((26, 220), (14, 1)), ((5, 3), (2, 3)), ((900, 700), (4, 5))],
    ids=["square", "wide", "tall", "tiny", "large"],
)
def test_the_grid_covers_a_picture_of_any_shape(vlm: Checkpoint, size: tuple[int, int], grid: tuple[int, int]) -> None:
    layout = vlm.layout(vlm.encode(["What is this?"], [[plain(size)]]))
    assert layout.grid(0, 0) == grid
    boxes = layout.boxes[0][layout.tokens[0]]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    torch.testing.assert_close(area, torch.full((grid[0] * grid[1],), 1 / (grid[0] * grid[1])))
    assert boxes.min() == 0
    assert boxes.max() == 1


@pytest.mark.parametrize("size", [(64, 48), (240, 24), (26, 220)], ids=["square", "wide", "tall"])
def test_every_token_sees_its_own_box(vlm: Checkpoint, size: tuple[int, int]) -> None:
    layout = vlm.layout(vlm.encode([""], [[plain(size)]]))
    boxes = layout.boxes[0][layout.tokens[0]]
    seen = responses(vlm, size, boxes.tolist()).argmax(dim=1)
    assert seen.tolist() == list(range(len(boxes)))


def test_pictures_are_told_apart_in_a_mixed_batch(vlm: Checkpoint) -> None:
    a, b, c = plain((64, 48)), plain((240, 24)), plain((26, 220))
    layout = vlm.layout(vlm.encode(["One", "", "Two pictures"], [[a], [], [b, c]]))
    assert [layout.grid(0, 0), layout.grid(2, 0), layout.grid(2, 1)] == [(4, 5), (1, 15), (14, 1)]
    assert not layout.tokens[1].any()
    numbers = layout.image[2][layout.tokens[2]]
    assert numbers.tolist() == [0] * 15 + [1] * 14
    assert around(layout.boxes[2][layout.image[2] == 1], (0.0, 0.0, 1.0, 0.1)).nonzero().tolist() == [[0]]


def test_places_need_no_sizes(vlm: Checkpoint) -> None:
    batch = vlm.encode(["One"], [[plain((64, 48))]])
    torch.testing.assert_close(vlm.layout(Batch.of(dict(batch))).boxes, vlm.layout(batch).boxes, equal_nan=True)


def test_a_cut_prompt_is_refused(vlm: Checkpoint) -> None:
    batch = vlm.encode(["One"], [[plain((64, 48))]])
    first = int(vlm.layout(batch).tokens[0].nonzero()[0])
    with pytest.raises(LayoutError, match="row 0 has 19 image tokens but its pictures fill 20"):
        vlm.layout(batch.with_inputs(input_ids=batch["input_ids"][:, first + 1 :]))
