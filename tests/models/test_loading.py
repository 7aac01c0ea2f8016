"""Folders whose files do not fit: one sentence with the file that is at fault, and no code of theirs is run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.embedded import TINY
from tests.tiny import tiny_vlm
from vlmfix.errors import DataError, SystematicError, UnsupportedModelError, UsageError
from vlmfix.generation import VLM, load, wrap

PICTURE = Image.new("RGB", (90, 60), "red")


def linked(name: str, place: Path) -> Path:
    """A copy of an embedded model whose weights are a link."""
    folder = place / "model"
    folder.mkdir()
    for path in TINY[name].iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded LLaVA."""
    return linked("tiny", tmp_path)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A copy of the embedded Qwen."""
    return linked("tiny-qwen", tmp_path)


def changed(folder: Path, name: str, entries: dict[str, Any]) -> Path:
    """Sets entries of a JSON file of the folder by dotted names; ``...`` takes one out."""
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    for entry, value in entries.items():
        *parts, last = entry.split(".")
        place = document
        for part in parts:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(document))
    return folder


def refused(folder: Path, kind: type[Exception] | tuple[type[Exception], ...] = (DataError, SystematicError)) -> str:
    """What loading says; on one line, and not longer than a line can be read."""
    with pytest.raises(kind) as caught:
        load(str(folder), device="cpu")
    said = str(caught.value).replace(str(folder), "MODEL")
    assert "\n" not in said
    assert len(said) < 700
    return said


CONFIG = {
    "text_config.hidden_size": (128, "weights do not fit its config.json (text_config): "),
    "text_config.vocab_size": (
        100,
        "embed_tokens.weight is 704 x 256 in the weights and 100 x 256 by the configuration",
    ),
    "text_config.num_key_value_heads": (8, "k_proj.weight is 128 x 256 in the weights and 256 x 256"),
    "text_config.num_hidden_layers": (5, "weights do not fit its config.json (text_config.num_hidden_layers): "),
    "text_config": (None, "weights do not fit its config.json, which describes a model of "),
    "vision_config": (7, "config.json (vision_config is 7): "),
    "vision_config.hidden_size": (112, "linear_1.weight is 256 x 224 in the weights and 256 x 112 by"),
    "vision_config.num_attention_heads": (0, "config.json (vision_config.num_attention_heads is 0): "),
    "image_seq_length": (None, "config.json (image_seq_length is null): "),
    "tie_word_embeddings": (None, "config.json (tie_word_embeddings is null): "),
    "text_config.rms_norm_eps": ("x", 'config.json (text_config.rms_norm_eps is "x"): '),
    "text_config.head_dim": (-1, "config.json (text_config.head_dim is -1): "),
    "text_config.hidden_act": ("nothing", 'config.json (text_config.hidden_act is "nothing"): '),
    "dtype": ("x", 'config.json (dtype is "x"): '),
    "text_config.dtype": ([], "config.json (text_config.dtype is []): "),
    "text_config.model_type": ("x", "cannot load model 'MODEL': config.json"),
    "vision_feature_layer": (40, "MODEL cannot take a picture in: IndexError"),
    "image_token_index": (5, "it writes 0 image tokens for a picture that becomes 256"),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, "weights: "),
}


@pytest.mark.parametrize("entry", CONFIG)
def test_an_entry_of_config_that_does_not_fit_is_named(folder: Path, entry: str) -> None:
    value, said = CONFIG[entry]
    assert said in refused(changed(folder, "config.json", {entry: value}))


def test_layers_without_end_are_not_made(folder: Path) -> None:
    said = refused(changed(folder, "config.json", {"text_config.num_hidden_layers": 10**9}))
    assert "config.json: text_config.num_hidden_layers is 1000000000" in said


OTHERS = {
    "processor_config.json": [
        ({"image_processor": 5}, "one of processor_config.json, tokenizer_config.json: "),
        ({"image_processor.image_mean": None}, "cannot take a picture in (image_mean is None): "),
        (
            {"image_processor.size": {"shortest_edge": 64}, "image_processor.crop_size": {"height": 64, "width": 64}},
            "64",
        ),
        ({"num_additional_image_tokens": 3}, "does not fit its model: it writes 258 image tokens for a picture that"),
        ({"patch_size": 4}, "does not fit its model: row 0 has 1024 image tokens but its pictures fill 256"),
        ({"image_processor.do_center_crop": False}, "cannot take a picture in: "),
        ({"processor_class": "Unheard"}, "make a TokenizersBackend and no processor"),
    ],
    "tokenizer_config.json": [
        ({"pad_token": 5}, "tokenizer.json, tokenizer_config.json: "),
        ({"image_token": "x"}, "MODEL"),
    ],
    "generation_config.json": [
        (
            {"eos_token_id": 704},
            "generation_config.json: eos_token_id 704 is no token of the model, which has 0 to 703",
        ),
        ({"eos_token_id": [2, "x"]}, "generation_config.json: eos_token_id 'x' is no token"),
        ({"pad_token_id": 5000}, "generation_config.json: pad_token_id 5000 is no token"),
        ({"pad_token_id": "x"}, "generation_config.json: TypeError"),
        ({"early_stopping": "x"}, "generation_config.json: "),
    ],
}


@pytest.mark.parametrize(
    ("name", "entries", "said"), [(name, *case) for name, cases in OTHERS.items() for case in cases], ids=str
)
def test_an_entry_of_another_file_that_does_not_fit_is_named(
    folder: Path, name: str, entries: dict[str, Any], said: str
) -> None:
    assert said in refused(changed(folder, name, entries))


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", '{"version": 5}'])
def test_a_damaged_file_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert name in refused(folder) or (name, text) == ("processor_config.json", '{"version": 5}')


def test_a_tokenizer_that_panics_is_refused_like_any_other(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["post_processor"]["single"][0]["SpecialToken"]["id"] = "x"
    path.write_text(json.dumps(document))
    assert "a tokenizer or another reader gave up: no entry found for key" in refused(folder)


def test_entries_of_qwen_are_named_too(qwen: Path) -> None:
    assert "config.json (vision_config.depth is null)" in refused(
        changed(qwen, "config.json", {"vision_config.depth": None})
    )
    changed(qwen, "config.json", {"vision_config.depth": 10**7})
    assert "vision_config.depth is 10000000" in refused(qwen)


def test_an_adapter_is_not_loaded_without_its_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    assert "holds an adapter (adapter_config.json)" in refused(folder)


def test_fewer_layers_than_the_weights_have_are_not_taken(folder: Path) -> None:
    said = refused(changed(folder, "config.json", {"text_config.num_hidden_layers": 5}))
    assert "language_model.layers.5.input_layernorm.weight has no place in it" in said


MARK = "import os\nopen(os.environ['VLMFIX_MARK'], 'w').write('x')\n"
CODE: dict[str, Callable[[Path], Path]] = {
    "a processor": lambda folder: changed(
        changed(folder, "processor_config.json", {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}),
        "tokenizer_config.json",
        {"processor_class": "Own"},
    ),
    "an image processor": lambda folder: changed(
        folder,
        "processor_config.json",
        {
            "image_processor.image_processor_type": "Own",
            "image_processor.auto_map": {"AutoImageProcessor": "own.Own"},
            "auto_map": {"AutoImageProcessor": "own.Own"},
        },
    ),
    "a configuration of another type": lambda folder: changed(
        folder, "config.json", {"text_config.model_type": "own", "text_config.auto_map": {"AutoConfig": "own.Own"}}
    ),
}
BESIDE: dict[str, Callable[[Path], Path]] = {
    "a configuration": lambda folder: changed(folder, "config.json", {"auto_map": {"AutoConfig": "own.Own"}}),
    "a model": lambda folder: changed(
        folder, "config.json", {"auto_map": {"AutoModelForImageTextToText": "own.Own", "AutoModel": "own.Own"}}
    ),
    "a tokenizer": lambda folder: changed(
        folder, "tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    ),
    "generate": lambda folder: changed(folder, "generation_config.json", {"custom_generate": "own.py"}),
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What code of a folder would write; whoever asks a question on standard input fails."""

    def asked(*_: object) -> str:
        pytest.fail("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setenv("VLMFIX_MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


def with_code(folder: Path) -> Path:
    (folder / "custom_generate").mkdir()
    inside = MARK.replace("\n", "\n    ")
    for path in (folder / "own.py", folder / "custom_generate" / "generate.py"):
        path.write_text(f"{MARK}class Own:\n    pass\ndef generate(model, **kwargs):\n    {inside}\n")
    return folder


@pytest.mark.parametrize("what", CODE)
def test_code_that_a_checkpoint_needs_is_not_run(folder: Path, mark: Path, what: str) -> None:
    said = refused(CODE[what](with_code(folder)))
    # of a part of the configuration, transformers does not even look for code
    assert "needs Python code of its own, which vlmfix does not run" in said or "config.json" in said
    assert not mark.exists()


@pytest.mark.parametrize("what", BESIDE)
def test_code_beside_what_transformers_has_is_not_run(folder: Path, mark: Path, what: str) -> None:
    vlm = load(str(BESIDE[what](with_code(folder))), device="cpu")
    assert vlm.generate([PICTURE], "what is it", max_new_tokens=1)
    assert not mark.exists()


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("named", ["eager", "owner/kernel"])
def test_a_configuration_does_not_choose_whose_attention_is_run(folder: Path, entry: str, named: str) -> None:
    vlm = load(str(changed(folder, "config.json", {entry: named})), device="cpu")
    own = {module.config._attn_implementation for module in vlm.family.attention_modules(vlm.model)}  # type: ignore[union-attr]
    assert own == {"sdpa"}


def test_the_attention_that_is_asked_for_answers_the_same(folder: Path) -> None:
    eager, plain = (load(folder, device="cpu", attention=name) for name in ("eager", None))
    picture = Image.effect_noise((60, 60), 90)
    for decoder in ("greedy", "vcd:plausibility=0", "spin:kept_share=0.5"):
        first, second = (
            vlm.generate([picture] * 2, ["a dog?", "?"], decoder=decoder, max_new_tokens=12) for vlm in (eager, plain)
        )
        assert [answer.ids for answer in first] == [answer.ids for answer in second]
        own = {module.config._attn_implementation for module in eager.family.attention_modules(eager.model)}  # type: ignore[union-attr]
        assert own == {"eager"}
    for name, said in (
        ("slow", "unknown attention 'slow'"),
        ("flash", "takes no masks"),
        ("flash_attention_2", "'flash_attention_2' is not used"),
    ):
        with pytest.raises(UsageError, match=said):
            load(folder, attention=name)


def test_pickled_weights_run_no_code(folder: Path, mark: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (MARK,)

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load(str(folder), device="cpu").generate([PICTURE], "what", max_new_tokens=1)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil(), "b": bytes(8_000_000)}))
    assert "weights: " in refused(folder)
    torch.save({**weights, "a": Evil()}, folder / "pytorch_model.bin")
    assert "weights: " in refused(folder)
    assert not mark.exists()


