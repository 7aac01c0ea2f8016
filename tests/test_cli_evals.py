"""Benchmarks from the command line, on a small drawn world with both embedded models."""

import csv
import json
import shutil

import pytest
from PIL import Image

from tests.embedded import TINY
from vlmfix.records import read_json, read_lines
from vlmfix.world import coco

SCENES = 4
ARMS = ("--decoder", "vcd:contrast=0.5", "--decoder", "locore:window=3")
SPLIT = {"accuracy", "precision", "recall", "f1", "yes_ratio", "n", "unparsed"}


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    coco.make(folder, count=SCENES, seed=41)
    return folder


def pope(world):
    return ("eval", "pope", "--questions", world / "pope", "--images", world / "images", "--max-new-tokens", 4)


def chair(world):
    annotations = world / "annotations"
    return (
        *("eval", "chair", "--instances", annotations / "instances.json"),
        *("--captions", annotations / "captions.json", "--images", world / "images", "--max-new-tokens", 16),
    )


@pytest.mark.parametrize("model", ["tiny-qwen"])
def test_pope_ends_with_intervals(world, tmp_path, vlmfix, model):
    out = tmp_path / "out"
    code, printed, _ = vlmfix(*pope(world), "--model", model, "--decoder", "locore:window=3", "--out", out)
    assert code == 0
    assert "95 % intervals" in printed
    assert "adversarial" in printed
    results = read_json(out / "results.json")
    assert list(results) == ["greedy", "locore:window=3"]
    for splits in results.values():
        assert list(splits) == ["random", "popular", "adversarial"]
        assert all(set(figures) == SPLIT and figures["n"] == 6 * SCENES for figures in splits.values())
    assert results["greedy"]["random"]["accuracy"] > 0.8
    arms = read_json(out / "report.json")["arms"]
    assert {"official", "opera", "vcd"} <= set(arms["greedy"]["parsers"])
    assert arms["greedy"]["mean_f1"] > 0.7
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {("random", "f1"), ("pooled", "f1")} <= {(row["group"], row["figure"]) for row in rows}
    assert (out / "comparison.png").stat().st_size > 10_000
    before = (out / "results.json").read_bytes()
    assert vlmfix("eval", "score", out)[0] == 0
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("model", ["tiny"])
def test_chair_ends_with_intervals_and_comes_out_again(world, tmp_path, vlmfix, model):
    out = tmp_path / "out"
    code, printed, _ = vlmfix(*chair(world), "--max-new-tokens", 60, "--model", model, *ARMS, "--out", out)
    assert code == 0
    assert "95 % intervals" in printed
    assert len(read_json(out / "report.json")["pictures"]) == SCENES
    results = read_json(out / "results.json")
    assert len(results) == 3
    for figures in results.values():
        assert list(figures) == ["chair_s", "chair_i", "recall", "precision", "f1", "length", "n"]
        assert figures["n"] == SCENES
    assert results["greedy"]["recall"] > 0.5
    code, printed, _ = vlmfix("reproduce", out)
    assert code == 0
    assert printed.count(f"{SCENES} of {SCENES} answers have the same tokens") == 3
    for arm in results:
        assert (out / "again" / arm / "answers.jsonl").read_bytes() == (out / arm / "answers.jsonl").read_bytes()


