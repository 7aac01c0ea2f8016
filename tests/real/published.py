"""What the folders of eleven published checkpoints say, as values: geometry, processors, special tokens, prompts.

Widths and depths are left out, for `folders` cuts them. Where the published files themselves are present, in
``../shared/real`` beside the repository, models are built from these, and `test_published` holds the values against
them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared" / "real"
"""Where the published files are, if they are anywhere."""
NOT_HERE = "needs the published files in ../shared/real"


@dataclass(frozen=True)
class Published:
    """What one folder says.

    Attributes:
        config: ``config.json``.
        generation: ``generation_config.json``.
        pictures: ``preprocessor_config.json``.
        processor: ``processor_config.json``; empty where there is none.
        tokens: Special tokens at their ids.
        roles: What ``tokenizer_config.json`` uses them for.
        begins: Whether the tokenizer itself puts its first token before a text.
        turns: What the chat template puts before a question's pictures, for each of them, before its text, behind it.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    pictures: dict[str, Any]
    processor: dict[str, Any]
    tokens: dict[str, int]
    roles: dict[str, Any]
    begins: bool
    turns: tuple[str, str, str, str]

    @property
    def template(self) -> str:
        """A chat template for one question, which renders it as the published one does."""
        before, picture, between, after = map(json.dumps, self.turns)
        part = f"{picture} if part.type == 'image' else {between} + part.text"
        return (
            f"{{{{ {before} }}}}{{% for part in messages[0].content %}}{{{{ {part} }}}}{{% endfor %}}{{{{ {after} }}}}"
        )


def files(name: str) -> dict[str, Any]:
    """The published files of a checkpoint that are JSON, by name."""
    return {path.name: json.loads(path.read_text()) for path in (SHARED / name).glob("*.json")}


CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _numbered(first: int, *tokens: str) -> dict[str, int]:
    return {token: first + place for place, token in enumerate(tokens)}


# LLaVA

_LLAVA_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
_LLAVA_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_special_tokens": {"image_token": "<image>"},
    "padding_side": "left",
}
_LLAVA_CONFIG = {
    "image_token_index": 32000,
    "pad_token_id": 32001,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
}
_LLAVA_GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}
_LLAVA_PICTURES = {
    **CLIP,
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_resize": True,
    "resample": 3,
    "size": {"shortest_edge": 336},
}
_LLAVA_PROCESSOR = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
}
_CLIP_TOWER = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}

LLAVA = Published(
    config={
        **_LLAVA_CONFIG,
        "model_type": "llava",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
        "vision_config": _CLIP_TOWER,
    },
    generation=_LLAVA_GENERATION,
    pictures={**_LLAVA_PICTURES, "image_processor_type": "CLIPImageProcessor"},
    processor={**_LLAVA_PROCESSOR, "processor_class": "LlavaProcessor"},
    tokens=_LLAVA_TOKENS,
    roles=_LLAVA_ROLES,
    begins=True,
    turns=("USER: ", "<image>\n", "", " ASSISTANT:"),
)

_PINPOINTS = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}