OLDER = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@pytest.mark.parametrize("gone", [OLDER, *((name,) for name in OLDER), OLDER[:2], OLDER[1:]], ids="+".join)
def test_what_older_processors_do_not_say_is_taken_from_the_model(folder: Path, gone: tuple[str, ...]) -> None:
    expected = load("tiny", device="cpu").generate([PICTURE], "what is it", max_new_tokens=3)[0].ids
    vlm = load(str(changed(folder, "processor_config.json", dict.fromkeys(gone, ...))), device="cpu")
    all_of_them = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    assert vlm.reading["completed"] == {name: all_of_them[name] for name in OLDER if name in gone}
    assert vlm.generate([PICTURE], "what is it", max_new_tokens=3)[0].ids == expected


def test_a_strategy_that_keeps_the_class_token_is_completed_too(tmp_path: Path) -> None:
    tiny = tiny_vlm("llava")
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    changed(tmp_path, "config.json", {"vision_feature_select_strategy": "full"})
    changed(tmp_path, "processor_config.json", dict.fromkeys(OLDER, None))
    changed(tmp_path, "processor_config.json", {"num_additional_image_tokens": ...})
    vlm = load(str(tmp_path), device="cpu")
    assert vlm.reading["completed"]["vision_feature_select_strategy"] == "full"
    assert vlm.layout(vlm.encode(["?"], [[PICTURE]])).tokens.any()


