"""Head profiles from the command line, on a small drawn world with both embedded models."""

from __future__ import annotations

import json
import re
from itertools import chain

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.embedded import TINY
from tests.view.made import parsed
from vlmfix.heads.plot import draw
from vlmfix.heads.profile import load_profiles
from vlmfix.world import coco

NAMES = "image-mass,vhd"


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    coco.make(folder, count=4, seed=41)
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    return folder / "images"


@pytest.mark.parametrize("model", TINY)
def test_profile_show_and_diff(images, tmp_path, vlmfix, model):
    out, plot = tmp_path / "heads.safetensors", tmp_path / "heads.png"
    asked = ("profile", "--model", model, "--profiler", NAMES, "--images", images, "--out", out)
    code, printed, said = vlmfix(*asked, "--plot", plot)
    assert code == 0
    assert "image-mass: " in printed
    assert "broken.png is left out" in said
    assert plot.stat().st_size > 10_000
    found = load_profiles(out)
    assert list(found) == NAMES.split(",")
    assert all(part.card.pictures == 4 for part in found.values())

    code, printed, _ = vlmfix("profile", "show", out, "--profiler", "vhd", "--count", 3, "--json")
    assert code == 0
    shown = json.loads(printed)["vhd"]
    assert [(head["layer"], head["head"]) for head in shown["heads"]] == list(found["vhd"].top(3))
    assert shown["card"]["model"] == model
    for _ in range(2):
        code, _, told = vlmfix("profile", "show", out, "--count", 2, "--page", tmp_path / "heads.html")
        assert (code, f"maps of all heads: {tmp_path}/heads.html" in told) == (0, True)
    page = parsed((tmp_path / "heads.html").read_text())
    layer, head = found["vhd"].top(1)[0]
    assert f"layer {layer}, head {head}" in page.text
    assert [image.attributes["src"][:18] for image in page.all("img")] == ["data:image/svg+xml"]
    assert vlmfix("profile", "show", out, "--page", out)[0] == 1
    code, printed, _ = vlmfix("profile", "show", out, "--count", 2)
    assert code == 0
    assert printed.count("rank") >= 2

    fewer = tmp_path / "fewer.safetensors"
    assert vlmfix(*asked[:-1], fewer, "--count", 3)[0] == 0
    assert load_profiles(fewer)["vhd"].card.pictures == 3
    code, printed, _ = vlmfix("profile", "diff", out, fewer, "--json", "--count", 10)
    assert code == 0
    compared = json.loads(printed)
    assert set(compared) == set(found)
    assert compared["vhd"]["count"] == 10
    assert compared["vhd"]["correlation"] > 0.7
    assert compared["vhd"]["overlap"] > compared["vhd"]["chance"]
    code, printed, _ = vlmfix("profile", "diff", out, out, "--count", 1, "--either-sign")
    assert code == 0
    assert "1.000" in printed
    assert re.search(r"vhd, heads in both: L\dH\d\n", printed)


def test_a_seed_draws_the_same_pictures_and_fewer_are_the_first_of_more(images, tmp_path, vlmfix):
    digests = {}
    for name, seed, count in (("a", 0, 2), ("b", 0, 2), ("c", 1, 2)):
        out = tmp_path / name
        asked = ("profile", "--profiler", "image-mass", "--images", images, "--out", out)
        assert vlmfix(*asked, "--seed", seed, "--count", count)[0] == 0
        digests[name] = load_profiles(out)["image-mass"].card.data
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize("model", TINY)
def test_ablation_on_captions_and_patching_share_a_file(images, tmp_path, vlmfix, model):
    out, annotations = tmp_path / "heads.safetensors", images.parent / "annotations"
    truth = ("--instances", annotations / "instances.json", "--captions", annotations / "captions.json")
    asked = ("profile", "--model", model, "--images", images, "--out", out)
    code, printed, said = vlmfix(*asked, "--profiler", "image-mass,ablation", *truth)
    assert code == 0
    assert "hallucinated_words: " in printed
    assert "1 files have no annotations" in said
    found = load_profiles(out)
    card = found["ablation"].card
    assert card.parameters["target"] == "captions"
    assert card.parameters["labels"]["instances"]["file"] == ["instances.json"]
    assert 1 <= card.pictures <= found["image-mass"].card.pictures == 4
    words = {name: int(found["ablation"].details[f"{name}_words"]) for name in ("hallucinated", "real")}
    assert words["hallucinated"] >= card.pictures
    assert words["real"] > 0

    code, printed, _ = vlmfix(*asked, "--profiler", "patching", "--prompt", "Is there a chair in the image?", "--add")
    assert code == 0
    assert "no_conflict: " in printed
    both = load_profiles(out)
    assert list(both) == ["image-mass", "ablation", "patching"]
    assert both["ablation"].card == card
    assert both["patching"].card.question == "Is there a chair in the image?"
    other = next(name for name in TINY if name != model)
    code, _, said = vlmfix(*asked, "--profiler", "vhd", "--add", "--model", other)
    assert code == 1
    assert "was measured on" in said


