"""A run over a folder with a model that answers at once, and what it leaves."""

from __future__ import annotations

import pytest

from vlmfix.jobs.folder import Questions, run
from vlmfix.records import read_lines
from vlmfix.settings import Settings

WHAT = Questions.text("What?")


def go(
    pictures,
    out,
    vlm,
    *,
    questions=WHAT,
    batch_size=4,
    retry_failed=False,
    report=lambda progress: None,
    **settings,
):
    return run(
        pictures,
        out,
        questions=questions,
        settings=Settings(**settings),
        batch_size=batch_size,
        retry_failed=retry_failed,
        report=report,
        loader=vlm.load,
    )


def answers(out):
    return list(read_lines(out / "answers.jsonl"))


def failures(out):
    return list(read_lines(out / "failed.jsonl"))


def never_loaded(*_, **__):
    pytest.fail("the model was loaded")
