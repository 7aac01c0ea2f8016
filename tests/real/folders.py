"""Loadable folders of published checkpoints, two layers deep and narrow, with random weights; all else as published.

Image size, patches, tiles, windows, the share of rotary pairs per axis, processor settings, chat template, special
tokens and their ids are those of the checkpoint. Text is bytes, for no vocabulary is needed to place a picture.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.real.published import PUBLISHED, SHARED, Published, files
from vlmfix.generation import VLM, load

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WEIGHTS = "model.safetensors"
QWEN_VISION = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32}


@cache
def real_vlm(name: str) -> VLM:
    """The model of a checkpoint; the same object for the whole process, so leave it as you found it.

    Args:
        name: Key of ``PUBLISHED``.
    """
    with TemporaryDirectory() as folder:
        build(name, Path(folder))
        return load(folder, device="cpu")


def build(name: str, folder: Path) -> None:
    """Writes the folder of a checkpoint, from the published files where they are and from values elsewhere.

    Args:
        name: Key of ``PUBLISHED``.
        folder: An empty folder.
    """
    published = PUBLISHED[name]
    settings = files(name) if SHARED.is_dir() else _from_values(published)
    settings["config.json"] = cut(settings["config.json"])
    settings["tokenizer_config.json"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["tokenizer.json"] = _tokenizer(settings["tokenizer_config.json"], begins=published.begins)
    for file, content in settings.items():
        (folder / file).write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, state_dict=_drawn(model))
    if config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        weights = load_file(folder / WEIGHTS)  # published under names that save_pretrained no longer writes
        renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): weights[name] for name in weights}
        save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    for file in ("config.json", "generation_config.json"):  # save_pretrained writes its own
        (folder / file).write_text(json.dumps(settings[file]))


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` with two narrow layers on either side, whose geometry is the published one."""
    config = deepcopy(config)
    kind, vision = config["model_type"], config["vision_config"]
    config.pop("quantization_config", None)
    if kind in ("qwen2_vl", "qwen2_5_vl"):  # a head is as wide as hidden size and heads say: 64 rotary pairs
        config |= {**TEXT, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
        if kind == "qwen2_vl":  # its hidden size is the text's
            vision |= {"depth": 2, "num_heads": 2, "embed_dim": 32, "mlp_ratio": 1, "hidden_size": 256}
        else:
            vision |= {**QWEN_VISION, "out_hidden_size": 256, "fullatt_block_indexes": [1]}
        return config
    config["text_config"] |= {**TEXT, "head_dim": 128 if kind == "qwen3_vl" else 16}
    if kind == "qwen3_vl":
        vision |= {**QWEN_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]}
        return config
    vision |= VISION
    if kind == "gemma3":
        config["text_config"]["layer_types"] = ["sliding_attention", "full_attention"]
    if "hidden_size" in config:
        config["hidden_size"] = TEXT["hidden_size"]
    return config


def _from_values(published: Published) -> dict[str, Any]:
    added = {str(number): {"content": token, "special": True} for token, number in published.tokens.items()}
    settings = {
        "config.json": published.config,
        "generation_config.json": published.generation,
        "preprocessor_config.json": published.pictures,
        "processor_config.json": published.processor,
        "tokenizer_config.json": {**published.roles, "added_tokens_decoder": added},
        "chat_template.json": {"chat_template": published.template},
    }
    return {file: deepcopy(content) for file, content in settings.items() if content}


def _tokenizer(settings: dict[str, Any], *, begins: bool) -> dict[str, Any]:
    """``tokenizer.json`` of bytes, and special tokens at their ids; ids between them have no token."""
    special = {token["content"]: int(number) for number, token in settings["added_tokens_decoder"].items()}
    free = (number for number in range(10**6) if number not in special.values())
    letters = {letter: next(free) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags}
            for token, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": bytewise,
        "post_processor": _beginning(settings["bos_token"], special) if begins else None,
        "decoder": bytewise,
        "model": {"type": "BPE", "vocab": special | letters, "merges": []},
    }


def _beginning(token: str, ids: dict[str, int]) -> dict[str, Any]:
    """What puts a token before every text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]}},
    }


def _drawn(model: Any) -> dict[str, Tensor]:
    """Random matrices that keep the size of what they are given, gains of 1 and biases of 0.

    Embeddings of two hundred thousand tokens are many numbers: all are taken from one draw, begun at another place.

    Args:
        model: A model without weights.
    """
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    if all(getattr(part, "tie_word_embeddings", True) for part in (model.config, model.config.get_text_config())):
        del shapes["lm_head.weight"]
    weights = {}
    for place, (name, shape) in enumerate(shapes.items()):
        if len(shape) > 1:
            drawn = noise.roll(place * 7919) / shape[1:].numel() ** 0.5
            weights[name] = drawn.repeat(-(-shape.numel() // len(drawn)))[: shape.numel()].view(shape).clone()
        else:
            weights[name] = torch.full(shape, float(name.endswith("weight")))
    return weights
