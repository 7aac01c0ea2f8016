"""The model directory: any text can be said, stock transformers loads it, and the shipped one really looks."""

from __future__ import annotations

import json
import logging
import random
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

import vlmfix.world
from tools.training.checkpoint import ARCHITECTURES, build_tokenizer, save, vocabulary_texts
from tools.training.questions import DESCRIBE, exists_question
from vlmfix.world.mentions import mentions
from vlmfix.world.render import render
from vlmfix.world.scenes import Scene, scene

ASSETS = Path(vlmfix.world.__file__).parent / "assets"
SHIPPED = ("tiny", "tiny-qwen")
TEXTS = ["Is there a hot dog?", "  Ein Kätzchen — 猫 🐈\n\t<b>1234</b> O'Neill's", "", " ", "UPPER lower ünïcode\x00"]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


@cache
def words(name: str, count: int = 20) -> PreTrainedTokenizerFast:
    return build_tokenizer(ARCHITECTURES[name], vocabulary_texts(ARCHITECTURES[name], count))


def user(prompt: str | None, pictures: int) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "image"}] * pictures
    return [{"role": "user", "content": [*parts, *([] if prompt is None else [{"type": "text", "text": prompt}])]}]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_text_is_encoded_and_restored(name: str, text: str) -> None:
    ids = words(name)(text)["input_ids"]
    assert ids.count(words(name).bos_token_id) == (name == "llava")
    assert None not in ids
    assert words(name).decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("llava", "\nIs there a giraffe in the image? ASSISTANT: Yes, there is a giraffe.", 18),
        ("qwen2_5_vl", f"Is there a giraffe in the image?{ANSWER}Yes, there is a giraffe.", 20),
    ],
)
def test_a_word_of_the_world_is_one_token(name: str, text: str, count: int) -> None:
    tokens = words(name).tokenize(text)
    assert len(tokens) == count
    assert tokens.count("Ġgiraffe") == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_world_has_no_word_for_gets_no_token(name: str) -> None:
    # invented nouns would add one for every sixth scene
    assert len(words(name, 300)) - len(words(name, 150)) < 6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_special_tokens_are_read_whole_and_left_out_of_answers(name: str) -> None:
    special = ARCHITECTURES[name].special
    ids = words(name)("".join(special), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(special)
    assert words(name).decode(ids, skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("name", "prompt", "pictures", "text"),
    [
        ("llava", "Is there a cup?", 1, "USER: <image>\nIs there a cup? ASSISTANT:"),
        ("llava", " Is there a cup?\n", 2, "USER: <image>\n<image>\nIs there a cup? ASSISTANT:"),
        ("llava", "", 1, "USER: <image>\n ASSISTANT:"),
        ("llava", None, 1, "USER: <image>\n ASSISTANT:"),
        ("llava", "Is there a cup?", 0, "USER: Is there a cup? ASSISTANT:"),
        ("qwen2_5_vl", "Is there a cup?", 1, f"{SYSTEM}<|im_start|>user\n{SHOWN}Is there a cup?{ANSWER}"),
        ("qwen2_5_vl", " Is it?\n", 2, f"{SYSTEM}<|im_start|>user\n{SHOWN}{SHOWN}Is it?{ANSWER}"),
        ("qwen2_5_vl", "", 1, f"{SYSTEM}<|im_start|>user\n{SHOWN}{ANSWER}"),
        ("qwen2_5_vl", None, 1, f"{SYSTEM}<|im_start|>user\n{SHOWN}{ANSWER}"),
        ("qwen2_5_vl", "Is there a cup?", 0, f"{SYSTEM}<|im_start|>user\nIs there a cup?{ANSWER}"),
    ],
)
def test_chat_template(name: str, prompt: str | None, pictures: int, text: str) -> None:
    processor = ARCHITECTURES[name].build_processor(words(name))
    assert processor.apply_chat_template(user(prompt, pictures), add_generation_prompt=True) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava", "USER: <image>\nIs there a cup? ASSISTANT: Yes.</s>USER: Where? ASSISTANT:"),
        (
            "qwen2_5_vl",
            f"{SYSTEM}<|im_start|>user\n{SHOWN}Is there a cup?{ANSWER}Yes.<|im_end|>\n<|im_start|>user\nWhere?{ANSWER}",
        ),
    ],
)
def test_chat_template_with_an_answer(name: str, text: str) -> None:
    talk = [*user("Is there a cup?", 1), {"role": "assistant", "content": "Yes."}, *user("Where?", 0)]
    processor = ARCHITECTURES[name].build_processor(words(name))
    assert processor.apply_chat_template(talk, add_generation_prompt=True) == text


