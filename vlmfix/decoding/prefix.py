"""Runs the common beginning of several rows' prompts once, and long prompts in pieces.

Questions about one picture differ only behind it. Prefill, the text decoder's first call, is split in two: the columns
before ``start`` run once per distinct beginning, and their keys and values are copied to every row with that
beginning; the columns from ``start`` on run per row, behind that cache. Columns keep their places, so masks, layouts
and everything above the text decoder see one ordinary prompt. Where ``start`` cuts into a row's own beginning (its
question is shorter than the longest), the row computes the few columns between once more.

Rows that are much shorter than others, such as the text alone beside a picture, are padding up to some column. Where
that is a good part of all tokens, the columns before it run for the other rows alone.

What remains of the pass of a long prompt is cut into pieces, each behind the cache of those before it, so that a
photograph of many tokens does not need the memory of a whole pass.

A pass is cut only where that is the same computation: the beginnings are equal as the decoder sees them (embeddings,
positions, deep features), no edit acts before ``start``, no sliding window ends inside the prompt, no rotary
embedding depends on the length of the pass, and no token of a beginning attends to one behind it. Everything else runs
as it would without this module.

Shape letters (``docs/notation.md``): B rows (all branches, beams expanded), T prompt tokens; here also U distinct
beginnings, P tokens of the longest, S = T - start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.attention.probe import Enough
from vlmfix.attention.session import bare, continued, first_edited, reads_hidden, recorded
from vlmfix.decoding.branches import Branch
from vlmfix.decoding.encoding import first_rows, repeats_pictures
from vlmfix.decoding.given import Given, mask_among, mask_from, read
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch
from vlmfix.upstream import cache as caches
from vlmfix.upstream import positions

PIECE = 8_192
"""Most tokens of all rows that pass through the text decoder together in prefill: enough for matrix products at their
best speed, with less than 1 GiB beside the weights and the cache in a model of 7 billion parameters."""
COLUMNS = 2_048
"""Prompts of at most this many tokens are not cut into pieces: attention behind a cache is slower than in one pass, and
what many short prompts need is their cache above all."""
PADDING = 0.25
"""Share of padding among the tokens of all rows from which on it is worth a further pass to leave it out."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Describes the rows of a prefill, and which of them may have a common beginning.

    Attributes:
        real: (B, T) bool, True where a prompt token is real; padding is on the left where beginnings are shared.
        alike: (B,) int64, the first row with the same pictures and the same tokens up to the last picture's end. A row
            without a picture is like its own beams alone. None when no two rows share a beginning.
    """

    real: Tensor
    alike: Tensor | None


def prompts_of(vlm: Checkpoint, batch: Batch, branches: Sequence[Branch], *, beams: int = 1) -> Prompts | None:
    """Describes the rows that a call of ``generate`` will run; None when no two of them can share a beginning.

    Args:
        vlm: The model.
        batch: The clean rows.
        branches: The branches that are stacked below them.
        beams: Number of beams.
    """
    if batch.pictures is None:
        return None
    batches = [batch, *(branch.batch for branch in branches)]
    shown = [batch, *(batch if branch.same_pictures else branch.batch for branch in branches)]
    pixels = {id(part.get("pixel_values")) for part in shown}
    if beams == 1 and len(pixels) == len(shown) and not repeats_pictures(batch):
        return None
    keys = [key for pair in zip(shown, batches, strict=True) for key in _keys(vlm, *pair) for _ in range(beams)]
    seen: dict[Hashable, int] = {}
    alike = [seen.setdefault(key, number) for number, key in enumerate(keys)]
    if len(seen) == len(keys):
        return None
    length = max(part.length for part in batches)
    masks = [torch.nn.functional.pad(part.attention_mask, (length - part.length, 0)) for part in batches]
    real = torch.cat(masks).bool().repeat_interleave(beams, dim=0)  # (B, T)
    if not bool((real.int().diff(dim=1) >= 0).all()):
        return None  # padded elsewhere than on the left
    return Prompts(real=real, alike=torch.tensor(alike, device=real.device))


def _keys(vlm: Checkpoint, shown: Batch, asked: Batch) -> list[Hashable]:
    """Makes a key of each row's beginning: its pixels, pictures, and tokens up to the last image token.

    Args:
        vlm: The model.
        shown: The batch whose pixels the rows see.
        asked: The batch whose prompts they have.
    """
    pixels, image = id(shown.get("pixel_values")), vlm.family.image_token(vlm.model.config)
    keys: list[Hashable] = []
    rows = zip(asked["input_ids"].tolist(), asked.attention_mask.tolist(), first_rows(shown), strict=True)
    for number, (ids, mask, first) in enumerate(rows):
        own = [token for token, real in zip(ids, mask, strict=True) if real]
        end = len(own) - own[::-1].index(image) if image in own else 0
        keys.append((pixels, first, *own[:end]) if end else (id(asked), number))
    return keys


@contextmanager
def cut_prefill(vlm: Checkpoint, prompts: Prompts) -> Iterator[None]:
    """Cuts the text decoder's first call inside the block, if it is a prefill, and leaves later calls alone.

    Args:
        vlm: The model; its text decoder's ``forward`` is restored by the first call, and at the latest on leaving.
        prompts: The rows of that call.
    """
    decoder: Any = vlm.family.decoder(vlm.model)
    owned = "forward" in decoder.__dict__
    original = decoder.forward
    short = prompts.real.shape[1] <= COLUMNS or prompts.real.numel() <= PIECE
    # asked now, since in the middle of the pass the host would wait for what the device has been told of it
    cuts = prompts.alike is not None or not short or _padding(prompts.real) >= PADDING

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (families differ)
        restore()
        given = None if args or not cuts else read(decoder, kwargs)
        if given is None or not _is_prefill(vlm, given, prompts.real):
            return original(*args, **kwargs)
        split = _split(vlm, prompts, given)
        if split is not None:
            return _run(vlm, original, split, given)
        return original(*args, **kwargs) if short else _rest(vlm, original, given, 0, {})

    def restore() -> None:
        if decoder.__dict__.get("forward") is forward:
            if owned:
                decoder.forward = original
            else:
                del decoder.forward

    decoder.forward = forward
    try:
        yield
    finally:
        restore()


@dataclass(frozen=True, eq=False)
class Split:
    """Says where prompts are split, and which row each beginning comes from.

    Attributes:
        start: Columns that are computed once per beginning.
        first: (U,) int64, the row that each beginning is taken from.
        of: (B,) int64, the beginning of each row.
        pad: (B,) int64, columns of padding before each row.
        length: P, tokens of the longest beginning.
    """

    start: int
    first: Tensor
    of: Tensor
    pad: Tensor
    length: int


def _padding(real: Tensor) -> float:
    """Returns the share of padding in (B, T) prompts."""
    return 1 - float(real.float().mean())


def _split(vlm: Checkpoint, prompts: Prompts, given: Given) -> Split | None:
    """Decides where to split; returns None when a split would save nothing, or too little where no beginning is shared.

    Args:
        vlm: The model.
        prompts: The rows.
        given: The call.
    """
    rows, total = prompts.real.shape
    every = torch.arange(rows, device=prompts.real.device)
    same = every if prompts.alike is None else prompts.alike
    pad = total - prompts.real.sum(dim=1)  # (B,)
    common = torch.minimum(
        _common(same, pad, given), total - pad - 2
    )  # (B,); leaves two queries: one alone is a decoding step
    common = common.scatter_reduce(0, same, common, "amin")[same]
    edited = first_edited(vlm)
    start = _start(pad, same, min(int((pad + common).min()), total if edited is None else edited), total)
    wanted = _wanted(pad, same, start)
    alike = torch.where(wanted[same] > 0, same, same[wanted.argmax()])
    first, of = alike.unique(return_inverse=True)
    needed = _closed(given.mask, first, pad[first], wanted[first])  # (U,)
    length = int(needed.max())
    saved = rows * total - len(first) * length - rows * (total - start)
    if bool((needed > common[first]).any()) or saved <= (PADDING * rows * total if prompts.alike is None else 0):
        return None
    return Split(start=start, first=first, of=of, pad=pad, length=length)


def _wanted(pad: Tensor, same: Tensor, start: int) -> Tensor:
    """Counts the tokens of each beginning that some row takes over, (B,), at the row that the beginning is taken from.

    Args:
        pad: (B,) columns of padding before each row.
        same: (B,) row that each row's beginning is taken from.
        start: See ``Split``.
    """
    wanted = (start - pad).clamp(min=0)
    return wanted.scatter_reduce(0, same, wanted, "amax")


def _start(pad: Tensor, same: Tensor, latest: int, total: int) -> int:
    """Chooses the last column that may be, or one at which rows begin, where far fewer tokens pass with that.

    Up to there a row of text beside rows with a picture is padding alone, and need not pass.

    Args:
        pad: As for ``_wanted``.
        same: As for ``_wanted``.
        latest: The last column that may be.
        total: T.
    """
    pad, same = pad.cpu(), same.cpu()

    def tokens(start: int) -> int:
        wanted = _wanted(pad, same, start)[same.unique()]
        return int((wanted > 0).sum()) * int(wanted.max()) + len(pad) * (total - start)

    best = min({latest, *(begin for begin in pad.tolist() if 0 < begin < latest)}, key=tokens)
    return best if tokens(latest) - tokens(best) >= PADDING * len(pad) * total else latest


def _run(vlm: Checkpoint, decoder: Callable[..., Any], split: Split, given: Given) -> Any:  # noqa: ANN401
    """Runs the beginnings, and then what each row has of its own; returns the last call's output."""
    total = given.embeds.shape[1]
    columns = torch.arange(total, device=split.pad.device)
    once = (split.pad[split.first, None] + columns[: split.length]).clamp(max=total - 1)  # (U, P)
    mask = mask_among(given.mask, split.first, once)  # None where the pass is cut into pieces
    fresh, first = DynamicCache(), split.first[:, None]
    pieces = _pieces(vlm, given, len(first), 0, split.length)
    with recorded(vlm) as hidden, suppress(Enough):  # the second pass ends at the same layer
        for begin, end in pieces:
            with suppress(Enough) if end < split.length else nullcontext():
                _call(decoder, given, first, once[:, begin:end], mask, fresh)
    token = (columns[: split.start] - split.pad[:, None]).clamp(min=0)  # (B, start), padding takes any

    def copied(values: Tensor) -> Tensor:
        there = values.device  # that of the layer
        return values[split.of[:, None].to(there), token.to(there)]  # (B, start, ...)

    for number, pair in enumerate(caches.keys_and_values(fresh)):
        keys, values = (copied(x.transpose(1, 2)).transpose(1, 2) for x in pair)
        caches.fill(given.cache, number, keys, values)  # (B, G, start, D)
    past = {number: functools.partial(copied, value) for number, value in hidden.items()}
    return _rest(vlm, decoder, given, split.start, past)


