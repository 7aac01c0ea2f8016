import numpy as np
import pytest
from pycocotools import mask as coco_mask

from vlmfix.world.masks import runs, visible
from vlmfix.world.render import render
from vlmfix.world.scenes import CANVAS, scene
from vlmfix.world.sprites import SIZES, pictures, resample

PICTURES = pictures()


def on_top(drawn, sheet, x, y):
    """The obvious way: the number of the last object that paints a pixel; None where none does."""
    for number in reversed(range(len(drawn.objects))):
        placed, sprite = drawn.objects[number], sheet[number]
        across, down = x - placed.origin[0], y - placed.origin[1]
        if 0 <= down < sprite.shape[0] and 0 <= across < sprite.shape[1]:
            across = sprite.shape[1] - 1 - across if placed.mirrored else across
            if sprite[down, across, 3]:
                return number
    return None


@pytest.mark.parametrize("index", [0, 3, 11, 14])
def test_a_pixel_is_the_last_objects_that_is_drawn_there(index: int):
    drawn = scene(2, index)
    sheet = [resample(PICTURES[placed.sprite], SIZES[placed.size]) for placed in drawn.objects]
    found = np.stack(visible(drawn))
    assert found.shape == (len(drawn.objects), CANVAS, CANVAS)
    for y in range(index, CANVAS, 5):
        for x in range(index, CANVAS, 3):
            number = on_top(drawn, sheet, x, y)
            assert found[:, y, x].nonzero()[0].tolist() == ([] if number is None else [number])


def test_masks_hold_what_objects_change_in_the_picture():
    """Together they are the pixels in which it differs from the same place without objects, but for a chance."""
    for index in range(8):
        drawn = scene(3, index)
        with_objects, without = render([drawn, type(drawn)(**{**vars(drawn), "objects": ()})])
        changed = (with_objects != without).any(dim=0).numpy()
        objects = np.any(visible(drawn), axis=0)
        assert not (changed & ~objects).any()
        assert (objects & ~changed).mean() < 0.005


def test_something_of_every_object_is_seen_and_nothing_outside_of_its_box():
    for index in range(40):
        drawn = scene(5, index)
        for placed, mask in zip(drawn.objects, visible(drawn), strict=True):
            x0, y0, x1, y1 = placed.box
            assert mask.any()
            assert mask[y0:y1, x0:x1].sum() == mask.sum()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_runs_are_cocos():
    for rows in (["..#", ".##"], ["#..", "#.#"], ["...", "..."], ["###", "###"]):
        mask = np.array([[letter == "#" for letter in row] for row in rows])
        written = runs(mask)
        assert sum(written["counts"]) == mask.size
        assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(written, *mask.shape)), mask)
    assert runs(np.array([[True, False], [True, True]])) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
