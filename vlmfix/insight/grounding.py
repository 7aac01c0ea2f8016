"""Measures grounding: each answer token's saliency over the picture, the prompt and the answer before it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.asked import Shown, pictures_of, questions_of
from vlmfix.attention.edit import LayerSet
from vlmfix.attention.saliency import mean_over
from vlmfix.decoding.choice import Known
from vlmfix.decoding.loop import decode
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.running import running
from vlmfix.errors import DataError
from vlmfix.insight.question import speaking
from vlmfix.insight.sinks import ImageSinks
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch, ImageLayout


@dataclass(frozen=True, eq=False)
class Grounding:
    """Holds the saliency of one answer, n tokens long.

    A score is the mean of ``Sbar`` over layers and over a set of keys, in [0, 1 / sqrt(number of keys)]; so compare it
    between tokens, not between sets of keys of different size. NaN where the set is empty.

    Attributes:
        tokens: The n judged tokens.
        texts: Each token as text.
        picture: (n,) score over the image patches.
        prompt: (n,) score over the prompt's text, template included.
        earlier: (n,) score over the answer's tokens before the judged one.
        preceding: (n,) score of the key just before; the paper's statistic for right and hallucinated tokens.
        counts: (n,) bool, tokens that ``mean`` averages over.
        rows: (n, T + n - 1) ``Sbar``, mean over layers, by the columns of the answer's batch: T of the prompt, then
            the answer's. ``layout.heatmap(rows[i, :T], ...)`` paints it over the picture.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    picture: Tensor
    prompt: Tensor
    earlier: Tensor
    preceding: Tensor
    counts: Tensor
    rows: Tensor

    def mean(self, name: str) -> float:
        """Averages a score over the answer's tokens that count and have one; NaN without any.

        Args:
            name: ``picture``, ``prompt``, ``earlier`` or ``preceding``.
        """
        return float(getattr(self, name)[self.counts].nanmean())


def grounding(
    vlm: Checkpoint,
    pictures: Sequence[Shown | Sequence[Shown]],
    prompts: str | Sequence[str],
    answers: Sequence[str | Sequence[int]],
    *,
    layers: LayerSet | str = "all",
    system: str | None = None,
    drop_sinks: bool = False,
) -> list[Grounding]:
    """Replays answers token by token and measures the saliency of each token.

    For token c of an answer, with attention A of the row that predicts it and ``loss = -log softmax(logits)[c]``:
    ``S = mean over heads |A * d loss / d A|`` and ``Sbar = S / ||S||_2``, layer by layer. "Hallucination Begins Where
    Saliency Drops" (ICLR 2026, arXiv 2601.20279) finds that hallucinated tokens owe little to the token before them
    (``preceding``).

    Each token is one cached pass and one backward pass through one row of attention, for all answers together; memory
    is linear in the prompt. The paper's printed norm, over the whole T x T matrix, is not offered: it would need all
    rows. The released picture demos multiply every layer by the gradient of layer 0, which is not reproduced.

    Args:
        vlm: The model, as it is: without a decoder.
        pictures: B pictures, or B lists of pictures.
        prompts: One question for all, or B questions.
        answers: B answers: token ids, such as ``Answer.ids``, which say exactly what was generated, or text, which is
            split into tokens as it stands alone.
        layers: Layers to average; the paper names none for its statistics.
        system: System message of all rows; None keeps the chat template's own.
        drop_sinks: Leaves out of ``picture`` and ``rows``, layer by layer, the patches that draw attention before the
            question is read (``ImageSinks``), and out of ``mean`` the tokens that write no part of a content word.

    Returns:
        One ``Grounding`` per answer, on the CPU.

    Raises:
        DataError: The numbers of pictures, prompts and answers differ, an answer is empty or a token is none of the
            model's, prompt and answer are longer than the model's context or than a sliding window of ``layers``, or
            the prompt alone than any.
        UnsupportedAttentionError: The model's attention is not plain softmax attention, or has none of ``layers``.
    """
    shown = pictures_of(pictures)
    asked = questions_of(prompts, len(shown))
    if isinstance(answers, str) or len(answers) != len(shown):
        given = "one text as" if isinstance(answers, str) else f"{len(answers)}"
        raise DataError(f"{len(shown)} pictures and {given} answers", "give a list with one answer per picture")
    ids = [_ids(vlm, answer, number) for number, answer in enumerate(answers)]
    batch = vlm.encode(asked, shown, system=system)
    layout = vlm.layout(batch)
    chosen = LayerSet(layers) if isinstance(layers, str) else layers
    for length, own in zip(batch.lengths, ids, strict=True):
        room_for_answers(vlm, length[None], wanted=len(own))
    replayed, sinks = _replayed(vlm, batch, layout, chosen, ids, drop_sinks=drop_sinks)
    return [
        _grounding(vlm, layout, ids[row], row, rows, None if sinks is None else sinks[row].all(dim=0))
        for row, rows in enumerate(replayed)
    ]


