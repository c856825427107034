"""Statistics of token rewards, against scipy, brute force, hand-made pairs and data that is calibrated by making."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from rto.data.pieces import pieces
from rto.inspection import statistics as inspection
from rto.inspection.statistics import (
    KINDS,
    Carried,
    Rewarded,
    RewardedPair,
    Share,
    by_word,
    calibrate,
    carried_by_kind,
    concordance,
    credit_of_words,
    fit_scale,
    kind_of,
    length_control,
    log_loss,
    report_on_credit,
    report_on_pairs,
    spearman,
    words,
)

exactly = pytest.approx


def side(*rewards: float, score: float | None = None, texts: tuple[str, ...] | None = None) -> Rewarded:
    texts = texts or tuple("x" for _ in rewards)
    return Rewarded(pieces=texts, labels=texts, rewards=np.array(rewards, dtype=float), score=score)


def pair(chosen: Rewarded, rejected: Rewarded) -> RewardedPair:
    return RewardedPair(prompt="p", chosen=chosen, rejected=rejected)


# --- rates


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 9), (311, 512), (1, 100_000)])
def test_interval_is_wilsons(hits, n):
    share, oracle = Share.of(hits, n), stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert share.rate == hits / n
    assert (share.low, share.high) == exactly((oracle.low, oracle.high), abs=1e-12)


def test_interval_of_half_a_hit_solves_wilsons_equation():
    share = Share.of(2.5, 7)
    for p in (share.low, share.high):
        assert (2.5 / 7 - p) ** 2 == exactly(stats.norm.ppf(0.975) ** 2 * p * (1 - p) / 7)
    assert share.low < 2.5 / 7 < share.high


def test_a_rate_of_nothing_is_undefined():
    share = Share.of(0, 0)
    assert share.n == 0
    assert all(map(math.isnan, (share.rate, share.low, share.high)))


def test_a_draw_is_half_a_hit():
    assert inspection.accuracy(np.array([2.0, -1.0, 0.0, 0.0])).rate == 0.5
    assert inspection.accuracy(np.array([0.0])).rate == 0.5


# --- length

BY_HAND = [
    pair(side(1, 1, 1), side(1)),  # chosen is longer: right,
    pair(side(1, 1, -2), side(1)),  # wrong,
    pair(side(2, 2, 1), side(1, 0)),  # right;
    pair(side(2), side(1, 0)),  # chosen is shorter: right,
    pair(side(0), side(1, 0, 0)),  # wrong;
    pair(side(1, 0), side(-1, 0)),  # as long as the other: right, and in neither half
]


def test_length_control_by_hand():
    margin = np.array([p.chosen.total - p.rejected.total for p in BY_HAND])
    assert margin.tolist() == [2, -1, 4, 1, -1, 2]
    found = length_control(BY_HAND, margin)
    assert (found.longer_wins.rate, found.longer_wins.n) == (3 / 5, 5)
    assert (found.where_longer.rate, found.where_longer.n) == (2 / 3, 3)
    assert (found.where_shorter.rate, found.where_shorter.n) == (1 / 2, 2)
    assert found.controlled.mean == exactly(7 / 12)
    assert found.controlled.se == exactly(math.sqrt((2 / 9) / 3 + (1 / 4) / 2) / 2)
    ranks = [stats.rankdata(x) for x in (margin, [2, 2, 1, -1, -2, 0])]
    assert found.margin_length == exactly(np.corrcoef(*ranks)[0, 1])
    ranks = [stats.rankdata(x) for x in ([3, 1, 0, 1, 5, 1, 2, 1, 0, 1, 1, -1], [3, 1, 3, 1, 3, 2, 1, 2, 1, 3, 2, 2])]
    assert found.reward_length == exactly(np.corrcoef(*ranks)[0, 1])


def test_a_reward_that_is_length_controls_to_chance():
    rng = np.random.default_rng(0)
    lengths = [(a, b) for a, b in rng.integers(1, 9, (300, 2)) if a != b]
    pairs = [pair(side(*np.ones(max(ab))), side(*np.ones(min(ab)))) for ab in lengths]
    pairs += [pair(p.rejected, p.chosen) for p in pairs[:40]]
    found = report_on_pairs(pairs, beta=0.1, clip=None)
    assert found.accuracy.rate == found.length.longer_wins.rate > 0.8
    assert found.length.controlled.mean == 0.5
    assert found.length.reward_length == exactly(1.0)


def test_one_kind_of_pair_leaves_control_undefined():
    found = report_on_pairs([BY_HAND[0]], beta=0.1, clip=1.0)
    assert math.isnan(found.length.controlled.mean)
    assert math.isnan(found.length.controlled.se)
    assert math.isnan(found.length.margin_length)


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([1], [2]), ([], [])])
def test_rank_correlation_of_what_does_not_vary(x, y):
    assert math.isnan(spearman(np.array(x), np.array(y)))


# --- calibration


def labelled(beta: float, n: int, seed: int) -> np.ndarray:
    """Margins of pairs whose labels are drawn with probability σ(β · margin)."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(0, 15, n)
    return np.where(rng.random(n) < 1 / (1 + np.exp(-beta * margin)), margin, -margin)


