"""Shards of a run: together they are one run, and joined they are its folder."""

import json

import pytest

from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import WHAT, answers, failures, never_loaded
from vlmfix.errors import DataError, UsageError
from vlmfix.jobs.folder import Questions, run
from vlmfix.jobs.folder.merge import merge
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.jobs.shards import Shard, shards_in
from vlmfix.records import JsonLines, read_json, replace_json
from vlmfix.settings import Settings
from vlmfix.view.folders import read_sheet

COUNT = 4


def go(pictures, out, shard=None, *, questions=WHAT, loader=None, **settings):
    return run(
        pictures,
        out,
        questions=questions,
        settings=Settings(**settings),
        batch_size=4,
        shard=shard,
        loader=loader or FakeVLM(broken=[colour(3)]).load,
    )


def shards(pictures, out, *, left_out=(), **more):
    for index in range(COUNT):
        if index not in left_out:
            go(pictures, out, Shard(index, COUNT), **more)


@pytest.fixture
def pictures(tmp_path):
    """Thirty pictures in two folders; one is broken, one is refused by the model."""
    draw(tmp_path / "in" / "a", 10)
    draw(tmp_path / "in", 20)
    (tmp_path / "in" / "0007.png").write_bytes(b"")
    return tmp_path / "in"


def in_order(lines):
    return sorted((json.dumps(line) for line in lines), key=lambda text: text.split('"prompt"'))


def test_shards_together_are_one_run(tmp_path, pictures):
    out = pictures / "answers"  # its files are none of the pictures, whichever shard wrote them
    go(pictures, tmp_path / "one")
    shards(pictures, out)
    parts = [answers(Shard(index, COUNT).folder(out)) for index in range(COUNT)]
    assert all(0 < len(part) < 15 for part in parts)
    found = merge(out)
    assert (found.shards, found.unlisted) == (COUNT, "")
    assert in_order(answers(out)) == in_order(answers(tmp_path / "one"))
    assert in_order(failures(out)) == in_order(failures(tmp_path / "one"))
    assert {line["image"] for line in failures(out)} == {"0007.png", "0003.png", "a/0003.png"}
    joined, one = read_json(out / "run.json"), read_json(tmp_path / "one" / "run.json")
    assert joined["settings"] == one["settings"]
    assert (joined["totals"], joined["finished"]) == (one["totals"], True)
    assert (joined["progress"]["total"], joined["progress"]["left"]) == (30, 0)
    assert [session["shard"] for session in joined["sessions"]] == ["0/4", "1/4", "2/4", "3/4"]
    again = (out / "answers.jsonl").read_bytes()
    merge(out)
    assert (out / "answers.jsonl").read_bytes() == again


def test_a_joined_folder_is_viewed_made_again_and_gone_on_with(tmp_path, pictures):
    out, into = tmp_path / "out", tmp_path / "joined"
    shards(pictures, out)
    merge(out, into)
    assert not (out / "answers.jsonl").exists()
    go(pictures, tmp_path / "other", seed=1)
    sheet = read_sheet([into, tmp_path / "other"])
    assert (len(sheet.columns), len(sheet.cards), sheet.notes) == (2, 30, ())
    assert reproduce(into, tmp_path / "again", loader=FakeVLM().load).other == ()
    go(pictures, into, loader=never_loaded)
    draw(pictures, 21)
    go(pictures, into)
    assert len(answers(into)) == 28
    (pictures / "0020.png").unlink()
    with pytest.raises(UsageError, match="holds answers that a run wrote itself"):
        merge(out, into)
    assert len(answers(into)) == 28


def test_a_shard_goes_on_and_is_made_again(tmp_path, pictures):
    out, shard = tmp_path / "out", Shard(0, COUNT)
    vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt() if len(vlm.batches) == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        go(pictures, out, shard, loader=vlm.load)
    assert len(answers(shard.folder(out))) == 4
    go(pictures, out, shard)
    assert go(pictures, out, shard, loader=never_loaded).total == len(answers(shard.folder(out))) + len(
        failures(shard.folder(out))
    )
    found = reproduce(shard.folder(out), tmp_path / "again", loader=FakeVLM().load)
    assert (found.other, found.answers) == ((), len(answers(shard.folder(out))))
    with pytest.raises(UsageError, match="shard was '0/4', now None"):
        go(pictures, shard.folder(out))


def test_prompts_of_named_pictures_go_with_their_pictures(tmp_path, pictures):
    (tmp_path / "p.csv").write_text("image,prompt\n0002.png,A?\na/0001.png,B?\n0002.png,C?\n")
    shards(pictures, tmp_path / "out", questions=Questions.file(tmp_path / "p.csv"))
    merge(tmp_path / "out")
    found = sorted((line["image"], line["prompt"]) for line in answers(tmp_path / "out"))
    assert found == [("0002.png", "A?"), ("0002.png", "C?"), ("a/0001.png", "B?")]


def test_a_shard_without_pictures_is_finished_at_once(tmp_path):
    pictures, out = draw(tmp_path / "in", 1), tmp_path / "out"
    (index,) = (index for index in range(COUNT) if Shard(index, COUNT).holds("0000.png"))
    shards(pictures, out, left_out=[index], loader=never_loaded)
    end = go(pictures, out, Shard((index + 1) % COUNT, COUNT), loader=never_loaded)
    assert (end.total, end.in_vain) == (0, False)
    go(pictures, out, Shard(index, COUNT))
    merge(out)
    assert len(answers(out)) == 1
    assert read_json(out / "run.json")["settings"]["weights"] == "commit:abc"


