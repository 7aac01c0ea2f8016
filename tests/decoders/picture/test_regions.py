"""CARVE's mask, box and picture against its specification's vectors."""

import math

import numpy as np
import pytest
from PIL import Image

from vlmfix.decoders.picture.carve import CARVE
from vlmfix.decoders.picture.complexity import attention_entropy, colour_complexity, texture_complexity
from vlmfix.decoders.picture.refined import PictureMap
from vlmfix.decoders.picture.regions import best_regions, bounding_box, carved, enlarged, grown, threshold

Y, X = np.mgrid[:16, :16]
GENERAL = np.full((16, 16), 1 / 256)
ONE = GENERAL * (1 + 0.001 * X + 0.002 * Y + 8 * np.exp(-((Y - 4) ** 2 + (X - 11) ** 2) / 4.5))
TWO = ONE + GENERAL * 5 * np.exp(-((Y - 12) ** 2 + (X - 3) ** 2) / 2)
SINK = 1 + 40 * np.exp(-((Y - 14) ** 2 + (X - 1) ** 2) / 0.72)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def contrast(question, general, ridge=1e-8):
    return PictureMap(6 * question / (general + ridge))


def masked(values, share, count, *, rule="at-most", ranking="attention"):
    kept = threshold(values, share)
    return best_regions(values, kept, count=count, rule=rule, ranking=ranking, share=share)


@pytest.mark.parametrize(
    ("question", "share", "count", "area", "box", "size"),
    [
        (ONE, 0.05, 1, 0.050, (265, 69, 379, 183), (448, 448)),
        (ONE, 0.1, 1, 0.100, (242, 46, 402, 206), (448, 448)),
        (ONE, 0.2, 1, 0.200, (211, 15, 433, 238), (447, 450)),
        (ONE, 0.2, 3, 0.200, (211, 15, 433, 238), (447, 450)),
        (ONE, 0.4, 2, 0.400, (176, 0, 448, 448), (448, 737)),
        (TWO, 0.05, 1, 0.0447, (268, 72, 376, 180), (448, 448)),
        (TWO, 0.05, 2, 0.05, (77, 72, 376, 371), (447, 447)),
        (TWO, 0.1, 1, None, (250, 54, 394, 198), (448, 448)),
        (TWO, 0.1, 2, None, (58, 54, 394, 390), (448, 448)),
    ],
)
def test_a_planted_region_is_cut_out(question, share, count, area, box, size):
    found = contrast(question, GENERAL)
    values = found.pixels(448, 448)
    mask = masked(values, share, count)
    assert bounding_box(mask) == pytest.approx(box, abs=2)
    assert area is None or mask.mean() == pytest.approx(area, abs=1e-3)
    look = CARVE(kept_share=share, regions=count).look(noise(448, 448), found)
    assert look.picture.size == pytest.approx(size, abs=2)
    assert [edge * 448 for edge in look.box] == pytest.approx(box, abs=2)
    assert values.max() == pytest.approx(53.77, abs=0.01)


@pytest.mark.parametrize(
    ("ridge", "box"),
    [(1e-8, (265, 69, 379, 183)), (1e-2, (265, 69, 379, 183)), (1.0, (0, 364, 84, 448))],
)
def test_a_sink_in_both_maps_cancels_until_the_ridge_drowns_the_contrast(ridge, box):
    values = contrast(ONE * SINK, GENERAL * SINK, ridge).pixels(448, 448)
    assert bounding_box(masked(values, 0.05, 1)) == pytest.approx(box, abs=2)


def test_bilinear_upsampling():
    got = PictureMap(np.array([[0.0, 1.0], [2.0, 3.0]])).pixels(4, 4)
    steps = np.array([0, 0.25, 0.75, 1])
    np.testing.assert_allclose(got, steps[None] + 2 * steps[:, None])


def test_upsampling_is_linear():
    one, two = np.random.default_rng(1).random((2, 5, 7))
    apart = PictureMap(one).pixels(60, 83) + PictureMap(two).pixels(60, 83)
    np.testing.assert_allclose(PictureMap(one + two).pixels(60, 83), apart, atol=1e-12)


def test_a_map_is_zero_where_the_model_saw_nothing():
    got = PictureMap(np.ones((2, 2)), (0.25, 0.0, 0.75, 1.0)).pixels(4, 8)
    assert got.sum(axis=0).tolist() == [0, 0, 4, 4, 4, 4, 0, 0]


@pytest.mark.parametrize("values", [np.full((16, 16), 5.99998), np.full((24, 24), 0.3)])
@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_a_flat_map_leaves_the_picture_as_it_is(values, share):
    picture = noise(200, 120)
    look = CARVE(kept_share=share).look(picture, PictureMap(values))
    assert look.box == (0, 0, 1, 1)
    np.testing.assert_array_equal(np.asarray(look.picture), np.asarray(picture))


