"""Declares the interface that each model family implements, in one file per family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vlmfix.errors import UsageError
from vlmfix.models.layout import Batch


class Family(ABC):
    """Says of one model family where its decoder's attention is and how its pictures become tokens."""

    title: ClassVar[str]
    """Name in messages and tables, for instance ``LLaVA-1.5``."""
    model_types: ClassVar[frozenset[str]]
    """Values of ``config.model_type`` that this family serves."""
    apart: ClassVar[bool] = False
    """Whether the image processor makes the same tensors of rows one by one as of all at once; where it is False, the
    processor pads the pictures of a call to each other."""

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """Returns the text decoder: the module that owns ``layers``."""
        decoder = model.model.language_model
        if not isinstance(decoder, nn.Module):
            raise TypeError(f"{type(model).__name__} has no language_model module")
        return decoder

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Returns the L decoder layers in order; each has ``self_attn``."""
        return list(self.decoder(model).get_submodule("layers").children())

    def attention_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """Returns the L attention modules of the text decoder, in layer order; never one of the vision tower."""
        return [layer.get_submodule("self_attn") for layer in self.layers(model)]

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """Returns the vision tower."""
        tower = model.model.vision_tower
        if not isinstance(tower, nn.Module):
            raise TypeError(f"{type(model).__name__} has no vision_tower module")
        return tower

    def tower_attention(self, model: PreTrainedModel) -> list[nn.Module]:
        """Returns the attention modules of the vision tower, in layer order."""
        return [module for module in self.tower(model).modules() if getattr(module, "is_causal", None) is False]

    def class_tokens(self, model: PreTrainedModel) -> int:
        """Counts the class tokens before the patches in the vision tower: 1 or 0."""
        names = [name.rpartition(".")[2] for name, _ in self.tower(model).named_parameters()]
        return int("class_embedding" in names or "cls_token" in names)

    def image_token(self, config: PreTrainedConfig) -> int:
        """Returns the id of the token that stands for one image patch in ``input_ids``."""
        return int(config.image_token_id)

    def process(
        self, processor: ProcessorMixin, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]
    ) -> Mapping[str, Tensor]:
        """Turns rendered chat texts and their pictures into model inputs, left-padded.

        Every row has its own list of pictures: some processors ask for that, one (LLaVA-OneVision) reads a
        flat list as one picture per row, and the others take either.

        Args:
            processor: The model's processor; it is left as it was found.
            texts: B rendered chat prompts with the family's picture placeholders.
            pictures: Pictures of each row, RGB; a row may have none.

        Returns:
            The processor's tensors: ``input_ids`` (B, T), ``attention_mask`` (B, T), pixels and what belongs
            to them.
        """
        nested = [list(row) for row in pictures]
        begin = processor.tokenizer.bos_token
        inputs = processor(
            text=list(texts),
            images=nested if any(nested) else None,
            padding=True,
            padding_side="left",
            # A template that writes the first token itself must not get a second one from the tokenizer.
            add_special_tokens=begin is None or not texts[0].startswith(begin),
            return_tensors="pt",
        )
        return dict(inputs)

    def completed(self, model: PreTrainedModel, processor: ProcessorMixin) -> tuple[ProcessorMixin, dict[str, Any]]:
        """Completes the processor with settings that its files leave out and the model's configuration has.

        Args:
            model: The model.
            processor: Its processor; it is left as it was found.

        Returns:
            The processor, a copy where something is added, and what was added: name -> value. The default adds nothing.
        """
        return processor, {}

    def limited(self, processor: ProcessorMixin, *, most: int | None, least: int | None) -> ProcessorMixin:
        """Copies the processor with limits on the pixels, height times width, that it makes of a picture.

        Args:
            processor: The model's processor; it is left as it was found.
            most: The upper limit, at least 1; None leaves the processor's own.
            least: The lower one, likewise; one of both is given.

        Raises:
            UsageError: The processor has no such limits, or the lower one is above the upper.
        """
        given = f"max_pixels={most}" if least is None else f"min_pixels={least}"
        raise UsageError(
            f"{given}: processors of {self.title} have no limit on the pixels of a picture",
            "leave it out; Qwen2-VL, Qwen2.5-VL and Qwen3-VL have one",
        )

    def enlarged(self, processor: ProcessorMixin, size: tuple[int, int], together: int) -> int:
        """Counts the pixels of the largest picture that the processor makes of one on its way to patches or tiles.

        Args:
            processor: The model's processor; only its settings are read.
            size: (height, width) of the picture in pixels.
            together: Pictures in its row.

        Returns:
            0, the default, where the processor's settings bound the pixels for any picture.
        """
        return 0

    def sharing(self, processor: ProcessorMixin) -> Any:  # noqa: ANN401 (its parts are to be replaced)
        """Copies the processor so that its image processor may return fewer pictures than the rows refer to."""
        return copy(processor)

    @abstractmethod
    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Finds the place in its picture that each image token shows.

        Args:
            model: The model; only its configuration is read.
            processor: Its processor; only its settings are read.
            batch: Encoded rows.

        Returns:
            For each row, for each of its pictures, (n, 4) float32 boxes x0, y0, x1, y1 in [0, 1] of the
            original picture, one per token equal to ``image_token``, in token order. A token that stands for
            no patch (newline, class token) is NaN; a patch without a place (padding, or one that depends on
            an unknown ``batch.sizes``) is inf.
        """

    @abstractmethod
    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """Sums values of the vision tower's tokens over the tokens that each image token is made of.

        Args:
            model: The model.
            inputs: The inputs that belong to the pictures, as the tower reads them.
            patches: One value for each of the tower's tokens, (views, tokens) float32 of every call of its attention,
                in the order of the calls; a view is a picture, a tile of one or a window of one.

        Returns:
            (n,) float32, one value per token equal to ``image_token``, in the order of the prompts; NaN where the token
            stands for no patch.
        """

    def pixel_rows(self, model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> Tensor:
        """Finds the row that each entry of ``pixel_values`` belongs to.

        Args:
            model: The model; only its configuration is read.
            batch: Encoded rows with pictures.
            counts: Number of pictures of each row.

        Returns:
            (len(pixel_values),) int64 on the CPU. The default fits one entry per picture.
        """
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts)))

    def owners(self, model: PreTrainedModel, batch: Batch, name: str, counts: Sequence[int]) -> Tensor:
        """Finds the row that each entry of a pictures' input, such as ``image_sizes``, belongs to.

        Args:
            model: The model; only its configuration is read.
            batch: Encoded rows with pictures.
            name: Name of the input, ``image_sizes`` for instance.
            counts: Number of pictures of each row.

        Returns:
            (n,) int64 on the CPU, ascending; n is the length of the input.
        """
        if name in ("pixel_values", "pixel_attention_mask"):
            return self.pixel_rows(model, batch, counts)
        if name == "batch_num_images":  # rows without a picture are left out
            return torch.tensor(list(counts)).nonzero().squeeze(1)
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts)))


def by_row(batch: Batch, image_token: int, pictures: Sequence[Tensor]) -> list[list[Tensor]]:
    """Assigns the pictures of a batch to its rows, by the image tokens that each row has.

    Args:
        batch: Encoded rows.
        image_token: Id of the token that stands for one image patch.
        pictures: Boxes of every picture, in the order of the prompts.

    Returns:
        Per row, its pictures. When the tokens do not come out even, a row gets too many or too few boxes,
        which ``Checkpoint.layout`` reports.
    """
    rows: list[list[Tensor]] = []
    rest = list(pictures)
    for wanted in (batch["input_ids"] == image_token).sum(dim=1).tolist():
        row: list[Tensor] = []
        while rest and sum(len(picture) for picture in row) < wanted:
            row.append(rest.pop(0))
        rows.append(row)
    rows[-1].extend(rest)
    return rows
