import hashlib
import json
import threading
from dataclasses import replace

import pytest
import torch

from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import answers, failures, go, living, never_loaded
from vlmfix import images
from vlmfix.errors import DataError, IncompatibleDecodersError, LayoutError, UsageError
from vlmfix.jobs.folder import Questions
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings


def test_every_picture_gets_its_answer(tmp_path):
    pictures, out, vlm = draw(tmp_path / "in", 10), tmp_path / "out", FakeVLM()
    seen = []
    end = go(pictures, out, vlm, report=lambda progress: seen.append(progress.done), max_new_tokens=7, seed=3)
    records = answers(out)
    assert [record["image"] for record in records] == [f"{number:04d}.png" for number in range(10)]
    for number, record in enumerate(records):
        said = ["image", "sha256", "prompt", "answer", "tokens", "finish", "seconds", "logprob", "entropy"]
        assert list(record) == said
        assert record["answer"] == f"What?: {colour(number)}"
        assert record["sha256"] == hashlib.sha256((pictures / record["image"]).read_bytes()).hexdigest()
    assert [len(batch) for batch in vlm.batches] == [4, 4, 2]
    assert vlm.options["max_new_tokens"] == 7
    assert vlm.options["seed"] == 3
    assert seen == [0, 4, 8, 10]
    assert (end.total, end.before, end.done, end.totals.failed) == (10, 0, 10, 0)


def test_the_run_card_says_what_was_done(tmp_path):
    out = tmp_path / "out"
    go(draw(tmp_path / "in", 3), out, FakeVLM(), decoder="vcd:contrast=0.5")
    card = read_json(out / "run.json")
    settings = card["settings"]
    assert settings["decoder"].startswith("vcd:")
    assert settings["decoder_parameters"]["contrast"] == 0.5
    assert settings["decoder_parameters"]["plausibility"] == 0.1
    assert (settings["model"], settings["commit"], settings["weights"]) == ("tiny", "abc", "commit:abc")
    assert (settings["prompt"], settings["dtype"], settings["max_new_tokens"]) == ("What?", "float32", 128)
    assert card["totals"] == {"answers": 3, "failed": 0, "cut": 0, "tokens": 9, "seconds": 1.5}
    assert card["ms_per_token"] == pytest.approx(166.667)
    assert card["peak_memory"] > 0
    assert card["finished"] is True
    (session,) = card["sessions"]
    assert session["device"] == "cpu"
    assert {"vlmfix", "torch", "transformers"} <= set(session["versions"])


def test_the_card_and_the_answers_say_what_a_contrast_left_alone(tmp_path):
    class Sure(FakeVLM):
        def generate(self, *args, **options):
            return [replace(answer, skipped=2) for answer in super().generate(*args, **options)]

    out = tmp_path / "out"
    go(draw(tmp_path / "in", 3), out, Sure(), decoder="vcd:when=uncertain")
    assert [record["skipped"] for record in answers(out)] == [2, 2, 2]
    totals = read_json(out / "run.json")["totals"]
    assert (totals["skipped"], totals["skip_rate"]) == (6, round(6 / totals["tokens"], 4))


def test_a_single_picture(tmp_path):
    pictures = draw(tmp_path / "in", 3)
    go(pictures / "0001.png", tmp_path / "out", FakeVLM())
    assert [record["image"] for record in answers(tmp_path / "out")] == ["0001.png"]


def test_an_answer_from_no_numbers_is_a_failure_and_not_asked_again(tmp_path):
    pictures, out, vlm = draw(tmp_path / "in", 4), tmp_path / "out", FakeVLM(broken=[colour(2)])
    end = go(pictures, out, vlm)
    assert [record["image"] for record in answers(out)] == ["0000.png", "0001.png", "0003.png"]
    reason = "the model's output was not a number"
    assert failures(out) == [{"image": "0002.png", "reason": reason, "prompt": "What?"}]
    assert (end.done, end.totals.answers, end.totals.failed) == (4, 3, 1)
    go(pictures, out, FakeVLM(fails=lambda batch: pytest.fail("asked again")))


def test_a_finished_run_starts_no_model(tmp_path):
    pictures, out, vlm = draw(tmp_path / "in", 3), tmp_path / "out", FakeVLM()
    go(pictures, out, vlm)
    before = (out / "answers.jsonl").read_bytes()
    vlm.load = never_loaded
    end = go(pictures, out, vlm)
    assert (end.before, end.done, end.total) == (3, 3, 3)
    assert (out / "answers.jsonl").read_bytes() == before


def test_a_run_killed_before_its_last_card_is_finished_without_the_model(tmp_path):
    pictures, out, vlm = draw(tmp_path / "in", 3), tmp_path / "out", FakeVLM()
    go(pictures, out, vlm)
    whole = read_json(out / "run.json")
    totals = {"answers": 0, "failed": 0, "tokens": 0, "seconds": 0.0}
    replace_json(out / "run.json", whole | {"finished": False, "totals": totals, "ms_per_token": None})
    vlm.load = never_loaded
    go(pictures, out, vlm)
    assert read_json(out / "run.json") == whole | {"updated": read_json(out / "run.json")["updated"]}


