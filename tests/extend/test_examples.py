"""The package of examples, installed as far as its metadata go, through the whole command line."""

from __future__ import annotations

import json

import pytest
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

import vlmfix as package
from tests.extend.installed import EXAMPLES, install_examples
from tests.models.spotlight import embeddings, painted, plain
from vlmfix.records import read_json
from vlmfix.testing.llava import VICUNA, VISION, text_parts
from vlmfix.testing.text import byte_tokenizer, drawn

BY = "vlmfix-outside 0.1.0"


@pytest.fixture(autouse=True)
def _installed(monkeypatch, tmp_path):
    install_examples(monkeypatch, tmp_path / "site")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def scenes(vlmfix, tmp_path):
    """Four drawn scenes, and a question about each for the benchmark."""
    assert vlmfix("world", "make", "drawn", "--count", 4)[0] == 0
    lines = [
        {"image": path.name, "question": "Is there a dog in the image?", "word": "No"}
        for path in sorted((tmp_path / "drawn" / "images").iterdir())
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ("--images", "drawn/images", "--questions", "questions.jsonl")


def test_the_decoder_is_short():
    assert len((EXAMPLES / "vlmfix_outside" / "textless.py").read_text().splitlines()) < 80


def test_the_benchmark_is_run_compared_and_reproduced(vlmfix, scenes, tmp_path):
    code, said, told = vlmfix("eval", "one-word", *scenes, "--out", "out", "--decoder", "textless:gamma=2", "--json")
    assert code == 0, told
    assert json.loads(said)
    card = read_json(tmp_path / "out" / "card.json")
    assert (card["task"], card["plugins"], card["options"]) == ("one-word", {"one-word": BY}, {"first": False})
    assert card["arms"]["textless:gamma=2"]["plugins"] == {"textless": BY}
    results = read_json(tmp_path / "out" / "results.json")
    assert "accuracy" in json.dumps(results)
    assert vlmfix("compare", "out")[0] == 0
    code, said, told = vlmfix("reproduce", "out")
    assert code == 0, told
    assert "out: reproduced, token for token" in said


def test_another_version_is_refused_by_name(vlmfix, scenes, tmp_path, monkeypatch):
    asked = ("eval", "one-word:first=true", *scenes, "--out", "out", "--max-new-tokens", 1)
    assert vlmfix(*asked)[0] == 0
    card = read_json(tmp_path / "out" / "card.json")
    assert card["options"] == {"first": True}
    (tmp_path / "out" / "card.json").write_text(json.dumps(card | {"plugins": {"one-word": "vlmfix-outside 0.0.9"}}))
    code, _, told = vlmfix(*asked)
    assert code == 2
    assert f"plugins.one-word was 'vlmfix-outside 0.0.9', now '{BY}'" in told
    for command in (("compare", "out"), ("reproduce", "out"), ("eval", "score", "out")):
        code, _, told = vlmfix(*command)
        assert code == 1
        assert f"one-word is not what out was made with: it was vlmfix-outside 0.0.9, now it is {BY}" in told
    (tmp_path / "out" / "card.json").write_text(json.dumps(card | {"task": "one-wrod"}))
    code, _, told = vlmfix("compare", "out")
    assert code == 1
    assert "unknown benchmark 'one-wrod'\nhint: did you mean one-word?" in told
    plugins = {"one-wrod": "vlmfix-outside 0.0.8"}
    (tmp_path / "out" / "card.json").write_text(json.dumps(card | {"task": "one-wrod", "plugins": plugins}))
    assert "hint: install vlmfix-outside 0.0.8, or put the file back" in vlmfix("compare", "out")[2]


def test_the_benchmark_is_read_from_a_file_too(vlmfix, scenes, tmp_path):
    file = EXAMPLES / "vlmfix_outside" / "one_word.py"
    assert vlmfix("eval", f"{file}:OneWord", *scenes, "--out", "out", "--max-new-tokens", 1)[0] == 0
    card = read_json(tmp_path / "out" / "card.json")
    assert card["task"] == f"{file}:OneWord"
    assert card["plugins"][card["task"]].startswith("sha256:")
    assert vlmfix("eval", "score", "out")[0] == 0
    code, _, told = vlmfix("eval", f"{file}:OneWord:frist=true", *scenes, "--out", "other")
    assert code == 2
    assert "did you mean first?" in told
    code, _, told = vlmfix("eval", "one-word", "--out", "other")
    assert code == 2
    assert "one-word needs questions and pictures" in told


def test_the_decoder_is_tuned_for_the_benchmark(vlmfix, scenes, tmp_path):
    options = ("--budget", 2, "--out", "out", "--max-new-tokens", 2)
    code, said, told = vlmfix("tune", "textless", "--task", "one-word", *scenes, *options)
    assert (code, "best" in said or "held-out" in said) == (1, True), told  # a dog is nowhere: nothing can be better
    card = read_json(tmp_path / "out" / "tune.json")
    assert (card["spec"], card["plugins"], card["task"]) == ("textless", {"textless": BY}, "one-word")
    assert (tmp_path / "out" / "pareto.png").exists()
    code, _, told = vlmfix("tune", "textless", "--task", "one-wrod", *scenes, *options)
    assert code == 2
    assert "did you mean one-word?" in told
    code, _, told = vlmfix("tune", "textless", "--task", "mme", *scenes, *options)
    assert (code, "mme cannot be tuned for" in told) == (2, True)


def test_a_folder_is_run_and_reproduced_with_a_chain(vlmfix, scenes, tmp_path):
    decoder = ("--decoder", "locore+textless:gamma=1.5", "--max-new-tokens", 2)
    code, _, told = vlmfix("run", "drawn/images", "--out", "out", *decoder)
    assert code == 0, told
    assert read_json(tmp_path / "out" / "run.json")["settings"]["plugins"] == {"textless": BY}
    assert vlmfix("reproduce", "out")[0] == 0
    code, said, _ = vlmfix("doctor", "tiny", "--decoder", "textless")
    assert "\ntextless  works  works  works" in said


@pytest.fixture
def vip(tmp_path):
    """A tiny ViP-LLaVA on the disk, which no family of vlmfix's own serves."""
    tokenizer = byte_tokenizer(named={"image_token": "<image>"})
    usual = VipLlavaConfig()
    known = [name for name in ("vision_feature_layer", "vision_feature_layers") if hasattr(usual, name)]  # by version
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=40, projection_dim=32),
        image_seq_length=25,
        **{name: [-2, -1] for name in known},
        **text_parts(LlamaConfig, tokenizer),
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    drawn(VipLlavaForConditionalGeneration, config, tokenizer, seed=0).save_pretrained(tmp_path / "vip")
    processor.save_pretrained(tmp_path / "vip")
    return tmp_path / "vip"


