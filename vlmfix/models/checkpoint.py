"""A loaded model with its processor and its family: load, encode, layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from vlmfix.errors import DataError, LayoutError, UnsupportedModelError, UsageError
from vlmfix.models.families import family_of
from vlmfix.models.family import Family
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.models.repeats import process_once
from vlmfix.upstream import hub
from vlmfix.upstream.contracts import check_model
from vlmfix.upstream.names import PROCESSED
from vlmfix.upstream.versions import missing
from vlmfix.upstream.wrappers import device_of

EMBEDDED = {name: Path(__file__).parent.parent / "world" / "assets" / name for name in ("tiny", "tiny-qwen")}
"""Models that come with the package, by name."""

_WHAT_LOADS = "give 'tiny', 'tiny-qwen', a Hub id such as llava-hf/llava-1.5-7b-hf, or a directory with config.json"

HEADS = "heads.safetensors"
"""File in a model's folder that profiles of its heads are looked for in; it holds no weights."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A vision-language model as transformers loaded it, with what vlmfix must know about it.

    Attributes:
        model: The stock transformers model. While it answers it is in eval mode, whatever it is in between.
        processor: Its processor, unchanged.
        family: Where its attention and its image tokens are.
        name: What it was loaded by.
        revision: Commit of the Hub snapshot, or None for a local directory.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    family: Family
    name: str = ""
    revision: str | None = None

    @classmethod
    def load(cls, model: str | Path, *, revision: str | None = None, device: str = "auto", dtype: str = "auto") -> Self:
        """Loads a checkpoint through stock transformers classes.

        Args:
            model: ``tiny`` or ``tiny-qwen`` (they come with the package), a Hub id, or a local directory.
            revision: Branch, tag or commit on the Hub.
            device: ``auto`` (the GPU when there is one), or a torch device such as ``cpu`` or ``cuda:1``.
            dtype: ``auto`` (the checkpoint's own on a GPU, float32 on the CPU), ``float32``, ``bfloat16`` or
                ``float16``.

        Raises:
            UnsupportedModelError: The model's family is not one that vlmfix knows.
            DataError: There is no such checkpoint, or it cannot be read.
            UpstreamError: The installed transformers hands masks over in an unknown way.
            UsageError: Unknown device or dtype.
        """
        path = str(EMBEDDED.get(str(model), model))
        place = _device(device)
        kind = _dtype(dtype, place)
        try:
            config = _config(path, revision)
            family = family_of(str(config["model_type"]))
            processor = AutoProcessor.from_pretrained(path, revision=revision)
            loading: Any = AutoModelForImageTextToText.from_pretrained(
                path, revision=revision, dtype=kind, device_map=place, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(f"cannot load model {str(model)!r}: {_first_line(error)}", _WHAT_LOADS) from error
        loaded, report = loading
        if missing := sorted(report["missing_keys"]):
            raise DataError(
                f"model {str(model)!r} lacks {len(missing)} weights, {missing[0]} among them",
                "download it again; transformers would go on with random numbers instead",
            )
        check_model(loaded, family.decoder(loaded))
        commit = hub.commit(path, revision)
        return cls(model=loaded.eval(), processor=processor, family=family, name=str(model), revision=commit)

    @property
    def device(self) -> torch.device:
        """Where the inputs go: to the embeddings, or where accelerate brings those when it keeps them elsewhere.

        Raises:
            UnsupportedModelError: The weights were never loaded.
        """
        return device_of(self.model)

    @property
    def layers(self) -> int:
        """L, layers of the text decoder."""
        return len(self.family.layers(self.model))

    @property
    def heads(self) -> int:
        """H, query heads of the text decoder."""
        return int(self.model.config.get_text_config().num_attention_heads)

    @property
    def folder(self) -> Path | None:
        """The local folder that the model was loaded from: a directory, or the Hub's snapshot in the local cache.

        None for a model that was made in this process, or whose folder is gone.
        """
        return hub.folder(str(self.model.config.name_or_path), self.revision)

    def encode(
        self,
        prompts: Sequence[str | None],
        pictures: Sequence[Sequence[Image.Image]],
        *,
        system: str | None = None,
    ) -> Batch:
        """Renders the chat template and runs the processor, left-padded.

        The image processor sees pictures that several rows share, the same objects in the same order, once.

        Args:
            prompts: B questions; may be empty, or None for a user turn without any text.
            pictures: B sequences of RGB pictures; a row may have none, one or several.
            system: System message; None keeps the template's own.

        Raises:
            DataError: ``prompts`` and ``pictures`` differ in length, or there is no row.
            UnsupportedModelError: The processor has no chat template.
            UpstreamError: The processor returns its tensors under other names.
        """
        if len(prompts) != len(pictures) or not prompts:
            raise DataError(
                f"{len(prompts)} prompts and {len(pictures)} picture lists",
                "give one list of pictures per prompt",
            )
        texts = [self.render(prompt, len(row), system=system) for prompt, row in zip(prompts, pictures, strict=True)]
        whole, sources = process_once(self.family, self.model, self.processor, texts, pictures)
        if absent := [name for name in PROCESSED if name not in whole and (name != "pixel_values" or any(pictures))]:
            raise missing(f"{type(self.processor).__name__} returns no {' and '.join(absent)}")
        inputs = {name: self._placed(value) for name, value in whole.items() if isinstance(value, Tensor)}
        repeated = {name: inputs[name][source.to(self.device)] for name, source in sources.items()}
        return Batch(
            inputs={**inputs, **repeated},
            prompts=tuple(prompts),
            pictures=tuple(tuple(row) for row in pictures),
            sizes=tuple(tuple((picture.height, picture.width) for picture in row) for row in pictures),
            system=system,
        )

    def render(self, prompt: str | None, pictures: int, *, system: str | None = None) -> str:
        """The chat template's text for one question about ``pictures`` pictures, ready for the answer."""
        if getattr(self.processor, "chat_template", None) is None:
            raise UnsupportedModelError(
                f"the processor of {self.name or type(self.model).__name__} has no chat template",
                "use a checkpoint in transformers format, such as the llava-hf conversions",
            )
        content = [{"type": "image"}] * pictures
        if prompt is not None:
            content = [*content, {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def layout(self, batch: Batch) -> ImageLayout:
        """Which prompt token shows which part of which picture.

        Raises:
            LayoutError: The number of image tokens and of places in the pictures differ.
        """
        ids = batch["input_ids"]
        marked = ids == self.family.image_token(self.model.config)
        places = self.family.patches(self.model, self.processor, batch) if bool(marked.any()) else [[]] * batch.rows
        boxes = torch.full((*ids.shape, 4), float("nan"))
        image = torch.full(ids.shape, -1, dtype=torch.long)
        for row, pictures in enumerate(places):
            where = marked[row].nonzero().squeeze(1).cpu()
            count = sum(len(picture) for picture in pictures)
            if len(where) != count:
                raise LayoutError(
                    f"row {row} has {len(where)} image tokens but its pictures fill {count}",
                    "the inputs were cut, or made with another processor",
                )
            if pictures:
                boxes[row, where] = torch.cat(pictures)
                image[row, where] = torch.arange(len(pictures)).repeat_interleave(
                    torch.tensor([len(picture) for picture in pictures])
                )
        boxes, image = boxes.to(ids.device), image.to(ids.device)
        separator = boxes.isnan().any(dim=2)
        tokens = marked & ~separator
        return ImageLayout(
            tokens=tokens,
            text=batch.attention_mask.bool() & ~marked,
            image=torch.where(tokens, image, -1),
            boxes=torch.where(boxes.isinf(), float("nan"), boxes),
        )

    def _placed(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        return value.to(self.model.dtype) if value.is_floating_point() else value


def _config(path: str, revision: str | None) -> dict[str, Any]:
    """What config.json says, a model type at least; what is plainly a path is never asked of the Hub."""
    local = Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1
    if local and not Path(path).is_dir():
        raise DataError(f"there is no directory {path!r}", _WHAT_LOADS)
    config = hub.settings(path, revision)
    if "model_type" not in config:
        raise DataError(f"{path!r} has no config.json with a model_type", _WHAT_LOADS)
    return config


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} asked for, but torch sees no GPU", "use --device cpu")
    return place


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