LLAVA_NEXT = Published(
    config={
        **_LLAVA_CONFIG,
        **_PINPOINTS,
        "model_type": "llava_next",
        "use_image_newline_parameter": True,
        "text_config": {
            "model_type": "mistral",
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        "vision_config": _CLIP_TOWER,
    },
    generation=_LLAVA_GENERATION,
    pictures={
        **_LLAVA_PICTURES,
        **_PINPOINTS,
        "aspect_ratio_setting": "anyres",
        "do_pad": True,
        "image_processor_type": "LlavaNextImageProcessor",
    },
    processor={**_LLAVA_PROCESSOR, "processor_class": "LlavaNextProcessor"},
    tokens=_LLAVA_TOKENS,
    roles=_LLAVA_ROLES,
    begins=True,
    turns=("[INST] ", "<image>\n", "", " [/INST]"),
)

_SQUARES = {"image_grid_pinpoints": [[384 * lines, 384 * columns] for lines in range(1, 7) for columns in range(1, 7)]}

ONEVISION = Published(
    config={
        **_SQUARES,
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "video_token_index": 151647,
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2",
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "vocab_size": 152128,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    generation={"_from_model_config": True, "bos_token_id": 151643, "eos_token_id": 151645},
    pictures={
        **HALF,
        **_SQUARES,
        "do_pad": True,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "resample": 3,
        "size": {"height": 384, "width": 384},
    },
    processor={
        "image_token": "<image>",
        "num_image_tokens": 729,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_feature_select_strategy": "full",
    },
    tokens=_numbered(151643, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    roles={
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": {"image_token": "<image>", "video_token": "<video>"},
    },
    begins=False,
    turns=("<|im_start|>user\n", "<image>", "\n", "<|im_end|><|im_start|>assistant\n"),
)

# Qwen-VL

_QWEN_TOKENS = _numbered(
    151643,
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_ROLES = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_QWEN_ENDS = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
}
_QWEN_PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"

QWEN2_VL = Published(
    config={
        **_QWEN_IDS,
        "model_type": "qwen2_vl",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "max_position_embeddings": 32768,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1e6,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
        "vocab_size": 151936,
    },
    generation={**_QWEN_ENDS, "repetition_penalty": 1.0, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
    pictures={
        **CLIP,
        **_QWEN_PATCHES,
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": 1003520,
        "min_pixels": 3136,
        "processor_class": "Qwen2VLProcessor",
        "resample": 3,
        "size": {"max_pixels": 1003520, "min_pixels": 3136},
    },
    processor={},
    tokens=_QWEN_TOKENS,
    roles=_QWEN_ROLES,
    begins=False,
    turns=(_HELPFUL, _QWEN_PICTURE, "", _ASSISTANT),
)

QWEN2_5_VL = Published(
    config={
        **_QWEN_IDS,
        "model_type": "qwen2_5_vl",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "max_position_embeddings": 128000,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1e6,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_act": "silu",
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        "vocab_size": 152064,
    },
    generation={**_QWEN_ENDS, "repetition_penalty": 1.05, "temperature": 0.1, "top_k": 1, "top_p": 0.001},
    pictures={
        **CLIP,
        **_QWEN_PATCHES,
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": 12845056,
        "min_pixels": 3136,
        "processor_class": "Qwen2_5_VLProcessor",
    },
    processor={},
    tokens=_QWEN_TOKENS,
    roles=_QWEN_ROLES,
    begins=False,
    turns=(_HELPFUL, _QWEN_PICTURE, "", _ASSISTANT),
)

QWEN3_VL = Published(
    config={
        **_QWEN_IDS,
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "model_type": "qwen3_vl",
            "num_position_embeddings": 2304,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    generation={**_QWEN_ENDS, "repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    pictures={
        **HALF,
        **_QWEN_PATCHES,
        "patch_size": 16,
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    },
    processor={},
    tokens=_QWEN_TOKENS,
    roles=_QWEN_ROLES,
    begins=False,
    turns=("<|im_start|>user\n", _QWEN_PICTURE, "", _ASSISTANT),
)

# InternVL

INTERNVL3 = Published(
    config={
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "qwen2",
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "max_position_embeddings": 32768,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1e6,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "vocab_size": 151674,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": True,
            "image_size": [448, 448],
            "layer_scale_init_value": 0.1,
            "norm_type": "layer_norm",
            "patch_size": [14, 14],
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
    },
    generation={"_from_model_config": True},
    pictures={
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "crop_to_patches": False,
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "max_patches": 12,
        "min_patches": 1,
        "resample": 3,
        "size": {"height": 448, "width": 448},
    },
    processor={"image_seq_length": 256, "processor_class": "InternVLProcessor"},
    tokens=_QWEN_TOKENS | _numbered(151665, "<img>", "</img>", "<IMG_CONTEXT>") | {"<video>": 151674},
    roles={
        **_QWEN_ROLES,
        "extra_special_tokens": {
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "start_image_token": "<img>",
            "video_token": "<video>",
        },
    },
    begins=False,
    turns=("<|im_start|>user\n", "<IMG_CONTEXT>\n", "", _ASSISTANT),
)

# Idefics3 and SmolVLM

_TILES = {**HALF, "do_image_splitting": True, "do_pad": True, "do_resize": True, "resample": 1}
_USER, _SAYS = "User:", "<end_of_utterance>\nAssistant:"

IDEFICS3 = Published(
    config={
        "model_type": "idefics3",
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128258],
        "image_token_id": 128257,
        "pad_token_id": 128002,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 131072,
            "pad_token_id": 128002,
            "rope_theta": 500000.0,
            "vocab_size": 128259,
        },
        "vision_config": {"model_type": "idefics3", "image_size": 364, "patch_size": 14},
        "vocab_size": 128259,
    },
    generation={
        "_from_model_config": True,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128258],
        "pad_token_id": 128002,
    },
    pictures={
        **_TILES,
        "image_processor_type": "Idefics3ImageProcessor",
        "max_image_size": {"longest_edge": 364},
        "size": {"longest_edge": 1456},
    },
    processor={"image_seq_len": 169, "processor_class": "Idefics3Processor"},
    tokens=_numbered(128000, "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>")
    | _numbered(128256, "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    roles={
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|reserved_special_token_0|>",
        "additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    },
    begins=True,
    turns=(f"<|begin_of_text|>{_USER}", "<image>", "", _SAYS),
)

_SMOL_CONFIG = {
    "image_token_id": 49190,
    "pad_token_id": 128002,
    "scale_factor": 4,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "pad_token_id": 2,
        "rope_theta": 100000,
        "vocab_size": 49280,
    },
    "vocab_size": 49280,
}
_SMOL_TOKENS = {
    **_numbered(0, "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    **_numbered(49152, "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))),
    **_numbered(49189, "<fake_token_around_image>", "<image>"),
    "<end_of_utterance>": 49279,
}
_SMOL_ROLES = {
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "extra_special_tokens": {
        "end_of_utterance_token": "<end_of_utterance>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "image_token": "<image>",
    },
}
_SMOL_PICTURES = {**_TILES, "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}}
_SMOL_TURNS = (f"<|im_start|>{_USER}", "<image>", "", _SAYS)

SMOLVLM = Published(
    config={
        **_SMOL_CONFIG,
        "model_type": "idefics3",
        "bos_token_id": 1,
        "eos_token_id": 49279,
        "vision_config": {"model_type": "idefics3", "image_size": 512, "patch_size": 16},
    },
    generation={"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 49279, "pad_token_id": 2},
    pictures={**_SMOL_PICTURES, "image_processor_type": "Idefics3ImageProcessor"},
    processor={"image_seq_len": 64, "processor_class": "Idefics3Processor"},
    tokens=_SMOL_TOKENS,
    roles=_SMOL_ROLES,
    begins=False,
    turns=_SMOL_TURNS,
)

SMOLVLM2 = Published(
    config={
        **_SMOL_CONFIG,
        "model_type": "smolvlm",
        "vision_config": {"model_type": "smolvlm_vision", "image_size": 512, "patch_size": 16},
    },
    generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 49279], "pad_token_id": 2},
    pictures={
        **_SMOL_PICTURES,
        "image_processor_type": "SmolVLMImageProcessor",
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
    },
    processor={"image_seq_len": 64, "processor_class": "SmolVLMProcessor"},
    tokens=_SMOL_TOKENS,
    roles=_SMOL_ROLES,
    begins=False,
    turns=_SMOL_TURNS,
)