def test_what_is_calibrated_by_making_looks_calibrated():
    beta, n = 0.1, 40_000
    margin = labelled(beta, n, seed=1)
    found = calibrate(margin, beta, bins=20)
    assert sum(b.observed.n for b in found.bins) == n
    z = [
        (b.observed.rate - b.predicted) / math.sqrt(b.predicted * (1 - b.predicted) / b.observed.n) for b in found.bins
    ]
    assert max(map(abs, z)) < 3.5
    assert 0.3 < np.std(z) < 1.7  # as far off as chance makes it, no less
    p = 1 / (1 + np.exp(-beta * margin))
    deviation = 1 / math.sqrt((margin**2 * p * (1 - p)).sum())  # by Fisher's information
    assert abs(found.fitted_beta - beta) < 4 * deviation
    assert found.error == exactly(sum(b.observed.n / n * abs(b.observed.rate - b.predicted) for b in found.bins))
    assert found.error < 0.02


@pytest.mark.parametrize(("believed", "says"), [(0.4, -1), (0.025, 1)])
def test_overconfidence_and_its_opposite_are_seen(believed, says):
    found = calibrate(labelled(0.1, 20_000, seed=2), believed)
    assert found.fitted_beta == exactly(0.1, rel=0.1)
    assert says * sum(b.observed.rate - b.predicted for b in found.bins) > 0.3
    assert found.error > 0.05
    assert found.fitted_log_loss < found.log_loss


def test_calibration_by_hand():
    margin = np.array([4.0, -1.0, 0.0, 2.0])  # by size: 0 (half), −1 (wrong) | 2 (right), 4 (right)
    first, second = calibrate(margin, 0.5, bins=2).bins
    sigma = [1 / (1 + math.exp(-0.5 * m)) for m in (0, 1, 2, 4)]
    assert (first.predicted, second.predicted) == exactly((sum(sigma[:2]) / 2, sum(sigma[2:]) / 2))
    assert (first.observed.rate, second.observed.rate) == (0.25, 1.0)
    expected = [math.log1p(math.exp(-0.5 * m)) for m in margin]
    assert calibrate(margin, 0.5).log_loss == exactly(sum(expected) / 4)
    assert len(calibrate(margin, 0.5, bins=10).bins) == 4  # no empty ones


