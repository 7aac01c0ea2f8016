"""Measures head profiles: pictures stream through passes that all profilers share.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice

from PIL import Image

import vlmfix
from vlmfix.asked import pictures_of, whole
from vlmfix.attention.session import bare
from vlmfix.errors import DataError, UsageError
from vlmfix.heads.moments import LOOK_EVERY, STABLE, Halves, Tally
from vlmfix.heads.profile import HeadProfile, ProfileCard, fingerprint
from vlmfix.heads.profiler import Profiler, State, run_pass
from vlmfix.heads.profilers import profilers_of
from vlmfix.insight.work import Work
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.context import room_for_answers
from vlmfix.models.turns import turn_of
from vlmfix.pixels import content
from vlmfix.plugins import plugins_of

QUESTION = "Please describe this image in detail."
PACKAGES = ("torch", "transformers", "numpy", "scipy")
"""Packages whose version can change a score."""


def profile(
    vlm: Checkpoint,
    pictures: Iterable[Image.Image],
    profilers: Sequence[str | Profiler],
    *,
    question: str = QUESTION,
    batch_size: int = 4,
    seed: int = 0,
    until_stable: bool = True,
    report: Callable[[int], None] | None = None,
) -> dict[str, HeadProfile]:
    """Measures one profile per profiler; every picture is asked about once, and the profilers share its pass.

    Memory does not grow with the number of pictures. After every ``LOOK_EVERY`` pictures the reliability of each
    ranking is looked at: Spearman's rank correlation of the means over every other picture, corrected for their being
    halves. When all are at least ``STABLE`` at two looks in a row, the rest of the pictures is left.

    Args:
        vlm: The model; it is left as it was found.
        pictures: RGB pictures, in an order that does not matter or was drawn.
        profilers: Names of ``PROFILERS``, or profilers with parameters.
        question: Asked about every picture.
        batch_size: Pictures per pass, at least 1; scores do not depend on it but for rounding.
        seed: Seed of what profilers draw, at least 0.
        until_stable: Whether to stop when the rankings are stable; else every picture is shown.
        report: Called with the number of pictures done.

    Returns:
        By profiler name.

    Raises:
        UsageError: A parameter is out of range, or a profiler is not known.
        UnsupportedModelError: The model lacks what a profiler measures.
        DataError: There is no picture, or none of which a profiler can say something.
    """
    batch_size, seed = whole("batch_size", batch_size, 1), whole("seed", seed, 0, 2**63 - 1)
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"question={question!r} is not allowed", "a question is a text that has words")
    if isinstance(profilers, str):
        raise UsageError(f"profilers is the text {profilers!r}", f"give a list: [{profilers!r}]")
    chosen = profilers_of(profilers)
    with bare(vlm), turn_of(vlm.model).guarded(vlm.family.decoder(vlm.model)):
        run = _Run(vlm, chosen, question, seed)
        for batch in _batches(pictures, batch_size):
            run.add(batch)
            if report is not None:
                report(run.shown)
            if until_stable and run.stable:
                break
        return run.profiles()


class _Run:
    """A measurement under way."""

    def __init__(self, vlm: Checkpoint, profilers: Sequence[Profiler], question: str, seed: int) -> None:
        self._vlm, self._profilers, self._question, self._seed = vlm, profilers, question, seed
        self._layers = vlm.layers
        self._heads = vlm.heads
        self._states: list[State] = [profiler.begin(vlm) for profiler in profilers]
        empty = [state.tally(self._layers, self._heads) for state in self._states]
        self._halves: list[Halves[Tally]] = [Halves(tally, tally) for tally in empty]
        self._digest = hashlib.sha256()
        self._steady = 0
        self.shown = 0

    def add(self, pictures: Sequence[Image.Image]) -> None:
        """Shows a batch of pictures to every profiler."""
        vlm = self._vlm
        batch = vlm.encode([self._question] * len(pictures), [[picture] for picture in pictures])
        room_for_answers(vlm, batch.lengths)
        if bool((batch["input_ids"][:, -1] == vlm.family.image_token(vlm.model.config)).any()):
            raise DataError("the prompt ends with a picture", "use a chat template that puts the question behind it")
        work = Work(vlm, batch, vlm.layout(batch), first=self.shown, seed=self._seed)
        ran = run_pass(work, self._states)
        for number, state in enumerate(self._states):
            self._halves[number] = self._halves[number].added(state.scores(work, ran))
        for picture in pictures:
            self._digest.update(content(picture))
        before, self.shown = self.shown, self.shown + len(pictures)
        if self.shown // LOOK_EVERY > before // LOOK_EVERY:
            self._steady = self._steady + 1 if all(_reliable(halves) for halves in self._halves) else 0

    @property
    def stable(self) -> bool:
        """Whether all rankings were reliable at the last two looks."""
        return self._steady >= 2

    def profiles(self) -> dict[str, HeadProfile]:
        """What was found."""
        if not self.shown:
            raise DataError("there is no picture to profile", "give at least one picture, better a hundred")
        marks = fingerprint(self._vlm)
        found: dict[str, HeadProfile] = {}
        for profiler, state, halves in zip(self._profilers, self._states, self._halves, strict=True):
            halves = halves.added(state.rest(self._layers, self._heads))
            whole = halves.whole
            if not whole.count or not bool(whole.mean.isfinite().all()):
                raise DataError(f"{profiler.name} says nothing about {self.shown} pictures", state.advice)
            card = self._card(profiler, halves)
            scores, stderr = whole.mean.float(), whole.stderr.float()
            found[profiler.name] = HeadProfile(scores, stderr, card, marks, state.details())
        return found

    def _card(self, profiler: Profiler, halves: Halves[Tally]) -> ProfileCard:
        vlm = self._vlm
        return ProfileCard(
            profiler=profiler.name,
            parameters=profiler.parameters(),
            model=vlm.name,
            revision=vlm.revision,
            model_type=str(vlm.model.config.model_type),
            dtype=str(vlm.model.dtype).removeprefix("torch."),
            layers=self._layers,
            heads=self._heads,
            question=self._question,
            pictures=halves.whole.count,
            data=self._digest.hexdigest(),
            seed=self._seed,
            reliability=halves.reliability,
            stable=self.stable,
            versions={"vlmfix": vlmfix.__version__}
            | {name: version(name) for name in PACKAGES}
            | plugins_of([type(profiler), type(vlm.family)]),
        )


def _reliable(halves: Halves[Tally]) -> bool:
    reliability = halves.reliability
    return reliability is not None and reliability >= STABLE


def _batches(pictures: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    """Pictures, a few at a time; they may come from anything to go through, and be more than memory holds."""
    one = isinstance(pictures, Image.Image | str | bytes) or hasattr(pictures, "shape")
    if one or not isinstance(pictures, Iterable):
        pictures_of(pictures)  # says what is wrong
    rest, shown = iter(pictures), 0
    while batch := list(islice(rest, size)):
        rows = pictures_of(batch, first=shown)
        if many := [place for place, row in enumerate(rows, shown) if len(row) != 1]:
            raise DataError(f"pictures[{many[0]}] is a list", "profilers are shown one picture at a time")
        yield [picture for (picture,) in rows]
        shown += len(batch)
