"""What every family owes: one box per image token, where the token really looks."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.models.spotlight import embeddings, painted, plain
from tests.tiny import TINY, tiny_vlm
from vlmfix.errors import LayoutError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

SIZES = [(90, 60), (40, 200), (200, 40), (24, 18), (500, 300), (64, 64)]
"""(width, height): ordinary, tall, wide, small, large, square."""


@pytest.fixture(params=TINY)
def vlm(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_vlm(request.param)


def mixed() -> list[list[Image.Image]]:
    """Rows with one picture, none and two."""
    return [
        [painted(90, 60, (0, 0, 0.5, 0.5))],
        [],
        [painted(30, 100, (0, 0, 1, 0.3)), painted(64, 64, (0, 0, 1, 1))],
    ]


def encoded(vlm: Checkpoint, pictures: list[list[Image.Image]]) -> Batch:
    return vlm.encode([f"What is {'h' * row}ere?" for row in range(len(pictures))], pictures)


@pytest.mark.parametrize("size", [*SIZES, (7, 5), (3, 40), (1000, 700)])
def test_every_image_token_has_one_box(vlm: Checkpoint, size: tuple[int, int]) -> None:
    batch = encoded(vlm, [[plain(*size)], [plain(*size), plain(*size)]])
    layout = vlm.layout(batch)  # raises when the numbers differ
    for row, image in ((0, 0), (1, 0), (1, 1)):
        boxes = layout.boxes[row][layout.image[row] == image]
        placed = boxes[boxes.isfinite().all(dim=1)]
        assert len(placed) > 0
        assert placed.min() >= 0
        assert placed.max() <= 1
        assert (placed[:, :2] < placed[:, 2:]).all()


def test_parts_agree(vlm: Checkpoint) -> None:
    batch = encoded(vlm, mixed())
    layout = vlm.layout(batch)
    real = batch.attention_mask.bool()
    marked = batch["input_ids"] == vlm.family.image_token(vlm.model.config)
    assert layout.tokens.equal(layout.image >= 0)
    assert not (layout.tokens & ~marked).any()
    assert layout.text.equal(real & ~marked)
    assert not layout.boxes[~layout.tokens].isfinite().any()
    assert [sorted(set(row.tolist()) - {-1}) for row in layout.image] == [[0], [], [0, 1]]
    first, second = ((layout.image[2] == image).nonzero().squeeze(1) for image in (0, 1))
    assert first.max() < second.min()


def test_rows_do_not_depend_on_their_neighbours(vlm: Checkpoint) -> None:
    rows = mixed()
    whole = vlm.layout(encoded(vlm, rows))
    for row, pictures in enumerate(rows):
        alone = vlm.layout(vlm.encode([f"What is {'h' * row}ere?"], [pictures]))
        length = alone.tokens.shape[1]
        assert whole.tokens[row, -length:].equal(alone.tokens[0])
        assert whole.text[row, -length:].equal(alone.text[0])
        assert whole.image[row, -length:].equal(alone.image[0])
        assert torch.equal(whole.boxes[row, -length:].nan_to_num(-1), alone.boxes[0].nan_to_num(-1))
        assert not whole.text[row, :-length].any()
        assert not whole.tokens[row, :-length].any()


def test_inputs_made_elsewhere_have_the_same_tokens(vlm: Checkpoint) -> None:
    batch = encoded(vlm, mixed())
    known, unknown = vlm.layout(batch), vlm.layout(Batch.of(dict(batch)))
    assert unknown.tokens.equal(known.tokens)
    assert unknown.text.equal(known.text)
    assert unknown.image.equal(known.image)
    placed = unknown.boxes.isfinite().all(dim=2)
    assert unknown.boxes[placed].equal(known.boxes[placed])


def test_cut_inputs_are_refused(vlm: Checkpoint) -> None:
    batch = encoded(vlm, mixed()[:1])
    where = int((batch["input_ids"][0] == vlm.family.image_token(vlm.model.config)).nonzero()[-1])
    ids = batch["input_ids"].clone()
    ids[0, where] = 0
    with pytest.raises(LayoutError, match="image tokens"):
        vlm.layout(batch.with_inputs(input_ids=ids))


@pytest.mark.parametrize("size", SIZES)
def test_a_token_looks_where_its_box_is(vlm: Checkpoint, size: tuple[int, int]) -> None:
    """Painting over a token's box moves that token, and leaves alone all that lie elsewhere."""
    width, height = size
    empty = vlm.encode(["?"], [[plain(width, height)]])
    layout = vlm.layout(empty)
    boxes = layout.boxes[0]
    placed = (layout.tokens[0] & boxes.isfinite().all(dim=1)).nonzero().squeeze(1)
    chosen = placed[torch.linspace(0, len(placed) - 1, 7).long()].tolist()
    cells = [_on_pixels(boxes[token].tolist(), width, height) for token in chosen]
    cells = [(0.0, 0.0, 1.0, 1.0), *cells]
    before = embeddings(vlm, empty)  # (1, T, hidden)
    after = embeddings(vlm, vlm.encode(["?"] * len(cells), [[painted(*size, cell)] for cell in cells]))
    assert after[:, ~layout.tokens[0]].equal(before[:, ~layout.tokens[0]].expand(len(cells), -1, -1))
    missing = (after[1:] - after[:1]).norm(dim=-1) / (before - after[:1]).norm(dim=-1)
    # 1 where a token looks as if all were painted, 0 as if nothing were
    painted_share = (1 - missing).masked_fill(~layout.tokens[0], 0)  # (cells, T)
    for token, cell, share in zip(chosen, cells[1:], painted_share, strict=True):
        inside = _overlap(boxes, cell)
        touched = _overlap(boxes, cell, margin=(2 / width + 0.02, 2 / height + 0.02)) > 0
        assert share[token] > 0.4
        assert inside[share.argmax()] > 0.6  # not 1: cells end at whole pixels
        assert (share[inside > 0.99] > 0.4).all()
        assert (share[layout.tokens[0] & ~touched].abs() < 0.05).all()