@pytest.mark.parametrize("seed", range(5))
def test_fitted_scale_is_the_likeliest(seed):
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.integers(-4, 5)
    margin = rng.normal(0.5, 1, 60) * size
    found = fit_scale(margin)
    oracle = optimize.minimize_scalar(
        lambda log_scale: np.log1p(np.exp(-np.exp(log_scale) * margin / size)).mean(),
        bounds=(-7, 7),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert found * size == exactly(math.exp(oracle.x), rel=1e-5)
    grid = found * np.linspace(0.5, 2, 2001)
    assert min(log_loss(margin, beta) for beta in grid) >= log_loss(margin, found) - 1e-15


@pytest.mark.parametrize(
    ("margin", "beta"),
    [([1.0, 2.0], math.inf), ([0.0, 2.0], math.inf), ([-1.0, -2.0], 0.0), ([1.0, -1.0], 0.0), ([0.0, 0.0], 0.0)],
)
def test_ends_of_the_scale(margin, beta):
    assert fit_scale(np.array(margin)) == beta


def test_log_loss_of_certainty():
    assert log_loss(np.array([1.0, 3.0]), math.inf) == 0
    assert log_loss(np.array([0.0, 3.0]), math.inf) == exactly(math.log(2) / 2)  # a draw stays a draw
    assert log_loss(np.array([1.0, -3.0]), 0.0) == exactly(math.log(2))


# --- who carries the reward


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        *((" ", "whitespace"), ("\n\n", "whitespace"), ("\u3000", "whitespace"), (".", "punctuation")),
        *((" ,", "punctuation"), ('."', "punctuation"), ("$", "punctuation"), ("—", "punctuation")),
        *((" the", "words"), ("3", "words"), ("n't", "words"), ("é", "words"), ("中", "words"), ("", "words")),
    ],
)
def test_kinds(piece, kind):
    assert kind_of(piece) == kind


def test_shares_by_hand():
    one = side(1.0, -2.0, 0.5, 0.5, texts=("Hi", ".", " ", ""))
    two = side(-4.0, 2.0, texts=("a", "b"))
    found = carried_by_kind([one, two])
    assert tuple(found) == KINDS
    assert found == {
        "last token": Carried(reward=2.5 / 10, tokens=2 / 6),
        "punctuation": Carried(reward=2 / 10, tokens=1 / 6),
        "whitespace": Carried(reward=0.5 / 10, tokens=1 / 6),
        "words": Carried(reward=5 / 10, tokens=2 / 6),
    }


def test_a_completion_that_was_cut_off_has_no_end():
    cut = replace(side(1.0, 3.0, texts=("Hi", ".")), ended=False)
    found = carried_by_kind([cut])
    assert found["last token"] == Carried(reward=0, tokens=0)
    assert found["punctuation"] == Carried(reward=0.75, tokens=0.5)


def test_shares_of_no_reward_are_undefined():
    found = carried_by_kind([side(0.0, 0.0)])
    assert math.isnan(found["words"].reward)
    assert found["words"].tokens == 0.5


# --- the clip, the score and β₁


def test_clip_by_hand():
    pairs = [pair(side(3.0, -0.5), side(1.0, 1.0)), pair(side(-2.0), side(-4.0))]
    found = report_on_pairs(pairs, beta=0.1, clip=1.0).clipping
    assert found.bound == 1.0
    assert found.fraction == 3 / 6  # 3, −2, −4; what is at the bound is not beyond it
    assert found.removed == exactly((2 + 1 + 3) / (3 + 0.5 + 1 + 1 + 2 + 4))
    # 0.5 against 2: wrong, where 2.5 was right; −1 against −1: a draw, where −2 was right
    assert found.accuracy.rate == 0.25
    assert report_on_pairs(pairs, beta=0.1, clip=None).accuracy.rate == 1.0
    assert report_on_pairs(pairs, beta=0.1, clip=None).clipping is None


def scored(token: list[tuple[float, float]], score: list[tuple[float, float]]) -> list[RewardedPair]:
    return [pair(side(a, score=x), side(b, score=y)) for (a, b), (x, y) in zip(token, score)]


def test_agreement_by_hand():
    pairs = scored([(1, 0), (1, 0), (0, 1), (2, 2)], [(5.0, 1.0), (0.0, 3.0), (1.0, 2.0), (1.0, 0.0)])
    found = report_on_pairs(pairs, beta=0.1, clip=None).agreement
    assert found.score_accuracy.rate == 2 / 4
    assert found.agree.rate == (1 + 0 + 1 + 0.5) / 4
    assert found.correlation == exactly(np.corrcoef(stats.rankdata([1, 1, -1, 0]), [4, 1, 2, 3])[0, 1])