def test_a_processor_of_ones_own_is_completed_and_left_as_it_was() -> None:
    tiny = load("tiny", device="cpu")
    own = copy(tiny.processor)
    own.patch_size = own.vision_feature_select_strategy = None
    vlm = wrap(tiny.model, own)
    assert vlm.reading["completed"] == {"patch_size": 8, "vision_feature_select_strategy": "default"}
    assert own.patch_size is None
    question = ([PICTURE], "what is it")
    assert vlm.generate(*question, max_new_tokens=4)[0].ids == tiny.generate(*question, max_new_tokens=4)[0].ids


@pytest.mark.parametrize("entry", ["return_dict", "text_config.return_dict", "vision_config.return_dict"])
def test_a_configuration_that_asks_for_tuples_is_read_all_the_same(folder: Path, entry: str) -> None:
    vlm = load(str(changed(folder, "config.json", {entry: False})), device="cpu")
    for decoder in ("vcd", "sgrs:draw=greedy"):
        assert vlm.generate([PICTURE], "what", decoder=decoder, max_new_tokens=1)[0].tokens


TEMPLATES: dict[str, Callable[[Path, str], object]] = {
    "chat_template.json": lambda folder, text: changed(folder, "chat_template.json", {"chat_template": text}),
    "processor_config.json": lambda folder, text: changed(folder, "processor_config.json", {"chat_template": text}),
    "tokenizer_config.json": lambda folder, text: changed(folder, "tokenizer_config.json", {"chat_template": text}),
    "several in tokenizer_config.json": lambda folder, text: changed(
        folder,
        "tokenizer_config.json",
        {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": text}]},
    ),
    "one of several files": lambda folder, text: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "rag.jinja").write_text("no"),
        (folder / "chat_template.jinja").write_text(text),
    ),
}


