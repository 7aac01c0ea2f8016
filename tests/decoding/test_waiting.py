"""Contrasts that act where the clean row is unsure: their branches wait, and catch up in one pass."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import PICTURES, PROMPTS, Forced, batch_of, close, extended, logits, method_of, vlm_of
from tests.decoding.again import recording_on_cpu
from tests.decoding.test_running import at_work, forced
from tests.tiny import TINY
from vlmfix.decoders import parse
from vlmfix.decoding.passes import Passes

CONTRASTS = {
    "vcd": "vcd:contrast=1.5,plausibility=0",
    "icd": "icd:contrast=1.5,plausibility=0.01,place=question",
    "m3id": "m3id:decay=0.1,plausibility=0",
    "pai": "pai:gain=3,guidance=2,plausibility=0,layers=all",
    "sid": "sid:contrast=1.5,plausibility=0,kept=0.3,layer=0",
    "avisc": "avisc:contrast=1.5,plausibility=0",
    "mod": "mod:kept=0.3,agreement=0.001,contrast=1.5,plausibility=0",
    "inter": "inter:variance=0,plausibility=0",
}
EDITED = "spin:kept_share=0.5"
STEPS = 9
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 17], [13, 5, 14, 9, 15, 16, 8, 6, 18]])


def leads(clean: torch.Tensor) -> torch.Tensor:
    best = clean.double().softmax(dim=-1).sort(dim=-1, descending=True).values
    return best[..., 0] - best[..., 1]


def gated(spec: str, margin: float) -> str:
    return f"{spec},when=uncertain,margin={margin:.9f}"


@torch.no_grad()
def clean_leads(vlm, edits: str = "greedy") -> torch.Tensor:
    """(STEPS, 2) of both rows, behind the first of their tokens."""
    with at_work(vlm, batch_of(vlm), edits, STEPS) as call:
        return leads(forced(call, TOKENS[:, :-1]))


def between(values: torch.Tensor) -> float:
    """A margin with about half of the values on either side, and near to none."""
    ordered = values.flatten().sort().values
    middle = len(ordered) // 2
    return float(ordered[middle - 1] + ordered[middle]) / 2


@pytest.fixture
def widths(monkeypatch):
    """Tokens of every pass in which branches caught up."""
    seen = []
    whole = Passes.tokens

    def counted(passes, tokens):
        seen.append(tokens.shape[1])
        return whole(passes, tokens)

    monkeypatch.setattr(Passes, "tokens", counted)
    return seen


@torch.no_grad()
def said(vlm, margin: float, steps: int) -> tuple[list[list[int]], list[list[bool]]]:
    """What vcd says, and where it is sure: prompt and answer pass anew for every token, one row after the other."""
    batch = batch_of(vlm)
    (rule,) = method_of(gated(CONTRASTS["vcd"], margin)).plan(vlm, batch, vlm.layout(batch)).contrasts
    rows = [[] for _ in range(batch.rows)]
    sure = [[] for _ in range(batch.rows)]
    for _ in range(steps):
        answer = torch.tensor(rows, dtype=torch.long).view(batch.rows, -1)
        clean = vlm.model(**extended(batch, answer)).logits[:, -1].double()
        for row, lead in enumerate(leads(clean).tolist()):
            scores = clean[row]
            if lead < margin:
                noised = vlm.model(**extended(rule.branches[0].batch, answer)).logits[row, -1].double()
                scores = 2.5 * scores - 1.5 * noised
            sure[row].append(lead >= margin)
            rows[row].append(int(scores.argmax()))
    return rows, sure


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_tokens_are_those_of_the_contrast_where_the_row_is_unsure_and_its_own_elsewhere(family):
    vlm = vlm_of(family)
    margin = between(clean_leads(vlm))
    expected, sure = said(vlm, margin, 8)
    assert {*sure[0]} | {*sure[1]} == {True, False}
    spec = gated(CONTRASTS["vcd"], margin)
    answers = vlm.generate(PICTURES, PROMPTS, decoder=spec, max_new_tokens=8)
    for answer, ids, own in zip(answers, expected, sure, strict=True):
        assert list(answer.ids) == ids[: answer.tokens]
        assert answer.skipped == sum(own[: answer.tokens])
    (alone,) = vlm.generate(PICTURES[:1], PROMPTS[:1], decoder=spec, max_new_tokens=8)
    assert (alone.ids, alone.skipped) == (answers[0].ids, answers[0].skipped)
    assert "".join(vlm.stream(PICTURES[0], PROMPTS[0], decoder=spec, max_new_tokens=8)).strip() == alone.text
    assert [answer.skipped for answer in vlm.generate(PICTURES, PROMPTS, decoder="vcd", max_new_tokens=2)] == [None] * 2


@torch.no_grad()
def both_ways(vlm, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of the loop, and of transformers' generate, where all rows pass in all steps."""
    batch = batch_of(vlm)
    with at_work(vlm, batch, spec, STEPS) as call:
        found = forced(call, TOKENS[:, :-1])
    return found, logits(vlm, batch, spec, steps=STEPS, logits_processor=[Forced(TOKENS, batch.length)])