def test_new_pictures_are_added(tmp_path):
    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    go(pictures, out, FakeVLM())
    draw(pictures, 5)
    vlm = FakeVLM()
    go(pictures, out, vlm)
    assert [batch[0][0] for batch in vlm.batches] == [colour(3)]
    assert len(answers(out)) == 5
    assert read_json(out / "run.json")["totals"]["tokens"] == 15
    assert len(read_json(out / "run.json")["sessions"]) == 2


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"decoder": "vcd"}, "decoder was 'greedy'"),
        ({"max_new_tokens": 5}, "max_new_tokens was 128, now 5"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"model": "other"}, "model was 'tiny', now 'other'"),
        ({"temperature": 0.5}, "temperature"),
        ({"questions": Questions.text("Why?")}, "prompt was 'What\\?', now 'Why\\?'"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_loaded(tmp_path, changed, named):
    pictures, out, vlm = draw(tmp_path / "in", 2), tmp_path / "out", FakeVLM()
    go(pictures, out, vlm)
    draw(pictures, 3)
    vlm.load = never_loaded
    with pytest.raises(UsageError, match=named):
        go(pictures, out, vlm, **changed)


def test_other_pictures_are_refused(tmp_path):
    go(draw(tmp_path / "in", 2), tmp_path / "out", FakeVLM())
    with pytest.raises(UsageError, match="pictures was"):
        go(draw(tmp_path / "other", 2), tmp_path / "out", FakeVLM())


def test_a_prompts_file_instead_of_the_prompt_is_refused(tmp_path):
    pictures, out = draw(tmp_path / "in", 2), tmp_path / "out"
    go(pictures, out, FakeVLM())
    (tmp_path / "p.csv").write_text("prompt\nWhat?\n")
    with pytest.raises(UsageError, match="prompt was"):
        go(pictures, out, FakeVLM(), questions=Questions.file(tmp_path / "p.csv"))


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    pictures, out, vlm = draw(tmp_path / "in", 2), tmp_path / "out", FakeVLM()
    go(pictures, out, vlm)
    draw(pictures, 3)
    vlm.revision = "def"
    with pytest.raises(UsageError, match="weights was 'commit:abc', now 'commit:def'"):
        go(pictures, out, vlm)
    assert len(answers(out)) == 2


def test_broken_files_are_set_aside_once(tmp_path):
    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    (pictures / "0000b.png").write_bytes(b"")
    (pictures / "notes.txt").write_text("no picture")
    (pictures / "gone.jpg").symlink_to("nowhere")
    for _ in range(2):
        end = go(pictures, out, FakeVLM())
    assert {record["image"]: record["reason"] for record in failures(out)} == {
        "0000b.png": "empty file",
        "gone.jpg": "broken link: No such file or directory",
        "notes.txt": "not a picture (JPEG, PNG, WEBP, TIFF, BMP, GIF are read)",
    }
    assert [list(record) for record in failures(out)] == [["image", "reason"]] * 3
    assert len(answers(out)) == 3
    assert (end.done, end.totals.failed, read_json(out / "run.json")["totals"]["failed"]) == (6, 3, 3)


def test_failures_are_tried_again_when_their_file_is_removed(tmp_path):
    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    (pictures / "0001.png").write_bytes(b"")
    go(pictures, out, FakeVLM())
    draw(pictures, 3)
    (out / "failed.jsonl").unlink()
    go(pictures, out, FakeVLM())
    assert sorted(record["image"] for record in answers(out)) == ["0000.png", "0001.png", "0002.png"]
    assert read_json(out / "run.json")["totals"]["failed"] == 0


def test_only_broken_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    end = go(tmp_path / "in", tmp_path / "out", FakeVLM())
    assert (end.done, end.totals.answers, end.totals.failed, end.totals.ms_per_token) == (1, 0, 1, None)


def test_every_prompt_for_every_picture(tmp_path):
    (tmp_path / "p.csv").write_text("prompt\nA?\nB?\nC?\n")
    vlm = FakeVLM()
    go(
        draw(tmp_path / "in", 2),
        tmp_path / "out",
        vlm,
        questions=Questions.file(tmp_path / "p.csv"),
        batch_size=6,
    )
    assert [prompt for _, prompt in vlm.batches[0]] == ["A?", "B?", "C?"] * 2


def test_prompts_of_named_pictures(tmp_path):
    pictures, vlm = draw(tmp_path / "in", 4), FakeVLM()
    (pictures / "broken.png").write_bytes(b"")
    (tmp_path / "p.csv").write_text("image,prompt\n0002.png,A?\n0000.png,B?\n0002.png,C?\n")
    end = go(pictures, tmp_path / "out", vlm, questions=Questions.file(tmp_path / "p.csv"))
    asked = [(record["image"], record["prompt"]) for record in answers(tmp_path / "out")]
    assert asked == [("0000.png", "B?"), ("0002.png", "A?"), ("0002.png", "C?")]
    assert (end.total, end.totals.failed) == (3, 0)


def test_missing_named_pictures_are_listed_before_the_model_is_loaded(tmp_path):
    vlm = FakeVLM()
    vlm.load = never_loaded
    (tmp_path / "p.csv").write_text("image,prompt\n0002.png,A?\n0007.png,B?\n")
    with pytest.raises(UsageError, match=r"1 pictures .* 0007\.png"):
        go(draw(tmp_path / "in", 4), tmp_path / "out", vlm, questions=Questions.file(tmp_path / "p.csv"))


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY)
def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path, error):
    vlm = FakeVLM(fails=lambda batch: error if len(batch) > 3 else None)
    end = go(draw(tmp_path / "in", 20), tmp_path / "out", vlm, batch_size=8)
    assert [len(batch) for batch in vlm.batches] == [8, 4, *[2] * 10]
    assert end.batch_size == 2
    assert [record["image"] for record in answers(tmp_path / "out")] == [f"{n:04d}.png" for n in range(20)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LayoutError("row 1 has 3 tokens"), "row 1 has 3 tokens"),
        (
            ValueError("absolute aspect ratio must be smaller than 200\nmore"),
            "ValueError: absolute aspect ratio",
        ),
    ],
)
def test_one_bad_sample_does_not_cost_its_batch(tmp_path, error, reason):
    out, pictures = tmp_path / "out", draw(tmp_path / "in", 6)
    vlm = FakeVLM(fails=lambda batch: error if (colour(1), "What?") in batch else None)
    go(pictures, out, vlm)
    (failure,) = failures(out)
    assert failure["image"] == "0001.png"
    assert failure["reason"].startswith(reason)
    assert "\n" not in failure["reason"]
    assert len(answers(out)) == 5
    vlm.load = never_loaded
    go(pictures, out, vlm)


