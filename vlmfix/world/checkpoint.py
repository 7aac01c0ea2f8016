"""The embedded model's directory: a small LLaVA in plain transformers format, tokenizer and processor included."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from vlmfix.world.captions import references
from vlmfix.world.categories import CATEGORIES
from vlmfix.world.questions import Diet, blind_exchanges, exchanges, exists_question
from vlmfix.world.scenes import scene

IMAGE_SIZE = 128
PATCH = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SPECIAL = (PAD, BOS, EOS, IMAGE)

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


def vocabulary_texts(count: int = 3000) -> Iterable[str]:
    """Yield texts that hold every word of the world's language: each category's questions, and sampled scenes."""
    for entry in CATEGORIES:
        yield f"\n{exists_question(entry.name)} ASSISTANT: Yes, there is a {entry.name} and two {entry.plural}."
        yield f"\nHow many {entry.plural} are there? ASSISTANT: {entry.name.capitalize()}."
    for index in range(count):
        rng = random.Random(f"vocabulary/{index}")
        view = scene(0, index)
        for text in references(view):
            yield f" {text}"
        for exchange in exchanges(view, rng, Diet(hallucination=0.5)):
            if exchange.kind == "unheard":  # its word must stay without a token
                continue
            yield f"\n{exchange.prompt} ASSISTANT: {exchange.answer}"
        for exchange in blind_exchanges(view, rng, Diet()):
            yield f"USER: {exchange.prompt} ASSISTANT: {exchange.answer}"


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make the tokenizer: one token for each word of the texts, one for each byte of anything else.

    Args:
        texts: What the model must say in whole words.

    Returns:
        A fast tokenizer that encodes and restores any text, puts `<s>` first and pads on the left.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = sorted((word for word in words if word not in alphabet), key=lambda word: (-words[word], word))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet, *ordered])}
    # no merges: a known word is looked up whole, an unknown one falls to its bytes
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
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


def build_model(tokenizer: PreTrainedTokenizerFast, shape: Network) -> LlavaForConditionalGeneration:
    """Make an untrained model, in float32 on the CPU, with the caller's torch seed."""
    token = {name: tokenizer.get_vocab()[name] for name in SPECIAL}
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


def save(directory: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Write weights in bfloat16, configuration, tokenizer and processor; the model given stays as it is.

    Args:
        directory: Where to; made when missing.
        model: The trained model.
        processor: From `build_processor`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shell = LlavaForConditionalGeneration(model.config)
    state = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    shell.load_state_dict(state, assign=True)
    shell.tie_weights()
    shell.config.dtype = torch.bfloat16
    for part in (shell.config.text_config, shell.config.vision_config):
        cast(PreTrainedConfig, part).dtype = torch.bfloat16
    shell.generation_config = model.generation_config
    shell.save_pretrained(directory)
    processor.save_pretrained(directory)
