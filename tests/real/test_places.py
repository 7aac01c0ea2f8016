"""Numbers of picture tokens and what each of them shows, at the real geometry, for photographs of odd shapes."""

from __future__ import annotations

import pytest
import torch

from tests.models.spotlight import local_vision, painted, plain
from tests.real.published import PUBLISHED
from vlmfix.decoding.encoding import encoded
from vlmfix.models.layout import Batch
from vlmfix.upstream.names import hidden
from vlmfix.upstream.positions import prompt_positions

SIZES = ((640, 480), (480, 640), (1, 1), (1000, 37), (37, 1000), (333, 777), (336, 336), (448, 448), (600, 600))
"""(width, height)."""
LARGE = (4000, 3000)

COUNTS = {
    "llava-1.5-7b-hf": (576,) * 10,
    "llava-v1.6-mistral-7b-hf": (2340, 2352, 1176, 722, 792, 1976, 1176, 2928, 2928, 2340),
    "llava-onevision-qwen2-7b-ov-hf": (2929, 2943, 1485, 975, 1053, 2493, 1485, 3699, 3699, 7309),
    "Qwen2-VL-2B-Instruct": (391, 391, 4, 36, 36, 336, 144, 256, 441, 1230),
    "Qwen2.5-VL-7B-Instruct": (391, 391, 4, 36, 36, 336, 144, 256, 441, 15301),
    "Qwen3-VL-4B-Instruct": (300, 300, 64, 84, 84, 240, 100, 196, 361, 11750),
    "InternVL3-1B-hf": (3328, 3328, 256, 3328, 3328, 2816, 256, 256, 256, 3328),
    "Idefics3-8B-Llama3": (2197, 2197, 2873, 845, 845, 1521, 2873, 2873, 2873, 2197),
    "SmolVLM-256M-Instruct": (832, 832, 1088, 320, 320, 576, 1088, 1088, 1088, 832),
    "SmolVLM2-500M-Video-Instruct": (832, 832, 1088, 320, 320, 576, 1088, 1088, 1088, 832),
    "gemma-3-4b-it": (256,) * 10,
}
"""Image tokens of a picture of each of ``SIZES``, and of ``LARGE``; newline tokens count."""

GRIDS = {
    "Qwen2-VL-2B-Instruct": ((17, 23), (23, 17), (2, 2), (1, 36), (36, 1), (28, 12), (12, 12), (16, 16), (21, 21)),
    "Qwen3-VL-4B-Instruct": ((15, 20), (20, 15), (8, 8), (2, 42), (42, 2), (24, 10), (10, 10), (14, 14), (19, 19)),
}
GRIDS["Qwen2.5-VL-7B-Instruct"] = GRIDS["Qwen2-VL-2B-Instruct"]
"""(rows, columns) of the tokens, where a picture becomes one rectangle."""
LARGE_GRIDS = {
    "Qwen2-VL-2B-Instruct": (30, 41),
    "Qwen2.5-VL-7B-Instruct": (107, 143),
    "Qwen3-VL-4B-Instruct": (94, 125),
}

SIDE = {"llava-1.5-7b-hf": 24, "gemma-3-4b-it": 16}
"""Tokens along a side of the one square of every picture."""

TILED = {
    "InternVL3-1B-hf": (16, ((3, 4), (4, 3), None, (1, 12), (12, 1), (5, 2), None, None, None)),
    "Idefics3-8B-Llama3": (13, ((3, 4), (4, 3), (4, 4), (1, 4), (4, 1), (4, 2), (4, 4), (4, 4), (4, 4))),
    "SmolVLM-256M-Instruct": (8, ((3, 4), (4, 3), (4, 4), (1, 4), (4, 1), (4, 2), (4, 4), (4, 4), (4, 4))),
}
TILED["SmolVLM2-500M-Video-Instruct"] = TILED["SmolVLM-256M-Instruct"]
"""Tokens along a side of a tile, and (rows, columns) of the tiles; None for a picture that is not cut."""

LINES = {
    "llava-v1.6-mistral-7b-hf": (
        24,
        ((36, 48), (48, 36), (24, 24), (2, 72), (72, 2), (56, 24), (24, 24), (48, 48), (48, 48)),
    ),
    "llava-onevision-qwen2-7b-ov-hf": (
        27,
        ((40, 54), (54, 40), (27, 27), (3, 81), (81, 3), (63, 27), (27, 27), (54, 54), (54, 54)),
    ),
}
"""Tokens along a side of the base tile, and (lines, columns) of the large tiles without padding and newlines."""


