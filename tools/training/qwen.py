"""The second embedded model: a small Qwen2.5-VL, every picture in a grid that follows its shape and size."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from tools.training.architecture import Architecture, Forward, Grid, Kind, Size, TextBatch, normalised, resized

PATCH = 8
MERGE = 2
CELL = PATCH * MERGE
"""Side in pixels of what one image token shows."""
SQUARE = 14
"""Rows and columns of the image tokens of a square picture of any size from 224 pixels on."""
MOST, FEWEST = SQUARE * SQUARE, 7 * 7
"""How many image tokens a picture may have."""
LONGEST = 22
"""Image tokens along the longer side of a training picture, at most."""
WINDOW = 7
"""Rows and columns of the image tokens of an attention window in the tower."""
EVEN = 0.6
"""Share of training pictures in the square grid; the others have any grid that is allowed."""
PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_BEGIN, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SYSTEM = "You are a helpful assistant."

# parts in their order, as in the released models; an empty text leaves nothing behind the pictures
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes of the network; the defaults stay under 16 MB in bfloat16.

    Attributes:
        width: Hidden size of the text decoder.
        layers: Layers of the text decoder.
        heads: Query heads of the text decoder, each `width / heads` wide.
        groups: Key/value heads.
        inner: Width of the text decoder's feed-forward layers.
        sections: How many of a head's rotation frequencies turn with time, row and column.
        vision_width: Hidden size of the vision tower.
        vision_layers: Layers of the vision tower.
        vision_heads: Heads of the vision tower.
        vision_inner: Width of the vision tower's feed-forward layers.
        whole: Layers of the tower that look at the whole picture; the others look at windows.
    """

    width: int = 256
    layers: int = 8
    heads: int = 8
    groups: int = 2
    inner: int = 512
    sections: tuple[int, int, int] = (4, 6, 6)
    vision_width: int = 192
    vision_layers: int = 5
    vision_heads: int = 6
    vision_inner: int = 512
    whole: tuple[int, ...] = (2, 4)


SMALL = Network(
    width=64,
    layers=2,
    heads=4,
    groups=2,
    inner=128,
    sections=(2, 3, 3),
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    vision_inner=64,
    whole=(1,),
)


