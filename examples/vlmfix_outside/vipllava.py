"""ViP-LLaVA: LLaVA's view of the picture, from several layers of its vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.extend import Llava


class VipLlava(Llava):
    """ViP-LLaVA: places tokens as LLaVA-1.5 does, and always leaves the class token out."""

    title = "ViP-LLaVA"
    model_types = frozenset({"vipllava"})

    def completed(self, model: PreTrainedModel, processor: ProcessorMixin) -> tuple[ProcessorMixin, dict[str, Any]]:
        """Adds nothing: the processor's files are complete."""
        return processor, {}

    def per_token(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], patches: Sequence[Tensor]) -> Tensor:
        """Each token is one patch; the first of each view is the class token."""
        return torch.cat(list(patches))[:, 1:].flatten()