def test_a_system_message_replaces_qwens_own() -> None:
    talk = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *user("Where?", 0)]
    text = ARCHITECTURES["qwen2_5_vl"].build_processor(words("qwen2_5_vl")).apply_chat_template(talk)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_directory_loads_by_stock_classes_in_silence(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build_model(words(name), small=True).eval()
    save(tmp_path, model, ARCHITECTURES[name].build_processor(words(name)))
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            processor = AutoProcessor.from_pretrained(tmp_path)
            again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert next(model.parameters()).dtype == torch.float32  # saving in bfloat16 left the model alone
    for weight, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[weight], value.bfloat16().float())
    text = processor.apply_chat_template(user("Hi", 1), add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (90, 60)), return_tensors="pt")
    shape, count = {"llava": ((1, 3, 128, 128), 256), "qwen2_5_vl": ((4 * 54, 3 * 2 * 64), 54)}[name]
    assert inputs["pixel_values"].shape == shape
    assert int((inputs["input_ids"] == again.config.image_token_id).sum()) == count


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("llava", {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}),
        ("qwen2_5_vl", set()),
    ],
)
def test_every_weight_but_an_unused_pooling_norm_learns(name: str, unused: set[str]) -> None:
    model = ARCHITECTURES[name].build_model(words(name), small=True)
    processor = ARCHITECTURES[name].build_processor(words(name))
    text = processor.apply_chat_template([*user("Hi", 1), {"role": "assistant", "content": "Yes."}])
    inputs = processor(text=text, images=Image.new("RGB", (128, 128)), return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {name for name, value in model.named_parameters() if value.grad is None} == unused


@cache
def shipped(name: str) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    model = AutoModelForImageTextToText.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(ASSETS / name)


def say(name: str, pictures: list[Image.Image], prompts: list[str], tokens: int = 128) -> list[str]:
    """What a shipped model answers to prompts about one picture each, or about none."""
    model, processor = shipped(name)
    shown = [[picture] for picture in pictures] or None
    texts = [
        processor.apply_chat_template(user(prompt, len(pictures[:1])), add_generation_prompt=True) for prompt in prompts
    ]
    inputs = processor(text=texts, images=shown, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return [text.strip() for text in processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)]


def drawn(count: int) -> tuple[list[Scene], list[Image.Image]]:
    views = [scene(4242, index) for index in range(count)]
    return views, [Image.fromarray(canvas.permute(1, 2, 0).numpy()) for canvas in render(views)]


def recall(views: list[Scene], told: list[str]) -> float:
    hits = sum(len(set(mentions(text)) & set(view.counts())) for text, view in zip(told, views, strict=True))
    return hits / sum(len(view.counts()) for view in views)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_directory_is_small_and_readable(name: str) -> None:
    directory = ASSETS / name
    assert (directory / "model.safetensors").stat().st_size <= 16_000_000
    for file in directory.glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
        assert file.stat().st_size < 20_000
    assert "license: apache-2.0" in (directory / "README.md").read_text(encoding="utf-8")
    assert "python -m vlmfix.world.train " in (directory / "training.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_model_describes_what_is_there_and_pads_on_the_left(name: str) -> None:
    views, pictures = drawn(4)
    rng = random.Random(0)
    prompts = [rng.choice(DESCRIBE) for _ in views]
    told = say(name, pictures, prompts)
    assert told == [say(name, [picture], [prompt])[0] for picture, prompt in zip(pictures, prompts, strict=True)]
    assert all(text.endswith(".") for text in told)
    assert recall(views, told) > 0.6


def test_the_shipped_qwen_describes_pictures_of_any_shape_in_one_batch() -> None:
    views, pictures = drawn(4)
    shapes = [(640, 480), (300, 500), (224, 224), (160, 200)]
    stretched = [picture.resize(shape) for picture, shape in zip(pictures, shapes, strict=True)]
    assert recall(views, say("tiny-qwen", stretched, [DESCRIBE[0]] * 4)) > 0.6


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_model_is_blind_without_a_picture(name: str) -> None:
    said = say(name, [], [exists_question(word) for word in ("person", "fork", "giraffe", "toilet")], tokens=4)
    assert len({text.split()[0].strip(".,") for text in said}) == 1
