import hashlib
import json

import psutil
import pytest
import torch

from vlmfix import card
from vlmfix.attention.edit import LayerSet
from vlmfix.errors import DataError, UsageError
from vlmfix.language.parameters import plain


def test_versions_name_what_answers_depend_on():
    versions = card.versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"vlmfix", "python", "transformers"} < set(versions)


def test_a_package_under_another_name_has_no_version(monkeypatch):
    monkeypatch.setattr(card, "PACKAGES", ("torch", "opencv-python-under-another-name"))
    versions = card.versions()
    assert versions["opencv-python-under-another-name"] is None
    assert versions["torch"]


def test_machine_and_memory():
    facts = card.machine()
    assert facts["memory"] == psutil.virtual_memory().total
    assert len(facts["gpus"]) == torch.cuda.device_count()
    cpu = torch.device("cpu")
    assert 0 < card.free_memory(cpu) < facts["memory"]
    assert 10**7 < card.peak_memory(cpu) < facts["memory"]
    assert card.device_name(cpu) == "cpu"


def test_weights_of_the_hub_are_its_commit(tmp_path):
    assert card.weights_digest("org/model", "1234") == "commit:1234"


def test_weights_of_a_folder_are_told_apart(tmp_path):
    def digest(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.safetensors").write_bytes(content)
        (folder / "README.md").write_text(str(files))
        return card.weights_digest(str(folder), None)

    first = digest(a=b"1", b=b"2")
    assert first.startswith("sha256:")
    assert digest(a=b"1", b=b"2") == first
    assert len({first, digest(a=b"12", b=b""), digest(a=b"2", b=b"1"), digest(a=b"1"), digest(a=b"1", c=b"2")}) == 5


def test_changed_weights_are_read_again(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"1")
    first = card.weights_digest(str(tmp_path), None)
    path.write_bytes(b"2")
    assert card.weights_digest(str(tmp_path), None) != first


def test_profiles_of_heads_and_directions_are_no_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    first = card.weights_digest(str(tmp_path), None)
    for name in ("heads.safetensors", "directions.safetensors"):
        (tmp_path / name).write_bytes(b"2")
    assert card.weights_digest(str(tmp_path), None) == first


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no weight files"):
        card.weights_digest(str(tmp_path), None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (0.5, 0.5), (True, True), ("a", "a"), ((1, 2), "1/2"), (LayerSet("2:-1"), "2:-1")],
)
def test_parameters_become_plain(value, expected):
    assert plain(value) == expected


@pytest.fixture
def model(tmp_path):
    """A folder with files of every kind that transformers reads, and some that it does not."""
    folder = tmp_path / "model"
    for name in READ:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "parts/1.safetensors"}}))
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "quantized/model.safetensors"}))
    for name in ("README.md", "heads.safetensors", "directions.safetensors", ".model.safetensors.new", "training.log"):
        (folder / name).write_text("x")
    return folder


READ = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "parts/1.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "pytorch_model.bin",
    "quantized/model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)


def test_the_files_of_a_model_are_those_that_transformers_reads(model):
    found = card.model_files(str(model), None)
    assert tuple(found) == READ
    assert found["merges.txt"] == f"sha256:{hashlib.sha256(b'content of merges.txt').hexdigest()}"
    assert card.model_files(str(model), "1234") == {}  # the commit says it
    assert set(card.model_files("tiny", None)) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def noted(folder):
    return {
        "commit": None,
        "weights": card.weights_digest(str(folder), None),
        "files": card.model_files(str(folder), None),
    }


@pytest.mark.parametrize("name", READ)
def test_a_file_that_was_changed_is_named(model, name):
    before = noted(model)
    card.refuse_other_model(str(model), before)
    text = (model / name).read_text()
    (model / name).write_text(f" {text}")
    with pytest.raises(DataError, match=r"weights" if "safetensors" in name[-11:] else rf"{name} was changed \("):
        card.refuse_other_model(str(model), before)