@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.1, 0.15), (0.9, 0.2), (0.3, 0.85)])
def test_what_moves_has_a_box_there(vlm: Checkpoint, centre: tuple[float, float]) -> None:
    """A coloured cell anywhere moves tokens whose boxes cover it, or nothing when it is cropped away."""
    x, y = centre
    cell = (x - 0.04, y - 0.04, x + 0.04, y + 0.04)
    empty = vlm.encode(["?"], [[plain(400, 250)]])
    painted_too = vlm.encode(["?"], [[painted(400, 250, cell)]])
    moved = (embeddings(vlm, painted_too) - embeddings(vlm, empty)).norm(dim=-1)[0]  # (T,)
    layout = vlm.layout(empty)
    covering = _overlap(layout.boxes[0], cell) > 0
    if bool(covering.any()):
        assert covering[moved.argmax()]
        heat = layout.heatmap(moved, row=0, image=0, size=(250, 400))
        spot = divmod(int(heat.argmax()), 400)
        assert abs(spot[0] / 250 - y) < 0.35
        assert abs(spot[1] / 400 - x) < 0.35
    else:
        assert moved.max() < 1e-4


def test_heatmap_paints_a_token_over_its_box(vlm: Checkpoint) -> None:
    batch = encoded(vlm, mixed())
    layout = vlm.layout(batch)
    token = int((layout.image[2] == 1).nonzero()[0])
    values = torch.zeros(batch.length)
    values[token] = 1.0
    heat = layout.heatmap(values, row=2, image=1, size=(120, 120))
    x0, y0, x1, y1 = (layout.boxes[2, token] * 120).round().long().tolist()
    assert (heat[y0:y1, x0:x1] > 0).all()
    heat[y0:y1, x0:x1] = 0
    assert (heat == 0).all()


def test_answers_depend_on_picture_and_prompt(vlm: Checkpoint) -> None:
    red, blank = painted(64, 64, (0, 0, 1, 1)), plain(64, 64)
    with torch.no_grad():
        logits = vlm.model(**vlm.encode(["a", "a", "b"], [[red], [blank], [red]])).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 0.02
    assert (logits[0] - logits[2]).abs().max() > 0.02
    assert logits.std() > 0.5


def test_prompts_have_system_messages_and_may_be_empty(vlm: Checkpoint) -> None:
    picture = [[plain(64, 64)]]
    bare, told = vlm.encode([""], picture, system="Be."), vlm.encode([""], picture, system="Be brief.")
    assert told.length == bare.length + len(" brief")
    assert "Be brief." in vlm.render("", 1, system="Be brief.")
    assert int(vlm.layout(told).tokens.sum()) == int(vlm.layout(bare).tokens.sum())


def test_attention_modules_are_the_decoder_s(vlm: Checkpoint) -> None:
    modules = vlm.family.attention_modules(vlm.model)
    assert [module.layer_idx for module in modules] == [0, 1, 2]
    assert all(module.config is vlm.family.decoder(vlm.model).config for module in modules)
    assert all(module.k_proj.out_features == 16 for module in modules)
    assert all(module.q_proj.out_features == 64 for module in modules)


def test_text_stands_behind_a_picture_of_one_token():
    kinds = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]])  # picture 0, text 1
    layout = ImageLayout(kinds == 0, kinds == 1, kinds - 1, torch.full((2, 5, 4), float("nan")))
    assert layout.text_after_image().tolist() == [[False, True, False, True, True], [False] * 5]


def _on_pixels(box: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The box with its edges moved to the nearest pixels, at least one pixel large."""
    x0, y0 = round(box[0] * width), round(box[1] * height)
    x1, y1 = max(x0 + 1, round(box[2] * width)), max(y0 + 1, round(box[3] * height))
    return x0 / width, y0 / height, x1 / width, y1 / height


def _overlap(
    boxes: torch.Tensor, cell: tuple[float, float, float, float], *, margin: tuple[float, float] = (0.0, 0.0)
) -> torch.Tensor:
    """(T,) share of every box that the cell, grown by a margin, covers; 0 for a box without a place."""
    grown = torch.tensor([cell[0] - margin[0], cell[1] - margin[1], cell[2] + margin[0], cell[3] + margin[1]])
    size = (torch.minimum(boxes[:, 2:], grown[2:]) - torch.maximum(boxes[:, :2], grown[:2])).clamp(min=0)
    return (size.prod(dim=1) / (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)).nan_to_num(0)