def test_ablation_wants_both_kinds_of_annotations_of_these_pictures(images, tmp_path, vlmfix):
    annotations = images.parent / "annotations"
    instances, captions = annotations / "instances.json", annotations / "captions.json"
    asked = ("profile", "--images", images, "--out", tmp_path / "heads")
    for given in (("ablation", "--instances", instances), ("vhd", "--instances", instances, "--captions", captions)):
        code, _, said = vlmfix(*asked, "--profiler", *given)
        assert code == 2
        assert "say what the profiler ablation measures" in said
    code, _, said = vlmfix(
        *("profile", "--images", images / "broken.png", "--out", tmp_path / "heads", "--profiler", "ablation"),
        *("--instances", instances, "--captions", captions),
    )
    assert code == 1
    assert "none of 1 files has annotations" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "--profiler, --images and --out are needed"),
        (("--profiler", "vhd,nose", "--images", ".", "--out", "heads"), 2, "unknown profiler 'nose'"),
        (("--profiler", "vhd", "--images", ".", "--out", "no/such/heads"), 2, "there is no folder no/such"),
        (("--profiler", "vhd", "--images", "no/such", "--out", "heads"), 1, "cannot read no/such"),
        (("show", "no/such"), 1, "cannot read no/such"),
    ],
)
def test_wrong_use_says_what_to_do(vlmfix, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    given, _, said = vlmfix("profile", *arguments)
    assert given == code
    assert message in said
    assert "hint:" in said


def test_a_folder_without_pictures_and_an_unknown_profile(vlmfix, tmp_path, images):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "heads"
    code, _, said = vlmfix("profile", "--profiler", "vhd", "--images", tmp_path / "empty", "--out", out)
    assert code == 1
    assert "no picture to profile" in said
    assert not out.exists()
    asked = ("profile", "--profiler", "image-mass", "--images", images, "--count", 1, "--out", out)
    assert vlmfix(*asked)[0] == 0
    code, _, said = vlmfix("profile", "show", out, "--profiler", "vhd")
    assert code == 1
    assert "holds the profiles image-mass" in said
    code, _, said = vlmfix("profile", "diff", out, out, "--profiler", "vhd")
    assert code == 2
    assert "no vhd profile in both files" in said


def described(path, model):
    """A profile of the embedded model whose cards call the model something else."""
    with safe_open(TINY["tiny"] / "heads.safetensors", framework="pt") as file:
        about, tensors = json.loads(file.metadata()["vlmfix"]), {key: file.get_tensor(key) for key in file.keys()}
    for card in about["profiles"].values():
        card["model"] = model
    save_file(tensors, path, metadata={"vlmfix": json.dumps(about)})
    return path


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("x[/bold]y", "x[/bold]y"),
        ("[link=http://evil]tiny[/link]", "[link=http://evil]tiny[/link]"),
        ("[bold red]:smile:", "[bold red]:smile:"),
        ("a\x1b[31mb\x9bc\u202ed\x07", r"a\u001b[31mb\u009bc\u202ed\u0007"),
        ("two\nlines\tand a tab", r"two\nlines\tand a tab"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_what_a_profile_says_is_shown_as_text(tmp_path, vlmfix, model, shown):
    file = described(tmp_path / "heads.safetensors", model)
    code, printed, _ = vlmfix("profile", "show", file)
    assert code == 0
    assert f"vhd: {shown}, 256 pictures" in printed
    code, printed, _ = vlmfix("profile", "show", file, "--json")
    assert code == 0
    assert json.loads(printed)["vhd"]["card"]["model"] == model
    assert not set(printed) & set("\x1b\x9b\u202e\x07")
    draw([load_profiles(file)["vhd"]], tmp_path / "heads.svg")


def test_a_profile_that_is_damaged_is_named_before_the_first_picture(images, tmp_path, vlmfix):
    file, out = tmp_path / "heads.safetensors", tmp_path / "out"
    with safe_open(TINY["tiny"] / "heads.safetensors", framework="pt") as opened:
        about, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}
    for bad in (torch.full((8, 8), float("nan")), torch.zeros(3, 3), torch.zeros(3)):
        save_file({k: bad.clone() if k.endswith("/scores") else t for k, t in tensors.items()}, file, metadata=about)
        for command in (
            ("run", images, "--out", out, "--decoder", f"vhr:profile={file}", "--max-new-tokens", 1),
            ("run", images, "--out", out, "--decoder", f"adhh:profile={file}", "--max-new-tokens", 1),
            ("profile", "show", file),
            ("profile", "diff", file, file),
        ):
            code, printed, said = vlmfix(*command)
            assert (code, printed) == (1, "")
            assert f"{file} is damaged" in said
            assert not (out / "failed.jsonl").exists() or not (out / "failed.jsonl").read_text()


def test_files_of_something_else_are_refused_before_anything_is_measured(images, tmp_path, vlmfix):
    for option, name in (("--out", "heads.safetensors"), ("--plot", "photo.png")):
        (tmp_path / name).write_text("precious")
        outs = {"--out": tmp_path / "new.safetensors", option: tmp_path / name}
        code, _, said = vlmfix("profile", "--profiler", "vhd", "--images", images, *chain(*outs.items()))
        assert code == 1
        assert f"{name} is there and" in said
        assert "loading" not in said
        assert (tmp_path / name).read_text() == "precious"
