"""Installs edits on a model for the length of a ``with`` block, and leaves it exactly as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmfix.attention.edit import AttentionEdit, Memory, OutputEdit, ResidualEdit
from vlmfix.attention.kernel import HEADROOM, NAME, PLAN, attention, steered
from vlmfix.attention.layers import LayerPlan
from vlmfix.attention.rows import Step
from vlmfix.attention.tower import tower_bare
from vlmfix.errors import UnsupportedAttentionError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import ImageLayout
from vlmfix.models.turns import turn_of
from vlmfix.upstream import names
from vlmfix.upstream.attention import check_mathematics, register, switched
from vlmfix.upstream.cache import is_written_through


@dataclass(frozen=True, eq=False)
class Portion:
    """Holds edits, and which rows of a pass they change.

    Attributes:
        edits: The edits, in order.
        layout: (B, T) layout of the pass's rows; rows that they leave alone show no picture and no text.
        live: (B,) bool, the rows that they change; None for all.
    """

    edits: Sequence[AttentionEdit]
    layout: ImageLayout
    live: Tensor | None = None


@contextmanager
def edited(
    vlm: Checkpoint,
    layout: ImageLayout,
    edits: Sequence[AttentionEdit],
    *,
    live: Tensor | None = None,
    others: Sequence[Portion] = (),
) -> Iterator[AtWork]:
    """Applies edits to the text decoder inside the block.

    Sessions nest: the inner block's edits act after the outer's. Other threads that use the model wait.

    Args:
        vlm: The model. Its implementation of attention is restored on leaving, also after an exception.
        layout: Layout of the rows that the model will run, (B, T); after beam expansion and with contrast rows.
        edits: The edits, in order. With none, the model is not touched.
        live: (B,) bool, rows to edit; None edits all. Contrast rows are False.
        others: Edits of other rows of the same pass, those of contrast branches.

    Yields:
        The plans in use, for a caller that continues with some of the rows.

    Raises:
        UnsupportedAttentionError: The model's attention is not plain softmax attention, or an edit fits no layer.
    """
    portions = [part for part in (Portion(edits, layout, live), *others) if part.edits]
    if not portions:
        yield AtWork({})
        return
    with turn_of(vlm.model).taken():
        yield from _edited(vlm, portions)


@dataclass(frozen=True, eq=False)
class AtWork:
    """Holds the plans that a session has put on the layers.

    Attributes:
        plans: Layer number -> the plan on its modules, with the edits of outer blocks.
    """

    plans: Mapping[int, LayerPlan]

    def keep(self, rows: Tensor) -> None:
        """Keeps some of the rows of the present pass, (R,) int64, and drops the others; call it after prefill."""
        self.take(of_rows(self.steps, rows))

    @property
    def steps(self) -> dict[int, tuple[Step, ...]]:
        """Returns, for each layer, the edits with what they know of the rows."""
        return {layer: plan.steps for layer, plan in self.plans.items()}

    def take(self, steps: Mapping[int, tuple[Step, ...]]) -> None:
        """Goes on with edits of other rows, for each layer."""
        for layer, plan in self.plans.items():
            plan.steps = steps[layer]

    @property
    def stores(self) -> bool:
        """Returns whether some edit changes what is kept in the KV cache."""
        return any(plan.stores for plan in self.plans.values())

    @property
    def writes(self) -> bool:
        """Returns whether some edit changes what is kept in the KV cache, of the prompt or of generated tokens."""
        return any(plan.stores or plan.rewrites for plan in self.plans.values())

    def reorder(self, rows: Tensor) -> Tensor:
        """Lets what edits keep of each row's steps follow the rows of a cache, (B,) int64; returns these."""
        for plan in self.plans.values():
            for values in (values for step in plan.steps for values in step.memory.of_steps.values()):
                values.copy_(values[rows.to(values.device)])
        return rows


def of_rows(steps: Mapping[int, tuple[Step, ...]], rows: Tensor) -> dict[int, tuple[Step, ...]]:
    """Returns, for each layer, the edits with what they know of some of the rows.

    Args:
        steps: Layer number -> the edits.
        rows: (R,) int64.
    """
    picked: dict[Tensor, Tensor] = {}  # masks of keys are shared by all layers, and stay so

    def pick(values: Tensor) -> Tensor:
        if values not in picked:
            picked[values] = values[rows]
        return picked[values]

    return {layer: tuple(step.of_rows(pick) for step in own) for layer, own in steps.items()}


