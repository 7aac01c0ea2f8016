"""Packed training rows: each exchange must be what the model meets at inference, no more and no less."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from vlmfix.world.batches import SIZES, TRAINING_SEED, Batches, Kind
from vlmfix.world.checkpoint import SMALL, build_model, build_processor, build_tokenizer, vocabulary_texts
from vlmfix.world.painting import paint
from vlmfix.world.questions import Diet


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(vocabulary_texts(50))


def batches(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> Batches:
    return Batches(
        tokenizer=tokenizer.backend_tokenizer, schedule=[kind] * 2, seed=0, pool=4, filled=0, diet=Diet(), shrink=128
    )


@pytest.mark.parametrize("kind", ["text", "one", "two"])
def test_each_packed_exchange_equals_a_prompt_of_its_own(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
    torch.manual_seed(0)
    model = build_model(tokenizer, SMALL).eval()
    processor = build_processor(tokenizer)
    batch = batches(tokenizer, kind)[0]
    shown = SIZES[kind].pictures
    pictures = paint(TRAINING_SEED, 0, 4, "cpu")[batch.scenes][:, :shown].flatten(0, 1)  # (n, 3, 128, 128)
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"] if shown else None
    with torch.inference_mode():
        packed = model(
            input_ids=batch.ids, pixel_values=pixels, attention_mask=batch.mask(), position_ids=batch.positions
        ).logits[0]
    for turn in range(1, int(batch.turns[0].max()) + 1):
        chosen = (batch.turns[0] == turn).nonzero().flatten()
        if not len(chosen):
            continue
        row = torch.cat([batch.ids[0, batch.turns[0] == 0], batch.ids[0, chosen]])
        # what the processor makes of the same words
        text = tokenizer.decode(row, skip_special_tokens=False)
        text = text.removeprefix("<s>").removesuffix("</s>").replace("<image>" * 256, "<image>")
        made = processor(text=text, images=list(pictures[:shown]) or None, return_tensors="pt")
        assert made["input_ids"][0].tolist() == row[:-1].tolist()
        assert " ASSISTANT: " in text
        with torch.inference_mode():
            alone = model(input_ids=row[None], pixel_values=pixels[:shown] if shown else None).logits[0]
        torch.testing.assert_close(packed[chosen], alone[-len(chosen) :], atol=2e-5, rtol=1e-4)


def test_only_answers_have_weight(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = batches(tokenizer, "one")[0]
    text = tokenizer.decode(batch.ids[0][batch.weights[0] > 0])
    assert "ASSISTANT" not in text
    assert "Is there" not in text
    ends = (batch.ids == tokenizer.eos_token_id) & (batch.weights > 0)
    assert int(ends.sum()) == len(set(batch.turns[0].tolist()) - {0, -1})


def test_a_batch_depends_on_seed_and_number_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    first = batches(tokenizer, "one")
    random.random()
    again = batches(tokenizer, "one")
    assert torch.equal(first[1].ids, again[1].ids)
    assert not torch.equal(first[0].ids, first[1].ids)
