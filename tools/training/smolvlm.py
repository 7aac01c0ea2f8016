"""The third embedded model: a small tower in front of SmolLM2, with the picture before all words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from tools.training.architecture import Architecture, Forward, Grid, Kind, Size, TextBatch, normalised
from vlmfix.models.assembly import IMAGE

SIDE, PATCH, JOINED = 128, 8, 2
CELLS = SIDE // PATCH
GRID = (CELLS // JOINED, CELLS // JOINED)
TOKENS = GRID[0] * GRID[1]
MARKS = 3
"""Tokens that SmolVLM's processor puts around a picture's own; here they are three of the picture's."""
RENEWED = 0.05
"""Share of a batch in the running mean of the connector's power."""
BEGIN, END = "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
"""Of CLIP's processor, by which `normalised` scales pictures."""

# SmolLM2's own template behind all pictures, which are a line apart
CHAT_TEMPLATE = (
    "{% set shown = namespace(any=false) %}"
    "{% for message in messages if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '\n' if shown.any else '' }}<image>{% set shown.any = true %}"
    "{% endfor %}"
    "{% endfor %}"
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class SmolVLM(Architecture):
    """SmolVLM: a ViT whose patches are joined two by two, one linear map, and the Llama decoder of SmolLM2."""

    model = SmolVLMForConditionalGeneration
    processor = SmolVLMProcessor
    special = (END, BEGIN, IMAGE)
    begin = None
    end = END
    image = IMAGE
    opening = f"{BEGIN}system\n{SYSTEM}{END}\n{BEGIN}user\n"
    side = SIDE
    # one shape for all, so that the layers are compiled once
    sizes: ClassVar[dict[Kind, Size]] = {"text": Size(64, 416, 0), "one": Size(64, 416, 1), "two": Size(64, 416, 2)}

    def question(self, prompt: str, *, blind: bool) -> str:
        """The same with and without pictures; see `Architecture.question`."""
        return f"{prompt}{END}\n{BEGIN}assistant\n"

    def answer(self, text: str) -> str:
        """See `Architecture.answer`."""
        return text

    def grids(self, rng: random.Random, pictures: int) -> tuple[Grid, ...]:
        """The one grid there is; see `Architecture.grids`."""
        return (GRID,) * pictures

    def beginning(self, encode: Callable[[str], list[int]], grids: Sequence[Grid]) -> list[int]:
        """Pictures, a line apart, then SmolLM2's own opening; see `Architecture.beginning`."""
        image = encode(IMAGE) * TOKENS
        found: list[int] = []
        for number in range(len(grids)):
            found += encode("\n") + image if number else image
        return found + encode(self.opening)

    def positions(self, grids: Sequence[Grid], length: int) -> list[list[int]]:
        """One axis, tokens in order; see `Architecture.positions`."""
        return [list(range(length + 1))]

    def build_processor(self, tokenizer: PreTrainedTokenizerFast) -> SmolVLMProcessor:
        """Join the tokenizer with picture steps: stretched to 128 by 128 pixels, whole, never in tiles."""
        size: Any = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}, "resample": 3}
        scale: Any = {"image_mean": MEAN, "image_std": DEVIATION}
        return SmolVLMProcessor(
            image_processor=SmolVLMImageProcessor(do_image_splitting=False, **size, **scale),
            tokenizer=tokenizer,
            video_processor=SmolVLMVideoProcessor(**size, **scale),
            image_seq_len=TOKENS - MARKS,
            chat_template=CHAT_TEMPLATE,
        )

    def build_model(
        self, tokenizer: PreTrainedTokenizerFast, *, small: bool = False
    ) -> SmolVLMForConditionalGeneration:
        """The network of SmolLM2-135M behind a tower of 9.9 million parameters; see `Architecture.build_model`."""
        token = {name: tokenizer.get_vocab()[name] for name in self.special}
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=2 if small else 30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            bos_token_id=token[BEGIN],
            eos_token_id=token[END],
            pad_token_id=token[END],
        )
        vision = SmolVLMVisionConfig(
            hidden_size=384,
            intermediate_size=1152,
            num_hidden_layers=2 if small else 6,
            num_attention_heads=6,
            image_size=SIDE,
            patch_size=PATCH,
        )
        config = SmolVLMConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=token[IMAGE],
            scale_factor=JOINED,
            tie_word_embeddings=True,
        )
        model = SmolVLMForConditionalGeneration(config)
        model.generation_config = GenerationConfig(
            bos_token_id=token[BEGIN], eos_token_id=token[END], pad_token_id=token[END]
        )
        return model

    def forward(self, model: PreTrainedModel, *, compiled: bool) -> Forward:
        """The stock layers; see `Architecture.forward`."""
        return Pass(model, compiled=compiled)


