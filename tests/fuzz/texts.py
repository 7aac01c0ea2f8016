"""Every kind of text file that vlmfix reads: small whole ones, and what reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.contracts.support import vlm_of
from tests.embedded import TINY
from tests.evals.benchmarks.test_coco import INSTANCES, TOLD
from tests.evals.benchmarks.test_hallusion import items
from tests.evals.tuning.test_tune import Fake
from tests.evals.tuning.test_tune import go as tune
from tests.heads.made import made_directions, made_profile
from tests.jobs.fake import FakeVLM
from vlmfix import load
from vlmfix.commands import profile as profile_command
from vlmfix.decoders import parse
from vlmfix.evals.benchmarks import amber, chair, clipscore, coco, hallusion, mme, pope, words
from vlmfix.evals.comparison.compare import compare
from vlmfix.evals.record import read_run
from vlmfix.evals.score import score
from vlmfix.heads.directions.kept import load_directions, save_directions
from vlmfix.heads.profile import load_profiles, save_profiles
from vlmfix.jobs import folder as job
from vlmfix.jobs.benchmark.job import check, evaluate
from vlmfix.jobs.benchmark.reproduce import reproduce as evaluate_again
from vlmfix.jobs.folder.reproduce import reproduce as run_again
from vlmfix.jobs.journal import BEGUN
from vlmfix.language.recipe import read_recipe, write_recipe
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.settings import Settings
from vlmfix.view.folders import read_sheet
from vlmfix.view.page import page_of
from vlmfix.world import coco as world

PICTURES = 3


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        name: What it is.
        make: Writes whole files into a folder; beside it lies ``pictures``.
        read: Reads the folder as a command does.
        damaged: The files that are damaged, relative to the folder.
        writes: The reader goes on with the folder, so that it may write there when all is well.
        suite: Examples in the suite.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    damaged: tuple[str, ...]
    writes: bool = False
    suite: int = 60


def lines(path, *documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))


def document(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def images(folder):
    return folder.parent / "pictures"


# -- questions


def prompts(folder):
    (folder / "asked.csv").write_text('image,prompt\n0000.png,"What, then?"\n0001.png,Is it?\n')


def pope_questions(folder):
    lines(
        folder / "random.json",
        *(
            {"question_id": number, "image": f"{number:04d}.png", "text": "Is there a dog?", "label": "yes"}
            for number in range(PICTURES)
        ),
    )
    document(folder / "popular.json", [{"image_name": "0001.png", "query": "Is there a cat?", "label": "No"}])


def annotations(folder):
    named = [{**picture, "file_name": f"{number:04d}.png"} for number, picture in enumerate(INSTANCES["images"])]
    document(folder / "instances.json", {**INSTANCES, "images": named})
    document(folder / "captions.json", {**TOLD, "images": named})
    (folder / "list.txt").write_text("0001.png\n9\n")


def read_chair(folder):
    both = (folder / "instances.json", folder / "captions.json")
    check(chair.read(*both, images(folder), listed=folder / "list.txt"))
    list(coco.picture_objects(both[0]))


def amber_files(folder):
    document(
        folder / "annotations.json",
        [
            {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
            {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
            {"id": 3, "type": "relation", "truth": "yes"},
        ],
    )
    asked = [{"id": number, "image": f"{number - 1:04d}.png", "query": "Describe it."} for number in (1, 2, 3)]
    document(folder / "query" / "query_all.json", asked)
    document(folder / "relation.json", {"dog": ["puppy"], "cat": ["kitten"]})
    (folder / "safe_words.txt").write_text("photo\npicture\n")


def read_amber(folder):
    amber.rules(folder)
    check(amber.read(folder, images(folder)))


def mme_files(folder):
    (folder / "existence").mkdir()
    asked = "Is there a dog?\tYes\nIs there a cat?\tNo\n"
    (folder / "existence" / "0000.txt").write_text(asked)
    (folder / "count.txt").write_text("".join(f"0001.png\t{line}\n" for line in asked.splitlines()))


def hallusion_files(folder):
    asked = items("VD", "chart", "12", ["10", "01"]) + items("VS", "map", "01", ["10", "01"])
    document(folder / "HallusionBench.json", asked)
    judged = [{**asked[0], "model_prediction": "Yes.", "gpt4v_output_gpt_check": "1"}]
    document(folder / "judged.json", judged)


def read_hallusion(folder):
    hallusion.read(folder / "HallusionBench.json", images(folder), judgements=[folder / "judged.json"])


def clipscore_files(folder):
    annotations(folder)
    (folder / "instances.json").unlink()
    (folder / "list.txt").write_text("0000.png\n0001.png\n")


def read_clipscore(folder):
    check(clipscore.read(images(folder), captions=folder / "captions.json", listed=folder / "list.txt"))


def synonyms(folder):
    (folder / "synonyms.txt").write_text("dog, puppy, hound\ncat, kitten\n")


def read_synonyms(folder):
    words.words_of(words.read_synonyms(folder / "synonyms.txt"))


# -- decoders, profiles, models


def recipe(folder):
    about = {"search": {"trials": 3, "share": 0.5}, "model": {"weights": "sha256:x", "none": None}}
    write_recipe(folder / "recipe.toml", "vcd:contrast=0.5", about)


def read_decoder(folder):
    read_recipe(folder / "recipe.toml")
    parse(f"@{folder / 'recipe.toml'}")


def profiles(folder):
    vlm = load("tiny", device="cpu")
    save_profiles({name: made_profile(vlm, name) for name in ("vhd", "image-mass")}, folder / "heads.safetensors")


def read_profiles(folder):
    found = load_profiles(folder / "heads.safetensors")
    profile_command._show(found, 3)
    json.dumps({name: profile_command._json(part, 3) for name, part in found.items()}, allow_nan=False)


def directions(folder):
    vlm = vlm_of("llava")
    found = {name: part for name, part in made_directions(vlm).items() if name != "vti"}
    save_directions(found, folder / "directions.safetensors")


def read_directions(folder):
    found = load_directions(folder / "directions.safetensors")
    profile_command._show_directions(found)


def model(folder):
    for file in TINY["tiny"].iterdir():
        if file.suffix == ".json" or file.suffix == ".jinja":
            shutil.copy(file, folder)
    (folder / "model.safetensors").symlink_to(TINY["tiny"] / "model.safetensors")


def read_model(folder):
    Checkpoint.load(folder, device="cpu")


# -- what vlmfix wrote


def ask(folder, *, fails=None):
    out, questions = folder / "out", job.Questions.text("What?")
    job.run(images(folder), out, questions=questions, settings=Settings(), loader=FakeVLM(fails=fails).load)


def answers(folder):
    (images(folder) / "broken.png").write_bytes(b"broken")
    ask(folder)


def died(folder):
    """A run whose process died with two pictures in hand."""
    answers(folder)
    path = folder / "out" / "answers.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    lines(folder / "out" / BEGUN, {"begun": ["0000.png", "0001.png", "0002.png"]}, {"apart": ["0002.png"]})


def reproduce(folder):
    run_again(folder / "out", folder / "again", loader=FakeVLM().load)


def look(folder):
    page_of(read_sheet([folder / "out"]), 10)


def workload(folder):
    pope_questions(folder)
    return pope.read(folder / "random.json", images(folder))


def evaluation(folder):
    evaluate_in(folder)
    score(read_run(folder / "out"))


def evaluate_in(folder):
    work, arms = workload(folder), {"vcd": parse("vcd")}
    return evaluate(folder / "out", pope.Pope(), work, Settings(max_new_tokens=1), arms, loader=FakeVLM().load)


def read_evaluation(folder):
    compare([score(read_run(folder / "out"))], draws=1000)


def reproduce_evaluation(folder):
    evaluate_again(read_run(folder / "out"), folder / "again", loader=FakeVLM().load)


def search(folder):
    tune(folder / "out", Fake(), budget=2)


def drawn(folder):
    world.make(folder, count=1, seed=0)


RUN = ("out/run.json", "out/answers.jsonl", "out/failed.jsonl")
EVALUATION = ("out/card.json", "out/samples.jsonl", "out/greedy/answers.jsonl", "out/vcd/answers.jsonl")
ANNOTATIONS = ("instances.json", "captions.json", "list.txt")
AMBER = ("annotations.json", "query/query_all.json", "relation.json", "safe_words.txt")
MODEL = ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")

FORMATS = {
    format.name: format
    for format in (
        Format("prompts", prompts, lambda folder: job.Questions.file(folder / "asked.csv"), ("asked.csv",)),
        Format(
            "POPE",
            pope_questions,
            lambda folder: check(pope.read(folder, images(folder))),
            ("random.json", "popular.json"),
            suite=120,
        ),
        Format("CHAIR", annotations, read_chair, ANNOTATIONS, suite=120),
        Format("AMBER", amber_files, read_amber, AMBER),
        Format(
            "MME",
            mme_files,
            lambda folder: check(mme.read(folder, images(folder))),
            ("existence/0000.txt", "count.txt"),
        ),
        Format("HallusionBench", hallusion_files, read_hallusion, ("HallusionBench.json", "judged.json")),
        Format("CLIPScore", clipscore_files, read_clipscore, ("captions.json", "list.txt")),
        Format("synonyms", synonyms, read_synonyms, ("synonyms.txt",)),
        Format("recipe", recipe, read_decoder, ("recipe.toml",), suite=120),
        Format("head profiles", profiles, read_profiles, ("heads.safetensors",)),
        Format("directions", directions, read_directions, ("directions.safetensors",)),
        Format("model", model, read_model, (*MODEL, "chat_template.jinja"), suite=12),
        Format("run", answers, ask, RUN, writes=True, suite=100),
        Format("run that died", died, ask, (f"out/{BEGUN}",), writes=True, suite=30),
        Format("run, again", answers, reproduce, RUN),
        Format("run, looked at", answers, look, RUN, suite=30),
        Format("evaluation", evaluation, evaluate_in, EVALUATION, writes=True),
        Format("evaluation, scored", evaluation, read_evaluation, EVALUATION, writes=True, suite=30),
        Format("evaluation, again", evaluation, reproduce_evaluation, EVALUATION, suite=30),
        Format("evaluation, looked at", evaluation, look, EVALUATION, suite=30),
        Format("search", search, search, ("out/tune.json", "out/trials.jsonl"), writes=True, suite=30),
        Format("world", drawn, drawn, ("world.json",), writes=True),
    )
}
