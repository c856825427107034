import gzip
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import ks_2samp
from sources import read_csv

from rto.evaluation.statistics.arena_hard import (
    STYLE,
    VERDICTS,
    Games,
    Outcome,
    arena_scores,
    markdown_counts,
    outcome,
    pool,
    style_controlled,
    style_difference,
)
from rto.evaluation.statistics.estimates import bootstrap_weights, percentile_interval


def bootstrap_by_question(games: Games, rounds: int, seed: int) -> np.ndarray:
    return games.resample_questions(bootstrap_weights(len(games.questions), rounds, seed))


SHARE = {"model_b": 1.0, "tie": 0.5, "model_a": 0.0}


@pytest.fixture(scope="session")
def published(arena_dir):
    with gzip.open(arena_dir / "bootstrap_stats_arena_hard.jsonl.gz", "rt") as file:
        return {row["model"]: row for row in map(json.loads, file)}


@pytest.fixture(scope="session")
def games(battles):
    return pool(
        [
            Outcome(model=b["model_b"], question=b["question_id"], share=SHARE[b["winner"]], battles=1)
            for b in battles
            if b["model_a"] == "gpt-4-0314"
        ]
    )


@pytest.fixture(scope="session")
def one_model(battles):
    rows = [b for b in battles if b["model_b"] == "gpt-4-0613"]
    return pool([Outcome(model="m", question=b["question_id"], share=SHARE[b["winner"]], battles=1) for b in rows])


def test_the_published_score_of_gpt_4_0613(games):
    score = arena_scores(games, games.once)[0, games.models.index("gpt-4-0613")]
    assert score == pytest.approx(37.90, abs=0.01)


def test_scores_are_bradley_terry(games, battles):
    """The general maximum-likelihood fit over all nine models and the baseline, by another optimiser."""
    names = ["gpt-4-0314", *games.models]
    a, b = (np.array([names.index(row[key]) for row in battles]) for key in ("model_a", "model_b"))
    y = np.array([SHARE[row["winner"]] for row in battles])

    def loss(theta):
        z = theta[b] - theta[a]
        slope = expit(z) - y
        return (np.logaddexp(0, z) - y * z).sum(), np.bincount(b, slope, 10) - np.bincount(a, slope, 10)

    theta = minimize(loss, np.zeros(10), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}).x
    expected = 100 * expit(theta[1:] - theta[0])
    assert arena_scores(games, games.once)[0] == pytest.approx(expected, abs=1e-4)


def test_published_bounds_are_percentiles_of_the_published_rounds(published):
    assert len(published) == 28
    for row in published.values():
        assert percentile_interval(np.array(row["results"], dtype=float)) == pytest.approx(
            (row["lower"], row["upper"]), abs=1e-9
        )


def test_rounds_over_questions_are_the_published_rounds(one_model, published):
    """The 1000 published bootstrap scores of gpt-4-0613 and ours come from one distribution."""
    ours = arena_scores(one_model, bootstrap_by_question(one_model, 4000, seed=0))[:, 0]
    theirs = np.array(published["gpt-4-0613"]["results"])
    assert ks_2samp(ours, theirs).pvalue > 0.01
    assert percentile_interval(ours) == pytest.approx((34.299, 41.8), abs=0.5)
    other = arena_scores(one_model, one_model.resample_battles(2000, seed=0))[:, 0]
    assert ks_2samp(other, theirs).pvalue < 1e-6  # and it can tell


def test_rounds_over_battles_have_the_leaderboard_bounds(one_model, arena_dir):
    """Published with 100 rounds: a 2.5 % quantile of 100 rounds of deviation 1.3 has an error of about 0.35."""
    row = next(r for r in read_csv(arena_dir / "leaderboard_v0.1_20240731.csv") if r["model"] == "gpt-4-0613")
    ours = arena_scores(one_model, one_model.resample_battles(2000, seed=0))[:, 0]
    assert percentile_interval(ours) == pytest.approx((float(row["rating_q025"]), float(row["rating_q975"])), abs=0.7)
    assert float(row["rating_q025"]) == 35.6


