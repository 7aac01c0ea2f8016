"""Files that a benchmark, a list, a recipe or a file of prompts can be: whatever is in them, one sentence says so."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from pathlib import Path

import pytest

from vlmfix.errors import DataError, UsageError, VlmfixError
from vlmfix.evals.benchmarks import amber, chair, clipscore, coco, hallusion, mme, pope
from vlmfix.evals.benchmarks.words import read_synonyms
from vlmfix.evals.task import Sample, Workload
from vlmfix.jobs.benchmark.job import check
from vlmfix.jobs.folder.questions import Questions
from vlmfix.language.recipe import read_recipe

QUESTION = {"question_id": 1, "image": "a.png", "text": "Is it?", "label": "yes"}
ITEM = {
    "category": "VD",
    "subcategory": "chart",
    "set_id": "1",
    "figure_id": "1",
    "question_id": "1",
    "visual_input": "1",
    "question": "Is it?",
    "gt_answer": "1",
}
TRUTH = {"id": 1, "type": "discriminative-hallucination", "truth": "yes"}
QUERY = {"id": 1, "image": "a.png", "query": "Is it?"}
DEEP = 20_000


def read_pope(path: Path) -> Workload:
    return pope.read(path, path.parent)


def read_hallusion(path: Path) -> Workload:
    return hallusion.read(path, path.parent)


def read_amber(path: Path) -> Workload:
    """AMBER's annotations are the file; its queries are sound."""
    folder = path.parent / "amber"
    folder.mkdir(exist_ok=True)
    (folder / "annotations.json").write_bytes(path.read_bytes())
    (folder / "query_all.json").write_text(json.dumps([QUERY]))
    return amber.read(folder, folder, part="discriminative")


def read_queries(path: Path) -> Workload:
    folder = path.parent / "amber"
    folder.mkdir(exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps([TRUTH]))
    (folder / "query_all.json").write_bytes(path.read_bytes())
    return amber.read(folder, folder, part="discriminative")


JSON_READERS = {
    read_pope: QUESTION,
    read_hallusion: ITEM,
    read_amber: TRUTH,
    read_queries: QUERY,
}


def refused(read, raw: bytes, tmp_path: Path) -> str:
    path = tmp_path / "random.json"
    path.write_bytes(raw)
    with pytest.raises(VlmfixError) as caught:
        read(path)
    assert isinstance(caught.value, DataError | UsageError)
    message = caught.value.message
    assert message.isprintable()
    assert len(message) < 500
    return message


@pytest.mark.parametrize("read", JSON_READERS)
@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("9" * 5000, "line 3 is not JSON: a number of 5000 digits"),
        ("NaN", "line 3 is not JSON: NaN"),
        ("1e999", "line 3 is not JSON: 1e999"),
        ('1, "extra": 2', "line 3 is not JSON: 'extra' stands twice"),
        ("[" * DEEP + "]" * DEEP, "line 3 nests too deeply"),
    ],
)
def test_json_that_is_none_is_named_with_its_line(read, array, extra, said, tmp_path):
    whole = json.dumps(JSON_READERS[read])
    other = {k: 2 if k in ("id", "question_id") and type(v) is int else v for k, v in JSON_READERS[read].items()}
    if "set_id" in other:
        other["set_id"] = "2"
    damaged = f'{json.dumps(other)[:-1]}, "extra": {extra}}}'
    text = f"[\n{whole},\n{damaged}]" if array else f"\n{whole}\n{damaged}\n"
    message = refused(read, text.encode(), tmp_path)
    assert said in message


