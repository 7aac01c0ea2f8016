import math

import numpy as np
import pytest
import torch
from scipy import stats

from vlmfix.heads.moments import Halves, Moments, rank_correlation


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
