"""Pictures that several rows share go through the image processor once, and nobody can tell from the inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import TINY, tiny_vlm
from vlmfix.errors import DataError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.repeats import first_rows, repeats_pictures


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())


A, B, C, D = noise(1, (48, 64)), noise(2, (90, 26)), noise(3, (40, 120)), noise(4, (48, 64))

Rows = Sequence[Sequence[Image.Image]]
Prompts = Sequence[str | None]

CASES: dict[str, tuple[Rows, Prompts]] = {
    "one picture each": ([[A], [A], [B], [A], [B]], ["Is there a cup?", "A dog?", "", "Well, what is it then?", "?"]),
    "several pictures": (
        [[A, B], [C], [A, B], [B, A], [C], [A]],
        ["Both?", "One?", "Which of the two is red?", "Both?", "Is it?", "And now?"],
    ),
    "rows without a picture": (
        [[], [A], [], [B, C], [A], [], [B, C], [A]],
        ["Hi", "What?", "A longer text without a picture", "Both?", "Red?", "", "Which?", "Who is there?"],
    ),
    "no text at all": ([[A], [A], [B], [A], [B]], [None, "", "What?", None, None]),
    "one picture twice": (
        [[A, A], [A], [A, A], [A], [A, A]],
        ["Same?", "One?", "Twins?", "", "Is there a difference?"],
    ),
    "one picture alone": ([[A]] * 4, ["What?", "Who is in the picture?", "", "Where?"]),
    "equal beginnings": ([[A]] * 4, ["\n", "\n\nWhat?", " What?", "<bos>\n"]),
    "same size": ([[A], [D], [A], [D]], ["What?", "Who?", "Where?", "When?"]),
    "other alphabets": ([[B], [B], [B]], ["Что это?", "これは何", "🐕?"]),
}


@pytest.fixture(params=TINY)
def vlm(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_vlm(request.param)


@contextmanager
def shown(vlm: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Image.Image]]:
    """Pictures that the image processor is given, in order."""
    seen: list[Image.Image] = []
    kind = type(vlm.processor.image_processor)
    original = kind.__call__

    def call(self: Any, images: Sequence[Sequence[Image.Image]], *args: Any, **kwargs: Any) -> Any:
        seen.extend(picture for row in images for picture in row)
        return original(self, images, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", call)
        yield seen


def whole(vlm: Checkpoint, prompts: Prompts, rows: Rows, system: str | None = None) -> dict[str, Tensor]:
    """The inputs when every row is processed by itself."""
    texts = [vlm.render(prompt, len(row), system=system) for prompt, row in zip(prompts, rows, strict=True)]
    return dict(vlm.family.process(vlm.processor, texts, rows))


def assert_same(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(given) == list(expected)
    for name, value in expected.items():
        assert given[name].dtype == value.dtype
        assert torch.equal(given[name], value), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("system", [None, "Answer with one word."])
def test_inputs_are_those_of_every_row_and_each_picture_is_seen_once(
    vlm: Checkpoint, case: str, system: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, prompts = CASES[case]
    with shown(vlm, monkeypatch) as seen:
        batch = vlm.encode(prompts, rows, system=system)
    assert_same(batch, whole(vlm, prompts, rows, system))
    once = [row for number, row in enumerate(rows) if number in first_rows(rows)]
    assert [id(picture) for picture in seen] == [id(picture) for row in once for picture in row]
    assert len(seen) < sum(len(row) for row in rows)


def test_different_pictures_are_processed_as_ever(vlm: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, prompts = [[A], [A.copy()], [], [B, C], []], ["What?", "What?", "Hi", "Both?", ""]
    with shown(vlm, monkeypatch) as seen:
        batch = vlm.encode(prompts, rows)
    assert len(seen) == 4
    assert_same(batch, whole(vlm, prompts, rows))


@pytest.mark.parametrize("text", ["<image>", "<|image_pad|>", "<start_of_image>", "<IMG_CONTEXT>", "<bos>"])
def test_a_question_that_spells_a_placeholder_is_taken_or_refused_as_ever(vlm: Checkpoint, text: str) -> None:
    def outcome(inputs: Callable[..., Mapping[str, Tensor]]) -> Mapping[str, Tensor] | str:
        try:
            return inputs(["What?", f"Is {text} here?", f"{text}{text}", "Who?"], [[A], [A], [A], [B]])
        except (DataError, ValueError, StopIteration) as error:
            return repr(error)

    given, expected = outcome(vlm.encode), outcome(functools.partial(whole, vlm))
    if isinstance(expected, str):
        assert given == expected
    else:
        assert_same(given, expected)


@pytest.mark.parametrize("count", [1, 16])
def test_image_tokens_that_a_question_spells_are_refused(count: int) -> None:
    """Gemma's placeholder is another token than its image token, and a question may hold a whole square of them."""
    with pytest.raises(DataError, match="<image_soft_token> in a question stands for a picture"):
        tiny_vlm("gemma3").encode(["What?", "<image_soft_token>" * count], [[A], [B]])


def test_crops_are_handed_out_with_their_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_vlm("gemma3")
    scan = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4}
    kind = type(vlm.processor.image_processor)
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args, **kwargs: original(self, *args, **{**kwargs, **scan}))
    rows, prompts = CASES["rows without a picture"]
    batch = vlm.encode(prompts, rows)
    assert len(batch["pixel_values"]) > sum(len(row) for row in rows)
    assert_same(batch, whole(vlm, prompts, rows))


def test_the_processor_is_left_as_it_was_found(vlm: Checkpoint) -> None:
    before = dict(vars(vlm.processor))
    vlm.encode(["What?", "Who?"], [[A], [A]])
    after = vars(vlm.processor)
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())


def test_what_repeats() -> None:
    assert first_rows([[A], [], [B, C], [A], [C, B], [], [B, C]]) == [0, 1, 2, 0, 4, 1, 2]
    assert repeats_pictures([[A], [A]])
    assert not repeats_pictures([[A], [A.copy()]])
    assert not repeats_pictures([[], [A], []])
    assert not repeats_pictures([[A, B], [A], [B, A]])
