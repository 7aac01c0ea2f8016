"""How profilers are measured: shared passes that leave the model alone, whatever the batch and the memory."""

import pytest
import torch
from transformers import DynamicCache

from tests.contracts.support import HeadGain, vlm_of
from tests.heads.asked import PICTURES, QUESTION, SHOWN, alone
from vlmfix.attention.session import edited
from vlmfix.heads.measure import profile
from vlmfix.heads.profiler import State, run_pass
from vlmfix.heads.profilers import PROFILERS
from vlmfix.heads.profilers.localization import Localization
from vlmfix.insight.work import Work


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_profile_leaves_the_model_as_it_was(family):
    vlm = vlm_of(family)
    batch, _ = alone(vlm, PICTURES[0])
    with torch.no_grad():
        before = vlm.model(**batch).logits
        profile(vlm, SHOWN, [name for name in PROFILERS if name != "non-sink"], question=QUESTION)
        assert torch.equal(vlm.model(**batch).logits, before)
    assert not any(weight.grad is not None for weight in vlm.model.parameters())


def test_scores_do_not_depend_on_neighbours():
    vlm = vlm_of("llava_next")
    chosen = [name for name in PROFILERS if name not in ("non-sink", "localization")] + [Localization(min_mass=0.1)]
    together = profile(vlm, PICTURES, chosen, batch_size=2)
    apart = profile(vlm, PICTURES, chosen, batch_size=1)
    for name, part in together.items():
        torch.testing.assert_close(part.scores, apart[name].scores, atol=1e-5, rtol=1e-4)


class Counting(State):
    """Counts passes."""

    def scores(self, work, ran):
        return torch.zeros(work.batch.rows, work.layers, work.heads)


def test_profilers_share_one_pass(monkeypatch):
    vlm = vlm_of("llava")
    calls = []
    decoder = vlm.family.decoder(vlm.model)
    hook = decoder.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        profile(vlm, PICTURES, ["image-mass", "gaze-shift", "localization"])
        assert len(calls) == 1
        profile(vlm, PICTURES, ["image-mass", "vhd", "gaze-shift"])
        assert len(calls) == 3
    finally:
        hook.remove()
    batch, layout = alone(vlm, PICTURES[0])
    ran = run_pass(Work(vlm, batch, layout, 0, 0), [Counting()])
    assert ran is not None
    assert ran.cache is None


def test_the_kept_cache_is_a_plain_one():
    vlm = vlm_of("qwen3_vl")
    batch, layout = alone(vlm, PICTURES[0])

    class Keeping(Counting):
        keeps_cache = True

    ran = run_pass(Work(vlm, batch, layout, 0, 0), [Keeping()])
    assert type(ran.cache) is DynamicCache
    assert ran.cache.get_seq_length() == batch.length


def test_edits_at_work_are_lifted():
    vlm = vlm_of("llava")
    _, layout = alone(vlm, PICTURES[0])
    plain = profile(vlm, PICTURES[:1], ["vhd", "image-mass"])
    with edited(vlm, layout, [HeadGain(gain=3.0)]):
        inside = profile(vlm, PICTURES[:1], ["vhd", "image-mass"])
    assert all(torch.equal(inside[name].scores, part.scores) for name, part in plain.items())


def test_little_memory_means_fewer_copies_and_the_same_scores(monkeypatch):
    vlm = vlm_of("internvl")
    whole = profile(vlm, PICTURES[:1], ["ablation"])["ablation"].scores
    passes = []
    hook = vlm.family.decoder(vlm.model).register_forward_pre_hook(lambda *args: passes.append(1))
    try:
        monkeypatch.setattr("vlmfix.insight.last_step.MEMORY", 1)
        scarce = profile(vlm, PICTURES[:1], ["ablation"])["ablation"].scores
    finally:
        hook.remove()
    assert len(passes) == 1 + 24 + 1
    torch.testing.assert_close(scarce, whole, atol=1e-6, rtol=1e-4)
