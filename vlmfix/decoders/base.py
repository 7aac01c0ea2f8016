"""What a decoding method is: a frozen configuration that makes a fresh plan for every call."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from vlmfix.attention.edit import AttentionEdit
from vlmfix.attention.session import edited
from vlmfix.decoders.branches import Contrast
from vlmfix.decoders.parameters import Value, ranges, written
from vlmfix.decoders.prefix import prompts_of, shared_prefixes
from vlmfix.decoders.stack import stack_layout, stacked
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a method comes from."""

    title: str
    year: int
    arxiv: str
    code: str = ""


class DecodingLoop(Protocol):
    """A loop of its own, handed to ``generate`` as ``custom_generate``: for methods that reject or roll back."""

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Tensor | GenerateOutput:
        """Generates from prepared inputs; see transformers' ``custom_generate``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingPlan:
    """What one call of ``generate`` needs; made anew for every call, because it may hold that call's state.

    Attributes:
        edits: Attention edits, in order.
        contrasts: Branches and how their logits are fused, in order.
        processors: Processors that only rewrite scores.
        loop: A decoding loop of its own, at most one in a chain.
        beams: Whether beam search is meaningful.
        compiles: Whether decoding steps can be compiled; False for plans with per-step Python effects.
    """

    edits: tuple[AttentionEdit, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()
    loop: DecodingLoop | None = None
    beams: bool = True
    compiles: bool = True

    def merged(self, other: DecodingPlan) -> DecodingPlan:
        """Both plans at work: this one first.

        Raises:
            IncompatibleDecodersError: Both bring a decoding loop.
        """
        if self.loop is not None and other.loop is not None:
            raise IncompatibleDecodersError("both decoders bring a decoding loop of their own", "use one of them")
        return DecodingPlan(
            edits=self.edits + other.edits,
            contrasts=self.contrasts + other.contrasts,
            processors=self.processors + other.processors,
            loop=self.loop or other.loop,
            beams=self.beams and other.beams,
            compiles=self.compiles and other.compiles,
        )


@dataclass(frozen=True, kw_only=True)
class Decoder(ABC):
    """One decoding method. Instances are values: frozen, hashable, printed as they are written.

    Class attributes:
        name: Name on the command line.
        source: The paper.
        acts_on: What the method changes, for tables.
        passes: Forward passes per generated token, in rows of the clean batch.
        beams: Whether beam search works.
        compiles: Whether compiled decoding works.
        presets: Named sets of parameters; a parameter left at None takes the preset's value.
    """

    name: ClassVar[str]
    source: ClassVar[Source]
    acts_on: ClassVar[str]
    passes: ClassVar[int] = 1
    beams: ClassVar[bool] = True
    compiles: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {}

    def __post_init__(self) -> None:
        for name, value in self._preset().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, allowed in ranges(type(self)).items():
            object.__setattr__(self, name, allowed.check(self.name, name, getattr(self, name)))

    def _preset(self) -> Mapping[str, Value]:
        if not self.presets:
            return {}
        chosen = str(getattr(self, "preset", None))
        if chosen not in self.presets:
            raise UsageError(f"{self.name}: preset={chosen!r} is not allowed", f"allowed: {' | '.join(self.presets)}")
        return self.presets[chosen]

    @abstractmethod
    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans one call.

        Args:
            vlm: The model.
            batch: The clean rows.
            layout: Where their image tokens are.

        Raises:
            IncompatibleDecodersError: The method cannot act on this model or these inputs.
        """

    def check(self, vlm: Checkpoint) -> str | None:
        """Why the method cannot act on this model, in one sentence, or None when it can."""
        return None

    def parameters(self) -> dict[str, Value]:
        """All parameters with their values."""
        return {name: getattr(self, name) for name in ranges(type(self))}

    def spec(self) -> str:
        """The decoder as the command line writes it; parsing it gives an equal decoder."""
        given = ",".join(f"{name}={written(value)}" for name, value in self.parameters().items())
        return f"{self.name}:{given}" if given else self.name

    @contextmanager
    def applied(self, vlm: Checkpoint, batch: Mapping[str, Tensor], *, num_beams: int = 1) -> Iterator[dict[str, Any]]:
        """Puts the method to work on a model inside the block.

        Args:
            vlm: The model, with its processor and family; ``vlmfix.wrap(model, processor)`` makes one of your own.
            batch: The inputs of the ``generate`` call, from ``vlm.encode`` or a processor.
            num_beams: The ``num_beams`` that ``generate`` is called with.

        Yields:
            Keyword arguments for ``model.generate(**batch, **kwargs)``.

        Raises:
            IncompatibleDecodersError: The method cannot act on this model, these inputs or beam search.
        """
        batch = Batch.of(batch)
        layout = vlm.layout(batch)
        plan = self.plan(vlm, batch, layout)
        if num_beams > 1 and not plan.beams:
            raise IncompatibleDecodersError(f"{self.spec()} does not work with beam search", "use num_beams=1")
        layout = layout.expand(num_beams) if num_beams > 1 else layout
        branches = [branch for contrast in plan.contrasts for branch in contrast.branches]
        with ExitStack() as block:
            live = None
            if plan.contrasts:
                stack = block.enter_context(stacked(vlm, batch, plan.contrasts, beams=num_beams))
                layout, live = stack_layout(layout, stack)
            block.enter_context(edited(vlm, layout, plan.edits, live=live))
            prompts = prompts_of(vlm, batch, branches, beams=num_beams)
            if prompts is not None:
                block.enter_context(shared_prefixes(vlm, prompts))
            yield _arguments(plan)


