import hashlib
import io
import os
import struct
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlmfix import images
from vlmfix.errors import DataError
from vlmfix.images import begins_like_a_picture, find, open_picture, read_ahead


def save(path, size=(8, 6), colour="red", mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def names(folder, **options):
    return [file.name for file in find(folder, **options)]


def test_files_are_found_recursively_sorted_and_relative(tmp_path):
    for name in ("b.png", "a/z.png", "a/y/x.png", "c.txt", ".hidden.png", ".git/x.png", "answers/old.png"):
        save(tmp_path / name, format="PNG")
    assert names(tmp_path, skip=tmp_path / "answers") == ["a/y/x.png", "a/z.png", "b.png", "c.txt"]
    assert names(tmp_path / "b.png") == ["b.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    save(inside / "deep" / "a.png")
    save(outside / "b.png")
    (inside / "b.png").symlink_to(outside / "b.png")
    (inside / "folder").symlink_to(outside, target_is_directory=True)
    (inside / "deep" / "up").symlink_to(inside, target_is_directory=True)
    (inside / "gone.png").symlink_to(tmp_path / "nowhere")
    (inside / "self.png").symlink_to(inside / "self.png")
    found = {file.name: file.problem for file in find(inside)}
    assert [name for name, problem in found.items() if not problem] == ["b.png", "deep/a.png", "folder/b.png"]
    assert "link to a folder that it lies in" in found["deep/up"]
    assert "broken link" in found["gone.png"]
    assert "broken link" in found["self.png"]


def test_a_pipe_is_reported_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    ((_, picture),) = read_ahead(find(tmp_path))
    assert "device, socket or pipe" in str(picture)


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path):
    save(tmp_path / "odd.jpg" / "a.png")
    assert names(tmp_path) == ["odd.jpg/a.png"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        list(find(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("extension", ["", ".jpg", ".txt"])
def test_formats_are_told_by_content(tmp_path, kind, extension):
    path = save(tmp_path / f"a{extension}", format=kind)
    picture = open_picture(path)
    assert picture.image.mode == "RGB"
    assert picture.image.size == (8, 6)
    red, green, blue = picture.image.getpixel((3, 3))
    assert red > 240
    assert max(green, blue) < 15
    assert picture.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture = Image.new("RGB", (8, 6), "black")
    picture.putpixel((0, 0), (255, 255, 255))
    picture.save(tmp_path / "a.png", exif=exif)
    turned = open_picture(tmp_path / "a.png").image
    assert turned.size == (6, 8)
    assert turned.getpixel((5, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "options", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), {}, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), {}, (255, 0, 0)),
        ("LA", (0, 0), {}, (255, 255, 255)),
        ("L", 77, {}, (77, 77, 77)),
        ("1", 1, {}, (255, 255, 255)),
        ("I;16", 65535, {}, (255, 255, 255)),
        ("I;16", 32896, {}, (128, 128, 128)),
        ("RGB", (10, 20, 30), {"transparency": (10, 20, 30)}, (255, 255, 255)),
        ("P", 0, {"transparency": 0}, (255, 255, 255)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, colour, options, expected):
    path = save(tmp_path / "a.png", mode=mode, colour=colour, **options)
    assert open_picture(path).image.getpixel((2, 2)) == expected


def test_printing_colours_become_rgb(tmp_path):
    path = save(tmp_path / "a.jpg", mode="CMYK", colour=(0, 255, 255, 0), quality=100)
    red, green, blue = open_picture(path).image.getpixel((2, 2))
    assert red > 240
    assert max(green, blue) < 15


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.gif").image.getpixel((0, 0)) == (255, 0, 0)


def broken_files(folder):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    Image.fromarray(noise).save(folder / "whole.jpg")
    whole = (folder / "whole.png").read_bytes()
    photo = (folder / "whole.jpg").read_bytes()
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"not a picture at all", "not a picture"),
        "table.csv": (b"a,b\n1,2\n", "not a picture"),
        "cut.png": (whole[: len(whole) // 2], "cannot be read|broken picture"),
        "cut.jpg": (photo[: len(photo) // 2], "truncated"),
        "header.png": (whole[:20], "not a picture|broken picture|cannot be read"),
        "damaged.png": (whole[:200] + b"\x00" * 200 + whole[400:], "cannot be read|broken picture"),
    }


def test_broken_files_have_a_reason(tmp_path):
    for name, (content, reason) in broken_files(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=reason):
            open_picture(tmp_path / name)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", size=(40, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(DataError, match="too large"):
        open_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match="too large"):
        open_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert open_picture(path).image.size == (40, 30)


def test_a_tile_counts_like_a_picture(tmp_path, monkeypatch):
    pixels = zlib.compress(bytes(32 * 32))
    numbers = {256: 8, 257: 8, 322: 32, 323: 32, 324: 8, 325: len(pixels)}
    short = {258: 8, 259: 8, 262: 1, 277: 1}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers.items()]
    entries += [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in short.items()]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    start = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(entries))
    (tmp_path / "a").write_bytes(start + b"".join(entries) + bytes(4))
    assert open_picture(tmp_path / "a").image.size == (8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1023)
    with pytest.raises(DataError, match="too large: tiles of 32 x 32 pixels, at most 1023"):
        open_picture(tmp_path / "a")


def test_a_line_is_refused_before_it_is_decoded(tmp_path):
    assert open_picture(save(tmp_path / "a.png", size=(2, 400))).image.size == (2, 400)
    for size in ((2, 401), (401, 2)):
        with pytest.raises(DataError, match=f"too thin: {size[0]} x {size[1]} pixels"):
            open_picture(save(tmp_path / "b.png", size=size))


def tiff(values, bits, *, order="<", kind="H", white=1, sample=1):
    """A TIFF of one line of grey values, packed by a letter of ``struct``; a kind of bytes is the line itself."""
    data = kind if isinstance(kind, bytes) else struct.pack(f"{order}{len(values)}{kind}", *values)
    short = {258: bits, 259: 1, 262: white, 277: 1, 278: 1, 339: sample}
    tags = {256: len(values), 257: 1, 273: 8, 279: len(data)}
    entries = [(tag, 3, struct.pack(f"{order}HH", value, 0)) for tag, value in short.items()]
    entries += [(tag, 4, struct.pack(f"{order}I", value)) for tag, value in tags.items()]
    directory = b"".join(struct.pack(f"{order}HHI", tag, kind, 1) + value for tag, kind, value in sorted(entries))
    start = b"II*\0" if order == "<" else b"MM\0*"
    return (
        start
        + struct.pack(f"{order}I", 8 + len(data))
        + data
        + struct.pack(f"{order}H", len(entries))
        + directory
        + bytes(4)
    )


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(line, width, *, bits=8, colour=0, before=(), after=()):
    """A PNG of one line of packed samples, with further chunks before and after its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + line))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *before, pixels, *after, chunk(b"IEND", b"")])


def line_of(path, content):
    """The greys of the first line of a picture file."""
    path.write_bytes(content)
    image = open_picture(path).image
    return [image.getpixel((x, 0))[0] for x in range(image.width)]


SIXTEEN = (0, 257, 32896, 65535)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(SIXTEEN, 16), [0, 1, 128, 255]),
        (tiff(SIXTEEN, 16, order=">"), [0, 1, 128, 255]),
        (tiff(SIXTEEN, 16, white=0), [255, 254, 127, 0]),
        (tiff((0, 2048, 4095, 16), 12, kind=bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10])), [0, 127, 255, 0]),
        (tiff((0, 1, 128, 255), 8, kind="B"), [0, 1, 128, 255]),
        (tiff((0, 1, 128, 255), 8, kind="B", white=0), [255, 254, 127, 0]),
        (png(struct.pack(">4H", *SIXTEEN), 4, bits=16), [0, 1, 128, 255]),
        (png(struct.pack(">6H", *SIXTEEN[1:], *SIXTEEN[1:]), 2, bits=16, colour=2), [1, 1]),
        (png(struct.pack(">4H", 32896, 65535, 65535, 0), 2, bits=16, colour=4), [128, 255]),
        (png(bytes([0b00011011]), 4, bits=2), [0, 85, 170, 255]),
        (png(bytes([0b10100000]), 4, bits=1), [255, 0, 255, 0]),
    ],
    ids="tiff big-endian negative tiff-12 tiff-8 negative-8 png-16 png-rgb png-alpha png-2 png-1".split(),
)
def test_greys_of_any_depth_have_their_value(tmp_path, content, expected):
    assert line_of(tmp_path / "a", content) == expected


@pytest.mark.parametrize(
    ("bits", "line", "key", "expected"),
    [
        (1, bytes([0b10100000]), (0,), [255, 255, 255, 255]),
        (2, bytes([0b00011011]), (1,), [0, 255, 170, 255]),
        (4, bytes([0x03, 0x4F]), (3,), [0, 255, 68, 255]),
        (8, bytes([0, 3, 51, 255]), (51,), [0, 3, 255, 255]),
        (16, struct.pack(">4H", 0, 1000, 1001, 65535), (1000,), [0, 255, 3, 255]),
        (16, struct.pack(">6H", 0, 2000, 3000, 0, 2, 3), (0, 2000, 3000), [255, 0]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_a_transparent_colour_is_white_at_any_depth(tmp_path, bits, line, key, expected):
    mark = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    content = png(line, len(expected), bits=bits, colour=2 if len(key) == 3 else 0, before=[mark])
    assert line_of(tmp_path / "a", content) == expected


@pytest.mark.parametrize(
    "content",
    [
        tiff((0, 1, 128, 255), 32, kind="i", sample=2),
        tiff((0, 1, 128, 255), 32, kind="I"),
        tiff((0, 1, 128, 65535), 32, kind="I"),
        tiff((0, 1, 128, 255), 16, kind="h", sample=2),
        tiff((0, 1, 128, 255), 32, kind="f", sample=3),
    ],
    ids=["32-bit", "32-bit-unsigned", "32-bit-deep", "signed", "float"],
)
def test_pixels_without_a_known_range_are_refused(tmp_path, content):
    with pytest.raises(DataError, match="have no known range"):
        line_of(tmp_path / "a", content)


def turned(value, kind=3, count=1):
    """EXIF that says how a picture is turned, in whatever way."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x112, kind, count) + value.ljust(4, b"\0") + bytes(4)


BAD = chunk(b"tEXt", b"a\0b")[:-1] + b"\0"
BOMB = zlib.compress(bytes(3 << 20))
BROKEN_PNG = {
    "exif": [chunk(b"eXIf", b"nonsense" * 20)],
    "exif cut": [chunk(b"eXIf", turned(b"\6\0")[6:-9])],
    "exif beyond": [chunk(b"eXIf", turned(struct.pack("<I", 9999), 5)[6:])],
    "checksum": [BAD],
    "text bomb": [chunk(b"zTXt", b"a\0\0" + BOMB)],
    "international bomb": [chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)],
    "much text": [chunk(b"tEXt", b"a\0" + b"x" * (1 << 20))] * 65,
    "profile bomb": [chunk(b"iCCP", b"a\0\0" + BOMB)],
    "profile": [chunk(b"iCCP", b"a\0\0nonsense")],
    "no profile": [chunk(b"iCCP", b"")],
    "resolution": [chunk(b"pHYs", b"a")],
    "gamma": [chunk(b"gAMA", b"a")],
    "animation": [chunk(b"acTL", b"a")],
    "raw profile": [chunk(b"tEXt", b"Raw profile type exif\0nonsense")],
    "xmp": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<broken tiff:Orientation='")],
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", BROKEN_PNG)
def test_broken_metadata_of_a_png_say_nothing(tmp_path, name, place):
    content = png(bytes([0, 3, 51, 255]), 4, **{place: BROKEN_PNG[name]})
    assert line_of(tmp_path / "a", content) == [0, 3, 51, 255]


def test_a_png_that_ends_within_its_metadata_is_whole(tmp_path):
    whole = png(bytes([0, 3, 51, 255]), 4, after=[chunk(b"tEXt", b"a\0" + b"b" * 99)])
    start = whole.index(b"tEXt")
    for end in (start - 1, start + 4, start + 60, len(whole) - 12):
        assert line_of(tmp_path / "a", whole[:end]) == [0, 3, 51, 255]


def test_what_begins_like_a_picture_is_told_without_its_metadata(tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(png(bytes([0, 3, 51, 255]), 4, before=[BAD]))
    (tmp_path / "text").write_text("not a picture")
    whole = save(tmp_path / "whole.png", size=(40, 30)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    found = {path.name: begins_like_a_picture(path) for path in tmp_path.iterdir()}
    assert found == {"broken.png": True, "text": False, "whole.png": True, "cut.png": True}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert begins_like_a_picture(tmp_path / "whole.png"), "it is too large, not something else"


def jpeg(marker, data):
    """A red JPEG with one more segment in front."""
    file = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(file, "JPEG")
    whole = file.getvalue()
    return whole[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + whole[2:]


@pytest.mark.parametrize(
    ("marker", "data"),
    [
        (0xE1, b"Exif\0\0" + b"nonsense" * 4),
        (0xE1, turned(b"\6\0")[:-9]),
        (0xE1, turned(b"\0")),
        (0xE1, turned(b"\x09")),
        (0xE1, turned(b"\xff\xff")),
        (0xE1, turned(b"\6", kind=7)),
        (0xE1, turned(b"six\0", kind=2, count=4)),
        (0xE1, turned(b"\6", count=0xFFFFFFFF)),
        (0xE1, turned(struct.pack("<I", 9999), kind=5)),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='9'"),
        (0xE2, b"ICC_PROFILE\0\1"),
        (0xE2, b"ICC_PROFILE\0\1\7nonsense"),
        (0xE2, b"MPF\0nonsense"),
        (0xE0, b"JFIF\0"),
        (0xEE, b"Adobe\0"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\x09"),
        (0xFE, b""),
    ],
)
def test_broken_metadata_of_a_jpeg_say_nothing(tmp_path, marker, data):
    (tmp_path / "a").write_bytes(jpeg(marker, data))
    image = open_picture(tmp_path / "a").image
    assert image.size == (16, 8)
    assert image.getpixel((3, 3)) == (254, 0, 0)


def test_broken_metadata_leave_the_colours_of_printing_as_they_are(tmp_path):
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    whole = (tmp_path / "a.jpg").read_bytes()
    assert b"Adobe" in whole
    expected = open_picture(tmp_path / "a.jpg").image.getpixel((3, 3))
    (tmp_path / "b.jpg").write_bytes(whole[:2] + b"\xff\xe2\0\x0fICC_PROFILE\0\1" + whole[2:])
    assert open_picture(tmp_path / "b.jpg").image.getpixel((3, 3)) == expected


@pytest.mark.parametrize("lossless", [True, False])
def test_broken_metadata_of_a_webp_say_nothing(tmp_path, lossless):
    Image.new("RGB", (16, 8), "red").save(
        tmp_path / "a", "WEBP", lossless=lossless, exif=b"Exif\0\0nonsense", icc_profile=b"nonsense", xmp=b"<nonsense"
    )
    whole = (tmp_path / "a").read_bytes()
    place = whole.index(b"EXIF")
    for content in (
        whole,
        whole[:-4],
        whole[: place + 10],
        whole[: place + 4] + struct.pack("<I", 99999) + whole[place + 8 :],
        whole[: place + 4] + bytes(4) + whole[place + 8 :],
    ):
        (tmp_path / "a").write_bytes(content)
        red, green, blue = open_picture(tmp_path / "a").image.getpixel((3, 3))
        assert (red, max(green, blue) < 3) == (255, True)


@pytest.mark.parametrize(("place", "value"), [(8, 0x7FFFFFFF), (4, 0x7FFFFFFF), (2, 77), (2, 5)])
@pytest.mark.parametrize("tag", [270, 34675, 0x112])
def test_broken_metadata_of_a_tiff_say_nothing(tmp_path, tag, place, value):
    words = "a long description of the picture"
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a", "TIFF", tiffinfo={270: words, 0x112: 1}, icc_profile=b"x" * 9)
    content = bytearray((tmp_path / "a").read_bytes())
    entry = content.index(struct.pack("<H", tag), struct.unpack_from("<I", content, 4)[0] + 2)
    struct.pack_into("<H" if place == 2 else "<I", content, entry + place, value)
    (tmp_path / "a").write_bytes(content)
    image = open_picture(tmp_path / "a").image
    assert (image.size, image.getpixel((3, 3))) == ((16, 8), (255, 0, 0))


def test_broken_metadata_leave_a_whole_orientation_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        more = {"tiffinfo": {270: "a long description of the picture", 0x112: 6}} if kind == "TIFF" else {"exif": exif}
        Image.new("RGB", (16, 8), "red").save(tmp_path / "a", kind, **more)
        whole = (tmp_path / "a").read_bytes()
        if kind == "PNG":
            whole = whole[:33] + BAD + whole[33:]
        elif kind == "JPEG":
            whole = whole[:2] + b"\xff\xe2\0\x0fICC_PROFILE\0\1" + whole[2:]
        elif kind == "WEBP":
            whole += b"XMP \xff\xff\0\0nonsense"
            whole = whole[:4] + struct.pack("<I", len(whole)) + whole[8:]
        else:
            entry = whole.index(struct.pack("<HH", 270, 2))
            whole = whole[: entry + 8] + struct.pack("<I", 0x7FFFFFFF) + whole[entry + 12 :]
        (tmp_path / "a").write_bytes(whole)
        assert open_picture(tmp_path / "a").image.size == (8, 16), kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_the_same_in_every_format(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 8, 8))
    picture.save(tmp_path / "a", kind, exif=exif, **({"quality": 100} if kind in ("JPEG", "WEBP") else {}))
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a"))
    found = open_picture(tmp_path / "a").image
    assert found.size == expected.size == ((32, 16) if orientation < 5 else (16, 32))
    assert found.tobytes() == expected.tobytes()
    assert ImageOps.exif_transpose(found).tobytes() == found.tobytes(), "it is turned once"


@pytest.mark.parametrize("batch", [1, 20])
def test_reading_ahead_keeps_order_and_stays_bounded(tmp_path, monkeypatch, batch):
    files = [images.Found(str(number), save(tmp_path / f"{number}.png")) for number in range(40)]
    taken, opened, most = [], [], 0
    lock = threading.Lock()

    def counted(path):
        with lock:
            opened.append(path)
        return open_picture(path)

    monkeypatch.setattr(images, "open_picture", counted)
    for file, picture in read_ahead(files, batch=batch):
        taken.append(file.name)
        assert picture.image.size == (8, 6)
        time.sleep(0.01)
        most = max(most, len(opened) - len(taken))
    assert taken == [str(number) for number in range(40)]
    assert max(images.AHEAD, batch) - 3 <= most <= max(images.AHEAD, batch)


def test_reading_ahead_ends_when_the_caller_does(tmp_path):
    files = [images.Found(str(number), save(tmp_path / f"{number}.png")) for number in range(20)]
    reading = read_ahead(files)
    next(reading)
    reading.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfix-pictures")]


def test_a_damaged_length_asks_for_no_more_than_the_file_has(tmp_path):
    path = save(tmp_path / "a.png")
    content = path.read_bytes()
    place = content.index(b"IDAT") - 4
    path.write_bytes(content[:place] + b"\x70\0\0\0" + content[place + 4 :])
    tracemalloc.start()
    try:
        with suppress(DataError):
            open_picture(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
