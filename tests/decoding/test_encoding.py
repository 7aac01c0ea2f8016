"""Every distinct picture goes through the vision tower once."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import pytest
import torch

from tests.contracts.support import PICTURES, picture, vlm_of
from tests.tiny import TINY
from vlmfix.decoding.encoding import encoded, encoded_once, repeats_pictures

ONE, (TWO, THREE) = PICTURES[0][0], PICTURES[1]
ROWS = [[ONE], [TWO, THREE], [ONE], [], [ONE], [TWO, THREE], [TWO], []]
QUESTIONS = ["what?", "and here?", "a dog?", "hello", "is it red?", "two?", "one?", "yes"]


@contextmanager
def counted(vlm):
    """Image tokens that the vision tower made, one entry per run."""
    made, base = [], vlm.model.base_model
    original = base.get_image_features

    def count(pixel_values, *args, image_sizes=None, batch_num_images=None, image_grid_thw=None, **kwargs):
        given = {"image_sizes": image_sizes, "batch_num_images": batch_num_images, "image_grid_thw": image_grid_thw}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        features = original(pixel_values, *args, **kwargs)
        made.append(sum(len(part) for part in features.pooler_output))
        return features

    count.__signature__ = inspect.signature(original)
    base.get_image_features = count
    try:
        yield made
    finally:
        del base.get_image_features


def flat(parts):
    return parts.flatten(0, 1) if isinstance(parts, torch.Tensor) else torch.cat(list(parts))


@pytest.mark.parametrize("family", TINY)
@torch.no_grad()
def test_the_features_are_those_of_every_row_and_each_picture_is_encoded_once(family):
    vlm = vlm_of(family)
    batch = vlm.encode(QUESTIONS, ROWS)
    tokens = (batch["input_ids"] == vlm.family.image_token(vlm.model.config)).sum(dim=1)
    with counted(vlm) as made:
        whole, once = encoded(vlm.model, batch), encoded_once(vlm, batch)
    assert made == [int(tokens.sum()), int(tokens[[0, 1, 6]].sum())]
    torch.testing.assert_close(flat(once.pooler_output), flat(whole.pooler_output))
    levels = zip(getattr(once, "deepstack_features", None) or (), whole.get("deepstack_features") or (), strict=True)
    for mine, theirs in levels:
        torch.testing.assert_close(flat(mine), flat(theirs))


@torch.no_grad()
def test_equal_objects_with_other_pixels_are_encoded_apart():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what?", "who?"], [[ONE], [ONE]])
    pixels = batch["pixel_values"].clone()
    pixels[1, 0, 0, 0] += 0.5
    changed = batch.with_inputs(pixel_values=pixels)
    with counted(vlm) as made:
        features = encoded_once(vlm, changed)
    assert made == [50]
    assert not torch.equal(*features.pooler_output)


def test_what_repeats():
    vlm = vlm_of("llava")
    same, other = picture(1, (40, 60)), picture(1, (40, 60))
    assert repeats_pictures(vlm.encode(["a", "b"], [[same], [same]]))
    assert not repeats_pictures(vlm.encode(["a", "b"], [[same], [other]]))
    assert not repeats_pictures(vlm.encode(["a", "b"], [[], []]))
    assert not repeats_pictures(vlm.encode(["a", "b"], [[same], [same, other]]))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("decoder", ["greedy", "vcd", "inter"])
def test_generate_encodes_each_picture_once_in_every_branch(family, decoder):
    vlm = vlm_of(family)
    prompts, rows = ["what is it?", "red?", "who is there?"], [[ONE], [ONE], [TWO]]
    per_picture = [int((vlm.encode(["a"], [[p]])["input_ids"] == vlm.family.image_token(vlm.model.config)).sum())
                   for p in (ONE, TWO)]  # fmt: skip
    with counted(vlm) as made:
        together = vlm.generate(rows, prompts, decoder=decoder, max_new_tokens=3)
    branches = {"greedy": 1, "vcd": 2, "inter": 2}[decoder]  # two of INTER's share the noise
    assert made == [sum(per_picture)] * branches
    alone = [
        vlm.generate([row], [prompt], decoder=decoder, max_new_tokens=3)[0]
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