def _arguments(plan: DecodingPlan) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if plan.processors:
        arguments["logits_processor"] = LogitsProcessorList(plan.processors)
    if plan.loop is not None:
        arguments["custom_generate"] = plan.loop
    if not plan.compiles:
        arguments["disable_compile"] = True
    return arguments


@dataclass(frozen=True, kw_only=True)
class Chain(Decoder):
    """Several methods at once; logits pass through them in order, so do attention edits.

    Args:
        decoders: The methods, first to last.
    """

    name: ClassVar[str] = "chain"
    source: ClassVar[Source] = Source(title="Several methods at once", year=0, arxiv="")
    acts_on: ClassVar[str] = "what its parts act on"

    decoders: tuple[Decoder, ...]

    def __post_init__(self) -> None:
        if not self.decoders:
            raise UsageError("a chain of no decoders", "name at least one, such as var+vcd")
        object.__setattr__(self, "passes", 1 + sum(decoder.passes - 1 for decoder in self.decoders))
        object.__setattr__(self, "beams", all(decoder.beams for decoder in self.decoders))
        object.__setattr__(self, "compiles", all(decoder.compiles for decoder in self.decoders))

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """The merged plans of all parts."""
        merged = DecodingPlan()
        for decoder in self.decoders:
            merged = merged.merged(decoder.plan(vlm, batch, layout))
        return merged

    def check(self, vlm: Checkpoint) -> str | None:
        """The first reason why a part cannot act."""
        return next((reason for decoder in self.decoders if (reason := decoder.check(vlm))), None)

    def parameters(self) -> dict[str, Value]:
        """The parameters of all parts, each under ``part.parameter``."""
        return {
            f"{decoder.name}.{name}": value for decoder in self.decoders for name, value in decoder.parameters().items()
        }

    def spec(self) -> str:
        """The parts joined by ``+``."""
        return "+".join(decoder.spec() for decoder in self.decoders)


@dataclass(frozen=True, kw_only=True)
class Greedy(Decoder):
    """The model as it is: the most probable token at every step, or sampling when a temperature is given.

    *Cost*: one forward per token.

    Example:
        >>> Greedy().spec()
        'greedy'
    """

    name: ClassVar[str] = "greedy"
    source: ClassVar[Source] = Source(title="Plain decoding", year=0, arxiv="")
    acts_on: ClassVar[str] = "nothing"

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """An empty plan."""
        return DecodingPlan()