def test_what_is_missing_is_told_by_name(tmp_path, pictures):
    out = tmp_path / "out"
    shards(pictures, out, left_out=[0, 2])
    with pytest.raises(UsageError, match="holds no shards"):
        merge(tmp_path / "elsewhere")
    lacking = [
        name
        for name in [f"{n:04d}.png" for n in range(20)] + [f"a/{n:04d}.png" for n in range(10)]
        if Shard(0, COUNT).holds(name) or Shard(2, COUNT).holds(name)
    ]
    assert len(lacking) > 10
    with pytest.raises(DataError, match=r"shards without a card: 0/4, 2/4; (\d+) pictures are not done: ") as caught:
        merge(out)
    assert f"{len(lacking)} pictures are not done: {', '.join(lacking[:10])} and " in caught.value.message
    assert not (out / "run.json").exists()
    vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt())
    for index in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            go(pictures, out, Shard(index, COUNT), loader=vlm.load)
    with pytest.raises(DataError, match="unfinished shards: 0/4, 2/4"):
        merge(out)


def test_pictures_that_were_added_since_are_missed(tmp_path, pictures):
    out = tmp_path / "out"
    shards(pictures, out)
    draw(pictures, 21)
    with pytest.raises(DataError, match=r"1 pictures are not done: 0020\.png"):
        merge(out)
    pictures.rename(tmp_path / "moved")
    assert "cannot read" in merge(out).unlisted


def test_shards_that_do_not_fit_together_are_refused(tmp_path, pictures):
    out = tmp_path / "out"
    shards(pictures, out, left_out=[3])
    with pytest.raises(UsageError, match="holds the shard 0/4, and 0/3 would ask about the same pictures"):
        go(pictures, out, Shard(0, 3), loader=never_loaded)
    go(pictures, out, Shard(3, COUNT), seed=5)
    with pytest.raises(DataError, match=r"0/4 and 3/4 .* other settings: seed is 0 and 5"):
        merge(out)


def test_doubles_and_strangers_are_refused(tmp_path, pictures):
    out = tmp_path / "out"
    shards(pictures, out)
    first, second = (Shard(index, COUNT).folder(out) / "answers.jsonl" for index in (0, 1))
    whole, line = first.read_text(), answers(first.parent)[0]
    first.write_text(whole + whole.splitlines(keepends=True)[0])
    with pytest.raises(DataError, match=rf"{line['image']} stands twice"):
        merge(out)
    first.write_text(whole + second.read_text())
    with pytest.raises(DataError, match="does not belong to shard 0/4"):
        merge(out)
    first.write_text(whole)
    with JsonLines(second), pytest.raises(UsageError, match="writing to the shards 1/4"):
        merge(out)
    card = read_json(first.parent / "run.json")
    replace_json(first.parent / "run.json", card | {"settings": card["settings"] | {"shard": "2/4"}})
    with pytest.raises(DataError, match="is of shard 2/4"):
        merge(out)


def test_a_merge_that_was_killed_is_made_again(tmp_path, pictures, monkeypatch):
    out = tmp_path / "out"
    shards(pictures, out)
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "replace", lambda self, records: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(out)
    assert read_json(out / "run.json")["finished"] is False
    merge(out)
    assert (read_json(out / "run.json")["finished"], len(answers(out))) == (True, 27)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "answers.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"no run\.json says which"):
        merge(out, tmp_path / "mine")
    assert (tmp_path / "mine" / "answers.jsonl").read_text() == "mine"


@pytest.mark.parametrize("text", ["8/8", "1", "-1/8", "1/0", "1/8/9", "a/b", "", "1 /8", "²/8"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UsageError, match="is no shard"):
        Shard.of(text)


def test_every_picture_is_in_one_shard_by_its_name_alone():
    names = [f"{number:04d}.png" for number in range(200)] + ["caf\udce9.png"]
    for name in names:
        assert sum(Shard(index, 7).holds(name) for index in range(7)) == 1
    sizes = [sum(Shard(index, 7).holds(name) for name in names) for index in range(7)]
    assert min(sizes) > 15
    assert Shard(7, 8).holds("0000.png")  # on every machine and in every version


def test_the_commands(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 6), tmp_path / "out"
    options = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 2, "--shard")
    code, _, told = vlmfix(*options, "2/2")
    assert (code, told.splitlines()[0]) == (2, "vlmfix: '2/2' is no shard")
    code, _, told = vlmfix(*options, "0/2")
    assert (code, f"answers in {out}/shards/0-of-2/answers.jsonl" in told) == (0, True)
    code, printed, _ = vlmfix("status", out, "--json")
    found = json.loads(printed)
    assert (code, found["absent"], found["total"], found["state"]) == (0, ["1/2"], None, "stopped")
    assert "shards that have not begun: 1/2" in vlmfix("status", out)[1]
    assert vlmfix("merge", out)[0] == 1
    assert vlmfix(*options, "1/2")[0] == 0
    assert [str(shard) for shard in shards_in(out)] == ["0/2", "1/2"]
    found = json.loads(vlmfix("status", out, "--json")[1])
    assert (found["state"], found["answers"], found["total"], found["left"]) == ("finished", 6, 6, 0)
    code, printed, told = vlmfix("merge", out)
    assert (code, printed, told) == (0, "", f"vlmfix: 6 answers and 0 failures of 2 shards are in {out}\n")
    assert json.loads(vlmfix("status", out, "--json")[1])["total"] == 6
