"""The command line, as a person at a terminal meets it; with a tiny random model where one is needed."""

import json
import re
import shutil

import pytest
from PIL import Image

from tests.jobs.fake import draw
from tests.tiny import saved, tiny_vlm
from vlmfix.errors import DataError
from vlmfix.records import read_json, read_lines


def test_run_asks_and_goes_on(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    (pictures / "notes.txt").write_text("no picture")
    options = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 4, "--prompt", "What?")
    code, printed, told = vlmfix(*options)
    assert (code, printed) == (0, "")
    assert f"3 answers in {out}/answers.jsonl" in told
    assert f"1 failures in {out}/failed.jsonl" in told
    assert f"vlmfix view {out}" in told
    records = list(read_lines(out / "answers.jsonl"))
    assert [record["prompt"] for record in records] == ["What?"] * 3
    assert all(1 <= record["tokens"] <= 4 for record in records)
    assert read_json(out / "run.json")["settings"]["weights"].startswith("sha256:")
    code, _, told = vlmfix(*options)
    assert code == 0
    assert "3 of them from before" in told
    code, _, told = vlmfix(*options, "--decoder", "vcd")
    assert code == 2
    assert told.startswith(f"vlmfix: {out} holds answers made with other settings: decoder was 'greedy', now 'vcd:")
    assert "\nhint: choose another --out" in told


def test_who_names_no_decoder_is_told_that_nothing_is_mitigated(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 1), tmp_path / "out"
    note = "no --decoder is given: plain decoding mitigates nothing; try --decoder @keep-recall"
    begun = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 2)
    _, _, told = vlmfix(*begun)
    assert told.splitlines()[0] == f"vlmfix: {note}"
    assert told.count(note) == 2  # at once, and in the summary
    assert read_json(out / "run.json")["notes"] == [note]
    _, _, told = vlmfix("ask", pictures / "0000.png", "What?", "--model", model, "--max-new-tokens", 2)
    assert told.splitlines()[0] == f"vlmfix: {note}"
    for decoder in ("greedy", "vcd"):  # who names plain decoding knows
        assert "mitigates" not in vlmfix(*begun[:3], tmp_path / decoder, *begun[4:], "--decoder", decoder)[2]
    assert "mitigates" not in vlmfix(*begun[:3], tmp_path / "beams", *begun[4:], "--num-beams", 2)[2]


def test_an_embedded_model_says_that_it_knows_no_photographs(tmp_path, model, vlmfix):
    note = "dot.jpg does not look like a scene of vlmfix world, and tiny knows only those"
    (tmp_path / "in").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "in" / "dot.jpg")
    (tmp_path / "in" / "a.txt").write_text("no picture")
    run = ("run", tmp_path / "in", "--decoder", "greedy", "--max-new-tokens", 2, "--out")
    _, _, told = vlmfix(*run, tmp_path / "out")
    assert told.startswith(f"vlmfix: {note}")
    assert told.index(note) < told.index("loading tiny")
    assert "such as --model llava-hf/" in told.splitlines()[0]
    assert told.count(note) == 2
    assert read_json(tmp_path / "out" / "run.json")["notes"][0].startswith(note)
    ask = ("ask", tmp_path / "in" / "dot.jpg", "What?", "--decoder", "greedy", "--max-new-tokens", 2)
    assert vlmfix(*ask)[2].startswith(f"vlmfix: {note}")
    assert "drawn" not in vlmfix(*ask, "--model", model)[2]


def test_an_embedded_model_says_nothing_of_drawn_scenes(tmp_path, vlmfix):
    assert vlmfix("world", "make", tmp_path / "w", "--count", 1)[0] == 0
    run = ("run", tmp_path / "w" / "images", "--decoder", "greedy", "--max-new-tokens", 2, "--out", tmp_path / "out")
    assert "scene" not in vlmfix(*run)[2]
    assert read_json(tmp_path / "out" / "run.json")["notes"] == []


def test_words_are_kept_where_they_are_asked_for_and_a_folder_goes_on_without(tmp_path, model, vlmfix):
    out = tmp_path / "out"
    run = ("run", draw(tmp_path / "in", 1), "--out", out, "--model", model, "--max-new-tokens", 6)
    assert vlmfix(*run, "--words")[0] == 0
    draw(tmp_path / "in", 2)
    assert vlmfix(*run)[0] == 0
    first, second = read_lines(out / "answers.jsonl")
    assert {len(word) for word in first["words"]} == {3}
    assert sum(logprob for *_, logprob in first["words"]) <= 0
    assert "words" not in second
    assert "words" not in read_json(out / "run.json")["settings"]


