"""Eq. 4.7 against plain Python loops, and each trap that a public implementation has fallen into."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from rto.functional.rewards import (
    PLACEMENTS,
    AdaptiveKL,
    RTOReward,
    RunningMoments,
    on_sentences,
    place,
    shares,
)

B, T = 6, 9
PARTS = ("token", "kl", "score")


def ragged(seed: int, rows: int = B, width: int = T):
    """Inputs of an `RTOReward`, responses of 1 to ``width`` tokens, NaN on all padding."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[0], lengths[1] = width, 1
    mask = torch.arange(width) < lengths[:, None]

    def numbers(scale=1.0):
        x = torch.randn(rows, width, generator=g, dtype=torch.float64) * scale
        return x.masked_fill(~mask, torch.nan)

    return {
        "policy_logp": numbers() - 2,
        "ref_logp": numbers() - 2,
        "token_logratio": numbers(1.5),
        "scores": torch.randn(rows, generator=g, dtype=torch.float64),
        "ended": torch.rand(rows, generator=g) < 0.5,
        "mask": mask,
        "anchors": torch.rand(rows, width, generator=g) < 0.3,  # padding may be marked too: it must not matter
    }


def equation_4_7(reward, x):
    """One token at a time, with floats, from the text of the paper."""
    rows = {name: [] for name in PARTS}
    for b in range(len(x["mask"])):
        length = sum(x["mask"][b].tolist())
        token, kl, score = [0.0] * T, [0.0] * T, [0.0] * T
        owed = 0.0
        for t in range(length):
            if reward.dpo_coef != 0:
                rho = x["token_logratio"][b, t].item()
                if reward.token_reward_clip is not None:
                    rho = max(min(rho, reward.token_reward_clip), -reward.token_reward_clip)
                owed += reward.dpo_coef * rho
            if x["anchors"][b, t].item() or t == length - 1:
                token[t], owed = owed, 0.0
            kl[t] = -reward.kl_coef * (x["policy_logp"][b, t].item() - x["ref_logp"][b, t].item())
        if reward.shaping:
            token[length - 1] -= math.fsum(token)
        score[length - 1] = reward.score_coef * x["scores"][b].item()
        if not x["ended"][b].item():
            score[length - 1] -= reward.missing_eos_penalty
        for name, row in zip(PARTS, (token, kl, score)):
            rows[name].append(row)
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"token_reward_clip": None, "dpo_coef": 0.3},
        {"token_reward_clip": 0.25, "kl_coef": 0.2, "score_coef": 2.5},
        {"shaping": True, "dpo_coef": 1.0},
        {"missing_eos_penalty": 1.5},
        {"dpo_coef": 0.0, "kl_coef": 0.5},
        {"score_coef": 0.0, "kl_coef": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_equation_4_7(settings, seed):
    reward, x = RTOReward(**settings), ragged(seed)
    terms, expected = reward(**x), equation_4_7(RTOReward(**settings), x)
    for name in PARTS:
        torch.testing.assert_close(getattr(terms, name), expected[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.total, sum(expected.values()), rtol=1e-12, atol=1e-12)
    assert (terms.total[~x["mask"]] == 0).all()


def test_a_worked_example():
    """β₁ = ½, clip 1, β₂ = ¼, β₃ = 2, on a response of three tokens in four columns; every number by hand."""
    mask = torch.tensor([[True, True, True, False]])
    terms = RTOReward(dpo_coef=0.5, kl_coef=0.25, score_coef=2.0, token_reward_clip=1.0)(
        policy_logp=torch.tensor([[-1.0, -2.0, -3.0, 0.0]]),
        ref_logp=torch.tensor([[-2.0, -2.0, -1.0, 0.0]]),
        token_logratio=torch.tensor([[0.5, 4.0, -4.0, 9.0]]),
        scores=torch.tensor([1.5]),
        ended=torch.tensor([True]),
        mask=mask,
        anchors=mask,
    )
    assert terms.token.tolist() == [[0.25, 0.5, -0.5, 0.0]]
    assert terms.kl.tolist() == [[-0.25, 0.0, 0.5, 0.0]]
    assert terms.score.tolist() == [[0.0, 0.0, 3.0, 0.0]]
    assert terms.total.tolist() == [[0.0, 0.5, 3.0, 0.0]]


def test_the_clip_bounds_the_raw_ratio_before_the_coefficient():
    """Clipped after β₁, a raw ratio of 5 would pass as 0.05 · 5 = 0.25."""
    x = ragged(0)
    x["token_logratio"] = torch.full_like(x["token_logratio"], 5.0)
    x["anchors"] = x["mask"]
    token = RTOReward(dpo_coef=0.05, token_reward_clip=1.0)(**x).token
    assert token[x["mask"]].unique().tolist() == [0.05]


@pytest.mark.parametrize("logratio", [None, "nan"])
def test_a_coefficient_of_zero_switches_the_token_reward_off(logratio):
    x = ragged(1)
    x["token_logratio"] = None if logratio is None else torch.full((B, T), torch.nan, dtype=torch.float64)
    terms = RTOReward(dpo_coef=0.0)(**x)
    assert (terms.token == 0).all()
    assert terms.total.isfinite().all()


def test_a_token_reward_without_a_dpo_model_is_an_error():
    x = ragged(1) | {"token_logratio": None}
    with pytest.raises(ValueError, match=r"dpo_coef is 0\.05, so the log-ratio of a DPO model is needed"):
        RTOReward()(**x)


def test_the_score_is_on_the_last_real_token():
    x = ragged(2)
    score = RTOReward(score_coef=3.0)(**x).score
    for row, mask, r in zip(score, x["mask"], x["scores"]):
        place_of_score = row.nonzero().flatten().tolist()
        assert place_of_score == [int(mask.sum()) - 1]
        assert row[place_of_score[0]] == 3.0 * r


def test_only_cut_off_completions_pay_for_a_missing_eos():
    x = ragged(3)
    assert 0 < x["ended"].sum() < B
    paid = RTOReward()(**x).total.sum(1) - RTOReward(missing_eos_penalty=0.7)(**x).total.sum(1)
    torch.testing.assert_close(paid, torch.where(x["ended"], 0.0, 0.7).double())


@pytest.mark.parametrize("anchors", ["all", "none", "random"])
def test_shaping_leaves_the_total_to_score_and_kl(anchors):
    x = ragged(4)
    x["anchors"] = {"all": x["mask"], "none": torch.zeros_like(x["mask"]), "random": x["anchors"]}[anchors]
    plain, shaped = (RTOReward(dpo_coef=0.8, shaping=s)(**x) for s in (False, True))
    assert plain.token.sum(1).abs().min() > 0.01  # else nothing is shown
    torch.testing.assert_close(shaped.total.sum(1), (shaped.kl + shaped.score).sum(1), rtol=0, atol=1e-12)
    before_last = x["mask"] & x["mask"].roll(-1, 1) & (torch.arange(T) < T - 1)
    assert torch.equal(shaped.token[before_last], plain.token[before_last])


@pytest.mark.parametrize("seed", range(5))
def test_placement_moves_rewards_and_loses_none(seed):
    x = ragged(seed)
    rewards, mask, anchors = x["token_logratio"], x["mask"], x["anchors"]
    placed = place(rewards, mask, anchors)
    for row, paid, kept, stops in zip(rewards, placed, mask, anchors):
        last = int(kept.sum()) - 1
        ends = sorted({*(t for t in range(last) if stops[t]), last})
        assert set(paid.nonzero().flatten().tolist()) == set(ends)
        for start, end in pairwise([-1, *ends]):
            assert paid[end].item() == pytest.approx(sum(row[start + 1 : end + 1].tolist()), abs=1e-12)


def test_a_row_without_tokens_is_paid_nothing():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert place(torch.full((1, 3), torch.nan), mask, ~mask).tolist() == [[0.0, 0.0, 0.0]]


WORDS = ["Yes", ",", " I", " can", ".", " Now", "?!", "\n", " ok", "<eos>"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token", [1, 2, 4, 8, 16, 32, 64, 0, 0, 0]),
        ("sentence", [0, 0, 0, 0, 31, 0, 96, 0, 0, 0]),
        ("final", [0, 0, 0, 0, 0, 0, 127, 0, 0, 0]),
    ],
)
def test_named_placements(name, expected):
    """Seven tokens, worth 1, 2, 4 … so that each sum tells its parts; a delimiter in the padding is not one."""
    tokens = torch.arange(10)[None]
    mask = torch.arange(10)[None] < 7
    anchors = PLACEMENTS[name](tokens, mask, WORDS.__getitem__)
    assert place(2.0 ** torch.arange(10.0)[None], mask, anchors).tolist() == [expected]


@pytest.mark.parametrize(
    ("text", "is_delimiter"),
    [
        *((c, True) for c in (".", "!", "?", ";", "\n", "\u3002", "\uff01", "\uff1f", "\uff1b")),
        *((c, True) for c in (" end.", '."', "...\n\n")),
        *((c, False) for c in (",", ":", "a", " ", "", "'", "-", "\u3001")),
    ],
)
def test_sentence_delimiters(text, is_delimiter):
    mask = torch.tensor([[True, True], [True, False]])
    anchors = on_sentences(torch.zeros(2, 2, dtype=torch.long), mask, lambda i: text)
    assert torch.equal(anchors, mask & is_delimiter)


def test_shares_are_sums_of_absolute_values():
    x = ragged(5)
    terms = RTOReward(dpo_coef=0.5, kl_coef=0.1)(**x)
    for name, value in shares(terms, x["mask"]).items():
        rows = getattr(terms, name).tolist()
        assert value.item() == pytest.approx(sum(abs(r) for row in rows for r in row), rel=1e-12)


@pytest.mark.parametrize(
    ("kl", "rollouts", "expected"),
    [
        (12.0, 256, 0.1 * 1.00512),  # error +1, bounded to +0.2; K_p = 0.0256
        (0.0, 256, 0.1 * 0.99488),
        (6.6, 1000, 0.1 * 1.01),  # error +0.1, K_p = 0.1
        (5.4, 1000, 0.1 * 0.99),
        (6.0, 1000, 0.1),
    ],
)
def test_adaptive_kl_steers_towards_its_target(kl, rollouts, expected):
    control = AdaptiveKL(coef=0.1, target=6.0, horizon=10_000)
    control.update(kl, rollouts)
    assert control.coef == pytest.approx(expected, rel=1e-12)
    resumed = AdaptiveKL(coef=0.5, target=6.0)
    resumed.load_state_dict(control.state_dict())
    assert resumed == control


def batches_of_scores():
    g = torch.Generator().manual_seed(7)
    return [torch.randn(n, generator=g) * s + 100 for n, s in ((5, 1.0), (1, 0.0), (17, 9.0), (2, 0.1))]


def test_running_moments_are_those_of_all_scores_so_far():
    moments, seen = RunningMoments(), []
    for batch in batches_of_scores():
        moments.update(batch)
        seen += batch.tolist()
        assert moments.count == len(seen)
        assert moments.mean == pytest.approx(np.mean(seen), rel=1e-12)
        assert moments.std == pytest.approx(np.std(seen), rel=1e-9)
    expected = (batch.numpy() - np.mean(seen)) / np.std(seen)
    np.testing.assert_allclose(moments.normalize(batch), expected, rtol=1e-5)


def test_running_moments_of_two_processes_are_those_of_one(on_ranks):
    batches = batches_of_scores()

    def work(shard, reduce):
        moments = RunningMoments()
        for batch in shard:
            moments.update(batch, all_reduce=reduce)
        return moments

    first, second = on_ranks(work, [batches[:2], batches[2:]])
    assert first == second
    every = torch.cat(batches).double().numpy()
    assert first.count == len(every)
    assert first.mean == pytest.approx(every.mean(), rel=1e-12)
    assert first.std == pytest.approx(every.std(), rel=1e-9)


def test_running_moments_resume_where_they_were():
    first, *rest = batches_of_scores()
    straight, before = RunningMoments(), RunningMoments()
    straight.update(first)
    before.update(first)
    resumed = RunningMoments()
    resumed.load_state_dict(before.state_dict())
    for batch in rest:
        straight.update(batch)
        resumed.update(batch)
    assert resumed == straight


def test_a_score_that_never_varies_is_not_divided_by_zero():
    moments = RunningMoments()
    assert moments.std == 1
    moments.update(torch.full((4,), 3.0))
    assert moments.std == 1
    assert moments.normalize(torch.tensor([3.0, 4.0])).tolist() == [0.0, 1.0]
