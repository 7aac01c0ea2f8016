"""The model directory: any text can be said, stock transformers loads it, and the shipped one really looks."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

import vlmfix.world
from vlmfix.world.checkpoint import SMALL, build_model, build_processor, build_tokenizer, save, vocabulary_texts
from vlmfix.world.mentions import mentions
from vlmfix.world.questions import DESCRIBE, exists_question
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

TINY = Path(vlmfix.world.__file__).parent / "assets" / "tiny"
TEXTS = ["Is there a hot dog?", "  Ein Kätzchen — 猫 🐈\n\t<b>1234</b> O'Neill's", "", " ", "UPPER lower ünïcode\x00"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(vocabulary_texts(20))


def user(prompt: str | None, pictures: int) -> list[dict[str, object]]:
    parts: list[dict[str, object]] = [{"type": "image"}] * pictures
    return [{"role": "user", "content": [*parts, *([] if prompt is None else [{"type": "text", "text": prompt}])]}]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_encoded_and_restored(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert None not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_of_the_world_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.tokenize("\nIs there a giraffe in the image? ASSISTANT: Yes, there is a giraffe.")
    assert len(tokens) == 18
    assert tokens.count("Ġgiraffe") == 2


def test_what_the_world_has_no_word_for_gets_no_token() -> None:
    few, more = (build_tokenizer(vocabulary_texts(count)) for count in (150, 300))
    assert len(more) - len(few) < 5  # invented nouns would add one for every sixth scene


@pytest.mark.parametrize(
    ("prompt", "pictures", "text"),
    [
        ("Is there a cup?", 1, "USER: <image>\nIs there a cup? ASSISTANT:"),
        (" Is there a cup?\n", 2, "USER: <image>\n<image>\nIs there a cup? ASSISTANT:"),
        ("", 1, "USER: <image>\n ASSISTANT:"),
        (None, 1, "USER: <image>\n ASSISTANT:"),
        ("Is there a cup?", 0, "USER: Is there a cup? ASSISTANT:"),
    ],
)
def test_chat_template(tokenizer: PreTrainedTokenizerFast, prompt: str | None, pictures: int, text: str) -> None:
    processor = build_processor(tokenizer)
    assert processor.apply_chat_template(user(prompt, pictures), add_generation_prompt=True) == text


def test_chat_template_with_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [*user("Is there a cup?", 1), {"role": "assistant", "content": "Yes."}, *user("Where?", 0)]
    text = build_processor(tokenizer).apply_chat_template(talk, add_generation_prompt=True)
    assert text == "USER: <image>\nIs there a cup? ASSISTANT: Yes.</s>USER: Where? ASSISTANT:"


def test_a_saved_directory_loads_by_stock_classes_in_silence(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = build_model(tokenizer, SMALL).eval()
    save(tmp_path, model, build_processor(tokenizer))
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            processor = AutoProcessor.from_pretrained(tmp_path)
            again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert next(model.parameters()).dtype == torch.float32  # saving in bfloat16 left the model alone
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.bfloat16().float())
    inputs = processor(text="USER: <image>\nHi ASSISTANT:", images=Image.new("RGB", (90, 60)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    assert int((inputs["input_ids"] == again.config.image_token_id).sum()) == 256


def test_every_weight_of_the_tower_but_the_unused_pooling_norm_learns(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model(tokenizer, SMALL)
    inputs = build_processor(tokenizer)(
        text="USER: <image>\nHi ASSISTANT: Yes.", images=Image.new("RGB", (128, 128)), return_tensors="pt"
    )
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    idle = {name for name, value in model.named_parameters() if value.grad is None}
    assert idle == {
        "model.vision_tower.post_layernorm.weight",
        "model.vision_tower.post_layernorm.bias",
    }


@pytest.fixture(scope="module")
def tiny() -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    return AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(
        TINY
    )


def test_the_shipped_directory_is_small_and_readable() -> None:
    assert (TINY / "model.safetensors").stat().st_size <= 16_000_000
    for file in TINY.glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
        assert file.stat().st_size < 20_000
    assert "license: apache-2.0" in (TINY / "README.md").read_text(encoding="utf-8")
    assert "python -m vlmfix.world.train" in (TINY / "training.log").read_text(encoding="utf-8")


def test_the_shipped_model_describes_what_is_there_and_pads_on_the_left(
    tiny: tuple[transformers.PreTrainedModel, transformers.ProcessorMixin],
) -> None:
    model, processor = tiny
    views = [scene(4242, index) for index in range(4)]
    pictures = [Image.fromarray(canvas.permute(1, 2, 0).numpy()) for canvas in render(views)]
    rng = random.Random(0)
    prompts = [rng.choice(DESCRIBE) for _ in views]
    texts = [processor.apply_chat_template(user(prompt, 1), add_generation_prompt=True) for prompt in prompts]

    def say(rows: list[int]) -> list[str]:
        inputs = processor(
            text=[texts[row] for row in rows],
            images=[[pictures[row]] for row in rows],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        return [text.strip() for text in processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)]

    told = say([0, 1, 2, 3])
    assert told == [say([row])[0] for row in range(4)]
    assert all(text.endswith(".") for text in told)
    hits = sum(len(set(mentions(text)) & set(view.counts())) for text, view in zip(told, views, strict=True))
    assert hits / sum(len(view.counts()) for view in views) > 0.6


def test_the_shipped_model_is_blind_without_a_picture(
    tiny: tuple[transformers.PreTrainedModel, transformers.ProcessorMixin],
) -> None:
    model, processor = tiny
    names = ["person", "fork", "giraffe", "toilet"]
    texts = [
        processor.apply_chat_template(user(exists_question(name), 0), add_generation_prompt=True) for name in names
    ]
    inputs = processor(text=texts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)
    assert len({text.split()[0].strip(".,") for text in said}) == 1
