"""The whole study: worlds, plain answers, decoders with defaults, controls, searches, times."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tools.study import plan, small
from tools.study.clock import Clock, Job, Outcome, crew, gpus, perform
from tools.study.runs import Exam, answer_arm, answer_plain, loaded, take_in
from tools.study.speed import time_arm
from tools.study.tuning import CHAIR, FOUND, POPE, SMALL, Found, Hunt, hunt
from vlmfix.decoders import Decoder, parse
from vlmfix.errors import VlmfixError
from vlmfix.evals.benchmarks import chair, pope
from vlmfix.evals.task import Task, Workload
from vlmfix.generation import VLM
from vlmfix.records import read_json, replace_json
from vlmfix.settings import UNSEARCHED, Settings
from vlmfix.world import coco
from vlmfix.world.coco import image_name
from vlmfix.world.pope import SPLITS

TUNED, SPEED = "tuned", "speed"
STAGES = ("small", "defaults", TUNED, SPEED)
PROBLEMS = "problems.json"
TIMED = 16
"""Pictures in the batch that is timed."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured.

    Attributes:
        out: Folder of everything.
        models: As ``--model`` names them.
        count: Scenes that figures are reported for.
        seed: Theirs.
        tuning_count: Scenes that parameters are chosen on.
        tuning_seed: Theirs.
        trials: Of each search.
        only: Specifications of the decoders; empty for all, and the chains.
        device: Where models run.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        batch_size: Rows at a time.
        jobs: Processes at a time.
        clock: When to stop.
    """

    out: Path
    models: Sequence[str]
    count: int
    seed: int
    tuning_count: int
    tuning_seed: int
    trials: int
    only: Sequence[str]
    device: str
    dtype: str
    batch_size: int
    jobs: int
    clock: Clock

    def folder(self, model: str) -> Path:
        """Everything about a model."""
        return self.out / model.replace("/", "_")

    def search(self, model: str, arm: str) -> Path:
        """An arm's search."""
        return self.folder(model) / "search" / arm.replace("/", "_")

    def world(self, seed: int) -> Path:
        """The scenes of a seed."""
        return self.out / f"world-{seed}"

    def drawn(self) -> bool:
        """Whether the reported scenes are there; what is written last is."""
        return all((self.world(self.seed) / "pope" / f"{split}.json").exists() for split in SPLITS)

    def searched(self) -> list[plan.Arm]:
        """Every decoder with its defaults, and the chains; parameters are searched for these."""
        return plan.arms(self.only)

    def arms(self) -> list[plan.Arm]:
        """What is measured as it is."""
        return [*self.searched(), *plan.variants(self.only)]

    def times(self, model: str) -> Path:
        """Folder with a model's times."""
        return self.folder(model) / SPEED

    def exams(self, model: str, *, tuning: bool = False) -> dict[str, Exam]:
        """A model's exams on the reported scenes, or on those for tuning; their worlds must be there.

        Small things are asked about where a decoder refines pictures.
        """
        count, seed = (self.tuning_count, self.tuning_seed) if tuning else (self.count, self.seed)
        folder = self.folder(model) / ("tuning" if tuning else "reported")
        found = _workloads(self.world(seed), count, seed)
        if not any(arm.decoder.refines for arm in self.arms()):
            found = {name: exam for name, exam in found.items() if name != SMALL}
        return {
            name: Exam(
                folder=folder / name,
                task=task,
                workload=workload,
                settings=Settings(
                    model=model, device=self.device, dtype=self.dtype, max_new_tokens=task.max_new_tokens
                ),
                batch_size=self.batch_size,
            )
            for name, (task, workload) in found.items()
        }


@lru_cache
def _workloads(world: Path, count: int, seed: int) -> dict[str, tuple[Task, Workload]]:
    images, annotations = world / "images", world / "annotations"
    captions = chair.read(annotations / "instances.json", annotations / "captions.json", images)
    return {
        CHAIR: (chair.Chair(), captions),
        POPE: (pope.Pope(), pope.read(world / "pope", images)),
        SMALL: (pope.Pope(), small.questions(count, seed, images)),
    }


def conduct(study: Study, stages: Sequence[str]) -> bool:
    """Does what is left of the stages, in the order given; times come last, when nothing else runs on a device.

    Returns:
        Whether all of it is done; not when the time was over or something failed.
    """
    with crew(study.jobs) as pool:
        if not _all(study, _worlds(study), pool) or not _all(study, _plain(study, stages), pool):
            return False
        reasons = survey(study)
        jobs: dict[str, Job] = {}
        for listed in (LISTED[name] for name in stages if name != SPEED):
            stage = {name: job for model in study.models for name, job in listed(study, model, reasons[model]).items()}
            jobs |= sorted(stage.items(), key=lambda item: -item[1].cost)  # the longest first, so that all end together
        done = _all(study, jobs, pool)
    times: dict[str, Job] = {}
    for model in study.models if SPEED in stages else ():
        times |= _timed(study, model, reasons[model])
    with crew(1 if study.device == "cpu" else max(1, len(gpus()))) as alone:
        return _all(study, times, alone) and done


def _worlds(study: Study) -> dict[str, Job]:
    both = ((study.seed, study.count), (study.tuning_seed, study.tuning_count))
    return {f"world {seed}": Job(_draw, (study.world(seed), count, seed)) for seed, count in both}


def _draw(world: Path, count: int, seed: int) -> None:
    coco.make(world, count=count, seed=seed)


