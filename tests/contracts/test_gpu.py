"""The same contracts on a GPU, in bfloat16 and compiled by inductor; run with ``pytest -m gpu``."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.contracts.support import STRONG, batch_of, close, logits, method_of, vlm_of
from tests.contracts.test_compile import ALIKE
from tests.decoding.test_graphs import GATED, saliency_of_steps
from vlmfix.decoding.running import running
from vlmfix.generation import VLM

pytestmark = pytest.mark.gpu


def on_gpu(family: str, dtype: torch.dtype, seed: int = 0) -> VLM:
    tiny = vlm_of(family, seed)
    return replace(tiny, model=copy.deepcopy(tiny.model).to("cuda", dtype))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("name", STRONG)
def test_the_gpu_gives_the_cpus_logits_in_float32(family, name):
    vlm = on_gpu(family, torch.float32)
    here = logits(vlm_of(family), batch_of(vlm_of(family)), STRONG[name], steps=2)
    close(logits(vlm, batch_of(vlm), STRONG[name], steps=2).cpu(), here, 2e-2)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3", "idefics3"])
@pytest.mark.parametrize("name", STRONG)
def test_bfloat16_stays_near_float32(family, name):
    # These methods choose tokens, heads and sinks by thresholds. Where rounding turns a choice over, a row becomes
    # another; that it does so with two sets of random weights is improbable.
    assert any(nearness(family, name, seed) > 0.8 for seed in (0, 1))


def nearness(family: str, name: str, seed: int) -> float:
    """Cosine of the logits in bfloat16 with those in float32, of the same weights, in the worst row."""
    exact, rounded = (on_gpu(family, dtype, seed) for dtype in (torch.float32, torch.bfloat16))
    exact.model.load_state_dict(rounded.model.state_dict())  # both have the weights that bfloat16 can hold
    want = logits(exact, batch_of(exact), STRONG[name], steps=1)
    got = logits(rounded, batch_of(rounded), STRONG[name], steps=1)
    assert got.isfinite().all()
    return float(torch.cosine_similarity(got.float(), want, dim=-1).min())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
@pytest.mark.parametrize("name", [name for name, spec in STRONG.items() if method_of(spec).compiles])
@torch.no_grad()
def test_recorded_steps_give_the_scores_of_others(family, name, monkeypatch):
    """Also in a later call, for other rows, and when a row leaves, or stays in the recording unread."""
    vlm, method = on_gpu(family, torch.float32), method_of(STRONG[name])
    tokens = torch.arange(5, 5 + 4 * 16, device="cuda").view(16, 4)

    def scores(shown, *, recorded):
        monkeypatch.setattr("vlmfix.decoding.running.RECORDING", ("cuda",) if recorded else ())
        batch = batch_of(vlm, shown)
        layout = vlm.layout(batch)
        lines, found = torch.arange(4, device="cuda"), []
        plan = method.plan(vlm, batch, layout)
        with running(vlm, batch, layout, plan, limit=18, name=method.spec()) as call:
            call.prompt()
            for step, column in enumerate(tokens):
                if step in (6, 10):  # one of four leaves, then one of three
                    kept = torch.arange(len(lines) - 1, device="cuda")
                    call.keep(kept)
                    lines = lines[kept]
                found.append(call.token(column[lines]))
        assert call._passes.recorded == (recorded and family != "gemma3")
        return found

    for shown in ([0, 1, 0, 1], [1, 1, 0, 1]):
        for one, other in zip(scores(shown, recorded=True), scores(shown, recorded=False), strict=True):
            close(one, other, 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", GATED)
def test_recorded_steps_give_the_gradients_of_others(spec, dtype, monkeypatch):
    vlm = on_gpu("llava", dtype)
    for shown in ((0, 1, 0, 1), (1, 1, 0, 1)):
        for one, other in zip(
            saliency_of_steps(vlm, spec, monkeypatch, recorded=True, shown=shown, device="cuda"),
            saliency_of_steps(vlm, spec, monkeypatch, recorded=False, shown=shown, device="cuda"),
            strict=True,
        ):
            if dtype is torch.float32:
                close(one, other, 2e-3)
            else:  # tokens that are cut are so in both
                both = [x.where(x > -torch.inf, 0.0).flatten() for x in (one, other)]
                assert torch.cosine_similarity(*both, dim=0) > 0.98


# advice of inductor's, and its placeholder of a graph, whose warning it swallows unless warnings are errors
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("name", [name for name in ALIKE if not name.startswith(("locore-", "icd"))])
def test_inductor_gives_the_eager_logits(name):
    """Of methods whose steps are all alike; ``icd`` has a longer prompt than a static cache has room for."""
    vlm = on_gpu("llava", torch.float32)
    batch = batch_of(vlm)
    compiled = logits(vlm, batch, STRONG[name], steps=4, cache_implementation="static")
    assert hasattr(vlm.model, "_compiled_call")
    close(compiled, logits(vlm, batch, STRONG[name], steps=4), 2e-3)