def test_suggested_beta_gives_the_spread_that_it_states():
    rng = np.random.default_rng(3)
    token, score = rng.normal(0, 8, (50, 2)), rng.normal(3, 2, (50, 2))
    score[:, 0] += 100 * rng.random(50)
    score[:, 1] += score[:, 0] - 3  # what a prompt adds to both sides must not count
    pairs = scored(token.tolist(), score.tolist())
    found = report_on_pairs(pairs, beta=0.1, clip=5.0, fraction=0.25).suggested
    deviation = [math.sqrt(np.var(x, axis=1, ddof=1).mean()) for x in (token.clip(-5, 5), score)]
    assert (found.reward_spread, found.score_spread) == exactly(tuple(deviation))
    assert found.beta * deviation[0] == exactly(0.25 * deviation[1])


def test_no_beta_for_a_reward_that_does_not_differ():
    pairs = scored([(1, 1), (2, 2)], [(0.0, 1.0), (3.0, 1.0)])
    assert math.isnan(report_on_pairs(pairs, beta=0.1, clip=None).suggested.beta)


def test_without_scores_there_is_nothing_to_compare_with():
    found = report_on_pairs(BY_HAND, beta=0.1, clip=1.0)
    assert found.agreement is None
    assert found.suggested is None
    assert found.mean_length == exactly((3 + 1 + 3 + 1 + 3 + 2 + 1 + 2 + 1 + 3 + 2 + 2) / 12)
    with pytest.raises(ValueError, match="no pairs"):
        report_on_pairs([], beta=0.1, clip=1.0)


# --- words


@pytest.mark.parametrize(
    ("texts", "groups"),
    [
        (["I", " am", " so", "rry", ".", ""], [[0], [1], [2, 3, 4], [5]]),  # EOS is a word
        (["I", " am", "."], [[0], [1, 2]]),  # cut off: no EOS
        ([" ", "a", " ", "b"], [[0, 1], [2, 3]]),  # white space goes with what follows
        (["a ", "b ", "c"], [[0], [1], [2]]),  # or ends a word
        (["a", "\n", "\n", "b"], [[0], [1, 2, 3]]),
        (["a", " ", ""], [[0], [1], [2]]),
        (["", "", "é", "t", " b"], [[0, 1, 2, 3], [4]]),  # bytes of a character
        ([" ", "", "中"], [[0, 1, 2]]),
        ([""], [[0]]),
        ([], []),
    ],
)
def test_words_by_hand(texts, groups):
    assert words(texts) == groups


def random_text(rng: random.Random) -> str:
    alphabet = "ab .,'\n\t" + "é中ש😀\u200d\u0301\u202e\u2028\u00a0"
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30)))


@pytest.mark.parametrize("seed", range(40))
def test_words_are_what_white_space_separates(seed):
    rng = random.Random(seed)
    text = random_text(rng)
    cuts = [i for i in range(1, len(text)) if text[i].isspace() or text[i - 1].isspace() or rng.random() < 0.5]
    texts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    for ended in (texts, [*texts, ""]):
        groups = words(ended)
        assert [i for group in groups for i in group] == list(range(len(ended)))
        spelt = ["".join(ended[i] for i in group).strip() for group in groups]
        assert [word for word in spelt if word] == text.split()
    assert words([*texts, ""])[-1] == [len(texts)]


def test_sums_over_words():
    assert by_word(np.array([1.0, 2.0, 4.0, 8.0]), [[0, 1], [2], [3]]).tolist() == [3, 4, 8]


TEXTS = ["Thank", " you", ".", " No", "pe", ""]
GROUPS = [[0], [1, 2], [3, 4], [5]]


