"""A model over several devices, and with quantized weights: what transformers is told, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.decoding.again import recording_on_cpu
from tests.jobs.fake import FakeVLM, draw
from vlmfix.errors import DataError, UsageError
from vlmfix.generation import load
from vlmfix.jobs.folder import Questions, run
from vlmfix.jobs.folder.reproduce import reproduce
from vlmfix.models import quantization as made
from vlmfix.models.quantization import check_quantize, quantization
from vlmfix.records import read_json
from vlmfix.settings import Settings

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
PICTURE = Image.new("RGB", (90, 60), "red")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"device_map": "balanced"}, "unknown device_map 'balanced'"),
        ({"device_map": "auto", "device": "cpu"}, "device_map=auto and device=cpu are both given"),
        ({"quantize": "int3"}, "unknown quantization 'int3'"),
        ({"quantize": "int4", "device": "cpu"}, "quantize=int4 needs a CUDA GPU, and the device is cpu"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load("tiny", **how)  # type: ignore[arg-type]


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="quantize=int8 needs the package bitsandbytes") as refused:
        check_quantize("int8", GPU)
    assert refused.value.hint == "install it: pip install bitsandbytes"
    check_quantize(None, CPU)
    monkeypatch.setattr(made, "find_spec", lambda name: SimpleNamespace())
    check_quantize("int8", GPU)


def test_what_transformers_is_told() -> None:
    plain = SimpleNamespace(dtype=torch.float16)
    assert quantization("int8", plain, "auto").load_in_8bit
    for dtype, expected in (("auto", torch.float16), (torch.bfloat16, torch.bfloat16)):
        told = quantization("int4", plain, dtype)
        assert (told.load_in_4bit, told.bnb_4bit_quant_type, told.bnb_4bit_compute_dtype) == (True, "nf4", expected)
    with pytest.raises(UsageError, match="the checkpoint is quantized already"):
        quantization("int4", SimpleNamespace(quantization_config={"bits": 4}), "auto")


def test_steps_of_matrices_that_ask_the_host_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {name: quantization(name, SimpleNamespace(dtype=torch.float16), "auto") for name in ("int8", "int4")}
    models = {name: SimpleNamespace(config=SimpleNamespace(quantization_config=one)) for name, one in told.items()}
    assert {name: made.waits_for_the_host(model) for name, model in models.items()} == {"int8": True, "int4": False}
    vlm = load("tiny")
    assert not made.waits_for_the_host(vlm.model)
    with recording_on_cpu([vlm]) as recordings:
        vlm.generate([PICTURE], "What is there?", max_new_tokens=6)
        assert recordings
        monkeypatch.setattr("vlmfix.decoding.running.waits_for_the_host", lambda model: True)
        recordings.clear()
        vlm.generate([PICTURE], "What is there?", max_new_tokens=6)
        assert not recordings


def test_it_is_told_when_the_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def from_pretrained(path: str, **how: object) -> None:
        told.append(how)
        raise ValueError("enough")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr("vlmfix.models.checkpoint.check_quantize", lambda name, place: None)
    for how in ({}, {"quantize": "int4"}, {"device_map": "auto"}):
        with pytest.raises(DataError, match="enough"):
            load("tiny", **how)  # type: ignore[arg-type]
    plain, quantized, spread = told
    assert "quantization_config" not in plain
    assert quantized["quantization_config"].load_in_4bit
    assert (plain["device_map"], quantized["device_map"], spread["device_map"]) == (CPU, CPU, "auto")


def test_a_model_that_is_spread_answers_as_on_one_device() -> None:
    spread, one = load("tiny", device_map="auto"), load("tiny")
    answers = [vlm.generate([PICTURE], "What is there?", max_new_tokens=6)[0].ids for vlm in (spread, one)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["device_map", "quantize"])
def test_a_run_with_another_value_is_another_run_and_is_made_again_with_its_own(tmp_path, name) -> None:
    value = {"device_map": "auto", "quantize": "int8"}[name]
    pictures, out, asked = draw(tmp_path / "in", 1), tmp_path / "out", []

    def loader(model, **how):
        asked.append(how[name])
        return FakeVLM().load(model, **how)

    how = {"questions": Questions.text("What?"), "loader": loader}
    run(pictures, out, settings=Settings(**{name: value}), **how)
    assert read_json(out / "run.json")["settings"][name] == value
    with pytest.raises(UsageError, match=f"{name} was '{value}', now None|{name} was {value}, now None"):
        run(pictures, out, settings=Settings(), **how)
    assert reproduce(out, tmp_path / "again", loader=loader).other == ()
    assert asked == [value, value]


def test_the_command_line_hands_both_on(vlmfix, tmp_path) -> None:
    pictures, out = draw(tmp_path / "in", 1), tmp_path / "out"
    code, _, told = vlmfix("run", pictures, "--out", out, "--quantize", "int4", "--device", "cpu")
    assert (code, "quantize=int4 needs a CUDA GPU" in told) == (2, True)
    code, _, told = vlmfix("ask", pictures / "0000.png", "What?", "--device-map", "auto", "--device", "cpu")
    assert (code, "device_map=auto and device=cpu are both given" in told) == (2, True)
    code, _, told = vlmfix("run", pictures, "--out", out, "--devices", "cpu", "--device-map", "auto")
    assert (code, "--device-map spreads a model" in told) == (2, True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:inner dimension")  # bitsandbytes has its fast kernels for widths of real models
@pytest.mark.parametrize("decoder", ["greedy", "vcd", "spin"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_weights_answer(name: str, decoder: str) -> None:
    pytest.importorskip("bitsandbytes")
    vlm = load("tiny", device="cuda", dtype="bfloat16", quantize=name)
    plain = load("tiny", device="cuda", dtype="bfloat16")
    sizes = [sum(weight.numel() * weight.itemsize for weight in one.model.parameters()) for one in (vlm, plain)]
    assert sizes[0] < 0.8 * sizes[1]
    answers = vlm.generate([PICTURE, PICTURE], ["What is there?", "Why?"], decoder=decoder, max_new_tokens=12)
    assert all(answer.tokens and answer.finish != "nan" for answer in answers)


@pytest.mark.gpu
def test_a_model_spread_over_gpus_answers_as_on_one() -> None:
    spread, one = load("tiny", device_map="auto", dtype="float32"), load("tiny", device="cuda", dtype="float32")
    answers = [vlm.generate([PICTURE], "What is there?", max_new_tokens=12)[0].ids for vlm in (spread, one)]
    assert answers[0] == answers[1]
