"""LLaVA-NeXT: the base tile, the large tiles and their newlines, at the released sizes too."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from tests.models.spotlight import plain
from tests.tiny import tiny_vlm
from vlmfix.models.anyres import _fitted, anyres

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def test_base_tile_first_then_lines_that_end_in_newlines() -> None:
    vlm = tiny_vlm("llava_next")
    batch = vlm.encode(["?"], [[plain(48, 48)]])
    layout = vlm.layout(batch)
    marked = (batch["input_ids"][0] == vlm.processor.image_token_id).nonzero().squeeze(1)
    boxes = layout.boxes[0, marked]
    assert torch.allclose(boxes[4], torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3]))  # middle of the base tile
    assert (~layout.tokens[0, marked]).nonzero().squeeze(1).tolist() == [9 + 7 * line + 6 for line in range(6)]
    assert torch.allclose(boxes[9 + 7 + 1], torch.tensor([1 / 6, 1 / 6, 2 / 6, 2 / 6]))
    assert not layout.text[0, marked].any()
    assert layout.grid(0, 0) is None


def test_padding_is_taken_off() -> None:
    boxes = anyres((100, 300), canvases=PINPOINTS, tile=336, patch=14)
    lines = boxes.reshape(-1, 49, 4)  # of 24 lines of 48 patches and a newline, 16 show the picture
    assert len(lines) == 16
    assert lines[:, -1].isnan().all()
    assert lines[:, :-1].isfinite().all()
    assert torch.allclose(lines[0, 0, 2], torch.tensor(1 / 48))


def test_counts_are_the_processor_s_at_the_released_sizes() -> None:
    vlm = tiny_vlm("llava_next")
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS),
        tokenizer=vlm.processor.tokenizer,
        patch_size=14,
    )
    draw = random.Random(0)
    extreme = [(1, 1500), (1500, 1), (60, 1500), (333, 334), (1, 1)]
    for size in extreme + [(draw.randint(1, 2000), draw.randint(1, 2000)) for _ in range(300)]:
        boxes = anyres(size, canvases=PINPOINTS, tile=336, patch=14)
        assert 576 + len(boxes) == processor._get_number_of_features(*size, 336, 336)
        placed = boxes[boxes.isfinite().all(dim=1)]
        assert (placed[:, :2] < placed[:, 2:]).all()


@pytest.mark.parametrize(
    ("size", "fitted"), [((30, 50), (29, 48)), ((50, 30), (48, 29)), ((24, 24), (48, 48)), ((99, 100), (48, 48))]
)
def test_the_shorter_edge_is_rounded_up(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    """The image processor makes 29 of 28.8 pixels."""
    assert _fitted(size, (48, 48)) == fitted
