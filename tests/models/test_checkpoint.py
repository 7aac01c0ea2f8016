"""Loading: what is refused, and how it is said. Loading what works is in ``test_inputs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import saved, tiny_vlm
from vlmfix.errors import DataError, UnsupportedModelError, UsageError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.families import HOMES, families, family_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_vlm("llava"), tmp_path)


@pytest.mark.parametrize("name", ["/no/such/model", "./no-such-model", "no/such/model"])
def test_a_path_without_a_directory_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(DataError, match=f"there is no directory '{name}'") as caught:
        Checkpoint.load(name, device="cpu")
    assert "config.json" in caught.value.hint
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_an_unknown_hub_id_is_one_line(name: str) -> None:
    with pytest.raises(DataError, match=f"cannot load model '{name}'") as caught:
        Checkpoint.load(name, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "no_such_type"])
def test_an_unknown_family_gets_the_list_of_known_ones(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModelError, match=f"'{kind}'") as caught:
        Checkpoint.load(tmp_path, device="cpu")
    assert all(served in caught.value.hint for served in HOMES)


@pytest.mark.parametrize("text", [None, "{}", '{"model_type'])
def test_a_directory_without_a_config_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config"):
        Checkpoint.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_broken_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{")
    with pytest.raises(DataError, match="cannot load model"):
        Checkpoint.load(folder, device="cpu")


def test_missing_weights_are_never_replaced_by_random_ones(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.1.self_attn.k_proj" in name and "vision" not in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights, .*k_proj"):
        Checkpoint.load(folder, device="cpu")


@pytest.mark.parametrize(("option", "value"), [("device", "abacus"), ("dtype", "float8")])
def test_unknown_device_or_dtype(folder: Path, option: str, value: str) -> None:
    with pytest.raises(UsageError, match=value):
        Checkpoint.load(folder, **{option: value})


def test_dtype_of_model_and_pixels_agree(folder: Path) -> None:
    vlm = Checkpoint.load(folder, device="cpu", dtype="bfloat16")
    batch = vlm.encode(["?"], [[Image.new("RGB", (40, 40))]])
    assert vlm.model.dtype == batch["pixel_values"].dtype
    assert not vlm.model.training


def test_prompts_and_pictures_pair_up() -> None:
    vlm = tiny_vlm("llava")
    for prompts, pictures in ((["a"], []), ([], []), (["a"], [[], []])):
        with pytest.raises(DataError, match="pictures and"):
            vlm.encode(prompts, pictures)


def test_every_model_type_has_one_family() -> None:
    served = [kind for family in families() for kind in family.model_types]
    assert sorted(served) == sorted(HOMES)
    assert all(kind in family_of(kind).model_types for kind in served)
