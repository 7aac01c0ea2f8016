"""Packed training rows: each exchange must be what the model meets at inference, no more and no less."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from transformers import PreTrainedTokenizerFast

from tools.training.architecture import Kind, TextBatch
from tools.training.batches import TRAINING_SEED, Batches
from tools.training.checkpoint import ARCHITECTURES, build_tokenizer, vocabulary_texts
from tools.training.painting import paint
from tools.training.questions import Diet
from tools.training.qwen import CELL, MOST, Tower, fit, patches

LLAVA, QWEN = ARCHITECTURES["llava"], ARCHITECTURES["qwen2_5_vl"]


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return build_tokenizer(ARCHITECTURES[name], vocabulary_texts(ARCHITECTURES[name], 50))


def batches(name: str, *kinds: Kind, shrink: int = 128) -> Batches:
    return Batches(
        architecture=ARCHITECTURES[name],
        tokenizer=tokenizer(name).backend_tokenizer,
        schedule=kinds,
        seed=0,
        pool=4,
        filled=0,
        diet=Diet(),
        shrink=shrink,
    )


def drawn(name: str, batch: TextBatch) -> tuple[Tensor | None, list[Tensor]]:
    """The pictures as the trainer holds them, and the first row's as its prompt meets them."""
    if not batch.grids:
        return None, []
    side = ARCHITECTURES[name].side
    shown = paint(TRAINING_SEED, 0, 4, side, "cpu")[batch.scenes][:, : len(batch.grids)]  # (B, n, 3, side, side)
    if name == "llava":
        return shown, list(shown[0])
    return shown, [fit(shown[:1, n], grid, crop=n > 0)[0] for n, grid in enumerate(batch.grids)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ARCHITECTURES for kind in ("text", "one", "two")],
)
def test_each_packed_exchange_equals_a_prompt_of_its_own(name: str, kind: Kind) -> None:
    torch.manual_seed(0)
    architecture, words = ARCHITECTURES[name], tokenizer(name)
    model = architecture.build_model(words, small=True).eval()
    processor = architecture.build_processor(words)
    batch = batches(name, kind)[0]
    shown, pictures = drawn(name, batch)
    with torch.inference_mode():
        packed = model.lm_head(architecture.forward(model, compiled=False)(batch, shown))[0]
    for turn in range(1, int(batch.turns[0].max()) + 1):
        chosen = (batch.turns[0] == turn).nonzero().flatten()
        if not len(chosen):
            continue
        row = torch.cat([batch.ids[0, batch.turns[0] == 0], batch.ids[0, chosen]])
        # what the processor makes of the same words
        text = words.decode(row, skip_special_tokens=False).removeprefix("<s>").removesuffix(architecture.end)
        for rows, columns in batch.grids:
            text = text.replace(architecture.image * (rows * columns), "<one>", 1)
        text = text.replace("<one>", architecture.image)
        made = processor(text=text, images=[to_pil_image(shown) for shown in pictures] or None, return_tensors="pt")
        assert made["input_ids"][0].tolist() == row[:-1].tolist()
        assert "ASSISTANT: " in text or "assistant\n" in text
        with torch.inference_mode():
            alone = model(**made).logits[0]
        torch.testing.assert_close(packed[chosen[:-1]], alone[1 - len(chosen) :], atol=3e-5, rtol=1e-4)


def test_pictures_of_any_grid_side_by_side_equal_each_in_the_stock_tower() -> None:
    torch.manual_seed(0)
    words = tokenizer("qwen2_5_vl")
    model, processor = QWEN.build_model(words, small=True).eval(), QWEN.build_processor(words)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2)  # wide, so that the features differ
    grids = ((9, 20), (16, 11))
    shown = torch.randint(0, 256, (3, 2, 3, QWEN.side, QWEN.side), dtype=torch.uint8)
    with torch.inference_mode():
        found = Tower(model.model.visual)(shown, grids)  # (3, tokens, width)
    assert found.shape[1] == 9 * 20 + 16 * 11
    for row in range(3):
        fitted = [fit(shown[row : row + 1, n], grid, crop=n > 0)[0] for n, grid in enumerate(grids)]
        made = processor.image_processor(fitted, return_tensors="pt")
        assert made["image_grid_thw"].tolist() == [[1, 18, 40], [1, 32, 22]]
        with torch.inference_mode():
            stock = torch.cat(model.model.get_image_features(**made).pooler_output)
        torch.testing.assert_close(found[row], stock, atol=1e-4, rtol=1e-3)


def test_patches_are_those_of_the_processor() -> None:
    shown = torch.randint(0, 256, (2, 3, QWEN.side, QWEN.side), dtype=torch.uint8)
    made = QWEN.build_processor(tokenizer("qwen2_5_vl")).image_processor(list(shown), return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 28, 28]] * 2
    frames = made["pixel_values"].view(2, 4 * MOST, 3, 2, 64)
    torch.testing.assert_close(patches(shown), frames[:, :, :, 0].flatten(2))
    assert torch.equal(frames[:, :, :, 0], frames[:, :, :, 1])


def test_a_part_is_cropped_and_a_scene_is_stretched() -> None:
    shown = torch.zeros((1, 3, QWEN.side, QWEN.side), dtype=torch.uint8)
    shown[..., : QWEN.side // 4, :] = 255  # the upper quarter is white
    assert fit(shown, (7, 14), crop=False).shape == (1, 3, 7 * CELL, 14 * CELL)
    assert int(fit(shown, (7, 14), crop=False)[0, 0, 0, 0]) == 255
    assert int(fit(shown, (7, 14), crop=True).max()) == 0


def test_grids_differ_and_keep_to_the_processors_range() -> None:
    rng = random.Random(0)
    grids = [QWEN.grids(rng, 1)[0] for _ in range(400)]
    assert 0.5 < sum(grid == (14, 14) for grid in grids) / 400 < 0.75
    assert len(set(grids)) > 60
    assert all(49 <= rows * columns <= MOST for rows, columns in grids)
    assert LLAVA.grids(rng, 2) == ((16, 16), (16, 16))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_only_answers_have_weight(name: str) -> None:
    batch = batches(name, "one")[0]
    words = tokenizer(name)
    text = words.decode(batch.ids[0][batch.weights[0] > 0])
    assert "assistant" not in text.lower()
    assert "Is there" not in text
    ends = (batch.ids == words.eos_token_id) & (batch.weights > 0)
    assert int(ends.sum()) == len(set(batch.turns[0].tolist()) - {0, -1})


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_batch_depends_on_seed_and_number_alone(name: str) -> None:
    first = batches(name, "one", "one")
    random.random()
    again = batches(name, "one", "one")
    assert torch.equal(first[1].ids, again[1].ids)
    assert first[1].grids == again[1].grids
    assert not torch.equal(first[0].ids, first[1].ids)
