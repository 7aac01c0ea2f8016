"""LLaVA-OneVision: the limit on tiles, gaps between them, and several pictures per prompt."""

from __future__ import annotations

import random

import torch
from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

from tests.models.spotlight import embeddings, painted, plain
from tests.tiny import tiny_vlm
from vlmfix.models.anyres import anyres
from vlmfix.models.layout import Batch


def test_counts_are_the_processor_s_at_the_released_sizes() -> None:
    released = LlavaOnevisionImageProcessor()
    processor = LlavaOnevisionProcessor(
        image_processor=released,
        tokenizer=tiny_vlm("llava_onevision").processor.tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=27 * 27,
        vision_feature_select_strategy="full",
    )
    draw = random.Random(0)
    for _ in range(300):
        size = (draw.randint(1, 3000), draw.randint(1, 3000))
        boxes = anyres(size, canvases=released.image_grid_pinpoints, tile=384, patch=14, most=9)
        assert 27 * 27 + len(boxes) == processor._get_number_of_features(*size, 384, 384)
        placed = boxes[boxes.isfinite().all(dim=1)]
        assert placed.min() >= 0
        assert placed.max() <= 1


def test_patches_leave_a_gap_at_the_end_of_each_tile() -> None:
    vlm = tiny_vlm("llava_onevision")
    layout = vlm.layout(vlm.encode(["?"], [[plain(50, 50)]]))
    base = layout.boxes[0][layout.tokens[0]][:9]
    assert torch.allclose(base[-1, 2:] * 26, torch.tensor([24.0, 24.0]))
    boxes = anyres((768, 768), canvases=[[768, 768]], tile=384, patch=14)
    line = boxes.reshape(54, 55, 4)[0, :-1]
    assert torch.allclose(line[26, 2] * 768, torch.tensor(378.0))
    assert torch.allclose(line[27, 0] * 768, torch.tensor(384.0))


def test_beyond_the_limit_a_token_shows_more_than_a_patch() -> None:
    boxes = anyres((78, 78), canvases=[[78, 78]], tile=26, patch=8, most=4)
    lines = boxes.reshape(6, 7, 4)  # nine tiles of 3 x 3 patches, resized from 9 x 9 to 6 x 6
    assert torch.allclose(lines[0, :-1, 2] - lines[0, :-1, 0], torch.tensor(12 / 78), atol=3 / 78)
    assert lines[0, 0, 0] == 0
    assert torch.allclose(lines[0, 5, 2] * 78, torch.tensor(76.0))


def test_several_pictures_share_one_tile_each() -> None:
    vlm = tiny_vlm("llava_onevision")
    batch = vlm.encode(["?", "?"], [[plain(80, 40), plain(40, 40)], [plain(40, 40)]])
    layout = vlm.layout(batch)
    assert int((layout.image[0] == 0).sum()) == int((layout.image[0] == 1).sum()) == 9
    assert int(layout.tokens[1].sum()) > 9
    marked = (batch["input_ids"][0] == vlm.processor.image_token_id).nonzero().squeeze(1)
    assert (~layout.tokens[0, marked]).nonzero().squeeze(1).tolist() == [9, 19]  # a newline after each
    wide = layout.boxes[0][layout.image[0] == 0]  # padded above and below: its middle line shows most of it
    assert wide[:, 0].isfinite().all()
    assert (wide[3:6, 3] - wide[3:6, 1] > 0.5).all()


def test_a_cell_in_the_second_of_two_pictures() -> None:
    vlm = tiny_vlm("llava_onevision")
    cell = (0.7, 0.05, 0.9, 0.25)
    before = vlm.encode(["?"], [[plain(60, 60), plain(60, 90)]])
    after = vlm.encode(["?"], [[plain(60, 60), painted(60, 90, cell)]])
    layout = vlm.layout(before)
    moved = (embeddings(vlm, after) - embeddings(vlm, before)).norm(dim=-1)[0]
    best = int(moved.argmax())
    assert layout.image[0, best] == 1
    x0, y0, x1, y1 = layout.boxes[0, best].tolist()
    assert x0 < 0.8 < x1
    assert y0 < 0.15 < y1
    assert (moved[layout.image[0] == 0] == 0).all()


def test_a_flat_list_means_one_picture_per_prompt() -> None:
    vlm = tiny_vlm("llava_onevision")
    inputs = vlm.processor(
        text=[vlm.render("?", 2)], images=[plain(60, 40), plain(60, 40)], padding=True, return_tensors="pt"
    )
    layout = vlm.layout(Batch.of(inputs))
    assert int((layout.image[0] == 1).sum()) > 9