@pytest.mark.parametrize(("verdict", "share", "battles"), [("A>>B", 1, 3), ("A>B", 1, 1), ("A=B", 0.5, 1)])
def test_verdicts_by_hand(verdict, share, battles):
    """The baseline is A in round 0, the model in round 1."""
    mirrored = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B"}[verdict]
    for said, round_, expected in (
        (verdict, 0, 1 - share),
        (verdict, 1, share),
        (mirrored, 0, share),
        (mirrored, 1, 1 - share),
    ):
        assert outcome("m", "q", said, round_=round_) == Outcome(
            model="m", question="q", share=expected, battles=battles
        )
    assert len(VERDICTS) == 5
    for nothing in (None, "", "A", "A>C", "a>b", "[[A>B]]"):
        assert outcome("m", "q", nothing, round_=0) is None


def test_strong_verdicts_count_three_times():
    games = pool(
        [outcome("m", "1", "B>>A", round_=0), outcome("m", "1", "B>A", round_=1), outcome("m", "2", "A=B", round_=0)]
    )
    assert arena_scores(games, games.once)[0, 0] == pytest.approx(100 * (3 * 1 + 1 * 0 + 1 * 0.5) / 5)


def test_all_wins_is_100_and_not_an_error():
    games = pool([outcome("m", str(i), "A>B", round_=1) for i in range(9)])
    assert arena_scores(games, games.once)[0, 0] == 100.0
    assert (arena_scores(games, bootstrap_by_question(games, 50, 0)) == 100.0).all()


def test_a_question_is_drawn_with_all_its_games(games):
    drawn = bootstrap_by_question(games, 3, seed=1)
    for row in drawn:
        for q in range(0, len(games.questions), 50):
            assert len(set((row / games.battles)[games.question == q])) == 1


def test_a_drawn_question_brings_all_copies_of_its_verdicts():
    games = pool(
        [outcome("m", "1", "B>>A", round_=0), outcome("m", "1", "A=B", round_=1), outcome("m", "2", "A>B", round_=0)]
    )
    assert games.resample_questions(np.array([[2.0, 0.0], [1.0, 1.0]])).tolist() == [[6, 2, 0], [3, 1, 1]]


def test_markdown_is_counted_as_published(arena_answers):
    for row in arena_answers:
        counts = markdown_counts(row["answer"])
        assert (counts["headers"], counts["lists"], counts["bold"]) == (
            row["header_count"],
            row["list_count"],
            row["bold_count"],
        ), row["question_id"]


def test_markdown_by_hand():
    text = (
        "# one\n#no\n####### no\n## two\n- a\n  * b\n3. c\n**x** and __y__ ** z\n```\n# code\n- code\n**code**\n```\n"
    )
    assert markdown_counts(text) == {"headers": 2, "lists": 3, "bold": 2}


def simulated(style_effect, models, questions, seed, abilities):
    """Battles whose log-odds are ability plus the effect of each standardised style difference."""
    rng = np.random.default_rng(seed)
    games, style = [], {}
    for m, ability in zip(models, abilities):
        a = rng.poisson([400, 3, 8, 6], (questions, 4))
        b = rng.poisson(np.array([500, 5, 9, 4]) * (1 + 0.2 * ability), (questions, 4))
        for q in range(questions):
            style[m, str(q)] = style_difference(a[q], b[q])
    z = np.array(list(style.values()))
    z = (z - z.mean(0)) / z.std(0)
    for (m, q), row in zip(style, z):
        baseline_wins = rng.random() < expit(row @ style_effect - abilities[models.index(m)])
        games.append(Outcome(model=m, question=q, share=0.0 if baseline_wins else 1.0, battles=1))
    return pool(games, style)


def test_planted_style_effects_are_recovered():
    """Over six simulated pools, within three standard errors of their mean; the plain scores are nowhere near."""
    effect, truth = np.array([0.8, -0.3, 0.0, 0.5]), 100 * expit(np.array([0.0, 1.0, -0.7]))
    pools = [simulated(effect, ["a", "b", "c"], 3000, seed, [0.0, 1.0, -0.7]) for seed in range(6)]
    found = [style_controlled(games, games.once) for games in pools]
    assert np.mean([f.style[0] for f in found], axis=0) == pytest.approx(effect, abs=0.06)
    assert np.mean([f.scores[0] for f in found], axis=0) == pytest.approx(truth, abs=2.0)
    plain = np.mean([arena_scores(games, games.once)[0] for games in pools], axis=0)
    assert np.abs(plain - truth).max() > 4