def test_the_whole_share_keeps_all_even_beyond_what_was_seen():
    picture = noise(200, 120)
    found = PictureMap(np.random.default_rng(3).random((6, 6)), (0.2, 0.0, 0.8, 1.0))
    look = CARVE(kept_share=1.0).look(picture, found)
    np.testing.assert_array_equal(np.asarray(look.picture), np.asarray(picture))


def test_the_threshold_keeps_the_share_and_ties_inflate_it():
    values = np.random.default_rng(2).random((90, 70))
    assert threshold(values, 0.2).mean() == pytest.approx(0.2, abs=1e-3)
    values = np.zeros((100, 100))
    values[:10, :50] = np.linspace(1, 2, 500).reshape(10, 50)
    assert threshold(values, 0.2).all()


def test_a_positive_factor_changes_nothing():
    values = contrast(TWO, GENERAL).pixels(300, 200)
    np.testing.assert_array_equal(masked(values, 0.1, 2), masked(values * 37.5, 0.1, 2))


def test_corners_do_not_connect():
    values = np.zeros((10, 10))
    values[3, 3], values[4, 4] = 2, 1
    kept = values > 0
    got = best_regions(values, kept, count=1, rule="at-most", ranking="attention", share=0.02)
    assert np.argwhere(got).tolist() == [[3, 3]]


@pytest.mark.parametrize(
    ("share", "rule", "pixels"), [(0.09, "at-least", 81), (0.09, "at-most", 27), (0.05, "at-least", 27)]
)
def test_k_is_the_least_in_the_code_and_the_most_in_the_paper(share, rule, pixels):
    values = np.zeros((100, 100))
    for i in range(10):
        for j in range(10):
            values[10 * i : 10 * i + 3, 10 * j : 10 * j + 3] = 1 + (10 * i + j) / 1000
    assert masked(values, share, 3, rule=rule).sum() == pixels


@pytest.mark.parametrize(
    ("middle", "ranking", "pixels", "box"),
    [
        (2.0, "attention", 400, (30, 30, 50, 50)),
        (2.0, "size", 400, (30, 30, 50, 50)),
        (2.0, "remove-small", 426, None),
        (0.5, "attention", 25, (5, 5, 10, 10)),
    ],
)
def test_rankings(middle, ranking, pixels, box):
    values = np.zeros((60, 60))
    values[5:10, 5:10], values[30:50, 30:50], values[55, 55] = 10, middle, 50
    mask = masked(values, 0.11, 1, ranking=ranking)
    assert mask.sum() == pixels
    assert box is None or bounding_box(mask) == box


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_reported(bad):
    values = np.ones((4, 4))
    values[1, 2] = bad
    picture = noise(50, 40)
    look = CARVE().look(picture, PictureMap(values))
    assert look.picture is picture
    assert look.box == (0, 0, 1, 1)
    assert "not finite" in look.problem


def test_boxes_grow_around_their_middle_and_stay_inside():
    assert grown((10, 20, 43, 97), 640, 480, smallest=1, aspect=4) == (10, 20, 43, 97)
    assert grown((0, 0, 5, 400), 640, 480, smallest=1, aspect=4) == (0, 0, 100, 400)
    assert grown((300, 0, 305, 400), 640, 480, smallest=1, aspect=4) == (253, 0, 353, 400)
    assert grown((636, 10, 640, 14), 640, 480, smallest=28, aspect=4) == (612, 0, 640, 28)
    assert grown((0, 0, 10, 3), 10, 3, smallest=28, aspect=1) == (0, 0, 10, 3)


def test_parts_are_enlarged_to_cover_the_picture():
    assert enlarged(noise(33, 77), (640, 480)).size == (640, 1493)
    assert max(enlarged(noise(5, 400), (640, 480)).size) == 4096
    assert enlarged(noise(448, 448), (448, 448)).size == (448, 448)


def test_what_is_masked_is_black():
    picture = Image.new("RGB", (8, 8), "white")
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0] = mask[3, 3] = True
    got = np.asarray(carved(picture, mask, (0, 0, 8, 8)))
    assert (got.reshape(-1, 3).max(axis=1) > 0).sum() == 2


def test_texture_and_colour_of_a_picture():
    assert texture_complexity(Image.new("RGB", (30, 20), (9, 8, 7))) == 0
    assert 0.2 < texture_complexity(noise(64, 64)) <= 1
    assert colour_complexity(Image.new("RGB", (30, 20), (200, 10, 10))) == 0
    halves = Image.new("RGB", (20, 20), (255, 0, 0))
    halves.paste((0, 255, 0), (0, 0, 10, 20))
    assert colour_complexity(halves) == pytest.approx(math.log(2) / math.log(180), abs=1e-9)
    assert colour_complexity(halves) == pytest.approx(0.13348, abs=1e-5)


def test_the_entropy_of_maps():
    assert attention_entropy(np.full((16, 16), 0.2)) == pytest.approx(math.log(256))
    assert attention_entropy(np.eye(1, 9)[0]) == 0
