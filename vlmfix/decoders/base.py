"""Declares decoding methods: frozen configurations, each of which makes a fresh plan for every call.

Most methods act while the model decodes: they have a ``plan``. A ``Refiner`` acts before, on the pictures: it finds
where the question makes the model look, and changes the pictures. In a chain it comes first, and at most once.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from PIL import Image
from torch import Tensor

from vlmfix.attention.session import Acting, Portion, edited
from vlmfix.attention.tower import tower_edited
from vlmfix.decoders.picture.refined import PictureMemo, Refined
from vlmfix.decoding.following import following
from vlmfix.decoding.handed import HandedLoop
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.prefix import cut_prefill, prompts_of
from vlmfix.decoding.rows import portions_of
from vlmfix.decoding.stack import Stack, stack_layout, stacked
from vlmfix.decoding.strategy import Strategy
from vlmfix.decoding.watch import Watch, longest_prompts
from vlmfix.errors import DataError, IncompatibleDecodersError, UsageError
from vlmfix.language.idle import refuse_idle, without_idle
from vlmfix.language.parameters import Value, noted, ranges, settled, written
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.models.turns import turn_of
from vlmfix.plugins import origin_of, plugins_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Names the publication and the code that a method comes from."""

    title: str
    year: int
    arxiv: str
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Decoder(ABC):
    """Declares one decoding method. Instances are values: frozen, hashable, printed as they are written.

    Class attributes:
        name: Name on the command line.
        source: The paper.
        acts_on: What the method changes, for tables.
        passes: Forward passes per generated token, in rows of the clean batch.
        beams: Whether beam search works.
        compiles: Whether compiled decoding works.
        refines: Whether it changes the pictures before they are encoded.
        presets: Named sets of parameters. A parameter takes the preset's value when it is left at its default: None, or
            ``PRESETS_OWN`` for one of which None is a value.
    """

    name: ClassVar[str]
    source: ClassVar[Source]
    acts_on: ClassVar[str]
    passes: ClassVar[int] = 1
    beams: ClassVar[bool] = True
    compiles: ClassVar[bool] = True
    refines: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {}

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ranges(type(self))}
        preset = self._preset(given)
        values = settled(type(self), given, preset)
        refuse_idle(type(self), values, preset)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def acting(cls, **given: Value) -> Self:
        """Makes a decoder whose parameters that do nothing beside the others have their own values, whatever is given.

        Args:
            **given: Parameters.

        Raises:
            UsageError: A value is not allowed.
        """
        preset = cls._preset(given)
        return cls(**without_idle(cls, settled(cls, given, preset), preset))

    @classmethod
    def _preset(cls, given: Mapping[str, Value]) -> Mapping[str, Value]:
        if not cls.presets:
            return {}
        chosen = str(given.get("preset", getattr(cls, "preset", None)))
        if chosen not in cls.presets:
            raise UsageError(f"{cls.name}: preset={chosen!r} is not allowed", f"allowed: {' | '.join(cls.presets)}")
        return cls.presets[chosen]

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
        """Says in one sentence why the method cannot act on this model; returns None when it can."""
        return None

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns facts that answers depend on beside the parameters, such as a profile's digest.

        Run cards keep the facts, and a run with other facts is another run.

        Args:
            vlm: A model that the method can act on.

        Returns:
            Values by name; people read both.
        """
        return {}

    def refine(
        self,
        vlm: Checkpoint,
        pictures: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        memo: PictureMemo,
    ) -> list[Refined]:
        """Makes the pictures that the model is shown in place of each row's own; most methods return these unchanged.

        Args:
            vlm: The model.
            pictures: B lists of RGB pictures.
            prompts: B questions.
            memo: Results of earlier calls that depend on pictures alone; all calls with this model share it.

        Returns:
            For each row, its new pictures and how they came about.
        """
        return [Refined(tuple(row)) for row in pictures]

    def folded(self, vlm: Checkpoint) -> dict[int, Tensor]:
        """Returns the factors of head outputs that do all that the method does, for ``vlmfix export``.

        Args:
            vlm: The model.

        Returns:
            Layer number -> (H,) factors; layers without an entry stay as they are.

        Raises:
            IncompatibleDecodersError: The method does something that no weights can hold, or cannot act on the model.
        """
        raise IncompatibleDecodersError(
            f"{self.name} cannot be folded into weights: it acts on {self.acts_on}, by question, picture or step",
            "fold ph3 or amplify, which act on the same heads everywhere",
        )

    def removed(self, vlm: Checkpoint) -> dict[int, tuple[Tensor, ...]]:
        """Returns the directions that outputs of MLPs lose, which ``vlmfix export`` folds beside the factors of heads.

        Args:
            vlm: The model, on which ``folded`` says that the method can be folded.

        Returns:
            Layer number -> (k, hidden size) of orthogonal unit vectors, one tensor after the other; none by default.
        """
        return {}

    @property
    def waiting(self) -> int:
        """Returns how many rows per sample wait until a step wants them, and are held apart until then."""
        return self.passes - 1 if getattr(self, "when", "always") == "uncertain" else 0

    @property
    def decoding(self) -> Decoder:
        """Returns the decoder that acts once the pictures are refined."""
        return self

    @property
    def strategy(self) -> Strategy | None:
        """Returns how tokens are chosen from the scores; None leaves that to the options of the call."""
        return None

    @classmethod
    def called(cls) -> str:
        """Returns what a specification names the method by: its name, or the file and the class that it was read from.

        See ``vlmfix.plugins``.
        """
        origin = origin_of(cls)
        return cls.name if origin is None else origin.name

    def plugins(self) -> dict[str, str]:
        """Maps the methods that are not vlmfix's own to their distribution and version, or to their file's digest."""
        return plugins_of([type(self)])

    def parameters(self) -> dict[str, Value]:
        """Returns the parameters with their values; those of later versions only where one has not its default."""
        return noted(self)

    def spec(self) -> str:
        """Writes the decoder as on the command line; parsing the text gives an equal decoder."""
        given = ",".join(f"{name}={written(value)}" for name, value in self.parameters().items())
        return f"{self.called()}:{given}" if given else self.called()

    @contextmanager
    def applied(self, vlm: Checkpoint, batch: Mapping[str, Tensor], *, num_beams: int = 1) -> Iterator[dict[str, Any]]:
        """Puts the method to work on a model inside the block; other threads that use the model wait.

        Args:
            vlm: The model, with its processor and family; ``vlmfix.wrap(model, processor)`` makes one of your own.
            batch: The inputs of the ``generate`` call, from ``vlm.encode`` or a processor.
            num_beams: The ``num_beams`` that ``generate`` is called with; leave it out for a decoder with a strategy,
                whose arguments are among those that are yielded.

        Yields:
            Keyword arguments for ``model.generate(**batch, **kwargs)``.

        Raises:
            UsageError: ``num_beams`` differs from the decoder's own.
            IncompatibleDecodersError: The method cannot act on this model, these inputs or beam search. Inside the
                block: the model's ``generate`` is called with other inputs, by another thread, or does not run through
                what the method has put to work.
            DataError: A prompt is longer than the model's context, or than a sliding window in which edits act. Inside
                the block, an answer may get longer than such a window; where the context is full, a row ends.
        """
        with self.at_work(vlm, batch, num_beams=num_beams) as (arguments, _):
            yield arguments

    def planned(self, vlm: Checkpoint, batch: Batch, *, num_beams: int = 1) -> tuple[ImageLayout, DecodingPlan]:
        """Plans one call, and refuses inputs that no call can decode.

        Args:
            vlm: The model, which the calling thread has.
            batch: B samples.
            num_beams: Beams of the search; 1 without one.

        Returns:
            The samples' layout, and the plan.

        Raises:
            IncompatibleDecodersError: The method cannot act on this model, these inputs or beam search.
            DataError: A prompt is longer than the model's context, or is a single token.
        """
        if videos := [name for name in batch if "video" in name]:
            raise IncompatibleDecodersError(
                f"the inputs hold a video ({', '.join(videos)}), whose tokens no decoder knows as a picture's",
                "take still pictures out of it, and show these",
            )
        room_for_answers(vlm, batch.lengths)  # before anything is computed
        layout = vlm.layout(batch)
        plan = self.plan(vlm, batch, layout)
        if num_beams > 1 and not plan.beams:
            raise IncompatibleDecodersError(f"{self.spec()} does not work with beam search", "use num_beams=1")
        if batch.length == 1 and not plan.plain:
            raise DataError("the prompts have one token, which is taken for a generated one", "ask a question")
        return layout, plan

    @contextmanager
    def at_work(
        self,
        vlm: Checkpoint,
        batch: Mapping[str, Tensor],
        *,
        num_beams: int = 1,
        planned: tuple[ImageLayout, DecodingPlan] | None = None,
    ) -> Iterator[tuple[dict[str, Any], Watch]]:
        """Does the same as ``applied``, and yields, beside the arguments, the watch over the calls inside the block.

        Args:
            vlm: See ``applied``.
            batch: See ``applied``.
            num_beams: See ``applied``.
            planned: Layout and plan that ``planned`` returned for them; None to plan here.
        """
        num_beams = Strategy(num_beams=num_beams).combined(self.strategy).num_beams
        batch = Batch.of(batch)
        with ExitStack() as block:
            block.enter_context(turn_of(vlm.model).taken())
            layout, plan = planned or self.planned(vlm, batch, num_beams=num_beams)
            if plan.leader is not None:
                raise IncompatibleDecodersError(
                    f"{self.spec()} leads a beam search of its own, which the model's generate does not do",
                    "ask with vlm.generate(...) and without a static cache, or on the command line",
                )
            stack = loop = None
            if plan.gate is None:
                stack = block.enter_context(self._stacked(vlm, batch, layout, plan, num_beams))
            else:
                loop = HandedLoop(vlm=vlm, batch=batch, layout=layout, plan=plan, gate=plan.gate, name=self.spec())
            length, lengths = longest_prompts(batch, plan.contrasts)
            watch = Watch(
                vlm=vlm,
                decoder=self.spec(),
                handed=loop is not None,
                batch=batch,
                beams=num_beams,
                prompt=length,
                lengths=lengths,
                layers=frozenset[int]().union(*(edit.layers.resolve(vlm.layers) for edit in plan.every_edit)),
                acting=Acting(vlm) if plan.every_edit and loop is None else None,
                stack=stack,
                plain=plan.plain,
            )
            block.enter_context(watch.watching())
            arguments: dict[str, Any] = {} if loop is None else {"custom_generate": loop}
            if not plan.steps_alike:
                arguments["disable_compile"] = True
            yield arguments | (self.strategy.arguments() if self.strategy else {}), watch

    @contextmanager
    def _stacked(
        self, vlm: Checkpoint, batch: Batch, layout: ImageLayout, plan: DecodingPlan, beams: int
    ) -> Iterator[Stack | None]:
        """Puts branches, edits and shared beginnings on the model inside the block, for its own ``generate``."""
        layout = layout.expand(beams) if beams > 1 else layout
        with ExitStack() as block:
            block.enter_context(tower_edited(vlm, plan.tower))
            stack = live = None
            others: list[Portion] = []
            if plan.contrasts:
                stack = block.enter_context(stacked(vlm, batch, plan.contrasts, beams=beams))
                others = portions_of(layout, plan.branches, stack.length)
                layout, live = stack_layout(layout, stack)
            work = block.enter_context(edited(vlm, layout, plan.edits, live=live, others=others))
            if beams > 1 and work.stores:
                block.enter_context(following(vlm, work))
            prompts = None if plan.views else prompts_of(vlm, batch, plan.branches, beams=beams)
            if prompts is not None:
                block.enter_context(cut_prefill(vlm, prompts))
            yield stack


@dataclass(frozen=True, kw_only=True)
class Greedy(Decoder):
    """Leaves the model as it is: takes the most probable token at every step, or what the options of the call say.

    *Cost*: one forward per token.

    Example:
        >>> Greedy().spec()
        'greedy'
    """

    name: ClassVar[str] = "greedy"
    source: ClassVar[Source] = Source(title="Plain decoding", year=0, arxiv="")
    acts_on: ClassVar[str] = "nothing"

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Returns an empty plan."""
        return DecodingPlan()


class Refiner(Decoder):
    """Changes the pictures before they are encoded, and then decodes plainly.

    Subclasses implement ``refine``. ``VLM.generate``, ``VLM.stream`` and ``VLM.refine`` call it; ``applied`` gets a
    batch whose pictures are encoded already, so it refuses.
    """

    refines: ClassVar[bool] = True

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Refuses to plan, since the batch is encoded already.

        Raises:
            IncompatibleDecodersError: Always.
        """
        raise IncompatibleDecodersError(
            f"{self.name} changes pictures before they are encoded, and this batch holds encoded ones",
            f"call vlm.generate(pictures, prompts, decoder={self.name!r}), or encode what vlm.refine(...) returns",
        )

    @abstractmethod
    def refine(
        self,
        vlm: Checkpoint,
        pictures: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        memo: PictureMemo,
    ) -> list[Refined]:
        """Makes the pictures that the model is shown; see ``Decoder.refine``."""

    @property
    def decoding(self) -> Decoder:
        """Returns plain decoding."""
        return Greedy()