def official_design(games):
    """Design and labels as in the official utils_math.py: every battle written out twice, a tie once for each side."""
    x, y = [], []
    for i in np.repeat(np.arange(len(games.share)), games.battles):
        row = np.zeros(1 + len(games.models) + 4)
        row[0], row[1 + games.model[i]] = math.log(10), -math.log(10)
        row[-4:] = games.style[i]
        for copy in range(2):
            x.append(row)
            y.append({0.0: 1, 1.0: 0, 0.5: 1 - copy}[games.share[i]])
    x, y = np.array(x), np.array(y)
    x[:, -4:] = (x[:, -4:] - x[:, -4:].mean(0)) / x[:, -4:].std(0)
    return x, y


@pytest.fixture(scope="session")
def gpt_4_0613(battles, arena_answers):
    """The real battles of gpt-4-0613 with the real style of both answers."""
    counts = {
        (row["model"], row["question_id"]): [row[k] for k in ("token_len", "header_count", "list_count", "bold_count")]
        for row in arena_answers
    }
    rows = [b for b in battles if b["model_b"] == "gpt-4-0613"]
    style = {
        ("gpt-4-0613", b["question_id"]): style_difference(
            counts["gpt-4-0314", b["question_id"]], counts["gpt-4-0613", b["question_id"]]
        )
        for b in rows
    }
    shares = [
        Outcome(model="gpt-4-0613", question=b["question_id"], share=SHARE[b["winner"]], battles=1) for b in rows
    ]
    return pool(shares, style)


def test_style_control_matches_an_independent_logistic_fit(gpt_4_0613):
    linear = pytest.importorskip("sklearn.linear_model")
    several = simulated(np.array([0.8, -0.3, 0.0, 0.5]), ["a", "b"], 300, 1, [0.5, -0.5])
    several = replace(several, battles=np.tile([1, 3, 1], 200), share=np.tile([1.0, 0.5, 0.0, 0.0], 150))
    for games in (gpt_4_0613, several):
        x, y = official_design(games)
        fit = linear.LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x, y).coef_[0]
        models = len(games.models)
        ours = style_controlled(games, games.once)
        expected = 100 / (1 + 10 ** (fit[0] - fit[1 : 1 + models]))
        assert ours.scores[0] == pytest.approx(expected, abs=1e-3)
        assert ours.style[0] == pytest.approx(fit[-4:], abs=1e-4)


def test_a_round_is_the_fit_to_its_battles(gpt_4_0613):
    """Each row of weights gives what the battles written out that often give (with the whole pool's standardising)."""
    weights = bootstrap_by_question(gpt_4_0613, 4, seed=0)
    rounds = style_controlled(gpt_4_0613, weights)
    for i in range(4):
        alone = style_controlled(gpt_4_0613, weights[i : i + 1])
        assert rounds.scores[i] == pytest.approx(alone.scores[0], abs=1e-6)
    x, y = official_design(gpt_4_0613)
    linear = pytest.importorskip("sklearn.linear_model")
    model = linear.LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit = model.fit(x, y, sample_weight=np.repeat(weights[0], 2)).coef_[0]
    assert rounds.scores[0, 0] == pytest.approx(100 / (1 + 10 ** (fit[0] - fit[1])), abs=1e-3)


def test_style_that_never_differs_is_no_style(gpt_4_0613):
    flat = replace(gpt_4_0613, style=np.zeros_like(gpt_4_0613.style))
    found = style_controlled(flat, flat.once)
    assert (found.style == 0).all()
    assert found.scores[0, 0] == pytest.approx(37.90, abs=0.1)  # the ridge moves it a little towards 50
    with pytest.raises(ValueError, match="token and markdown counts"):
        style_controlled(replace(gpt_4_0613, style=None), gpt_4_0613.once)


def test_style_difference_by_hand():
    assert len(STYLE) == 4
    assert style_difference([100, 0, 4, 1], [300, 0, 0, 2]) == pytest.approx([-200 / 401, 0, 4 / 5, -1 / 4])
