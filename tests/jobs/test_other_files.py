"""A model in a folder of one's own: a run goes on, and is made again, with the same files alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.embedded import TINY
from tests.evals.fake import Says, workload
from tests.jobs.fake import FakeVLM, draw
from vlmfix.decoders import VCD
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.record import read_run
from vlmfix.jobs.benchmark import reproduce as evals_reproduce
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.jobs.folder import Questions, run
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.records import read_json, replace_json
from vlmfix.settings import Settings

CHANGED = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)


class Local(FakeVLM):
    """It was loaded from a folder, so that no commit stands for its files."""

    revision = None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(TINY["tiny"], tmp_path / "model")


def go(folder: Path, model: Path, count: int, vlm: FakeVLM | None = None) -> dict[str, object]:
    settings = Settings(model=str(model))
    pictures, what = draw(folder / "in", count), Questions.text("What?")
    run(pictures, folder / "out", questions=what, settings=settings, batch_size=4, loader=(vlm or Local()).load)
    card: dict[str, object] = read_json(folder / "out" / "run.json")["settings"]
    return card


@pytest.mark.parametrize("name", CHANGED)
def test_a_folder_is_not_gone_on_with_when_a_file_is_another(tmp_path: Path, model: Path, name: str) -> None:
    assert set(go(tmp_path, model, 2)["files"]) == {*CHANGED, "model.safetensors"}
    go(tmp_path, model, 3)
    (model / name).write_text((model / name).read_text() + " ")
    with pytest.raises(UsageError, match=f"other settings: files.{name} was 'sha256:"):
        go(tmp_path, model, 4)


def test_a_file_that_comes_later_is_named(tmp_path: Path, model: Path) -> None:
    go(tmp_path, model, 2)
    (model / "chat_template.json").write_text("{}")
    with pytest.raises(UsageError, match=r"files\.chat_template\.json was None, now 'sha256:"):
        go(tmp_path, model, 3)


def test_a_card_of_an_earlier_version_is_not_gone_on_with(tmp_path: Path, model: Path) -> None:
    go(tmp_path, model, 2)
    path = tmp_path / "out" / "run.json"
    card = read_json(path)
    del card["settings"]["files"]
    replace_json(path, card)
    go(tmp_path, model, 2)  # nothing is left to ask
    with pytest.raises(UsageError, match="begun by an earlier vlmfix"):
        go(tmp_path, model, 3)
    del card["settings"]["checkpoint"]
    replace_json(path, card)
    vlm = Local()
    vlm.reading = {"ends": [2], "set_aside": {"repetition_penalty": 1.05}, "completed": {}}
    found = reproduce(tmp_path / "out", tmp_path / "again", loader=vlm.load)
    assert (found.answers, found.facts) == (2, {"generation.repetition_penalty": ("1.05", None)})


def test_a_run_is_not_made_again_with_another_file(tmp_path: Path, model: Path) -> None:
    go(tmp_path, model, 2)
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"are not those of the run: generation_config\.json was changed \("):
        reproduce(tmp_path / "out", tmp_path / "again", loader=Local().load)


def test_settings_that_a_model_brings_in_are_in_the_card(tmp_path: Path, model: Path) -> None:
    vlm = Local()
    vlm.reading = {"ends": [2], "set_aside": {"repetition_penalty": 1.05}, "completed": {}}
    assert go(tmp_path, model, 1, vlm)["checkpoint"] == vlm.reading


def test_an_evaluation_is_held_to_the_same(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, settings = workload(tmp_path / "in"), Settings(model=str(model))
    evaluate(tmp_path / "out", Says(), work, settings, {}, batch_size=4, loader=Local().load)
    again = tmp_path / "again"
    evals_reproduce.reproduce(read_run(tmp_path / "out"), again, loader=Local().load)
    (model / "chat_template.jinja").write_text("other")
    with pytest.raises(UsageError, match=r"files\.chat_template\.jinja was 'sha256:"):
        evaluate(tmp_path / "out", Says(), work, settings, {"vcd": VCD()}, batch_size=4, loader=Local().load)
    with pytest.raises(DataError, match=r"chat_template\.jinja was changed \("):
        evals_reproduce.reproduce(read_run(tmp_path / "out"), tmp_path / "third", loader=Local().load)
    card = read_json(tmp_path / "out" / "card.json")
    del card["files"]
    replace_json(tmp_path / "out" / "card.json", card)
    with pytest.raises(UsageError, match="begun by an earlier vlmfix"):
        evaluate(tmp_path / "out", Says(), work, settings, {"vcd": VCD()}, batch_size=4, loader=Local().load)
