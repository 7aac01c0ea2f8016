import hashlib
import os
import threading

import numpy as np
import pytest
from PIL import Image

from vlmfix import images
from vlmfix.errors import DataError
from vlmfix.images import find, open_picture, read_ahead


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


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="floating-point"):
        open_picture(tmp_path / "a.tiff")
    Image.new("I", (4, 4), 70000).save(tmp_path / "b.tiff")
    with pytest.raises(DataError, match="grey values"):
        open_picture(tmp_path / "b.tiff")


def test_reading_ahead_keeps_order_and_stays_bounded(tmp_path, monkeypatch):
    files = [images.Found(str(number), save(tmp_path / f"{number}.png")) for number in range(40)]
    taken, opened = [], []
    lock = threading.Lock()

    def counted(path):
        with lock:
            opened.append(path)
        return open_picture(path)

    monkeypatch.setattr(images, "open_picture", counted)
    for file, picture in read_ahead(files):
        taken.append(file.name)
        assert picture.image.size == (8, 6)
        assert len(opened) - len(taken) <= images.AHEAD
    assert taken == [str(number) for number in range(40)]


def test_reading_ahead_ends_when_the_caller_does(tmp_path):
    files = [images.Found(str(number), save(tmp_path / f"{number}.png")) for number in range(20)]
    reading = read_ahead(files)
    next(reading)
    reading.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfix-pictures")]
