"""Every method's credit against plain loops over the paper's definitions, on rollouts of ragged lengths."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rto.batches import Rollout, collate
from rto.credit import METHODS, Credit
from rto.functional.advantages import GAE, ReinforcePlusPlus
from rto.functional.rewards import AdaptiveKL, RTOReward

LENGTHS = [5, 1, 4, 2, 7]
DELIMITERS = {3: ". ", 5: "\n"}
BETA1, BETA2, BETA3, CLIP, PENALTY, GAMMA, LAMBDA = 0.5, 0.2, 2.0, 0.6, 0.3, 0.9, 0.8


def text(token: int) -> str:
    return DELIMITERS.get(token, "a")


def rollout(seed: int, *, values: bool = True) -> Rollout:
    """Token 3 and 5 end sentences; the second row is one token, the third was cut off; padding holds NaN."""
    random = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 8, (n,), generator=random).tolist() for n in LENGTHS]
    x = collate([[1] * (1 + i % 3) for i in range(len(ids))], ids, pad=3)

    def draw() -> torch.Tensor:
        numbers = torch.randn(x.mask.shape, generator=random)
        return torch.where(x.mask, numbers, float("nan"))

    return Rollout(
        **x.tensors(),
        ended=torch.tensor([True, True, False, True, True]),
        policy_logp=draw(),
        ref_logp=draw(),
        token_logratio=draw(),
        values=draw() if values else None,
        scores=torch.randn(len(ids), generator=random),
        sampler_logp=draw(),
        version=4,
    )


@dataclass
class Spelled:
    """A method as a reader of the paper would write it down."""

    token: bool = True
    paid: str = "token"
    shaped: bool = False
    critic: bool = True


SPELLED = {
    "rto": Spelled(),
    "ppo": Spelled(token=False),
    "semi-rto": Spelled(paid="sentence"),
    "ddpo": Spelled(paid="final"),
    "rs-ppo": Spelled(shaped=True),
    "reinforce++": Spelled(token=False, critic=False),
    "rto-reinforce++": Spelled(critic=False),
}


def rewards_of(x: Rollout, i: int, method: Spelled, beta2: float, score: float) -> list[float]:
    """Eq. 4.7 of one row, token by token."""
    n = LENGTHS[i]
    assert x.token_logratio is not None
    token, held = [0.0] * n, 0.0
    for t in range(n):
        ratio = float(x.token_logratio[i, t]) if method.token else 0.0
        held += BETA1 * max(-CLIP, min(CLIP, ratio))
        sentence = int(x.responses[i, t]) in DELIMITERS
        if method.paid == "token" or t == n - 1 or (method.paid == "sentence" and sentence):
            token[t], held = held, 0.0
    if method.shaped:
        token[-1] -= sum(token)
    kl = [-beta2 * float(x.policy_logp[i, t] - x.ref_logp[i, t]) for t in range(n)]
    total = [a + b for a, b in zip(token, kl)]
    total[-1] += BETA3 * score - (0.0 if x.ended[i] else PENALTY)
    return total


def credit_of(x: Rollout, i: int, rewards: list[float], *, critic: bool) -> tuple[list[float], list[float]]:
    """Advantages and returns of one row, each as the sum that defines it."""
    n = LENGTHS[i]
    if not critic:
        to_go = [sum(GAMMA ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]
        return to_go, to_go
    assert x.values is not None
    values = [*x.values[i, :n].tolist(), 0.0]
    deltas = [rewards[t] + GAMMA * values[t + 1] - values[t] for t in range(n)]
    advantages = [sum((GAMMA * LAMBDA) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values)]


def whitened(rows: list[list[float]], *, center: bool) -> list[list[float]]:
    flat = [a for row in rows for a in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
    return [[(a - mean) / deviation + (0.0 if center else mean) for a in row] for row in rows]


def build(method: str, **changes: Any) -> Credit:
    critic = SPELLED[method].critic
    weights = {"dpo_coef": BETA1} if SPELLED[method].token else {}
    estimator = GAE(gamma=GAMMA, lam=LAMBDA) if critic else ReinforcePlusPlus(gamma=GAMMA)
    settings = {
        "kl_coef": BETA2,
        "score_coef": BETA3,
        "token_reward_clip": CLIP,
        "missing_eos_penalty": PENALTY,
        "estimator": estimator,
    }
    return Credit.of(method, **weights, **settings | changes)


def test_every_method_is_spelled() -> None:
    """And stands in the table with the estimator that it is spelled with."""
    assert METHODS.keys() == SPELLED.keys()
    for name, method in SPELLED.items():
        credit = Credit.of(name)
        assert credit.needs_values == method.critic, name
        assert (credit.reward.dpo_coef > 0) == method.token, name


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("whiten_advantages", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_definition(method: str, whiten_advantages: bool, whiten_rewards: bool) -> None:
    spelled = SPELLED[method]
    for seed in range(3):
        x = rollout(seed, values=spelled.critic)
        credit = build(method, whiten_advantages=whiten_advantages, whiten_rewards=whiten_rewards)
        found = credit(x, text=text)
        rewards = [rewards_of(x, i, spelled, BETA2, float(x.scores[i])) for i in range(len(x))]
        assert float(found.metrics["return"]) == pytest.approx(sum(map(sum, rewards)) / len(x), abs=1e-5)
        if whiten_rewards:
            rewards = whitened(rewards, center=False)
        rows = [credit_of(x, i, row, critic=spelled.critic) for i, row in enumerate(rewards)]
        advantages = [a for a, _ in rows]
        if whiten_advantages:
            advantages = whitened(advantages, center=True)
        targets = found.targets
        for i, n in enumerate(LENGTHS):
            assert targets.advantages[i, :n].tolist() == pytest.approx(advantages[i], abs=2e-5)
            if targets.returns is not None:
                assert targets.returns[i, :n].tolist() == pytest.approx(rows[i][1], abs=2e-5)
        assert (targets.returns is None) == (not spelled.critic)
        assert not targets.advantages[~x.mask].any()
        assert targets.version == 4
        torch.testing.assert_close(targets.sampler_logp, x.sampler_logp, equal_nan=True)
        torch.testing.assert_close(targets.old_logp, x.policy_logp, equal_nan=True)


def test_a_table_entry_is_fresh_each_time() -> None:
    first, second = Credit.of("rto", normalize_scores=True), Credit.of("rto", normalize_scores=True)
    first(rollout(0), text=text)
    assert first.score_moments.count == len(LENGTHS)
    assert second.score_moments.count == 0


def test_the_controller_moves_once_a_rollout_and_after_it() -> None:
    """Each rollout is paid by the β₂ that was there before it, and moves it by its own KL."""
    control = AdaptiveKL(BETA2, target=0.5, horizon=50)
    credit = build("rto", kl_control=control, whiten_advantages=False)
    coef = BETA2
    for seed in range(4):
        x = rollout(seed)
        found = credit(x, text=text)
        assert found.metrics["kl_coef"] == pytest.approx(coef)
        rewards = rewards_of(x, 0, SPELLED["rto"], coef, float(x.scores[0]))
        advantages, _ = credit_of(x, 0, rewards, critic=True)
        assert found.targets.advantages[0, : LENGTHS[0]].tolist() == pytest.approx(advantages, abs=2e-5)
        sums = [float((x.policy_logp - x.ref_logp)[i, :n].sum()) for i, n in enumerate(LENGTHS)]
        error = max(-0.2, min(0.2, sum(sums) / len(x) / 0.5 - 1))
        coef *= 1 + error * len(x) / 50
        assert credit.kl_coef == pytest.approx(coef)
    assert coef != BETA2


def test_scores_are_standardized_by_all_that_were_seen() -> None:
    credit = build("rto", normalize_scores=True, whiten_advantages=False)
    seen: list[float] = []
    for seed in range(3):
        x = rollout(seed)
        found = credit(x, text=text)
        seen += x.scores.tolist()
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in seen) / len(seen))
        for i, n in enumerate(LENGTHS):
            score = (float(x.scores[i]) - mean) / deviation
            rewards = rewards_of(x, i, SPELLED["rto"], BETA2, score)
            advantages, _ = credit_of(x, i, rewards, critic=True)
            assert found.targets.advantages[i, :n].tolist() == pytest.approx(advantages, abs=2e-5)


def test_state_goes_on_where_it_was_saved() -> None:
    def make() -> Credit:
        return build("rto", kl_control=AdaptiveKL(BETA2, target=0.5, horizon=50), normalize_scores=True)

    whole, first, second = make(), make(), make()
    whole(rollout(0), text=text)
    first(rollout(0), text=text)
    second.load_state_dict(first.state_dict())
    expected, found = (credit(rollout(1), text=text) for credit in (whole, second))
    assert torch.equal(expected.targets.advantages, found.targets.advantages)
    assert second.state_dict() == whole.state_dict() != make().state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(method: str, on_ranks: Callable[..., list[Any]]) -> None:
    """Whitening, moments, controller and metrics are over all rollouts, wherever they lie."""
    x = rollout(0, values=SPELLED[method].critic)

    def make() -> Credit:
        control = AdaptiveKL(BETA2, target=0.5, horizon=50)
        return build(method, kl_control=control, normalize_scores=True, whiten_rewards=True)

    credit = make()
    whole = credit(x, text=text)

    def half(rows: torch.Tensor, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        own = make()
        return own(x.rows(rows), text=text, all_reduce=all_reduce), own

    parts = [torch.tensor([0, 3]), torch.tensor([1, 2, 4])]
    for rows, (found, own) in zip(parts, on_ranks(half, parts)):
        expected = whole.targets.advantages[rows]
        torch.testing.assert_close(found.targets.advantages, expected, rtol=1e-4, atol=1e-5)
        assert own.kl_coef == pytest.approx(credit.kl_coef)
        for name, value in whole.metrics.items():
            assert float(found.metrics[name]) == pytest.approx(float(value), abs=1e-4), name


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no method 'grpo': choose from rto, ppo"):
        Credit.of("grpo")
    with pytest.raises(ValueError, match="placement must be one of token, sentence, final"):
        Credit(placement="word")
    with pytest.raises(TypeError, match="dpo_koef"):
        Credit.of("ppo", dpo_koef=1.0)


def test_a_reward_and_its_coefficients_go_together() -> None:
    credit = Credit.of("ddpo", reward=RTOReward(score_coef=3.0), kl_coef=0.5)
    assert credit.reward == RTOReward(score_coef=3.0, kl_coef=0.5)
    assert credit.placement == "final"