@pytest.mark.parametrize("read", JSON_READERS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings_are_named(read, encoding, tmp_path):
    text = json.dumps(JSON_READERS[read] | {"note": "é"}, ensure_ascii=False)
    assert "line 1 is not UTF-8 text" in refused(read, text.encode(encoding), tmp_path)


@pytest.mark.parametrize("read", JSON_READERS)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_marks_are_passed_over(read, ends, tmp_path):
    path = tmp_path / "random.json"
    path.write_bytes(b"\xef\xbb\xbf" + f"{ends}{json.dumps(JSON_READERS[read])}{ends}".encode())
    assert len(read(path).samples) == 1
    damaged = f"{ends}{json.dumps(JSON_READERS[read])}{ends}{{]{ends}"
    assert "line 3 is not JSON" in refused(read, damaged.encode(), tmp_path)


@pytest.mark.parametrize(
    ("read", "change"),
    [
        (read_pope, {"question_id": 1.0}),
        (read_pope, {"question_id": True}),
        (read_pope, {"question_id": [1]}),
        (read_pope, {"question_id": None}),
        (read_pope, {"image": 3}),
        (read_pope, {"image": "a\ud800.png"}),
        (read_pope, {"text": "Is it?\udc80"}),
        (read_pope, {"label": True}),
        (read_pope, {"label": "x" * 10**6}),
        (read_hallusion, {"set_id": 1.5}),
        (read_hallusion, {"figure_id": {"a": 1}}),
        (read_hallusion, {"category": ["VD"]}),
        (read_hallusion, {"gt_answer": True}),
        (read_hallusion, {"visual_input": 1.0}),
        (read_hallusion, {"question": "\ud800"}),
        (read_amber, {"id": 1.0}),
        (read_amber, {"id": True}),
        (read_amber, {"type": ["a"]}),
        (read_amber, {"truth": ["yes"]}),
        (read_amber, {"type": "generative", "truth": ["\ud800"], "hallu": []}),
        (read_queries, {"id": "1"}),
        (read_queries, {"id": [[1]]}),
        (read_queries, {"image": None}),
    ],
)
def test_fields_of_another_kind_are_refused(read, change, tmp_path):
    message = refused(read, json.dumps(JSON_READERS[read] | change).encode(), tmp_path)
    assert "line 1" in message or "ids of queries" in message


def test_a_list_of_pictures_and_a_task_of_mme_have_lines_whatever_ends_them(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa b.png\rc\xe2\x80\xa8d.png\r")
    names = [sample.image for sample in clipscore.read(tmp_path, listed=tmp_path / "list.txt").samples]
    assert names == ["a b.png", "c\u2028d.png"]
    (tmp_path / "existence.txt").write_bytes("a.png\tIs\x85it?\tYes\ra.png\tIs it not?\tNo\r".encode())
    assert [sample.prompt for sample in mme.read(tmp_path).samples] == ["Is\x85it?", "Is it not?"]
    (tmp_path / "existence.txt").write_bytes("a.png\tIs it?\tYes\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"existence.txt, line 1 is not UTF-8"):
        mme.read(tmp_path)
    (tmp_path / "synonyms.txt").write_bytes(b"dog, pup\rcat\r")
    assert read_synonyms(tmp_path / "synonyms.txt") == "dog, pup\ncat\n"


@pytest.mark.parametrize("name", ["x" * 300, "x" * 10**6, "a/" + "é" * 200, "a\0b", "a\nb\x1b[31m"])
def test_names_that_no_file_can_have_are_missing_pictures(name, tmp_path):
    work = Workload(samples=[Sample(id="1", image=name, prompt="?")], images=tmp_path, about={})
    with pytest.raises(DataError, match="1 of 1 pictures are not in") as caught:
        check(work)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400
    with pytest.raises(UsageError, match="name 1 pictures that are not in the folder") as named:
        Questions(named={name: ("?",)}).check([])
    assert named.value.message.isprintable()
    assert len(named.value.message) < 400


def test_mme_and_chair_look_for_such_names_too(tmp_path):
    (tmp_path / "existence.txt").write_text(f"{'x' * 300}\tIs it?\tYes\n{'x' * 300}\tIs it not?\tNo\n")
    assert mme.read(tmp_path).samples[0].image == f"existence/{'x' * 300}"
    images = [{"id": 1, "file_name": "x" * 300}]
    (tmp_path / "i.json").write_text(
        json.dumps(
            {
                "images": images,
                "annotations": [{"image_id": 1, "category_id": 1}],
                "categories": [{"id": 1, "name": "dog"}],
            }
        )
    )
    (tmp_path / "c.json").write_text(
        json.dumps({"images": images, "annotations": [{"image_id": 1, "caption": "A dog."}]})
    )
    with pytest.raises(DataError, match="1 of 1 pictures are not in"):
        chair.read(tmp_path / "i.json", tmp_path / "c.json", tmp_path)
    (tmp_path / "list.txt").write_text("9" * 5000)
    with pytest.raises(DataError, match=r"1 of 1 pictures in .* are not in the annotations"):
        chair.read(tmp_path / "i.json", tmp_path / "c.json", tmp_path, listed=tmp_path / "list.txt")


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "b/../../a.png"])
def test_names_that_lead_out_of_the_folder_are_refused(name, tmp_path):
    work = Workload(samples=[Sample(id="1", image=name, prompt="?")], images=tmp_path, about={})
    with pytest.raises(DataError, match="names that lead out of"):
        check(work)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"decoder = " + b"[" * 5000, "is not TOML: it nests too deeply"),
        (b"decoder = " + b"9" * 5000, "is not TOML: "),
        ("decoder = 'vcd'".encode("utf-16"), "is not TOML: line 1 is not UTF-8 text"),
        (b"decoder = 'vcd'\nformat = [[1]]", "has format a list"),
        (b"decoder = 1", "has no decoder"),
    ],
)
def test_recipes(raw, said, tmp_path):
    (tmp_path / "r.toml").write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_recipe(tmp_path / "r.toml")
    assert f"the recipe {tmp_path / 'r.toml'} {said}" in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("prompt\nIs it?\n".encode("utf-16"), "line 1 is not UTF-8 text"),
        ("prompt\nIs it?\n".encode("utf-16-le"), "line 1 is not UTF-8 text: it holds a zero byte"),
        (b"prompt\nIs\0it?\n", "line 2 is not UTF-8 text: it holds a zero byte"),
        (b"prompt\n" + b"x" * 200_000 + b"\n", "line 2: field larger than field limit"),
        (b"prompt,prompt\na,b\n", "has the columns prompt, prompt"),
        (b"x" * 10**6, "line 1: field larger than field limit"),
        (b"x" * 10**5, "has the columns 'xxx"),
        (b'prompt\nIs it?\n"Is" it?\n', "line 3: "),
    ],
)
def test_files_of_prompts(raw, said, tmp_path):
    (tmp_path / "p.csv").write_bytes(raw)
    with pytest.raises(UsageError) as caught:
        Questions.file(tmp_path / "p.csv")
    assert said in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_files_of_prompts_have_lines_whatever_ends_them(ends, tmp_path):
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + f"prompt{ends}Is it?{ends}Is it not?{ends}".encode())
    assert Questions.file(tmp_path / "p.csv").everywhere == ("Is it?", "Is it not?")


