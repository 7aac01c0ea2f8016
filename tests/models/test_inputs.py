"""Inputs of every family: whose pixels are whose, padding without effect, and the way through the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import TINY, tiny_vlm
from vlmfix.models.checkpoint import Checkpoint

Rows = Sequence[Sequence[Image.Image]]

RED = Image.new("RGB", (64, 48), (200, 40, 30))
GREEN = Image.new("RGB", (26, 90), (20, 160, 60))
BLUE = Image.new("RGB", (120, 40), (30, 60, 220))
ROWS: Rows = ([RED], [], [GREEN, BLUE])
PROMPTS = ("What do you see here?", "", "And?")


@pytest.fixture(params=TINY)
def vlm(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_vlm(request.param)


def pixels_of(vlm: Checkpoint, prompts: Sequence[str], rows: Rows, row: int) -> Tensor:
    """The entries of ``pixel_values`` that the family says belong to a row."""
    batch = vlm.encode(prompts, rows)
    owners = vlm.family.pixel_rows(vlm.model, batch, [len(pictures) for pictures in rows])
    assert len(owners) == len(batch["pixel_values"])
    return batch["pixel_values"][owners == row]


def answers(vlm: Checkpoint, prompts: Sequence[str], rows: Rows) -> Tensor:
    """(B, 6, V) logits of six greedy steps of each row."""
    output = vlm.model.generate(
        **vlm.encode(prompts, rows),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("row", [0, 2])
def test_pixels_belong_to_their_row(vlm: Checkpoint, row: int) -> None:
    together = pixels_of(vlm, PROMPTS, ROWS, row)
    alone = pixels_of(vlm, [PROMPTS[row]], [ROWS[row]], 0)
    if alone.ndim == 5:  # (1, tiles, 3, height, width): a row with fewer tiles is filled up with zeros
        assert not together[:, alone.shape[1] :].any()
        together = together[:, : alone.shape[1]]
    torch.testing.assert_close(together, alone)


def test_a_row_without_pictures_has_no_pixels(vlm: Checkpoint) -> None:
    assert not pixels_of(vlm, PROMPTS, ROWS, 1).any()


def test_a_padded_batch_answers_as_each_row_alone(vlm: Checkpoint) -> None:
    alone = torch.cat([answers(vlm, [prompt], [row]) for prompt, row in zip(PROMPTS, ROWS, strict=True)])
    torch.testing.assert_close(answers(vlm, PROMPTS, ROWS), alone, atol=1e-4, rtol=0)
    for row, other in ((0, 1), (0, 2), (1, 2)):
        assert (alone[row, 0] - alone[other, 0]).abs().max() > 0.1


def test_saved_and_loaded_again_it_answers_the_same(vlm: Checkpoint, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    loaded = Checkpoint.load(tmp_path, device="cpu")
    assert loaded.family.title == vlm.family.title
    assert torch.equal(answers(loaded, PROMPTS, ROWS), answers(vlm, PROMPTS, ROWS))
