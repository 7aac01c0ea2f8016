import hashlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from vlmfix.world.backdrop import KINDS, Shape
from vlmfix.world.contexts import Surface
from vlmfix.world.render import _draw, render
from vlmfix.world.scenes import CANVAS, Scene, scene
from vlmfix.world.sprites import OPAQUE, SIZES, pictures, resample, sprites

PICTURES = pictures()
PLAIN = (Surface(CANVAS, (255, 0, 255), (255, 0, 255), 0),)

GOLDEN = "94340bac3da8a3bd125948640300e9f11cfbf8938661303a98ae4927688b6a1e"


def mix(under: list[int], colour: list[int], cover: int) -> list[int]:
    return [below + ((above - below) * cover >> 8) for below, above in zip(under, colour, strict=True)]


def noise(value: int) -> int:
    value = (value ^ (value >> 15)) & 0xFFFFFFF
    value = (value * 0x2C1B3C6D) % 2**32
    value = ((value ^ (value >> 12)) * 0x297A2D39) % 2**32
    return (value ^ (value >> 15)) % 256


def background(drawn: Scene, x: int, y: int) -> list[int]:
    start = 0
    for band in drawn.surfaces:
        if y < band.end:
            break
        start = band.end
    step, height = y - start, band.end - start
    colour = [a + (b - a) * step // height for a, b in zip(band.top, band.bottom, strict=True)]
    grain = (noise((y // 2) * CANVAS + x // 2 + drawn.grain * 2**18) - 128) * band.grain >> 7
    wide, tall = band.grid
    if (wide and x % wide < 2) or (tall and step % tall < 2):
        grain -= 16
    return [min(255, max(0, part + grain)) for part in colour]


def covers(shape: Shape, x: int, y: int) -> bool:
    x0, y0, x1, y1 = shape.box
    if not (x0 <= x < x1 and y0 <= y < y1):
        return False
    u = (2 * (x - x0) + 1) * 1024 // (x1 - x0) - 1024
    v = (2 * (y - y0) + 1) * 1024 // (y1 - y0) - 1024
    low = (v + 1024) // 2
    far = u * u + v * v
    return {
        "rectangle": True,
        "ellipse": far <= 1024**2,
        "triangle": abs(u) <= low,
        "diamond": abs(u) + abs(v) <= 1024,
        "ring": abs(far - 1024**2 * 7 // 8) <= 1024**2 // 8,
        "cross": abs(u) < 160 or abs(v) < 160,
        "windows": (x - x0) % 22 < 12 and (y - y0) % 26 < 15,
        "planks": (x - x0) % 12 < 5,
        "blob": far <= 1024**2 and noise((x - x0) // 4 * CANVAS + (y - y0) // 4) < 120,
        "wedge": abs(u) <= 1024 * 2 // 5 + low * 3 // 5,
        "dome": u * u + (1024 - low) ** 2 <= 1024**2,
    }[shape.kind]


def pixel(drawn: Scene, x: int, y: int) -> list[int]:
    """The obvious painter: one pixel at a time, in plain Python."""
    colour = background(drawn, x, y)
    for shape in drawn.shapes:
        if covers(shape, x, y):
            colour = mix(colour, list(shape.colour), shape.cover)
    for placed in drawn.objects:
        x0, y0, x1, y1 = placed.box
        if x0 <= x < x1 and y0 <= y < y1:
            sprite = resample(PICTURES[placed.sprite], SIZES[placed.size])
            across = x - placed.origin[0]
            if placed.mirrored:
                across = sprite.shape[1] - 1 - across
            red, green, blue, alpha = (int(part) for part in sprite[y - placed.origin[1], across])
            tinted = [part * tint >> 8 for part, tint in zip((red, green, blue), placed.tint, strict=True)]
            colour = mix(colour, tinted, (alpha + (alpha >> 7)) * placed.cover >> 8)
    return colour


@pytest.mark.parametrize("index", [0, 3, 11])
def test_agrees_with_the_obvious_painter(index: int):
    drawn = scene(2, index)
    found = render([drawn])[0]
    for y in range(index, CANVAS, 23):
        for x in range(index, CANVAS, 19):
            assert found[:, y, x].tolist() == pixel(drawn, x, y), (x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_every_shape(kind: str):
    shapes = (
        Shape(kind, (30, 40, 97, 81), (10, 200, 90), 256),
        Shape(kind, (-20, 490, 50, 530), (200, 10, 30), 100),
        Shape(kind, (600, 10, 620, 20), (0, 0, 0), 256),
    )
    drawn = Scene(0, 0, "park", (), PLAIN, shapes, 0)
    found = render([drawn])[0]
    for x, y in [(x, y) for x in range(25, 100, 3) for y in range(38, 84, 3)] + [(n, 495) for n in range(50)]:
        assert found[:, y, x].tolist() == pixel(drawn, x, y), (x, y)


def test_same_pixels_as_ever():
    found = render([scene(seed, index) for seed, index in ((0, 0), (0, 1), (1, 0), (2026, 500))])
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == GOLDEN


def test_a_batch_equals_each_alone():
    scenes = [scene(4, index) for index in range(5)]
    found = render(scenes)
    assert found.shape == (5, 3, CANVAS, CANVAS)
    assert found.dtype == torch.uint8
    for drawn, picture in zip(scenes, found, strict=True):
        assert torch.equal(render([drawn])[0], picture)


def test_no_scenes():
    assert render([]).shape == (0, 3, CANVAS, CANVAS)


@pytest.mark.parametrize("chunk", [2, 7])
def test_chunks_do_not_matter(chunk: int):
    scenes = [scene(4, index) for index in range(7)]
    alone = render(scenes)
    parts = [_draw(scenes[start : start + chunk], device="cpu") for start in range(0, 7, chunk)]
    assert torch.equal(torch.cat(parts), alone)


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    scenes = [scene(9, index) for index in range(120)]
    assert torch.equal(render(scenes, device="cuda").cpu(), render(scenes))


@pytest.mark.parametrize("index", range(6))
def test_boxes_are_tight(index: int):
    for placed in scene(6, index).objects:
        alone = Scene(0, 0, "park", (replace(placed, cover=256),), PLAIN, (), 0)
        empty = replace(alone, objects=())
        found, base = render([alone, empty])
        ys, xs = torch.nonzero((found != base).any(dim=0), as_tuple=True)
        assert (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) == placed.box


@pytest.mark.parametrize("size", [26, 64, 112])
@pytest.mark.parametrize("number", [0, 31])
def test_shrinking_is_an_exact_average(number: int, size: int):
    picture = PICTURES[number]
    height, width = picture.shape[:2]
    longest = max(height, width)
    rows = round(Fraction(height * size, longest))
    columns = round(Fraction(width * size, longest))
    expected = np.zeros((rows, columns, 4), np.uint8)
    for row in range(rows):
        for column in range(columns):
            expected[row, column] = average(picture, row, column, rows, columns)
    tight = expected[..., 3] >= OPAQUE
    ys, xs = np.flatnonzero(tight.any(axis=1)), np.flatnonzero(tight.any(axis=0))
    expected[~tight] = 0
    expected = expected[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    assert np.array_equal(resample(picture, size), expected)


def average(picture: np.ndarray, row: int, column: int, rows: int, columns: int) -> list[int]:
    """Colour and opacity of one pixel: areas of the old pixels under it, exactly, in 1 / (rows * columns) of one."""
    height, width = picture.shape[:2]
    total, opacity = [0] * 3, 0
    for y in range(row * height // rows, -(-(row + 1) * height // rows)):
        tall = min((row + 1) * height, (y + 1) * rows) - max(row * height, y * rows)
        for x in range(column * width // columns, -(-(column + 1) * width // columns)):
            wide = min((column + 1) * width, (x + 1) * columns) - max(column * width, x * columns)
            red, green, blue, alpha = picture[y, x].tolist()
            weight = tall * wide * alpha
            opacity += weight
            total = [total[0] + weight * red, total[1] + weight * green, total[2] + weight * blue]
    if opacity == 0:
        return [0, 0, 0, 0]
    area = height * width
    return [(2 * part + opacity) // (2 * opacity) for part in total] + [(2 * opacity + area) // (2 * area)]


def test_enlarging_keeps_a_plain_colour():
    picture = np.full((40, 30, 4), 255, np.uint8)
    picture[..., 1] = 17
    large = resample(picture, 220)
    assert large.shape == (220, 165, 4)
    assert (large == (255, 17, 255, 255)).all()


def test_every_sprite_is_drawn_somewhere():
    seen = {placed.sprite for index in range(1500) for placed in scene(0, index).objects}
    assert seen == set(range(len(sprites())))
