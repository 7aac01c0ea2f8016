"""Rows of different prompts, stacked by hand into one forward, give the logits of each alone.

Contrast branches rest on this: explicit positions, a mask and pictures that were encoded before are all that
a row needs, in every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import ModelOutput

from tests.tiny import TINY, tiny_vlm
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.upstream import features
from vlmfix.upstream.cache import handed_over, returned

RED = Image.new("RGB", (64, 48), (200, 40, 30))
GREEN = Image.new("RGB", (26, 90), (20, 160, 60))
BLUE = Image.new("RGB", (120, 40), (30, 60, 220))


@pytest.fixture(params=TINY)
def vlm(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_vlm(request.param)


def encoded_pictures(vlm: Checkpoint, batch: Batch) -> ModelOutput:
    """What the vision tower returns for a batch."""
    encode = vlm.model.model.get_image_features
    arguments = {key: batch[key] for key in signature(encode).parameters if key in batch}
    return encode(**arguments, return_dict=True)


def positions(vlm: Checkpoint, batch: Batch) -> Tensor:
    """(B, T), or (4, B, T) where text and pictures are counted apart."""
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    return vlm.model._prepare_position_ids_for_generation(batch["input_ids"], rest)


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Puts rows of (..., B, T) one under the other, right-aligned."""
    longest = max(row.shape[-1] for row in rows)
    pad = torch.nn.functional.pad
    return torch.cat([pad(row, (longest - row.shape[-1], 0), value=value) for row in rows], dim=-2)


def joined(outputs: Sequence[ModelOutput]) -> ModelOutput:
    """Encoded pictures one after the other; nested lists are joined where they list pictures."""
    first = outputs[0]
    first.pooler_output = joined_features([output.pooler_output for output in outputs])
    if getattr(first, "deepstack_features", None) is not None:
        layers = zip(*(output.deepstack_features for output in outputs), strict=True)
        first.deepstack_features = [joined_features(layer) for layer in layers]
    return first


def joined_features(features: Sequence[Tensor | Sequence[Tensor]]) -> Tensor | list[Tensor]:
    """Features of pictures, as one tensor or as a list of one per picture."""
    if isinstance(features[0], Tensor):
        return torch.cat(list(features))
    return [picture for pictures in features for picture in pictures]


def stacked(vlm: Checkpoint, batches: Sequence[Batch]) -> dict[str, Any]:
    """Arguments of one forward over the rows of all batches."""
    per_token = {key for key, value in batches[0].items() if value.shape == batches[0]["input_ids"].shape}
    pad = vlm.processor.tokenizer.pad_token_id
    arguments: dict[str, Any] = {
        key: padded([batch[key] for batch in batches], pad if key == "input_ids" else 0) for key in per_token
    }
    with_pictures = [batch for batch in batches if "pixel_values" in batch]
    arguments |= features.handed_over(vlm.model, joined([encoded_pictures(vlm, b) for b in with_pictures]))
    arguments["position_ids"] = padded([positions(vlm, batch) for batch in batches], 0)
    return arguments


@torch.no_grad()
def test_stacked_rows_give_the_logits_of_each_alone(vlm: Checkpoint) -> None:
    batches = [
        vlm.encode(["What is this?"], [[RED]]),
        vlm.encode(["No picture at all, but a much longer question than the others have."], [[]]),
        vlm.encode(["Which of both?"], [[GREEN, BLUE]], system="Answer with one word."),
        vlm.encode([""], [[GREEN]]),
    ]
    alone = torch.cat([vlm.model(**batch).logits[:, -1] for batch in batches])  # (B, V)
    logits = vlm.model(**stacked(vlm, batches)).logits[:, -1]  # (B, V)
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)
    assert (alone[0] - alone[3]).abs().max() > 0.1


@torch.no_grad()
def test_the_next_step_only_counts_on(vlm: Checkpoint) -> None:
    batches = [vlm.encode(["What is this?"], [[RED]]), vlm.encode(["Both?"], [[GREEN, BLUE]])]
    alone = [
        vlm.model.generate(
            **batch,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for batch in batches
    ]
    arguments = stacked(vlm, batches)
    mask, place = arguments["attention_mask"], arguments["position_ids"][..., -1:]
    output = vlm.model(**arguments, use_cache=True)
    for step in range(1, 4):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        tokens = torch.cat([run.sequences[:, step - 5, None] for run in alone])  # (B, 1)
        place = place + 1
        output = vlm.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=place,
            **handed_over(vlm.model, returned(vlm.model, output)),
            use_cache=True,
        )
        expected = torch.cat([run.logits[step] for run in alone])  # (B, V)
        torch.testing.assert_close(output.logits[:, -1], expected, atol=1e-4, rtol=0)
