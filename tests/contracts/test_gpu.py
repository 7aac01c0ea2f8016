"""The same contracts on a GPU, in bfloat16 and compiled by inductor; run with ``pytest -m gpu``."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.contracts.support import STRONG, batch_of, close, logits, vlm_of
from vlmfix.generation import VLM

pytestmark = pytest.mark.gpu


def on_gpu(family: str, dtype: torch.dtype) -> VLM:
    tiny = vlm_of(family)
    model = copy.deepcopy(tiny.model).to("cuda", dtype)
    return VLM(model=model, processor=tiny.processor, family=tiny.family, name=family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("name", STRONG)
def test_the_gpu_gives_the_cpus_logits_in_float32(family, name):
    vlm = on_gpu(family, torch.float32)
    here = logits(vlm_of(family), batch_of(vlm_of(family)), STRONG[name], steps=2)
    close(logits(vlm, batch_of(vlm), STRONG[name], steps=2).cpu(), here, 2e-2)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3", "idefics3"])
@pytest.mark.parametrize("name", STRONG)
def test_bfloat16_stays_near_float32(family, name):
    exact, rounded = on_gpu(family, torch.float32), on_gpu(family, torch.bfloat16)
    exact.model.load_state_dict(rounded.model.state_dict())  # both have the weights that bfloat16 can hold
    want = logits(exact, batch_of(exact), STRONG[name], steps=1)
    got = logits(rounded, batch_of(rounded), STRONG[name], steps=1)
    assert got.isfinite().all()
    # These methods choose tokens, heads and sinks by thresholds: where rounding turns a choice over, a row moves far.
    near = torch.cosine_similarity(got.float(), want, dim=-1)
    assert near.max() > 0.9
    assert near.min() > 0.4


# advice of inductor's, and its placeholder of a graph, whose warning it swallows unless warnings are errors
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("name", [name for name in STRONG if not name.startswith("locore-")])
def test_inductor_gives_the_eager_logits(name):
    vlm = on_gpu("llava", torch.float32)
    batch = batch_of(vlm)
    compiled = logits(vlm, batch, STRONG[name], steps=4, cache_implementation="static")
    assert hasattr(vlm.model, "_compiled_call")
    close(compiled, logits(vlm, batch, STRONG[name], steps=4), 2e-3)