@pytest.mark.parametrize(
    ("span", "credit"),
    [
        ((0, 5, 1.0), [1, 0, 0, 0]),
        ((0, 10, 1.0), [0.5, 0.5, 0, 0]),
        ((6, 15, 3.0), [0, 1.5, 1.5, 0]),
        ((5, 7, 1.0), [0, 1, 0, 0]),  # white space belongs to no word
        ((13, 14, -2.0), [0, 0, -2, 0]),
        ((15, 15, -1.0), [0, 0, 0, -1]),  # what is missing is missed at the end
        ((0, 15, 3.0), [1, 1, 1, 0]),
    ],
)
def test_credit_of_words_by_hand(span, credit):
    assert words(TEXTS) == GROUPS
    assert credit_of_words(TEXTS, GROUPS, [span]).tolist() == credit


def test_no_credit_is_lost():
    rng = random.Random(5)
    spans = [(a, b, rng.gauss(0, 1)) for a in range(16) for b in range(a, 16)]
    assert credit_of_words(TEXTS, GROUPS, spans).sum() == exactly(sum(value for *_, value in spans))


@pytest.mark.parametrize("seed", range(5))
def test_concordance_counts_pairs_of_words(seed):
    rng = np.random.default_rng(seed)
    reward, credit = rng.integers(0, 4, 12).astype(float), rng.integers(0, 3, 12).astype(float)
    wins = [
        (reward[i] > reward[j]) + 0.5 * (reward[i] == reward[j])
        for i, j in itertools.permutations(range(12), 2)
        if credit[i] > credit[j]
    ]
    assert concordance(reward, credit) == exactly(sum(wins) / len(wins))
    assert math.isnan(concordance(reward, np.ones(12)))


def test_credit_is_compared_within_completions():
    rng = np.random.default_rng(7)
    credit = [rng.normal(size=8) for _ in range(30)]
    exact = report_on_credit([3 * c + 50 * rng.normal() for c in credit], credit)  # an offset for each prompt
    assert (exact.rank.mean, exact.concordance.mean, exact.completions) == exactly((1.0, 1.0, 30))
    against = report_on_credit([-c for c in credit], credit)
    assert (against.rank.mean, against.concordance.mean, against.total) == exactly((-1.0, 0.0, -1.0))
    chance = report_on_credit([rng.normal(size=8) for _ in credit], credit)
    assert abs(chance.rank.mean) < 4 * chance.rank.se
    assert abs(chance.concordance.mean - 0.5) < 4 * chance.concordance.se


def test_completions_without_credit_do_not_count():
    varied, flat = np.array([0.0, 1.0]), np.array([1.0, 1.0])
    found = report_on_credit([varied, varied, flat], [varied, flat, varied])
    assert found.completions == 1
    assert found.rank.mean == exactly(1.0)
    assert found.concordance.mean == exactly((1 + 0.5) / 2)  # a flat reward draws, and a flat credit asks nothing
    nothing = report_on_credit([flat], [flat])
    assert nothing.completions == 0
    assert math.isnan(nothing.rank.mean)
    assert math.isnan(nothing.concordance.mean)


# --- the text that each token adds


def spoken(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_bytes_are_the_text(tokenizer, seed):
    text = random_text(random.Random(seed)) * 3
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
    assert found[-1] == ""


def test_a_character_belongs_to_the_byte_that_ends_it(tokenizer):
    found = pieces(tokenizer, tokenizer("aé😀b").input_ids)
    assert found == ["a", "", "é", "", "", "", "😀", "b"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_a_real_tokenizer_are_the_text(stories, seed):
    from rto.models.loading import load_tokenizer

    tokenizer = load_tokenizer(stories)
    rng = random.Random(seed)
    text = "Once upon a time, there was a little girl named Lily. " + random_text(rng) + " She said: “Hi!”"
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert "".join(pieces(tokenizer, ids)) == spoken(tokenizer, ids) == text


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_tokens_are_what_the_tokenizer_reads(tokenizer, seed):
    """A policy may sample bytes that are no text."""
    rng = random.Random(seed)
    ids = [rng.randrange(3, len(tokenizer)) for _ in range(40)]
    assert "".join(pieces(tokenizer, ids)) == spoken(tokenizer, ids)
