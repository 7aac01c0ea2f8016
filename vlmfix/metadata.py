"""Picture files without what only describes them, for when that is broken: the rest makes the same pixels.

Pillow reads some metadata as it opens a file, or even before it knows the format, and raises when they are broken. Each
function here copies what the pixels are made of, which may be broken too, and EXIF, which may say how to turn them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
WEBP_CHUNKS = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
WEBP_PROFILE, WEBP_EXIF, WEBP_XMP = 0x20, 0x08, 0x04
"""Bits of the first byte of VP8X that announce them."""
JPEG_APPLICATIONS = {0xE0: (b"JFIF\0", 14), 0xE1: (b"Exif\0\0", 8), 0xEE: (b"Adobe", 12)}
"""Markers of application data that stay, for colours and orientation; how they begin, and their least length."""
TIFF_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
    | {332, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532}
)
"""What libtiff and Pillow need of a file's first directory."""
TIFF_ORIENTATION = {"<": b"\x12\x01\x03\0\x01\0\0\0", ">": b"\x01\x12\0\x03\0\0\0\x01"}
"""How its entry begins, as one short number, by the order of bytes."""


def without_metadata(content: bytes, *, exif: bool) -> bytes | None:
    """A picture file without what only describes it; None for a format that has no such copy.

    Args:
        content: The file.
        exif: Whether EXIF stays, or in a TIFF the orientation, as far as it is whole.
    """
    for start, copied in _COPIES:
        if content.startswith(start):
            try:
                return copied(content, exif)
            except (struct.error, IndexError):  # cut off in the middle
                return None
    return None


def _png(content: bytes, exif: bool) -> bytes:
    parts, place = [content[:8]], 8
    while place + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        chunk = content[place : place + 12 + length]
        sound = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if chunk[4:8] in PNG_CHUNKS or (exif and sound and chunk[4:8] == b"eXIf"):
            parts.append(chunk)
        place += 12 + length
    return b"".join(parts)


def _jpeg(content: bytes, exif: bool) -> bytes:
    parts, place = [content[:2]], 2
    while content[place + 1] != 0xDA:  # the pixels begin
        marker, length = content[place + 1], struct.unpack_from(">H", content, place + 2)[0]
        segment = content[place : place + 2 + length]
        start, least = JPEG_APPLICATIONS.get(marker, (b"", 0))
        stays = segment[4:].startswith(start) and length >= least > 0 and (exif or marker != 0xE1)
        if stays or not (marker == 0xFE or 0xE0 <= marker <= 0xEF):
            parts.append(segment)
        place += 2 + length
    return b"".join([*parts, content[place:]])


def _webp(content: bytes, exif: bool) -> bytes:
    parts, place, announced = [b"WEBP"], 12, 0
    while place + 8 <= len(content):
        (length,) = struct.unpack_from("<I", content, place + 4)
        chunk = content[place : place + 8 + length + length % 2]
        sound = length > 0 and len(chunk) == 8 + length + length % 2
        if chunk[:4] in WEBP_CHUNKS or (exif and sound and chunk[:4] == b"EXIF"):
            parts.append(chunk)
        announced |= WEBP_EXIF if parts[-1].startswith(b"EXIF") else 0
        place += 8 + length + length % 2
    if parts[1].startswith(b"VP8X"):
        flags = parts[1][8] & ~(WEBP_PROFILE | WEBP_EXIF | WEBP_XMP) | announced
        parts[1] = parts[1][:8] + bytes([flags]) + parts[1][9:]
    body = b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(content: bytes, exif: bool) -> bytes:
    order = "<" if content[:2] == b"II" else ">"
    (place,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, place)
    entries = [content[place + 2 + 12 * number : place + 14 + 12 * number] for number in range(count)]
    kept = [
        entry
        for entry in entries
        if struct.unpack_from(f"{order}H", entry)[0] in TIFF_TAGS
        or (exif and entry.startswith(TIFF_ORIENTATION[order]))
    ]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:place] + directory + content[place + len(directory) :]


_COPIES: tuple[tuple[bytes, Callable[[bytes, bool], bytes]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"\xff\xd8\xff", _jpeg),
    (b"RIFF", _webp),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
)
