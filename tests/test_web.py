"""Pictures that a URL stands for: of this machine, in the URL, and in a web that is a server on 127.0.0.1."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.jobs.fake import FakeVLM, draw
from tests.jobs.folder.asked import answers, failures
from tests.loopback import drips, web
from tests.tiny import tiny_vlm
from vlmfix import images
from vlmfix import web as fetching
from vlmfix.asked import pictures_of
from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.images import Found, digest_of, open_found, picture_at, picture_of, read_ahead
from vlmfix.jobs.folder import Questions, run
from vlmfix.models.conversation import conversation, turns_of
from vlmfix.models.layout import Turn
from vlmfix.settings import Settings
from vlmfix.sources import source_of


def png(colour="red"):
    content = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(content, "PNG")
    return content.getvalue()


def bearing(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture
def quick(monkeypatch):
    """Attempts without pauses between them."""
    monkeypatch.setattr(images, "PAUSES", (0.0, 0.0, 0.0))


def test_every_kind_of_address(tmp_path):
    (tmp_path / "a b.png").write_bytes(png())
    with web({"/%C3%A9.png?x=1": png()}) as server:
        for address in (
            server.url("/é.png?x=1"),
            f"file://{tmp_path}/a%20b.png",
            f"file://localhost{tmp_path}/a%20b.png",
            str(tmp_path / "a b.png"),
            tmp_path / "a b.png",
            bearing(png()),
        ):
            assert picture_at(address).image.getpixel((0, 0)) == (255, 0, 0)
    assert picture_at("a b.png", folder=tmp_path).image.size == (8, 6)


@pytest.mark.parametrize(
    ("page", "kind", "message"),
    [
        ((404, {}, b""), DataError, "the server answers 404"),
        ((503, {}, b""), PassingError, "the server answers 503"),
        ((429, {}, b""), PassingError, "the server answers 429"),
        (b"<html>", DataError, "not a picture"),
        ((200, {"Content-Length": "100000000"}, b"x"), DataError, "larger than 64 MiB"),
        ((200, {"Content-Length": "5000"}, b"x"), PassingError, "ended before the picture did"),
        ((302, {"Location": "file:///etc/passwd"}, b""), DataError, "the server answers 302"),
        ((302, {"Location": "ftp://127.0.0.1/a"}, b""), PassingError, "unknown url type: ftp"),
        ((302, {"Location": "/page"}, b""), DataError, "the server answers 302"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(page, kind, message):
    with web({"/page": page}) as server, pytest.raises(kind, match=message):
        picture_at(server.url("/page"))


def test_a_redirection_is_followed():
    with web({"/a": (302, {"Location": "/b"}, b""), "/b": png()}) as server:
        assert picture_at(server.url("/a")).image.size == (8, 6)


def test_no_reply_takes_more_than_its_time_or_size(monkeypatch):
    monkeypatch.setattr(fetching, "LONGEST", 0.2)
    with web({"/slow": drips}) as server:
        with pytest.raises(PassingError, match="takes more than"):
            picture_at(server.url("/slow"))
        monkeypatch.setattr(fetching, "LONGEST", 60)
        monkeypatch.setattr(fetching, "LARGEST", 5000)
        with pytest.raises(DataError, match="larger than"):
            picture_at(server.url("/slow"))
    with pytest.raises(PassingError, match="cannot be reached"):
        picture_at(server.url("/gone"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://me:secret@127.0.0.1/a.png", "a name and a password"),
        ("http://", "without a host"),
        ("http://[1/a.png", "no address"),
        ("http://127.0.0.1:99999999/a.png", "no address|cannot be reached"),
        ("file://elsewhere/a.png", "a file of another machine, elsewhere"),
        ("data:text/html;base64,AAAA", "the data URL begins with"),
        ("data:image/png;base64,?", "not base64"),
        ("ftp://127.0.0.1/a.png", "No such file"),
    ],
)
def test_what_is_no_address_of_a_picture(address, message):
    with pytest.raises((DataError, PassingError), match=message) as caught:
        picture_at(address)
    assert "secret" not in str(caught.value)


def test_trouble_is_tried_again_and_then_the_pictures_own_fault(quick):
    trouble = []

    def shaky(handler):
        trouble.append(handler)
        content = png() if len(trouble) > 2 else b""
        handler.send_response(200 if content else 500)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    with web({"/shaky": shaky, "/ill": (500, {}, b"")}) as server:
        files = [Found(path, None, url=server.url(path)) for path in ("/shaky", "/ill")]
        (_, good), (_, bad) = read_ahead(files)
        assert good.image.size == (8, 6)
        assert digest_of(files[0]) == good.sha256
        assert (type(bad), str(bad)) == (DataError, "the server answers 500, in 3 attempts")
        assert digest_of(files[1]) is None


def test_a_run_over_addresses_and_what_comes_of_them(tmp_path, quick):
    pages = {"/0.png": png("red"), "/1.png": png("blue"), "/page.png": b"<html>"}
    with web(pages) as server:
        lines = [server.url(path) for path in ("/0.png", "/gone.png", "/page.png", "/1.png", "/x.tar")]
        draw(tmp_path, 1)
        (tmp_path / "list.txt").write_text("\n".join([*lines, f"file://{tmp_path}/0000.png", "file://far/a.png"]))
        out, vlm = tmp_path / "out", FakeVLM()
        call = {"questions": Questions.text("What?"), "settings": Settings(), "batch_size": 2, "loader": vlm.load}
        end = run(tmp_path / "list.txt", out, **call)
        assert [line["image"] for line in answers(out)] == [lines[0], lines[3], f"file://{tmp_path}/0000.png"]
        assert answers(out)[1]["answer"] == "What?: (0, 0, 255)"
        assert {line["image"]: line["reason"] for line in failures(out)} == {
            lines[1]: "the server answers 404 (see whether the address opens in a browser)",
            lines[2]: "not a picture (JPEG, PNG, WEBP, TIFF, BMP, GIF are read)",
            lines[4]: "a tar file in the web; download it",
            "file://far/a.png": "a file of another machine, far",
        }
        assert (end.total, end.totals.answers, end.totals.failed) == (7, 3, 4)
        asked = len(server.asked)
        assert run(tmp_path / "list.txt", out, **call).answered == 0
        assert len(server.asked) == asked  # what is done is not fetched again
        (tmp_path / "list.csv").write_text(f"url,prompt\n{lines[0]},What colour?\n")
        (found,) = source_of(tmp_path / "list.csv", column="url")
        assert (found.url, found.prompts) == (lines[0], ("What colour?",))


def test_a_page_shows_pictures_of_the_web_that_are_still_the_same(tmp_path, vlmfix):
    pages = {"/0.png": png("red"), "/1.png": png("blue")}
    with web(pages) as server:
        (tmp_path / "list.txt").write_text("\n".join(server.url(path) for path in pages))
        call = {"questions": Questions.text("What?"), "settings": Settings(), "batch_size": 2}
        run(tmp_path / "list.txt", tmp_path / "out", loader=FakeVLM().load, **call)
        pages["/1.png"] = png("green")
        assert vlmfix("view", tmp_path / "out")[0] == 0
        page = (tmp_path / "out" / "view.html").read_text()
        assert page.count("data:image/jpeg") == 1
        assert "The file was changed since" in page


def test_python_takes_paths_addresses_and_arrays(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    turned = Image.new("RGB", (8, 6), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    path, array = tmp_path / "a.png", np.full((6, 8, 3), (255, 0, 0), np.uint8)
    rows = pictures_of(
        [path, str(path), f"file://{path}", bearing(png()), [array, array[..., 0]], tmp_path / "turned.jpg"]
    )
    assert [one.size for row in rows for one in row] == [(8, 6)] * 6 + [(6, 8)]
    assert {row[0].getpixel((0, 0)) for row in rows[:5]} == {(255, 0, 0)}
    assert rows[4][1].getpixel((0, 0)) == (255, 255, 255)
    assert rows[0][0] is rows[1][0]  # one place is one picture
    vlm = tiny_vlm("llava")
    from vlmfix import wrap

    vlm = wrap(vlm.model, vlm.processor)
    said = vlm.generate([Image.open(path), path, array], "what?", max_new_tokens=3)
    assert len({answer.ids for answer in said}) == 1
    assert "".join(vlm.stream(path, "what?", max_new_tokens=3)) == said[0].text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone.png", r"pictures\[0\], 'gone.png': cannot be read: No such file"),
        (np.zeros((6, 8, 3)), r"pictures\[0\] is an array of float64 and shape \(6, 8, 3\)"),
        (np.zeros((3, 6, 8), np.uint8), r"shape \(3, 6, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.zeros((2, 6, 8, 3), np.uint8), r"shape \(2, 6, 8, 3\)"),
    ],
)
def test_what_python_does_not_take(given, message):
    with pytest.raises(DataError, match=message):
        pictures_of([given])


VIDEOS = {
    "mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2",
    "mov": b"\0\0\0\x14ftypqt  \0\0\0\0qt  ",
    "old mov": b"\0\0\0\x08wide\0\0\0\0mdat",
    "avi": b"RIFF\0\0\0\0AVI LIST",
    "webm": b"\x1a\x45\xdf\xa3" + bytes(20),
    "mpeg": b"\0\0\1\xba" + bytes(20),
}


OTHERS = {
    "pdf": (b"%PDF-1.7\n" + bytes(20), "a PDF document, .*pdftoppm"),
    "zip": (b"PK\3\4" + bytes(20), "an archive, .*: unpack it"),
    "tgz": (b"\x1f\x8b\x08" + bytes(20), "an archive, .*: unpack it"),
    "mp3": (b"ID3\4" + bytes(20), "sound, and only pictures are read"),
    "wav": (b"RIFF\0\0\0\0WAVEfmt ", "sound, and only pictures are read"),
    "m4a": (b"\0\0\0\x20ftypM4A \0\0\2\0", "sound, and only pictures are read"),
    "avi": (VIDEOS["avi"], "a video, .*ffmpeg"),
    "MP4": (VIDEOS["mp4"], "a video, .*ffmpeg"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC and AVIF are not read"),
}


@pytest.mark.parametrize("ending", OTHERS)
def test_what_is_no_picture_is_called_by_its_kind_whether_it_is_there_or_not(tmp_path, ending, vlmfix):
    content, said = OTHERS[ending]
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=f"^{said}"):
        picture_at(tmp_path / "a.jpg")
    missing = tmp_path / f"clip.{ending}"
    for place in (missing, missing.as_uri()):
        with pytest.raises(DataError, match=f"^{said}"):
            picture_at(place)
    with web({f"/clip.{ending}?size=large": png(), f"/a.png?of=clip.{ending}": png()}) as server:
        with pytest.raises(DataError, match=f"^{said}"):
            picture_at(server.url(f"/clip.{ending}?size=large"))
        assert picture_at(server.url(f"/a.png?of=clip.{ending}")).image.size == picture_of(png()).size
    missing.write_bytes(png())
    assert picture_at(missing).image.size == picture_of(png()).size, "what is there is told by its content"
    missing.unlink()
    (tmp_path / "list.txt").write_text(f"{missing.name}\n")
    (found,) = source_of(tmp_path / "list.txt")
    with pytest.raises(DataError, match=f"^{said}"):
        open_found(found)
    for command in (("ask", missing, "What?"), ("run", missing, "--out", tmp_path / "out")):
        code, _, told = vlmfix(*command, "--model", "tiny")
        assert code != 0
        assert re.search(rf"clip\.{ending}: {said}", told)
        assert "there is no" not in told


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_refused_with_a_reason(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(VIDEOS[name])
    with pytest.raises(DataError, match=r"^a video, and only still pictures are read: .*ffmpeg"):
        picture_at(tmp_path / "a.jpg")


def test_pictures_in_a_videos_boxes_are_called_by_their_name(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(DataError, match="HEIC and AVIF are not read"):
        picture_at(tmp_path / "a.heic")


def test_a_conversation_is_read_with_its_pictures(tmp_path):
    draw(tmp_path, 2)
    parts = [
        {"type": "image", "path": "0000.png"},
        {"type": "image_url", "image_url": {"url": bearing(png())}},
        {"type": "text", "text": "What are these?"},
        {"type": "text", "text": "And why?"},
    ]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A dog and a cat."},
    ]
    for document in (messages, {"messages": messages}):
        (tmp_path / "talk.json").write_text(json.dumps(document))
        turns, pictures = conversation(tmp_path / "talk.json")
        assert turns == (
            Turn("system", "Be brief."),
            Turn("user", "What are these?\nAnd why?", 2),
            Turn("assistant", "A dog and a cat."),
        )
        assert [picture.getpixel((0, 0)) for picture in pictures] == [(0, 0, 0), (255, 0, 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "talk.json"),
        ("[", "talk.json"),
        ("[] []", "behind its JSON"),
        ("3", "messages are 3"),
        ("[3]", "message 1 has the role None"),
        ('[{"role": "tool", "content": ""}]', "message 1 has the role"),
        ('[{"role": "user"}]', "the content of message 1 is None"),
        ('[{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]', "no text and no picture"),
        ('[{"role": "user", "content": [{"type": "text", "text": 3}]}]', "no text and no picture"),
        ('[{"role": "user", "content": [{"type": "image", "path": "gone.png"}]}]', "gone.png.*No such file"),
    ],
)
def test_what_is_no_conversation(tmp_path, text, message):
    (tmp_path / "talk.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        conversation(tmp_path / "talk.json")
    assert "talk.json" in str(caught.value)
    with pytest.raises(UsageError, match="cannot read"):
        conversation(tmp_path / "none.json")


def test_text_between_pictures_is_not_moved(tmp_path):
    image, text = {"type": "image", "path": draw(tmp_path, 1) / "0000.png"}, {"type": "text", "text": "and"}
    image["path"] = str(image["path"])
    with pytest.raises(DataError, match="text between its pictures"):
        turns_of([{"role": "user", "content": [image, text, image]}], tmp_path)
    assert turns_of([{"role": "user", "content": [text, image]}], tmp_path)[0][0].pictures == 1


def test_ask_takes_several_pictures_addresses_and_what_was_said(tmp_path, model, vlmfix):
    draw(tmp_path, 2)
    call = ("--model", model, "--max-new-tokens", 6, "--decoder", "greedy")
    talk = [
        {"role": "user", "content": [{"type": "image", "path": "0000.png"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "A dog."},
    ]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    with web({"/a.png": (tmp_path / "0001.png").read_bytes()}) as server:
        (code, first, _), (_, second, _), (_, third, _), (_, fourth, _) = (
            vlmfix("ask", *shown, "What?", *call)
            for shown in (
                (server.url("/a.png"),),
                (tmp_path / "0001.png",),
                (tmp_path / "0000.png", tmp_path / "0001.png"),
                ("--earlier", tmp_path / "talk.json", server.url("/a.png")),
            )
        )
    assert (code, first) == (0, second)
    assert len({second, third, fourth}) == 3
    code, _, told = vlmfix("ask", "What?", tmp_path / "0000.png", *call)
    assert (code, "there is no file What?" in told, "the question comes last" in told) == (2, True, True)
    assert vlmfix("ask", "What?", *call)[0] == 2
    shutil.copy(tmp_path / "talk.json", tmp_path / "0002.json")
    (tmp_path / "0002.json").write_text(json.dumps(talk[:1]))
    code, _, told = vlmfix("ask", "--earlier", tmp_path / "0002.json", tmp_path / "0000.png", "What?", *call)
    assert (code, "the question comes last" in told) == (1, True)