# Gemma 3

GEMMA3 = Published(
    config={
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    generation={
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "do_sample": True,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "top_k": 64,
        "top_p": 0.95,
    },
    pictures={
        **HALF,
        "do_convert_rgb": None,
        "do_pan_and_scan": None,
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 256,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "size": {"height": 896, "width": 896},
    },
    processor={"image_seq_length": 256, "processor_class": "Gemma3Processor"},
    tokens=_numbered(0, "<pad>", "<eos>", "<bos>", "<unk>")
    | _numbered(105, "<start_of_turn>", "<end_of_turn>")
    | _numbered(255999, "<start_of_image>", "<end_of_image>")
    | {"<image_soft_token>": 262144},
    roles={
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    },
    begins=True,
    turns=("<bos><start_of_turn>user\n", "<start_of_image>", "", "<end_of_turn>\n<start_of_turn>model\n"),
)

PUBLISHED = {
    "llava-1.5-7b-hf": LLAVA,
    "llava-v1.6-mistral-7b-hf": LLAVA_NEXT,
    "llava-onevision-qwen2-7b-ov-hf": ONEVISION,
    "Qwen2-VL-2B-Instruct": QWEN2_VL,
    "Qwen2.5-VL-7B-Instruct": QWEN2_5_VL,
    "Qwen3-VL-4B-Instruct": QWEN3_VL,
    "InternVL3-1B-hf": INTERNVL3,
    "Idefics3-8B-Llama3": IDEFICS3,
    "SmolVLM-256M-Instruct": SMOLVLM,
    "SmolVLM2-500M-Video-Instruct": SMOLVLM2,
    "gemma-3-4b-it": GEMMA3,
}
"""By the name of the folder."""
