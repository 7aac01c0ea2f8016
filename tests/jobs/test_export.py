"""Answers in other forms: what is written, by whom it can be read, and whose files are left alone."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.jobs.fake import FakeVLM, draw
from vlmfix.errors import DataError, UsageError
from vlmfix.jobs import export as exporting
from vlmfix.jobs.export import COLUMNS, NAMES, export
from vlmfix.jobs.folder import Questions, run
from vlmfix.records import read_lines, to_json
from vlmfix.settings import Settings

TEXTS = ["=1+1", "+a", "-a dog", "@x", "\tx", "\rx", "'quoted'", 'a "b", c\nd', "", "a - b", "日本\0"]


def folder_of(place, lines, failed=()):
    """A run's folder with these answers."""
    place.mkdir(parents=True)
    base = {"sha256": "ab", "prompt": "What?", "tokens": 3, "finish": "eos", "seconds": 0.5, "logprob": -0.25}
    base["entropy"] = None
    (place / "answers.jsonl").write_text("".join(f"{to_json(base | line)}\n" for line in lines))
    (place / "failed.jsonl").write_text("".join(f"{to_json(line)}\n" for line in failed))
    (place / "run.json").write_text('{"finished": true}')
    return place


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    answers = [{"image": f"{number}.png", "answer": text} for number, text in enumerate(TEXTS)]
    failed = [{"image": "x.png", "reason": "empty file"}, {"image": "caf\udce9.png", "reason": "no", "prompt": "Q?"}]
    return folder_of(tmp_path / "out", answers, failed)


def test_a_table_holds_everything_and_no_formula(folder):
    done = export(folder, "csv")
    assert (done.files, done.rows, done.finished) == ((folder / "answers.csv",), len(TEXTS) + 2, True)
    rows = table(folder / "answers.csv")
    assert tuple(rows[0]) == COLUMNS
    assert not any(value.startswith(("=", "+", "@", "\t", "\r")) for row in rows for value in row.values())
    assert [row["answer"].removeprefix("'") for row in rows[: len(TEXTS)]] == TEXTS
    assert rows[2]["answer"] == "'-a dog"
    assert [rows[0][name] for name in ("logprob", "entropy", "sar", "tokens")] == ["-0.25", "", "", "3"]
    assert [(row["image"], row["prompt"], row["failed"], row["answer"]) for row in rows[-2:]] == [
        ("x.png", "", "empty file", ""),
        ("caf\\udce9.png", "Q?", "no", ""),
    ]


def test_parquet_has_types_and_the_texts_as_they_are(folder, monkeypatch):
    monkeypatch.setattr(exporting, "GROUP", 4)
    assert export(folder, "parquet").rows == len(TEXTS) + 2
    read = parquet.read_table(folder / "answers.parquet")
    assert read["answer"].to_pylist() == [*TEXTS, None, None]
    assert [str(read.schema.field(name).type) for name in ("tokens", "logprob", "image")] == [
        "int64",
        "double",
        "string",
    ]
    assert read["entropy"].null_count == len(read)
    assert read["failed"].to_pylist()[-2:] == ["empty file", "no"]


def test_captions_have_the_numbers_in_cocos_names(tmp_path):
    names = ("COCO_val2014_000000391895.jpg", "val/000000000042.jpg")
    folder = folder_of(tmp_path / "out", [{"image": name, "answer": f"it is {name}"} for name in names])
    done = export(folder, "coco")
    results = json.loads((folder / "answers.coco.json").read_text())
    assert results == [
        {"image_id": 391895, "caption": f"it is {names[0]}"},
        {"image_id": 42, "caption": f"it is {names[1]}"},
    ]
    truth = COCO()
    truth.dataset = json.loads(done.files[1].read_text()) | {"annotations": [], "info": {}}
    truth.createIndex()
    assert truth.loadImgs([42])[0]["file_name"] == names[1]
    assert len(truth.loadRes(str(done.files[0])).anns) == 2


@pytest.mark.parametrize("names", [("a1.jpg", "b1.jpg"), ("a.jpg", "7.jpg")])
def test_pictures_without_numbers_of_their_own_are_counted(tmp_path, names):
    folder = folder_of(tmp_path / "out", [{"image": name, "answer": "a"} for name in names])
    _, images = export(folder, "coco", tmp_path / "mine.json").files
    assert images == tmp_path / "mine-images.json"
    listed = json.loads(images.read_text())["images"]
    assert listed == [{"id": 1, "file_name": names[0]}, {"id": 2, "file_name": names[1]}]