def _replayed(
    vlm: Checkpoint,
    batch: Batch,
    layout: ImageLayout,
    layers: LayerSet,
    answers: Sequence[Sequence[int]],
    *,
    drop_sinks: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Replays each row's n tokens.

    Returns:
        Their ``Sbar``, mean over layers, (n, T + n - 1) on the CPU per row; of patches that are sinks over the other
        layers. And these sinks, (B, layers, T) bool on the CPU, or None.
    """
    found: list[list[Tensor]] = [[] for _ in answers]
    search = ImageSinks(layers=layers)
    plan = DecodingPlan(edits=(search,) if drop_sinks else (), asks=layers)
    lengths = [len(answer) for answer in answers]
    sinks = None
    with running(vlm, batch, layout, plan, limit=lengths, name="grounding") as call:
        for said in decode(call, Known(answers, vlm.device), ends=()):
            each = call.owed.saliency(torch.tensor(said.tokens, device=vlm.device))  # (layers, L, K)
            if drop_sinks and sinks is None:
                sinks = search.found().cpu()
            saliency = each.mean(dim=0).cpu() if sinks is None else _mean(each.cpu(), sinks[list(said.samples)])
            for row, own in zip(said.samples, saliency, strict=True):
                found[row].append(pad(own, (0, batch.length + lengths[row] - 1 - len(own))))
    return [torch.stack(rows) for rows in found], sinks


def _mean(saliency: Tensor, sinks: Tensor) -> Tensor:
    """Averages (layers, L, K) saliency over layers, without (L, layers, T) sinks, (L, K); 0 where all are."""
    out = pad(sinks.transpose(0, 1), (0, saliency.shape[-1] - sinks.shape[-1]))
    return saliency.masked_fill(out, 0.0).sum(dim=0) / (~out).sum(dim=0).clamp(min=1)


def _grounding(
    vlm: Checkpoint, layout: ImageLayout, ids: Sequence[int], row: int, rows: Tensor, sinks: Tensor | None
) -> Grounding:
    """Computes the scores of one row; ``rows`` is (n, T + n - 1), ``sinks`` (T,) bool is left out of ``picture``."""
    count, prompt = len(ids), layout.tokens.shape[1]
    column = torch.arange(rows.shape[1])
    place = torch.arange(count)[:, None]
    answered = (column >= prompt) & (column < prompt + place)  # (n, K)
    preceding = rows.diagonal(prompt - 1).clone()  # (n,), row i looks at column T - 1 + i
    preceding[0] = float("nan")  # the prompt's last token is not part of the answer

    def over(keys: Tensor) -> Tensor:
        return mean_over(rows[None], keys.cpu().expand_as(rows))

    image = layout.image_keys(rows.shape[1])[row].cpu()
    counts = torch.ones(count, dtype=torch.bool)
    if sinks is not None:
        image = image & ~pad(sinks, (0, len(image) - len(sinks)))
        counts = torch.tensor(speaking(vlm, ids))
    return Grounding(
        tokens=tuple(ids),
        texts=tuple(vlm.processor.tokenizer.decode([token]) for token in ids),
        picture=over(image),
        prompt=over(layout.text_keys(rows.shape[1])[row]),
        earlier=over(answered),
        preceding=preceding,
        counts=counts,
        rows=rows,
    )


def _ids(vlm: Checkpoint, answer: str | Sequence[int], number: int) -> list[int]:
    if isinstance(answer, str):
        answer = vlm.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    size = vlm.model.config.get_text_config().vocab_size
    try:
        given: Any = answer
        ids = [operator.index(token) for token in given]
    except TypeError as error:
        raise DataError(
            f"answer {number} is neither text nor token ids: {error}", "give Answer.ids or a text"
        ) from error
    if not ids or not all(0 <= token < size for token in ids):
        raise DataError(
            f"answer {number} has the tokens {ids[:10]}", f"an answer has one token at least, each in [0, {size})"
        )
    return ids
