"""Prepares the next batch of questions in the background while a model answers another.

Preparing a photograph (opening, turning, resizing, normalising) takes some ten milliseconds of a core, nearly all of
them in Pillow's and torch's own code, which lets other threads run. So threads are enough, and nothing has to be sent
between processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from PIL import Image

from vlmfix.generation import VLM
from vlmfix.models.layout import Prepared

THREADS = max(1, min(8, (os.cpu_count() or 1) - 1))
"""Pictures that are prepared at once; a core is left to the thread that drives the model."""


@dataclass(frozen=True, eq=False)
class Question:
    """Holds one prompt about one picture, or about none.

    Attributes:
        picture: RGB; rows of a batch that hold the same object share its encoding. None for a prompt alone.
        prompt: The text.
    """

    picture: Image.Image | None
    prompt: str


class Supply:
    """Prepares one batch of questions in the background; leaving the block ends its threads.

    Args:
        vlm: The model that will answer; another thread may use it meanwhile.
        threads: Pictures that are prepared at once.
        system: System message of all questions; None keeps the chat template's own.
    """

    def __init__(self, vlm: VLM, threads: int = THREADS, *, system: str | None = None) -> None:
        self._vlm, self._system = vlm, system
        self._beside: VLM | None = None
        self._coming: tuple[Sequence[Question], Future[Prepared]] | None = None
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="vlmfix-batch")
        self._pictures = ThreadPoolExecutor(threads, thread_name_prefix="vlmfix-prepared")

    def begin(self, questions: Sequence[Question]) -> None:
        """Starts to prepare a batch, in place of one that was not taken; without questions it does nothing."""
        if questions:
            self._drop()
            self._coming = questions, self._batches.submit(self._prepared, questions)

    def take(self, questions: Sequence[Question]) -> Prepared | None:
        """Waits for the prepared batch of these questions, and prepares it now if it was not begun.

        It returns None when preparing fails: the error occurs again where the questions are asked, and is theirs there.
        """
        if self._coming is not None and [*map(id, self._coming[0])] == [*map(id, questions)]:
            (_, future), self._coming = self._coming, None
        else:
            future = self._batches.submit(self._prepared, questions)
        return None if future.exception() else future.result()

    def _prepared(self, questions: Sequence[Question]) -> Prepared:
        if self._beside is None:
            self._beside = self._vlm.beside()
        shown = [[] if question.picture is None else [question.picture] for question in questions]
        prompts = [question.prompt for question in questions]
        return self._beside.prepared(prompts, shown, system=self._system, each=self._pictures.map)

    def _drop(self) -> None:
        if self._coming is not None:
            self._coming[1].cancel()
            self._coming = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        self._pictures.shutdown(wait=True, cancel_futures=True)  # first: cancelled pictures end the batch
        self._batches.shutdown(wait=True, cancel_futures=True)
