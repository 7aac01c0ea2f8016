"""CLIPScore against a slow version in float64, with a small random CLIP."""

from __future__ import annotations

import copy
import io
import json
import math
import shutil
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.jobs.fake import draw
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.benchmarks.clipscore import PREFIX, ClipScore, clip_scores, read, ref_clip_score
from vlmfix.evals.task import Sample
from vlmfix.images import open_picture

LONG = "a very long caption " * 40
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random model in the layout of a Hub repository."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    model = open_clip.CLIP(**copy.deepcopy(TINY))
    for parameter in model.parameters():  # the usual start gives all texts nearly the same features
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(generator.integers(0, 256, (40, 32 + 8 * number, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    return folder


@pytest.fixture
def task(clip_folder, pictures):
    return ClipScore(images=str(pictures), model=f"local-dir:{clip_folder}", batch=2)


CODE = {
    "the tokenizer's": {"hf_tokenizer_name": "own"},
    "the tokenizer's, by permission of its own": {
        "hf_tokenizer_name": "own",
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
    "the text model's": {"hf_model_name": "FOLDER", "hf_tokenizer_name": "own"},
}


@pytest.mark.parametrize("what", CODE)
def test_code_in_a_folder_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch, capsys, clip_folder, what):
    monkeypatch.setenv("VLMFIX_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    text = {name: str(folder) if value == "FOLDER" else value for name, value in CODE[what].items()}
    card = json.loads((folder / "open_clip_config.json").read_text())
    card["model_cfg"]["text_cfg"] = (
        {"context_length": 20, **text} if "hf_model_name" in text else TINY["text_cfg"] | text
    )
    (folder / "open_clip_config.json").write_text(json.dumps(card))
    known = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": known}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": known}))
    (folder / "own.py").write_text("import os\nopen(os.environ['VLMFIX_MARK'], 'w').write('x')\nclass Own:\n    pass\n")
    with pytest.raises(DataError, match="needs Python code of its own, which vlmfix does not run"):
        ClipScore(model=f"local-dir:{folder}").load()
    assert not (tmp_path / "mark").exists()
    assert capsys.readouterr().out == ""
    assert sys.stdin.read() == "y\ny\ny\n"


def sample(number, *references):
    return Sample(id=str(number), image=f"{number}.png", prompt="?", target={"references": list(references)})


CAPTIONS = ["a red house", "", LONG, "two dogs\nand a Cat", "a tree"]
REFERENCES = [(), ("a red house",), ("stones", "a dog on a sofa"), ("two dogs",), (LONG, "a tree", "sky")]


def judged(task):
    samples = [sample(number, *REFERENCES[number]) for number in range(5)]
    return list(zip(samples, task.judge_all(samples, CAPTIONS), strict=True))


def slow(folder, path, caption, references):
    """One caption in float64, by the paper's formulas alone."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model = model.double()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def text(words):
        return model.encode_text(tokenizer([PREFIX + words]))[0].detach().numpy()

    def cosine(a, b):
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    picture = model.encode_image(transform(open_picture(path).image).double()[None])[0].detach().numpy()
    score = 2.5 * max(cosine(picture, text(caption)), 0)
    if not references:
        return score, None
    nearest = max([cosine(text(caption), text(words)) for words in references] + [0])
    return score, 0.0 if score == 0 or nearest == 0 else 2 / (1 / score + 1 / nearest)


def test_scores_equal_those_of_one_at_a_time_in_float64(task, clip_folder, pictures):
    expected = [
        slow(clip_folder, pictures / f"{number}.png", CAPTIONS[number], REFERENCES[number]) for number in range(5)
    ]
    assert len({round(score, 3) for score, _ in expected}) > 2, "a model that tells no captions apart tests nothing"
    verdicts = [verdict for _, verdict in judged(task)]
    assert [v.counts["score"] for v in verdicts] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert [v.counts["ref_score"] for v in verdicts] == pytest.approx([ref or 0 for _, ref in expected], abs=1e-5)
    results = task.results(judged(task))
    refs = [ref for _, ref in expected if ref is not None]
    assert results["clip_score"] == pytest.approx(sum(score for score, _ in expected) / 5, abs=1e-5)
    assert results["ref_clip_score"] == pytest.approx(sum(refs) / 4, abs=1e-5)
    assert results["n"] == 5
    assert results["length"] == (3 + 0 + 160 + 5 + 2) / 5


def test_batches_change_nothing(task):
    alone = [task.judge(s, answer).counts for (s, _), answer in zip(judged(task), CAPTIONS, strict=True)]
    for one, (_, many) in zip(alone, judged(task), strict=True):
        assert one == pytest.approx(many.counts, abs=1e-6)


def test_extremes_of_the_scores():
    same = torch.tensor([[3.0, 4.0]])
    assert clip_scores(same, 7 * same).item() == pytest.approx(2.5)
    assert clip_scores(same, -same).item() == 0
    assert clip_scores(same, torch.tensor([[-4.0, 3.0]])).item() == 0
    assert ref_clip_score(2.5, same[0], same) == pytest.approx(2 * 2.5 / 3.5)
    assert ref_clip_score(0.0, same[0], same) == 0
    assert ref_clip_score(0.0, same[0], -same) == 0
    assert ref_clip_score(2.5, same[0], -same) == 0


def test_the_nearest_reference_counts(task):
    far, near = "stones", "a red house"
    both = task.judge(sample(0, far, near), near).counts["ref_score"]
    score = task.judge(sample(0), near).counts["score"]
    assert both == pytest.approx(2 * score / (score + 1))
    assert both >= task.judge(sample(0, far), near).counts["ref_score"]


@pytest.mark.parametrize(("words", "cut"), [(14, 0), (15, 0), (16, 1), (17, 1)])
def test_captions_that_are_cut_are_counted(task, words, cut):
    # 20 tokens: the start, "a photo depicts", 15 words, the end
    caption = " ".join(["dog"] * words)
    assert task.judge(sample(0), caption).counts["truncated"] == cut
    found = [(sample(0), task.judge(sample(0), caption))]
    assert task.results(found)["truncated"] == task.details(found, [caption])["truncated"] == cut


def test_without_references(task):
    found = [(sample(0), task.judge(sample(0), "a dog"))]
    assert task.results(found)["ref_clip_score"] is None
    assert task.details(found, ["a dog"])["referenced"] == 0
    assert task.results([]) == {"clip_score": None, "ref_clip_score": None, "length": None, "truncated": 0, "n": 0}
    assert task.details([], []) == {"clip": None, "referenced": 0, "truncated": 0}


def test_a_picture_is_encoded_once_for_all_arms(task, monkeypatch):
    clip = task._clip
    encoded = []
    encode = clip.model.encode_image
    monkeypatch.setattr(clip.model, "encode_image", lambda inputs: encoded.append(len(inputs)) or encode(inputs))
    samples = [sample(number) for number in (0, 1, 0, 2)]
    for arm in ("a dog", "a cat"):
        task.judge_all(samples, [arm] * 4)
    assert encoded == [2, 1]


def test_the_weights_have_a_digest(task, clip_folder):
    again = ClipScore(images=task.images, model=task.model)
    assert task._clip.digest == again._clip.digest
    found = judged(task)
    assert task.details(found, CAPTIONS)["clip"] == {"weights": task._clip.digest, "tokens": 20}
    with torch.no_grad():
        next(again._clip.model.parameters()).view(-1)[0] += 1
    del again._clip.__dict__["digest"]
    assert task._clip.digest != again._clip.digest


def test_options_make_an_equal_task(task):
    assert ClipScore(**json.loads(json.dumps(task.options()))) == task
    with pytest.raises(UsageError, match="batch=0"):
        ClipScore(batch=0)


@pytest.fixture
def tiny_config(tmp_path):
    (tmp_path / "tiny-random.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-random.json")


@pytest.mark.usefixtures("tiny_config")
def test_a_weights_file(clip_folder, task):
    weights = clip_folder / "open_clip_pytorch_model.bin"
    local = ClipScore(model="tiny-random", pretrained=str(weights))
    assert local._clip.digest == task._clip.digest


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-32-quickgelu", "openai", "no CLIP model ViT-B-32-quickgelu with weights openai.*weights file"),
        ("ViT-B-32", "no-such-tag", "no-such-tag"),
        ("no-such-model", "openai", "not found.*hf-hub"),
        ("hf-hub:owner/name", "openai", r"no CLIP model hf-hub:owner/name: .*local-dir"),
        ("local-dir:/nowhere", "", "no CLIP model local-dir:/nowhere"),
    ],
)
def test_weights_that_cannot_be_had(pictures, model, pretrained, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=message):
        ClipScore(images=str(pictures), model=model, pretrained=pretrained).judge(sample(0), "a dog")


@pytest.mark.usefixtures("tiny_config")
def test_broken_weights(pictures, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    task = ClipScore(images=str(pictures), model="tiny-random", pretrained=str(tmp_path / "weights.pt"))
    with pytest.raises(DataError, match=r"no CLIP model tiny-random with weights .*weights\.pt"):
        task.judge(sample(0), "a dog")


def test_pictures_that_are_not_there(task):
    with pytest.raises(DataError, match=r"9\.png: cannot be read"):
        task.judge(sample(9), "a dog")
    with pytest.raises(DataError, match="sample x has no picture"):
        task.judge(Sample(id="x", image=None, prompt="?"), "a dog")


@pytest.fixture
def folder(tmp_path):
    draw(tmp_path, 4)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "b.jpg")
    return tmp_path


def test_any_folder_of_pictures(folder):
    workload = read(folder, prompt="Say.")
    assert [s.image for s in workload.samples] == ["0000.png", "0001.png", "0002.png", "0003.png", "deep/b.jpg"]
    assert {s.prompt for s in workload.samples} == {"Say."}
    assert workload.about["passed_over"] == 1
    assert workload.images == folder


def test_a_folder_to_leave_out(folder):
    left = read(folder, skip=folder / "deep").samples
    assert {s.image for s in read(folder).samples} - {s.image for s in left} == {"deep/b.jpg"}


def test_a_draw_by_seed(folder):
    drawn = {seed: [s.id for s in read(folder, count=3, seed=seed).samples] for seed in range(5)}
    assert all(len(names) == 3 and names == sorted(names) for names in drawn.values())
    assert len({tuple(names) for names in drawn.values()}) > 1
    assert drawn[1] == [s.id for s in read(folder, count=3, seed=1).samples]
    assert read(folder, count=3, seed=1).about["seed"] == 1
    assert {s.id for s in read(folder, count=2, seed=1).samples} < set(drawn[1])


def test_a_list(folder, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("0002.png\n\ndeep/b.jpg\n")
    workload = read(folder, listed=listed)
    twice = tmp_path / "twice.txt"
    twice.write_text("0002.png\n0002.png\n")
    with pytest.raises(DataError, match=r"twice\.txt lists 1 pictures more than once: 0002\.png"):
        read(folder, listed=twice)
    assert [s.image for s in workload.samples] == ["0002.png", "deep/b.jpg"]
    assert workload.about["list"]["file"] == "list.txt"


def test_captions_as_references(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    captions = tmp_path / "captions.json"
    images = [{"id": 1, "file_name": "0001.png"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "0003.png"}]
    told = [{"id": 1, "image_id": 2, "caption": "dark"}, {"id": 2, "image_id": 1, "caption": "a"}]
    told.append({"id": 3, "image_id": 1, "caption": "b"})
    captions.write_text(json.dumps({"images": images, "annotations": told}))
    workload = read(folder, captions=captions)
    assert {s.image: s.target["references"] for s in workload.samples} == {
        "0001.png": ["a", "b"],
        "deep/b.jpg": ["dark"],
    }
    assert workload.about["captions"]["file"] == "captions.json"


def test_nothing_to_ask(folder, tmp_path):
    with pytest.raises(DataError, match=r"5 pictures in .* not 6"):
        read(folder, count=6)
    with pytest.raises(UsageError, match="not both"):
        read(folder, count=1, listed=tmp_path / "list.txt")
    with pytest.raises(UsageError, match="count=0"):
        read(folder, count=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 pictures"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "none")