def _edited(vlm: Checkpoint, portions: Sequence[Portion]) -> Iterator[AtWork]:
    modules, layers = vlm.family.attention_modules(vlm.model), vlm.family.layers(vlm.model)
    own, outer = _plans(portions, len(modules)), _at_work(vlm)
    for layer in own:
        check_mathematics(modules[layer])
    # An outer block's plans are copied, so that ``AtWork.keep`` leaves them as they are.
    plans = {layer: replace(plan) for layer, plan in outer.items()}
    plans |= {layer: _nested(outer[layer], plan) if layer in outer else plan for layer, plan in own.items()}
    mlps = {layer: _mlp(layers[layer]) for layer, plan in plans.items() if plan.steers_mlp}
    owners = [owner for layer in plans for owner in (modules[layer], layers[layer])] + list(mlps.values())
    former = [getattr(owner, PLAN, None) for owner in owners]
    hooks: list[RemovableHandle] = []
    register(NAME, attention)
    decoder, turn, work = vlm.family.decoder(vlm.model), turn_of(vlm.model), AtWork(plans)

    def check(decoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():  # generate compiles steps over one token alone
            turn.check()
            if getattr(owners[0], PLAN, None) is None:  # lifted, see ``bare``
                return
            _refuse_continuation(decoder, kwargs)
            if work.writes:
                _refuse_copies(decoder, kwargs)

    with switched([decoder, *modules], NAME):
        try:
            hooks.append(decoder.register_forward_pre_hook(check, with_kwargs=True))
            for layer, plan in plans.items():
                setattr(modules[layer], PLAN, plan)
                setattr(layers[layer], PLAN, plan)
            for layer, plan in own.items():
                if any(step.edit.needs_hidden for step in plan.steps):
                    hooks.append(layers[layer].register_forward_pre_hook(_remember, with_kwargs=True))
                if plan.steers and not (layer in outer and outer[layer].steers):  # whose hook applies all edits
                    hooks.append(layers[layer].register_forward_hook(_steer_layer))
            for layer, mlp in mlps.items():
                setattr(mlp, PLAN, plans[layer])
                if not (layer in outer and outer[layer].steers_mlp):
                    hooks.append(mlp.register_forward_hook(_steer_mlp))
            yield work
        finally:
            for hook in hooks:
                hook.remove()
            for owner, before in zip(owners, former, strict=True):
                delattr(owner, PLAN) if before is None else setattr(owner, PLAN, before)


class Acting:
    """Finds layers whose attention was computed without the edits that are at work on them.

    Args:
        vlm: The model, with the edits at work.
    """

    def __init__(self, vlm: Checkpoint) -> None:
        plans = _at_work(vlm)
        modules = vlm.family.attention_modules(vlm.model)
        self._modules = {number: modules[number] for number in plans}
        self.idle()

    def idle(self) -> int | None:
        """Returns a layer whose attention was computed without its edits since the last call; None without one."""
        plans = {number: getattr(module, PLAN, None) for number, module in self._modules.items()}
        idle = [number for number, plan in plans.items() if plan is None or not plan.acted]
        for plan in plans.values():
            if plan is not None:
                plan.acted = False
        return min(idle, default=None)


@contextmanager
def bare(vlm: Checkpoint) -> Iterator[None]:
    """Lifts every edit inside the block, so that a probe sees the model as it is."""
    owners = [*vlm.family.attention_modules(vlm.model), *vlm.family.layers(vlm.model)]
    with turn_of(vlm.model).taken(), tower_bare(vlm):
        former = [(owner, getattr(owner, PLAN)) for owner in owners if getattr(owner, PLAN, None) is not None]
        for owner, plan in former:
            plan.sites = None  # which the hook of an MLP would take for those of its pass
            delattr(owner, PLAN)
        try:
            yield
        finally:
            for owner, plan in former:
                setattr(owner, PLAN, plan)


def first_edited(vlm: Checkpoint) -> int | None:
    """Returns the first prompt column that some edit at work changes or reads in any row; None when none does."""
    plans = _at_work(vlm).values()
    if any(step.edit.rows == "all" for plan in plans for step in plan.steps):
        return 0
    rows = [plan.rows for plan in plans]
    columns = torch.cat(rows) if rows else torch.empty(0)
    return int(columns.min()) if len(columns) else None


def noted(vlm: Checkpoint, layer: int, name: str) -> Tensor:
    """Returns what an edit at work on a layer has learned of the newest step under a name, (B, ...); see ``Memory``.

    Raises:
        UnsupportedAttentionError: No edit on the layer has.
    """
    plan = _at_work(vlm).get(layer)
    for step in () if plan is None else plan.steps:
        if name in step.memory.of_steps:
            return step.memory.of_steps[name]
    raise UnsupportedAttentionError(
        f"nothing was noted of {name} in layer {layer}", "let the model's pass run as a whole, with its edits"
    )


def reads_hidden(vlm: Checkpoint) -> bool:
    """Returns whether some edit at work reads the residual stream."""
    return any(step.edit.needs_hidden for plan in _at_work(vlm).values() for step in plan.steps)


@contextmanager
def recorded(vlm: Checkpoint) -> Iterator[dict[int, Tensor]]:
    """Lifts every edit inside the block, and records the residual stream that the edits would have read.

    Yields:
        Layer number -> residual stream that entered the layer in the block's last pass, for the layers in which an edit
        reads it; filled by that pass.
    """
    layers, plans = vlm.family.layers(vlm.model), _at_work(vlm)
    numbers = {layers[n]: n for n, plan in plans.items() if any(step.edit.needs_hidden for step in plan.steps)}
    seen: dict[int, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        seen[numbers[layer]] = names.hidden(args, kwargs)

    with ExitStack() as block:
        block.enter_context(bare(vlm))
        for layer in numbers:
            block.enter_context(layer.register_forward_pre_hook(keep, with_kwargs=True))
        yield seen


@contextmanager
def continued(vlm: Checkpoint, start: int, past: Mapping[int, Callable[[], Tensor]]) -> Iterator[None]:
    """Lets prefill start at a later column; the cache holds the earlier columns, computed without edits.

    Outside this block edits refuse every pass over a part of the prompt.

    Args:
        vlm: The model.
        start: Number of columns in the cache; no edit may act on them.
        past: Layer number -> function that returns what ``recorded`` recorded there, as (B, start, hidden size).

    Raises:
        UnsupportedAttentionError: An edit acts on one of these columns.
    """
    first = first_edited(vlm)
    if first is not None and first < start:
        raise UnsupportedAttentionError(
            f"column {first} of the prompt is edited, but {start} columns stand in the cache",
            "compute the prompt from its first edited column on",
        )
    plans = _at_work(vlm)
    try:
        for number, plan in plans.items():
            plan.start, plan.past = start, past.get(number)
        yield
    finally:
        for plan in plans.values():
            plan.start, plan.past = 0, None


def _at_work(vlm: Checkpoint) -> dict[int, LayerPlan]:
    modules = vlm.family.attention_modules(vlm.model)
    found = {number: getattr(module, PLAN, None) for number, module in enumerate(modules)}
    return {number: plan for number, plan in found.items() if plan is not None}


def _plans(portions: Sequence[Portion], count: int) -> dict[int, LayerPlan]:
    length = portions[0].layout.tokens.shape[1]
    wanted = {edit: edit.layers.resolve(count) for part in portions for edit in part.edits}
    for edit, chosen in wanted.items():
        if not chosen:
            raise UnsupportedAttentionError(
                f"{type(edit).__name__} acts in layers {edit.layers}, but the model has {count} layers",
                "give layers that exist, counted from 0",
            )
    device = portions[0].layout.tokens.device
    answer = (torch.arange(length + HEADROOM, device=device) >= length)[None]  # (1, T + HEADROOM)
    made = {edit: made for part in portions for edit, made in _steps(part, answer)}
    plans: dict[int, LayerPlan] = {}
    for layer in sorted(frozenset().union(*wanted.values())):
        here = [made[edit] for edit in wanted if layer in wanted[edit]]
        union = torch.stack([step.prompt_rows & step.live[:, None] for step in here]).any(0).any(0).nonzero().squeeze(1)
        steps = tuple(
            replace(step, prompt_rows=step.prompt_rows[:, union], memory=step.edit.memory.setdefault(layer, Memory()))
            for step in here
        )
        plans[layer] = LayerPlan(layer=layer, rows=union, prompt=length, steps=steps)
    return plans


def _steps(part: Portion, answer: Tensor) -> Iterator[tuple[AttentionEdit, Step]]:
    """Yields each edit of a portion with its step, which has a column for each prompt token, and no memory yet."""
    layout, live = part.layout, part.live
    length = layout.tokens.shape[1]
    image, text = layout.image_keys(length + HEADROOM), layout.text_keys(length + HEADROOM)
    if live is None:
        live = torch.ones(len(layout.tokens), dtype=torch.bool, device=answer.device)
    for edit in part.edits:
        rows = _prompt_rows(edit, layout)
        yield edit, Step(edit, rows, live, image, text, answer, mixed=part.live is not None)


def _prompt_rows(edit: AttentionEdit, layout: ImageLayout) -> Tensor:
    """Returns the prompt rows that an edit selects, (B, T) bool; none for ``all``, which selects without a mask."""
    if edit.rows == "text":
        return layout.text_after_image()
    if edit.rows == "prompt":
        return (layout.tokens | layout.text).cumsum(dim=1) > 0  # separators of tiles are neither
    rows = torch.zeros_like(layout.tokens)
    if edit.rows == "last":
        rows[:, -1] = True  # prompts are padded on the left
    elif edit.rows == "all" and not isinstance(edit, OutputEdit | ResidualEdit):
        raise TypeError(f"{type(edit).__name__} acts on all rows, which only output and residual edits can")
    return rows


def _nested(outer: LayerPlan, inner: LayerPlan) -> LayerPlan:
    rows = torch.cat([outer.rows, inner.rows]).unique()

    def spread(plan: LayerPlan) -> Iterator[Step]:
        for step in plan.steps:
            wide = torch.zeros(step.live.shape[0], len(rows), dtype=torch.bool, device=rows.device)
            wide[:, torch.searchsorted(rows, plan.rows)] = step.prompt_rows
            yield replace(step, prompt_rows=wide)

    return LayerPlan(outer.layer, rows, inner.prompt, (*spread(outer), *spread(inner)))


def _remember(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    plan: LayerPlan | None = getattr(layer, PLAN, None)
    if plan is not None:  # not lifted
        hidden = names.hidden(args, kwargs)
        plan.hidden = hidden if plan.past is None else torch.cat([plan.past(), hidden], dim=1)


def _mlp(layer: nn.Module) -> nn.Module:
    mlp = dict(layer.named_children()).get("mlp")
    if mlp is None:
        raise UnsupportedAttentionError(
            f"{type(layer).__name__} has no mlp", "edit the stream behind the layer instead"
        )
    return mlp


def _steer_mlp(mlp: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    plan: LayerPlan = getattr(mlp, PLAN)
    return steered(plan, "mlp", output, args[0])


def _steer_layer(layer: nn.Module, args: object, output: Any) -> Any:  # noqa: ANN401 (a tensor, or a tuple that has it)
    plan: LayerPlan | None = getattr(layer, PLAN, None)
    if plan is None:  # lifted
        return output
    stream = steered(plan, "layer", output if isinstance(output, Tensor) else output[0])
    plan.sites = None
    return stream if isinstance(output, Tensor) else (stream, *output[1:])


def _refuse_continuation(decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses several new tokens behind a filled cache: edits would take their rows for the prompt's."""
    known = names.TextNames.of(decoder)
    inputs, cache = kwargs.get(known.embeds), kwargs.get(known.cache)
    if inputs is None:
        raise UnsupportedAttentionError(
            f"{type(decoder).__name__} was called with {', '.join(kwargs)}, and not with embeddings",
            "edits act on passes of the whole model, which hands embeddings to its text decoder",
        )
    if inputs.shape[1] == 1 or cache is None:
        return
    if int(cache.get_seq_length()) > 0:
        raise UnsupportedAttentionError(
            f"{inputs.shape[1]} tokens at once behind a cache of {int(cache.get_seq_length())}",
            "chunked prefill, assisted decoding and a cache from an earlier call do not go with attention edits",
        )


def _refuse_copies(decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuses a KV cache of which attention gets a copy, where what is to be kept would be lost."""
    cache = kwargs.get(names.TextNames.of(decoder).cache)
    if cache is not None and not is_written_through(cache):
        raise UnsupportedAttentionError(
            f"a {type(cache).__name__} gives attention copies of what it keeps, which cannot be edited",
            "use the dynamic or the static cache, neither quantized nor offloaded",
        )
