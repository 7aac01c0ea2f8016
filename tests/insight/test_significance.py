"""Significance of image tokens: boxes over maps, and one pass of the tower for each distinct picture."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import PICTURES, picture, vlm_of
from tests.decoders.made_vit import made_vit
from tests.tiny import TINY
from vlmfix.errors import IncompatibleDecodersError, LayoutError
from vlmfix.insight.significance import of_tower, of_vit, over_boxes
from vlmfix.insight.vit import load_vit
from vlmfix.models.layout import Batch

ROWS = [[PICTURES[0][0]], [], list(PICTURES[1]), [PICTURES[0][0]], list(PICTURES[1])]
QUESTIONS = ["what is here?", "hello", "and there?", "is it a dog?", "a cat, then?"]


def test_a_box_takes_the_mean_of_what_it_covers():
    values = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[10.0, 10.0], [20.0, 40.0]]])
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0.4, 0.5, 0.9, 1], [torch.nan] * 4])
    got = over_boxes(values, boxes)
    want = torch.tensor([[1.5, 0.0, 0.5, 0.2 * 2 + 0.8 * 3], [20.0, 10.0, 10.0, 0.2 * 20 + 0.8 * 40]])
    torch.testing.assert_close(got[:, :4], want)
    assert got[:, 4].isnan().all()


def test_a_box_smaller_than_a_cell_takes_the_cell():
    got = over_boxes(torch.arange(9.0).view(1, 3, 3), torch.tensor([[0.4, 0.7, 0.41, 0.75]]))
    torch.testing.assert_close(got, torch.tensor([[7.0]]))


@pytest.mark.parametrize("family", TINY)
def test_rows_get_their_own_and_text_gets_nothing(family):
    vlm = vlm_of(family)
    batch = vlm.encode(QUESTIONS, ROWS)
    layout = vlm.layout(batch)
    for rows in ("class", "patches") if vlm.family.class_tokens(vlm.model) else ("patches",):
        found = of_tower(vlm, batch, layout, rows=rows)
        for values in found:
            assert torch.equal(values.isnan(), ~layout.tokens)
        for row in (0, 2, 3):
            alone = vlm.encode([QUESTIONS[row]], [ROWS[row]])
            own = of_tower(vlm, alone, vlm.layout(alone), rows=rows)
            for values, want in zip(found, own, strict=True):
                got = values[row, layout.tokens[row]]
                torch.testing.assert_close(got, want[0, vlm.layout(alone).tokens[0]], atol=1e-5, rtol=1e-4)
        for one, other in ((0, 3), (2, 4)):
            for values in found:
                assert torch.equal(values[one, layout.tokens[one]], values[other, layout.tokens[other]])


def test_a_tower_sees_a_picture_once(monkeypatch):
    vlm = vlm_of("llava")
    seen = []
    hook = vlm.family.tower(vlm.model).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = vlm.encode(QUESTIONS, ROWS)
    of_tower(vlm, batch, vlm.layout(batch), rows="class")
    hook.remove()
    assert seen == [3]


@pytest.mark.parametrize("family", TINY)
def test_a_vit_sees_what_tokens_show(family, tmp_path):
    """Each token's number is the mean of the map over its box, painted here on a fine grid."""
    vlm = vlm_of(family)
    name = str(made_vit(tmp_path / "v"))
    batch = vlm.encode(QUESTIONS, ROWS)
    layout = vlm.layout(batch)
    found = of_vit(name, batch, layout, vlm.device)
    placed = layout.tokens & layout.boxes.isfinite().all(dim=-1)
    fine = 400
    for values, map_number in zip(found, range(3), strict=True):
        assert torch.equal(values.isnan(), ~placed)
        for row, pictures in enumerate(ROWS):
            maps = load_vit(name, vlm.device).maps(pictures)
            for column in placed[row].nonzero().flatten().tolist()[::5]:
                grid = maps[int(layout.image[row, column])][map_number].repeat_interleave(fine // 4, 0)
                grid = grid.repeat_interleave(fine // 4, 1)
                x0, y0, x1, y1 = (layout.boxes[row, column] * fine).tolist()
                cells = torch.arange(fine) + 0.5
                inside = ((cells >= y0) & (cells < y1))[:, None] & ((cells >= x0) & (cells < x1))
                assert values[row, column].item() == pytest.approx(float(grid[inside].mean()), rel=0.05, abs=0.01)


def test_a_vit_needs_the_pictures(tmp_path):
    vlm = vlm_of("llava")
    own = Batch.of(dict(vlm.encode(["what?"], [[picture(1, (40, 60))]])))
    with pytest.raises(IncompatibleDecodersError, match=r"vlm\.encode"):
        of_vit(str(made_vit(tmp_path / "v")), own, vlm.layout(own), vlm.device)
    assert not of_tower(vlm, own, vlm.layout(own), rows="class").first[0, vlm.layout(own).tokens[0]].isnan().any()


def test_tokens_that_do_not_fit_the_pictures_are_reported():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what?"], [[picture(1, (40, 60))]])
    layout = vlm.layout(batch)
    cut = batch.with_inputs(input_ids=batch["input_ids"][:, 10:])
    with pytest.raises(LayoutError, match="25 image tokens"):
        of_tower(vlm, cut, layout, rows="class")