def test_uncertainty_is_kept_where_it_is_asked_for_and_a_folder_goes_on_without(tmp_path, model, vlmfix):
    out = tmp_path / "out"
    run = ("run", draw(tmp_path / "in", 1), "--out", out, "--model", model, "--max-new-tokens", 6)
    assert vlmfix(*run, "--confidence", "sar")[0] == 0
    draw(tmp_path / "in", 2)
    assert vlmfix(*run, "--confidence", "sar+grounding", "--batch-size", 1)[0] == 0
    draw(tmp_path / "in", 3)
    assert vlmfix(*run, "--format", "csv")[0] == 0
    first, second, third = read_lines(out / "answers.jsonl")
    assert first["sar"] == pytest.approx(sum(token[4] for token in first["scored"]), abs=1e-3)
    assert ({len(token) for token in first["scored"]}, len(first["scored"])) == ({5}, first["tokens"])
    assert ("objects" in first, second["objects"], {len(token) for token in second["scored"]}) == (False, [], {6})
    assert not {"sar", "scored", "objects"} & third.keys()
    assert (out / "answers.csv").read_text().splitlines()[1].split(",")[8] == str(first["sar"])
    card = read_json(out / "run.json")
    assert not {"confidence", "similarity"} & card["settings"].keys()
    told = [(session.get("confidence"), session.get("similarity")) for session in card["sessions"]]
    assert told == [("sar", "own"), ("sar+grounding", "own"), (None, None)]
    code, _, said = vlmfix(*run, "--confidence", "sar", "--num-beams", 2)
    assert (code, "nobody knows how sure the tokens of beams were" in said) == (1, True)


def test_answers_that_were_cut_are_counted(tmp_path, model, vlmfix):
    run = ("run", draw(tmp_path / "in", 3), "--out", tmp_path / "out", "--model", model, "--max-new-tokens", 2)
    for _ in range(2):  # and counted again from the file
        told = vlmfix(*run)[2]
        cut = sum(record["finish"] == "length" for record in read_lines(tmp_path / "out" / "answers.jsonl"))
        assert cut > 1
        assert f"vlmfix: {cut} answers were cut at 2 tokens (--max-new-tokens)" in told
        assert read_json(tmp_path / "out" / "run.json")["totals"]["cut"] == cut


def test_an_error_of_every_picture_is_a_failure_of_the_run(tmp_path, model, vlmfix, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("'Processor' object has no attribute 'patches'")

    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    options = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 2)
    with monkeypatch.context() as patch:
        patch.setattr("vlmfix.models.family.Family.process", broken)  # at once, with the picture that is tried
        code, printed, told = vlmfix(*options)
        assert (code, printed) == (1, "")
        assert f"vlmfix: {model} cannot take a picture in: AttributeError: 'Processor'" in told
    with monkeypatch.context() as patch:
        patch.setattr("vlmfix.generation.running", broken)
        code, printed, told = vlmfix(*options)
        assert (code, printed) == (1, "")
        *_, message, hint = told.splitlines()
        error = "AttributeError: 'Processor' object has no attribute 'patches'"
        assert message.startswith(
            f"vlmfix: 3 questions in a row failed with greedy and no other is answered: {error} ("
        )
        assert re.search(r"tests/test_cli\.py, line \d+\)$", message)
        assert hint.startswith("hint: nothing is recorded of them; ")
        assert f"vlmfix doctor {model}" in hint
        code, _, told = vlmfix(*options, "--debug")
        assert code == 1
        assert "in broken" in told
    assert (out / "failed.jsonl").read_bytes() == (out / "answers.jsonl").read_bytes() == b""
    assert vlmfix(*options)[0] == 0
    assert len(list(read_lines(out / "answers.jsonl"))) == 3


