"""A batch of eight, whose pictures and prompts differ in number, size and length, for every decoder there is."""

from __future__ import annotations

import functools

import pytest

from tests.contracts.support import PAIR, picture, vlm_of
from tests.embedded import TINY
from tests.test_every_method import spec as told
from tools.support import spec as strong
from vlmfix.decoders.index import HOMES
from vlmfix.generation import load

SIZES = ((40, 60), (60, 40), (50, 50), (40, 40), (96, 96), (64, 32), (48, 48), (30, 90))
SHOWN = [[picture(10 + number, size)] for number, size in enumerate(SIZES)]
SHOWN[3].append(picture(30, (60, 50)))
SHOWN[6] = []
ASKED = (
    "what is here?",
    "and is there a dog in one of these two pictures?",
    "why?",
    "Is there a cat?",
    "Describe the image in detail, please, and name all things.",
    "what colour is it?",
    "hello there",
    "Is there a dog in the image?",
)
"""One row has two pictures, one none; the longest prompt has ten times the words of the shortest."""
TOKENS = 8


@functools.cache
def model(name):
    return load(name, device="cpu", dtype="float32") if name in TINY else vlm_of(name)


def cases():
    """Both random models meet every decoder with strong parameters, one embedded model each with its own."""
    for place, name in enumerate(HOMES):
        yield from (pytest.param(family, name) for family in PAIR)
        for number, embedded in enumerate(TINY):
            yield pytest.param(embedded, name, marks=() if place % 8 == 4 * number else pytest.mark.product)


@pytest.mark.parametrize(("name", "decoder"), list(cases()))
def test_each_of_eight_samples_gets_the_tokens_that_it_gets_alone(name, decoder):
    vlm = model(name)
    spec = told(decoder, name) if name in TINY else strong(decoder)

    def said(shown, asked):
        vlm.memo.clear()
        return [answer.ids for answer in vlm.generate(shown, asked, decoder=spec, max_new_tokens=TOKENS)]

    together = said(SHOWN, list(ASKED))
    assert together == [said([shown], [asked])[0] for shown, asked in zip(SHOWN, ASKED, strict=True)]
    assert len(set(together)) > 1