@pytest.mark.parametrize(
    "error",
    [
        UsageError("top_p=2"),
        IncompatibleDecodersError("no beams"),
        torch.AcceleratorError("CUDA error: lost"),
    ],
)
def test_what_is_wrong_with_every_batch_stops_the_run(tmp_path, error):
    vlm = FakeVLM(fails=lambda batch: error)
    with pytest.raises(type(error)):
        go(draw(tmp_path / "in", 6), tmp_path / "out", vlm)
    assert len(vlm.batches) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlmfix-pictures")]
    assert failures(tmp_path / "out") == []
    assert read_json(tmp_path / "out" / "run.json")["finished"] is False


def test_an_interrupted_run_leaves_a_true_card(tmp_path):
    pictures, out = draw(tmp_path / "in", 10), tmp_path / "out"
    vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt() if len(vlm.batches) == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        go(pictures, out, vlm)
    card = read_json(out / "run.json")
    assert (card["finished"], card["totals"]["answers"]) == (False, 4)
    go(pictures, out, FakeVLM())
    assert [record["image"] for record in answers(out)] == [f"{n:04d}.png" for n in range(10)]


def test_the_output_folder_is_not_read(tmp_path):
    pictures = draw(tmp_path / "in", 2)
    for _ in range(2):
        end = go(pictures, pictures / "answers", FakeVLM())
    assert end.total == 2
    with pytest.raises(UsageError, match="is the folder of the pictures"):
        go(pictures, pictures, FakeVLM())


def test_nothing_to_read(tmp_path):
    with pytest.raises(UsageError, match="there is no"):
        go(tmp_path / "nowhere", tmp_path / "out", FakeVLM())
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="no file in"):
        go(tmp_path / "in", tmp_path / "out", FakeVLM())


def test_an_automatic_batch_fits_the_free_memory(tmp_path, monkeypatch):
    pictures = draw(tmp_path / "in", 20)
    row = 2 * 2 * 2 * 8 * 4 * 192  # keys and values, layers, heads, width, bytes, tokens of prompt and answer
    for free, expected in ((100 * row, 8), (7 * row, 3), (0, 1)):
        monkeypatch.setattr("vlmfix.fitting.free_memory", lambda device, free=free: free)
        vlm = FakeVLM()
        go(pictures, tmp_path / f"out{free}", vlm, batch_size=None)
        assert len(vlm.batches[0]) == expected


def test_pictures_are_not_kept(tmp_path, monkeypatch):
    alive, most = living(monkeypatch), []
    vlm = FakeVLM(fails=lambda batch: most.append(len(alive)))
    go(draw(tmp_path / "in", 60), tmp_path / "out", vlm, batch_size=2)
    assert max(most) <= images.AHEAD + 2 * 2 + 1


def test_settings_are_values():
    assert replace(Settings(), seed=1) == Settings(seed=1)
    assert json.dumps(vars(Settings()))