def test_failed_pictures_are_asked_again(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 3), tmp_path / "out"
    whole = (pictures / "0001.png").read_bytes()
    (pictures / "0001.png").write_bytes(b"")
    options = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 2)
    code, _, told = vlmfix(*options)
    assert code == 0
    assert f"1 failures in {out}/failed.jsonl; --retry-failed asks again" in told
    (pictures / "0001.png").write_bytes(whole)
    assert "1 failures" in vlmfix(*options)[2]
    code, _, told = vlmfix(*options, "--retry-failed")
    assert (code, "failures" in told) == (0, False)
    assert [record["image"] for record in read_lines(out / "answers.jsonl")] == ["0000.png", "0002.png", "0001.png"]
    assert (out / "failed.jsonl").read_bytes() == b""


def test_run_reads_prompts_from_a_file(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 2), tmp_path / "out"
    (tmp_path / "p.csv").write_text("image,prompt\n0001.png,A?\n")
    options = (
        "run",
        pictures,
        "--out",
        out,
        "--model",
        model,
        "--max-new-tokens",
        2,
        "--prompts",
        tmp_path / "p.csv",
    )
    assert vlmfix(*options, "--batch-size", 1)[0] == 0
    assert [(r["image"], r["prompt"]) for r in read_lines(out / "answers.jsonl")] == [("0001.png", "A?")]
    code, _, told = vlmfix(*options, "--prompt", "B?")
    assert (code, told.splitlines()[0]) == (2, "vlmfix: --prompt and --prompts are both given")


def test_a_limit_on_pixels_belongs_to_the_run(tmp_path, vlmfix):
    pictures, out = tmp_path / "in", tmp_path / "out"
    folder = saved(tiny_vlm("qwen2_vl"), tmp_path / "model")
    pictures.mkdir()
    Image.effect_noise((60, 90), 90).save(pictures / "a.png")
    options = ("run", pictures, "--model", folder, "--max-new-tokens", 4, "--out")
    assert vlmfix(*options, out, "--max-pixels", 512)[0] == 0
    assert read_json(out / "run.json")["settings"]["max_pixels"] == 512
    code, _, told = vlmfix(*options, out)
    assert (code, "max_pixels was 512, now None" in told) == (2, True)
    assert vlmfix("reproduce", out)[0] == 0
    assert read_json(out / "again" / "run.json")["settings"]["max_pixels"] == 512
    assert vlmfix(*options, tmp_path / "own")[0] == 0
    answers = [next(read_lines(place / "answers.jsonl"))["answer"] for place in (out, tmp_path / "own")]
    assert answers[0] != answers[1]
    said = vlmfix(
        "ask", pictures / "a.png", "Please describe this image in detail.", *options[2:-1], "--max-pixels", 512
    )
    assert said[1].strip() == answers[0]
    code, _, told = vlmfix(*options, tmp_path / "other", "--max-pixels", 255)
    assert code == 2
    assert "vlmfix: max_pixels=255 is below the 256 pixels that this processor makes at least\nhint: give 256" in told


def test_what_is_asked_for_belongs_to_the_run(tmp_path, model, vlmfix):
    pictures, out = draw(tmp_path / "in", 2), tmp_path / "out"
    call = ("--model", model, "--max-new-tokens", 6, "--system", "Be brief.", "--repetition-penalty", 1.5)
    call = (*call, "--temperature", 1.2, "--top-k", 40, "--top-p", 0.9, "--attention", "eager")
    run = ("run", pictures, "--prompt", "What?", "--out", out)
    whole = ("run", pictures, "--prompt", "What?", "--out", tmp_path / "whole", *call)
    assert vlmfix(*whole)[0] == 0
    first, _ = (line["answer"] for line in read_lines(tmp_path / "whole" / "answers.jsonl"))
    stop = first[3:6]
    assert vlmfix(*run, *call, "--stop", "\n\n", "--stop", stop)[0] == 0
    cut, _ = read_lines(out / "answers.jsonl")
    assert (cut["answer"], cut["finish"]) == (first[: first.index(stop)].rstrip(), "stop")
    known = read_json(out / "run.json")["settings"]
    given = {"system": "Be brief.", "repetition_penalty": 1.5, "top_k": 40, "top_p": 0.9, "attention": "eager"}
    assert {name: known[name] for name in (*given, "stop")} == given | {"stop": ["\n\n", stop]}
    assert vlmfix("reproduce", out)[0] == 0
    assert "repetition penalty 1.5" in vlmfix("view", out)[2] + (out / "view.html").read_text()
    code, printed, _ = vlmfix("ask", pictures / "0000.png", "What?", *call, "--stop", stop)
    assert (code, printed.strip()) == (0, cut["answer"])
    code, _, told = vlmfix(*run, *call, "--stop", stop)
    assert (code, "stop was ['\\n\\n', " in told, "now ['" in told) == (2, True, True)
    code, _, told = vlmfix(*run, *call[:4])
    assert code == 2
    for name in (*given, "stop"):
        assert f"{name} was {known[name]!r}, now None" in told


