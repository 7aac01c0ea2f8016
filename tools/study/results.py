"""What the study found, in JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tools.study import plan
from tools.study.runs import Exam
from tools.study.speed import times
from tools.study.study import PROBLEMS, Study, found, survey
from tools.study.tuning import CHAIR, POPE, SMALL, Found, Limits
from vlmfix.decoders import parse
from vlmfix.evals.comparison.compare import DRAWS_PER_ARM, Arm, Change, Comparison, compare
from vlmfix.evals.record import CARD, PLAIN, EvalRun, Record
from vlmfix.records import read_json
from vlmfix.settings import UNSEARCHED

DRAWS = 10_000
HALF, RECALL_LOSS = 0.5, 0.02
"""The goal: this share of plain decoding's CHAIR_i, with recall down by no more than that."""
NOT_YET = "not run yet"


def results(study: Study, stages: Sequence[str], command: str) -> dict[str, Any]:
    """Everything that the page shows, from what is on the disk.

    Args:
        study: What is measured.
        stages: What the page shows of it.
        command: What gives the same, for the page.
    """
    reasons = survey(study)
    path = study.out / PROBLEMS
    problems = read_json(path) if path.exists() else {}
    return {
        "command": command,
        "stages": list(stages),
        "count": study.count,
        "seed": study.seed,
        "tuning_count": study.tuning_count,
        "tuning_seed": study.tuning_seed,
        "trials": study.trials,
        "limits": dataclasses.asdict(Limits()),
        "goal": {"chair_i": HALF, "recall_loss": RECALL_LOSS},
        "draws": DRAWS,
        "problems": problems,
        "models": {model: _model(study, model, reasons[model], problems) for model in study.models},
    }


def _model(study: Study, model: str, reasons: Mapping[str, str], problems: Mapping[str, str]) -> dict[str, Any]:
    exams = study.exams(model) if study.drawn() else {}
    exams = {name: exam for name, exam in exams.items() if exam.begun()}
    if not {CHAIR, POPE} <= exams.keys():
        return {"rows": []}
    listed = study.arms()
    others = plan.listed(study.only)
    searched = [*study.searched(), *others]
    searches = {arm.name: found(study, model, arm.name) for arm in searched}
    chosen = {name: plan.tuned(name, one.spec) for name, one in searches.items() if one and one.spec}
    names = [arm.name for arm in listed]
    captions = compared(exams[CHAIR], [*names, *chosen.values()])
    changed = _changed(exams[CHAIR], captions)
    questions = compared(exams[POPE], [*names, *chosen.values()])
    rows = []
    for arm in listed:
        known = {
            "name": arm.name,
            "source": arm.decoder.source.arxiv,
            "reason": reasons[arm.spec],
            "problem": _problem(problems, model, arm.name),
        }
        rows.append(known | _figures(arm.name, captions, questions, changed))
    return {
        "weights": read_json(exams[CHAIR].folder / CARD)["weights"],
        "dtype": read_json(exams[CHAIR].folder / CARD)["dtype"],
        "devices": {name: _sessions(exam, lambda session: session["device"]) for name, exam in exams.items()},
        "versions": list(dict.fromkeys(said for exam in exams.values() for said in _sessions(exam, _versions))),
        "plain": {"captions": captions.get(PLAIN), "pope": questions.get(PLAIN)},
        "rows": rows,
        "tuned": [
            _tuned(study, model, arm, searches[arm.name], reasons, problems)
            | _figures(chosen.get(arm.name, ""), captions, questions, changed)
            for arm in searched
            if not arm.decoder.refines
        ],
        "small": _small(study, model, searches, chosen) if SMALL in exams else None,
        "speed": times(study.times(model), names),
    }


def _figures(
    arm: str, captions: Mapping[str, Any], questions: Mapping[str, Any], changed: Mapping[str, float]
) -> dict[str, Any]:
    """What is known of an arm; None for what is not there."""
    return {"captions": captions.get(arm), "pope": questions.get(arm), "changed": changed.get(arm)}


def _problem(problems: Mapping[str, str], model: str, arm: str) -> str:
    """What went wrong with an arm, if anything."""
    return next(
        (text for name, text in problems.items() if name.startswith(f"{model}, ") and name.endswith(f", {arm}")), ""
    )


def _tuned(
    study: Study,
    model: str,
    arm: plan.Arm,
    search: Found | None,
    reasons: Mapping[str, str],
    problems: Mapping[str, str],
) -> dict[str, Any]:
    """A search, or why there is none."""
    begun = plan.starts(arm)
    reason = ""
    if model in UNSEARCHED:
        reason = "nothing is searched on this model: recipes found on others are tested on it"
    elif not begun:
        reason = "nothing in it is declared for tuning"
    elif all(reasons[spec] for spec in begun):
        reason = reasons[begun[0]]
    elif search is None:
        reason = _problem(problems, model, arm.name) or NOT_YET
    known = {"name": arm.name, "source": arm.decoder.source.arxiv, "reason": reason}
    return known | {"search": None if search is None else _search(search)}


