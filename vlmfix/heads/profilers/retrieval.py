"""Retrieval heads: heads that look at the very token that is being written.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, T prompt tokens; here also N words' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.edit import Site
from vlmfix.attention.probe import LastRows
from vlmfix.attention.session import edited
from vlmfix.errors import LayoutError
from vlmfix.heads.profiler import Profiler, State
from vlmfix.insight.wording import Tail
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

WORDS = tuple(
    "amber anchor basket beacon bridge candle canyon carpet castle cedar copper cotton desert drawer engine feather "
    "garden glacier hammer harbor island jacket kettle ladder lantern marble meadow mirror needle orchard paddle "
    "pepper pillow planet ribbon saddle silver tunnel velvet window".split()
)
"""What the needle is drawn from."""
ASKED = "The secret words are: {needle}. {question} Then repeat the secret words."


@dataclass(frozen=True, kw_only=True)
class Retrieval(Profiler):
    """Share of a needle's tokens that a head copies: at the step that writes token w, its attention peaks on a w.

        score = #{tokens w of the needle: argmax of the row that predicts w lies in the needle and on a w} / |needle|

    The prompt holds a needle of random words beside the question, and the answer is the needle.

    Source: Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574. *Differs*:
    the answer is given to the model and not generated, so that one pass has all steps and a model that copies badly
    has a profile too; with that, counting steps and counting tokens are the same. The hay is the picture. *Cost*: one
    pass of its own.

    Args:
        words: Length of the needle in words, from 1 to 40.
    """

    name: ClassVar[str] = "retrieval"
    title: ClassVar[str] = "share of tokens copied"

    words: int = 8

    def __post_init__(self) -> None:
        self._require(1 <= self.words <= len(WORDS), "words", f"from 1 to {len(WORDS)}")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self.words)


class _State(State):
    shares: ClassVar[bool] = False

    def __init__(self, words: int) -> None:
        self._words = words

    @torch.no_grad()
    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        needles = [self._needle(work, row) for row in range(work.batch.rows)]
        questions = [
            ASKED.format(needle=needle, question=asked or "")
            for needle, asked in zip(needles, work.batch.prompts or (), strict=True)
        ]
        batch = work.vlm.encode(questions, work.batch.pictures or (), system=work.batch.system)
        asked = Work(work.vlm, batch, work.vlm.layout(batch), work.first, work.seed)
        places = [place_of(Tail.of(asked, row), needle) for row, needle in enumerate(needles)]
        found = copied(work.vlm, batch, asked.layout, places)
        return work.stacked(found)

    def _needle(self, work: Work, row: int) -> str:
        return " ".join(work.random(row).sample(WORDS, self._words))


def place_of(tail: Tail, needle: str) -> list[int]:
    """Finds the columns of the needle's tokens.

    Raises:
        LayoutError: The prompt does not hold the needle.
    """
    start = tail.text.find(needle)
    if start < 0:
        raise LayoutError(f"the prompt does not hold {needle!r}", "the chat template must keep the user's words")
    return tail.over(start, start + len(needle))


def copied(vlm: Checkpoint, batch: Batch, layout: ImageLayout, places: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Share of each row's needle that each head copies when the model is made to say the needle.

    Args:
        vlm: The model.
        batch: B prompts.
        layout: Their layout.
        places: For each row, the columns of its needle's tokens, ascending.

    Returns:
        Layer number -> (B, H), in [0, 1].
    """
    ids = batch["input_ids"]
    steps = max(len(place) for place in places)
    counts = torch.zeros(batch.rows, steps, dtype=torch.bool, device=ids.device)
    answer = ids.new_zeros(batch.rows, steps)  # (B, N)
    needle = torch.zeros_like(ids, dtype=torch.bool)
    for row, place in enumerate(places):
        counts[row, : len(place)] = True
        answer[row, : len(place)] = ids[row, list(place)]
        needle[row, list(place)] = True
    found: dict[int, Tensor] = {}

    def read(site: Site, weights: Tensor) -> None:
        peak = weights[:, :, -steps - 1 : -1].argmax(dim=-1)  # (B, H, N), the rows that predict the answer
        inside = pad(needle, (0, steps))  # (B, K)
        every = torch.cat([ids, answer], dim=1)  # (B, K)
        heads = peak.shape[1]
        on = inside[:, None].expand(-1, heads, -1).gather(2, peak)  # (B, H, N)
        same = every[:, None].expand(-1, heads, -1).gather(2, peak) == answer[:, None]
        hits = (on & same & counts[:, None]).sum(dim=2)  # (B, H)
        found[site.layer] = hits / counts.sum(dim=1)[:, None]

    model: Any = vlm.model
    with edited(vlm, layout, [LastRows(reader=read)]):
        model(**answered(batch, answer), use_cache=False, logits_to_keep=1)
    return found


def answered(batch: Batch, answer: Tensor) -> Batch:
    """Puts the beginning of an answer, (B, N) tokens, behind prompts."""
    inputs = {
        name: torch.cat([batch[name], torch.zeros_like(answer, dtype=batch[name].dtype)], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids")
        if name in batch
    }
    mask = torch.cat([batch.attention_mask, torch.ones_like(answer)], dim=1)
    return batch.with_inputs(input_ids=torch.cat([batch["input_ids"], answer], dim=1), attention_mask=mask, **inputs)