def test_a_folder_that_noted_fewer_settings_goes_on(tmp_path, model, vlmfix):
    out = tmp_path / "out"
    run = ("run", draw(tmp_path / "in", 2), "--out", out, "--model", model, "--max-new-tokens", 3)
    assert vlmfix(*run)[0] == 0
    card = read_json(out / "run.json")
    for name in ("min_pixels", "attention", "system", "top_k", "top_p", "repetition_penalty", "stop"):
        assert card["settings"].pop(name) is None
    (out / "run.json").write_text(json.dumps(card))
    draw(tmp_path / "in", 3)
    code, _, told = vlmfix(*run)
    assert (code, "3 answers in" in told, "2 of them from before" in told) == (0, True, True)
    code, _, told = vlmfix(*run, "--stop", "a")
    assert (code, "stop was None, now ['a']" in told) == (2, True)
    assert vlmfix("reproduce", out)[0] == 0


@pytest.mark.parametrize(
    ("options", "ends", "message"),
    [
        (("--top-k", 5), 2, "top_k=5 with temperature=0"),
        (("--decoder", "vicrop", "--system", "Be kind."), 1, "vicrop looks where one question makes the model look"),
        (("--stop", ""), 2, "stop is no text, or an empty one"),
    ],
)
def test_settings_that_cannot_work_end_before_the_model_is_loaded(tmp_path, model, vlmfix, options, ends, message):
    code, _, told = vlmfix("run", draw(tmp_path / "in", 1), "--out", tmp_path / "out", "--model", model, *options)
    assert (code, message in told, "loading" in told) == (ends, True, False)


@pytest.mark.parametrize("command", ["ask", "run", "grounding", "profile", "pope"])
def test_a_limit_on_pixels_is_refused_where_there_is_none(tmp_path, model, vlmfix, command):
    pictures = draw(tmp_path / "in", 1)
    (tmp_path / "pope.json").write_text(
        '{"question_id": 1, "image": "0000.png", "text": "Is there a dog?", "label": "no"}'
    )
    arguments = {
        "ask": ["ask", pictures / "0000.png", "What?"],
        "run": ["run", pictures, "--out", tmp_path / "out"],
        "grounding": ["grounding", pictures / "0000.png", "What?"],
        "profile": ["profile", "--profiler", "vhd", "--images", pictures, "--out", tmp_path / "heads.safetensors"],
        "pope": [
            "eval",
            "pope",
            "--questions",
            tmp_path / "pope.json",
            "--images",
            pictures,
            "--out",
            tmp_path / "out",
        ],
    }
    code, printed, told = vlmfix(*arguments[command], "--model", model, "--max-pixels", 50000)
    assert (code, printed) == (2, "")
    assert (
        "\nvlmfix: max_pixels=50000: processors of LLaVA-1.5 have no limit on the pixels of a picture\nhint: " in told
    )


def test_a_picture_that_would_become_too_large_does_not_stop_a_run(tmp_path, model, vlmfix, monkeypatch):
    pictures, out = draw(tmp_path / "in", 2), tmp_path / "out"
    Image.new("RGB", (1, 20000), "blue").save(pictures / "line.png")
    Image.new("RGB", (3, 600), "blue").save(pictures / "thin.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    code, _, told = vlmfix("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 2)
    assert (code, "2 answers" in told) == (0, True)
    line, thin = read_lines(out / "failed.jsonl")
    reason = "too thin: 1 x 20000 pixels, one side is more than 200 times the other"
    assert line == {"image": "line.png", "reason": reason}
    assert thin["reason"].startswith("too large: the processor makes 320000 pixels of 3 x 600, at most 200000")


