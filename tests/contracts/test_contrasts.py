"""What must hold for every contrast: it needs a difference to act, and its rows say what passes of their own say."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import (
    PICTURES,
    PROMPTS,
    STRONG,
    Forced,
    batch_of,
    crossed,
    extended,
    logits,
    method_of,
    plain,
    vlm_of,
)
from vlmfix.decoders.index import HOMES
from vlmfix.decoding.blanks import blanked

BRANCHED = {name: spec for name, spec in STRONG.items() if name in HOMES and method_of(spec).passes > 1}
"""Methods with branches, that of SID among them, whose edits no other pass has."""
ALIKE = {
    "sid": "sid:kept=1",
    "avisc": "avisc:deviations=-10",
    "mod": "mod:kept=1,agreement=0",
    "mod-agreeing": "mod:kept=1,agreement=1",
}
"""Parameters with which the second row sees the whole picture."""
STEPS = 4


@pytest.mark.parametrize("name", BRANCHED)
@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_a_branch_that_says_the_same_changes_no_best_token(name, scale):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    (rule,) = method_of(BRANCHED[name]).plan(vlm, batch, vlm.layout(batch)).contrasts
    clean = scale * torch.randn(batch.rows, 500, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        new = rule.fuse(clean, clean.expand(len(rule.branches), *clean.shape), clean)
        assert torch.equal(new.argmax(dim=-1), clean.argmax(dim=-1))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("weight", [0.5, 3])
def test_a_second_row_that_sees_everything_gives_the_plain_tokens(family, name, weight):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    expected = plain(vlm, batch, steps=STEPS)
    weights = f"contrast={weight}" + f",complement={weight}" * name.startswith("mod")
    found = logits(vlm, batch, f"{ALIKE[name]},{weights}", steps=STEPS)
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


@torch.no_grad()
def in_turn(vlm, row, spec, clean_spec):
    """What a method says when the clean row and each branch pass alone, one after the other, anew for every token."""
    batch, said = batch_of(vlm, [row]), []
    (rule,) = method_of(spec).plan(vlm, batch, vlm.layout(batch)).contrasts
    rule = rule.begun()
    for step in range(STEPS):
        answer = torch.tensor([said], dtype=torch.long)
        forced = [Forced(torch.cat([answer, answer.new_tensor([[5]])], dim=1), batch.length)]
        clean = logits(vlm, batch, clean_spec, steps=step + 1, logits_processor=forced)[-1]
        others = []
        for branch in rule.branches:
            with blanked(vlm, branch.blank):
                others.append(vlm.model(**extended(branch.batch, answer), use_cache=False).logits[:, -1].float())
        said.append(int(rule.fuse(clean, torch.stack(others), clean).argmax()))
    return said


@pytest.mark.parametrize(
    ("family", "name"),
    crossed({name: spec for name, spec in BRANCHED.items() if name != "sid"}, families=("llava", "qwen2_5_vl")),
)
def test_branches_in_one_pass_say_what_they_say_in_turn(family, name):
    vlm = vlm_of(family)
    clean = "pai:gain=3,guidance=1,layers=all" if name == "pai" else "greedy"
    answers = vlm.generate(PICTURES, PROMPTS, decoder=BRANCHED[name], max_new_tokens=STEPS)
    for row, answer in enumerate(answers):
        assert list(answer.ids) == in_turn(vlm, row, BRANCHED[name], clean)[: answer.tokens]


def test_every_method_with_branches_is_here_and_may_wait():
    """A rule whose scores need no row of their own has nothing that could wait."""
    branched = {name for name, spec in STRONG.items() if name in HOMES and _has_branches(spec)}
    assert branched == set(BRANCHED)
    for name in branched:
        assert {"when", "margin"} <= set(type(method_of(BRANCHED[name])).__dataclass_fields__)


def _has_branches(spec):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    method = method_of(spec)
    return not method.refines and bool(method.plan(vlm, batch, vlm.layout(batch)).branches)
