"""The directory of an embedded model: its words, and weights, tokenizer and processor in plain transformers format."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from tools.training.architecture import Architecture
from tools.training.llava import Llava
from tools.training.questions import Diet, blind_exchanges, exchanges, exists_question
from tools.training.qwen import Qwen
from vlmfix.world.captions import references
from vlmfix.world.categories import CATEGORIES
from vlmfix.world.scenes import scene

ARCHITECTURES: dict[str, Architecture] = {"llava": Llava(), "qwen2_5_vl": Qwen()}
"""Architectures of the embedded models, by transformers' `model_type`."""


def vocabulary_texts(architecture: Architecture, count: int = 3000) -> Iterable[str]:
    """Yield texts that hold every word of the world's language: each category's questions, and sampled scenes.

    Args:
        architecture: How prompts are written.
        count: How many scenes.
    """

    def seen(prompt: str, answer: str) -> str:
        return architecture.question(prompt, blind=False) + architecture.answer(answer)

    for entry in CATEGORIES:
        yield seen(exists_question(entry.name), f"Yes, there is a {entry.name} and two {entry.plural}.")
        yield seen(f"How many {entry.plural} are there?", f"{entry.name.capitalize()}.")
    for index in range(count):
        rng = random.Random(f"vocabulary/{index}")
        view = scene(0, index)
        for text in references(view):
            yield architecture.answer(text)
        for exchange in exchanges(view, rng, Diet(hallucination=0.5)):
            if exchange.kind == "unheard":  # its word must stay without a token
                continue
            yield seen(exchange.prompt, exchange.answer)
        for exchange in blind_exchanges(view, rng, Diet()):
            question = architecture.question(exchange.prompt, blind=True)
            yield architecture.opening + question + architecture.answer(exchange.answer)


def build_tokenizer(architecture: Architecture, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make the tokenizer: one token for each word of the texts, one for each byte of anything else.

    Args:
        architecture: Whose special tokens it has.
        texts: What the model must say in whole words.

    Returns:
        A fast tokenizer that encodes and restores any text, puts the first token first where the architecture has
        one, and pads on the left.
    """
    special, begin = architecture.special, architecture.begin
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    marks = re.compile("|".join(map(re.escape, special)))
    plain = (piece for text in texts for piece in marks.split(text))
    words = Counter(word for piece in plain for word, _ in split.pre_tokenize_str(piece))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = sorted((word for word in words if word not in alphabet), key=lambda word: (-words[word], word))
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet, *ordered])}
    # no merges: a known word is looked up whole, an unknown one falls to its bytes
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, vocabulary[begin])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=architecture.end,
        pad_token=special[0],
        extra_special_tokens={"image_token": architecture.image},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def save(directory: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Write weights in bfloat16, configuration, tokenizer and processor; the model given stays as it is.

    Args:
        directory: Where to; made when missing.
        model: The trained model.
        processor: From `Architecture.build_processor`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shell = type(model)(model.config)
    state = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    shell.load_state_dict(state, assign=True)
    shell.tie_weights()
    shell.config.dtype = torch.bfloat16
    for part in (shell.config.text_config, shell.config.vision_config):
        cast(PreTrainedConfig, part).dtype = torch.bfloat16
    shell.generation_config = model.generation_config
    shell.save_pretrained(directory)
    processor.save_pretrained(directory)