@pytest.mark.parametrize("decoder", ["greedy", "beam:num_beams=3", "sample:temperature=2", "locore+beam:num_beams=2"])
def test_ask_streams_what_run_writes(tmp_path, model, vlmfix, decoder):
    pictures = draw(tmp_path / "in", 1)
    options = ("--model", model, "--max-new-tokens", 6, "--decoder", decoder)
    code, printed, _ = vlmfix("ask", pictures / "0000.png", "What?", *options)
    assert code == 0
    assert vlmfix("run", pictures, "--out", tmp_path / "out", "--prompt", "What?", *options)[0] == 0
    (record,) = read_lines(tmp_path / "out" / "answers.jsonl")
    assert printed.strip() == record["answer"]


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["run"], 2, "Missing argument 'PICTURES'", "see vlmfix run --help"),
        (["run", "{}"], 2, "Missing option '--out'", "see vlmfix run --help"),
        (["nonsense"], 2, "No such command 'nonsense'", "see vlmfix --help"),
        (["run", "{}", "--out", "x", "--batch-size", "0"], 2, "'0' is neither auto nor a number", "see"),
        (["run", "{}", "--out", "x", "--batch-size", "many"], 2, "'many' is neither auto nor a number", "see"),
        (
            ["run", "{}", "--out", "x", "--decoder", "nonsense"],
            2,
            "unknown decoder 'nonsense'",
            "known decoders: greedy",
        ),
        (
            ["run", "{}", "--out", "x", "--decoder", "vcd:contrast=99"],
            2,
            "vcd: contrast=99.0 is not allowed",
            "float in",
        ),
        (
            ["run", "{}", "--out", "x", "--decoder", "beam:num_beams=4", "--num-beams", "2"],
            2,
            "num_beams=2 is asked for with a decoder that chooses by 4 beams",
            "leave num_beams out",
        ),
        (["run", "{}", "--out", "x", "--decoder", "sample+beam"], 1, "both choose the tokens", "use one of them"),
        (
            ["ask", "{}/0000.png", "Q?", "--decoder", "sample", "--temperature", "0.5"],
            2,
            "temperature=0.5 is asked for with a decoder that chooses by sampling at temperature 1",
            "leave temperature out",
        ),
        (["run", "{}/none", "--out", "x"], 2, "there is no {}/none", "give a picture"),
        (["run", "{}", "--out", "x", "--prompt", ""], 2, "the prompt is empty", "write a question"),
        (["run", "{}", "--out", "{}/out", "--model", "{}", "--decoder", "greedy"], 1, "no config.json", "llava-hf"),
        (["ask", "{}/none", "Q?"], 2, "there is no file {}/none", "give a picture"),
        (["ask", "{}/0000.png", " "], 2, "the question is empty", "write"),
        (["ask", "{}/a.txt", "Q?"], 1, "{}/a.txt: not a picture", "JPEG"),
        (
            ["world", "make", "{}/w", "--count", "0"],
            2,
            "0 is not in the range",
            "see vlmfix world make --help",
        ),
        (["doctor", "{}/none"], 1, "{}/none", "llava-hf"),
    ],
)
def test_bad_input_gets_one_line_and_a_hint(tmp_path, vlmfix, monkeypatch, arguments, code, message, hint):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path, 1)
    (tmp_path / "a.txt").write_text("text")
    found, printed, told = vlmfix(*(argument.format(tmp_path) for argument in arguments))
    lines = [line for line in told.splitlines() if not line.startswith("vlmfix: loading")]
    assert found == code
    assert printed == ""
    assert lines[0].startswith("vlmfix: ")
    assert message.format(tmp_path) in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    assert len(lines) == 2
    assert not (tmp_path / "x").exists()


