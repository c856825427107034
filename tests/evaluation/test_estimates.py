import itertools

import numpy as np
import pytest
from scipy import stats

from rto.evaluation.statistics.estimates import (
    Estimate,
    bootstrap_weights,
    holm,
    paired_bootstrap,
    paired_difference,
    percentile_interval,
)


def test_bootstrap_weights_are_draws_with_replacement():
    w = bootstrap_weights(7, 20_000, seed=3)
    assert (w.sum(1) == 7).all()
    assert (w >= 0).all()
    assert w.mean(0) == pytest.approx(np.ones(7), abs=0.03)
    assert w.var(0) == pytest.approx(np.full(7, 6 / 7), abs=0.05)  # binomial(7, 1/7)
    assert np.cov(w[:, 0], w[:, 1])[0, 1] == pytest.approx(-1 / 7, abs=0.03)  # multinomial
    assert (w == bootstrap_weights(7, 20_000, seed=3)).all()
    assert (w != bootstrap_weights(7, 20_000, seed=4)).any()


def test_paired_bootstrap_agrees_with_the_paired_t_test():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=300)
    a, b = shared + rng.normal(0.06, 0.3, 300), shared + rng.normal(0, 0.3, 300)
    ours, theirs = paired_bootstrap(a, b, rounds=20_000), stats.ttest_rel(a, b)
    assert ours.value == pytest.approx(theirs.statistic * (a - b).std(ddof=1) / np.sqrt(300), rel=1e-12)
    assert ours.p == pytest.approx(theirs.pvalue, rel=0.05)
    low, high = theirs.confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.1 * (high - low) / 2)
    assert theirs.pvalue < 0.05 < stats.ttest_ind(a, b).pvalue  # what pairing is for


def test_paired_bootstrap_errs_as_often_as_it_says():
    """Under no difference, 5 % of 800 experiments of 40 prompts are called significant (± 2.6 standard errors)."""
    rng = np.random.default_rng(1)
    p = np.array([paired_bootstrap(*rng.normal(size=(2, 40)), rounds=200, seed=i).p for i in range(800)])
    assert 0.03 < (p < 0.05).mean() < 0.07


@pytest.mark.parametrize("n", [2, 5, 12])
def test_few_prompts_cannot_be_significant_by_luck(n):
    """All prompts agree: the p-value is that of the exact sign-flip test, by enumeration."""
    d = np.ones(n)
    flips = [abs(np.dot(signs, d)) >= n for signs in itertools.product([1, -1], repeat=n)]
    assert paired_bootstrap(d, np.zeros(n)).p == pytest.approx(np.mean(flips), rel=1e-12)


def test_no_difference_and_one_prompt():
    same = paired_bootstrap([1.0, 2.0], [1.0, 2.0])
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert paired_bootstrap([1.0], [0.0]).p == 1.0
    with pytest.raises(ValueError, match=r"one number a prompt for both: got \(2,\) and \(3,\)"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0])


def test_draws_around_another_centre_are_moved():
    draws = np.random.default_rng(0).normal(5.0, 1.0, 5000)
    moved = paired_difference(2.0, draws, prompts=100, centre=5.0)
    assert (moved.low + moved.high) / 2 == pytest.approx(2.0, abs=0.1)
    assert moved.high - moved.low == pytest.approx(2 * 1.96, rel=0.05)


def test_holm_by_hand():
    """0.01·4, then max(·, 0.02·3), max(·, 0.03·2), 0.4·1."""
    assert holm([0.03, 0.01, 0.4, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([0.04]).tolist() == [0.04]
    assert len(holm([])) == 0


def test_percentiles_and_estimate():
    low, high = percentile_interval(np.arange(1001.0))
    assert (low, high) == pytest.approx((25.0, 975.0))
    e = Estimate.of([1.0, 2.0, 6.0])
    assert (e.mean, e.se) == pytest.approx((3.0, np.sqrt(7 / 3)))
