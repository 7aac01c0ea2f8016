"""A run over a folder with a model that answers at once, and what it leaves."""

from __future__ import annotations

import pytest
from PIL import Image

from vlmfix import images
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


def living(monkeypatch):
    """A list with the files of all pictures that were opened and are still held."""
    alive = []
    open_picture = images.open_picture

    class Counted(Image.Image):
        def __del__(self):
            alive.pop()

    def opened(path):
        picture = open_picture(path)
        picture.image.__class__ = Counted
        alive.append(path)
        return picture

    monkeypatch.setattr(images, "open_picture", opened)
    return alive
