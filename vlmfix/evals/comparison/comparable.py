"""Whether runs may be compared: what must be equal, and what is only worth a note."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmfix.errors import UsageError
from vlmfix.evals.record import PLAIN, EvalRun, without_names
from vlmfix.files import resolved
from vlmfix.parsing import some
from vlmfix.records import flat, shown
from vlmfix.settings import LOADED

PACKAGES = ("vlmfix", "torch", "transformers")
"""Packages whose versions are noted when they differ."""
NAMES = {"image": "picture", "target": "truth"}
"""What a sample's fields are called in messages."""


def refuse_incomparable(runs: Sequence[EvalRun]) -> None:
    """Find what makes a comparison of runs meaningless.

    Equal must be: task and options, samples, data (paths and file names left out, digests not), the contents of the
    pictures that have answers, the model's weights, files, commit and dtype, how its files were read, the limit on
    pixels, and the decoding settings. The revision counts where no commit is known: a branch and the commit that it
    stands for are the same model. Files and how they were read are compared where both runs noted them.

    Raises:
        UsageError: Something differs, with both values; a run has no plain arm; or its arms saw different pictures.
    """
    if not runs:
        raise UsageError("there is no run to compare", "give the folder of at least one run")
    for run in runs:
        if PLAIN not in run.answers:
            raise UsageError(
                f"{run.folder} has no plain arm {PLAIN!r}", "start its command again: vlmfix eval adds the plain arm"
            )
    seen = [run.pictures() for run in runs]  # refuses arms that saw other pictures than their plain arm
    folders = [resolved(run.folder) for run in runs]
    if len(set(folders)) < len(folders):
        raise UsageError("a folder is given twice", "give each run once")
    for run, pictures in zip(runs[1:], seen[1:], strict=True):
        if differing := [*_differing(runs[0], run), *_other_pictures(seen[0], pictures)]:
            raise UsageError(
                f"{runs[0].folder} and {run.folder} cannot be compared: {'; '.join(differing)}",
                "compare runs of the same questions, model and settings; vlmfix eval adds arms to a run's folder",
            )


def version_notes(runs: Sequence[EvalRun], labels: Sequence[str]) -> Iterator[str]:
    """Says which packages had several versions; answers may differ for that reason alone."""
    for package in PACKAGES:
        found: dict[str, list[str]] = {}
        for run, label in zip(runs, labels, strict=True):
            for session in run.card.get("sessions", ()):
                found.setdefault(session.get("versions", {}).get(package, "unknown"), []).append(label)
        if len(found) > 1:
            listed = ", ".join(f"{version} ({', '.join(dict.fromkeys(used))})" for version, used in found.items())
            yield f"Made with several versions of {package}: {listed}."


def older_notes(runs: Sequence[EvalRun], labels: Sequence[str]) -> Iterator[str]:
    """Says which runs are, unlike others, of earlier versions, which did not note the model's files."""
    older = [label for run, label in zip(runs, labels, strict=True) if "files" not in run.card]
    if 0 < len(older) < len(runs):
        yield (
            f"Made by an earlier vlmfix, which noted no files of the model beside its weights and let the "
            f"checkpoint's generation settings act: {', '.join(older)}."
        )


def strategy_notes(run: EvalRun, names: Mapping[str, str]) -> Iterator[str]:
    """Says which arms of a run choose tokens otherwise than its plain arm, which is what their decoder is for.

    Args:
        run: The run.
        names: Each arm's name in the comparison.
    """
    for arm, about in run.card["arms"].items():
        if strategy := about.get("strategy"):
            seed = f" (seed {run.card['decoding']['seed']})" if strategy.startswith("sampling") else ""
            yield f"{names[arm]} chooses tokens otherwise than {names[PLAIN]}, by intention: {strategy}{seed}."


def fact_notes(run: EvalRun, names: Mapping[str, str]) -> Iterator[str]:
    """Says what the arms of a run depend on beside their parameters.

    Args:
        run: The run.
        names: Each arm's name in the comparison.
    """
    for arm, about in run.card["arms"].items():
        if facts := about.get("facts"):
            listed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
            yield f"{names[arm]} depends on: {listed}."


def _differing(one: EvalRun, other: EvalRun) -> Iterator[str]:
    if one.task.name != other.task.name:  # nothing else can be equal then
        yield f"task is {one.task.name!r} and {other.task.name!r}"
        return
    noted = [name for name in ("files", "checkpoint") if name in one.card and name in other.card]
    first, second = _what(one.card, noted), _what(other.card, noted)
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) != second.get(name):
            yield f"{name} is {shown(first.get(name))} and {shown(second.get(name))}"
    if one.card["samples"] != other.card["samples"]:
        yield _other_samples(one, other)


def _other_pictures(first: Mapping[str, str], second: Mapping[str, str]) -> Iterator[str]:
    """Says of how many pictures that both runs answered the contents differ, and of which."""
    both = [name for name in first if name in second]
    if other := [name for name in both if first[name] != second[name]]:
        yield f"the contents of {len(other)} of {len(both)} pictures differ: {some(other)}"


def _what(card: Mapping[str, Any], noted: Sequence[str]) -> dict[str, Any]:
    """What must be equal, by dotted names; ``noted`` are names of what both runs noted."""
    always = ("task", "weights", *noted, "commit", "dtype", *LOADED, "decoding")
    named = {name: card.get(name) for name in always} | {"options": without_names(card.get("options"))}
    if card.get("commit") is None:
        named["revision"] = card.get("revision")
    return dict(flat(named)) | dict(flat({"data": without_names(card.get("data"))}))


def _other_samples(one: EvalRun, other: EvalRun) -> str:
    """Says how two lists of samples differ."""
    first, second = ({sample.id: sample for sample in run.samples} for run in (one, other))
    if alone := len(first.keys() ^ second.keys()):
        return f"samples are {len(first)} and {len(second)}, {alone} of them in one run only"
    for name, sample in first.items():
        for field in ("prompt", "image", "target", "group", "unit"):
            one_value, other_value = getattr(sample, field), getattr(second[name], field)
            if one_value != other_value:
                return f"{NAMES.get(field, field)} of {name} is {shown(one_value)} and {shown(other_value)}"
    return "samples stand in another order"
