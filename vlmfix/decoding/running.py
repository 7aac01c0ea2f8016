"""Puts edits and contrast branches around the passes of one call, for a decoding loop to step through.

Shape letters (``docs/notation.md``): B samples of the call, L lines that go on (one per sample, or one per beam of a
sample, side by side), N branches, R = (1 + N) * L rows in branch-major order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.attention.edit import AttentionEdit
from vlmfix.attention.rows import Step
from vlmfix.attention.session import Acting, AtWork, edited, of_rows
from vlmfix.attention.tower import tower_edited
from vlmfix.attention.windows import check_windows
from vlmfix.decoding.blanks import blanked
from vlmfix.decoding.branches import Contrast, fused, viewed
from vlmfix.decoding.exits import Reader, Views
from vlmfix.decoding.graphs import recordings_of
from vlmfix.decoding.newest import Newest, check_prompts
from vlmfix.decoding.passes import Passes
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.prefix import Prompts, cut_prefill, prompts_of
from vlmfix.decoding.rows import rows_of
from vlmfix.decoding.waiting import Waiting
from vlmfix.decoding.watch import idle
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.models.quantization import waits_for_the_host
from vlmfix.models.turns import turn_of
from vlmfix.upstream.compiling import start

RECORDING = ("cuda",)
"""Kinds of devices on which decoding steps are recorded."""


class Running:
    """Gives a decoding loop its scores: ``prompt`` once, then ``token`` and ``keep`` as often as wanted.

    Args:
        vlm: The model, with the edits at work on it.
        passes: The model's passes over the samples and their branches.
        copies: 1 + N.
        work: The edits.
        contrasts: The rules that fuse the branches' logits, in order.
        prompts: The prompts, and which of them share a beginning.
        blank: (R, T) bool, tokens of the prompts that are zeros; None without any.
        room: Longest answer of each sample in tokens: the limit of the call, or less where the context ends.
        name: How the decoder is written, for messages.
        newest: Keeps the newest step with its graph, or None.
        views: Reads the prompts' columns where a rule looks at them, or None.
        waits: Whether branches of rules with a margin wait for the steps in which their rule acts.

    Attributes:
        room: As given.
        newest: As given.
        alone: (L,) bool, lines whose newest scores every rule with a margin has left alone; None without such a rule.
    """

    def __init__(
        self,
        vlm: Checkpoint,
        passes: Passes,
        copies: int,
        work: AtWork,
        contrasts: Sequence[Contrast],
        prompts: Prompts,
        blank: Tensor | None,
        room: Sequence[int],
        name: str,
        newest: Newest | None,
        views: Views | None,
        *,
        waits: bool,
    ) -> None:
        self.room, self.newest = room, newest
        self.alone: Tensor | None = None
        patient = [bool(waits and rule.margin is not None) for rule in contrasts for _ in rule.branches]
        self._waits = [copy for copy, own in enumerate(patient, 1) if own]  # copies of the samples that wait
        present = [copy for copy in range(copies) if copy not in self._waits]
        self._places = sorted(range(copies), key=[*present, *self._waits].__getitem__)
        self._waiting: Waiting | None = None
        self._vlm, self._passes, self._work, self._contrasts = vlm, passes, work, tuple(contrasts)
        self._prompts, self._blank, self._copies, self._lines = prompts, blank, copies, len(room)
        self._acting, self._name, self._views = Acting(vlm), name, views

    @property
    def owed(self) -> Newest:
        """Returns the newest step with its graph, for a plan that asks for it."""
        if self.newest is None:
            raise RuntimeError("the plan asks nothing")
        return self.newest

    @property
    def cache(self) -> DynamicCache:
        """Returns the KV cache of all rows, for a plan whose steps are not recorded."""
        return self._passes.cache

    @property
    def replays(self) -> bool:
        """Returns whether the next token replays a recorded step, which the host need not wait for.

        A gate that asks about the newest step chooses, and rows leave, before the next one takes its place. Where
        branches wait, the host asks after each step whether one is wanted.
        """
        return self._passes.replays and self.newest is None and self._waiting is None

    def learned(self, edit: AttentionEdit, name: str) -> dict[int, Tensor]:
        """Returns what an edit at work has learned of keys, as the newest step left it.

        Args:
            edit: The edit.
            name: As it told ``Site.learn_of_keys``.

        Returns:
            Layer number -> (R, ..., T) of the present rows, or with more keys behind the prompt's.
        """
        return self._passes.learned(edit, name)

    def prompt(self) -> Tensor:
        """Runs prefill; returns the scores that follow each prompt, (B, V) float32."""
        views = self._views
        pass_ = cut_prefill(self._vlm, self._prompts) if views is None else views.listening()
        with pass_, blanked(self._vlm, self._blank):
            logits = self._passes.prompt()
        if views is not None:
            viewed(self._contrasts, views.take(self._lines))
        if self.newest is not None:
            return self._kept(self.newest, self._passes.again)
        scores = self._scores(logits)
        if self._waits:
            self._part(logits.device)
        return scores

    def token(self, tokens: Tensor) -> Tensor:
        """Runs one more token of each line, (L,) int64; returns the scores that follow it, (L, V) float32."""
        if self._waiting is not None:
            return self._with_waiting(self._waiting, tokens)

        def step() -> Tensor:
            return self._passes.token(tokens.repeat(self._copies))

        return self._scores(step()) if self.newest is None else self._kept(self.newest, step)

    def keep(self, lines: Tensor) -> None:
        """Keeps some of the lines, or repeats some, with their branches and what edits know of them.

        Args:
            lines: (L',) int64, numbers of the present lines; lines of one sample are adjacent.
        """
        copies = torch.arange(self._copies - len(self._waits) * (self._waiting is not None), device=lines.device)
        rows = (lines + self._lines * copies[:, None]).flatten()  # (R',)
        self._passes.keep(rows)
        self._work.keep(rows)
        if self._waiting is not None:
            self._waiting.keep(lines)
        self._contrasts = tuple(contrast.keep(lines) for contrast in self._contrasts)
        self._lines = len(lines)

    def back(self, tokens: Tensor) -> None:
        """Takes back the newest tokens of each line, with those of its branches.

        Args:
            tokens: (L,) int64, how many, from 0 to as many as the line has generated.
        """
        self._passes.back(tokens.repeat(self._copies))

    def _kept(self, newest: Newest, step: Callable[[], Tensor]) -> Tensor:
        """Runs a step and keeps its graph; returns its scores."""
        with newest.step():
            logits = step()
            with torch.enable_grad():
                return newest.scored(self._scores(logits))

    def _part(self, device: torch.device) -> None:
        """Gives the branches that wait a cache of their own, once the prompts have passed."""
        copies = torch.tensor([copy in self._waits for copy in range(self._copies)], device=device)
        waits = copies.repeat_interleave(self._lines)  # (R,)
        first, later = (~waits).nonzero()[:, 0], waits.nonzero()[:, 0]
        passes = self._passes.apart(later)
        steps, former = _of_live_rows(self._work, later), _of_live_rows(self._work, first)
        self._work.take(former)
        self._passes.keep(first)
        self._waiting = Waiting(self._vlm, passes, self._work, steps, len(self._waits), self._lines)

    def _with_waiting(self, waiting: Waiting, tokens: Tensor) -> Tensor:
        """Runs one more token of each line, and lets branches catch up where their rule acts in some line."""
        present = self._copies - len(self._waits)
        logits = self._passes.token(tokens.repeat(present))  # (R', V) or (R', 1 + E, V)
        self._check_acting()
        waiting.add(tokens)
        early = logits[: self._lines, 1:].transpose(0, 1) if logits.dim() == 3 else None
        own = (logits[:, 0] if logits.dim() == 3 else logits).view(present, self._lines, -1)
        acting = [rule.acts(own[0]).any() for rule in self._contrasts if rule.margin is not None and rule.branches]
        if bool(torch.stack(acting).any()):  # the host waits here
            others = waiting.caught_up().view(len(self._waits), self._lines, -1)
            self._acting.idle()  # of those layers that acted on the branches
        else:
            others = own[:1].expand(len(self._waits), -1, -1)  # which no rule takes anything from
        return self._fused(torch.cat([own, others])[self._places], early)

    def _check_acting(self) -> None:
        if (layer := self._acting.idle()) is not None and not self._passes.recorded:
            raise idle(self._name, f"attention of layer {layer} was computed without it")

    def _scores(self, logits: Tensor) -> Tensor:
        self._check_acting()
        if logits.dim() == 2:
            return self._fused(logits.view(self._copies, self._lines, -1), None)
        early = logits[: self._lines, 1:].transpose(0, 1)  # (E, L, V), of the samples alone
        return self._fused(logits[:, 0].view(self._copies, self._lines, -1), early)

    def _fused(self, logits: Tensor, early: Tensor | None) -> Tensor:
        margins = [rule for rule in self._contrasts if rule.margin is not None]
        if margins:
            self.alone = ~torch.stack([rule.acts(logits[0]) for rule in margins]).any(dim=0)
        return fused(self._contrasts, logits, early)


def _of_live_rows(work: AtWork, rows: Tensor) -> dict[int, tuple[Step, ...]]:
    """Returns, for each layer, the edits that act on some of these rows, (R,) int64, with what they know of them."""
    steps = of_rows(work.steps, rows)
    return {layer: tuple(step for step in own if bool(step.live.any())) for layer, own in steps.items()}


@contextmanager
def running(
    vlm: Checkpoint,
    batch: Batch,
    layout: ImageLayout,
    plan: DecodingPlan,
    *,
    limit: int | Sequence[int],
    name: str,
    reorders: bool = False,
) -> Iterator[Running]:
    """Puts a plan to work on the samples of a batch inside the block, and restores the model afterwards.

    Args:
        vlm: The model; other threads that use it wait.
        batch: B samples.
        layout: Where their image tokens are.
        plan: What the decoder does; its gate, if any, is left to the caller.
        limit: Longest answer in tokens, or that of each sample, at least 1.
        name: How the decoder is written, for messages.
        reorders: Whether rows will change their order, as beams do; no decoding step is then recorded.

    Raises:
        DataError: A prompt, or that of a branch, leaves no room for an answer in the model's context; prompt and
            answer fill a sliding window in which edits act; or the plan asks for saliency and a prompt's last token
            cannot pass alone.
        UnsupportedAttentionError: The edits cannot act on the model's attention.
    """
    branches = plan.branches
    with turn_of(vlm.model).taken(), torch.no_grad(), tower_edited(vlm, plan.tower):
        stays = plan.compiles and not reorders
        recordings = recordings_of(vlm) if stays and _can_record(vlm) else None
        if recordings is not None and recordings.fuses and plan.every_edit and plan.asks is None:
            start(vlm.device)  # while the prompt passes
        rows = rows_of(vlm, batch, branches)
        left = room_for_answers(vlm, rows.longest)
        wanted = [limit] * batch.rows if isinstance(limit, int) else list(limit)
        room = wanted if left is None else [min(pair) for pair in zip(wanted, left.tolist(), strict=True)]
        newest = None if plan.asks is None else Newest(vlm, plan.asks)
        edits = plan.edits if newest is None else (*plan.edits, newest.recorder)
        if newest is not None:
            check_prompts(vlm, batch, rows.length)
        acting = plan.every_edit if newest is None else (*plan.every_edit, newest.recorder)
        layers = frozenset[int]().union(*(edit.layers.resolve(vlm.layers) for edit in acting))
        if plan.leader is None:
            check_windows(vlm, layers, rows.length, max(room))
        else:  # a window forgets what a step back needs again, and candidates for the last token pass as well
            check_windows(vlm, range(vlm.layers), rows.length, max(room) + 1)
        wide, live = rows.layout(layout)
        with edited(vlm, wide, edits, live=live, others=rows.portions(layout, branches)) as work:
            exits = [place for contrast in plan.contrasts for place in contrast.exits]
            reader = Reader(vlm, exits) if exits else None
            views = Views(vlm, plan.views) if plan.views else None
            passes = Passes(
                vlm,
                rows,
                max(room),
                plans=work.plans,
                recordings=recordings,
                roomy=not reorders,
                reader=reader,
                recorder=None if newest is None else newest.recorder,
            )
            prompts = prompts_of(vlm, batch, branches) or Prompts(rows.mask.bool(), None)
            try:
                yield Running(
                    vlm,
                    passes,
                    rows.copies,
                    work,
                    plan.contrasts,
                    prompts,
                    rows.blank,
                    room,
                    name,
                    newest,
                    views,
                    waits=not reorders and newest is None and plan.leader is None,
                )
            finally:
                if newest is not None:
                    newest.forget()


def _can_record(vlm: Checkpoint) -> bool:
    """Returns whether the whole text decoder is on the model's device, of a kind on which its steps can be recorded."""
    if waits_for_the_host(vlm.model):
        return False
    devices = {weight.device for weight in vlm.family.decoder(vlm.model).parameters()}
    return devices == {vlm.device} and vlm.device.type in RECORDING
