"""What a reward buys at a KL, foretold from completions of one policy; and what several policies buy together.

Notation: n prompts, K completions of each. A policy that is paid r under a KL penalty becomes π ∝ π_old exp(r / β₂),
so what a payment is worth at a small KL is told before anyone trains, by how it goes with the gold among completions
of one prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rto.evaluation.statistics.estimates import bootstrap_weights, percentile_interval

ROUNDS = 1000


@dataclass(frozen=True, kw_only=True)
class Ranged:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Ranged":
        """Scaled by a factor that is not negative."""
        return Ranged(value=factor * self.value, low=factor * self.low, high=factor * self.high)


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What n · K completions say of a payment p beside the gold g; intervals by the bootstrap over prompts.

    With x̃ the deviation from the prompt's mean, cov(p, g) = Σ p̃ g̃ / (n (K − 1)): K numbers less their mean have K − 1
    degrees of freedom. Correlation ρ = cov / (σ_p σ_g); slope ρ σ_g = cov / σ_p.
    """

    correlation: Ranged
    """ρ, within a prompt."""
    spread: float
    """σ_g, the gold's deviation within a prompt."""
    slope: Ranged
    """ρ σ_g: the gold gained is slope · √(2 KL)."""
    prompts: int
    completions: int
    """K."""

    def gain(self, kl: float) -> Ranged:
        """Gold gained at a KL (nats a completion): ρ σ_g √(2 KL).

        Exact where p and g are jointly normal: tilting by λp moves the gold by λ cov(p, g) and costs KL = λ² σ_p² / 2.
        Everywhere else it is the first order in √KL.
        """
        return self.slope.times(math.sqrt(2 * kl))


def foretell(
    paid: Float[np.ndarray, "n K"], gold: Float[np.ndarray, "n K"], *, rounds: int = ROUNDS, seed: int = 0
) -> Foretold:
    """Correlation and slope of a payment; NaN where nothing varies within a prompt.

    Args:
        paid: what a completion is paid, KL penalty left out.
        gold: what it is worth.
        rounds: of the bootstrap.
        seed: of it.

    Raises:
        ValueError: the two have not one number for each of at least two completions of each prompt.
    """
    if paid.shape != gold.shape or paid.ndim != 2 or paid.shape[1] < 2 or not len(paid):
        raise ValueError(
            "a correlation within prompts needs one number for both of each of at least two completions a prompt: "
            f"got {paid.shape} and {gold.shape}"
        )
    n, k = paid.shape
    p, g = (x - x.mean(1, keepdims=True) for x in (paid, gold))
    moments = np.stack([(p * p).sum(1), (g * g).sum(1), (p * g).sum(1)], axis=1) / (k - 1)
    drawn = bootstrap_weights(n, rounds, seed) @ moments / n
    rho, slope = _of_moments(np.concatenate([moments.mean(0)[None], drawn]))
    return Foretold(
        correlation=_ranged(rho),
        spread=float(np.sqrt(moments.mean(0)[1])),
        slope=_ranged(slope),
        prompts=n,
        completions=k,
    )


def _of_moments(m: Float[np.ndarray, "R 3"]) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = m[:, 2] / np.sqrt(m[:, 0])
        return slope / np.sqrt(m[:, 1]), slope


def _ranged(x: Float[np.ndarray, " R"]) -> Ranged:
    """The first number, with the percentiles of the others that are numbers."""
    finite = x[1:][np.isfinite(x[1:])]
    low, high = percentile_interval(finite) if len(finite) else (math.nan, math.nan)
    return Ranged(value=float(x[0]), low=low, high=high)


def tilted(paid: Float[np.ndarray, "n K"], strength: float) -> Float[np.ndarray, "n K"]:
    """Weights of the K completions of each prompt under π ∝ π_old exp(strength · paid): a softmax in each row."""
    logits = strength * (paid - paid.max(1, keepdims=True))
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def tilted_gain(
    paid: Float[np.ndarray, "n K"], gold: Float[np.ndarray, "n K"], levels: Sequence[float]
) -> Float[np.ndarray, " L"]:
    """Gold gained at each mean KL by the policies π ∝ π_old exp(λ · paid), on the K completions as if they were all.

    One λ for all prompts, as with one β₂. The KL from K equally likely completions is at most ln K, and the best
    completions are rarer than one in K: read levels of up to half of ln K. No training comes into it, so it tells a
    reward from the optimizer that follows it. NaN where no λ reaches the level.
    """
    n, k = paid.shape
    scale = float(np.sqrt(((paid - paid.mean(1, keepdims=True)) ** 2).mean()))
    if scale == 0:
        return np.full(len(levels), math.nan)

    def at(strength: float) -> tuple[float, float]:
        w = tilted(paid, strength / scale)
        kl = float(np.where(w > 0, w * np.log(np.maximum(w, 1e-300) * k), 0.0).sum() / n)
        return kl, float(((w - 1 / k) * gold).sum() / n)

    found = []
    for level in levels:
        low, high = 0.0, 1.0
        while at(high)[0] < level and high < 1e6:
            high *= 2
        for _ in range(40):  # the mean KL rises with the strength
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle)[0] < level else (low, middle)
        found.append(at(high)[1] if at(high)[0] >= level * (1 - 1e-6) else math.nan)
    return np.array(found)


def best_mixture(gold: Float[np.ndarray, " m"], kl: Float[np.ndarray, " m"], level: float) -> Float[np.ndarray, " m"]:
    """Shares w of m policies that are best together at a KL: max Σ w·gold with Σ w·KL ≤ level, Σ w = 1, w ≥ 0.

    A policy drawn for each prompt by these shares has the gold Σ w·gold, and KL(Σ w π ‖ π_ref) ≤ Σ w·KL(π ‖ π_ref),
    since KL is convex: what lies on the upper hull of a method's points can be had. The best shares are of one policy,
    or of two on both sides of the level.

    Raises:
        ValueError: no policy is within the level; the one that training starts from has KL 0.
    """
    within = np.flatnonzero(kl <= level)
    if not len(within):
        raise ValueError(f"no policy is within KL {level:g}: give the starting one, too")
    best = within[np.argmax(gold[within])]
    shares = np.eye(len(gold))[best]
    value = gold[best]
    for near in within:
        for far in np.flatnonzero(kl > level):
            share = (level - kl[near]) / (kl[far] - kl[near])
            if (both := (1 - share) * gold[near] + share * gold[far]) > value:
                value, shares = both, (1 - share) * np.eye(len(gold))[near] + share * np.eye(len(gold))[far]
    return shares
