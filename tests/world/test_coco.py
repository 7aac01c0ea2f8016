import errno
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from vlmfix.errors import DataError
from vlmfix.world.categories import CATEGORIES, category
from vlmfix.world.coco import instances, make, objects
from vlmfix.world.masks import visible
from vlmfix.world.pope import SPLITS
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

FILES = (
    "annotations/captions.json",
    "annotations/instances.json",
    "pope/adversarial.json",
    "pope/popular.json",
    "pope/random.json",
    "world.json",
)
GOLDEN = {
    "annotations/captions.json": "ddc6db69b9c5012fa06beb94b72235142f4f94a39bf1a5bb9da9c3059bb101b7",
    "annotations/instances.json": "23df5ae6e5f329397cb31613d18eb3167d68069c81e1baedee7b9cdae6b7844f",
    "pope/adversarial.json": "51814eb6a864148c0474fcb9a1d505a16b887f96a805810d3cf7da42b668d42a",
    "pope/popular.json": "18f8161b137f1d00e9f39d6b5f35f687a02667d5e5a7011d0d0575f470547f84",
    "pope/random.json": "c16599b234f2660abff7b0f6e3289c95145f0ebcfb6c815d3194e91416877fcc",
    "world.json": "708fa8e7215fb17796ef1947d3e79bf8c906c190b486661397dd5baff15b0a4a",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    make(folder, count=6, seed=11)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def test_same_bytes_as_ever(world: Path):
    assert digests(world) == GOLDEN


def test_exactly_these_files(world: Path):
    found = sorted(str(path.relative_to(world)) for path in world.rglob("*") if path.is_file())
    assert found == sorted([*FILES, *(f"images/{index:012d}.png" for index in range(6))])


def test_pictures_are_the_scenes(world: Path):
    for index in range(6):
        with Image.open(world / "images" / f"{index:012d}.png") as picture:
            assert picture.mode == "RGB"
            expected = render([scene(11, index)])[0].permute(1, 2, 0).numpy()
            assert np.array_equal(np.array(picture), expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_pycocotools_reads_boxes_and_masks(world: Path):
    coco = COCO(str(world / "annotations" / "instances.json"))
    assert len(coco.getCatIds()) == 80
    assert [entry["name"] for entry in coco.loadCats(coco.getCatIds())] == [c.name for c in CATEGORIES]
    assert coco.getImgIds() == list(range(6))
    for index in range(6):
        found = coco.loadAnns(coco.getAnnIds(index))
        drawn = scene(11, index)
        expected, masks = instances(drawn), dict(zip(map(id, drawn.objects), visible(drawn), strict=True))
        assert [entry["category_id"] for entry in found] == [category(p.category).id for p in expected]
        for entry, placed in zip(found, expected, strict=True):
            x, y, width, height = entry["bbox"]
            assert (x, y, x + width, y + height) == placed.box
            mask = masks[id(placed)]
            assert np.array_equal(coco.annToMask(entry), mask)
            assert entry["area"] == mask.sum() < width * height
    ids = [entry["id"] for entry in coco.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_pycocotools_reads_the_captions(world: Path):
    coco = COCO(str(world / "annotations" / "captions.json"))
    for index in range(6):
        captions = [entry["caption"] for entry in coco.loadAnns(coco.getAnnIds(index))]
        assert len(captions) >= 5
        assert all(caption.endswith(".") for caption in captions)


@pytest.mark.parametrize("split", SPLITS)
def test_pope_answers_are_true(world: Path, split: str):
    lines = (world / "pope" / f"{split}.json").read_text().splitlines()
    assert len(lines) == 36
    for line in lines:
        entry = json.loads(line)
        assert list(entry) == ["question_id", "image", "text", "label"]
        there = objects(scene(11, int(entry["image"][:-4])))
        name = entry["text"].split(maxsplit=3)[3].removesuffix(" in the image?")
        assert (name in there) == (entry["label"] == "yes")


def test_positives_are_the_first_three_annotated(world: Path):
    coco = COCO(str(world / "annotations" / "instances.json"))
    entries = [json.loads(line) for line in (world / "pope" / "popular.json").read_text().splitlines()]
    names = {entry["id"]: entry["name"] for entry in coco.loadCats(coco.getCatIds())}
    for index in range(6):
        annotated = list(dict.fromkeys(names[a["category_id"]] for a in coco.loadAnns(coco.getAnnIds(index))))
        asked = [e["text"] for e in entries if e["image"] == f"{index:012d}.png" and e["label"] == "yes"]
        assert len(asked) == 3
        assert all(f" {name} in" in text for name, text in zip(annotated, asked, strict=False))


def test_goes_on_where_it_was(world: Path, tmp_path: Path):
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    kept = folder / "images" / "000000000001.png"
    before = kept.stat().st_mtime_ns
    (folder / "images" / "000000000004.png").unlink()
    (folder / "images" / ".000000000004.png.vlmfix-0123abcd").write_bytes(b"torn")
    (folder / "pope" / "popular.json").unlink()
    (folder / "annotations" / "instances.json").unlink()
    done = []
    make(folder, count=6, seed=11, progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert kept.stat().st_mtime_ns == before
    assert digests(folder) == digests(world)
    with Image.open(folder / "images" / "000000000004.png") as picture:
        picture.load()
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize(("count", "seed"), [(7, 11), (6, 12)])
def test_another_world_is_refused(world: Path, count: int, seed: int):
    with pytest.raises(DataError, match="another world"):
        make(world, count=count, seed=seed)


def test_a_foreign_folder_is_refused(tmp_path: Path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="not empty"):
        make(tmp_path, count=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(DataError, match="is a file"):
        make(tmp_path / "holiday.jpg", count=1, seed=0)


def test_a_broken_card_is_refused(tmp_path: Path):
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(DataError, match="another world"):
        make(tmp_path, count=1, seed=0)


def test_killed_before_the_card_was_whole(tmp_path: Path):
    (tmp_path / ".world.json.vlmfix-0123abcd").write_text('{"ver')
    make(tmp_path, count=1, seed=0)
    assert json.loads((tmp_path / "world.json").read_text())["count"] == 1
    assert not list(tmp_path.glob(".*"))


def test_a_card_that_is_none_is_refused(tmp_path: Path):
    for text in ("[" * 100_000, "[]", "\0", "x" * 100_000):
        (tmp_path / "world.json").write_text(text)
        with pytest.raises(DataError, match="another world"):
            make(tmp_path, count=1, seed=0)
        assert (tmp_path / "world.json").read_text() == text


def test_nothing_is_written_through_links(tmp_path: Path):
    mine, folder = tmp_path / "mine", tmp_path / "world"
    mine.write_text("precious")
    make(folder, count=1, seed=0)
    for name in (".000000000000.png.part", "000000000000.png"):
        (folder / "images" / name).unlink(missing_ok=True)
        (folder / "images" / name).symlink_to(mine if name.startswith(".") else tmp_path / "nowhere")
    make(folder, count=1, seed=0)
    assert mine.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_full_disk_and_a_closed_folder_are_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call, said in (
        (("os", "fsync"), r"cannot write .*world\.json: No space"),
        (("Path", "mkdir"), "cannot make the folder"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"vlmfix.files.{'.'.join(call)}", full if call[0] == "os" else lambda *_, **__: full())
            with pytest.raises(DataError, match=said) as told:
                make(tmp_path / "world", count=1, seed=0)
            assert told.value.hint == "free some space and start again"
    make(tmp_path / "world", count=1, seed=0)


@pytest.mark.parametrize("count", [0, -3])
def test_no_scenes(tmp_path: Path, count: int):
    with pytest.raises(DataError, match=str(count)):
        make(tmp_path / "new", count=count, seed=0)
    assert not (tmp_path / "new").exists()
