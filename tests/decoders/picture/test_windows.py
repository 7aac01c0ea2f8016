"""ViCrop's window and blocks against its specification's vectors."""

import numpy as np
import pytest
from PIL import Image

from vlmfix.decoders.picture.windows import attention_ratio, best_window, block_grid, blocks, mosaic


def bump(cy, cx, spread, lines=24, columns=24):
    y, x = np.mgrid[:lines, :columns]
    return 1 + 10 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * spread**2))


def plateau(y, x, high, wide):
    values = np.ones((24, 24))
    values[y : y + high, x : x + wide] = 9
    return values


def single(y, x):
    values = np.zeros((24, 24))
    values[y, x] = 1
    return values


def window(values, width, height, base=336):
    return best_window(values, width, height, base, by_area=True).box


@pytest.mark.parametrize(
    ("values", "size", "base", "box"),
    [
        (np.full((24, 24), 0.3), (1008, 1008), 336, (0, 0, 336, 336)),
        (np.full((24, 24), 0.3), (1200, 900), 336, (0, 0, 336, 336)),
        (bump(5, 18, 1), (300, 200), 336, (0, 0, 300, 200)),
        (bump(5, 18, 1), (336, 336), 336, (0, 0, 336, 336)),
        (bump(5, 18, 1), (1008, 1008), 336, (588, 42, 924, 378)),
        (bump(5, 18, 3), (1008, 1008), 336, (588, 42, 924, 378)),
        (bump(0, 0, 1), (1008, 1008), 336, (0, 0, 336, 336)),
        (bump(23, 23, 1), (1008, 1008), 336, (672, 672, 1008, 1008)),
        (bump(12, 18, 1), (1200, 300), 336, (782, 0, 1118, 300)),
        (bump(5, 18, 1), (400, 400), 336, (64, 0, 400, 336)),
        (single(10, 7), (2016, 1008), 336, (336, 126, 672, 462)),
        (plateau(8, 14, 4, 4), (1344, 1344), 336, (672, 336, 1008, 672)),
        (plateau(4, 10, 8, 8), (1008, 1008), 336, (420, 168, 756, 504)),
        (plateau(2, 9, 12, 12), (1008, 1008), 336, (362, 68, 898, 604)),
        (bump(3, 15, 1, 12, 20), (1280, 768), 224, (880, 112, 1104, 336)),
        (bump(4, 11, 1, 16, 16), (448, 448), 224, (196, 0, 420, 224)),
        (bump(4, 11, 1, 16, 16), (1792, 1792), 224, (1120, 336, 1344, 560)),
    ],
)
def test_the_window(values, size, base, box):
    assert window(values, *size, base) == box


@pytest.mark.parametrize(("cells", "ratio"), [(8, 1.0), (9, 1.2), (11, 1.4), (12, 1.6), (14, 1.8)])
def test_the_window_that_fits_a_block_wins(cells, ratio):
    x0, _, x1, _ = window(plateau(3, 4, cells, cells), 1008, 1008)
    assert x1 - x0 == 336 * ratio // 2 * 2


@pytest.mark.parametrize("cells", [10, 13, 15, 16, 18])
def test_without_a_fitting_window_the_smallest_stands_in_the_corner(cells):
    assert window(plateau(3, 4, cells, cells), 1008, 1008) == (168, 126, 504, 462)


def test_of_windows_that_tie_the_leftmost_wins_and_then_the_uppermost():
    assert window(single(2, 18) + single(18, 2), 1008, 1008) == (0, 462, 336, 798)
    assert window(single(2, 18) + single(18, 18), 1008, 1008) == (462, 0, 798, 336)


def test_the_paper_compares_windows_by_their_sums():
    """Its sharpness is not divided by the area, and so never below the code's choice in size."""
    draw = np.random.default_rng(0)
    larger = 0
    for _ in range(50):
        values = draw.random((24, 24))
        code, paper = (best_window(values, 1008, 1008, 336, by_area=by_area).box for by_area in (True, False))
        assert paper[2] - paper[0] >= code[2] - code[0]
        larger += paper[2] - paper[0] > code[2] - code[0]
    assert larger > 10


