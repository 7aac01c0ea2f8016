import math

import numpy as np
import pytest
import torch
from scipy import stats

from vlmfix.heads.moments import Contrast, Halves, Moments, rank_correlation


@pytest.fixture
def values():
    return torch.randn(37, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 4 + 1000


@pytest.mark.parametrize("size", [1, 2, 5, 37])
def test_batches_give_mean_and_standard_error_of_all(values, size):
    found = Moments.empty(3, 5)
    for part in values.split(size):
        found = found.added(part)
    assert found.count == 37
    torch.testing.assert_close(found.mean, values.mean(0))
    np.testing.assert_allclose(found.stderr, stats.sem(values.numpy(), axis=0), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 3, 4, 37])
def test_halves_are_every_other_picture_whatever_the_batches(values, size):
    found = Halves(Moments.empty(3, 5), Moments.empty(3, 5))
    for part in values.split(size):
        found = found.added(part)
    torch.testing.assert_close(found.even.mean, values[::2].mean(0))
    torch.testing.assert_close(found.odd.mean, values[1::2].mean(0))
    torch.testing.assert_close(found.whole.mean, values.mean(0))
    r = stats.spearmanr(values[::2].mean(0).flatten(), values[1::2].mean(0).flatten()).statistic
    assert found.reliability == pytest.approx(2 * r / (1 + r) if r > 0 else r)


def test_a_picture_that_says_nothing_is_left_out(values):
    values[4, 1, 1] = math.nan
    found = Halves(Moments.empty(3, 5), Moments.empty(3, 5)).added(values)
    rest = torch.cat([values[:4], values[5:]])
    assert found.whole.count == 36
    torch.testing.assert_close(found.whole.mean, rest.mean(0))


def test_little_data_has_no_error_and_no_reliability(values):
    one = Halves(Moments.empty(3, 5), Moments.empty(3, 5)).added(values[:1])
    assert one.reliability is None
    assert bool(one.whole.stderr.isnan().all())
    assert Halves(Moments.empty(3, 5), Moments.empty(3, 5)).added(torch.ones(8, 3, 5)).reliability is None


def test_rank_correlation():
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 90])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.ones(3)) is None


def words_of_pictures(pictures, seed=5):
    """For each picture the scores (words, 3, 5) of its words of two kinds; some pictures have none of the second."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (pictures, 2), generator=generator).tolist()
    return [
        [
            torch.randn(count + (not kind), 3, 5, generator=generator, dtype=torch.float64) + 7
            for kind, count in enumerate(both)
        ]
        for both in counts
    ]


def gathered(kinds):
    """(L, H, 4) of one picture."""
    parts = [
        part for words in kinds for part in (words.sum(0), torch.full((3, 5), float(len(words)), dtype=words.dtype))
    ]
    return torch.stack(parts, dim=-1)


@pytest.mark.parametrize("size", [1, 4, 29])
def test_a_contrast_is_of_words_and_its_error_of_pictures(size):
    pictures = words_of_pictures(29)
    found = Contrast.empty(3, 5)
    for part in torch.stack([gathered(kinds) for kinds in pictures]).split(size):
        found = found.added(part)
    every = [torch.cat([kinds[kind] for kinds in pictures]) for kind in (0, 1)]
    mean = every[0].mean(0) - every[1].mean(0)
    assert found.count == 29
    torch.testing.assert_close(found.mean, mean)
    # what every picture moves the difference by, to first order
    moves = [
        (kinds[0] - every[0].mean(0)).sum(0) / len(every[0]) - (kinds[1] - every[1].mean(0)).sum(0) / len(every[1])
        for kinds in pictures
    ]
    expected = (torch.stack(moves).square().sum(0) * 29 / 28).sqrt()
    torch.testing.assert_close(found.stderr, expected)


def test_a_contrast_of_one_word_of_each_kind_is_a_mean_of_differences(values):
    ones = torch.ones_like(values)
    both = torch.stack([values, ones, values.flip(0), ones], dim=-1)
    left, right = Contrast.empty(3, 5).added(both[:20]), Contrast.empty(3, 5).added(both[20:])
    plain = Moments.empty(3, 5).added(values - values.flip(0))
    torch.testing.assert_close(left.merged(right).mean, plain.mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(left.merged(right).stderr, plain.stderr)


def test_a_contrast_of_one_kind_alone_is_not_known():
    kinds = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(8, 3, 5, 4)
    halves = Halves(Contrast.empty(3, 5), Contrast.empty(3, 5)).added(kinds)
    assert halves.whole.count == 8
    assert bool(halves.whole.mean.isnan().all())
    assert halves.reliability is None
    assert Contrast.empty(3, 5).added(kinds[:0]).count == 0