class Qwen(Architecture):
    """Qwen2.5-VL: a tower with windows over pictures of any shape, and a decoder whose positions have three axes."""

    model = Qwen2_5_VLForConditionalGeneration
    processor = Qwen2_5_VLProcessor
    special = (PAD, BEGIN, END, VISION_BEGIN, VISION_END, IMAGE, VIDEO)
    begin = None
    end = END
    image = IMAGE
    opening = f"{BEGIN}system\n{SYSTEM}{END}\n{BEGIN}user\n"
    side = SQUARE * CELL
    sizes: ClassVar[dict[Kind, Size]] = {"text": Size(128, 288, 0), "one": Size(128, 480, 1), "two": Size(64, 656, 2)}

    def question(self, prompt: str, *, blind: bool) -> str:
        """The same with and without pictures; see `Architecture.question`."""
        return f"{prompt}{END}\n{BEGIN}assistant\n"

    def answer(self, text: str) -> str:
        """See `Architecture.answer`."""
        return text

    def grids(self, rng: random.Random, pictures: int) -> tuple[Grid, ...]:
        """Square grids most of the time, else any with rows and columns in range; see `Architecture.grids`."""
        return tuple((SQUARE, SQUARE) if rng.random() < EVEN else _any_grid(rng) for _ in range(pictures))

    def beginning(self, encode: Callable[[str], list[int]], grids: Sequence[Grid]) -> list[int]:
        """See `Architecture.beginning`."""
        start = encode(self.opening)
        for rows, columns in grids:
            start += encode(VISION_BEGIN) + encode(IMAGE) * (rows * columns) + encode(VISION_END)
        return start

    def positions(self, grids: Sequence[Grid], length: int) -> list[list[int]]:
        """Time, row and column; what follows a picture goes on behind its longer side. See `Architecture.positions`."""
        shown = sum(rows * columns + 2 for rows, columns in grids)
        places = [(at, at, at) for at in range(length - shown)]
        after = len(places)
        for rows, columns in grids:
            first = after + 1
            places.append((after,) * 3)
            places += [(first, first + row, first + column) for row in range(rows) for column in range(columns)]
            after = first + max(rows, columns)
            places.append((after,) * 3)
            after += 1
        return [list(axis) for axis in zip(*places, (after,) * 3, strict=True)]

    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
        """Join the tokenizer with Qwen's picture steps: at most 224 by 224 pixels in any shape, 16 to a token."""
        size = {"shortest_edge": FEWEST * CELL**2, "longest_edge": MOST * CELL**2}
        steps: Any = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(**steps),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**steps),
            chat_template=CHAT_TEMPLATE,
        )

    def build_model(
        self, tokenizer: PreTrainedTokenizerFast, *, small: bool = False
    ) -> Qwen2_5_VLForConditionalGeneration:
        """See `Architecture.build_model`."""
        shape = SMALL if small else Network()
        token = {name: tokenizer.get_vocab()[name] for name in self.special}
        text = {
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups,
            "max_position_embeddings": 2048,
            # the columns have the slowest frequencies: with the usual base they would hardly turn in 14 columns
            "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": list(shape.sections)},
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": token[END],
            "pad_token_id": token[PAD],
        }
        vision = {
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_inner,
            "depth": shape.vision_layers,
            "num_heads": shape.vision_heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": WINDOW * CELL,
            "out_hidden_size": shape.width,
            "fullatt_block_indexes": list(shape.whole),
        }
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=token[IMAGE],
            video_token_id=token[VIDEO],
            vision_start_token_id=token[VISION_BEGIN],
            vision_end_token_id=token[VISION_END],
            tie_word_embeddings=True,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        model.generation_config = GenerationConfig(eos_token_id=token[END], pad_token_id=token[PAD])
        return model

    def forward(self, model: PreTrainedModel, *, compiled: bool) -> Forward:
        """The stock modules with all pictures of a batch at once; see `Architecture.forward`."""
        whole: Any = model.model
        decoder, tower = whole.language_model, Tower(whole.visual)
        if compiled:
            tower.compile_blocks()
            for layer in decoder.layers:
                layer.compile(dynamic=False)

        def hidden(batch: TextBatch, shown: Tensor | None) -> Tensor:
            embedded = decoder.embed_tokens(batch.ids)  # (B, T, width)
            if shown is not None:
                features = tower(shown, batch.grids)  # (B, n * tokens, width)
                marked = (batch.ids == model.config.image_token_id)[..., None]  # (B, T, 1)
                embedded = embedded.masked_scatter(marked, features.to(embedded.dtype))
            states: Tensor = decoder(
                inputs_embeds=embedded,
                attention_mask=batch.mask(),
                position_ids=batch.positions.transpose(0, 1),  # (3, B, T)
                use_cache=False,
            ).last_hidden_state  # (B, T, width)
            return states

        return hidden


