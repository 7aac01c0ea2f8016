"""Scenes to pixels, in integer arithmetic alone: the same pixels on every device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vlmfix.world.backdrop import KINDS, Shape
from vlmfix.world.scenes import CANVAS, Placed, Scene
from vlmfix.world.sprites import sized, sprites

PIXELS = CANVAS * CANVAS
UNIT = 1024  # half the side of a shape in its own coordinates
CHUNK = 200  # scenes at a time on an accelerator; a processor draws one, which stays in its cache


def render(scenes: Sequence[Scene], *, device: str = "cpu") -> Tensor:
    """Draw scenes.

    Args:
        scenes: N scenes.
        device: Torch device that draws them and holds the result.

    Returns:
        (N, 3, 512, 512) uint8, RGB, equal on every device.
    """
    out = torch.empty((len(scenes), 3, CANVAS, CANVAS), dtype=torch.uint8, device=device)
    step = 1 if out.device.type == "cpu" else CHUNK
    for start in range(0, len(scenes), step):
        out[start : start + step] = _draw(scenes[start : start + step], device=device)
    return out


def _draw(scenes: Sequence[Scene], *, device: str) -> Tensor:
    """Draw scenes together: first their backgrounds, then everybody's first shape, second shape and so on.

    Args:
        scenes: N scenes, 1 or more.
        device: Torch device.

    Returns:
        (N, 3, 512, 512) uint8.
    """
    canvas = _background(scenes, device=device)  # (N, 3, PIXELS)
    for slot in range(max(len(scene.shapes) for scene in scenes)):
        _draw_shapes(canvas, [(n, s.shapes[slot]) for n, s in enumerate(scenes) if slot < len(s.shapes)])
    for slot in range(max(len(scene.objects) for scene in scenes)):
        _draw_objects(canvas, [(n, s.objects[slot]) for n, s in enumerate(scenes) if slot < len(s.objects)])
    return canvas.view(-1, 3, CANVAS, CANVAS)


def _background(scenes: Sequence[Scene], *, device: str) -> Tensor:
    """Bands with their gradients, lines and noise. (N, 3, PIXELS) uint8."""
    rows = _rows(scenes, device=device)  # (N, 512, 7)
    seeds = torch.tensor([scene.grain for scene in scenes], dtype=torch.int64, device=device)
    y = torch.arange(CANVAS, device=device)[:, None]
    x = torch.arange(CANVAS, device=device)[None, :]
    # Noise in cells of 2 pixels: a finer one would vanish when the model's processor shrinks the picture.
    cell = (y >> 1) * CANVAS + (x >> 1)  # (512, 512)
    noise = _hash(cell[None] + (seeds << 18)[:, None, None])  # (N, 512, 512), 0 to 255
    grain = ((noise - 128).int() * rows[..., 3, None]) >> 7
    across = x.int()[None] % rows[..., 4, None] < 2  # upright lines
    lines = (across | (rows[..., 5, None] > 0)) & (rows[..., 6, None] > 0)
    grain = grain - lines.int() * 16
    shades = rows[..., :3].movedim(2, 1).contiguous()  # (N, 3, 512)
    canvas = shades[..., None] + grain[:, None]  # (N, 3, 512, 512)
    return canvas.clamp_(0, 255).to(torch.uint8).view(len(scenes), 3, PIXELS)


def _rows(scenes: Sequence[Scene], *, device: str) -> Tensor:
    """Colour and texture of every row of the canvas.

    Args:
        scenes: N scenes.
        device: Torch device.

    Returns:
        (N, 512, 7) int32: red, green, blue, noise, width of a tile, whether a line lies here, whether the
        surface has lines.
    """
    most = max(len(scene.surfaces) for scene in scenes)
    empty = (CANVAS,) * 11
    table = []
    for scene in scenes:
        starts = [0, *(band.end for band in scene.surfaces)]
        rows = [
            (start, band.end, *band.top, *band.bottom, band.grain, *band.grid)
            for start, band in zip(starts, scene.surfaces, strict=False)
        ]
        table.append(rows + [empty] * (most - len(rows)))
    bands = torch.tensor(table, dtype=torch.int32, device=device)  # (N, bands, 11)
    y = torch.arange(CANVAS, dtype=torch.int32, device=device)
    number = (y[:, None] >= bands[:, None, :, 1]).sum(dim=2)  # (N, 512)
    values = bands.gather(1, number[..., None].expand(-1, -1, 11))  # (N, 512, 11)
    start, end, grain, wide, tall = values[..., (0, 1, 8, 9, 10)].unbind(2)  # (N, 512) each
    top, bottom = values[..., 2:5], values[..., 5:8]  # (N, 512, 3)
    step = y - start
    colour = top + (bottom - top) * step[..., None] // (end - start)[..., None]
    line = (tall > 0) & (step % tall.clamp(min=1) < 2)
    wide_or_none = torch.where(wide > 0, wide, CANVAS + 2)
    rest = torch.stack([grain, wide_or_none, line.int(), ((wide > 0) | (tall > 0)).int()], dim=2)
    return torch.cat([colour, rest], dim=2)


def _hash(values: Tensor) -> Tensor:
    """Integers below 2**40 to 0 to 255, without a pattern that the eye finds."""
    mixed = (values ^ (values >> 15)) & 0xFFFFFFF
    mixed = (mixed * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)) & 255


def _draw_shapes(canvas: Tensor, shapes: Sequence[tuple[int, Shape]]) -> None:
    """Blend one shape into each scene named. Writes to canvas, (N, 3, PIXELS) uint8."""
    table = [
        (number, KINDS.index(shape.kind), *shape.box, *_clipped(shape.box), *shape.colour, shape.cover)
        for number, shape in shapes
    ]
    table = [row for row in table if row[8] > row[6] and row[9] > row[7]]
    if not table:
        return
    pixels, item, x, y = _cover(canvas, [(row[0], *row[6:10]) for row in table])
    columns = _per_pixel(table, item)  # (14, M)
    kind, x0, y0, x1, y1 = columns[1:6]
    u = (2 * (x - x0) + 1) * UNIT // (x1 - x0) - UNIT  # (M,), -1024 to 1024
    v = (2 * (y - y0) + 1) * UNIT // (y1 - y0) - UNIT
    kinds = sorted({row[1] for row in table})
    inside = torch.zeros_like(u)  # (M,), 0 or 1
    for number in kinds:
        inside |= (kind == number) & _inside(KINDS[number], u, v, x - x0, y - y0)
    _blend(canvas, pixels, columns[10:13], columns[13] * inside)


def _inside(kind: str, u: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whether points lie in a shape of one kind.

    Args:
        kind: One of `KINDS`.
        u: (M,) -1024 at the left edge to 1024 at the right one.
        v: (M,) -1024 at the upper edge to 1024 at the lower one.
        x: (M,) pixels from the left edge.
        y: (M,) pixels from the upper edge.

    Returns:
        (M,) bool.
    """
    low = v + UNIT >> 1  # 0 at the top to 1024 at the bottom
    match kind:
        case "rectangle":
            return torch.ones_like(u, dtype=torch.bool)
        case "ellipse":
            return u * u + v * v <= UNIT * UNIT
        case "triangle":
            return u.abs() <= low
        case "diamond":
            return u.abs() + v.abs() <= UNIT
        case "ring":
            return (u * u + v * v - UNIT * UNIT * 7 // 8).abs() <= UNIT * UNIT // 8
        case "cross":
            return (u.abs() < 160) | (v.abs() < 160)
        case "windows":
            return (x % 22 < 12) & (y % 26 < 15)
        case "planks":
            return x % 12 < 5
        case "blob":
            return (u * u + v * v <= UNIT * UNIT) & (_hash((x.long() >> 2) * CANVAS + (y.long() >> 2)) < 120)
        case "wedge":
            return u.abs() <= UNIT * 2 // 5 + low * 3 // 5
        case "dome":
            return u * u + (UNIT - low) * (UNIT - low) <= UNIT * UNIT
        case _:
            raise ValueError(f"no shape is called {kind!r}; use one of {', '.join(KINDS)}")


def _draw_objects(canvas: Tensor, objects: Sequence[tuple[int, Placed]]) -> None:
    """Blend one sprite into each scene named. Writes to canvas, (N, 3, PIXELS) uint8."""
    colours, starts, offset = [], [], 0
    for _, placed in objects:
        picture = _sprite(placed.sprite, placed.size, str(canvas.device))  # (h * w, 4)
        colours.append(picture)
        starts.append(offset)
        offset += len(picture)
    table = [
        (
            start,
            sprites()[placed.sprite].drawn[placed.size][0],
            *placed.origin,
            placed.mirrored,
            *placed.tint,
            placed.cover,
        )
        for start, (_, placed) in zip(starts, objects, strict=True)
    ]
    pixels, item, x, y = _cover(canvas, [(number, *placed.box) for number, placed in objects])
    columns = _per_pixel(table, item)  # (9, M)
    start, width, x0, y0, mirrored = columns[:5]
    across = torch.where(mirrored > 0, width - 1 - (x - x0), x - x0)
    source = torch.cat(colours)[start + (y - y0) * width + across].int().T  # (4, M)
    _blend(canvas, pixels, source[:3] * columns[5:8] >> 8, (source[3] + (source[3] >> 7)) * columns[8] >> 8)


@cache
def _sprite(number: int, size: int, device: str) -> Tensor:
    """One sprite at one size. (height * width, 4) uint8, RGBA."""
    return torch.from_numpy(sized(number, size)).reshape(-1, 4).to(device)


def _clipped(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    return max(0, x0), max(0, y0), min(CANVAS, x1), min(CANVAS, y1)


def _cover(canvas: Tensor, boxes: Sequence[tuple[int, int, int, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the pixels of boxes, all boxes one after the other.

    Args:
        canvas: (N, 3, PIXELS).
        boxes: Scene number and x0, y0, x1, y1 inside the canvas.

    Returns:
        Position of each pixel's red value in the flat canvas, number of its box, x and y; each (M,).
    """
    device = canvas.device
    areas = [(x1 - x0) * (y1 - y0) for _, x0, y0, x1, y1 in boxes]
    total = sum(areas)
    numbers = torch.arange(len(boxes), dtype=torch.int32, device=device)
    item = torch.repeat_interleave(numbers, torch.tensor(areas, device=device), output_size=total)  # (M,)
    starts = [0]
    for area in areas[:-1]:
        starts.append(starts[-1] + area)
    table = [(start, *box[:3], box[3] - box[1]) for start, box in zip(starts, boxes, strict=True)]
    start, scene, x0, y0, width = _per_pixel(table, item)  # (M,) each
    local = torch.arange(total, dtype=torch.int32, device=device) - start
    y = local // width
    x = local - y * width + x0
    y = y + y0
    return scene.long() * (3 * PIXELS) + y * CANVAS + x, item, x, y


def _per_pixel(table: Sequence[Sequence[int]], item: Tensor) -> Tensor:
    """Rows of a table, spread over the pixels of their boxes.

    Args:
        table: One row of C integers per box.
        item: (M,) number of each pixel's box.

    Returns:
        (C, M) int32, or (C, 1) where one box has all pixels.
    """
    values = torch.tensor(table, dtype=torch.int32, device=item.device)
    return values.T if len(table) == 1 else values[item].T


def _blend(canvas: Tensor, pixels: Tensor, colour: Tensor, cover: Tensor) -> None:
    """Mix colours into the canvas.

    Args:
        canvas: (N, 3, PIXELS) uint8, written to.
        pixels: (M,) positions of red values in the flat canvas.
        colour: (3, M) int32, 0 to 255.
        cover: (M,) int32, 0 to 256.
    """
    flat = canvas.view(-1)
    places = (pixels + torch.arange(3, device=canvas.device)[:, None] * PIXELS).view(-1)  # (3 * M,)
    below = flat.gather(0, places).int().view(3, -1)  # (3, M)
    mixed = below + ((colour - below) * cover >> 8)
    flat.scatter_(0, places, mixed.to(torch.uint8).view(-1))
