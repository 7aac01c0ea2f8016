"""Maps and refined pictures that a run saves."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from tests.contracts.support import vlm_of
from tests.jobs.fake import FakeVLM, draw
from tests.jobs.folder.test_job import never_loaded
from vlmfix.decoders.picture.refined import Look, PictureMap, Refined
from vlmfix.errors import DataError, UsageError
from vlmfix.jobs.folder import Questions, run
from vlmfix.jobs.folder.maps import MapFolder, overlay
from vlmfix.records import read_lines
from vlmfix.settings import Settings


def go(pictures, out, maps, *, decoder="vicrop:base=4", loader=lambda *_, **__: vlm_of("llava"), **more):
    settings = Settings(decoder=decoder, max_new_tokens=2)
    return run(
        pictures, out, questions=Questions.text("What?"), settings=settings, save_maps=maps, loader=loader, **more
    )


def refined(picture, values, box=(0.25, 0.5, 0.75, 1.0)):
    look = Look(picture=picture.crop((0, 0, 3, 2)), box=box, map=PictureMap(values))
    return Refined((picture, look.picture), (look,))


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_a_run_saves_what_each_question_showed(tmp_path):
    pictures, maps = draw(tmp_path / "in" / "sub", 2).parent, tmp_path / "maps"
    end = go(pictures, tmp_path / "out", maps)
    assert end.totals.answers == 2
    records = list(read_lines(maps / "maps.jsonl"))
    key = hashlib.sha256(b"What?").hexdigest()[:8]
    assert [record["image"] for record in records] == ["sub/0000.png", "sub/0001.png"]
    for record in records:
        assert record["shown"] == f"{record['image']}.{key}.png"
        assert size_of(maps / record["shown"]) == (4, 4)
        assert size_of(maps / f"{record['image']}.{key}.map.png") == (8, 8)
        assert np.load(maps / record["map"]).shape == (5, 5)
        assert len(record["box"]) == len(record["map_box"]) == 4
    assert go(pictures, tmp_path / "out", maps, loader=never_loaded).totals.answers == 2


def test_a_decoder_that_makes_no_maps_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UsageError, match="vcd makes no maps"):
        go(draw(tmp_path / "in", 1), tmp_path / "out", tmp_path / "maps", decoder="vcd", loader=never_loaded)


def test_maps_do_not_go_among_the_pictures(tmp_path):
    pictures = draw(tmp_path / "in", 1)
    with pytest.raises(UsageError, match="read as pictures"):
        go(pictures, tmp_path / "out", pictures / "maps", loader=never_loaded)


def test_answers_without_maps_are_written_all_the_same(tmp_path):
    end = go(draw(tmp_path / "in", 3), tmp_path / "out", tmp_path / "maps", loader=FakeVLM().load)
    assert end.totals.answers == 3
    assert list(read_lines(tmp_path / "maps" / "maps.jsonl")) == []


def test_the_overlay_is_bright_where_the_map_is_high_and_boxed():
    picture = Image.new("RGB", (40, 20), (128, 128, 128))
    values = np.zeros((2, 4))
    values[0, 3] = 1
    drawn = np.asarray(overlay(picture, refined(picture, values).looks[0])).astype(int)
    assert drawn.shape == (20, 40, 3)
    assert drawn[3, 37].sum() > drawn[3, 2].sum()
    assert drawn[10, 10].tolist() == drawn[19, 29].tolist() == [255, 255, 255]
    flat = overlay(picture, Look(picture=picture, box=(0, 0, 1, 1), map=None))
    assert flat.getpixel((20, 10)) == (128, 128, 128)


def test_a_problem_is_noted(tmp_path):
    picture = Image.new("RGB", (8, 8))
    look = Look(picture=picture, box=(0, 0, 1, 1), map=None, problem="the map is flat")
    with MapFolder(tmp_path / "maps", {}) as folder:
        folder.save("a.png", picture, "What?", Refined((picture,), (look,)))
    (record,) = read_lines(tmp_path / "maps" / "maps.jsonl")
    assert record["problem"] == "the map is flat"
    assert "map" not in record


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "maps").write_text("a file")
    with pytest.raises(DataError, match="cannot make the folder"), MapFolder(tmp_path / "maps", {}):
        pass
    picture = Image.new("RGB", (8, 8))
    with MapFolder(tmp_path / "more", {}) as folder:
        (tmp_path / "more" / "sub").write_text("a file")
        with pytest.raises(DataError, match="cannot make the folder"):
            folder.save("sub/a.png", picture, "What?", refined(picture, np.ones((2, 2))))


def test_a_long_name_is_shortened_and_told_from_others(tmp_path):
    pictures, maps = tmp_path / "in", tmp_path / "maps"
    names = ["n" * 246 + ".png", "n" * 247 + ".png", "\u00e9" * 125 + ".png", "caf\udce9.png", "a\nb.png"]
    for name in names:
        draw(pictures, 1)
        (pictures / "0000.png").rename(pictures / name)
    deep = pictures.joinpath(*["d" * 250] * 3)
    draw(deep, 1)
    for _ in range(2):
        end = go(pictures, tmp_path / "out", maps)
    assert end.totals.answers == len(names) + 1
    records = list(read_lines(maps / "maps.jsonl"))
    assert {record["image"] for record in records} == {*names, "/".join([*["d" * 250] * 3, "0000.png"])}
    shown = {record["shown"] for record in records}
    assert len(shown) == len(records)
    assert all(size_of(maps / name) == (4, 4) for name in shown)
    assert all((maps / record["map"]).is_file() for record in records)


def test_a_path_that_is_too_long_becomes_one_name(tmp_path):
    picture, image = Image.new("RGB", (8, 8)), "/".join(["d" * 200] * 20 + ["a.png"])
    with MapFolder(tmp_path / "maps", {}) as folder:
        folder.save(image, picture, "What \udce9?", refined(picture, np.ones((2, 2))))
    (record,) = read_lines(tmp_path / "maps" / "maps.jsonl")
    assert "/" not in record["shown"]
    assert (tmp_path / "maps" / record["shown"]).is_file()


def test_maps_of_another_run_are_not_touched(tmp_path):
    pictures, maps = draw(tmp_path / "in", 1), tmp_path / "maps"
    go(pictures, tmp_path / "out", maps)
    before = {path: path.read_bytes() for path in maps.iterdir()}
    with pytest.raises(UsageError, match="holds maps made with other settings: decoder was 'vicrop:") as refused:
        go(pictures, tmp_path / "other", maps, decoder="vicrop:base=8", loader=never_loaded)
    assert refused.value.hint == f"choose another --save-maps, or the settings in {maps / 'maps.json'}"
    assert {path: path.read_bytes() for path in maps.iterdir()} == before
    for text in ("notes", '{"my": "own"}\n'):
        (tmp_path / "maps2").mkdir(exist_ok=True)
        (tmp_path / "maps2" / "maps.jsonl").write_text(text)
        with pytest.raises(UsageError, match=r"no maps\.json"):
            go(pictures, tmp_path / "more", tmp_path / "maps2", loader=never_loaded)
        assert (tmp_path / "maps2" / "maps.jsonl").read_text() == text


def test_maps_are_not_written_through_links(tmp_path):
    pictures, maps, elsewhere = draw(tmp_path / "in" / "sub", 1).parent, tmp_path / "maps", tmp_path / "elsewhere"
    elsewhere.mkdir()
    maps.mkdir()
    (maps / "sub").symlink_to(elsewhere)
    with pytest.raises(DataError, match="by a link"):
        go(pictures, tmp_path / "out", maps)
    assert list(elsewhere.iterdir()) == []
    (maps / "sub").unlink()
    (maps / "sub").mkdir()
    key = hashlib.sha256(b"What?").hexdigest()[:8]
    (elsewhere / "mine").write_text("precious")
    (maps / "sub" / f"0000.png.{key}.png").symlink_to(elsewhere / "mine")
    go(pictures, tmp_path / "out", maps)
    assert (elsewhere / "mine").read_text() == "precious"
    assert size_of(maps / "sub" / f"0000.png.{key}.png") == (4, 4)


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    picture = Image.new("RGB", (8, 8))
    with MapFolder(tmp_path / "maps", {}) as folder:
        monkeypatch.setattr(np, "save", full)
        with pytest.raises(DataError, match=r"cannot write .*map\.npy: No space left.*free some space"):
            folder.save("a.png", picture, "What?", refined(picture, np.ones((2, 2))))
    assert not [path for path in (tmp_path / "maps").iterdir() if path.name.startswith(".")]
