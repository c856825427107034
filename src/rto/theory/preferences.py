"""Bradley–Terry preferences over enumerated responses, and the estimator of line 2 of Algorithm 1."""

from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Tensor

from rto.theory.mdp import TokenMDP

VANISHING = log(1e-10)
"""log of the multiplier, a comparison, that stands for none."""


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """A data set 𝒟 of comparisons, as counts over its M distinct pairs.

    Order inside a pair carries no meaning: ``wins`` counts how often ``first`` was preferred.
    """

    prompt: Int[Tensor, " M"]
    first: Int[Tensor, " M"]
    second: Int[Tensor, " M"]
    count: Float[Tensor, " M"]
    wins: Float[Tensor, " M"]

    @property
    def size(self) -> int:
        """|𝒟|."""
        return int(self.count.sum())


def draw_preferences(
    mdp: TokenMDP, behaviour: Float[Tensor, "X N A"], size: int, rng: np.random.Generator
) -> Preferences:
    """|𝒟| comparisons: x ~ ρ, y¹ and y² ~ behaviour(·|x), P(y¹ ≻ y²) = σ(r(y¹) − r(y²)).

    Only the counts are sufficient, so only they are drawn: multinomial pairs, binomial labels. Comparisons
    of a response with itself, which say nothing, are kept in |𝒟|.
    """
    responses = mdp.tree.responses
    prob = responses.read(behaviour).sum(-1).exp()
    joint = mdp.prompts[:, None, None] * prob[:, :, None] * prob[:, None, :]
    flat = joint.flatten().numpy()
    count = rng.multinomial(size, flat / flat.sum())
    seen = count.nonzero()[0]
    x, first, second = (torch.from_numpy(i) for i in np.unravel_index(seen, joint.shape))
    reward = responses.read(mdp.reward).sum(-1)
    chance = torch.sigmoid(reward[x, first] - reward[x, second])
    wins = rng.binomial(count[seen], chance.numpy())
    return Preferences(
        prompt=x,
        first=first,
        second=second,
        count=torch.from_numpy(count[seen]).double(),
        wins=torch.from_numpy(wins).double(),
    )


def population_preferences(mdp: TokenMDP, behaviour: Float[Tensor, "X N A"]) -> Preferences:
    """The limit |𝒟| → ∞, scaled to one comparison: expected counts and expected wins."""
    prob = mdp.tree.responses.read(behaviour).sum(-1).exp()
    joint = mdp.prompts[:, None, None] * prob[:, :, None] * prob[:, None, :]
    x, first, second = joint.nonzero(as_tuple=True)
    reward = mdp.tree.responses.read(mdp.reward).sum(-1)
    count = joint[x, first, second]
    wins = count * torch.sigmoid(reward[x, first] - reward[x, second])
    return Preferences(prompt=x, first=first, second=second, count=count, wins=wins)


def differences(data: Preferences, features: Float[Tensor, "X Y D"]) -> Float[Tensor, "M D"]:
    """Feature differences z = φ(y¹) − φ(y²), with φ(y) = Σ_h φ(s_h, a_h)."""
    return features[data.prompt, data.first] - features[data.prompt, data.second]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """θ_MLE, and the certificate that it is one."""

    theta: Float[Tensor, " D"]
    multiplier: float
    """μ ≥ 0 of the norm constraint; 0 inside the ball."""
    residual: float
    """‖∇L(θ) + μθ‖ / |𝒟|, 0 at the optimum (Karush–Kuhn–Tucker)."""


def _newton(z: Tensor, count: Tensor, wins: Tensor, mu: float, start: Tensor) -> Tensor:
    """The argmin of L(θ) + μ/2 ‖θ‖², strictly convex as μ > 0, by Newton's method.

    Steps are backtracked while the loss can tell points apart, then whole until they stop shrinking.
    """

    def loss(theta: Tensor) -> Tensor:
        margin = z @ theta
        return count @ torch.nn.functional.softplus(margin) - wins @ margin + 0.5 * mu * theta.square().sum()

    theta, eye = start, torch.eye(z.shape[1], dtype=z.dtype)
    last = float("inf")
    for _ in range(100):
        chance = torch.sigmoid(z @ theta)
        gradient = z.T @ (count * chance - wins) + mu * theta
        hessian = (z.T * (count * chance * (1 - chance))) @ z + mu * eye
        step = torch.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        scale, here = 1.0, loss(theta)
        if decrement > 1e-8 * abs(float(here)):
            while scale > 1e-10 and loss(theta - scale * step) > here - 1e-4 * scale * decrement:
                scale /= 2
        elif decrement >= 0.25 * last:  # quadratic convergence has ended in rounding
            break
        theta, last = theta - scale * step, decrement
    return theta


