"""Directions: what is measured, against sums worked out here; what captions are planted with; and files of them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import DynamicCache

from tests.contracts.support import close, picture, vlm_of
from tests.heads.made import made_directions
from vlmfix.errors import DataError, ProfileMismatchError, UsageError
from vlmfix.evals.benchmarks.coco import AnnotatedPicture, Annotations, read_annotations, read_outlines
from vlmfix.evals.planting import Planting, emptied, planted
from vlmfix.heads.directions import measure
from vlmfix.heads.directions.component import first_component
from vlmfix.heads.directions.kept import load_directions, save_directions
from vlmfix.heads.directions.measure import directions
from vlmfix.heads.directions.nullu import Subspace
from vlmfix.heads.directions.shown import Shown
from vlmfix.heads.directions.vti import Shifts, hidden, tower_streams
from vlmfix.heads.profile import fingerprint
from vlmfix.settings import EMBEDDED
from vlmfix.upstream.cache import handed_over, keys_and_values
from vlmfix.world import coco
from vlmfix.world.masks import visible
from vlmfix.world.scenes import scene

QUESTION = "what is here?"


def shown(seed):
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5 * seed : 5 * seed + 12, 10:40] = True
    return Shown(
        picture=picture(seed, (40, 60)),
        objects=("dog", "cat"),
        caption=f"a dog and {seed} cats.",
        planted=f"a dog and {seed} trains.",
        emptied=f"a and {seed}.",
        mask=mask,
    )


SHOWN = [shown(seed) for seed in (1, 2, 3)]


def stream(vlm, one, said):
    """(L, T, D) of the prompt and what is said behind it, in float32."""
    batch = vlm.encode([QUESTION], [[one.picture]])
    ids = torch.tensor([vlm.processor.tokenizer(said, add_special_tokens=False)["input_ids"]])
    given = dict(batch) | {"input_ids": torch.cat([batch["input_ids"], ids], dim=1)}
    for name in set(given) & {"attention_mask", "mm_token_type_ids"}:
        fill = torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)
        given[name] = torch.cat([batch[name], fill], dim=1)
    found = []
    hooks = [
        layer.register_forward_hook(lambda module, args, x: found.append(x if isinstance(x, torch.Tensor) else x[0]))
        for layer in vlm.family.layers(vlm.model)
    ]
    with torch.no_grad():
        vlm.model(**given)
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_text_and_vision_shift_by_the_mean_difference(family):
    vlm = vlm_of(family)
    found = directions(vlm, SHOWN, [Shifts(trials=2, masked=0.5)], question=QUESTION, seed=5)["vti"]
    rows = torch.stack([stream(vlm, one, one.caption)[:, -1] - stream(vlm, one, one.planted)[:, -1] for one in SHOWN])
    close(found.tensors["text_mean"], rows.mean(dim=0))
    exact = rows.flatten(1).double() - rows.flatten(1).double().mean(dim=0)
    component = torch.linalg.svd(exact, full_matrices=False)[2][0].view(rows.shape[1:]).float()
    assert min((found.tensors["text_component"] - sign * component).abs().max() for sign in (1, -1)) < 1e-3

    differences = []
    for number, one in enumerate(SHOWN):
        batch, dice = vlm.encode([QUESTION], [[one.picture]]), torch.Generator().manual_seed(5 * 1_000_003 + number)
        masked = [batch.with_inputs(pixel_values=hidden(vlm, batch["pixel_values"], 0.5, dice)) for _ in "ab"]
        differences.append(sum(tower_streams(vlm, each) for each in masked) / 2 - tower_streams(vlm, batch))
    close(found.tensors["vision_mean"], torch.stack(differences).mean(dim=0), 5e-3)
    assert found.tensors["vision_mean"].shape[1] == (1 if family == "qwen2_5_vl" else differences[0].shape[1])
    assert found.tensors["vision_component"].shape == found.tensors["vision_mean"].shape
    assert (found.card.pictures, found.card.parameters["trials"], found.card.question) == (3, 2, QUESTION)
    found.check(vlm)


def test_a_mask_hides_its_share_of_the_patches_behind_the_mean():
    vlm = vlm_of("llava")
    size = vlm.model.config.vision_config.patch_size
    pixels = vlm.encode([QUESTION], [[SHOWN[0].picture]])["pixel_values"]
    hid = hidden(vlm, pixels, 0.75, torch.Generator().manual_seed(1))
    changed = (hid != pixels).any(dim=1)[0].unfold(0, size, size).unfold(1, size, size).flatten(2).any(-1)
    assert int(changed.sum()) == int(0.75 * changed.numel())
    mean = pixels.mean(dim=(-2, -1))[0]
    row, column = (int(place) * size for place in changed.nonzero()[0])
    close(hid[0, :, row, column], mean)
    flat = torch.rand(8, 5)
    rows = (hidden(vlm, flat, 0.5, torch.Generator().manual_seed(1)) != flat).any(dim=1)
    assert int(rows.sum()) == 4


def test_a_component_has_the_sign_of_the_row_that_it_says_most_of():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.2], [6.0, 0.1], [1.0, 0.0]])
    found = first_component(rows)
    assert found[0] > 0.9
    close(found.norm(), torch.tensor(1.0))
    assert first_component(-rows)[0] < -0.9
    assert not first_component(torch.ones(3, 4)).any()
    assert not first_component(torch.ones(1, 4)).any()


def test_a_file_gives_back_what_was_saved_and_others_are_refused(tmp_path):
    vlm, path = vlm_of("llava"), tmp_path / "directions.safetensors"
    before = made_directions(vlm)
    save_directions(before, path)
    after = load_directions(path)
    assert list(after) == list(before)
    for name, part in after.items():
        assert part.card == before[name].card
        assert part.tensors.keys() == before[name].tensors.keys()
        assert all(torch.equal(tensor, before[name].tensors[key]) for key, tensor in part.tensors.items())
        part.check(vlm)
        with pytest.raises(ProfileMismatchError, match="other weights"):
            part.check(vlm_of("llava", seed=1))
    with pytest.raises(DataError, match=r"should have a tensor nose of \(3,\), and have none"):
        after["vti"].tensor("nose", 3)
    with pytest.raises(DataError, match=r"tensor text_mean of \(2, None\), and have one of \(3, "):
        after["vti"].tensor("text_mean", 2, None)
    (tmp_path / "other").write_text("precious")
    with pytest.raises(DataError, match="is there and holds no directions"):
        save_directions(before, tmp_path / "other")
    with pytest.raises(DataError, match="is no file of directions"):
        load_directions(EMBEDDED["tiny"] / "heads.safetensors")
    with pytest.raises(UsageError, match="cannot share a file"):
        save_directions({**before, "two": replace(before["vti"], fingerprint=torch.zeros(3))}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda about, tensors: tensors.update({"vti/text_mean": torch.full((3, 64), torch.nan)}), "finite numbers"),
        (lambda about, tensors: tensors.update({"vti/text_mean": torch.ones(3, dtype=torch.int64)}), "finite numbers"),
        (lambda about, tensors: tensors.update({"ear/x": torch.zeros(3)}), "tensors of ear, and no card"),
        (lambda about, tensors: about["profiles"]["vti"].update(profiler="ear"), "is none of directions for vti"),
        (lambda about, tensors: about["profiles"]["vti"].pop("seed"), "seed"),
        (lambda about, tensors: tensors.update(fingerprint=torch.ones(3, 3)), "no list of float32"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, spoil, said):
    vlm, path = vlm_of("llava"), tmp_path / "directions.safetensors"
    held = made_directions(vlm)["vti"]
    tensors = {f"vti/{key}": value for key, value in held.tensors.items()} | {"fingerprint": fingerprint(vlm)}
    about = {"format": "directions", "version": 1, "profiles": {"vti": dict(vars(held.card))}}
    spoil(about, tensors)
    save_file(tensors, path, metadata={"vlmfix": json.dumps(about)})
    with pytest.raises(DataError, match=rf"is damaged: .*{said}"):
        load_directions(path)


def mention(text, word, singular=None):
    start = text.index(word)
    return SimpleNamespace(start=start, end=start + len(word), word=singular or word)


def test_a_planted_object_takes_the_place_of_another_in_its_number_and_with_its_article():
    for text, word, singular, name, expected in (
        ("A dog sits.", "dog", None, "apple", "An apple sits."),
        ("An apple and a cup", "apple", None, "cup", "A cup and a cup"),
        ("Two mice by three cups", "cups", "cup", "fork", "Two mice by three forks"),
        ("Two cups", "cups", "cup", "scissors", "Two scissors"),
        ("The bus stops", "bus", "bus", "train", "The train stops"),
    ):
        assert planted(text, mention(text, word, singular), name) == expected
    text = "Two dogs, a cup and a cat."
    assert emptied(text, [mention(text, "dogs"), mention(text, "cup"), mention(text, "cat")]) == "Two, a and a."


def about(number, objects, *captions):
    return AnnotatedPicture(number, f"{number}.png", objects, captions)


def test_what_is_planted_is_often_with_the_pictures_objects_and_is_not_in_it():
    pictures = {
        0: about(0, ("dog", "cat"), "Nothing here.", "A dog and a cat."),
        1: about(1, ("dog", "bench"), "A dog."),
    }
    pictures |= {2: about(2, ("train",), "A train.")}
    planting, blank = Planting(Annotations(pictures, {})), Image.new("RGB", (6, 4))
    found = planting.shown(pictures[0], blank)
    assert (found.caption, found.planted, found.emptied) == ("A dog and a cat.", "A dog and a bench.", "A and a.")
    assert (found.objects, found.mask) == (("dog", "cat"), None)
    assert planting.shown(pictures[2], blank) is None  # nothing is ever with a train


def test_masks_are_polygons_and_runs(tmp_path):
    one = about(1, ("dog", "bench"), "A dog.")
    annotations = Annotations({1: one, 2: about(2, ("dog", "cat"), "A cat.")}, {})
    blank = Image.new("RGB", (6, 4))

    def mask(*outlines):
        return Planting(annotations, {1: outlines}).shown(one, blank).mask

    assert mask([[0, 0, 2, 0, 2, 1, 0, 1]]).nonzero().tolist() == [[y, x] for y in range(2) for x in range(3)]
    runs = mask({"counts": [4, 3, 17], "size": [4, 6]})  # column after column
    assert runs.nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]
    assert int(mask([[0, 0, 2, 0, 2, 1, 0, 1]], {"counts": [23, 1], "size": [4, 6]}).sum()) == 7
    assert not mask().any()
    for wrong in ([[1, 2]], [["a"] * 6], [3], {"counts": "xyz", "size": [4, 6]}, {"counts": [2, 2], "size": [4, 6]}):
        with pytest.raises(DataError, match=r"an outline of an object in 1\.png"):
            mask(wrong)
    document = {"annotations": [{"image_id": 1, "segmentation": [[0, 0, 1, 0, 1, 1]]}, {"image_id": 3}]}
    (tmp_path / "instances.json").write_text(json.dumps(document))
    assert read_outlines(tmp_path / "instances.json", {1, 2}) == {1: [[[0, 0, 1, 0, 1, 1]]]}
    with pytest.raises(DataError, match="an annotation of image 3 has no segmentation"):
        read_outlines(tmp_path / "instances.json", {3})


def test_masks_of_the_drawn_world_are_its_objects_visible_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    coco.make(tmp_path / "w", count=5, seed=43)
    files = [tmp_path / "w" / "annotations" / f"{kind}.json" for kind in ("instances", "captions")]
    annotations = read_annotations(*files)
    planting = Planting(annotations, read_outlines(files[0], annotations.pictures))
    for number, about in annotations.pictures.items():
        held = planting.shown(about, Image.open(tmp_path / "w" / "images" / about.file).convert("RGB"))
        assert torch.equal(held.mask, torch.from_numpy(np.any(visible(scene(43, number)), axis=0)))


def test_a_drawn_world_is_measured_from_the_command_line(tmp_path, vlmfix, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(measure.MEASURED, "vti", lambda: Shifts(trials=1))
    coco.make(tmp_path / "w", count=4, seed=41)
    annotations = tmp_path / "w" / "annotations"
    out, truth = tmp_path / "directions.safetensors", ("--instances", annotations / "instances.json")
    truth += ("--captions", annotations / "captions.json")
    asked = ("profile", "--images", tmp_path / "w" / "images", "--out", out)
    code, printed, _ = vlmfix(*asked, "--directions", "vti", "--count", 2, *truth)
    assert (code, "vti: tiny, 2 pictures" in printed) == (0, True)
    held = load_directions(out)["vti"]
    assert held.card.parameters["labels"]["instances"]["file"] == ["instances.json"]
    code, printed, _ = vlmfix("profile", "show", out, "--json")
    assert (code, json.loads(printed)["vti"]["tensors"]["text_mean"]) == (0, [8, 256])
    assert "text_mean: 8 x 256" in vlmfix("profile", "show", out)[1]
    assert vlmfix("profile", "show", out, "--profiler", "ear")[0] == 1
    assert vlmfix(*asked, "--directions", "vti", "--model", "tiny-qwen", "--add", *truth)[0] == 1  # of another model
    for wrong, said in (
        (("--directions", "vti"), "give --instances and --captions"),
        (("--directions", "ear", *truth), "no directions are measured for 'ear'"),
        (("--directions", "vti", "--profiler", "vhd", *truth), "--directions measures no heads"),
    ):
        code, _, told = vlmfix(*asked, *wrong)
        assert (code, said in told) == (2, True)


def test_nullu_keeps_the_largest_singular_vectors_of_the_captions_differences():
    vlm = vlm_of("qwen2_5_vl")
    found = directions(vlm, SHOWN, [Subspace(rank=2)], question=QUESTION)["nullu"].tensors
    rows = [(stream(vlm, one, one.caption).mean(1) - stream(vlm, one, one.planted).mean(1)) / 2 for one in SHOWN]
    for layer in range(vlm.layers):
        matrix = torch.stack([row[layer] for row in rows]).double()
        close(found["vectors"][layer] @ found["vectors"][layer].T, torch.eye(2))
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
        close(found["values"][layer].square(), values.flip(0)[:2].float(), 1e-3)
        assert (vectors.flip(1)[:, :2].float() * found["vectors"][layer].T).sum(dim=0).abs().min() > 0.999
    with pytest.raises(DataError, match="3 pictures have no 8 directions"):
        directions(vlm, SHOWN, ["nullu"])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pti_measures_keys_and_values_of_objects_against_background_and_of_their_list(family):
    vlm = vlm_of(family)
    found = directions(vlm, SHOWN, ["pti"], question=QUESTION)["pti"].tensors
    rows = {"image": [], "text": []}
    for one in SHOWN:
        pixels, mask = np.asarray(one.picture), one.mask.numpy()[:, :, None]
        for place, prompts in (("image", [QUESTION] * 2), ("text", ["dog, cat.", one.emptied])):
            pictures = [pixels * mask, pixels * ~mask] if place == "image" else [pixels, pixels]
            kept = []
            for prompt, shown_ in zip(prompts, pictures, strict=True):
                batch = vlm.encode([prompt], [[Image.fromarray(shown_)]])
                image = batch["input_ids"][0] == vlm.family.image_token(vlm.model.config)
                cache = DynamicCache()
                with torch.no_grad():
                    vlm.model(**batch, **handed_over(vlm.model, cache), use_cache=True)
                pairs = torch.stack([torch.stack(pair)[:, 0] for pair in keys_and_values(cache)])  # (L, 2, G, T, D)
                kept.append(pairs[..., image, :].mean(dim=3) if place == "image" else pairs[..., -1, :])
            rows[place].append(kept[0] - kept[1])
    for place, own in rows.items():
        for number, kind in enumerate(("keys", "values")):
            differences = torch.stack(own)[:, :, number]  # (N, L, G, D)
            close(found[f"{place}_{kind}_mean"], differences.mean(dim=0), 1e-3)
            component = found[f"{place}_{kind}_component"][1]
            close(component.norm(), torch.tensor(1.0))
            exact = differences[:, 1].flatten(1) - differences[:, 1].flatten(1).mean(dim=0)
            largest = torch.linalg.svdvals(exact)[0]
            close((exact @ component.flatten()).norm(), largest, 1e-3)
    moved = [replace(one, mask=one.mask.roll(1, 0)) for one in SHOWN]
    cards = [directions(vlm, each, ["pti"], question=QUESTION)["pti"].card for each in (SHOWN, moved)]
    assert cards[0].data != cards[1].data
    with pytest.raises(DataError, match="pictures without masks"):
        directions(vlm, [replace(SHOWN[0], mask=None)], ["pti"])
    with pytest.raises(DataError, match="1 pictures have objects and a background"):
        directions(vlm, [SHOWN[0], replace(SHOWN[1], mask=torch.zeros(40, 60, dtype=torch.bool))], ["pti"])