def test_a_map_without_a_peak_says_so():
    assert not best_window(np.full((24, 24), 0.3), 1008, 1008, 336, by_area=True).peaked
    assert best_window(single(3, 3), 1008, 1008, 336, by_area=True).peaked


def test_an_affine_map_chooses_the_same():
    draw = np.random.default_rng(1)
    for _ in range(40):
        values = draw.random((12, 16))
        assert window(values, 900, 700, 224) == window(3 * values + 5, 900, 700, 224)


def test_windows_lie_in_the_picture_and_have_the_allowed_sides():
    draw = np.random.default_rng(2)
    for number in range(150):
        lines, columns = draw.integers(8, 33, 2)
        width, height = (int(side) for side in draw.integers(100, 4001, 2))
        base = 224 if number % 2 else 336
        x0, y0, x1, y1 = window(draw.random((lines, columns)), width, height, base)
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        if min(width, height) > 2 * base:
            assert min(abs((x1 - x0) - base * ratio) for ratio in (1, 1.2, 1.4, 1.6, 1.8, 2)) <= 2
            assert x1 - x0 == y1 - y0


@pytest.mark.parametrize("size", [(9000, 9000), (9000, 1000)])
def test_cells_larger_than_the_base_still_find_the_peak(size):
    x0, y0, x1, y1 = window(single(20, 20), *size)
    x, y = 20.5 * size[0] / 24, 20.5 * size[1] / 24
    assert x0 <= x < x1
    assert y0 <= y < y1


@pytest.mark.parametrize(
    ("size", "grid", "covering"),
    [
        ((2250, 1500), (2, 3), (2, 3)),
        ((1024, 1024), (1, 1), (1, 1)),
        ((1025, 1025), (2, 2), (2, 2)),
        ((2246, 1582), (2, 2), (2, 3)),
        ((5000, 1000), (1, 5), (1, 5)),
        ((2000, 900), (1, 2), (1, 2)),
        ((4000, 3000), (3, 4), (3, 4)),
        ((1000, 800), (1, 1), (1, 1)),
        ((600, 800), (1, 1), (1, 1)),
        ((900, 2000), (2, 1), (2, 1)),
    ],
)
def test_large_pictures_are_cut_into_blocks(size, grid, covering):
    assert block_grid(*size, 1024, covering=False) == grid
    assert block_grid(*size, 1024, covering=True) == covering


@pytest.mark.parametrize(
    ("size", "grid", "block"),
    [((2250, 1500), (2, 3), (750, 750)), ((1025, 1025), (2, 2), (513, 513)), ((2246, 1582), (2, 2), (1123, 791))],
)
def test_blocks_have_one_size(size, grid, block):
    picture = Image.new("RGB", size, "white")
    parts = blocks(picture, grid)
    assert {part.size for part in parts} == {block}
    assert len(parts) == grid[0] * grid[1]
    over = (grid[1] * block[0] - size[0], grid[0] * block[1] - size[1])
    assert parts[-1].getpixel((block[0] - 1, block[1] - 1)) == ((0, 0, 0) if max(over) else (255, 255, 255))


def test_maps_of_blocks_are_put_together_in_rows():
    parts = [np.full((2, 2), float(value)) for value in (0, 1, 2, 10, 11, 12)]
    expected = np.array([[0, 1, 2], [10, 11, 12]]).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(mosaic(parts, (2, 3)), expected)


def test_the_attention_ratio_compares_a_box_with_all_of_its_size():
    assert attention_ratio(np.full((6, 8), 0.2), (1, 2, 4, 4)) == pytest.approx(1)
    assert attention_ratio(single(5, 7), (6, 4, 9, 7)) == pytest.approx(22 * 22 / 9)
    assert attention_ratio(single(5, 7), (10, 10, 13, 13)) == 0