class Pass:
    """The forward pass for training, all pictures of a column at once in the tower.

    Of the layers named in `keep`, the states that enter them are in `kept` until the next pass.

    Args:
        model: The stock model; its layers are compiled where asked.
        compiled: Compile them.
        loudness: See `Tower`.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool, loudness: float = 1.0) -> None:
        self.whole: Any = model.model
        self.tower = Tower(self.whole, loudness)
        self.keep: tuple[int, ...] = ()
        self.kept: dict[int, Tensor] = {}
        if compiled:
            for layer in (*self.whole.vision_model.encoder.layers, *self.whole.text_model.layers):
                layer.compile(dynamic=False)

    def __call__(self, batch: TextBatch, shown: Tensor | None) -> Tensor:
        """Return the last hidden states, (B, T, width); see `Forward`."""
        text = self.whole.text_model
        embedded = text.embed_tokens(batch.ids)  # (B, T, width)
        if shown is not None:
            # one column of pictures after the other, so that the tower's layers keep their shape
            columns = [self.tower(self.tower.cells(shown[:, number])) for number in range(shown.shape[1])]
            features = torch.cat(columns, dim=1)  # (B, n * tokens, width)
            # their places are known: a search for image tokens would wait for all that the device has yet to do
            begin = torch.arange(shown.shape[1], device=embedded.device)[:, None] * (TOKENS + 1)  # (n, 1)
            places = (begin + torch.arange(TOKENS, device=embedded.device)).flatten()  # (n * tokens,)
            # states stay in float32: a sink's norm is 25,000 beside 150
            embedded = embedded.index_copy(1, places, features.to(embedded.dtype))
        seen = batch.mask()  # (B, 1, T, T)
        device = embedded.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embedded.dtype
        mask = torch.zeros_like(seen, dtype=kind).masked_fill(~seen, -torch.inf)
        turns = text.rotary_emb(embedded, batch.positions[:, 0])
        self.kept = {}
        states = embedded
        for number, layer in enumerate(text.layers):
            if number in self.keep:
                self.kept[number] = states
            states = layer(
                states, attention_mask=mask, position_ids=batch.positions[:, 0], position_embeddings=turns
            )  # (B, T, width)
        found: Tensor = text.norm(states)
        return found


class Tower:
    """The stock vision tower and connector over whole pictures.

    The tower's last norm has no weights. What comes out of the connector is brought to the loudness that was asked for
    by one factor, from a running mean over the last batches; whoever saves the model multiplies the connector's matrix
    by it. Quiet image embeddings can become attention sinks, loud ones cannot.

    A fixed length of the connector's matrix is not enough: it learns to look at what varies most in the cells, and its
    outputs were twice as loud in the end as for cells whose features do not go together.

    Args:
        whole: The model without its head; its modules are used, not copied.
        loudness: RMS of the image embeddings.
    """

    def __init__(self, whole: nn.Module, loudness: float = 1.0) -> None:
        self.whole: Any = whole
        self.loudness = loudness
        self.power: Tensor | None = None

    def begin(self) -> None:
        """Take the last norm's weights out, and bring the connector to its length."""
        norm = self.whole.vision_model.post_layernorm
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
        norm.requires_grad_(False)
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring the connector's matrix back to its length, after a step: how far steps turn it does not change then."""
        weight = self.whole.connector.modality_projection.proj.weight  # (width, joined * C)
        weight.mul_(weight.shape[0] ** 0.5 / weight.norm())

    def factor(self) -> Tensor:
        """What image embeddings are multiplied by behind the stock connector; a scalar."""
        assert self.power is not None, "no picture was encoded yet"
        return self.loudness * self.power.rsqrt()

    def cells(self, shown: Tensor) -> Tensor:
        """Encode pictures, (B, 3, side, side) uint8, to (B, N, C)."""
        vision = self.whole.vision_model
        patch = vision.embeddings.patch_embedding
        cut = normalised(shown).unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))  # (B, 3, rows, 8, columns, 8)
        # as the stock convolution, whose kernels for three channels are slow
        states = linear(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), patch.weight.flatten(1), patch.bias)
        states = states + vision.embeddings.position_embedding.weight
        for layer in vision.encoder.layers:
            states = layer(states, None)
        found: Tensor = vision.post_layernorm(states)
        return found

    def __call__(self, cells: Tensor) -> Tensor:
        """Map cells, (B, N, C), to image embeddings (B, tokens, width)."""
        found: Tensor = self.whole.connector(cells)
        power = found.detach().float().square().mean()
        if self.power is None:
            self.power = power
        elif torch.is_grad_enabled():
            self.power = torch.lerp(self.power, power, RENEWED)
        return found * self.factor()
