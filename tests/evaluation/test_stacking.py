"""What two rewards of one pair say together, against labels drawn from known weights."""

import math

import numpy as np
import pytest

from rto.inspection.stacking import compare_fresh, stack


def pairs_of(token_weight: float, score_weight: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Margins of n pairs whose labels follow σ(w_d Δd + w_s Δs), chosen less rejected; the two margins correlate."""
    rng = np.random.default_rng(seed)
    d = rng.normal(size=n) * 3.0
    s = 0.3 * d + rng.normal(size=n)
    chosen = rng.random(n) < 1 / (1 + np.exp(-(token_weight * d + score_weight * s)))
    sign = np.where(chosen, 1.0, -1.0)
    return d * sign, s * sign


@pytest.mark.parametrize(("token", "score"), [(0.4, 1.0), (0.0, 1.0), (0.4, 0.0), (0.0, 0.0), (-0.3, 0.8)])
def test_intervals_cover_the_weights_that_labels_were_drawn_with(token: float, score: float) -> None:
    covered = []
    for seed in range(20):
        found = stack(*pairs_of(token, score, 300, seed))
        assert found is not None
        covered += [w.low <= true <= w.high for w, true in ((found.token_weight, token), (found.score_weight, score))]
    assert np.mean(covered) >= 0.85  # of 40 intervals of 95 %: fewer than 34 has a chance of 1 in 300


def test_the_ratio_is_that_of_the_weights() -> None:
    found = stack(*pairs_of(0.4, 1.0, 20_000, seed=1))
    assert found is not None
    assert found.ratio == pytest.approx(0.4, rel=0.1)


def test_a_source_that_adds_nothing_shows_in_the_log_loss() -> None:
    useless, useful = stack(*pairs_of(0.0, 1.0, 4000, seed=2)), stack(*pairs_of(0.5, 1.0, 4000, seed=2))
    assert useless is not None
    assert useful is not None
    assert useless.token_adds.low < 0 < useless.score_adds.low
    assert useful.token_adds.low > 0
    assert useful.log_loss["both"] < min(useful.log_loss["token"], useful.log_loss["score"]) < math.log(2)


def test_cross_fitting_promises_nothing_on_labels_that_are_noise() -> None:
    losses = [stack(*pairs_of(0.0, 0.0, 200, seed)).log_loss["both"] for seed in range(20)]  # type: ignore[union-attr]
    assert np.mean(losses) >= math.log(2)  # in-sample it would be below


def test_scales_do_not_matter() -> None:
    d, s = pairs_of(0.4, 1.0, 500, seed=3)
    a, b = stack(d, s), stack(100 * d, 0.01 * s)
    assert a is not None
    assert b is not None
    assert b.ratio == pytest.approx(a.ratio * 1e-4, rel=1e-6)
    assert b.log_loss == pytest.approx(a.log_loss, rel=1e-9)


def test_separable_and_constant_margins_are_finite() -> None:
    ones = np.ones(100)
    for d, s in ((ones, ones), (ones, 0 * ones), (0 * ones, 0 * ones)):
        found = stack(d, s)
        assert found is not None
        assert all(map(math.isfinite, found.log_loss.values()))


def test_few_pairs_are_not_stacked() -> None:
    assert stack(np.ones(19), np.ones(19)) is None


def test_the_room_of_fresh_labels_is_what_is_known_of_them_less() -> None:
    """Of labels by known weights both know ln 2 less their entropy; of coin flips nothing."""
    d, s = pairs_of(0.5, 1.0, 4000, seed=4)
    p = 1 / (1 + np.exp(-(0.5 * d + s)))  # of the chosen side: its entropy is the same for either sign
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    held_out, flips = stack(d, s), stack(*pairs_of(0.0, 0.0, 4000, seed=5))
    assert held_out is not None
    assert flips is not None
    assert held_out.knows.low <= math.log(2) - entropy <= held_out.knows.high
    found = compare_fresh(held_out, flips)
    assert found.room.low <= math.log(2) - entropy <= found.room.high
    assert found.room.low > 0
    same = compare_fresh(held_out, held_out)
    assert same.room.value == 0
    assert same.room.high == pytest.approx(math.sqrt(2) * (held_out.knows.high - held_out.knows.value))
