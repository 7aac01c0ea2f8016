"""Small whole pictures of every format, made on the spot."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image, PngImagePlugin

READ = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
SIZE, LARGER = (19, 13), (40, 30)
SIDEWAYS = {"PNG told", *(f"JPEG turned {number}" for number in (5, 6, 7, 8))}
"""Pictures that EXIF turns by a quarter, beside those of TIFF in every mode."""
TIFF_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F")


def _drawn(mode: str, size=SIZE, seed=0) -> Image.Image:
    """Half a slope of colours, half noise, so that no two rows and columns are alike."""
    width, height = size
    slope = np.add.outer(np.arange(height) * 9, np.arange(width) * 7)[..., None] + np.array([0, 60, 120])
    noise = np.random.default_rng(seed).integers(0, 256, slope.shape)
    colours = np.where(np.arange(width)[None, :, None] < width // 2, slope, noise).astype(np.uint8)
    image = Image.fromarray(colours)
    if mode in ("RGBA", "LA", "PA"):
        image.putalpha(Image.fromarray(noise[..., 0].astype(np.uint8)))
        return image if mode == "RGBA" else image.convert("LA")
    if mode == "I;16":
        return Image.fromarray((colours[..., 0].astype(np.uint16) << 8) + 7)
    if mode == "I":
        return Image.fromarray(colours[..., 0].astype(np.int32))
    return image.convert(mode)


def _saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _frames(format: str, **options) -> bytes:
    first, *rest = (_drawn("RGB", seed=number) for number in range(3))  # saving leaves its marks on a picture
    return _saved(first, format, save_all=True, append_images=rest, **options)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _interlaced() -> bytes:
    """An Adam7 PNG, which Pillow reads but does not write."""
    pixels = np.asarray(_drawn("RGB"))
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if row.size]
    header = struct.pack(">IIBBBBB", *SIZE, 8, 2, 0, 0, 1)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"".join(rows))) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    exif[0x010E] = "a description"
    return exif


@cache
def corpus() -> dict[str, bytes]:
    """Whole files by name; the name begins with the format."""
    told = PngImagePlugin.PngInfo()
    told.add_text("Title", "a title", zip=True)
    told.add_itxt("Note", "a note")
    files = {"PNG interlaced": _interlaced()}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        files[f"PNG {mode}"] = _saved(_drawn(mode), "PNG")
    for bits in (1, 2, 4):
        files[f"PNG {bits} bits"] = _saved(_drawn("P").quantize(1 << bits), "PNG", bits=bits)
    files["PNG transparent"] = _saved(_drawn("P"), "PNG", transparency=bytes(range(200)))
    files["PNG key"] = _saved(_drawn("RGB"), "PNG", transparency=(0, 60, 120))
    files["PNG told"] = _saved(_drawn("RGB"), "PNG", pnginfo=told, exif=_oriented(6), icc_profile=b"profile" * 9)
    files["PNG animated"] = _frames("PNG", duration=40)
    for mode in ("L", "RGB", "CMYK"):
        files[f"JPEG {mode}"] = _saved(_drawn(mode), "JPEG")
    files["JPEG progressive"] = _saved(_drawn("RGB", LARGER), "JPEG", progressive=True, quality=95)
    files["JPEG restarts"] = _saved(_drawn("RGB", LARGER), "JPEG", restart_marker_blocks=2)
    for number in range(1, 9):
        files[f"JPEG turned {number}"] = _saved(_drawn("RGB"), "JPEG", exif=_oriented(number), comment=b"a comment")
    files["JPEG several"] = _frames("MPO")
    files["WEBP lossy"] = _saved(_drawn("RGB"), "WEBP", exif=_oriented(3))
    files["WEBP lossless"] = _saved(_drawn("RGBA"), "WEBP", lossless=True)
    files["WEBP animated"] = _frames("WEBP")
    for mode in ("1", "L", "P", "RGB"):
        files[f"GIF {mode}"] = _saved(_drawn(mode), "GIF")
    files["GIF transparent"] = _saved(_drawn("P"), "GIF", transparency=3, interlace=False)
    files["GIF animated"] = _frames("GIF", disposal=2)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        files[f"BMP {mode}"] = _saved(_drawn(mode), "BMP")
    for mode in TIFF_MODES:
        files[f"TIFF {mode}"] = _saved(_drawn(mode), "TIFF", exif=_oriented(5))
    for how in ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"TIFF {how}"] = _saved(_drawn("RGB"), "TIFF", compression=how)
    for how in ("group3", "group4", "tiff_ccitt"):
        files[f"TIFF {how}"] = _saved(_drawn("1"), "TIFF", compression=how)
    files["TIFF deep"] = _saved(_drawn("I;16"), "TIFF", compression="tiff_lzw")
    files["TIFF pages"] = _frames("TIFF")
    files["TIFF big"] = _saved(_drawn("RGB"), "TIFF", big_tiff=True)
    for format in ("PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "AVIF", "DDS"):
        files[f"{format} RGB"] = _saved(_drawn("RGB"), format)
    files["PPM grey"] = _saved(_drawn("L"), "PPM")
    files["PPM bits"] = _saved(_drawn("1"), "PPM")
    return files


def size_of(name: str) -> tuple[int, int]:
    """Width and height of a picture as it is to be seen."""
    size = LARGER if name in ("JPEG progressive", "JPEG restarts") else SIZE
    turned = name in SIDEWAYS or name in {f"TIFF {mode}" for mode in TIFF_MODES}
    return size[::-1] if turned else size