def test_two_answers_about_a_picture_have_no_place_in_captions(tmp_path):
    folder = folder_of(tmp_path / "out", [{"image": "1.jpg", "answer": "a", "prompt": text} for text in ("A?", "B?")])
    with pytest.raises(UsageError, match=r"1\.jpg has several answers"):
        export(folder, "coco")
    assert not (folder / "answers.coco.json").exists()


@pytest.mark.parametrize("kind", NAMES)
def test_only_what_an_export_wrote_is_written_over(folder, kind):
    (path, *_) = export(folder, kind).files
    first = path.read_bytes()
    with (folder / "answers.jsonl").open("a") as lines:
        line = next(read_lines(folder / "answers.jsonl")) | {"image": "more99.png"}
        lines.write(to_json(line) + "\n")
    export(folder, kind)
    assert len(path.read_bytes()) > len(first)
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"no .* file of vlmfix"):
        export(folder, kind)
    assert path.read_text() == "mine"


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(DataError, match=r"holds no run\.json"):
        export(tmp_path, "csv")
    (tmp_path / "shards" / "0-of-2").mkdir(parents=True)
    with pytest.raises(DataError, match="vlmfix merge"):
        export(tmp_path, "csv")


def test_run_writes_other_forms_in_the_end(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    call = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 3, "--decoder", "greedy")
    forms = [option for kind in ("jsonl", "csv", "parquet", "coco") for option in ("--format", kind)]
    code, _, told = vlmfix(*call, *forms)
    assert (code, f"vlmfix: 3 rows in {out}/answers.csv" in told) == (0, True)
    assert [row["image"] for row in table(out / "answers.csv")] == ["0000.png", "0001.png", "0002.png"]
    (pictures / "0003.png").write_bytes(b"broken")
    assert vlmfix(*call, "--format", "csv")[0] == 1  # of this start every question failed
    assert table(out / "answers.csv")[-1]["failed"].startswith("not a picture")
    (out / "answers.csv").write_text("mine")
    Image.new("RGB", (8, 8)).save(pictures / "0004.png")
    code, _, told = vlmfix(*call, "--format", "csv")
    assert (code, "loading" in told, "answers.csv is there" in told) == (2, False, True)


class Sample(dict):
    def __init__(self, filepath):
        super().__init__(filepath=filepath)
        self.tags = []


class Dataset:
    def add_samples(self, samples):
        self.samples = samples


def test_the_recipe_for_fiftyone_makes_a_field_for_each_decoder(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (recipe,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "fiftyone" in code)
    monkeypatch.setitem(sys.modules, "fiftyone", SimpleNamespace(Sample=Sample, Dataset=Dataset))
    folders = []
    for name, finish in (("greedy", "eos"), ("vcd:contrast=1", "length")):
        lines = [{"image": f"{number}.png", "answer": f"{name} {number}", "finish": finish} for number in (1, 2)]
        folders.append(str(folder_of(tmp_path / name, lines)))
        card = {"settings": {"decoder": name, "pictures": "/pictures"}}
        (tmp_path / name / "run.json").write_text(json.dumps(card))
    recipes = {"__name__": "recipe"}
    exec(compile(recipe, "recipe", "exec"), recipes)
    first, _ = recipes["dataset_of"](*folders).samples
    known = {"filepath": "/pictures/1.png", "greedy": "greedy 1", "vcd_contrast_1": "vcd:contrast=1 1"}
    assert first == known | {"greedy_logprob": -0.25, "vcd_contrast_1_logprob": -0.25}
    assert first.tags == ["vcd_contrast_1_cut"]


def test_export_of_a_run_that_is_not_finished_says_so(tmp_path, vlmfix):
    vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt() if len(vlm.batches) == 2 else None)
    call = {"questions": Questions.text("What?"), "settings": Settings(), "batch_size": 1, "loader": vlm.load}
    with pytest.raises(KeyboardInterrupt):
        run(draw(tmp_path / "in", 3), tmp_path / "out", **call)
    code, _, told = vlmfix("convert", tmp_path / "out", "--format", "csv", "--out", tmp_path / "a.csv")
    assert (code, "is not finished" in told, f"1 rows in {tmp_path}/a.csv" in told) == (0, True, True)
    code, _, told = vlmfix("convert", tmp_path / "out", "--format", "xml")
    assert code == 2