def _search(search: Found) -> dict[str, Any]:
    """A search, with what a person would write for its decoders."""
    told = {
        "chosen_brief": plan.brief(parse(search.spec)) if search.spec else "",
        "furthest_brief": plan.brief(parse(search.furthest["spec"])),
    }
    return dataclasses.asdict(search) | told


def _small(study: Study, model: str, searches: Mapping[str, Found | None], chosen: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy on small things: each refining decoder, its control, and the one against the other."""
    exam = study.exams(model)[SMALL]
    arms = [arm.name for arm in plan.small_arms(study.arms())]
    arms += [chosen[arm.name] for arm in study.arms() if arm.decoder.refines and arm.name in chosen]
    said = compared(exam, [name for arm in arms for name in (arm, plan.control(arm))])
    card = read_json(exam.folder / CARD)
    rows = []
    for arm in arms:
        against = None
        if {arm, plan.control(arm)} <= said.keys():
            run = exam.run()
            both = {PLAIN: run.answers[plan.control(arm)], arm: run.answers[arm]}
            against = _changes(compare([_only(run, both)]))[arm]
        spec = card["arms"].get(arm, {}).get("spec", "")
        brief = plan.brief(parse(spec)) if spec else ""
        rows.append(
            {
                "name": arm,
                "spec": spec,
                "brief": brief,
                "found": said.get(arm),
                "elsewhere": said.get(plan.control(arm)),
                "difference": against,
            }
        )
    refining = {arm.name: searches[arm.name] for arm in study.searched() if arm.decoder.refines}
    ended = {name: _search(search) for name, search in refining.items() if search is not None}
    return {"plain": said.get(PLAIN), "samples": card["count"], "rows": rows, "searches": ended}


def _changed(exam: Exam, arms: Iterable[str]) -> dict[str, float]:
    """For each arm the share of its answers that are not plain decoding's, in [0, 1]."""
    answers = exam.run().answers
    plain = answers[PLAIN]
    return {
        arm: sum(record.answer != plain[name].answer for name, record in answers[arm].items()) / len(plain)
        for arm in arms
    }


def _sessions(exam: Exam, told: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """What the sessions that answered say, each thing once."""
    return list(dict.fromkeys(told(session) for session in read_json(exam.folder / CARD)["sessions"]))


def _versions(session: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {session['versions'][name]}" for name in ("vlmfix", "torch", "transformers"))


def compared(exam: Exam, arms: Sequence[str]) -> dict[str, Any]:
    """Figures of plain decoding and of those arms that the run has, with differences to plain decoding.

    Args:
        exam: Whose run is read; plain decoding is answered there.
        arms: By name; what else the run has counts for nothing, neither as a row nor in the number corrected for.
    """
    run = exam.run()
    there = {arm: run.answers[arm] for arm in (PLAIN, *arms) if arm in run.answers}
    draws = max(DRAWS, DRAWS_PER_ARM * len(there))
    return _changes(compare([_only(run, there)], draws=draws))


def _only(run: EvalRun, answers: Mapping[str, dict[str, Record]]) -> EvalRun:
    """A run as if it had these arms alone."""
    card = run.card | {"arms": {arm: run.card["arms"][arm] for arm in answers}}
    return dataclasses.replace(run, card=card, answers=dict(answers))


def _changes(comparison: Comparison) -> dict[str, Any]:
    every: Iterable[Arm] = (*comparison.plain, *comparison.arms)
    return {arm.name: {change.figure: _change(change) for change in arm.changes} for arm in every}


def _change(change: Change) -> dict[str, Any]:
    return {
        "value": change.arm.value,
        "value_low": change.arm.low,
        "value_high": change.arm.high,
        "difference": change.difference.value,
        "low": change.difference.low,
        "high": change.difference.high,
        "direction": change.direction,
        "shifted": bool(change.shifted),
    }


def reach(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far each row came: its share of plain decoding's CHAIR_i and what recall changed, the best first.

    Args:
        model: One of the results' models.
    """
    reached = []
    for kind, rows in (("defaults", model["rows"]), ("tuned", model["tuned"])):
        for row in rows:
            if row["captions"] is None:
                continue
            wrong, recall = row["captions"]["chair_i"], row["captions"]["recall"]
            before = wrong["value"] - wrong["difference"]
            if not before:
                continue
            share = wrong["value"] / before
            kept = recall["difference"] >= -RECALL_LOSS
            reached.append(
                {
                    "name": row["name"],
                    "kind": kind,
                    "share": share,
                    "recall": recall["difference"],
                    "kept": kept,
                    "reached": kept and share <= HALF,
                }
            )
    return sorted(reached, key=lambda row: (not row["kept"], row["share"]))
