"""Statistics over seeds against scipy, and curves against numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from rto.studies.replicates import at_level, interval, over_optimisation, paired, smooth

A, B = [2.4, 3.1, 2.2, 2.9, 3.6], [2.1, 2.2, 2.3, 2.0, 3.0]


def test_interval_is_students() -> None:
    low, high = stats.t.interval(0.95, 4, loc=np.mean(A), scale=stats.sem(A))
    x = interval(A)
    assert (x.mean - x.half, x.mean + x.half, x.n) == (pytest.approx(low), pytest.approx(high), 5)
    assert interval([1.0, 3.0]).half == pytest.approx(12.706204736432095)  # t_{1, 0.975}, s / √2 = 1
    assert math.isnan(interval([1.0]).half)
    assert not interval([1.0]).excludes_zero


def test_paired_is_the_paired_t_test() -> None:
    found, oracle = paired(A, B), stats.ttest_rel(A, B)
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-12)
    low, high = oracle.confidence_interval(0.95)
    assert (found.difference.mean - found.difference.half) == pytest.approx(low)
    assert (found.difference.mean + found.difference.half) == pytest.approx(high)
    assert found.difference.excludes_zero == (found.p < 0.05)
    assert paired(A, A).p == 1
    assert paired([1.0, 2.0], [0.0, 1.0]).p == 0
    assert math.isnan(paired([1.0], [0.0]).p)
    with pytest.raises(ValueError, match=r"got \(5,\) and \(2,\)"):
        paired(A, [1.0, 2.0])


def test_smooth_is_a_running_mean() -> None:
    assert smooth([3, 6, 0, 9]).tolist() == [4.5, 3, 5, 4.5]
    assert smooth([7.0]).tolist() == [7.0]


def test_at_level_reads_the_first_crossing() -> None:
    assert at_level([0, 2, 4, 1, 9], [10, 20, 40, 0, 0], 3) == 30
    assert at_level([1, 2], [10, 20], 0.5) == 10
    assert at_level([0, 2], [10, 20], 2) == 20
    assert math.isnan(at_level([0, 2], [10, 20], 2.1))


def test_over_optimisation_looks_past_the_peak() -> None:
    found = over_optimisation(learned=[0, 1, 2, 5], gold=[0, 3, 2, 1])
    assert (found.fall, found.rise) == (2, 4)
    still_rising = over_optimisation(learned=[0, 1], gold=[0, 1])
    assert (still_rising.fall, still_rising.rise) == (0, 0)
