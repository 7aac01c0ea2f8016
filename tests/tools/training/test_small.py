"""The third embedded model's training: what it is shown, what it learns from, and a whole run at toy size."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from tools.training.architecture import TextBatch, normalised, resized
from tools.training.lowrank import LowRank, factors, put_in
from tools.training.readings import free
from tools.training.seeing import NUMBER, seen
from tools.training.small import SOURCE, command
from tools.training.smolvlm import CELLS, GRID, SIDE, Pass, SmolVLM
from vlmfix.errors import MissingExtraError
from vlmfix.models.assembly import EMBEDDINGS, PARTS, UP, WEIGHTS, joined, language_model, packed, tokenizer, write
from vlmfix.world.render import render
from vlmfix.world.scenes import CANVAS, scene

OPENING = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@cache
def words() -> PreTrainedTokenizerFast:
    try:
        return tokenizer(SOURCE.source())
    except MissingExtraError as error:
        pytest.skip(f"the language model is not installed: {error.message}")


def encoded(text: str) -> list[int]:
    return words().backend_tokenizer.encode(text, add_special_tokens=False).ids


def user(prompt: str, pictures: int) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": prompt}]}]


def picture(index: int = 0) -> torch.Tensor:
    return render([scene(5, index)], device="cpu")  # (1, 3, 512, 512)


@pytest.mark.parametrize(
    ("pictures", "begin"), [(0, ""), (1, "<image>"), (2, "<image>\n<image>")], ids=["none", "one", "two"]
)
def test_pictures_stand_before_smollms_own_template(pictures: int, begin: str) -> None:
    processor = SmolVLM().build_processor(words())
    text = processor.apply_chat_template(user("Hi", pictures), add_generation_prompt=True)
    assert text == f"{begin}{OPENING}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_talk_keeps_its_turns_and_its_own_system_message() -> None:
    processor = SmolVLM().build_processor(words())
    talk = [
        {"role": "system", "content": "Be brief."},
        *user("A?", 1),
        {"role": "assistant", "content": "Yes."},
        *user("B?", 1),
    ]
    assert processor.apply_chat_template(talk) == (
        "<image>\n<image><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n"
    )


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_training_writes_the_tokens_that_the_processor_writes(pictures: int) -> None:
    architecture = SmolVLM()
    shown = Image.fromarray(picture()[0].permute(1, 2, 0).numpy())
    processor = architecture.build_processor(words())
    text = processor.apply_chat_template(user("Is there a cup?", pictures), add_generation_prompt=True)
    inputs = processor(text=text, images=[shown] * pictures or None, return_tensors="pt")

    ids = architecture.beginning(encoded, (GRID,) * pictures)
    ids += encoded(architecture.question("Is there a cup?", blind=not pictures))
    assert inputs["input_ids"][0].tolist() == ids
    if pictures:
        pixels = normalised(resized(picture(), SIDE, SIDE))
        torch.testing.assert_close(inputs["pixel_values"][0], pixels.expand(pictures, -1, -1, -1))


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_training_pass_is_the_stock_models(pictures: int) -> None:
    torch.manual_seed(0)
    model = SmolVLM().build_model(words(), small=True).eval()
    forward = Pass(model, compiled=False, loudness=0.25)
    forward.tower.begin()
    ids = torch.tensor([[*SmolVLM().beginning(encoded, (GRID,) * pictures), 1, 9519, 198, 7]])  # (1, T)
    shown = resized(render([scene(5, index) for index in range(pictures)], device="cpu"), SIDE, SIDE)[None]
    count = ids.shape[1]
    batch = TextBatch(
        kind="one",
        reach=1,
        grids=(GRID,) * pictures,
        scenes=torch.tensor([0]),
        mirrored=torch.tensor([False]),
        ids=ids,
        positions=torch.arange(count)[None, None],
        turns=torch.zeros_like(ids),
        weights=torch.ones(1, count),
    )
    weight = model.model.connector.modality_projection.proj.weight
    with torch.no_grad():
        ours = forward(batch, shown)
        assert float(weight.square().sum()) == pytest.approx(576, rel=1e-4)
        weight.mul_(forward.tower.factor())
        theirs = model.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=normalised(shown[0])[None]
        ).last_hidden_state
    torch.testing.assert_close(ours, theirs)


def test_image_embeddings_are_as_loud_as_was_asked_whatever_the_connector_learned() -> None:
    torch.manual_seed(0)
    tower = Pass(SmolVLM().build_model(words(), small=True), compiled=False, loudness=0.25).tower
    tower.begin()
    cells = torch.randn(4, CELLS * CELLS, 1) * torch.randn(384)  # all features go together
    weight = tower.whole.connector.modality_projection.proj.weight
    with torch.no_grad():
        weight.copy_(torch.ones(576, 1) * cells[0, 0].sign().repeat(4))  # and the connector looks at them
    tower.hold()
    assert float(tower(cells).detach().square().mean().sqrt()) == pytest.approx(0.25, rel=1e-3)
    for _ in range(200):
        found = tower(2 * cells).detach()
    assert float(found.square().mean().sqrt()) == pytest.approx(0.25, rel=1e-3)
    assert float((weight.detach() * tower.factor()).norm()) < 0.25 * 576**0.5


def test_cells_name_the_foremost_object_that_fills_them() -> None:
    view = next(view for view in (scene(5, index) for index in range(50)) if len(view.objects) > 3)
    cells, present = seen(view, CELLS)
    assert {name for name, number in NUMBER.items() if present[number]} == set(view.counts())
    front, step = view.objects[-1], CANVAS // CELLS
    x0, y0, x1, y1 = front.box
    assert cells[(y0 + y1) // 2 // step, (x0 + x1) // 2 // step] == NUMBER[front.category] + 1
    empty = np.ones((CANVAS, CANVAS), bool)
    for thing in view.objects:
        left, top, right, bottom = thing.box
        empty[top:bottom, left:right] = False
    alone = empty.reshape(CELLS, step, CELLS, step).all((1, 3))
    assert alone.any()
    assert (cells[alone] == 0).all()


def test_a_token_is_free_when_its_four_cells_are() -> None:
    cells = torch.zeros(1, CELLS, CELLS, dtype=torch.uint8)
    cells[0, 3, 4] = 7  # second row of the second row of tokens, third column
    taken = (~free(cells)).nonzero().tolist()
    assert taken == [[0, 1 * GRID[1] + 2]]


def test_a_low_rank_change_begins_at_nothing_and_is_what_joining_adds() -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False))
    base = {f"{name}": value.clone() for name, value in decoder.state_dict().items()}
    x = torch.randn(3, 6)
    before = decoder(x)
    trained = put_in(decoder, rank=2)
    assert len(trained) == 4
    assert torch.equal(decoder(x), before)
    for layer in decoder:
        if isinstance(layer, LowRank):
            nn.init.normal_(layer.up)
    changed = decoder(x)
    assert not torch.allclose(changed, before, atol=0.1)
    whole = joined(base, packed(factors(decoder, "")))
    plain = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False))
    plain.load_state_dict(whole)
    torch.testing.assert_close(plain(x), changed, rtol=0.05, atol=0.1)  # 8 bits a weight


def toy(out: Path, *options: str) -> None:
    common = ["--device", "cpu", "--toy", "--scenes", "8", "--workers", "0", "--loudness", "0.3", "--connector", "0"]
    command(["--out", str(out), *common, *options], standalone_mode=False)


def test_a_toy_run_leaves_folders_that_load_and_can_go_on_from_them(tmp_path: Path) -> None:
    words()
    begun = tmp_path / "begun"
    toy(begun, "--tower", "0.1", "--low-rank", "0.1", "--habits", "0")
    go_on = ("--start", str(begun / "low-rank"), "--tower", "0")
    toy(tmp_path, *go_on, "--low-rank", "0", "--habits", "0", "--sinks", "1e-9")
    for out, stages in ((begun, ["low-rank"]), (tmp_path, ["sinks"])):
        assert (out / "training.log").read_text(encoding="utf-8").count("could not be read") == 0
        read = json.loads((out / "readings.json").read_text(encoding="utf-8"))
        assert [entry["stage"] for entry in read] == stages
        assert read[0]["sinks"]["loudness"] == pytest.approx(0.3, abs=0.05)
    first, last = load_file(begun / "low-rank" / PARTS), load_file(tmp_path / "sinks" / PARTS)
    assert first.keys() == last.keys()
    changes = [name for name in last if name.endswith(UP)]
    assert len(changes) == 2 * 7
    assert all(bool(first[name].any()) and torch.equal(first[name], last[name]) for name in changes)
    tower = "model.vision_model.encoder.layers.0.mlp.fc1.bias"
    torch.testing.assert_close(first[tower], last[tower], atol=1e-3, rtol=0)  # after one small step
    assert bool(first[tower].any())
    folder = tmp_path / "sinks"
    whole = joined(language_model(SOURCE.source()), last)
    more = re.compile(r"text_model\.layers\.(?:[2-9]|\d\d)\.")  # a toy has two layers
    write({name: value for name, value in whole.items() if not more.search(name)}, folder / WEIGHTS)
    words().backend_tokenizer.save(str(folder / "tokenizer.json"))
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(stock.get_input_embeddings().weight, whole[EMBEDDINGS].bfloat16())
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "SmolVLMProcessor"
