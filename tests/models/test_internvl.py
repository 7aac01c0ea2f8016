"""InternVL: tiles over the whole picture, then the thumbnail."""

from __future__ import annotations

import pytest
import torch

from tests.models.planted import around, plain, responses
from tests.tiny import tiny_vlm
from vlmfix.errors import LayoutError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch

THUMBNAIL = 9
"""Tokens of a tile, and so of the thumbnail."""


@pytest.fixture
def vlm() -> Checkpoint:
    return tiny_vlm("internvl")


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((64, 48), (2, 3)), ((240, 24), (1, 6)), ((26, 220), (6, 1)), ((900, 900), (2, 2)), ((9, 4), (1, 2))],
    ids=["picture", "wide", "tall", "large", "tiny"],
)
def test_tiles_then_thumbnail_each_cover_the_picture(
    vlm: Checkpoint, size: tuple[int, int], tiles: tuple[int, int]
) -> None:
    layout = vlm.layout(vlm.encode(["What is this?"], [[plain(size)]]))
    boxes = layout.boxes[0][layout.tokens[0]]
    rows, columns = tiles
    fine = boxes[:-THUMBNAIL]
    assert len(fine) == rows * columns * 9
    steps = torch.tensor([1 / (3 * columns), 1 / (3 * rows)]).expand(len(fine), 2)
    torch.testing.assert_close(fine[:, 2:] - fine[:, :2], steps)
    assert len({tuple(corner) for corner in (fine[:, :2] * 1000).round().tolist()}) == len(fine)
    torch.testing.assert_close(boxes[-1], torch.tensor([2 / 3, 2 / 3, 1.0, 1.0]))


def test_a_small_square_picture_is_one_tile(vlm: Checkpoint) -> None:
    assert vlm.layout(vlm.encode([""], [[plain((20, 20))]])).grid(0, 0) == (3, 3)


@pytest.mark.parametrize("size", [(64, 48), (240, 24), (26, 220)], ids=["picture", "wide", "tall"])
def test_a_spot_is_seen_by_its_tile_and_by_the_thumbnail(vlm: Checkpoint, size: tuple[int, int]) -> None:
    layout = vlm.layout(vlm.encode([""], [[plain(size)]]))
    boxes = layout.boxes[0][layout.tokens[0]]
    spots = boxes[:-THUMBNAIL].tolist()
    seen = responses(vlm, size, spots)
    assert seen[:, :-THUMBNAIL].argmax(dim=1).tolist() == list(range(len(spots)))
    for spot, strength in zip(spots, seen[:, -THUMBNAIL:], strict=True):
        assert around(boxes[-THUMBNAIL:], spot)[strength.argmax()]
        assert around(boxes, spot).sum() == 2


def test_pictures_are_told_apart_in_a_mixed_batch(vlm: Checkpoint) -> None:
    a, b, c = plain((64, 48)), plain((240, 24)), plain((20, 20))
    layout = vlm.layout(vlm.encode(["One", "", "Two pictures"], [[a], [], [b, c]]))
    assert not layout.tokens[1].any()
    assert layout.image[2][layout.tokens[2]].tolist() == [0] * 63 + [1] * 9
    assert layout.grid(2, 1) == (3, 3)


def test_without_sizes_only_the_whole_picture_has_a_place(vlm: Checkpoint) -> None:
    batch = vlm.encode(["Two"], [[plain((64, 48)), plain((20, 20))]])
    known, unknown = vlm.layout(batch), vlm.layout(Batch.of(dict(batch)))
    assert torch.equal(known.tokens, unknown.tokens)
    assert torch.equal(known.image, unknown.image)
    found = unknown.boxes[0][unknown.tokens[0]]
    assert found[:-18].isnan().all()
    assert torch.equal(found[-18:], known.boxes[0][known.tokens[0]][-18:])


def test_inputs_of_another_tiling_are_refused(vlm: Checkpoint) -> None:
    batch = vlm.encode(["One"], [[plain((64, 48))]])
    first = int(vlm.layout(batch).tokens[0].nonzero()[0])
    with pytest.raises(LayoutError, match="row 0 has 54 image tokens but its pictures fill 63"):
        vlm.layout(batch.with_inputs(input_ids=batch["input_ids"][:, first + 9 :]))
