import psutil
import pytest
import torch

from vlmfix import card
from vlmfix.attention.edit import LayerSet
from vlmfix.errors import DataError


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


def test_profiles_of_heads_are_no_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    first = card.weights_digest(str(tmp_path), None)
    (tmp_path / "heads.safetensors").write_bytes(b"2")
    assert card.weights_digest(str(tmp_path), None) == first


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no weight files"):
        card.weights_digest(str(tmp_path), None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (0.5, 0.5), (True, True), ("a", "a"), ((1, 2), "1/2"), (LayerSet("2:-1"), "2:-1")],
)
def test_parameters_become_plain(value, expected):
    assert card.plain(value) == expected
