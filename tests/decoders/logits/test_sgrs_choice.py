"""How SGRS draws candidates and judges them, without a model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessorList

from vlmfix.decoders.logits.sgrs import SGRS, Draws, Memory, gate
from vlmfix.decoding.draws import RowSampler

ALL = torch.tensor([True])


def judge(saliency, threshold, *, tries=3, logp=None, judged=ALL):
    """The gate on one row with given saliency scores in the order of trial; also the places that were asked about."""
    asked = []

    def score(place, wanted):
        asked.append(place)
        return torch.tensor([saliency[place]])

    logp = torch.tensor([logp or [-float(k) for k in range(len(saliency))]])
    picked, found = gate(logp, torch.tensor([threshold], dtype=torch.float64), judged, tries, score)
    return picked.item(), found.item(), asked


def test_the_first_good_candidate_is_taken_and_equality_is_good():
    assert judge([0.1, 0.5, 0.9], 0.5)[::2] == (1, [0, 1])
    assert judge([0.1, 0.4, 0.9], 0.5)[::2] == (2, [0, 1, 2])


def test_after_all_tries_the_best_of_all_candidates_is_taken_and_each_was_scored_once():
    picked, found, asked = judge([0.1, 0.1, 0.1, 0.3, 0.2], 0.6)
    assert (picked, asked) == (3, [0, 1, 2, 3, 4])
    assert found == pytest.approx(0.3)
    # The first that is good enough but was drawn behind the tries is not preferred to the best.
    assert judge([0.1, 0.1, 0.1, 0.7, 0.9], 0.6)[0] == 4


def test_tries_beyond_the_candidates_change_nothing():
    for saliency in ([0.1, 0.2, 0.7, 0.1], [0.1, 0.3, 0.2, 0.1]):
        assert judge(saliency, 0.6, tries=4) == judge(saliency, 0.6, tries=9)


def test_among_equal_scores_the_more_probable_is_taken():
    assert judge([0.1, 0.1, 0.1], 0.6, logp=[-3.0, -1.0, -2.0])[0] == 1


def test_a_score_that_is_no_number_is_a_rejection():
    nan = float("nan")
    assert judge([nan, 0.2], 0.0)[::2] == (1, [0, 1])
    assert judge([nan, nan], 0.0, logp=[-2.0, -1.0])[0] == 1


def test_zero_scores_are_never_rejected_at_the_start():
    assert judge([0.0, 0.0], 0.0)[::2] == (0, [0])


def test_forbidden_tokens_are_never_tried():
    assert judge([0.1, 0.2, 0.9], 0.6, logp=[-1.0, -2.0, -math.inf])[::2] == (1, [0, 1])


def test_rows_are_judged_on_their_own():
    saliency = torch.tensor([[0.1, 0.9, 0.0], [0.9, 0.0, 0.0], [0.1, 0.1, 0.1], [0.1, 0.2, 0.3]])
    wanted_at = []

    def score(place, wanted):
        wanted_at.append(wanted.tolist())
        return saliency[:, place]

    judged = torch.tensor([True, True, False, True])
    thresholds = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    picked, found = gate(torch.zeros(4, 3), thresholds, judged, 2, score)
    assert picked.tolist() == [1, 0, 0, 2]
    assert wanted_at == [[True, True, False, True], [True, False, False, True], [False, False, False, True]]
    assert found[2].isnan()


def test_more_strictness_never_means_fewer_rejections():
    torch.manual_seed(0)
    for _ in range(50):
        saliency, recent = torch.rand(5).tolist(), torch.rand(1).item()
        rejected = [len(judge(saliency, strictness * recent, tries=5)[2]) for strictness in (0.0, 0.3, 0.6, 0.9, 1.5)]
        assert rejected == sorted(rejected)


def test_thresholds_of_the_specification():
    scores = [0.30, 0.20, 0.25, 0.10, 0.15, 0.20]
    for window, threshold in ((5, 0.108), (6, 0.120), (0, 0.120), (1, 0.120)):
        memory = Memory(SGRS(window=window), 2)
        memory.scores = [scores, []]
        got = memory.thresholds(torch.device("cpu"))
        torch.testing.assert_close(got, torch.tensor([threshold, 0.0], dtype=torch.float64))


def test_the_memory_keeps_scores_of_judged_rows_only():
    memory = Memory(SGRS(), 3)
    memory.add(torch.tensor([0.5, 0.4, float("nan")]), torch.tensor([True, False, True]))
    assert memory.scores == [[0.5], [], []]


def test_presets():
    assert (SGRS().scope, SGRS().query_row) == ("post_image", "predictor")
    assert SGRS(preset="semantic").scope == "generated"
    assert SGRS(preset="official-code").query_row == "candidate"
    assert SGRS().judges
    assert not any(method.judges for method in (SGRS(preset="official-code"), SGRS(strictness=0.0), SGRS(top_k=1)))


# --- draws


def test_draws_are_without_replacement_by_what_is_left():
    """The joint distribution of the first two draws, against the product of renormalised probabilities."""
    from scipy.stats import chisquare

    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64)
    draws = Draws(SGRS(top_k=3), LogitsProcessorList(), [5], sampling=False)
    count, pairs = 6000, {}
    for _ in range(count):
        first, second, _ = draws(None, probabilities.log()[None])[1].tokens[0].tolist()
        pairs[first, second] = pairs.get((first, second), 0) + 1
    p = (probabilities[:3] / probabilities[:3].sum()).tolist()
    expected = {(i, j): count * p[i] * p[j] / (1 - p[i]) for i in range(3) for j in range(3) if i != j}
    assert set(pairs) == set(expected)
    assert chisquare([pairs[k] for k in expected], list(expected.values())).pvalue > 1e-3


@pytest.mark.parametrize("who", ["vlmfix", "transformers", "own"])
def test_candidates_are_the_most_probable_tokens_whoever_draws(who):
    torch.manual_seed(0)
    processors = LogitsProcessorList([RowSampler([1], torch.device("cpu"))] if who == "vlmfix" else [])
    draws = Draws(SGRS(top_k=4), processors, [1], sampling=who == "transformers")
    scores = torch.randn(1, 50)
    orders = set()
    for _ in range(40):
        got, candidates = draws(None, scores)
        assert torch.equal(got, scores)
        assert set(candidates.tokens[0].tolist()) == set(scores[0].topk(4).indices.tolist())
        torch.testing.assert_close(scores.gather(1, candidates.tokens), candidates.scores)
        orders.add(tuple(candidates.tokens[0].tolist()))
    assert len(orders) > 5


def test_the_vocabulary_may_be_smaller_than_the_candidates():
    draws = Draws(SGRS(top_k=9, draw="greedy"), LogitsProcessorList(), [0], sampling=False)
    assert draws(None, torch.tensor([[0.0, 2.0, 1.0]]))[1].tokens.tolist() == [[1, 2, 0]]