def marked(vlm, batch):
    """(B, T) bool: where an image token is."""
    return batch["input_ids"] == vlm.family.image_token(vlm.model.config)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_processor_places_the_published_number_of_tokens_and_each_has_a_place(vlm, name, size):
    batch = vlm.encode(["?"], [[plain(*size)]])
    layout = vlm.layout(batch)
    place = SIZES.index(size)
    assert int(marked(vlm, batch).sum()) == COUNTS[name][place]
    boxes = layout.boxes[0][layout.tokens[0]]
    if name in SIDE:
        assert layout.grid(0, 0) == (SIDE[name],) * 2
    if name in GRIDS:
        assert layout.grid(0, 0) == GRIDS[name][place]
    if name in TILED:
        side, tiles = TILED[name][0], TILED[name][1][place]
        assert rectangle(boxes[-(side**2) :]) == (side, side)
        if tiles is not None:
            assert rectangle(boxes[: -(side**2)]) == (tiles[0] * side, tiles[1] * side)
    if name in LINES:
        side, lines = LINES[name][0], LINES[name][1][place]
        assert [rectangle(boxes[: side**2]), rectangle(boxes[side**2 :])] == [(side, side), lines]


def rectangle(boxes):
    """(rows, columns) of boxes that fill a rectangle without gap, in whatever order; fails for others."""
    rows, columns = (len(boxes[:, axis].mul(1e5).round().unique()) for axis in (1, 0))
    assert rows * columns == len(boxes)
    return rows, columns


def test_a_large_photograph_has_its_places(vlm, name):
    """Qwen-VL would make 61,204 patches of it; there the grid alone is handed over, as its processor makes it."""
    width, height = LARGE
    if name not in LARGE_GRIDS:
        batch = vlm.encode(["?"], [[plain(*LARGE)]])
    else:
        merge = vlm.model.config.vision_config.spatial_merge_size
        rows, columns = LARGE_GRIDS[name]
        patches = vlm.processor.image_processor.get_number_of_image_patches(height, width)
        assert patches == rows * columns * merge**2
        ids = torch.full((1, rows * columns), vlm.family.image_token(vlm.model.config))
        grid = torch.tensor([[1, rows * merge, columns * merge]])
        batch = Batch({"input_ids": ids, "image_grid_thw": grid}, sizes=(((height, width),),))
    layout = vlm.layout(batch)
    assert int(marked(vlm, batch).sum()) == COUNTS[name][-1]
    if name in LARGE_GRIDS:
        assert layout.grid(0, 0) == LARGE_GRIDS[name]
    seen = layout.heatmap(torch.ones(batch.length), row=0, image=0, size=(75, 100))
    whole = {"llava-1.5-7b-hf": 0.75}.get(name, 1.0)  # a square of a picture of 4 to 3
    assert float((seen > 0).float().mean()) == pytest.approx(whole, abs=0.02)


# Where tokens look


def cells_of(boxes, size):
    """The boxes on whole pixels, four at least along either side."""
    width, height = size
    edges = []
    for x0, y0, x1, y1 in boxes.tolist():
        left, top = min(round(x0 * width), width - 4), min(round(y0 * height), height - 4)
        right, bottom = max(left + 4, round(x1 * width)), max(top + 4, round(y1 * height))
        edges.append((left / width, top / height, right / width, bottom / height))
    return edges


