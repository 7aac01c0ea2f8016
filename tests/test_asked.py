"""What users hand over: it works, or one sentence says at once what is wrong, at every door."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import vlmfix
from tests.contracts.support import picture, vlm_of
from vlmfix.answering import Answerer
from vlmfix.asked import pictures_of
from vlmfix.decoders import parse
from vlmfix.errors import DataError, UsageError
from vlmfix.generation import check_settings
from vlmfix.insight.grounding import grounding
from vlmfix.settings import Settings

ONE = picture(1, (40, 60))


def doors(vlm):
    """Every call that takes pictures and questions."""
    return {
        "generate": lambda pictures, prompts="what?": vlm.generate(pictures, prompts, max_new_tokens=1),
        "refine": lambda pictures, prompts="what?": vlm.refine(pictures, prompts, decoder="vicrop:base=4"),
        "encode": lambda pictures, prompts="what?": vlm.encode(prompts, pictures),
        "grounding": lambda pictures, prompts="what?": grounding(vlm, pictures, prompts, ["a"]),
        "profile": lambda pictures, prompts="what?": vlmfix.profile(vlm, pictures, ["image-mass"], question=prompts),
        "stream": lambda pictures, prompts="what?": vlm.stream(pictures, prompts, max_new_tokens=1),
    }


DOORS = tuple(doors(None))


class Never:
    """A processor that must not be reached."""

    def __getattr__(self, name):
        raise AssertionError(f"the processor was asked for {name}")


def unreached(family="llava"):
    vlm = vlm_of(family)
    return vlmfix.VLM(model=vlm.model, processor=Never(), family=vlm.family, name=family)


PICTURES = {
    "a path to nothing": (["a.png"], r"pictures\[0\], 'a.png': cannot be read: No such file"),
    "a pathlib path": ([Path("a.png")], "cannot be read: No such file"),
    "an array of fractions": ([np.zeros((64, 64, 3))], r"an array of float64 and shape \(64, 64, 3\)"),
    "a tensor": ([torch.zeros(3, 64, 64)], r"type Tensor and shape \(3, 64, 64\)"),
    "a batch of pictures as an array": (np.zeros((2, 64, 64, 3), np.uint8), r"(type ndarray|array of uint8) and shape"),
    "bytes": ([b"\x89PNG"], "type bytes"),
    "an open file": ([io.BytesIO(b"\x89PNG")], "type BytesIO"),
    "None": ([None], "None"),
    "a number": ([3], "type int"),
    "None for all": (None, "None"),
    "one path for all": ("a.png", "type str|cannot be read"),
    "one pathlib path for all": (Path("a.png"), f"type {type(Path()).__name__}|cannot be read"),
    "lists in lists in a list": ([[[ONE]]], r"pictures\[0\]\[0\] is of type list"),
    "a path in a list": ([[ONE, "a.png"]], r"pictures\[0\]\[1\], 'a.png': cannot be read"),
    "no pixels": ([Image.new("RGB", (0, 5))], "no pixels: 0 x 5"),
    "a line": ([Image.new("RGB", (1, 201))], "too thin: 1 x 201"),
    "no known range": ([Image.new("F", (8, 8))], "floating-point"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", PICTURES)
def test_what_is_no_picture_is_refused_in_one_sentence_before_anything_is_done(door, name):
    pictures, message = PICTURES[name]
    if door == "stream" and not isinstance(pictures, list):
        pictures = [pictures]
    call = doors(unreached())[door]
    with pytest.raises(DataError, match=message) as caught:
        call(pictures[0] if door == "stream" else pictures)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("door", [name for name in DOORS if name != "stream"])
def test_one_picture_is_no_list_of_them(door):
    with pytest.raises(DataError, match=r"pictures is one picture \(.*\[picture\]"):
        doors(unreached())[door](ONE)


QUESTIONS = {
    "a number": ([3], r"prompts\[0\] is of type int"),
    "None": (None, "prompts is None"),
    "bytes": ([b"what?"], r"prompts\[0\] is of type bytes"),
    "bytes for all": (b"what?", "prompts is of type bytes"),
    "a picture": ([ONE], r"prompts\[0\] is of type Image"),
    "half a character": (["\ud800"], r"prompts\[0\] has a character that is no text"),
    "a list": ([["what?"]], r"prompts\[0\] is of type list"),
    "too many": (["what?", "who?"], "1 pictures and 2 prompts"),
    "none": ([], "1 pictures and 0 prompts"),
}


@pytest.mark.parametrize("door", [name for name in DOORS if name != "profile"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_what_is_no_question_is_refused_in_one_sentence_before_anything_is_done(door, name):
    prompts, message = QUESTIONS[name]
    with pytest.raises(DataError, match=message):
        doors(unreached())[door](ONE if door == "stream" else [ONE], prompts)


@pytest.mark.parametrize("pictures", [[], (), iter(())], ids=["list", "tuple", "iterator"])
@pytest.mark.parametrize("door", ["generate", "refine", "encode", "grounding"])
def test_no_pictures_are_no_questions(door, pictures):
    with pytest.raises(DataError, match="0 pictures and"):
        doors(unreached())[door](pictures)


def test_a_user_turn_may_be_silent_in_encode_alone():
    vlm = vlm_of("llava")
    assert vlm.encode([None], [ONE]).prompts == (None,)
    with pytest.raises(DataError, match=r"prompts\[0\] is None"):
        vlm.generate([ONE], [None])


def test_tuples_generators_and_rows_without_pictures_work():
    vlm = vlm_of("llava")
    expected = [answer.ids for answer in vlm.generate([[ONE], [ONE, ONE]], "what?", max_new_tokens=2)]
    given = (tuple(row) if place else (one for one in row) for place, row in enumerate([[ONE], [ONE, ONE]]))
    assert [answer.ids for answer in vlm.generate(given, iter(["what?"] * 2), max_new_tokens=2)] == expected
    assert len(vlm.generate([[], ()], "what?", max_new_tokens=1)) == 2
    assert vlm.encode("what?", [ONE, [ONE, ONE]]).sizes == (((40, 60),), ((40, 60), (40, 60)))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("LA", (9, 0), (255, 255, 255)),
        ("La", 0, (255, 255, 255)),
        ("PA", (0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 32896, (128, 128, 128)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_a_picture_of_any_mode_is_seen_as_from_a_file(mode, value, expected):
    vlm = vlm_of("llava")
    given = Image.new(mode, (20, 20), value)
    same = Image.new("RGB", (20, 20), expected)
    batch, plain = (vlm.encode(["what?"], [one]) for one in (given, same))
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])
    options = {"decoder": "vcd", "temperature": 1.0, "max_new_tokens": 3}
    answers = [vlm.generate([one], "what?", **options)[0].ids for one in (given, same)]
    assert answers[0] == answers[1]


def test_a_picture_that_rows_share_stays_one_picture():
    shown = Image.new("RGBA", (20, 20), "red")
    (first,), (second,), (third,) = pictures_of([shown, shown, shown.copy()])
    assert first is second
    assert first is not third
    assert pictures_of([ONE])[0][0] is ONE


def test_the_frames_of_a_file_are_several_pictures(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.tiff") as file:
        rows = pictures_of(ImageSequence.Iterator(file))
    assert [row[0].getpixel((0, 0)) for row in rows] == [(255, 0, 0), (0, 0, 255)]


def test_a_file_that_is_broken_or_closed_is_a_sentence(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    for given in (closed, Image.open(io.BytesIO(whole[:5000]))):
        with pytest.raises(DataError, match=r"pictures\[1\] cannot be read: "):
            vlm_of("llava").generate([ONE, given], "what?")


NUMBERS = [
    ({"max_new_tokens": 0}, r"max_new_tokens=0 is not allowed \(max_new_tokens is a whole number in \[1, "),
    ({"max_new_tokens": -3}, "max_new_tokens=-3"),
    ({"max_new_tokens": 4.0}, r"max_new_tokens=4\.0"),
    ({"max_new_tokens": True}, "max_new_tokens=True"),
    ({"max_new_tokens": "4"}, "max_new_tokens='4'"),
    ({"max_new_tokens": None}, "max_new_tokens=None"),
    ({"max_new_tokens": 2**31}, "max_new_tokens=2147483648"),
    ({"max_new_tokens": 10**5000}, "max_new_tokens of so many digits"),
    ({"num_beams": 1.5}, r"num_beams=1\.5"),
    ({"num_beams": True}, "num_beams=True"),
    ({"num_beams": -(10**5000)}, "num_beams of so many digits"),
    ({"seed": 0.5}, r"seed=0\.5"),
    ({"seed": 2**63}, f"seed={2**63}"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"temperature": None}, "temperature=None"),
    ({"temperature": True}, "temperature=True"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"temperature": 10**400}, "temperature=inf"),
    ({"temperature": 1.0, "top_p": float("nan")}, "top_p=nan"),
    ({"decoder": None}, "decoder is of type NoneType"),
    ({"decoder": vlmfix.DECODERS["vcd"]}, "decoder is of type ABCMeta"),
]


@pytest.mark.parametrize(
    ("door", "options", "message"),
    [
        (door, *case)
        for door in ("generate", "stream")
        for case in NUMBERS
        if door == "generate" or "num_beams" not in case[0]
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "-".join(value),
)
def test_numbers_have_bounds(door, options, message):
    vlm = unreached()
    with pytest.raises(UsageError, match=message):
        vlm.generate([ONE], "what?", **options) if door == "generate" else vlm.stream(ONE, "what?", **options)


def test_numbers_of_numpy_are_numbers():
    vlm = vlm_of("llava")
    options = {"max_new_tokens": np.int64(2), "seed": np.uint8(3), "temperature": np.float32(0.5)}
    (given,) = vlm.generate([ONE], "what?", **options)
    (plain,) = vlm.generate([ONE], "what?", max_new_tokens=2, seed=3, temperature=0.5)
    assert given.ids == plain.ids


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"seed": -1}, {"max_pixels": 0}, {"num_beams": True}]
)
def test_settings_are_checked_before_a_model_is_loaded(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        check_settings(parse("greedy"), Settings(**options))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "4"])
def test_batches_have_a_whole_number_of_rows(size):
    vlm = unreached()
    with pytest.raises(UsageError, match="batch_size="):
        Answerer(vlm, parse("greedy"), Settings(), batch_size=size)
    with pytest.raises(UsageError, match="batch_size="):
        vlmfix.profile(vlm, [ONE], ["image-mass"], batch_size=size)


def test_profilers_are_shown_one_picture_at_a_time():
    vlm = unreached()
    with pytest.raises(DataError, match=r"pictures\[0\] is a list"):
        vlmfix.profile(vlm, [[ONE, ONE]], ["image-mass"])
    with pytest.raises(UsageError, match="profilers is the text 'vhd'"):
        vlmfix.profile(vlm, [ONE], "vhd")
    with pytest.raises(UsageError, match="question=3"):
        vlmfix.profile(vlm, [ONE], ["image-mass"], question=3)


@pytest.mark.parametrize(
    ("answers", "message"),
    [("a", "1 pictures and one text as answers"), ([[1.5]], "answer 0 is neither"), ([3], "answer 0 is neither")],
)
def test_answers_to_be_judged_are_a_list(answers, message):
    with pytest.raises(DataError, match=message):
        grounding(unreached(), [ONE], "what?", answers)