@pytest.fixture
def annotations(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "instances.json"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "it holds a list"),
        ('{"images": ' + "[" * 200_000, "nests deeper than 64 levels|holds a list, which is no object"),
        ('{"images": [{"id": ' + "[" * 200_000, "nests deeper than 64 levels"),
        ('{"x": ' * 200_000, "nests deeper than 64 levels"),
        ('{"images": [{"x": ' + '{"a": [' * 100_000, "nests deeper than 64 levels"),
    ],
)
def test_annotations_that_nest_deeply_are_refused_at_once_and_in_little_memory(text, said, annotations):
    annotations.write_text(text)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(DataError, match=said):
        coco.read_index(annotations, "instances")
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, "the square of the depth would be gigabytes"
    assert seconds < 5


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('{"id": ' + "9" * 5000 + ', "file_name": "a"}', "it is not JSON|is needed"),
        ('{"id": 1e999, "file_name": "a"}', "it is not JSON|is needed"),
        ('{"id": NaN, "file_name": "a"}', "it is not JSON"),
        ('{"id": 1.0, "file_name": "a"}', "'id' is 1.0; a whole number is needed"),
        ('{"id": 1, "id": 2, "file_name": "a"}', "'id' stands twice"),
        ('{"id": 1, "file_name": ["a"]}', "there is no 'file_name'"),
        ("[1]", "'images' holds a list, which is no object"),
        ('{"id": 1, "file_name": "a\ud800"}', "it is not UTF-8 text"),
    ],
)
def test_entries_of_annotations_are_looked_at(entry, said, annotations):
    rest = '"annotations": [{"image_id": 1, "category_id": 1}], "categories": [{"id": 1, "name": "dog"}]'
    annotations.write_bytes(f'{{"images": [{entry}], {rest}}}'.encode(errors="surrogatepass"))
    with pytest.raises(DataError, match=said) as caught:
        coco.read_index(annotations, "instances")
    assert len(caught.value.message) < 400


def test_annotations_may_have_a_byte_order_mark(annotations):
    text = '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": "A."}]}'
    annotations.write_bytes(b"\xef\xbb\xbf" + text.encode())
    index = coco.read_index(annotations, "captions")
    assert dict(index.files) == {1: "a"}
    assert index.sha256 == hashlib.sha256(annotations.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{line} {line}]", "line 1 is not JSON"),
        ("[{line},\n]", "line 2 is not JSON"),
        ("[{line}\n\n", "line 3 is not JSON"),
        ("[{line}]\n{line}", "line 1 is not JSON: the array has to go on or to end there"),
        ("[\n,{line}]", "line 2 is not JSON"),
        ("[", "line 1 is not JSON"),
    ],
)
def test_arrays_that_do_not_end_as_they_should(text, said, tmp_path):
    assert said in refused(read_pope, text.replace("{line}", json.dumps(QUESTION)).encode(), tmp_path)


def test_annotations_as_deep_as_is_allowed_are_read(annotations):
    deep = "[" * 60 + "]" * 60
    annotations.write_text(
        f'{{"images": [{{"id": 1, "file_name": "a", "x": {deep}}}], "more": {{"images": [{{"id": 7}}]}}, '
        '"annotations": [{"image_id": 1, "category_id": 1, "segmentation": {"id": [1]}}], '
        '"categories": [{"id": 1, "name": "dog"}]}'
    )
    index = coco.read_index(annotations, "instances")
    assert (dict(index.files), dict(index.told)) == ({1: "a"}, {1: ["dog"]})