def _rest(
    vlm: Checkpoint,
    decoder: Callable[..., Any],
    given: Given,
    start: int,
    past: Mapping[int, Callable[[], Tensor]],
) -> Any:  # noqa: ANN401 (families differ)
    """Runs the columns from ``start`` on, piece by piece; returns the last call's output.

    Edits act in the last piece alone, which begins before the first column that they change.
    """
    rows, total, _ = given.embeds.shape
    every = torch.arange(rows, device=given.embeds.device)[:, None]
    columns = torch.arange(total, device=given.embeds.device).expand(rows, -1)
    *before, (begin, _) = _pieces(vlm, given, rows, start, total)
    for here, end in before:
        with bare(vlm), suppress(Enough):
            _call(decoder, given, every, columns[:, here:end], mask_from(given.mask, here, end), given.cache)
    with continued(vlm, begin, past):
        return _call(decoder, given, every, columns[:, begin:], mask_from(given.mask, begin, total), given.cache)


def _pieces(vlm: Checkpoint, given: Given, rows: int, start: int, end: int) -> list[tuple[int, int]]:
    """Cuts the columns from ``start`` to ``end`` into pieces of ``PIECE`` tokens, or ``COLUMNS``, as (begin, end) each.

    There is one piece where the mask has more in it than causality and padding (a picture whose tokens see each other
    must not be cut), or an edit reads the residual stream of all columns. The last piece has two columns at least,
    since one alone is a decoding step, and all columns that edits act on.
    """
    size = max(COLUMNS, PIECE // rows)
    first = first_edited(vlm)
    latest = end - 2 if first is None else min(end - 2, first)
    whole = isinstance(given.mask, dict) or (given.mask is not None and given.mask.dim() > 2) or reads_hidden(vlm)
    cuts = [] if whole else range(start + size, latest + 1, size)
    return list(pairwise([start, *cuts, end]))


def _call(
    decoder: Callable[..., Any],
    given: Given,
    rows: Tensor,
    columns: Tensor,
    mask: Any,  # noqa: ANN401
    cache: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401 (families differ)
    """Runs the text decoder over some tokens behind what stands in a cache; see ``_inputs``."""
    names = given.names
    return decoder(**given.at(rows, columns), **{names.mask: mask, names.cache: cache})


def _is_prefill(vlm: Checkpoint, given: Given, real: Tensor) -> bool:
    """Returns whether the call is a prefill into an empty cache, of a kind that can be split."""
    if given.embeds.shape[:2] != real.shape or given.positions is None:
        return False
    if not caches.is_plain(given.cache, real.shape[1]) or caches.length(given.cache) > 0:
        return False
    if given.all.get("output_attentions") or given.all.get("output_hidden_states"):
        return False  # these outputs would lack the beginning's columns
    masks = list(given.mask.values()) if isinstance(given.mask, dict) else [given.mask]
    known = all(_says(part, real) for part in masks) and len({part is None for part in masks}) == 1
    return known and not positions.grows(vlm.family.decoder(vlm.model))


def _says(mask: Any, real: Tensor) -> bool:  # noqa: ANN401 (what the decoder takes)
    """Returns whether a mask, or its absence, hides the prompt's padding and nothing else from the last token."""
    rows, total = real.shape
    if mask is None:
        return bool(real.all())
    if not isinstance(mask, Tensor) or mask.shape not in {(rows, total), (rows, 1, total, mask.shape[-1])}:
        return False
    return torch.equal(mask.bool() if mask.dim() == 2 else _allowed(mask[:, 0, -1, :total]), real)


def _allowed(mask: Tensor) -> Tensor:
    """Converts a mask, bool or added to the scores, to bool: True where a query may look."""
    return mask if mask.dtype == torch.bool else mask >= 0


def _common(alike: Tensor, pad: Tensor, given: Given) -> Tensor:
    """Counts the first tokens that each row shares with its ``alike`` row, (B,); all of them for that row itself.

    Tokens are equal where the decoder's inputs are equal: embeddings, positions, and deep features of the pictures.
    """
    embeds = given.embeds
    rows, total, _ = embeds.shape
    columns = torch.arange(total, device=pad.device)
    own = (alike != torch.arange(rows, device=pad.device)).nonzero().squeeze(1)  # (N,) rows that are like another row
    other = alike[own]
    source = columns - pad[own, None] + pad[other, None]  # (N, T), the other row's column of the same token
    inside = (source >= 0) & (source < total)
    at = (other[:, None], source.clamp(0, total - 1))
    places = given.places().reshape(-1, rows, total)
    same = inside & (embeds[own] == embeds[at]).all(dim=-1) & (places[:, own] == places[:, *at]).all(dim=0)
    visual = given.picture_tokens
    if visual is not None:
        number = visual.flatten().cumsum(0).view_as(visual) - 1
        both = visual[own] & visual[at]
        mine, theirs = number[own][both], number[at][both]
        for level in given.deep:
            same[both] &= (level[mine] == level[theirs]).all(dim=-1)
    differs = ~same & (columns >= pad[own, None])  # (N, T)
    end = torch.where(differs.any(dim=1), differs.int().argmax(dim=1), total)
    return (total - pad).index_copy(0, own, end - pad[own])


def _closed(mask: Any, first: Tensor, pad: Tensor, wanted: Tensor) -> Tensor:  # noqa: ANN401
    """Counts the tokens of each beginning, (U,), that must be computed so that the wanted ones are right.

    Bidirectional attention inside a picture can require more than those wanted.

    Args:
        mask: The decoder's mask: None or (B, T) for plain causality, (B, 1, T, K), or several of these by name.
        first: (U,) rows of the beginnings.
        pad: (U,) their padding.
        wanted: (U,) tokens wanted.
    """
    square = [part for part in (mask.values() if isinstance(mask, dict) else [mask]) if part is not None]
    square = [_allowed(part[first, 0]) for part in square if part.dim() == 4]  # (U, T, K)
    needed = wanted
    while True:
        grown = needed
        for allowed in square:
            query, key = (torch.arange(size, device=pad.device) for size in allowed.shape[1:])
            asking = (query >= pad[:, None]) & (query < (pad + grown)[:, None])  # (U, T)
            seen = (allowed & asking[:, :, None]).any(dim=1)  # (U, K)
            grown = torch.maximum(grown, torch.where(seen, key + 1, 0).amax(dim=1) - pad)
        if torch.equal(grown, needed):
            return needed
        needed = grown
