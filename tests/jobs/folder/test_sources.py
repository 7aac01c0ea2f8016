"""Runs over lists, tables and tar files of pictures: whole, gone on with, split and made again, in bounded memory."""

import tracemalloc

import pytest

from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import WHAT, answers, failures, never_loaded
from tests.test_sources import packed
from vlmfix.errors import UsageError
from vlmfix.jobs.folder import Questions, run
from vlmfix.jobs.folder.merge import merge
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.jobs.shards import Shard
from vlmfix.records import read_json
from vlmfix.settings import Settings
from vlmfix.sources import source_of
from vlmfix.view.folders import read_sheet
from vlmfix.view.pictures import small_pictures

LINES = 50_000


def go(pictures, out, *, questions=WHAT, loader=None, batch_size=2, **more):
    loader = loader or FakeVLM().load
    return run(pictures, out, questions=questions, settings=Settings(), batch_size=batch_size, loader=loader, **more)


@pytest.fixture
def listed(tmp_path):
    """A list of six pictures, of which one comes twice and one is broken, one that is not there, and a tar of two."""
    pictures = draw(tmp_path / "in", 6)
    (pictures / "0003.png").write_bytes(b"broken")
    inside = draw(tmp_path / "inside", 8)
    packed(pictures / "x.tar", [(f"{n}.png", (inside / f"{n:04d}.png").read_bytes()) for n in (6, 7)])
    order = ["in/0005.png", "in/0000.png", "in/0003.png", "in/0005.png", "in/gone.png", "in/x.tar"]
    order += [f"in/{number:04d}.png" for number in (1, 2, 4)]
    (tmp_path / "list.txt").write_text("\n".join(order))
    return tmp_path / "list.txt"


ASKED = ["in/0005.png", "in/0000.png", "in/x.tar/6.png", "in/x.tar/7.png", "in/0001.png", "in/0002.png", "in/0004.png"]


def test_a_list_is_answered_in_its_order_and_gone_on_with(tmp_path, listed):
    out = tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt() if len(vlm.batches) == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        go(listed, out, loader=vlm.load)
    end = go(listed, out)
    assert [line["image"] for line in answers(out)] == ASKED
    assert [line["answer"] for line in answers(out)] == [f"What?: {colour(n)}" for n in (5, 0, 6, 7, 1, 2, 4)]
    assert {line["image"] for line in failures(out)} == {"in/0003.png", "in/gone.png"}
    assert (end.total, end.done, end.totals.answers, end.totals.failed) == (9, 9, 7, 2)
    card = read_json(out / "run.json")
    assert (card["finished"], card["progress"]["left"]) == (True, 0)
    assert go(listed, out, loader=never_loaded).done == 9
    with listed.open("a") as lines:
        lines.write("\nin/0002.png\ninside/0006.png\n")
    end = go(listed, out)
    assert ([line["image"] for line in answers(out)][7:], end.total, end.done) == (["inside/0006.png"], 10, 10)


def test_twice_in_a_batch_is_once(tmp_path):
    draw(tmp_path, 2)
    (tmp_path / "broken.png").write_bytes(b"")
    (tmp_path / "list.txt").write_text("0000.png\n" * 3 + "broken.png\n" * 3 + "0001.png\n")
    end = go(tmp_path / "list.txt", tmp_path / "out", batch_size=8)
    assert [line["image"] for line in answers(tmp_path / "out")] == ["0000.png", "0001.png"]
    assert [line["image"] for line in failures(tmp_path / "out")] == ["broken.png"]
    assert (end.total, end.done) == (3, 3)


def test_a_list_is_made_again_viewed_and_split(tmp_path, listed):
    go(listed, tmp_path / "one")
    assert reproduce(tmp_path / "one", tmp_path / "again", loader=FakeVLM().load).other == ()
    sheet = read_sheet([tmp_path / "one"])
    seen = dict(
        zip((card.picture.name for card in sheet.cards), small_pictures(c.picture for c in sheet.cards), strict=True)
    )
    assert {name for name, shown in seen.items() if isinstance(shown, bytes)} == {*ASKED}
    for index in range(3):
        go(listed, tmp_path / "out", shard=Shard(index, 3))
    assert merge(tmp_path / "out").unlisted == ""
    assert sorted(map(str, answers(tmp_path / "out"))) == sorted(map(str, answers(tmp_path / "one")))
    (tmp_path / "in" / "x.tar").write_bytes((tmp_path / "in" / "x.tar").read_bytes().replace(b"IDAT", b"IDAX"))
    seen = dict(
        zip((card.picture.name for card in sheet.cards), small_pictures(c.picture for c in sheet.cards), strict=True)
    )
    assert {name for name, shown in seen.items() if isinstance(shown, bytes)} == {*ASKED} - {*ASKED[2:4]}


