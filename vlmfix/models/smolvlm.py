"""SmolVLM and Idefics3: tiles that are named in the prompt by row and column, then the whole picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.models.family import Family
from vlmfix.models.grid import WHOLE, cells, merged
from vlmfix.models.layout import Batch


class SmolVLM(Family):
    """SmolVLM and Idefics3: the picture is stretched over square tiles; all of it, in one square, comes last.

    The prompt names every tile, ``<row_2_col_1>`` before its tokens, so places are read from the prompt and
    no size is needed. Some tokenizers have a token per name, others spell it: the text is what they share. A
    picture that is not split has the last square alone.
    """

    title = "SmolVLM and Idefics3"
    model_types = frozenset({"smolvlm", "idefics3"})

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text decoder; these models call it ``text_model``."""
        decoder = model.model.text_model
        if not isinstance(decoder, nn.Module):
            raise TypeError(f"{type(model).__name__} has no text_model module")
        return decoder

    def patches(self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch) -> list[list[Tensor]]:
        """Boxes of every tile's tokens, then of the whole picture's; see ``Family.patches``."""
        tokenizer = processor.tokenizer
        token = tokenizer.convert_ids_to_tokens(self.image_token(model.config))
        return [_pictures(tokenizer.decode(ids), token) for ids in batch["input_ids"].tolist()]

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The vision tower; these models call it ``vision_model``."""
        tower = model.model.vision_model
        if not isinstance(tower, nn.Module):
            raise TypeError(f"{type(model).__name__} has no vision_model module")
        return tower

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """Sums over the squares of patches that become one token; see ``Family.per_token``."""
        values = torch.cat(list(patches))  # (views, patches)
        side = isqrt(values.shape[1])
        return merged(values, (side, side), model.config.scale_factor).flatten()

    def pixel_rows(self, model: PreTrainedModel, batch: Batch, counts: Sequence[int]) -> Tensor:
        """``pixel_values`` has one entry per row, filled up with tiles of zeros; see the base."""
        return torch.arange(len(counts))


def _pictures(text: str, image_token: str) -> list[Tensor]:
    """Boxes of the tokens of every picture in a row's prompt, in which each picture ends with all of it."""
    pictures = []
    rows, columns = 0, 0
    for match in re.finditer(rf"(?:<row_(\d+)_col_(\d+)>)?((?:{re.escape(image_token)})+)", text):
        if match[1]:  # the last tile that is named before the whole picture is the lower right one
            rows, columns = int(match[1]), int(match[2])
            continue
        side = isqrt(len(match[3]) // len(image_token))
        squares = [*cells(rows, columns).tolist(), WHOLE]
        pictures.append(torch.cat([cells(side, side, within=square) for square in squares]))
        rows, columns = 0, 0
    return pictures
