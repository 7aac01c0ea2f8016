"""Maps from tokens, and what is remembered of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contracts.support import PICTURES, vlm_of
from vlmfix.decoders.picture.refined import PictureMap, PictureMemo, clean, places, token_map
from vlmfix.models.layout import ImageLayout
from vlmfix.pixels import digest


def layout_of(boxes):
    boxes = torch.tensor(boxes)[None]
    tokens = torch.ones(boxes.shape[:2], dtype=torch.bool)
    return ImageLayout(tokens=tokens, text=~tokens, image=torch.zeros(boxes.shape[:2], dtype=torch.long), boxes=boxes)


def test_a_rectangle_of_tokens_is_the_map():
    layout = layout_of([[0.25, 0.0, 0.5, 0.5], [0.5, 0.0, 0.75, 0.5], [0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.75, 1.0]])
    found = token_map(layout, torch.tensor([1.0, 2.0, 3.0, 4.0]), row=0, image=0)
    assert found.values.tolist() == [[1, 2], [3, 4]]
    assert found.box == (0.25, 0.0, 0.75, 1.0)


def test_tiles_beside_a_view_of_the_whole_are_painted_and_averaged():
    layout = layout_of([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    found = token_map(layout, torch.tensor([1.0, 3.0, 5.0]), row=0, image=0)
    assert found.values.tolist() == [[2, 3]]
    assert found.box == (0, 0, 1, 1)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3"])
def test_a_marked_token_shows_in_its_place(family):
    vlm = vlm_of(family)
    batch = vlm.encode(["what?"], [PICTURES[0]])
    layout = vlm.layout(batch)
    columns = layout.tokens[0].nonzero().squeeze(1)
    for column in columns[:: max(1, len(columns) // 7)].tolist():
        values = torch.zeros(batch.length)
        values[column] = 1.0
        found = token_map(layout, values, row=0, image=0).pixels(400, 600)
        x0, y0, x1, y1 = (layout.boxes[0, column].numpy() * [600, 400, 600, 400]).tolist()
        middle = found[int((y0 + y1) / 2), int((x0 + x1) / 2)]
        assert middle == pytest.approx(found.max(), rel=0.35)
        assert found.max() > 0


def test_a_partial_map_is_spread_over_the_whole_picture():
    found = PictureMap(np.ones((4, 4)), (0.25, 0.0, 0.75, 1.0)).over_whole()
    assert found.shape == (4, 8)
    assert found.sum(axis=0).tolist() == [0, 0, 4, 4, 4, 4, 0, 0]


def test_values_are_put_at_their_tokens():
    tokens = torch.tensor([False, True, False, True])
    assert places(tokens, torch.tensor([5.0, 7.0])).tolist() == [0, 5, 0, 7]


def test_what_is_no_number_is_replaced():
    got, replaced = clean(np.array([1.0, np.nan, np.inf, -np.inf, 4.0]))
    assert got.tolist() == [1, 0, 4, 1, 4]
    assert replaced
    same = np.array([1.0, 2.0])
    assert clean(same) == (same, False)
    assert clean(np.array([np.nan]))[0].tolist() == [0]


def test_pictures_are_known_by_their_pixels():
    one, same = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "red")
    assert digest([one]) == digest([same])
    assert len({digest([one]), digest([one, one]), digest([Image.new("RGB", (2, 8), "red")])}) == 3


def test_the_memo_computes_what_is_missing_once_and_forgets_the_oldest():
    memo, asked = PictureMemo(room=2), []

    def compute(rows):
        asked.append(rows)
        return [f"value {row}" for row in rows]

    assert memo.recall(["a", "b", "a"], compute) == ["value 0", "value 1", "value 0"]
    assert memo.recall(["a"], compute) == ["value 0"]
    assert asked == [[0, 1]]
    memo.recall(["c"], compute)  # b goes: a was used since
    assert memo.recall(["a", "b"], compute) == ["value 0", "value 1"]
    assert asked == [[0, 1], [0], [1]]
    assert memo.recall(["x", "y", "z"], compute) == ["value 0", "value 1", "value 2"]
    memo.clear()
    memo.recall(["z"], compute)
    assert len(asked) == 5
