"""SmolVLM and Idefics3: tiles named in the prompt, then the whole picture."""

from __future__ import annotations

import pytest
import torch

from tests.models.planted import around, plain, responses
from tests.tiny import tiny_vlm
from vlmfix.errors import LayoutError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch

WHOLE = 9
"""Tokens of a tile, and so of the whole picture."""


@pytest.fixture(params=["idefics3", "smolvlm"])
def vlm(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_vlm(request.param)


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((64, 48), (2, 2)), ((240, 24), (1, 2)), ((26, 220), (2, 1)), ((900, 900), (2, 2)), ((3, 2), (2, 2))],
    ids=["picture", "wide", "tall", "large", "tiny"],
)
def test_tiles_then_the_whole_each_cover_the_picture(
    vlm: Checkpoint, size: tuple[int, int], tiles: tuple[int, int]
) -> None:
    layout = vlm.layout(vlm.encode(["What is this?"], [[plain(size)]]))
    boxes = layout.boxes[0][layout.tokens[0]]
    rows, columns = tiles
    fine = boxes[:-WHOLE]
    assert len(fine) == rows * columns * 9
    steps = torch.tensor([1 / (3 * columns), 1 / (3 * rows)]).expand(len(fine), 2)
    torch.testing.assert_close(fine[:, 2:] - fine[:, :2], steps)
    assert len({tuple(corner) for corner in (fine[:, :2] * 1000).round().tolist()}) == len(fine)
    torch.testing.assert_close(boxes[-1], torch.tensor([2 / 3, 2 / 3, 1.0, 1.0]))


@pytest.mark.parametrize("size", [(64, 48), (240, 60), (52, 220)], ids=["picture", "wide", "tall"])
def test_a_spot_is_seen_by_its_tile_and_by_the_whole(vlm: Checkpoint, size: tuple[int, int]) -> None:
    layout = vlm.layout(vlm.encode([""], [[plain(size)]]))
    boxes = layout.boxes[0][layout.tokens[0]]
    spots = boxes[:-WHOLE].tolist()
    seen = responses(vlm, size, spots)
    assert seen[:, :-WHOLE].argmax(dim=1).tolist() == list(range(len(spots)))
    for spot, strength in zip(spots, seen[:, -WHOLE:], strict=True):
        assert around(boxes[-WHOLE:], spot)[strength.argmax()]
        assert around(boxes, spot).sum() == 2


def test_a_picture_that_is_not_split_is_one_square(vlm: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm.processor.image_processor, "do_image_splitting", False)
    layout = vlm.layout(vlm.encode(["Two"], [[plain((64, 48)), plain((26, 220))]]))
    assert layout.grid(0, 0) == layout.grid(0, 1) == (3, 3)


def test_pictures_are_told_apart_in_a_mixed_batch(vlm: Checkpoint) -> None:
    a, b, c = plain((64, 48)), plain((240, 24)), plain((26, 220))
    layout = vlm.layout(vlm.encode(["", "One", "Two pictures"], [[], [a], [b, c]]))
    assert not layout.tokens[0].any()
    assert layout.image[2][layout.tokens[2]].tolist() == [0] * 27 + [1] * 27


def test_places_need_no_sizes(vlm: Checkpoint) -> None:
    batch = vlm.encode(["One"], [[plain((64, 48))]])
    torch.testing.assert_close(vlm.layout(Batch.of(dict(batch))).boxes, vlm.layout(batch).boxes, equal_nan=True)


def test_a_cut_prompt_is_refused(vlm: Checkpoint) -> None:
    batch = vlm.encode(["One"], [[plain((64, 48))]])
    last = int(vlm.layout(batch).tokens[0].nonzero()[-1])
    with pytest.raises(LayoutError, match="row 0 has 44 image tokens"):
        vlm.layout(batch.with_inputs(input_ids=batch["input_ids"][:, :last]))
