"""Pictures that become larger on their way to the model, and the limit that Qwen-VL has on their pixels."""

from __future__ import annotations

import pytest
from PIL import Image

import vlmfix
from tests.contracts.support import vlm_of
from tests.tiny import TINY, tiny_vlm
from vlmfix.answering import Answerer
from vlmfix.decoders import parse
from vlmfix.errors import DataError, UsageError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.settings import Settings
from vlmfix.supply import Question

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def made(monkeypatch, name, picture, together=1):
    """The most pixels of a tensor that the image processor resizes or pads to, in fact, for one picture."""
    vlm = tiny_vlm(name)
    settings, seen = type(vlm.processor.image_processor), []
    for method in ("resize", "pad_to_square", "pad"):
        if hasattr(settings, method):
            original = getattr(settings, method)

            def watched(self, *args, original=original, **kwargs):
                result = original(self, *args, **kwargs)
                parts = result if isinstance(result, list) else [result]
                seen.extend(part.shape[-1] * part.shape[-2] for part in parts if hasattr(part, "shape"))
                return result

            monkeypatch.setattr(settings, method, watched)
    vlm.encode(["what?"], [[picture] * together])
    return max(seen)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("size", [(3, 600), (600, 3), (300, 300)], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_what_a_processor_makes_of_a_picture_is_known_before(monkeypatch, name, size, together):
    vlm = tiny_vlm(name)
    picture = Image.new("RGB", size, "blue")
    said, found = vlm.enlarged(picture, together), made(monkeypatch, name, picture, together)
    if said:
        least = 28 * 28 * 8 if name in QWEN else 0  # a Qwen grid is rounded to whole patches
        assert found <= said + least
    else:  # bounded whatever the picture
        settings = tiny_vlm(name).processor.image_processor
        assert found <= 64 * max(dict(settings.size).values()) ** 2


@pytest.mark.parametrize(("name", "together"), [("llava", 1), ("llava_onevision", 2)])
def test_what_the_processor_makes_counts_against_the_limit(monkeypatch, name, together):
    vlm = vlm_of(name)
    picture = Image.new("RGB", (4, 800), "blue")
    pixels = vlm.enlarged(picture, together)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    assert len(vlm.generate([[picture] * together], "what?", max_new_tokens=1)) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1)
    with pytest.raises(DataError, match=f"too large: the processor makes {pixels} pixels of 4 x 800, at most"):
        vlm.generate([[picture] * together], "what?", max_new_tokens=1)


def test_small_pictures_that_grow_have_the_limit_of_one_together(monkeypatch):
    vlm = vlm_of("llava")
    thin = [Image.new("RGB", (4, 800), "blue") for _ in range(3)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * vlm.enlarged(thin[0]))
    assert len(vlm.generate([thin[0]] * 3 + [thin[1]], "what?", max_new_tokens=1)) == 4
    with pytest.raises(DataError, match=r"of 3 small pictures together, .* \(show fewer at once\)"):
        vlm.generate(thin, "what?", max_new_tokens=1)


def test_the_pictures_of_a_batch_have_the_limit_of_one_together(monkeypatch):
    vlm = vlm_of("llava")
    thin = [Image.new("RGB", (4, 800), "blue") for _ in range(5)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * vlm.enlarged(thin[0]))
    rows = []

    class Counted(type(vlm)):
        def prepared(self, prompts, pictures, **more):
            rows.append(len(pictures))
            return super().prepared(prompts, pictures, **more)

    counted = Counted(model=vlm.model, processor=vlm.processor, family=vlm.family)
    answerer = Answerer(counted, parse("greedy"), Settings(max_new_tokens=1), batch_size=8)
    shared = [Question(thin[0], f"what {number}?") for number in range(4)]
    batch = [(number, question) for number, question in enumerate([Question(one, "what?") for one in thin] + shared)]
    settled = [outcome for part in answerer([batch], lambda: None) for _, outcome in part]
    assert [outcome.tokens for outcome in settled] == [1] * 9
    assert rows == [2, 2, 5], "a picture that rows share is made once"


@pytest.mark.parametrize("name", QWEN)
def test_a_limit_on_pixels_makes_fewer_tokens(name):
    tiny = tiny_vlm(name)
    picture = Image.new("RGB", (200, 300), "blue")
    before = dict(tiny.processor.image_processor.size)
    counts = {}
    for pixels in (4096, None, 512):
        vlm = vlmfix.wrap(tiny.model, tiny.processor, max_pixels=pixels)
        batch = vlm.encode(["what?"], [picture])
        counts[pixels] = int(vlm.layout(batch).tokens.sum())
        patch = tiny.model.config.vision_config.patch_size
        used = int(batch["image_grid_thw"].prod()) * patch**2
        assert pixels is None or used <= pixels
        assert vlm.generate([picture], "what?", max_new_tokens=1)[0].tokens == 1
    assert counts[512] < counts[None] < counts[4096]
    assert dict(tiny.processor.image_processor.size) == before, "the user's own processor is left as it was"


@pytest.mark.parametrize("name", QWEN)
def test_a_lower_limit_on_pixels_enlarges_small_pictures(name):
    tiny = tiny_vlm(name)
    picture = Image.new("RGB", (30, 20), "blue")
    least = 4 * tiny.processor.image_processor.size["shortest_edge"]
    vlm = vlmfix.wrap(tiny.model, tiny.processor, min_pixels=least, max_pixels=2 * least)
    patch = tiny.model.config.vision_config.patch_size
    used, own = (int(one.encode(["?"], [picture])["image_grid_thw"].prod()) * patch**2 for one in (vlm, tiny))
    assert own < least <= used
    assert vlm.enlarged(picture) == least
    assert tiny.processor.image_processor.size["shortest_edge"] == least // 4
    most = tiny.processor.image_processor.size["longest_edge"]
    with pytest.raises(UsageError, match=f"min_pixels={most + 1} is above the {most} pixels"):
        vlmfix.wrap(tiny.model, tiny.processor, min_pixels=most + 1)


@pytest.mark.parametrize("name", [name for name in TINY if name not in QWEN])
def test_a_limit_on_pixels_is_refused_where_there_is_none(name):
    tiny = tiny_vlm(name)
    with pytest.raises(UsageError, match=r"max_pixels=50000: processors of .* have no limit on the pixels"):
        vlmfix.wrap(tiny.model, tiny.processor, max_pixels=50000)
    with pytest.raises(UsageError, match=r"min_pixels=50000: processors of .* have no limit on the pixels"):
        vlmfix.wrap(tiny.model, tiny.processor, min_pixels=50000)


@pytest.mark.parametrize("pixels", [0, -1, 1.5, True, "50000"])
def test_a_limit_on_pixels_is_a_whole_number(pixels):
    tiny = tiny_vlm("qwen2_vl")
    with pytest.raises(UsageError, match="max_pixels="):
        vlmfix.wrap(tiny.model, tiny.processor, max_pixels=pixels)


def test_a_limit_below_the_least_is_refused():
    tiny = tiny_vlm("qwen2_vl")
    least = tiny.processor.image_processor.size["shortest_edge"]
    with pytest.raises(UsageError, match=f"max_pixels={least - 1} is below the {least} pixels"):
        vlmfix.wrap(tiny.model, tiny.processor, max_pixels=least - 1)
    assert isinstance(vlmfix.wrap(tiny.model, tiny.processor, max_pixels=least), Checkpoint)
