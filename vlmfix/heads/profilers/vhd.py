"""Vision-aware head divergence: how far a head's output moves when the picture is taken away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import LastOutputs
from vlmfix.attention.session import edited
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Inputs with one entry per token."""


@dataclass(frozen=True, kw_only=True)
class HeadDivergence(Profiler):
    """Distance between a head's outputs at the token that predicts the answer, with the picture and without it.

        score = || A[last | picture and question] - A[last | question] ||_2        A before the output projection

    Without the picture, its image tokens are deleted from the prompt and everything else stays; positions are counted
    anew, so a head that ignores the picture still moves a little.

    Source: He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, arXiv
    2412.13949. *Differs*: the release squares the distance, which ranks alike within one picture; its test for heads
    that flare up without the picture belongs to the decoder and is not applied. *Cost*: one short pass beside the
    shared one.
    """

    name: ClassVar[str] = "vhd"
    title: ClassVar[str] = "change of output without the picture"

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State()


class _State(State):
    def __init__(self) -> None:
        self._shown: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        with _outputs(work.vlm, work.layout, self._shown):
            yield

    @torch.no_grad()
    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        blind: dict[int, Tensor] = {}
        model: Any = work.vlm.model
        batch = without_image_tokens(work.vlm, work.batch)
        with _outputs(work.vlm, work.vlm.layout(batch), blind):
            model(**batch, use_cache=False, logits_to_keep=1)
        found = {layer: (self._shown[layer] - blind[layer]).norm(dim=-1) for layer in blind}  # (B, H)
        return work.stacked(found)


@contextmanager
def _outputs(vlm: Checkpoint, layout: ImageLayout, found: dict[int, Tensor]) -> Iterator[None]:
    def read(site: Site, output: Tensor) -> None:
        found[site.layer] = output.float()  # (B, H, D), squares of float16 would overflow

    with edited(vlm, layout, [LastOutputs(reader=read)]):
        yield


def without_image_tokens(vlm: Checkpoint, batch: Batch) -> Batch:
    """The same prompts with every token that stands for a picture deleted, and without pixels."""
    kept = batch.attention_mask.bool() & (batch["input_ids"] != vlm.family.image_token(vlm.model.config))
    length = int(kept.sum(dim=1).max())
    inputs: dict[str, Tensor] = {}
    for name in TOKENS:
        if name in batch or name == "attention_mask":
            value = batch.attention_mask if name == "attention_mask" else batch[name]
            fill = vlm.processor.tokenizer.pad_token_id or 0 if name == "input_ids" else 0
            rows = [
                pad(part[mask], (length - int(mask.sum()), 0), value=fill)
                for part, mask in zip(value, kept, strict=True)
            ]
            inputs[name] = torch.stack(rows)
    return Batch(inputs=inputs, prompts=batch.prompts, system=batch.system)
