"""COCO files in every order and in every broken shape, and the index that stands for them."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks import coco
from vlmfix.evals.benchmarks.coco import picture_objects, read_annotations, read_index
from vlmfix.world.coco import make

IMAGES = [
    {"id": 9, "file_name": "nine.jpg", "height": 4},
    {"id": 4, "file_name": "four.jpg"},
    {"id": 7, "file_name": "s.jpg"},
]
CATEGORIES = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 18, "name": "dog"}]
OBJECTS = [
    {"image_id": 4, "category_id": 18, "id": 1, "bbox": [0.5, 1e2, 3, 4], "segmentation": [[1.5, 2], [3, 4]]},
    {"image_id": 9, "category_id": 1, "id": 2, "iscrowd": 1, "segmentation": {"counts": [3, 4], "size": [2, 2]}},
    {"image_id": 4, "category_id": 1, "id": 3},
    {"image_id": 4, "category_id": 18, "id": 4},
]
CAPTIONS = [{"image_id": number, "id": n, "caption": f"Text {n} é."} for n, number in enumerate([4, 9, 4, 7])]
INSTANCES = {"info": {}, "images": IMAGES, "licenses": [], "annotations": OBJECTS, "categories": CATEGORIES}
TOLD = {"info": {}, "annotations": CAPTIONS, "images": IMAGES}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlmfix" / "coco"


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "instances.json", INSTANCES), write(tmp_path / "captions.json", TOLD)


@pytest.mark.parametrize("keys", [list(INSTANCES), list(reversed(INSTANCES)), sorted(INSTANCES)])
def test_objects_in_the_order_of_the_annotations(tmp_path: Path, keys: list[str]) -> None:
    path = write(tmp_path / "i.json", {key: INSTANCES[key] for key in keys})
    expected = [("nine.jpg", ["person"]), ("four.jpg", ["dog", "person"]), ("s.jpg", [])]
    assert list(picture_objects(path)) == expected
    assert list(picture_objects(path)) == expected  # from the index


def test_pictures_with_their_captions(pair: tuple[Path, Path]) -> None:
    found = read_annotations(*pair)
    assert list(found.pictures) == [9, 4, 7]
    four = found.pictures[4]
    assert (four.id, four.file, four.objects, four.captions) == (
        4,
        "four.jpg",
        ("dog", "person"),
        ("Text 0 é.", "Text 2 é."),
    )
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pair]
    assert found.sources == {
        "instances": {"file": ["instances.json"], "sha256": [digests[0]]},
        "captions": {"file": ["captions.json"], "sha256": [digests[1]]},
    }


def test_the_exported_world(tmp_path: Path) -> None:
    make(tmp_path / "world", count=3, seed=2)
    folder = tmp_path / "world" / "annotations"
    found = read_annotations(folder / "instances.json", folder / "captions.json").pictures
    assert [len(picture.captions) for picture in found.values()] == [5, 5, 5]
    assert all(picture.objects and picture.file.endswith(".png") for picture in found.values())


def test_train_and_val_together(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    images = [{"id": 1, "file_name": "one.jpg"}]
    more = write(
        tmp_path / "i2.json", INSTANCES | {"images": images, "annotations": [{"image_id": 1, "category_id": 1}]}
    )
    told = write(tmp_path / "c2.json", {"images": images, "annotations": [{"image_id": 1, "caption": "One."}]})
    found = read_annotations([pair[0], more], [told, pair[1]])
    assert list(found.pictures) == [9, 4, 7, 1]
    assert found.pictures[1].captions == ("One.",)
    with pytest.raises(DataError, match=r"image id 9 is in .*instances.json and in .*instances.json"):
        list(picture_objects([pair[0], pair[0]]))
    with pytest.raises(DataError, match="1 image ids are only in the instances: 1"):
        read_annotations([pair[0], more], pair[1])
    with pytest.raises(DataError, match="no instances file"):
        list(picture_objects([]))


def test_the_file_is_read_once(pair: tuple[Path, Path], cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = read_index(pair[0], "instances", progress=lambda done, size: seen.append((done, size)))
    size = pair[0].stat().st_size
    assert seen[-1] == (size, size)
    seen.clear()
    again = read_index(pair[0], "instances", progress=lambda done, size: seen.append((done, size)))
    assert not seen
    assert again == first
    assert {path.parent for path in pair[0].parent.rglob("*.gz")} == {cache}
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"not gzip",
        lambda data: gzip.compress(b"[]"),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'"format": 1', b'"format": 0')),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'"pictures": [[', b'"pictures": [[3, ')),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'"pictures": [[9,', b'"pictures": [[1e400,')),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'"pictures": [[9,', b'"pictures": [["9",')),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'"nine.jpg"', b"null")),
        lambda data: gzip.compress(gzip.decompress(data).replace(b'["person"]', b'"person"')),
    ],
)
def test_a_spoilt_index_is_made_anew(pair: tuple[Path, Path], cache: Path, spoil: Any) -> None:
    first = read_index(pair[0], "instances")
    (index,) = cache.iterdir()
    whole = index.read_bytes()
    index.write_bytes(spoil(whole))
    assert index.read_bytes() != whole
    assert read_index(pair[0], "instances") == first
    assert gzip.decompress(index.read_bytes()) == gzip.decompress(whole)


def test_a_changed_file_is_read_again(pair: tuple[Path, Path]) -> None:
    before = list(picture_objects(pair[0]))
    text = pair[0].read_text().replace("nine.jpg", "neun.jpg")  # as long as before
    pair[0].unlink()
    write(pair[0], text)
    os.utime(pair[0], ns=(1, 1))
    assert list(picture_objects(pair[0])) == [("neun.jpg", ["person"]), *before[1:]]


def test_one_file_read_as_both_kinds_does_not_mix_up(pair: tuple[Path, Path]) -> None:
    read_index(pair[0], "instances")
    with pytest.raises(DataError, match="'caption'"):
        read_index(pair[0], "captions")


def test_without_a_cache_a_warning(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    with caplog.at_level(logging.WARNING):
        assert len(list(picture_objects(pair[0]))) == 3
    assert "cannot keep an index" in caplog.text


def test_memory_does_not_grow_with_the_outlines(tmp_path: Path) -> None:
    outline = [[float(n) for n in range(4000)]]
    many = [{"image_id": 4, "category_id": 18, "id": n, "segmentation": outline} for n in range(100)]
    path = write(tmp_path / "i.json", INSTANCES | {"annotations": many})
    tracemalloc.start()
    try:
        read_index(path, "instances")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 2


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ("", "it is empty"),
        ("{", "it is not JSON"),
        ('{"images": [', "it is not JSON"),
        ("hello", "it is not JSON"),
        ("[]", "it holds a list"),
        ("{}", "no list 'annotations' and no list 'categories' and no list 'images'"),
        ({key: INSTANCES[key] for key in ("images", "annotations")}, "no list 'categories'"),
        (INSTANCES | {"images": {}}, "no list 'images'"),
        (INSTANCES | {"images": []}, "it has no pictures"),
        (INSTANCES | {"annotations": []}, "it has no annotations"),
        (INSTANCES | {"annotations": ["x"]}, "'annotations' holds 'x'"),
        (INSTANCES | {"annotations": [{"image_id": "4", "category_id": 1}]}, "'image_id' is '4'; a whole number"),
        (INSTANCES | {"annotations": [{"image_id": True, "category_id": 1}]}, "'image_id' is True; a whole number"),
        (INSTANCES | {"annotations": [{"image_id": 4}]}, "no 'category_id'"),
        (INSTANCES | {"annotations": [{"image_id": 4, "category_id": 2}]}, "1 category ids are not in 'categories': 2"),
        (INSTANCES | {"annotations": [{"image_id": 5, "category_id": 1}]}, "are not in 'images': 5"),
        (INSTANCES | {"images": [{"id": "9", "file_name": "a"}]}, "'id' is '9'"),
        (
            INSTANCES | {"images": [*IMAGES, {"id": 9, "file_name": "b"}]},
            "id 9 of 'images' stands for 'nine.jpg' and 'b'",
        ),
    ],
)
def test_wrong_shapes_are_named(tmp_path: Path, document: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        list(picture_objects(write(tmp_path / "i.json", document)))
    assert "i.json" in caught.value.message


def test_garbage_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_bytes(b"\xe4\xc7\xe1)o\xc8x\x0c\xf1\n" * 9)
    with pytest.raises(DataError, match="it is not JSON: lexical error") as caught:
        list(picture_objects(tmp_path / "i.json"))
    assert "\n" not in caught.value.message
    assert "b'" not in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none.json: No such file"):
        list(picture_objects(tmp_path / "none.json"))


def test_captions_of_other_pictures_are_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other = write(
        tmp_path / "c.json", TOLD | {"images": [*IMAGES, *({"id": n, "file_name": ""} for n in range(20, 28))]}
    )
    with pytest.raises(DataError, match="8 image ids are only in the captions: 20, 21, 22, 23, 24 and 3 more"):
        read_annotations(pair[0], other)
    renamed = write(tmp_path / "d.json", json.dumps(TOLD).replace("four", "vier"))
    with pytest.raises(DataError, match=r"picture 4 is 'four.jpg' and 'vier.jpg'"):
        read_annotations(pair[0], renamed)


def test_the_format_is_part_of_the_index(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read_index(pair[0], "instances")
    monkeypatch.setattr(coco, "FORMAT", 2)
    seen: list[int] = []
    read_index(pair[0], "instances", progress=lambda done, size: seen.append(done))
    assert seen