def test_files_that_came_and_went_are_named(model):
    before = noted(model)
    (model / "chat_template.json").rename(model / "other.json")
    with pytest.raises(DataError, match=r": chat_template\.json is gone, other\.json is new \("):
        card.refuse_other_model(str(model), before)


def test_swapped_files_are_others(model):
    before = noted(model)
    (model / "vocab.json").rename(model / "x")
    (model / "merges.txt").rename(model / "vocab.json")
    (model / "x").rename(model / "merges.txt")
    with pytest.raises(DataError, match=r"merges\.txt was changed, vocab\.json was changed"):
        card.refuse_other_model(str(model), before)


def test_a_link_counts_as_what_it_leads_to(model, tmp_path):
    (tmp_path / "elsewhere").write_text("first")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    before = noted(model)
    (tmp_path / "elsewhere").write_text("other")
    assert noted(model)["files"]["model.safetensors"] != before["files"]["model.safetensors"]
    assert noted(model)["weights"] != before["weights"]


def test_an_index_that_points_to_other_shards_gives_other_weights(model):
    before = noted(model)
    (model / "parts" / "2.safetensors").write_text("content of parts/1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "parts/2.safetensors"}}))
    after = noted(model)
    assert after["weights"] != before["weights"]
    assert "parts/2.safetensors" in after["files"]


def test_shards_outside_of_the_folder_count_too(model, tmp_path):
    (tmp_path / "far.safetensors").write_text("1")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../far.safetensors"}}))
    before = noted(model)
    (tmp_path / "far.safetensors").write_text("2")
    assert noted(model)["files"]["../far.safetensors"] != before["files"]["../far.safetensors"]


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', "[" * 100_000])
def test_an_index_that_is_none_is_no_error_of_the_digest(model, text):
    (model / "model.safetensors.index.json").write_text(text)
    assert "parts/1.safetensors" not in noted(model)["files"]


def test_one_name_with_line_breaks_does_not_pass_for_two(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "a.safetensors").write_text("1")
    (first / "b.safetensors").write_text("2")
    middle = hashlib.sha256(b"1").hexdigest()
    (second / f"a.safetensors\n{middle}\nb.safetensors").write_text("2")
    assert card.weights_digest(str(first), None) != card.weights_digest(str(second), None)


def test_weights_of_an_ordinary_folder_keep_the_digest_of_earlier_versions(tmp_path):
    (tmp_path / "a.safetensors").write_text("1")
    line = f"a.safetensors\n{hashlib.sha256(b'1').hexdigest()}\n"
    assert card.weights_digest(str(tmp_path), None) == f"sha256:{hashlib.sha256(line.encode()).hexdigest()}"


def test_a_card_of_an_earlier_version_is_compared_by_its_weights(model):
    before = noted(model)
    del before["files"]
    (model / "generation_config.json").write_text("{}")
    card.refuse_other_model(str(model), before)
    with pytest.raises(UsageError, match="earlier vlmfix"):
        card.refuse_older_card(model, before)


def test_what_a_reader_must_know_of_a_checkpoint():
    assert card.reading_notes(None) == []
    assert card.reading_notes({"ends": [2], "set_aside": {}, "completed": {}}) == []
    told = card.reading_notes(
        {"ends": [], "set_aside": {"repetition_penalty": 1.05, "do_sample": True}, "completed": {"patch_size": 14}}
    )
    assert told == [
        "Generation settings of the checkpoint that do not act: repetition_penalty 1.05, do_sample True.",
        "What the checkpoint's files leave out was taken from its other files: patch_size 14.",
        "The checkpoint names no end token: every answer has the longest length that is allowed.",
    ]


@pytest.mark.parametrize("spec", ["", "vdc", "vcd:contrast=99"])
def test_a_decoder_that_is_not_understood_is_told_with_its_run(spec):
    with pytest.raises(DataError, match=r"^the run out: ") as found:
        card.decoder_again("the run out", spec, None)
    assert found.value.hint
    assert card.decoder_again("the run out", "vcd", None).name == "vcd"