def test_a_folder_of_answers_comes_out_again(world, tmp_path, vlmfix):
    out = tmp_path / "out"
    assert vlmfix("run", world / "images", "--out", out, "--decoder", "vcd", "--max-new-tokens", 20)[0] == 0
    code, printed, _ = vlmfix("reproduce", out)
    assert code == 0
    assert f"{SCENES} of {SCENES} answers are the same" in printed
    lines = list(read_lines(out / "answers.jsonl"))
    lines[2]["answer"] = "A horse."
    (out / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, printed, _ = vlmfix("reproduce", out)
    assert code == 1
    assert f"differs: {lines[2]['image']}: {lines[2]['prompt']}" in printed
    code, printed, _ = vlmfix("reproduce", out, "--json")
    assert (code, json.loads(printed)["exact"]) == (1, False)


def test_a_run_that_is_not_reproduced_says_so(world, tmp_path, vlmfix):
    out = tmp_path / "out"
    vlmfix(*chair(world), "--out", out)
    path = out / "greedy" / "answers.jsonl"
    lines = list(read_lines(path))
    lines[1]["ids"][3] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, printed, _ = vlmfix("reproduce", out)
    assert code == 1
    assert f"{SCENES - 1} of {SCENES} answers" in printed
    assert lines[1]["id"] in printed
    code, printed, _ = vlmfix("reproduce", out, "--json")
    assert code == 1
    assert json.loads(printed)["exact"] is False


def test_a_picture_that_changed_is_named(world, tmp_path, vlmfix):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(world / "images", images)
    command = chair(world)
    vlmfix(*command[: command.index("--images")], "--images", images, "--out", out, "--max-new-tokens", 20)
    Image.new("RGB", (64, 64)).save(images / "000000000001.png")
    code, _, told = vlmfix("reproduce", out)
    assert code == 1
    assert (
        f"1 of {SCENES} pictures in {images} are not those that the answers in {out} are about: 000000000001.png"
        in told
    )
    assert not (out / "again").exists(), "no model has answered"


def test_an_evaluation_is_reproduced_and_gone_on_with_where_its_pictures_and_model_are_now(world, tmp_path, vlmfix):
    images, model, out = tmp_path / "images", tmp_path / "model", tmp_path / "out"
    shutil.copytree(world / "images", images)
    shutil.copytree(TINY["tiny"], model)
    command = chair(world)
    command = [*command[: command.index("--images")], "--out", out, "--max-new-tokens", 20]
    assert vlmfix(*command, "--images", images, "--model", model)[0] == 0
    images, model = images.rename(tmp_path / "moved"), model.rename(tmp_path / "elsewhere")
    code, _, told = vlmfix("reproduce", out)
    assert (code, "give the folder that holds them with --images" in told) == (1, True)
    code, _, told = vlmfix("reproduce", out, "--images", images)
    assert (code, "give the directory that it is in with --model" in told) == (1, True)
    code, _, told = vlmfix("reproduce", out, "--images", images, "--model", "tiny-qwen")
    assert (code, "the weights of tiny-qwen are not those of the run" in told) == (1, True)
    code, printed, _ = vlmfix("reproduce", out, "--images", images, "--model", model)
    assert (code, "reproduced, token for token" in printed) == (0, True)
    code, _, told = vlmfix(*command, "--images", images, "--model", "tiny-qwen", "--decoder", "vcd")
    assert (code, "model was" in told) == (2, True)
    assert vlmfix(*command, "--images", images, "--model", model, "--decoder", "vcd")[0] == 0
    card = read_json(out / "card.json")
    assert (card["images"], card["model"], list(card["arms"])) == (str(images), str(model), ["greedy", "vcd"])
    assert vlmfix("reproduce", out, "--prompts", "x.csv")[0] == 2


def test_a_folder_of_answers_is_reproduced_where_its_pictures_prompts_and_model_are_now(world, tmp_path, vlmfix):
    images, model, prompts, out = (tmp_path / name for name in ("images", "model", "prompts.csv", "out"))
    shutil.copytree(world / "images", images)
    shutil.copytree(TINY["tiny"], model)
    prompts.write_text("prompt\nIs there a dog?\n")
    short = ("--max-new-tokens", 3)
    assert vlmfix("run", images, "--out", out, "--prompts", prompts, "--model", model, *short)[0] == 0
    there = {
        "--images": images.rename(tmp_path / "moved"),
        "--model": model.rename(tmp_path / "elsewhere"),
        "--prompts": prompts.rename(tmp_path / "renamed.csv"),
    }
    for name in there:
        others = [part for other, path in there.items() if other != name for part in (other, path)]
        code, _, told = vlmfix("reproduce", out, *others)
        assert (code, f"with {name}" in told) == (1, True)
    every = [part for pair in there.items() for part in pair]
    code, printed, _ = vlmfix("reproduce", out, *every)
    assert (code, f"{SCENES} of {SCENES} answers are the same" in printed) == (0, True)
    Image.new("RGB", (64, 64)).save(tmp_path / "moved" / "000000000001.png")
    code, _, told = vlmfix("reproduce", out, *every, "--out", tmp_path / "third")
    assert (code, f"1 of {SCENES} pictures in" in told) == (1, True)
    assert not (tmp_path / "third").exists()
    (tmp_path / "moved" / "000000000001.png").unlink()
    code, _, told = vlmfix("reproduce", out, *every)
    assert (code, f"1 of {SCENES} pictures of" in told) == (1, True)
    (tmp_path / "renamed.csv").write_text("prompt\nIs there a cat?\n")
    code, _, told = vlmfix("reproduce", out, *every)
    assert (code, "renamed.csv has other prompts than the run" in told) == (1, True)


def test_the_second_run_is_another_one(world, tmp_path, vlmfix):
    out = tmp_path / "out"
    vlmfix(*chair(world), "--out", out, "--max-new-tokens", 20)
    code, _, told = vlmfix("reproduce", out, "--out", f"{out}/greedy/..")
    assert (code, "is the run itself" in told) == (2, True)
    assert "complete before" not in vlmfix("reproduce", out)[2]
    assert f"{out}/again was complete before" in vlmfix("reproduce", out)[2]


def test_recipes_are_arms_of_their_own(world, tmp_path, vlmfix):
    specs = {"vcd/recipe": "vcd:contrast=0.5", "locore/recipe": "locore:window=3", "vcd/greedy": "vcd:contrast=0.7"}
    for name, spec in specs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.toml").write_text(f'decoder = "{spec}"\n')
    decoders = [part for name in specs for part in ("--decoder", f"@{tmp_path}/{name}.toml")]
    assert vlmfix(*chair(world), "--max-new-tokens", 8, *decoders, "--out", tmp_path / "out")[0] == 0
    arms = read_json(tmp_path / "out" / "card.json")["arms"]
    assert list(arms) == ["greedy", *specs]
    assert arms["greedy"]["spec"] == "greedy"
    assert arms["locore/recipe"]["parameters"]["window"] == 3


def test_what_failed_is_told(world, tmp_path, vlmfix):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(world / "images", images)
    (images / "000000000003.png").write_bytes(b"")
    command = chair(world)[: chair(world).index("--images")]
    code, printed, told = vlmfix(*command, "--images", images, "--out", out)
    assert code == 0
    assert f"greedy: 1 of {SCENES} samples failed; the first, 3: empty file" in told
    assert "greedy is incomplete: 1 failed." in printed
    assert read_json(out / "results.json")["greedy"]["n"] == SCENES - 1


def test_failed_samples_are_asked_again(world, tmp_path, vlmfix):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(world / "images", images)
    (images / "000000000003.png").write_bytes(b"")
    command = (*chair(world)[:-4], "--images", images, "--max-new-tokens", 8, "--out", out)
    assert f"1 of {SCENES} samples failed" in vlmfix(*command)[2]
    shutil.copy(world / "images" / "000000000003.png", images)
    assert f"1 of {SCENES} samples failed" in vlmfix(*command)[2]
    code, _, told = vlmfix(*command, "--retry-failed")
    assert (code, "samples failed" in told) == (0, False)
    assert read_json(out / "results.json")["greedy"]["n"] == SCENES


def test_an_error_of_every_sample_is_a_failure_of_the_run(world, tmp_path, vlmfix, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("no patches")

    command = (*pope(world), "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("vlmfix.generation.VLM._found", broken)
        code, printed, told = vlmfix(*command)
    assert (code, printed) == (1, "")
    *_, message, hint = told.splitlines()
    assert message.startswith(
        "vlmfix: 8 questions in a row failed with greedy and no other is answered: AttributeError"
    )
    assert hint.startswith("hint: nothing is recorded of them; see what vlmfix doctor tiny says")
    assert (tmp_path / "out" / "greedy" / "answers.jsonl").read_bytes() == b""
    assert vlmfix(*command)[0] == 0


def test_a_clip_model_that_is_not_there_costs_no_answers(world, tmp_path, vlmfix):
    command = ("eval", "clipscore", "--images", world / "images", "--out", tmp_path / "out")
    code, _, told = vlmfix(*command, "--clip", "local-dir:/nowhere")
    assert code == 1
    assert "no CLIP model local-dir:/nowhere" in told
    assert "loading tiny" not in told
    assert not (tmp_path / "out").exists()


def test_amber_is_scored_with_another_parser(world, tmp_path, vlmfix):
    (tmp_path / "annotations.json").write_text('[{"id": 1, "type": "discriminative-hallucination", "truth": "no"}]')
    query = '[{"id": 1, "image": "000000000001.png", "query": "Is there a zebra in the image?"}]'
    (tmp_path / "query_discriminative.json").write_text(query)
    out = tmp_path / "out"
    command = ("eval", "amber", "--questions", tmp_path, "--images", world / "images", "--part", "discriminative")
    assert vlmfix(*command, "--max-new-tokens", 4, "--out", out)[0] == 0
    assert vlmfix("eval", "score", out, "--parser", "vcd")[0] == 0
    assert read_json(out / "card.json")["options"]["parser"] == "vcd"
    code, _, told = vlmfix("eval", "score", out, "--questions", tmp_path, "--out", tmp_path / "new")
    assert (code, "--questions does not go with amber" in told) == (2, True)


def test_pope_is_scored_by_the_truths_of_another_edition(world, tmp_path, vlmfix):
    line = {"question_id": 1, "image": "000000000001.png", "text": "Is there a zebra in the image?", "label": "no"}
    (tmp_path / "random.json").write_text(json.dumps(line))
    out, new = tmp_path / "out", tmp_path / "new"
    command = (
        "eval",
        "pope",
        "--questions",
        tmp_path / "random.json",
        "--images",
        world / "images",
        "--suffix",
        " Say.",
    )
    assert vlmfix(*command, "--max-new-tokens", 3, "--out", out)[0] == 0
    (tmp_path / "random.json").write_text(json.dumps(line | {"label": "Yes"}))
    code, _, told = vlmfix("eval", "score", out, "--questions", tmp_path / "random.json")
    assert (code, "--questions and --out go together" in told) == (2, True)
    assert vlmfix("eval", "score", out, "--questions", tmp_path / "random.json", "--out", new)[0] == 0
    first, second = (read_json(folder / "results.json")["greedy"]["random"]["accuracy"] for folder in (out, new))
    assert first + second == 1, "one of the labels is right"
    assert vlmfix("reproduce", new)[0] == 0, "it is a run like any other"


def test_plain_alone_has_figures_too(world, tmp_path, vlmfix):
    code, printed, _ = vlmfix(*chair(world), "--out", tmp_path / "out")
    assert code == 0
    assert "chair_i" in printed
    assert read_json(tmp_path / "out" / "results.json")["greedy"]["n"] == SCENES


def test_two_runs_side_by_side(world, tmp_path, vlmfix):
    one, two = tmp_path / "one", tmp_path / "two"
    short = (*chair(world), "--max-new-tokens", 6)
    assert vlmfix(*short, "--decoder", "vcd", "--out", one)[0] == 0
    assert vlmfix(*short, "--decoder", "locore", "--out", two)[0] == 0
    code, printed, _ = vlmfix("compare", one, two, "--out", tmp_path / "both", "--json")
    assert code == 0
    assert [arm["name"] for arm in json.loads(printed)["arms"]] == ["vcd", "locore"]
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "comparison.csv",
        "comparison.md",
        "comparison.png",
    ]
    files = [tmp_path / f"a.{ending}" for ending in ("tex", "html", "svg")]
    saved = [option for file in files for option in ("--save", file)]
    code, _, told = vlmfix("compare", one, two, "--out", tmp_path / "both", *saved)
    assert (code, all(str(file) in told and file.stat().st_size > 1000 for file in files)) == (0, True)
    assert vlmfix("compare", one, two, "--save", tmp_path / "a.docx")[0] == 2
    three = tmp_path / "three"
    vlmfix(*short, "--seed", 5, "--decoder", "vcd", "--out", three)
    code, _, told = vlmfix("compare", one, three)
    assert code == 2
    assert "decoding.seed is 0 and 5" in told
    code, printed, _ = vlmfix("compare", one, three, "--seeds", "--save", tmp_path / "seeds.tex")
    assert (code, "over 2 seeds (0, 5)" in printed.replace("\n", " ")) == (0, True)
    assert r"$\pm$" in (tmp_path / "seeds.tex").read_text()
    assert vlmfix("compare", one, three, "--seeds", "--save", tmp_path / "seeds.svg")[0] == 2
    assert vlmfix("compare", one, three, "--seeds", "--out", tmp_path)[0] == 2


def test_built_questions_are_those_of_the_world(world, tmp_path, vlmfix):
    given, built = tmp_path / "given", tmp_path / "built"
    vlmfix(*pope(world), "--out", given)
    instances = world / "annotations" / "instances.json"
    command = ("eval", "pope", "--instances", instances, "--images", world / "images", "--max-new-tokens", 4)
    assert vlmfix(*command, "--sample-seed", 41, "--out", built)[0] == 0
    asked = [[line["prompt"] for line in read_lines(folder / "samples.jsonl")] for folder in (given, built)]
    assert asked[0][: 6 * SCENES] == asked[1][: 6 * SCENES]


def test_tuning_on_one_half(world, tmp_path, vlmfix):
    out = tmp_path / "out"
    code, printed, told = vlmfix(
        *("tune", "vcd:plausibility=0.1,noise_step=500", "--task", "chair", "--budget", 2, "--out", out),
        *chair(world)[2:],
        *("--max-recall-loss", 1, "--max-length-loss", 1),
    )
    assert code in (0, 1)
    assert (out / "pareto.png").exists()
    assert (code == 0) == (out / "recipe.toml").exists()
    assert printed
    assert "held-out" in told or code == 1


def test_heads_are_hunted_by_the_ranking_of_a_profile(world, tmp_path, vlmfix):
    command = ("tune", "amplify:by=0", *chair(world)[2:], "--task", "chair", "--out", tmp_path / "out")
    loose = ("--max-recall-loss", 1, "--max-length-loss", 1)
    code, _, told = vlmfix(*command, "--heads", 1, "--candidates", 2, "--profiler", "patching", *loose)
    assert code in (0, 1), told
    card = read_json(tmp_path / "out" / "tune.json")
    assert len(card["candidates"].split("/")) == 2
    assert card["ranking"]["profile"] == "patching in heads.safetensors"
    arms = read_json(tmp_path / "out" / "tuning" / "card.json")["arms"]
    assert {arm["spec"].partition(",")[0] for name, arm in arms.items() if name != "greedy"} == {
        f"amplify:heads={head}" for head in card["candidates"].split("/")
    }
    for options, message in (
        (("--heads", 1), "candidates was"),
        (("--heads", 1, "--profiler", "echo"), "reads the profile echo"),
        (("--heads", 1, "--budget", 3), "--budget and --heads are both given"),
        (("--candidates", 3), "--candidates says which heads to try"),
        (("--heads", 1, "--profile", tmp_path / "none"), "cannot read"),
    ):
        code, _, told = vlmfix(*command, *options)
        assert (code in (1, 2), message in told) == (True, True), told


def test_tuning_with_an_unknown_model_leaves_the_folder_free(world, tmp_path, vlmfix):
    command = ("tune", "vcd:plausibility=0.1,noise_step=500", *chair(world)[2:], "--task", "chair", "--budget", 1)
    out = tmp_path / "out"
    code, _, told = vlmfix(*command, "--out", out, "--model", tmp_path / "nowhere")
    assert code == 1, told
    assert vlmfix(*command, "--out", out, "--max-recall-loss", 1, "--max-length-loss", 1)[0] in (0, 1)
    assert read_json(out / "tuning" / "card.json")["model"] == "tiny"
    code, _, told = vlmfix(*command, "--out", out, "--model", tmp_path / "nowhere")
    assert (code, "model was 'tiny'" in told) == (2, True)


def test_a_group_without_a_command_shows_its_help(vlmfix):
    code, _, told = vlmfix("eval")
    assert code == 2
    assert told.startswith("Usage: vlmfix eval ")
    assert "hint:" not in told


def test_tuning_for_pope_takes_no_count(world, tmp_path, vlmfix):
    command = ("tune", "vcd", "--task", "pope", *pope(world)[2:], "--count", 2, "--out", tmp_path / "out")
    code, _, told = vlmfix(*command)
    assert (code, "--task pope does not take --count" in told) == (2, True)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("--questions", "nowhere"), 1, "there is no nowhere"),
        (("--decoder", "nothing"), 2, "unknown decoder 'nothing'"),
        (("--decoder", "var"), 2, "var cannot act on tiny"),
        (("--parser", "guess"), 2, "no yes/no parser is called 'guess'"),
        (("--images", "nowhere"), 1, f"of {SCENES} pictures are not in nowhere: "),
        (("--instances", "x.json"), 2, "give either --questions or --instances"),
        (("--sample-seed", "3"), 2, "--sample-seed does not go with --questions"),
        (("--decoder", "vcd", "--decoder", "vcd"), 2, "--decoder vcd is given twice"),
    ],
)
def test_wrong_use_of_pope(world, tmp_path, vlmfix, change, code, message):
    found, _, told = vlmfix(*pope(world), "--out", tmp_path / "out", *change)
    assert (found, message in told) == (code, True), told
    assert told.count("Traceback") == 0


