"""What attention adds to the residual stream is the sum of what its heads add."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import vlm_of
from vlmfix.insight.contributions import added, contributions, held


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_the_parts_of_all_heads_and_the_bias_add_up(family):
    vlm = vlm_of(family)
    width = vlm.family.attention_modules(vlm.model)[0].head_dim
    outputs = torch.randn(3, vlm.heads, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in vlm.family.layers(vlm.model):
            project = layer.self_attn.o_proj
            whole = contributions(layer, outputs).sum(dim=1)
            if project.bias is not None:
                whole = whole + project.bias
            torch.testing.assert_close(whole, added(layer, outputs.flatten(1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_held_norm_is_the_norm_at_the_states_that_it_was_held_at(family):
    vlm = vlm_of(family)
    norm = vlm.family.decoder(vlm.model).norm
    states = torch.randn(2, norm.weight.shape[0], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(held(norm, states) * states, norm(states), atol=1e-5, rtol=1e-4)
