"""Runs the model's passes of one call: prefill, and one decoding step for every further token.

The call owns the KV cache, the mask and the positions, and gives them to the model's public ``forward``. Shape letters
(``docs/notation.md``): R rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from vlmfix.attention.edit import AttentionEdit
from vlmfix.attention.state import Plans
from vlmfix.decoding.exits import Reader
from vlmfix.decoding.graphs import ROOM, SHORT, Recorded, Recordings, capacity, kind_of, slots
from vlmfix.decoding.newest import Recorder
from vlmfix.decoding.rows import Rows
from vlmfix.errors import UpstreamError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream import cache as caches
from vlmfix.upstream.names import name_of
from vlmfix.upstream.norms import fused
from vlmfix.upstream.versions import say_once


class Passes:
    """Runs the passes over the rows of one call, in order: ``prompt`` once, then ``token`` as often as wanted.

    Args:
        vlm: The model; edits that are at work act in these passes.
        rows: The rows.
        room: Longest answer in tokens.
        plans: The edits at work.
        recordings: The model's recorded steps; None to record no step, and to run the model's own norms.
        roomy: Whether the cache reserves room for further keys and values; False for rows that change their order at
            every step.
        reader: Reads layers before the last as if they were the last, or None.
        recorder: The edit that begins each step's autograd graph and keeps its nodes, or None.
    """

    def __init__(
        self,
        vlm: Checkpoint,
        rows: Rows,
        room: int,
        *,
        plans: Plans,
        recordings: Recordings | None = None,
        roomy: bool = True,
        reader: Reader | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._model: Any = vlm.model
        self._decoder, self._fuses = vlm.family.decoder(vlm.model), recordings is not None
        taken = ("ids", "positions", "mask", "cache")
        self._names = [name_of(type(vlm.model), value) for value in taken]
        self._rows, self._plans, self._reader, self._recorder = rows, plans, reader, recorder
        self._left = room
        self._recordings = recordings if room > SHORT else None
        self._recorded: Recorded | None = None
        self._new = False
        self._cache: Any = self._roomy(room) if roomy else caches.fresh(vlm.model)
        if not caches.is_roomy(self._cache):
            self._recordings = None
        self._mask = rows.mask  # (R, T + tokens so far)
        self._next = rows.positions[..., -1:]  # (R, 1) or (3 or 4, R, 1), the newest token's

    def _roomy(self, room: int) -> Cache:
        rows, tokens = len(self._rows.ids), self._rows.length
        if self._recordings is None:
            return caches.roomy(self._model, caches.Arena(), rows, tokens + min(room, ROOM), ROOM)
        return caches.roomy(self._model, self._recordings.arena, slots(rows), capacity(tokens, room), ROOM)

    @property
    def recorded(self) -> bool:
        """Returns whether the newest token passed in a step recorded earlier, whose replay calls no edit."""
        return self._recorded is not None and not self._new

    @property
    def replays(self) -> bool:
        """Returns whether the next token passes in a step that is recorded."""
        return self._recorded is not None and not self._recorded.full

    @property
    def cache(self) -> DynamicCache:
        """Returns the KV cache of the present rows; valid while no step is recorded."""
        cache: DynamicCache = self._cache
        return cache

    def learned(self, edit: AttentionEdit, name: str) -> dict[int, Tensor]:
        """Returns what an edit has learned of keys, layer by layer; see ``Running.learned``."""
        recorded, found = self._recorded, {}
        for layer, plan in self._plans.items():
            for place, step in enumerate(plan.steps):
                if step.edit is edit and recorded is None:
                    found[layer] = step.memory.of_keys[name]
                elif step.edit is edit and recorded is not None:
                    found[layer] = recorded.steps[layer][place].memory.of_keys[name][recorded.rows]
        return found

    def prompt(self) -> Tensor:
        """Runs prefill; returns the logits that follow each prompt, (R, V) float32."""
        rows = self._rows
        return self._logits(rows.ids, rows.positions, self._mask, self._cache, **rows.types, **rows.pictures)

    def again(self) -> Tensor:
        """Drops each prompt's last token from the cache and runs it again alone; returns its (R, V) float32 logits."""
        caches.drop_last(self._cache)
        return self._logits(self._rows.ids[:, -1:], self._next, self._mask, self._cache)

    def token(self, tokens: Tensor) -> Tensor:
        """Runs a further token of each row; returns the logits that follow it, (R, V) float32.

        Args:
            tokens: (R,) int64.
        """
        self._left, self._new = self._left - 1, False
        if self._recorded is not None and self._recorded.full:
            self._recorded.give_back(self._plans)
            self._go_on_unrecorded(self._recorded)
        elif self._recorded is None and self._recordings is not None:
            self._record(self._recordings)
        if self._recorded is not None and self._recorder is not None:
            logits, nodes = self._recorded.with_nodes(tokens)
            self._recorder.seen.update(nodes)
            return logits
        if self._recorded is not None:
            return self._recorded.token(tokens)
        return self._behind(tokens[:, None])

    def apart(self, rows: Tensor) -> Passes:
        """Returns passes over some of the rows, (R',) int64, from here on; these passes keep all of theirs.

        Its steps are not recorded, and nobody reads its early layers. It is for the end of prefill.
        """
        other = copy.copy(self)
        other._recordings, other._reader, other._recorder = None, None, None
        other._cache = caches.of_rows(self._cache, rows, min(max(self._left, 1), ROOM))
        other._mask, other._next = self._mask[rows], self._next[..., rows, :]
        return other

    def tokens(self, tokens: Tensor) -> Tensor:
        """Runs several further tokens of each row at once, in passes that are not recorded.

        Args:
            tokens: (R, Q) int64.

        Returns:
            The logits that follow the last, (R, V) float32.
        """
        if self._recorded is not None:
            raise RuntimeError("a recorded step takes one token")
        self._left -= tokens.shape[1]
        return self._behind(tokens)

    def _behind(self, tokens: Tensor) -> Tensor:
        positions = self._next + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)  # (..., R, Q)
        self._next = positions[..., -1:]
        self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], dim=1)
        return self._logits(tokens, positions, self._mask, self._cache)

    def keep(self, rows: Tensor) -> None:
        """Keeps some of the rows, in the order given; the caller does the same for the edits.

        Args:
            rows: (R',) int64, numbers of the present rows.
        """
        if self._recorded is not None:
            self._recorded.give_back(self._plans)  # of all rows, since the caller takes some out afterwards
            if not self._recorded.keep(rows):
                self._go_on_unrecorded(self._recorded)
            return
        self._cache.reorder_cache(rows)
        self._mask, self._next = self._mask[rows], self._next[..., rows, :]

    def back(self, tokens: Tensor) -> None:
        """Takes back the newest tokens of each row; the rest of its answer then stands at the end of the columns.

        Columns between a prompt and an answer that all rows leave free are given up.

        Args:
            tokens: (R,) int64, how many, from 0 to as many as the row has generated.
        """
        if not caches.can_step_back(self._cache):
            raise RuntimeError("a cache with room for what comes, or a recorded step, cannot go back")
        prompt, columns = self._rows.length, self._mask.shape[1]
        places = torch.arange(columns, device=tokens.device) - tokens[:, None]  # (R, columns), where each comes from
        known = self._mask.gather(1, places.clamp(min=0)) * (places >= prompt)
        known[:, :prompt] = self._mask[:, :prompt]
        free = int((known[:, prompt:].sum(dim=1)).max().neg()) + columns - prompt
        places = torch.cat(
            [places.new_tensor(range(prompt)).expand(len(places), -1), places[:, prompt + free :]], dim=1
        )
        caches.rearrange(self._cache, places.clamp(min=0))
        self._mask = torch.cat([known[:, :prompt], known[:, prompt + free :]], dim=1)
        self._next = self._next - tokens[:, None]

    def _go_on_unrecorded(self, recorded: Recorded) -> None:
        self._mask, self._next = recorded.given_back()
        for layer in caches.room_of(self._cache):
            layer.grow(recorded.tokens)
        self._cache.reorder_cache(recorded.rows)
        self._recorded = None

    def _record(self, recordings: Recordings) -> None:
        """Continues in a recorded step, and records it first when there is none."""
        rows, keys = slots(len(self._mask)), capacity(self._mask.shape[1], self._left + 1)
        for layer in caches.room_of(self._cache):
            layer.reserve(rows, keys)
        exits = () if self._reader is None else self._reader.exits
        kind = (kind_of(self._plans, self._next, rows, keys), exits)
        recorded = recordings.of(kind)
        if recorded is None:
            recorded = self._made(recordings, rows, keys)
            if recorded is None:
                self._recordings = None
                return
            recordings.made[kind] = recorded
            self._new = True
        recorded.begin(self._plans, self._mask, self._next)
        self._recorded = recorded

    def _made(self, recordings: Recordings, rows: int, keys: int) -> Recorded | None:
        """Records a step, without compiled edits where the compiler fails; says once what is missing."""
        try:
            return Recorded(self._logits, recordings, self._plans, self._mask, self._next, rows, keys, self._recorder)
        except (UpstreamError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if recordings.fuses and self._plans and self._recorder is None:
            recordings.fuses = False
            say_once(f"edits are not compiled in recorded steps, which costs time: {reason}")
            return self._made(recordings, rows, keys)
        say_once(f"decoding steps are not recorded as CUDA graphs, which costs time: {reason}")
        return None

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache, **given: Any) -> Tensor:
        given |= dict(zip(self._names, (ids, positions, mask, cache), strict=True))
        with ExitStack() as block:
            if self._fuses:
                block.enter_context(fused(self._decoder))
            if self._reader is not None:
                block.enter_context(self._reader.listening())
            output = self._model(**given, use_cache=True, logits_to_keep=1, return_dict=True)
        logits: Tensor = output.logits[:, -1].float()
        if logits.requires_grad:
            caches.detach(cache)  # else the cache would keep every step's graph alive
        return logits if self._reader is None else torch.cat([logits[:, None], self._reader.logits()], dim=1)