def test_a_fault_of_ours_is_one_line_unless_debug(vlmfix, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("vlmfix.reports.decoders.decoder_table", broken)
    assert vlmfix("decoders") == (
        1,
        "",
        "vlmfix: ZeroDivisionError: ours\nhint: use --debug for the traceback\n",
    )
    code, _, told = vlmfix("decoders", "--debug")
    assert code == 1
    assert "Traceback" in told
    assert "in broken" in told


def test_debug_shows_the_cause_of_an_expected_error(tmp_path, vlmfix):
    code, _, told = vlmfix("--debug", "run", draw(tmp_path, 1), "--out", tmp_path / "out", "--model", tmp_path)
    assert code == 1
    assert "Traceback" in told
    assert "no config.json" in told.splitlines()[-2]


def test_settings_that_a_checkpoint_brings_in_are_said_everywhere(model, vlmfix, tmp_path):
    folder, pictures, out = shutil.copytree(model, tmp_path / "model"), draw(tmp_path / "in", 1), tmp_path / "out"
    path = folder / "generation_config.json"
    path.write_text(json.dumps(read_json(path) | {"repetition_penalty": 1.05, "do_sample": True}))
    said = "Generation settings of the checkpoint that do not act: do_sample True, repetition_penalty 1.05."
    options = ("--out", out, "--model", folder, "--max-new-tokens", 2)
    assert f"vlmfix: {said}\n" in vlmfix("run", pictures, *options)[2]
    card = read_json(out / "run.json")["settings"]
    assert card["checkpoint"]["set_aside"] == {"do_sample": True, "repetition_penalty": 1.05}
    assert card["files"].keys() > {"generation_config.json", "config.json", "tokenizer.json", "model.safetensors"}
    assert said in vlmfix("doctor", folder, "--decoder", "greedy")[1].replace("\n", " ")
    path.write_text(path.read_text().replace("1.05", "1.1"))
    draw(tmp_path / "in", 2)
    code, _, told = vlmfix("run", pictures, *options)
    assert code == 2
    assert "files.generation_config.json was 'sha256:" in told
    code, _, told = vlmfix("reproduce", out)
    assert code == 1
    assert "generation_config.json was changed\nhint: put the former files back" in told


def test_world_is_drawn(tmp_path, vlmfix):
    code, _, told = vlmfix("world", "make", tmp_path / "w", "--count", 2, "--seed", 3)
    assert code == 0
    assert f"2 scenes in {tmp_path / 'w'}" in told
    assert len(list((tmp_path / "w" / "images").iterdir())) == 2
    assert (tmp_path / "w" / "annotations" / "instances.json").exists()


def test_an_interrupt_says_how_to_go_on(tmp_path, vlmfix, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmfix.jobs.folder.run", interrupted)
    code, _, told = vlmfix("run", tmp_path, "--out", tmp_path / "out")
    assert code == 130
    assert "The same command goes on from there." in told
    monkeypatch.setattr("vlmfix.doctor.diagnose", interrupted)
    assert vlmfix("doctor")[0] == 130


def test_failures_while_running_are_failures(tmp_path, vlmfix, monkeypatch):
    def failing(*_, **__):
        raise DataError("cannot write", "free some space")

    monkeypatch.setattr("vlmfix.jobs.folder.run", failing)
    assert vlmfix("run", tmp_path, "--out", tmp_path / "out") == (
        1,
        "",
        "vlmfix: cannot write\nhint: free some space\n",
    )


def test_a_start_that_answers_nothing_ends_with_a_failure(tmp_path, model, vlmfix):
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"broken")
    asked = ("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 1)
    for _ in range(2):
        code, _, told = vlmfix(*asked)
        assert code == 1
        assert "1 failures in" in told
    draw(pictures, 1)
    assert vlmfix(*asked)[0] == 0
    assert vlmfix(*asked)[0] == 0
    assert vlmfix(*asked, "--retry-failed")[0] == 1


def test_names_are_told_as_text(tmp_path, model, vlmfix):
    code, _, told = vlmfix("run", tmp_path / "a\x1b[31m\nhint: none", "--out", tmp_path / "out")
    assert code == 2
    assert r"a\u001b[31m\nhint: none" in told
    assert "\x1b" not in told
    pictures = draw(tmp_path / "in", 1)
    (pictures / "0000.png").rename(pictures / "b\x1b[2J\ncaf\udce9.png")
    out = tmp_path / "o\x1bt"
    assert vlmfix("run", pictures, "--out", out, "--model", model, "--max-new-tokens", 1)[0] == 0
    answers = out / "answers.jsonl"
    answers.write_text(answers.read_text().replace('"answer": "', '"answer": "other '))
    code, printed, _ = vlmfix("reproduce", out)
    assert code == 1
    assert r"differs: b\u001b[2J\ncaf\udce9.png: Please" in printed
    assert "\x1b" not in printed
    code, printed, _ = vlmfix("reproduce", out, "--json")
    assert json.loads(printed)["other"][0][0] == "b\x1b[2J\ncaf\udce9.png"