def _plain(study: Study, stages: Sequence[str]) -> dict[str, Job]:
    jobs = {}
    for model in study.models:
        folders = {"reported": study.exams(model)}
        if TUNED in stages and model not in UNSEARCHED:
            folders["tuning"] = study.exams(model, tuning=True)
        for folder, exams in folders.items():
            for name, exam in exams.items():
                jobs[f"{model}, plain, {folder} {name}"] = Job(answer_plain, (exam, study.clock))
    return jobs


def survey(study: Study) -> dict[str, dict[str, str]]:
    """For each model, why decoders cannot act on it: by specification, empty for those that can."""
    specs = [arm.spec for arm in study.arms()]
    specs += [spec for arm in (*study.arms(), *plan.listed(study.only)) for spec in plan.starts(arm)]
    found = {}
    for model in study.models:
        vlm = loaded(model, revision=None, device=study.device, dtype=study.dtype)
        found[model] = {spec: _reason(parse(spec), vlm) for spec in dict.fromkeys(specs)}
    return found


def _reason(decoder: Decoder, vlm: VLM) -> str:
    """Why a decoder cannot act on a model; empty when it can."""
    try:
        return decoder.check(vlm) or ""
    except VlmfixError as error:
        return str(error)


def _small(study: Study, model: str, reasons: Mapping[str, str]) -> dict[str, Job]:
    exams = study.exams(model)
    listed = [arm for arm in plan.small_arms(study.arms()) if not reasons.get(arm.spec)]
    return {
        f"{model}, small, {name}": Job(_answer, ([exams[SMALL]], name, decoder, study.clock))
        for name, decoder in plan.with_controls(listed).items()
    }


def _defaults(study: Study, model: str, reasons: Mapping[str, str]) -> dict[str, Job]:
    exams = study.exams(model)
    listed = [arm for arm in study.arms() if not reasons[arm.spec]]
    return {
        f"{model}, {name}, {arm.name}": Job(
            _answer, ([exams[name]], arm.name, arm.decoder, study.clock), cost=_cost(arm)
        )
        for arm in listed
        for name in (POPE, CHAIR)
    }


def _tuned(study: Study, model: str, reasons: Mapping[str, str]) -> dict[str, Job]:
    if model in UNSEARCHED:
        return {}
    exams, tuning = study.exams(model), study.exams(model, tuning=True)
    jobs = {}
    for arm in (*study.searched(), *plan.listed(study.only)):
        names = (SMALL,) if arm.decoder.refines else (CHAIR, POPE)
        specs = [spec for spec in plan.starts(arm) if not reasons[spec]]
        if specs:
            wanted = Hunt(
                folder=study.search(model, arm.name),
                specs=specs,
                exams={name: tuning[name] for name in names},
                trials=study.trials,
                listed=arm.name in plan.LISTED,
            )
            own = [exams[name] for name in names]
            jobs[f"{model}, search, {arm.name}"] = Job(_hunted, (wanted, arm.name, own, study.clock), cost=_cost(arm))
    return jobs


def _cost(arm: plan.Arm) -> float:
    """How long an arm takes beside others, roughly: its rows; a method that refines reads the picture several times."""
    return math.inf if arm.decoder.refines else arm.decoder.passes


LISTED = {"small": _small, "defaults": _defaults, TUNED: _tuned}


def _answer(exams: Sequence[Exam], arm: str, decoder: Decoder, clock: Clock) -> list[tuple[Exam, str]]:
    """Answers an arm; returns what is to be taken into the runs."""
    for exam in exams:
        answer_arm(exam, arm, decoder, clock)
    return [(exam, arm) for exam in exams]


def _hunted(wanted: Hunt, arm: str, exams: Sequence[Exam], clock: Clock) -> list[tuple[Exam, str]]:
    """Searches an arm's parameters and answers the reported questions with the best."""
    found = hunt(wanted, clock)
    if not found.spec:
        return []
    name, decoder = plan.tuned(arm, found.spec), parse(found.spec)
    done = _answer(exams, name, decoder, clock)
    if wanted.small:
        done += _answer(exams, plan.control(name), small.Elsewhere(decoder=decoder), clock)
    return done


def _timed(study: Study, model: str, reasons: Mapping[str, str]) -> dict[str, Job]:
    settings = study.exams(model)[CHAIR].settings
    pictures = [study.world(study.seed) / "images" / image_name(number) for number in range(min(TIMED, study.count))]
    return {
        f"{model}, speed, {arm.name}": Job(time_arm, (study.times(model), settings, pictures, arm.name, arm.decoder))
        for arm in study.arms()
        if not reasons[arm.spec]
    }


def _all(study: Study, jobs: Mapping[str, Job], pool: ProcessPoolExecutor | None) -> bool:
    """Does jobs, takes in what they answered, tells how it goes, and keeps what went wrong."""
    path = study.out / PROBLEMS
    problems: dict[str, Any] = read_json(path) if path.exists() else {}
    left = len(jobs)
    whole = True
    for name, outcome in perform(jobs, study.clock, pool):
        left -= 1
        for exam, arm in outcome.value or ():
            take_in(exam, arm)
        problems.pop(name, None)
        if outcome.problem:
            problems[name] = outcome.problem
        replace_json(path, problems)
        whole = whole and not outcome.problem and not outcome.stopped
        print(f"effects: {name}: {_said(outcome)}; {left} left", file=sys.stderr, flush=True)
    return whole


def _said(outcome: Outcome) -> str:
    if outcome.stopped:
        return "stopped, the time is over"
    return outcome.problem or f"{outcome.seconds:.1f} s"


def found(study: Study, model: str, arm: str) -> Found | None:
    """What the search for an arm gave; None when it has not ended."""
    path = study.search(model, arm) / FOUND
    return Found(**read_json(path)) if path.exists() else None