unclosed = pytest.mark.filterwarnings("ignore:.*unclosed file|.*rag.jinja|.*tools.jinja")
"""transformers reads named templates through files that it leaves open."""


@unclosed
@pytest.mark.parametrize("place", TEMPLATES)
def test_a_chat_template_is_found_wherever_it_stands(folder: Path, place: str) -> None:
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    TEMPLATES[place](folder, text)
    vlm = load(str(folder), device="cpu")
    assert vlm.render("what?", 1, system="be short") == load("tiny", device="cpu").render("what?", 1, system="be short")


@unclosed
def test_templates_without_a_default_are_listed(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").rename(folder / "additional_chat_templates" / "rag.jinja")
    (folder / "additional_chat_templates" / "tools.jinja").write_text("no")
    said = refused(folder, UnsupportedModelError)
    assert "has the chat templates rag, tools and none is called default" in said
    assert "chat_template.jinja" in said


def test_without_a_template_a_model_is_loaded_and_says_what_to_do_when_it_is_asked(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    vlm = load(str(folder), device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"no chat template, .*put chat_template\.jinja") as caught:
        vlm.generate([PICTURE], "what")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0]['content'] + 'x' }}", "the chat template of MODEL fails: "),
        ("{% for", "the chat template of MODEL fails: "),
        ("{{ ''.__class__.__mro__ }}", "the chat template of MODEL fails: "),
        ("{{ raise_exception('not you') }}", "the chat template of MODEL fails: "),
        ("no picture here", "the chat template of MODEL writes nothing where a picture stands"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "takes more than 1000000 steps",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the chat template of MODEL fails: "),
        ("<image>{{ 'x' * 1000000 }}", "the chat template of MODEL makes 1000007 characters of a question of 1"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(folder: Path, template: str, said: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert said in refused(folder, (DataError, UnsupportedModelError))


def test_missing_special_tokens_are_taken_from_the_tokenizer(folder: Path) -> None:
    changed(folder, "generation_config.json", {"eos_token_id": None, "pad_token_id": ...})
    changed(folder, "tokenizer_config.json", {"pad_token": None})
    vlm = load(str(folder), device="cpu")
    assert vlm.reading["ends"] == [2]
    assert vlm.reading["completed"] == {"eos_token_id": 2, "pad_token": "</s>", "pad_token_id": 2}
    assert both(vlm) == both(load("tiny", device="cpu"))


def test_the_image_token_does_not_pad(folder: Path) -> None:
    changed(folder, "generation_config.json", {"pad_token_id": 3})
    vlm = load(str(changed(folder, "tokenizer_config.json", {"pad_token": "<image>"})), device="cpu")
    assert vlm.reading["completed"] == {"pad_token": "</s>", "pad_token_id": 2}
    assert both(vlm) == both(load("tiny", device="cpu"))


def test_a_new_padding_token_that_the_model_has_no_embedding_of_does_not_pad(folder: Path) -> None:
    tokenizer = load("tiny", device="cpu").processor.tokenizer
    tokenizer.add_tokens([f"<{number}>" for number in range(60)])
    tokenizer.pad_token = "<59>"
    tokenizer.save_pretrained(folder)
    vlm = load(str(folder), device="cpu")
    assert vlm.reading["completed"] == {"pad_token": "</s>"}
    assert both(vlm) == both(load("tiny", device="cpu"))


def both(vlm: VLM) -> list[tuple[int, ...]]:
    """Two answers of a padded batch, one of which ends before the other."""
    prompts = ["Is there a dog in the picture? Please answer yes or no.", "Please describe this image in detail."]
    return [answer.ids for answer in vlm.generate([PICTURE, PICTURE], prompts, max_new_tokens=6)]


@pytest.mark.parametrize(
    "place", ["loading.AutoModelForImageTextToText.from_pretrained", "checkpoint.features.encoded"]
)
def test_a_lack_of_memory_is_no_fault_of_the_files(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(f"vlmfix.models.{place}", full)
    with pytest.raises(DataError, match=r"out of memory.*--dtype bfloat16"):
        load("tiny", device="cpu")


def test_weights_under_another_name_are_not_taken_for_those_of_the_model(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({f"x.{name}": value for name, value in weights.items()}, folder / "model.safetensors")
    assert "lacks " in refused(folder)