def seldom(found: torch.Tensor) -> float:
    """A margin below which some row leads in four of the steps."""
    fourth, fifth = found.amin(dim=1).sort().values[3:5].tolist()
    return (fourth + fifth) / 2


@pytest.mark.parametrize("family", TINY)
def test_branches_that_catch_up_say_what_they_say_in_every_step(family, widths):
    vlm = vlm_of(family)
    close(*both_ways(vlm, gated(CONTRASTS["vcd"], seldom(clean_leads(vlm)))))
    assert max(widths) > 1
    assert sum(widths) < STEPS


@pytest.mark.parametrize("name", [*CONTRASTS, "chain", "edited and sid", "beside icd"])
def test_every_contrast_may_wait(name, widths):
    vlm = vlm_of("llava")
    edits = {"pai": "pai:gain=3,guidance=1,layers=all", "chain": EDITED, "edited and sid": EDITED}
    margin = seldom(clean_leads(vlm, edits.get(name, "greedy")))
    spec = {
        "chain": f"{EDITED}+{gated(CONTRASTS['vcd'], margin)}",
        "edited and sid": f"{EDITED}+{gated(CONTRASTS['sid'], margin)}",
        "beside icd": f"{gated(CONTRASTS['vcd'], margin)}+{CONTRASTS['icd']}+{gated(CONTRASTS['inter'], margin / 2)}",
    }.get(name) or gated(CONTRASTS[name], margin)
    close(*both_ways(vlm, spec))
    assert 0 < sum(widths) < STEPS
    assert (max(widths) > 1) == (name not in ("sid", "edited and sid")), (
        "what a branch's edits choose, they choose in each step"
    )


@pytest.mark.parametrize("spec", [CONTRASTS["vcd"], f"{EDITED}+{CONTRASTS['sid']}"])
@torch.no_grad()
def test_a_line_that_stays_does_not_notice_that_others_leave(spec):
    vlm = vlm_of("llava")
    spec = gated(spec, seldom(clean_leads(vlm)))
    with at_work(vlm, batch_of(vlm, [1]), spec, STEPS) as call:
        expected = forced(call, TOKENS[1:])[:, 0]
    with at_work(vlm, batch_of(vlm), spec, STEPS) as call:
        call.prompt()
        found = [call.token(TOKENS[:, step]) for step in range(4)]
        call.keep(torch.tensor([1]))
        found += [call.token(TOKENS[1:, step]) for step in range(4, STEPS)]
    close(torch.stack([scores[-1] for scores in found]), expected[1:])


@torch.no_grad()
def test_the_clean_rows_of_branches_that_wait_pass_in_recorded_steps(widths, monkeypatch):
    vlm = vlm_of("llava")
    spec = f"{EDITED}+{gated(CONTRASTS['vcd'], seldom(clean_leads(vlm, EDITED)))}"
    expected, _ = both_ways(vlm, spec)
    monkeypatch.setattr("vlmfix.decoding.running.RECORDING", ("cpu",))
    with recording_on_cpu([vlm]) as made, at_work(vlm, batch_of(vlm), spec, STEPS) as call:
        close(forced(call, TOKENS[:, :-1]), expected)
    assert len(made) == 1


@pytest.mark.parametrize("spec", ["beam", "sgrs:top_k=2"])
def test_where_branches_cannot_wait_they_run_in_every_step(spec, widths):
    """And the rule still acts where the row is unsure: a margin of 0 never, so nothing is contrasted."""
    vlm = vlm_of("llava")
    plain, never, always = (
        [answer.ids for answer in vlm.generate(PICTURES, PROMPTS, decoder=f"{contrast}{spec}", max_new_tokens=4)]
        for contrast in ("", gated(CONTRASTS["vcd"], 0) + "+", CONTRASTS["vcd"] + "+")
    )
    assert plain == never != always
    assert not widths


def test_a_rule_in_every_step_is_written_as_before_there_were_others():
    for spec in CONTRASTS.values():
        method = parse(spec)
        assert "when" not in method.spec()
        assert method.when == "always"
        chosen = parse(f"{spec},when=uncertain")
        assert parse(chosen.spec()) == chosen != method
        assert chosen.spec().startswith(f"{method.spec()},")
        assert chosen.spec().endswith(",when=uncertain,margin=0.8")
