"""RMS norms by one kernel: which modules are RMS norms, and that they compute the same."""

import pytest
import torch
from torch import nn

from tests.contracts.support import vlm_of
from tests.tiny import TINY
from vlmfix.upstream import norms


class Rms(nn.Module):
    """The formula, written as models do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.variance_epsilon = 1e-5

    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.pow(2).mean(dim=-1, keepdim=True) + self.variance_epsilon)


class Centred(Rms):
    """Takes the mean out, as a layer norm does."""

    def forward(self, states):
        return super().forward(states - states.mean(dim=-1, keepdim=True))


class Shifted(Rms):
    """Scales by 1 + weight, as Gemma does."""

    def forward(self, states):
        return super().forward(states) * (1 + self.weight) / self.weight


class Tighter(Rms):
    """Adds another epsilon than it says."""

    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.pow(2).mean(dim=-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("module", [Rms(), nn.RMSNorm(8, eps=1e-6)], ids=lambda module: type(module).__name__)
def test_an_rms_norm_is_known_by_what_it_computes(module):
    assert norms.is_rms(module)


@pytest.mark.parametrize(
    "module",
    [
        Centred(),
        Shifted(),
        Tighter(),
        nn.RMSNorm(8),
        nn.LayerNorm(8),
        nn.LayerNorm(8, bias=False),
        nn.Linear(8, 1, False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_nothing_else_is_taken_for_one(module):
    """PyTorch's RMSNorm without an epsilon takes that of the type, which the model's number would not tell."""
    assert not norms.is_rms(module)


@pytest.mark.parametrize("family", TINY)
def test_models_compute_the_same_with_them_and_are_left_as_they_were(family):
    vlm = vlm_of(family)
    decoder = vlm.family.decoder(vlm.model)
    states = torch.randn(
        2, 5, vlm.model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(1)
    )
    before = {name: set(vars(module)) for name, module in decoder.named_modules()}
    with torch.no_grad():
        expected = decoder(inputs_embeds=states).last_hidden_state
        with norms.fused(decoder):
            changed = [module for module in decoder.modules() if "forward" in vars(module)]
            found = decoder(inputs_embeds=states).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert bool(changed) == (family != "gemma3"), "Gemma's norms scale by 1 + weight"
    assert {name: set(vars(module)) for name, module in decoder.named_modules()} == before
