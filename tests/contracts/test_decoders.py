"""What must hold for every decoder on every family; see `support.crossed` for the pairs that every run tests."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import NEUTRAL, STRONG, Forced, batch_of, close, crossed, logits, method_of, plain, vlm_of
from tests.tiny import TINY
from vlmfix.decoders import Chain, DecodingPlan, Greedy
from vlmfix.decoding.choice import MostProbable
from vlmfix.decoding.draws import RowSampler
from vlmfix.errors import IncompatibleDecodersError


@pytest.mark.parametrize(("family", "name"), crossed(NEUTRAL))
def test_neutral_parameters_give_the_plain_model(family, name):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    close(logits(vlm, batch, NEUTRAL[name]), plain(vlm, batch))


@pytest.mark.parametrize(("family", "name"), crossed(STRONG, turn=1))
def test_strong_parameters_change_every_row(family, name):
    vlm, steps = vlm_of(family), 2
    if name.startswith("kvsmooth"):
        steps = 3  # it acts on the token behind the first that it changes
    batch = batch_of(vlm)
    changed = (logits(vlm, batch, STRONG[name], steps=steps) - plain(vlm, batch, steps=steps)).abs()
    assert changed.amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize(("family", "name"), crossed(STRONG))
def test_a_padded_batch_equals_each_row_alone(family, name):
    vlm = vlm_of(family)
    together = logits(vlm, batch_of(vlm), STRONG[name])
    for row in (0, 1):
        close(together[:, row], logits(vlm, batch_of(vlm, [row]), STRONG[name])[:, 0])


FITTING = {name: spec for name, spec in STRONG.items() if name != "icd"}
"""Methods whose branches are no longer than the question itself."""


def test_a_static_cache_has_no_room_for_the_longer_prompt_of_a_branch():
    vlm = vlm_of("llava")
    with pytest.raises(IncompatibleDecodersError, match="the cache is static"):
        logits(vlm, batch_of(vlm), STRONG["icd"], cache_implementation="static")


@pytest.mark.parametrize(("family", "name"), crossed(FITTING, turn=1))
def test_a_static_cache_equals_the_dynamic_one(family, name):
    """With padding, and without it, where no mask is needed."""
    vlm = vlm_of(family)
    for rows in ((0, 1), (0,)):
        batch = batch_of(vlm, rows)
        static = logits(vlm, batch, STRONG[name], cache_implementation="static")
        close(static, logits(vlm, batch, STRONG[name]))


@pytest.mark.parametrize(("family", "name"), crossed(STRONG, turn=2))
def test_a_pass_without_a_cache_equals_cached_decoding(family, name):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    close(logits(vlm, batch, STRONG[name], use_cache=False), logits(vlm, batch, STRONG[name]))


@pytest.mark.parametrize(("family", "name"), crossed(STRONG, turn=0))
def test_a_beams_score_is_what_its_tokens_have_without_beams(family, name):
    """Beam search returns, for its best beam, the sum of the log-probabilities that the method gives its tokens."""
    vlm, beams, steps = vlm_of(family), 3, 4
    batch = batch_of(vlm)
    with method_of(STRONG[name]).applied(vlm, batch, num_beams=beams) as arguments:
        found = vlm.model.generate(
            **batch,
            **arguments,
            num_beams=beams,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = found.sequences[:, batch.length :]
    forced = logits(vlm, batch, STRONG[name], steps=steps, logits_processor=[Forced(tokens, batch.length)])
    expected = forced.log_softmax(dim=-1).gather(2, tokens.T[:, :, None]).sum(dim=(0, 2))
    close(found.sequences_scores, expected, 1e-3)


def ends(vlm):
    ids = vlm.model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


@pytest.mark.parametrize("family", TINY)
def test_a_row_without_a_picture_is_left_alone_by_branches(family):
    vlm = vlm_of(family)
    pictures = [batch_of(vlm, [0]).pictures[0], ()]
    try:
        batch = vlm.encode(["what is here?", "hello there"], pictures)
    except Exception as error:
        pytest.fail(f"the family cannot mix rows with and without pictures: {error}")
    for spec in ("vcd:plausibility=0.5", "inter:variance=0,plausibility=0.5"):
        scores = logits(vlm, batch, spec)
        assert scores[:, 0].isinf().any()  # the cut does something, so that it can be missed
        close(scores[:, 1], plain(vlm, batch)[:, 1])


@pytest.mark.parametrize("name", STRONG)
def test_a_finished_row_stays_finished(name):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    pad, end = vlm.model.generation_config.pad_token_id, ends(vlm)[0]

    class FirstRowEnds:
        def __call__(self, input_ids, scores):
            scores[:, end] = float("-inf")
            if input_ids.shape[1] - batch.length == 1:
                scores[0] = float("-inf")
                scores[0, end] = 0.0
            return scores

    with method_of(STRONG[name]).applied(vlm, batch) as arguments:
        sequences = vlm.model.generate(
            **batch, **arguments, max_new_tokens=6, do_sample=False, logits_processor=[FirstRowEnds()]
        )
    fresh = sequences[:, batch.length :]
    assert fresh[0, 1] == end
    assert (fresh[0, 2:] == pad).all()
    alone = logits(vlm, batch_of(vlm, [1]), STRONG[name], steps=6).argmax(-1)[:, 0]
    assert fresh[1].tolist() == alone.tolist()


@pytest.mark.parametrize("name", STRONG)
def test_processors_of_the_user_see_the_methods_scores(name):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    seen = []

    class Watch:
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    fused = logits(vlm, batch, STRONG[name], logits_processor=[Watch()])
    forbidden = torch.stack(seen).isinf() & ~fused.isinf()
    withheld = {*ends(vlm), vlm.family.image_token(vlm.model.config)}
    assert set(forbidden.nonzero()[:, 2].tolist()) <= withheld
    close(torch.stack(seen)[~forbidden], fused[~forbidden])


@pytest.mark.parametrize("name", ["vcd", "inter", "locore"])
def test_transformers_own_sampling_works(name):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with method_of(STRONG[name]).applied(vlm, batch) as arguments:
        drawn = vlm.model.generate(**batch, **arguments, do_sample=True, top_k=1, max_new_tokens=3, min_new_tokens=3)
    greedy = logits(vlm, batch, STRONG[name]).clone()
    greedy[..., ends(vlm)] = float("-inf")
    assert drawn[:, batch.length :].T[0].tolist() == greedy[0].argmax(-1).tolist()


@pytest.mark.parametrize("name", [*STRONG, "greedy"])
def test_answers_do_not_depend_on_neighbours_when_sampling(name):
    vlm = vlm_of("llava")
    spec = STRONG.get(name, name)
    pictures = [list(row) for row in batch_of(vlm).pictures]
    prompts = list(batch_of(vlm).prompts)
    options = {"decoder": spec, "max_new_tokens": 5, "temperature": 1.3, "seed": 7}
    together = vlm.generate(pictures, prompts, **options)
    alone = [vlm.generate([p], [q], **options)[0] for p, q in zip(pictures, prompts, strict=True)]
    assert [a.text for a in together] == [a.text for a in alone]
    other = vlm.generate(pictures, prompts, **{**options, "seed": 8})
    assert [a.text for a in together] != [a.text for a in other]


def test_the_row_sampler_draws_from_the_distribution():
    """A chi-square test of 20,000 draws against the probabilities."""
    from scipy.stats import chisquare

    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    sampler = RowSampler([3], torch.device("cpu"))
    draws = torch.stack([sampler(None, probabilities.log()[None]).argmax(-1)[0] for _ in range(20000)])
    counts = torch.bincount(draws, minlength=5)
    assert counts[4] == 0
    assert chisquare(counts[:4].numpy(), (probabilities[:4] * 20000).numpy()).pvalue > 1e-3


class EveryOther(Greedy):
    """A gate: rejects the best token and takes the second best."""

    def plan(self, vlm, batch, layout):
        class SecondBest(MostProbable):
            def __init__(self, newest, processors, *, sampling):
                self.processors = processors

            def chosen(self, said, scores, going):
                scores = self.processors(said, scores)
                return scores, scores.topk(2).indices[:, 1]

        return DecodingPlan(gate=SecondBest)


@pytest.mark.parametrize("name", ["locore", "vcd", "chain"])
def test_a_gate_sees_edits_and_branches(name):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    method = Chain(decoders=(method_of(STRONG[name]), EveryOther()))
    with method.applied(vlm, batch) as arguments:
        tokens = vlm.model.generate(**batch, **arguments, max_new_tokens=3)[:, batch.length :]
    forced = logits(vlm, batch, STRONG[name], logits_processor=[Forced(tokens, batch.length)])
    assert torch.equal(forced.topk(2).indices[..., 1], tokens.T)


def test_two_gates_do_not_go_together():
    vlm = vlm_of("llava")
    with pytest.raises(IncompatibleDecodersError, match="both decoders choose tokens"):
        logits(vlm, batch_of(vlm), Chain(decoders=(EveryOther(), EveryOther())))


class NoBeams(Greedy):
    def plan(self, vlm, batch, layout):
        return DecodingPlan(beams=False, compiles=False)


def test_a_method_without_beams_refuses_them_and_one_that_cannot_compile_says_so():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with pytest.raises(IncompatibleDecodersError, match="does not work with beam search"):
        vlm.generate([[batch.pictures[0][0]]], "what?", decoder=NoBeams(), num_beams=2)
    with NoBeams().applied(vlm, batch) as arguments:
        assert arguments == {"disable_compile": True}