class Tower:
    """The vision tower over all pictures of a batch; the stock one takes its windows one after the other.

    Pictures are filled up to one number of patches, so that any grid runs through the same compiled blocks.

    Args:
        visual: The stock tower; its modules are used, not copied.
    """

    def __init__(self, visual: nn.Module) -> None:
        self.visual: Any = visual
        self.block: Callable[..., Tensor] = _block

    def compile_blocks(self) -> None:
        """Compile what a block does, once for all blocks."""
        self.block = torch.compile(_block, dynamic=False)

    def __call__(self, shown: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Encode pictures.

        Args:
            shown: (B, n, 3, side, side) uint8.
            grids: The grid of each of the n columns.

        Returns:
            (B, n * tokens, width) float, the tokens of a row's pictures one after the other.
        """
        rows, count = shown.shape[:2]
        room = MOST * MERGE**2
        # a scene is stretched, because the texts name its places; of the enlarged part any piece will do
        cut = [patches(fit(shown[:, number], grid, crop=number > 0)) for number, grid in enumerate(grids)]
        filled = torch.stack([pad(part, (0, 0, 0, room - part.shape[1])) for part in cut], dim=1)  # (B, n, N, patch)
        embed = self.visual.patch_embed.proj.weight  # (C, 3, 2, 8, 8)
        # a still picture is its own next frame
        states = linear(filled.flatten(0, 1), embed.sum(dim=2).flatten(1))  # (B * n, N, C)
        cos, sin, windows, whole = self._tables(grids, rows, shown.device)
        for number, block in enumerate(self.visual.blocks):
            mask = whole if number in self.visual.fullatt_block_indexes else windows
            states = self.block(block, states, cos, sin, mask)  # (B * n, N, C)
        merged = self.visual.merger(states).view(rows, count, MOST, -1)  # (B, n, tokens, width)
        return torch.cat([merged[:, number, : high * wide] for number, (high, wide) in enumerate(grids)], dim=1)

    def _tables(self, grids: Sequence[Grid], rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotations (B * n, N, head width) as cosine and sine, and masks (B * n, 1, N, N): windows, whole pictures."""
        found = [places(grid) for grid in grids]
        place = torch.stack([entry[0] for entry in found]).to(device, non_blocking=True)  # (n, N, 2)
        window = torch.stack([entry[1] for entry in found]).to(device, non_blocking=True)  # (n, N)
        angles = (place[..., None] * self.visual.rotary_pos_emb.inv_freq.to(device)).flatten(2)  # (n, N, head / 2)
        angles = torch.cat([angles, angles], dim=-1).repeat(rows, 1, 1)  # (B * n, N, head)
        masks = [
            (groups[:, None, :, None] == groups[:, None, None, :]).repeat(rows, 1, 1, 1)  # (B * n, 1, N, N)
            for groups in (window, window.clamp(max=0))
        ]
        return angles.cos(), angles.sin(), masks[0], masks[1]


def _block(block: nn.Module, states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """What a stock block does, for pictures (P, N, C) side by side; see `Tower._tables`."""
    stock: Any = block
    attention = stock.attn
    heads = (*states.shape[:2], 3, attention.num_heads, -1)
    query, key, value = attention.qkv(stock.norm1(states)).view(heads).unbind(2)  # (P, N, heads, head) each
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    query, key, value = (part.transpose(1, 2).to(value.dtype) for part in (query, key, value))  # (P, heads, N, head)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (P, heads, N, head)
    states = states + attention.proj(mixed.transpose(1, 2).flatten(2))  # (P, N, C)
    out: Tensor = states + stock.mlp(stock.norm2(states))  # (P, N, C)
    return out


def fit(shown: Tensor, grid: Grid, *, crop: bool) -> Tensor:
    """Bring pictures to the size of a grid.

    Args:
        shown: (N, 3, side, side) uint8.
        grid: Rows and columns of image tokens.
        crop: Take the largest part of the grid's shape from the middle; otherwise they are stretched.

    Returns:
        (N, 3, 16 * rows, 16 * columns) uint8.
    """
    rows, columns = grid
    if crop:
        side, longer = shown.shape[-1], max(grid)
        top, left = ((side - side * part // longer) // 2 for part in grid)
        shown = shown[..., top : side - top, left : side - left]
    same = shown.shape[-2:] == (rows * CELL, columns * CELL)
    return shown if same else resized(shown, rows * CELL, columns * CELL)


def patches(fitted: Tensor) -> Tensor:
    """Cut pictures into patches, normalised, in the order of Qwen's processor: the four of a token together.

    Args:
        fitted: (N, 3, 16 * rows, 16 * columns) uint8.

    Returns:
        (N, 4 * tokens, 3 * 8 * 8) float32.
    """
    rows, columns = (size // CELL for size in fitted.shape[-2:])
    cells = normalised(fitted).view(-1, 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
    return cells.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(1, 4)  # (N, 4 * tokens, 192)


@lru_cache(maxsize=512)
def places(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, and the window that it is in, in the order of `patches`.

    Args:
        grid: Rows and columns of image tokens.

    Returns:
        (784, 2) float32, and (784,) int64, which counts windows from 0; behind the picture's own patches 0 and -1.
    """
    rows, columns = grid
    row, column, down, right = torch.meshgrid(
        torch.arange(rows), torch.arange(columns), torch.arange(MERGE), torch.arange(MERGE), indexing="ij"
    )  # (rows, columns, 2, 2) each
    place = torch.stack([MERGE * row + down, MERGE * column + right], dim=-1).flatten(0, 3)  # (patches, 2)
    window = ((row // WINDOW) * columns + column // WINDOW).flatten()  # (patches,)
    spare = MOST * MERGE**2 - len(window)
    return pad(place.float(), (0, 0, 0, spare)), pad(window, (0, spare), value=-1)


def _any_grid(rng: random.Random) -> Grid:
    while True:
        rows, columns = (4 + int(rng.random() * (LONGEST - 3)) for _ in range(2))
        if FEWEST <= rows * columns <= MOST:
            return rows, columns