def test_the_family_is_served(vlmfix, scenes, vip, tmp_path):
    code, said, told = vlmfix("doctor", vip, "--decoder", "textless", "--decoder", "vicrop", "--decoder", "spin")
    assert code == 0, told
    assert "ViP-LLaVA, 3 layers" in said
    assert all(" ".join(line.split()[1:]) == "works works works" for line in said.splitlines()[-5:-2])
    options = ("--model", vip, "--max-new-tokens", 2)
    code, _, told = vlmfix("run", "drawn/images", "--out", "out", "--decoder", "textless", *options)
    assert code == 0, told
    assert read_json(tmp_path / "out" / "run.json")["settings"]["decoder_facts"] == {"vipllava": BY}
    code, _, told = vlmfix(
        "profile", "--profiler", "first-token,vhd", *scenes[:2], "--out", "h.safetensors", *options[:2]
    )
    assert code == 0, told


def test_the_family_places_tokens_where_they_look(vip):
    vlm = package.load(vip)
    blank = vlm.encode(["?"], [[plain(60, 60)]])
    layout = vlm.layout(blank)
    tokens = layout.tokens[0].nonzero()[:, 0].tolist()
    assert len(tokens) == 25
    for token in (tokens[0], tokens[7], tokens[24]):
        shown = vlm.encode(["?"], [[painted(60, 60, layout.boxes[0][token].tolist())]])
        moved = (embeddings(vlm, shown) - embeddings(vlm, blank)).abs().sum(dim=-1)
        assert int(moved.argmax()) == token