def test_pictures_in_a_tar_of_a_folder_are_seen(tmp_path):
    shown = draw(tmp_path / "shown", 2)
    packed(draw(tmp_path / "in", 1) / "x.tar", [("a.png", (shown / "0001.png").read_bytes())])
    go(tmp_path / "in", tmp_path / "out")
    cards = read_sheet([tmp_path / "out"]).cards
    assert [card.picture.name for card in cards] == ["0000.png", "x.tar/a.png"]
    assert [isinstance(small, bytes) for small in small_pictures(card.picture for card in cards)] == [True, True]


def test_a_table_asks_its_own_prompts(tmp_path):
    draw(tmp_path, 3)
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text(
        "file,prompt\n0009.png,A?\n0002.png,A?\n0002.png,B?\n0000.png,A?\n0002.png,C?\n0002.png,A?\n0009.png,B?\n"
    )
    source = source_of(table, column="file")
    questions = Questions.of(source)
    end = go(table, out, column="file", questions=questions, batch_size=4)
    asked = [(line["image"], line["prompt"]) for line in answers(out)]
    assert asked == [("0002.png", "A?"), ("0002.png", "B?"), ("0000.png", "A?"), ("0002.png", "C?")]
    assert ([line["image"] for line in failures(out)], end.total, end.done) == (["0009.png"], 6, 6)
    settings = read_json(out / "run.json")["settings"]
    assert (settings["column"], settings["prompt"], settings["prompts"]) == ("file", None, source.prompts)
    assert reproduce(out, tmp_path / "again", loader=FakeVLM().load).other == ()
    for index in range(2):
        go(table, tmp_path / "split", column="file", questions=questions, shard=Shard(index, 2))
    assert merge(tmp_path / "split").totals.answers == 4
    with pytest.raises(UsageError, match="has a column of prompts, and others are given"):
        Questions.of(source, "What?")
    with pytest.raises(UsageError, match="has a column of prompts"):
        go(table, out, column="file")
    table.write_text(table.read_text() + "0001.png,A?\n")
    with pytest.raises(UsageError, match="prompts was"):
        go(table, out, column="file", questions=Questions.of(source_of(table, column="file")))


def test_a_parquet_file_of_pictures_is_answered_viewed_split_and_made_again(tmp_path):
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    shown = [path.read_bytes() for path in sorted(draw(tmp_path / "in", 6).iterdir())]
    shown[3] = b"broken"
    place, out = tmp_path / "t.parquet", tmp_path / "out"
    files.write_table(arrow.table({"image": shown, "prompt": [*"AABBCC"]}), place)
    questions = Questions.of(source_of(place))
    end = go(place, out, questions=questions)
    asked = ((0, "A"), (1, "A"), (2, "B"), (4, "C"), (5, "C"))
    assert [line["answer"] for line in answers(out)] == [f"{prompt}: {colour(n)}" for n, prompt in asked]
    assert [line["image"] for line in failures(out)] == ["t.parquet/3"]
    assert (end.total, end.done, go(place, out, questions=questions, loader=never_loaded).done) == (6, 6, 6)
    assert reproduce(out, tmp_path / "again", loader=FakeVLM().load).other == ()
    cards = read_sheet([out]).cards
    assert sum(isinstance(small, bytes) for small in small_pictures(card.picture for card in cards)) == 5
    for index in range(2):
        go(place, tmp_path / "split", questions=questions, shard=Shard(index, 2))
    assert merge(tmp_path / "split").totals.answers == 5


def test_a_long_list_takes_little_memory(tmp_path):
    """What grows with it are the names that were seen, while they are counted; objects of its entries are let go."""

    class ReachedError(Exception):
        pass

    def loader(*_, **__):
        raise ReachedError

    long = tmp_path / "list.txt"
    draw(tmp_path, 1)
    long.write_text("0000.png\n" + "".join(f"folder/of/pictures/{number:012d}.jpg\n" for number in range(LINES - 1)))
    tracemalloc.start()
    try:
        with pytest.raises(ReachedError):
            go(long, tmp_path / "out", loader=loader)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
    # Python's table of names, which pathlib enters the parts of paths in, never shrinks, and doubles when it is full;
    # entries that were kept would take more than 15 MB.
    assert kept < 10 << 20


def test_the_command_reads_a_table(tmp_path, model, vlmfix):
    draw(tmp_path, 2)
    (tmp_path / "t.csv").write_text("file,prompt\n0001.png,A?\n")
    options = ("run", tmp_path / "t.csv", "--out", tmp_path / "out", "--model", model, "--max-new-tokens", 2)
    code, _, told = vlmfix(*options)
    assert (code, "columns file, prompt, and none is image or path" in told) == (2, True)
    assert vlmfix(*options, "--column", "file")[0] == 0
    assert [(line["image"], line["prompt"]) for line in answers(tmp_path / "out")] == [("0001.png", "A?")]
    assert vlmfix("reproduce", tmp_path / "out")[0] == 0
    code, _, told = vlmfix(*options, "--column", "file", "--prompt", "What?")
    assert (code, "others are given" in told) == (2, True)
