"""Edits on a model in bfloat16, on the CPU; `test_gpu.py` has the same for every method."""

import copy
import dataclasses

import pytest
import torch

from tests.contracts.support import STRONG, batch_of, logits, vlm_of


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_output_edit_may_compute_in_float32(family):
    vlm = vlm_of(family)
    half = dataclasses.replace(vlm, model=copy.deepcopy(vlm.model).to(torch.bfloat16))
    want, got = (logits(one, batch_of(one), STRONG["head-gains"], steps=2) for one in (vlm, half))
    assert got.isfinite().all()
    assert torch.cosine_similarity(got.float(), want, dim=-1).min() > 0.8