def covered(boxes, cell, margin=(0.0, 0.0)):
    """(n,) share of every box that a cell, grown by a margin, covers."""
    grown = torch.tensor([cell[0] - margin[0], cell[1] - margin[1], cell[2] + margin[0], cell[3] + margin[1]])
    inner = (torch.minimum(boxes[:, 2:], grown[2:]) - torch.maximum(boxes[:, :2], grown[:2])).clamp(min=0)
    return inner.prod(dim=1) / (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


class StopError(Exception):
    """Ends a pass of the vision tower."""


def entering(vlm, batch, layer=0):
    """What enters an attention module of the vision tower, (views, patches, D)."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(hidden(args, kwargs))
        raise StopError

    with vlm.family.tower_attention(vlm.model)[layer].register_forward_pre_hook(keep, with_kwargs=True):
        with torch.no_grad(), pytest.raises(StopError):
            encoded(vlm.model, batch)
    return seen[0] if seen[0].ndim == 3 else seen[0][None]


def unmixed(vlm, batch):
    """What pictures become when no patch knows of another: for each level, (image tokens of all rows, D)."""
    with local_vision(vlm), torch.no_grad():
        features = encoded(vlm.model, batch)
    levels = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
    return [torch.cat([part.reshape(-1, part.shape[-1]) for part in level]) for level in levels]


THIN, TALL, WIDE = (1000, 37), (333, 777), (1300, 1000)
"""Photographs on which the map is measured."""
FEW = {
    "Idefics3-8B-Llama3": [TALL],  # a thin one is cut as by SmolVLM2, into more patches
    "InternVL3-1B-hf": [TALL],  # a thin one has more tiles, in one row
    "gemma-3-4b-it": [TALL],  # any picture is one square
    "SmolVLM-256M-Instruct": [],  # cuts pictures as SmolVLM2
    "SmolVLM2-500M-Video-Instruct": [THIN],  # a tall one is cut as by Idefics3, into more patches
}
"""Where every run measures less than the first two; LLaVA-OneVision resizes features of the largest."""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if size in FEW.get(name, [THIN, TALL]) else pytest.mark.product)
        for name in PUBLISHED
        for size in (THIN, TALL, WIDE)
    ],
    ids=str,
)
def test_tokens_look_where_their_boxes_are_and_get_what_their_patches_have(vlm, size):
    """Painting over a token's box moves it, and leaves alone all that lie elsewhere, in the tower's patches too."""
    first = vlm.encode(["?"], [[plain(*size)]])
    layout = vlm.layout(first)
    shown, tokens = layout.tokens[marked(vlm, first)], int(marked(vlm, first).sum())
    boxes = layout.boxes[marked(vlm, first)]  # (n, 4)
    chosen = shown.nonzero().squeeze(1)
    chosen = chosen[torch.tensor([0.0, 0.13, 0.5, 0.77, 1.0]).mul(len(chosen) - 1).long()]
    cells = cells_of(boxes[chosen], size)
    pictures = [plain(*size), painted(*size, (0, 0, 1, 1)), *(painted(*size, cell) for cell in cells)]
    batch = vlm.encode(["?"] * len(pictures), [[picture] for picture in pictures])
    levels = [level.view(len(pictures), tokens, -1) for level in unmixed(vlm, batch)]
    for found in levels:
        share = 1 - (found[2:] - found[1]).norm(dim=-1) / (found[0] - found[1]).norm(dim=-1).clamp(min=1e-6)
        share = share.masked_fill(~shown, 0)  # 1 where a token looks as if all were painted
        for token, cell, seen in zip(chosen.tolist(), cells, share, strict=True):
            near = covered(boxes, cell, margin=(2 / size[0] + 0.02, 2 / size[1] + 0.02)).nan_to_num(0) > 0
            inside = covered(boxes, cell).nan_to_num(0)
            assert inside[seen.argmax()] > 0.6
            assert seen[token] > 0.4
            assert (seen[inside > 0.99] > 0.4).all()
            assert (seen[~near].abs() < 0.05).all()
    patches = entering(vlm, batch)
    rows = patches.view(len(pictures), -1, patches.shape[-1])
    changed = (rows - rows[:1]).norm(dim=-1).view(patches.shape[:-1])  # (views, tokens)
    got = vlm.family.per_token(vlm.model, batch, [changed]).view(len(pictures), tokens)
    assert torch.equal(got.isnan(), ~shown.expand_as(got))
    moved = (levels[0] - levels[0][:1]).norm(dim=-1)
    assert not moved[:, shown][got[:, shown] < 1e-5].gt(1e-3 * moved.max()).any()
    assert moved[:, shown][got[:, shown] > 1e-2 * got[:, shown].max()].gt(1e-5).all()


def check_moved(moved, boxes, cell):
    """What lies in a painted cell moves, and what lies elsewhere does not."""
    assert moved[covered(boxes, cell) > 0.99].min() > 0.1 * moved.max()
    near = covered(boxes, cell, margin=(0.05, 0.05)).nan_to_num(0) > 0
    assert moved[~near].max() < 1e-2 * moved.max()


def test_a_spot_in_the_second_of_two_pictures(vlm, name):
    first, size, cell = (300, 300), (420, 170), (0.5, 0.2, 0.65, 0.7)
    if name == "InternVL3-1B-hf":  # a longer one has many tiles
        size = (420, 400)
    elif name in TILED:
        first, size, cell = (1000, 37), (37, 1000), (0.2, 0.55, 0.8, 0.65)
    before = vlm.encode(["?"], [[plain(*first), plain(*size)]])
    after = vlm.encode(["?"], [[plain(*first), painted(*size, cell)]])
    layout = vlm.layout(before)
    moved = (unmixed(vlm, after)[0] - unmixed(vlm, before)[0]).norm(dim=-1)
    where = marked(vlm, before)
    image, boxes = layout.image[where], layout.boxes[where]
    assert (moved[image != 1] == 0).all()
    check_moved(moved[image == 1], boxes[image == 1], cell)


# What one family alone has


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct"])
def test_the_tower_mixes_patches_of_a_window_of_112_pixels_alone(vlm):
    """9 x 19 tokens: the windows of 4 x 4 tokens at the right and lower edge are smaller."""
    size = (252, 532)
    plainly = vlm.encode(["?"], [[plain(*size)]])
    layout = vlm.layout(plainly)
    assert layout.grid(0, 0) == (19, 9)
    boxes = layout.boxes[0][layout.tokens[0]]
    before = entering(vlm, plainly, layer=1)
    for row, column in ((0, 0), (5, 8), (17, 2), (18, 8)):
        (cell,) = cells_of(boxes[row * 9 + column][None], size)
        after = entering(vlm, vlm.encode(["?"], [[painted(*size, cell)]]), layer=1)
        changed = (after - before).norm(dim=-1)
        got = vlm.family.per_token(vlm.model, plainly, [changed]).view(19, 9)
        window = torch.zeros(19, 9, dtype=torch.bool)
        window[row // 4 * 4 : row // 4 * 4 + 4, column // 4 * 4 : column // 4 * 4 + 4] = True
        assert torch.equal(got > 1e-3 * got.max(), window)


@pytest.mark.parametrize("name", ["Qwen2-VL-2B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen3-VL-4B-Instruct"])
def test_positions_run_along_the_rows_and_columns_of_the_layout(vlm):
    batch = vlm.encode(["What?", "And what is in these two?"], [[plain(333, 777)], [plain(1000, 37), plain(64, 90)]])
    positions, layout = prompt_positions(vlm.model, batch)[-3:], vlm.layout(batch)
    for row, pictures in ((0, 1), (1, 2)):
        for picture in range(pictures):
            where = (layout.image[row] == picture).nonzero().squeeze(1)
            first, last = int(where[0]), int(where[-1])
            rows, columns = layout.grid(row, picture)
            start = int(positions[0, row, first - 1]) + 1
            down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            expected = torch.stack([torch.zeros_like(down), down, across]).flatten(1) + start
            assert torch.equal(positions[:, row, first : last + 1], expected)
            assert positions[:, row, last + 1].tolist() == [start + max(rows, columns)] * 3


@pytest.mark.parametrize("name", ["gemma-3-4b-it"])
def test_pan_and_scan_at_its_own_defaults_has_a_place_for_every_crop(vlm):
    """What the processor does when it is asked for crops in the call; the folder leaves their size open."""
    cell = (0.45, 0.2, 0.6, 0.5)  # in the second crop
    settings = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }

    def scanned(shown):
        inputs = vlm.processor(
            text=[vlm.render("?", 1)], images=[[shown]], add_special_tokens=False, return_tensors="pt", **settings
        )
        return Batch(inputs=dict(inputs), sizes=(((370, 1000),),))

    before, after = scanned(plain(1000, 370)), scanned(painted(1000, 370, cell))
    layout = vlm.layout(before)
    boxes = layout.boxes[0][layout.tokens[0]].view(4, 256, 4)  # the whole, and floor(1000 / 370 + 0.5) crops
    moved = (unmixed(vlm, after)[0] - unmixed(vlm, before)[0]).norm(dim=-1).view(4, 256)
    for part in (0, 2):
        check_moved(moved[part], boxes[part], cell)
    assert moved[[1, 3]].max() == 0
    assert covered(boxes[[1, 3]].flatten(0, 1), cell).max() == 0
