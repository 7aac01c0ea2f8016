"""Puts the questions about opened pictures into batches, for a run, for workers that share one and for actors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from vlmfix.answering import Answerer
from vlmfix.crew import Crew
from vlmfix.errors import DataError, PassingError
from vlmfix.images import Found, Picture
from vlmfix.supply import Question


@dataclass(frozen=True)
class Sample:
    """Names a question whose picture has been opened; without the picture, since it waits with its failure.

    Attributes:
        file: The picture's file, with the questions about it that are open.
        sha256: Digest of its bytes; empty where it could not be opened.
        prompt: The question.
    """

    file: Found
    sha256: str
    prompt: str

    @property
    def image(self) -> str:
        """Returns the name of the picture."""
        return self.file.name

    @property
    def is_last(self) -> bool:
        """Returns whether it is the last question about its picture."""
        return self.prompt == self.file.prompts[-1]


def batches(
    pictures: Iterable[tuple[Found, Picture | DataError | PassingError]],
    answerer: Answerer | Crew,
    fail: Callable[[Found, str], None],
) -> Iterator[list[tuple[Sample, Question | PassingError]]]:
    """Yields batches of as many rows as the answerer takes at that time.

    Args:
        pictures: Files with their open questions, each with its picture, or with the error that says why there is none.
        answerer: What answers them.
        fail: Called with a file that is no picture, and the reason.
    """
    samples = _samples(pictures, fail)
    while batch := list(itertools.islice(samples, answerer.rows)):
        yield [
            (sample, shown if isinstance(shown, PassingError) else Question(shown, sample.prompt))
            for sample, shown in batch
        ]


def _samples(
    pictures: Iterable[tuple[Found, Picture | DataError | PassingError]], fail: Callable[[Found, str], None]
) -> Iterator[tuple[Sample, Image.Image | PassingError]]:
    for file, picture in pictures:
        if isinstance(picture, DataError):
            fail(file, str(picture))
        elif isinstance(picture, PassingError):
            yield from ((Sample(file, "", prompt), picture) for prompt in file.prompts)
        else:
            shown, digest = picture.image, picture.sha256
            yield from ((Sample(file, digest, prompt), shown) for prompt in file.prompts)
