"""Keeps what edits know of the rows in fixed tensors, which a recorded decoding step reads and later calls fill.

Shape letters (``docs/notation.md``): B rows of a call, T prompt tokens, K keys; here also G rows of a recorded step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.edit import AttentionEdit, LayerSet, Memory, PromptReading
from vlmfix.attention.layers import LayerPlan
from vlmfix.attention.rows import Step
from vlmfix.upstream.compiling import of_any_size

Axes = Literal["rows", "keys", "own"]
"""Which axes of a tensor depend on the call: the first (rows); the first and the last (keys); none."""
Plans = Mapping[int, LayerPlan]
"""Layer number -> plan at work."""
VALUES = (bool, int, float, str, tuple, frozenset, LayerSet, type(None))
"""Types of an edit's fields that are compared by value."""


def key_of(plans: Plans) -> Hashable:
    """Returns a key that is equal for plans whose decoding steps differ in the content of tensors alone."""
    places: dict[int, int] = {}

    def told(values: Tensor, axes: Axes) -> Hashable:
        shape = {"rows": values.shape[1:], "keys": (len(values) == 1, values.shape[1:-1]), "own": values.shape}[axes]
        return axes, shape, values.dtype, values.device, places.setdefault(id(values), len(places))

    return tuple(
        (layer, step.mixed, _about(step.edit), tuple(told(*tensor) for tensor in _tensors(step)))
        for layer, plan in plans.items()
        for step in plan.steps
    )


def _about(edit: AttentionEdit) -> Hashable:
    return type(edit), tuple(
        (name, value if isinstance(value, VALUES) else "tensor" if isinstance(value, Tensor) else id(value))
        for name, value in _decoding(edit)
    )


def _decoding(edit: AttentionEdit) -> Iterator[tuple[str, Any]]:
    """Yields the fields of an edit that decoding reads."""
    if isinstance(edit, PromptReading):
        return iter(())
    left_out = {"memory", "layers", *edit.of_prompt}
    return ((field.name, getattr(edit, field.name)) for field in fields(edit) if field.name not in left_out)


def _tensors(step: Step) -> Iterator[tuple[Tensor, Axes]]:
    """Yields the tensors that a decoding step reads, in a fixed order, with their axes."""
    yield step.image_keys, "keys"
    yield step.text_keys, "keys"
    yield step.answer_keys, "keys"
    yield step.live, "rows"
    for _, values in sorted(step.memory.of_rows.items()):
        yield values, "rows"
    for _, values in sorted(step.memory.of_keys.items()):
        yield values, "keys"
    for _, values in sorted(step.memory.of_steps.items()):
        yield values, "rows"
    for _, value in _decoding(step.edit):
        if isinstance(value, Tensor):
            yield value, "own"


@dataclass(frozen=True, eq=False)
class State:
    """Replaces a call's tensors by tensors of a fixed size.

    Attributes:
        steps: Layer number -> the edits, which read these tensors.
    """

    steps: Mapping[int, tuple[Step, ...]]

    @classmethod
    def like(cls, plans: Plans, rows: int, keys: int) -> State:
        """Allocates the tensors that the decoding steps of some plans read.

        Args:
            plans: The plans.
            rows: G.
            keys: K.
        """
        made: dict[int, Tensor] = {}

        def room(values: Tensor, axes: Axes) -> Tensor:
            if id(values) not in made:
                before = values.shape[:1] if len(values) == 1 and axes == "keys" else (rows,)
                shape = {"rows": (rows, *values.shape[1:]), "keys": (*before, *values.shape[1:-1], keys)}
                made[id(values)] = of_any_size(
                    values.new_zeros(shape.get(axes, values.shape)), *{"rows": (0,), "keys": (0, -1), "own": ()}[axes]
                )
            return made[id(values)]

        edits: dict[AttentionEdit, AttentionEdit] = {}
        for plan in plans.values():
            for step in plan.steps:
                own: dict[str, Any] = {
                    name: room(value, "own") for name, value in _decoding(step.edit) if isinstance(value, Tensor)
                }
                edits.setdefault(step.edit, replace(step.edit, **own))
        return cls({layer: tuple(_over(step, edits, room) for step in plan.steps) for layer, plan in plans.items()})

    def load(self, plans: Plans) -> None:
        """Copies in what other plans of the same ``key_of`` know of their rows; rows beyond those are zero."""
        done: set[int] = set()
        for layer, steps in self.steps.items():
            for mine, theirs in zip(steps, plans[layer].steps, strict=True):
                for (room, axes), (values, _) in zip(_tensors(mine), _tensors(theirs), strict=True):
                    if id(room) not in done:
                        done.add(id(room))
                        _write(room, values, axes)

    def give_back(self, plans: Plans, rows: Tensor) -> None:
        """Copies into a call's plans what decoding has learned since ``load``.

        Args:
            plans: The plans.
            rows: (R,) int64, which rows of these tensors are those of the plans.
        """
        for layer, steps in self.steps.items():
            for mine, theirs in zip(steps, plans[layer].steps, strict=True):
                for name, values in theirs.memory.of_keys.items():
                    room = mine.memory.of_keys[name]
                    values.copy_((room if len(values) == len(room) == 1 else room[rows])[..., : values.shape[-1]])
                for name, values in theirs.memory.of_steps.items():
                    values.copy_(mine.memory.of_steps[name][rows])

    @contextmanager
    def standing_in(self, plans: Plans, *, fused: bool) -> Iterator[None]:
        """Makes the plans read these tensors inside the block.

        Args:
            plans: The plans.
            fused: Whether the plans run their edits in compiled form.
        """
        former = {layer: plan.steps for layer, plan in plans.items()}
        try:
            for layer, plan in plans.items():
                plan.steps = self.steps[layer]
                plan.fused = tuple((step.mixed, _about(step.edit)) for step in plan.steps) if fused else None
            yield
        finally:
            for layer, plan in plans.items():
                plan.steps, plan.fused = former[layer], None


def _over(step: Step, edits: Mapping[AttentionEdit, AttentionEdit], room: Callable[[Tensor, Axes], Tensor]) -> Step:
    memory = step.memory
    return replace(
        step,
        edit=edits[step.edit],
        prompt_rows=step.prompt_rows[:, :0],
        live=room(step.live, "rows"),
        image_keys=room(step.image_keys, "keys"),
        text_keys=room(step.text_keys, "keys"),
        answer_keys=room(step.answer_keys, "keys"),
        memory=Memory(
            {name: room(values, "rows") for name, values in memory.of_rows.items()},
            {name: room(values, "keys") for name, values in memory.of_keys.items()},
            {name: room(values, "rows") for name, values in memory.of_steps.items()},
        ),
    )


def _write(room: Tensor, values: Tensor, axes: Axes) -> None:
    if axes == "own":
        room.copy_(values)
        return
    if axes == "keys":  # masks say something of more keys than there are, and what was learned of fewer
        keys = room.shape[-1]
        values = pad(values[..., :keys], (0, max(0, keys - values.shape[-1])))
    room[: len(values)] = values
    room[len(values) :].zero_()
