"""HeadHunter: chooses the heads of a decoder one by one, each time the one that helps most on the tuning half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfix.decoders import DECODERS, Chain, Decoder
from vlmfix.decoders.spec import Part, read_parts
from vlmfix.errors import UsageError
from vlmfix.evals.task import Task, Workload
from vlmfix.evals.tuning.tune import Evaluate, Field, Guards, Outcome, Trial, Tuned, arm_name
from vlmfix.language.parameters import HeadList, ranges
from vlmfix.settings import Settings

Head = tuple[int, int]
"""Layer and query head, from 0."""


@dataclass(frozen=True)
class Hunted:
    """A decoder that takes heads, and is asked to be given some.

    Attributes:
        parts: The decoders of the chain with what is given.
        place: Which of them takes the heads.
    """

    parts: tuple[Part, ...]
    place: int

    @classmethod
    def of(cls, spec: str) -> Hunted:
        """Reads a specification.

        Raises:
            UsageError: It is wrong, or not exactly one of its decoders takes a list of heads and leaves it open.
        """
        parts = read_parts(spec, DECODERS)
        found = [place for place, part in enumerate(parts) if _takes_heads(part.decoder) and "heads" not in part.given]
        if len(found) != 1:
            named = [name for name in DECODERS.homes if _takes_heads(DECODERS[name])]
            raise UsageError(
                f"{spec} has {len(found)} decoders whose heads are open",
                f"give one of {', '.join(named)}, without its heads, such as amplify:by=2",
            )
        return cls(parts, found[0])

    def build(self, heads: Sequence[Head]) -> Decoder:
        """Makes the decoder with these heads."""
        chain = tuple(
            part.decoder(**part.given, **({"heads": HeadList.of(heads)} if place == self.place else {}))
            for place, part in enumerate(self.parts)
        )
        return chain[0] if len(chain) == 1 else Chain(decoders=chain)


def _takes_heads(decoder: type[Decoder]) -> bool:
    allowed = ranges(decoder).get("heads")
    return allowed is not None and allowed.kind is HeadList


def hunt(
    spec: str,
    workload: Workload,
    task: Task,
    settings: Settings,
    *,
    heads: int,
    candidates: Sequence[Head],
    ranking: Mapping[str, Any],
    out: Path,
    evaluate: Evaluate,
    seed: int,
    guards: Guards,
) -> Tuned:
    """Chooses heads greedily on one half of the pictures, and tries the choice on the other half.

    In each round every candidate that is left joins the heads chosen so far, and the one with the best figure within
    the guards stays, if it is better than before; the hunt ends when none is, or with ``heads`` heads. Equal figures:
    the candidate that the ranking has first. The best trial becomes the recipe, as of ``tune``. A hunt that was killed
    goes on from ``out``, since every trial's answers lie there, and more ``heads`` add rounds to it.

    Source: HeadHunter and its soft form, arXiv 2506.10978 (diffusion transformers; an objective there scores pictures).
    *Differs*: the sizes of the loop were not to be found, and here one head joins in a round. The soft form is the
    decoder's: ``amplify:by=1,identity=0.5`` blends the heads' attention with the identity, ``amplify:by=0`` switches
    them off.

    Args:
        spec: A decoder with a list of heads that it leaves open, or a chain with one such.
        workload: Samples and pictures.
        task: The rules of scoring.
        settings: Model and generation settings; its ``decoder`` is not read.
        heads: Most heads, at least 1.
        candidates: (layer, head) to try, the most promising first.
        ranking: Where they come from, in JSON values, for the folder's card.
        out: Folder of the hunt; made when it is missing.
        evaluate: Runs arms over a workload into a folder.
        seed: Of the split.
        guards: What a trial may lose.

    Raises:
        UsageError: The task has no figure to tune, no decoder of the specification leaves heads open, there are no
            candidates, or the folder holds another search.
        DataError: There are fewer than two pictures, or plain decoding has no value on the tuning split.
    """
    if heads < 1 or not candidates:
        raise UsageError(f"{heads} heads of {len(candidates)} candidates are not allowed", "give 1 or more of both")
    hunted = Hunted.of(spec)
    about = {"candidates": str(HeadList.of(candidates)), "ranking": dict(ranking)}
    plugins = hunted.build(candidates[:1]).plugins()
    field = Field.claimed(spec, plugins, workload, task, settings, out, evaluate, seed, guards, about)
    sign = 1.0 if field.better == "higher" else -1.0
    chosen: list[Head] = []
    best = sign * (field.plain.value or 0.0)
    tried: list[tuple[Trial, Decoder]] = []
    while len(chosen) < heads:
        gains: dict[Head, float] = {}
        for head in candidates:
            if head in chosen:
                continue
            decoder = hunted.build([*chosen, head])
            found, value = field.tried(decoder)
            trial = _trial(decoder, [*chosen, head], found, field.feasible(found))
            tried.append((trial, decoder))
            if trial.feasible:
                gains[head] = sign * value
        winner = max(gains, key=gains.__getitem__, default=None)
        if winner is None or gains[winner] <= best:
            break
        best = gains[winner]
        chosen.append(winner)
    return field.concluded(tried)


def _trial(decoder: Decoder, heads: Sequence[Head], found: Outcome, feasible: bool) -> Trial:
    return Trial(arm_name(decoder), decoder.spec(), {"heads": HeadList.of(heads)}, found, feasible)
