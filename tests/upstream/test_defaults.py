"""Settings of a checkpoint's generation configuration: none of them reaches an answer, and a user keeps them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from tests.contracts.support import PICTURES, PROMPTS, batch_of, vlm_of
from tests.tiny import tiny_vlm
from vlmfix.decoders.attention.calibration import certainty
from vlmfix.decoders.logits.vcd import VCD
from vlmfix.generation import VLM
from vlmfix.insight.captions import tell
from vlmfix.insight.grounding import grounding
from vlmfix.insight.work import Work
from vlmfix.upstream import defaults

ODD: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[5], [6, 7]],
    "begin_suppress_tokens": [8, 9],
    "cache_config": {"a": 1},
    "cache_implementation": "static",
    "compile_config": CompileConfig(),
    "constraints": [1],
    "decoder_start_token_id": 3,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "do_sample": True,
    "dola_layers": "high",
    "early_stopping": "never",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 2.0,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "exponential_decay_length_penalty": (1, 2.0),
    "force_words_ids": [[5]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "guidance_scale": 3.0,
    "is_assistant": True,
    "length_penalty": 9.0,
    "low_memory": True,
    "max_cache_len": 5,
    "max_length": 3,
    "max_matching_ngram_size": 2,
    "max_new_tokens": 1,
    "max_time": 1e-6,
    "min_length": 400,
    "min_new_tokens": 5,
    "min_p": 0.3,
    "no_repeat_ngram_size": 2,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 4,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 4,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 3.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[5], 9.0]],
    "speculation_type": "mtp",
    "stop_strings": ["a"],
    "suppress_tokens": [6, 7],
    "target_lookbehind": 3,
    "temperature": 0.1,
    "token_healing": True,
    "top_h": 0.2,
    "top_k": 1,
    "top_p": 0.001,
    "typical_p": 0.2,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": WatermarkingConfig(),
}
"""A value that acts, for every setting that transformers knows."""
ELSEWHERE = {"continuous_batching_config"}
"""A setting that cannot be given without a warning that it is about to go."""


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return vlm_of("llava")


def test_every_setting_is_tried() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - ODD.keys() - ELSEWHERE == {*defaults.KEPT, *defaults.IDLE}


def said(vlm: VLM) -> list[tuple[int, ...]]:
    return [answer.ids for answer in vlm.generate(PICTURES, PROMPTS, max_new_tokens=6)]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    return said(vlm_of("llava"))


@pytest.mark.parametrize("name", [None, *ODD])
def test_no_setting_changes_an_answer(
    vlm: VLM, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    before = vars(vlm.model.generation_config).copy()
    for setting in ODD if name is None else [name]:
        monkeypatch.setattr(vlm.model.generation_config, setting, ODD[setting], raising=False)
    assert said(vlm) == expected
    assert name is None or vars(vlm.model.generation_config) == before | {name: ODD[name]}


@pytest.fixture
def spoiled(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> VLM:
    for name, value in ODD.items():
        monkeypatch.setattr(vlm.model.generation_config, name, value, raising=False)
    return vlm


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "vcd": {"decoder": "vcd"},
    "sgrs": {"decoder": "sgrs"},
    "draws": {"temperature": 1.0},
    "beam": {"decoder": "beam"},
    "sample": {"decoder": "sample"},
    "carve": {"decoder": "carve:probe_tokens=2"},
    "rel-att": {"decoder": "vicrop:base=12"},
    "gradients": {"decoder": "vicrop:base=12,method=grad-att"},
    "static": {"static_cache": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_answering_lets_a_setting_in(way: str) -> None:
    """Each way with the settings of a new model of the same weights, and with odd ones."""
    own = tiny_vlm("llava").model.generation_config
    found = []
    for config in (own, _odd(own)):
        vlm = vlm_of("llava")  # with an empty memory of pictures
        vlm.model.generation_config = config
        try:
            found.append([answer.ids for answer in vlm.generate(PICTURES, PROMPTS, max_new_tokens=4, **WAYS[way])])
        finally:
            vlm.model.generation_config = own
    assert found[0] == found[1]


def _odd(own: GenerationConfig) -> GenerationConfig:
    config = GenerationConfig(**{name: getattr(own, name) for name in defaults.KEPT})
    vars(config).update(ODD)
    return config


def test_streams_grounding_and_measures_do_not_let_them_in_either(
    spoiled: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, prompt = PICTURES[0], PROMPTS[0]
    batch = batch_of(spoiled)

    def everything() -> tuple[str, list[float], list[float], object]:
        said = "".join(spoiled.stream(picture, prompt, max_new_tokens=4))
        (owed,) = grounding(spoiled, [picture], prompt, [[5, 6, 7]])
        told = tell(Work(vlm=spoiled, batch=batch, layout=spoiled.layout(batch), first=0, seed=0), 4).tokens
        return said, owed.picture.tolist(), certainty(spoiled, [batch])(VCD()), told

    found = everything()
    monkeypatch.undo()
    assert everything() == found


def test_a_user_of_applied_keeps_the_settings(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(vlm)
    monkeypatch.setattr(vlm.model.generation_config, "forced_bos_token_id", None)
    monkeypatch.setattr(vlm.model.generation_config, "suppress_tokens", list(range(4, 60)))
    with VCD().applied(vlm, batch) as arguments:
        sequences = vlm.model.generate(**batch, **arguments, max_new_tokens=3, do_sample=False)
    assert not (sequences[:, batch.length :] // 4 < 15).logical_and(sequences[:, batch.length :] >= 4).any()


def test_the_settings_are_back_after_an_error(vlm: VLM) -> None:
    own, seen = vlm.model.generation_config, []

    def fails() -> None:
        with defaults.undisturbed(vlm.model):
            seen.append(vlm.model.generation_config)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert seen[0] is not own
    assert vlm.model.generation_config is own


def test_what_is_set_aside_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vlm("qwen2_5_vl").model
    assert defaults.set_aside(model) == {}
    qwen = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.1, "top_k": 1, "top_p": 0.001}
    kept = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "transformers_version": "4.49.0"}
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**qwen, **kept, chat_format="chatml"))
    assert defaults.set_aside(model) == qwen
    assert defaults.ends(model) == [2, 3]
    monkeypatch.setattr(
        model, "generation_config", GenerationConfig(**{name: ODD[name] for name in ("compile_config",)})
    )
    assert "CompileConfig" in defaults.set_aside(model)["compile_config"]
    assert defaults.ends(model) == []


def test_values_that_do_nothing_are_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vlm("llava").model
    idle = {"repetition_penalty": 1.0, "do_sample": False, "num_beams": 1, "top_k": 50, "no_repeat_ngram_size": 0}
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**idle))
    assert defaults.set_aside(model) == {}