def fit_bradley_terry(
    z: Float[Tensor, "M D"], count: Float[Tensor, " M"], wins: Float[Tensor, " M"], radius: float
) -> Estimate:
    r"""θ_MLE = argmin_{‖θ‖≤B} L(θ),  L(θ) = −Σ [wins·log σ(zᵀθ) + (count − wins)·log σ(−zᵀθ)].

    Convex on a ball, so θ(μ) = argmin L + μ/2 ‖θ‖² solves it for the one μ ≥ 0 with ‖θ(μ)‖ = B, or for
    μ → 0 when that stays inside; ‖θ(μ)‖ falls with μ, which leaves the root of a function of one number.
    Without preferences that contradict each other L has no minimiser on ℝ^D; on the ball it always has. A
    vanishing μ picks the shortest θ where the data leave directions open.
    """
    scale = float(count.sum())
    theta = torch.zeros(z.shape[1], dtype=z.dtype)

    def excess(log_mu: float) -> float:
        """How far out θ(μ) is: log ‖θ(μ)‖ − log B, falling in μ; each call starts from the last θ."""
        nonlocal theta
        theta = _newton(z, count, wins, scale * exp(log_mu), theta)
        return log(float(theta.norm()) / radius + 1e-300)

    log_mu = VANISHING
    if excess(log_mu) > 0:
        upper = log_mu
        while excess(upper) > 0:
            upper += 4.0
        log_mu = float(brentq(excess, upper - 4.0, upper, xtol=1e-13))
        excess(log_mu)
        theta = theta * (radius / theta.norm())
    high = scale * exp(log_mu)
    residual = z.T @ (count * torch.sigmoid(z @ theta) - wins) + high * theta
    return Estimate(theta=theta, multiplier=high, residual=float(residual.norm()) / scale)


def covariance(z: Float[Tensor, "M D"], count: Float[Tensor, " M"], regulariser: float) -> Float[Tensor, "D D"]:
    """Σ_𝒟 = Σ_𝒟 z zᵀ + λI."""
    return (z.T * count) @ z + regulariser * torch.eye(z.shape[1], dtype=z.dtype)


def inverse_norm(vectors: Float[Tensor, "*B D"], sigma: Float[Tensor, "D D"]) -> Float[Tensor, "*B"]:
    """‖v‖_{Σ⁻¹} = √(vᵀ Σ⁻¹ v)."""
    root = torch.linalg.cholesky(sigma)
    flat = vectors.reshape(-1, vectors.shape[-1])
    whitened = torch.linalg.solve_triangular(root, flat.T, upper=False)
    return whitened.square().sum(0).sqrt().reshape(vectors.shape[:-1])


def confidence_radius(dimension: int, longest: float, *, radius: float, regulariser: float, delta: float) -> float:
    r"""A ϱ with all constants for which ‖θ_MLE − θ*‖_{Σ_𝒟} ≤ ϱ with probability ≥ 1 − δ.

    The paper (Theorem 4.2, after Zhu et al., 2023, Lemma 3.1) gives the order,
    ϱ = C √((d + log 1/δ)/Υ² + λB²). With every constant, for a fixed set of compared pairs:

    1. Each label has range 1, so ∇L(θ*) = Σ z ε with ε ½-sub-Gaussian, and
       ‖∇L(θ*)‖²_{Σ⁻¹} ≤ g² = ¼ (d + 2√(d log 1/δ) + 2 log 1/δ)      (Hsu, Kakade & Zhang, 2012).
    2. L is strongly convex on the ball: Υ = σ'(u) at the largest |zᵀθ| = u.
    3. With Δ = θ_MLE − θ*, optimality on the ball gives
       Υ(‖Δ‖²_Σ − λ‖Δ‖²) ≤ −⟨∇L(θ*), Δ⟩ ≤ g‖Δ‖_Σ, and ‖Δ‖ ≤ 2B, hence
       ϱ = g/(2Υ) + √(g²/(4Υ²) + 4λB²).

    Args:
        dimension: d.
        longest: the largest ‖z‖. The paper's worst case is 2HL; the largest in 𝒟 is allowed as well, as the
            pairs are fixed, and is much smaller.
        radius: B.
        regulariser: λ.
        delta: δ.
    """
    u = longest * radius
    curvature = 1.0 / (2.0 + float(np.exp(u)) + float(np.exp(-u)))
    tail = log(1.0 / delta)
    g = 0.5 * sqrt(dimension + 2.0 * sqrt(dimension * tail) + 2.0 * tail)
    half = g / (2.0 * curvature)
    return half + sqrt(half**2 + 4.0 * regulariser * radius**2)