def test_questions_of_another_shape(world, tmp_path, vlmfix):
    (tmp_path / "q.json").write_text('{"question_id": 1, "image": "a.png", "text": "Is there a cup?"}\n')
    code, _, told = vlmfix(*pope(world), "--out", tmp_path / "out", "--questions", tmp_path / "q.json")
    assert code == 1
    assert "line 1 has no label" in told
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_missing(world, tmp_path, vlmfix):
    images = tmp_path / "images"
    shutil.copytree(world / "images", images)
    (images / "000000000003.png").unlink()
    code, _, told = vlmfix(*chair(world)[:-4], "--images", images, "--out", tmp_path / "out")
    assert code == 1
    assert f"1 of {SCENES} pictures are not in" in told
    assert "000000000003.png" in told


@pytest.mark.parametrize("command", ["compare", "reproduce", "score"])
def test_a_folder_that_is_no_run(tmp_path, vlmfix, command):
    group = ("eval",) if command == "score" else ()
    code, _, told = vlmfix(*group, command, tmp_path)
    assert code == 1
    assert "holds no card.json" in told


def test_rules_of_another_benchmark(world, tmp_path, vlmfix):
    vlmfix(*chair(world), "--out", tmp_path / "out")
    code, _, told = vlmfix("eval", "score", tmp_path / "out", "--parser", "vcd")
    assert code == 2
    assert "--parser does not go with chair" in told
