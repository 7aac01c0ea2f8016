"""The first embedded model: a small LLaVA, every picture in one fixed square of patches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tools.training.architecture import Architecture, Forward, Grid, Kind, Size, TextBatch, normalised

IMAGE_SIZE = 128
PATCH = 8
GRID = (IMAGE_SIZE // PATCH, IMAGE_SIZE // PATCH)
IMAGE_TOKENS = GRID[0] * GRID[1]
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"

# pictures first, one line each, then the text; an empty text leaves "USER: <image>\n ASSISTANT:"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
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
        vision_width: Hidden size of the vision tower.
        vision_layers: Layers of the vision tower; the last one is read, so none is idle.
        vision_heads: Heads of the vision tower.
    """

    width: int = 256
    layers: int = 8
    heads: int = 8
    groups: int = 4
    inner: int = 448
    vision_width: int = 224
    vision_layers: int = 5
    vision_heads: int = 7


SMALL = Network(width=64, layers=2, heads=2, groups=1, inner=128, vision_width=64, vision_layers=2, vision_heads=2)


class Llava(Architecture):
    """LLaVA: a CLIP tower, a two-layer projector and a Llama decoder."""

    model = LlavaForConditionalGeneration
    processor = LlavaProcessor
    special = (PAD, BOS, EOS, IMAGE)
    begin = BOS
    end = EOS
    image = IMAGE
    opening = "USER:"
    side = IMAGE_SIZE
    sizes: ClassVar[dict[Kind, Size]] = {"text": Size(128, 256, 0), "one": Size(128, 512, 1), "two": Size(64, 704, 2)}

    def question(self, prompt: str, *, blind: bool) -> str:
        """See `Architecture.question`."""
        lead = " " if blind else "\n"
        return f"{lead}{prompt} ASSISTANT:"

    def answer(self, text: str) -> str:
        """See `Architecture.answer`."""
        return f" {text}"

    def grids(self, rng: random.Random, pictures: int) -> tuple[Grid, ...]:
        """The one grid there is; see `Architecture.grids`."""
        return (GRID,) * pictures

    def beginning(self, encode: Callable[[str], list[int]], grids: Sequence[Grid]) -> list[int]:
        """See `Architecture.beginning`."""
        start = [*encode(BOS), *encode(self.opening)]
        if not grids:
            return start
        image = encode(IMAGE) * IMAGE_TOKENS
        return start + encode(" ") + (image + encode("\n")) * (len(grids) - 1) + image

    def positions(self, grids: Sequence[Grid], length: int) -> list[list[int]]:
        """One axis, tokens in order; see `Architecture.positions`."""
        return [list(range(length + 1))]

    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
        """Join the tokenizer with the picture steps of CLIP: shortest edge to 128 pixels, centre crop, normalise."""
        pictures = CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
        return LlavaProcessor(
            image_processor=pictures,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )

    def build_model(self, tokenizer: PreTrainedTokenizerFast, *, small: bool = False) -> LlavaForConditionalGeneration:
        """See `Architecture.build_model`."""
        shape = SMALL if small else Network()
        token = {name: tokenizer.get_vocab()[name] for name in self.special}
        vision = CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=shape.vision_width,
        )
        text = LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=token[BOS],
            eos_token_id=token[EOS],
            pad_token_id=token[PAD],
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=token[IMAGE],
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config)
        model.generation_config = GenerationConfig(
            bos_token_id=token[BOS], eos_token_id=token[EOS], pad_token_id=token[PAD]
        )
        return model

    def forward(self, model: PreTrainedModel, *, compiled: bool) -> Forward:
        """The stock forward pass; see `Architecture.forward`."""
        whole: Any = model.model
        if compiled:
            # layer by layer: all layers share one compiled graph, so compiling takes seconds instead of minutes
            for layer in (*whole.vision_tower.encoder.layers, *whole.language_model.layers):
                layer.compile(dynamic=False)

        def hidden(batch: TextBatch, shown: Tensor | None) -> Tensor:
            states: Tensor = whole(
                input_ids=batch.ids,
                pixel_values=None if shown is None else normalised(shown.flatten(0, 1)),  # (B * n, 3, side, side)
                attention_mask=batch.mask(),
                position_ids=batch.positions[:, 0],
                use_cache=False,
            ).last_hidden_state  # (B, T, width)
            return states

        return hidden
