import numpy as np
import pytest

from rto.evaluation.statistics.winrate import length_bias, position_bias, preference_shares, win_rate


def test_every_complete_model_of_the_leaderboard(slim, leaderboard):
    complete = [name for name, rows in slim.items() if len(rows["index"]) == 805]
    assert len(complete) == 39
    for name in set(complete) - {"text_davinci_003"}:  # AlpacaEval 1's baseline is not on this leaderboard
        ours, theirs = win_rate(preference_shares(slim[name]["preference"])), leaderboard[name]
        for key in ("win_rate", "standard_error", "discrete_win_rate"):
            assert getattr(ours, key) == pytest.approx(float(theirs[key]), abs=1e-6), (name, key)
        counts = (ours.wins, ours.losses, ours.draws, ours.judged, ours.missing)
        assert counts == (*(int(theirs[k]) for k in ("n_wins", "n_wins_base", "n_draws", "n_total")), 0), name
    assert any(int(leaderboard[name]["n_draws"]) > 0 for name in complete if name in leaderboard)


def test_by_hand():
    y = preference_shares([2, 1, 1.5, 0, 1.8, None, float("nan")])
    found = win_rate(y)
    assert (found.wins, found.losses, found.draws, found.judged, found.missing) == (2, 1, 2, 5, 2)
    assert found.win_rate == pytest.approx(100 * (1 + 0 + 0.5 + 0.5 + 0.8) / 5)
    assert found.discrete_win_rate == pytest.approx(100 * (2 + 2 / 2) / 5)
    assert found.standard_error == pytest.approx(100 * np.std([1, 0, 0.5, 0.5, 0.8], ddof=1) / np.sqrt(5))


@pytest.mark.parametrize("bad", [0.5, 2.5, -1, 3])
def test_a_preference_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=rf"row 2: preference {bad:g} is not in \[1, 2\]"):
        preference_shares([1, 2, bad, 1])


def test_no_verdict_at_all():
    with pytest.raises(ValueError, match="no prompt has a verdict"):
        win_rate(np.array([np.nan]))


def judge_both_ways(quality, bias, rng):
    """Two games a prompt: the model is better by ``quality``, the first answer gains ``bias``; hard verdicts."""
    first = np.tile([True, False], len(quality))
    z = np.repeat(quality, 2) + np.where(first, bias, -bias) + rng.normal(0, 0.01, 2 * len(quality))
    return (z > 0).astype(float), first, np.repeat(np.arange(len(quality)), 2).tolist()


def test_position_bias_is_told_from_quality():
    rng = np.random.default_rng(0)
    better = rng.normal(3.0, 1.0, 400)  # far better: quality alone must not look like a bias
    fair = position_bias(*judge_both_ways(better, 0.0, rng))
    assert fair.first.mean == pytest.approx(0.5, abs=0.01)
    assert fair.agreement.mean > 0.99
    close = rng.normal(0.0, 1.0, 400)
    biased = position_bias(*judge_both_ways(close, 1.0, rng))
    decided_by_place = (np.abs(close) < 1).mean()  # the first answer wins both games of these, one of each other
    assert biased.first.mean == pytest.approx(0.5 + decided_by_place / 2, abs=0.01)
    assert biased.agreement.mean == pytest.approx(1 - decided_by_place, abs=0.01)
    assert biased.first.se == pytest.approx(0.5 * np.sqrt(decided_by_place * (1 - decided_by_place) / 400), rel=0.05)


def test_position_bias_by_hand():
    y = np.array([1.0, 0.5, 0.0, 0.0, np.nan, 1.0])
    found = position_bias(y, np.array([True, False, True, False, True, False]), ["a", "a", "b", "b", "c", "c"])
    assert found.first.mean == pytest.approx(np.mean([(1 + 0.5) / 2, (0 + 1) / 2, 0]))
    assert found.agreement.mean == pytest.approx(0.5)  # b: the model loses both; a: a win and a draw
    once = position_bias(np.array([1.0, 0.0]), np.array([True, True]), ["a", "b"])
    assert once.agreement is None


def test_length_bias():
    rng = np.random.default_rng(0)
    extra = np.round(rng.normal(0, 100, 2000))
    y = (rng.normal(0, 100, 2000) < extra).astype(float)
    found = length_bias(y, extra)
    kept = extra != 0
    assert found.prompts == kept.sum()
    assert found.longer.mean == pytest.approx(np.where(extra > 0, y, 1 - y)[kept].mean())
    assert found.longer.mean == pytest.approx(0.75, abs=0.03)  # P(Z < |X|) of two equal normals
    assert found.correlation > 0.4
    assert found.p < 1e-10
    assert length_bias(1 - y, extra).correlation == pytest.approx(-found.correlation)
    with pytest.raises(ValueError, match="unequal length"):
        length_bias(y, np.zeros(2000))


def test_gamed_outputs_show_in_the_diagnostics(slim):
    """gpt-4-turbo asked to be verbose beats itself asked to be concise, and the judge likes the longer answer."""
    rows = slim["gpt-3.5-turbo-1106"]
    found = length_bias(preference_shares(rows["preference"]), rows["len_output_2"] - rows["len_output_1"])
    assert found.correlation > 0.1
    assert found.p < 1e-3
