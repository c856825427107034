"""Algorithm 1 and its relatives: learn a linear reward from preferences, be careful, plan exactly.

Every learner maps `Evidence` to a policy; what it is not told is θ*.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from rto.theory.instances import LinearMDP
from rto.theory.mdp import TokenMDP, divergence, expectation, occupancy, soft_optimal
from rto.theory.preferences import (
    Preferences,
    confidence_radius,
    covariance,
    differences,
    fit_bradley_terry,
    inverse_norm,
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known after the data: lines 2 and 3 of Algorithm 1."""

    problem: LinearMDP
    data: Preferences
    theta: Float[Tensor, " D"]
    """θ_MLE."""
    sigma: Float[Tensor, "D D"]
    """Σ_𝒟."""
    rho: float
    """ϱ."""

    @property
    def error(self) -> float:
        """‖θ_MLE − θ*‖_{Σ_𝒟}; the guarantees hold whenever it is at most ϱ."""
        gap = self.theta - self.problem.theta
        return float((gap @ self.sigma @ gap).sqrt())


def response_features(problem: LinearMDP) -> Float[Tensor, "X Y D"]:
    """φ(y) = Σ_h φ(s_h, a_h)."""
    responses = problem.mdp.tree.responses
    each = problem.features[:, responses.nodes, responses.tokens]
    return torch.where(responses.mask[..., None], each, 0.0).sum(2)


def weigh(
    problem: LinearMDP,
    data: Preferences,
    *,
    regulariser: float = 1.0,
    delta: float = 0.1,
    rho_scale: float = 1.0,
) -> Evidence:
    """θ_MLE on the ball, Σ_𝒟, and ϱ with the constants of `confidence_radius` times ``rho_scale``."""
    z = differences(data, response_features(problem))
    estimate = fit_bradley_terry(z, data.count, data.wins, problem.radius)
    rho = confidence_radius(
        z.shape[1],
        float(z.norm(dim=-1).max()),
        radius=problem.radius,
        regulariser=regulariser,
        delta=delta,
    )
    sigma = covariance(z, data.count, regulariser)
    return Evidence(problem=problem, data=data, theta=estimate.theta, sigma=sigma, rho=rho_scale * rho)


Learner = Callable[[Evidence], Float[Tensor, "X N A"]]
"""Evidence to log π̂."""


def pessimistic_reward(evidence: Evidence) -> Float[Tensor, "X N A"]:
    """r̂(s, a) = φᵀθ_MLE − ϱ ‖φ(s, a)‖_{Σ_𝒟⁻¹}, line 4 of Algorithm 1; 0 where φ = 0 (ended states)."""
    features = evidence.problem.features
    return features @ evidence.theta - evidence.rho * inverse_norm(features, evidence.sigma)


def token_pessimism(evidence: Evidence) -> Float[Tensor, "X N A"]:
    """Algorithm 1: π̂ = argmax_π V_β^π(·; r̂)."""
    return soft_optimal(evidence.problem.with_reward(pessimistic_reward(evidence))).logp


def no_pessimism(evidence: Evidence) -> Float[Tensor, "X N A"]:
    """π̂ = argmax_π V_β^π(·; φᵀθ_MLE)."""
    return soft_optimal(evidence.problem.with_theta(evidence.theta)).logp


def reference(evidence: Evidence) -> Float[Tensor, "X N A"]:
    """π_ref: learn nothing."""
    return evidence.problem.mdp.ref_logp


def from_responses(mdp: TokenMDP, reward: Float[Tensor, "X Y"]) -> Float[Tensor, "X N A"]:
    """The token policy of the sentence-level bandit solution π(y|x) ∝ π_ref(y|x) exp{r(y)/β}.

    Paying r(y) at the last token and planning in the tree gives the same distribution over responses.
    """
    responses = mdp.tree.responses
    last = responses.mask & (responses.mask.flip(-1).cumsum(-1).flip(-1) == 1)
    paid = torch.where(last, reward[..., None], 0.0)
    return soft_optimal(replace(mdp, reward=responses.write(paid))).logp


def sentence_pessimism(evidence: Evidence) -> Float[Tensor, "X N A"]:
    """The linear bandit of Zhu et al. (2023): r̂(y) = φ(y)ᵀθ_MLE − ϱ ‖φ(y)‖_{Σ_𝒟⁻¹}, one bonus a response.

    By the triangle inequality it takes off less than the tokens' bonuses add up to.
    """
    features = response_features(evidence.problem)
    reward = features @ evidence.theta - evidence.rho * inverse_norm(features, evidence.sigma)
    return from_responses(evidence.problem.mdp, reward)


def bandit(evidence: Evidence) -> Float[Tensor, "X N A"]:
    """A bandit with an arm for every response and no features: Bradley–Terry scores by maximum likelihood.

    The norm ball is that of the rewards it could meet, √(X·Y)·max_y ‖φ(y)‖·B. Arms it never saw keep score 0.
    """
    mdp, data = evidence.problem.mdp, evidence.data
    x, y = len(mdp.prompts), len(mdp.tree.responses.tokens)
    features = response_features(evidence.problem)
    arms = torch.eye(x * y, dtype=torch.float64).view(x, y, x * y)
    radius = (x * y) ** 0.5 * float(features.norm(dim=-1).max()) * evidence.problem.radius
    scores = fit_bradley_terry(differences(data, arms), data.count, data.wins, radius).theta
    return from_responses(mdp, scores.view(x, y))


@dataclass(frozen=True, kw_only=True)
class ValuePessimism:
    """The saddle point behind Theorem B.1, with its certificate."""

    logp: Float[Tensor, "X N A"]
    theta: Float[Tensor, " D"]
    """The worst reward parameter in the confidence ellipsoid."""
    gap: float
    """Dual minus primal objective, ≥ 0 and 0 at the optimum."""


def solve_value_pessimism(evidence: Evidence) -> ValuePessimism:
    r"""π̂ = argmax_π V_β^π(θ_MLE) − ϱ ‖E_{d^π}[φ]‖_{Σ_𝒟⁻¹}  (Appendix B: pessimism on the value).

    The objective is concave in the occupancy measure, and −ϱ‖v‖_{Σ⁻¹} = min_{‖u‖≤1} −ϱ uᵀΣ^{−1/2}v, so by
    the minimax theorem max and min change places:

        min_{‖u‖≤1} V*_β(θ_MLE − ϱ Σ^{−1/2} u).

    The soft-optimal value is convex in θ with gradient E_{d^π_θ}[φ], so this is smooth and convex, in d
    dimensions; solved by sequential quadratic programming. π̂ is soft-optimal for the worst θ.
    The gap between both sides certifies it.
    """
    problem = evidence.problem
    root = torch.linalg.cholesky(evidence.sigma)

    def parameter(u: np.ndarray) -> Tensor:
        step = torch.linalg.solve_triangular(root.T, torch.from_numpy(u)[:, None], upper=True)[:, 0]
        return evidence.theta - evidence.rho * step

    def dual(u: np.ndarray) -> tuple[float, np.ndarray]:
        theta = parameter(u)
        mdp = problem.with_theta(theta)
        best = soft_optimal(mdp)
        mean = expectation(mdp, best.logp, problem.features)
        pulled = torch.linalg.solve_triangular(root, mean[:, None], upper=False)[:, 0]
        return float(mdp.prompts @ best.value[:, 0]), -evidence.rho * pulled.numpy()

    inside = {"type": "ineq", "fun": lambda u: 1.0 - u @ u, "jac": lambda u: -2.0 * u}
    start = np.zeros(len(evidence.theta))
    found = minimize(
        dual, start, jac=True, method="SLSQP", constraints=[inside], options={"ftol": 1e-13, "maxiter": 300}
    )
    u = found.x / max(1.0, float(np.linalg.norm(found.x)))
    theta = parameter(u)
    logp = soft_optimal(problem.with_theta(theta)).logp
    mean = expectation(problem.mdp, logp, problem.features)
    kl = expectation(problem.mdp, logp, problem.mdp.beta * problem.mdp.logratio(logp))
    primal = float(mean @ evidence.theta - kl - evidence.rho * inverse_norm(mean, evidence.sigma))
    return ValuePessimism(logp=logp, theta=theta, gap=dual(u)[0] - primal)


def value_pessimism(evidence: Evidence) -> Float[Tensor, "X N A"]:
    """The policy of Theorem B.1."""
    return solve_value_pessimism(evidence).logp


LEARNERS: dict[str, Learner] = {
    "token pessimism (Alg. 1)": token_pessimism,
    "value pessimism (App. B)": value_pessimism,
    "sentence pessimism": sentence_pessimism,
    "no pessimism": no_pessimism,
    "bandit, an arm a response": bandit,
}


def bound_4_2(evidence: Evidence, learned: Float[Tensor, "X N A"]) -> float:
    r"""Theorem 4.2: 2ϱ E_{d*}[Σ_h ‖φ(s_h, a_h)‖_{Σ_𝒟⁻¹}] − β E_{d*}[Σ_h KL(π*(·|s_h) ‖ π̂(·|s_h))]."""
    mdp, features = evidence.problem.mdp, evidence.problem.features
    best = soft_optimal(mdp).logp
    width = expectation(mdp, best, inverse_norm(features, evidence.sigma))
    weight = mdp.prompts[:, None] * occupancy(mdp, best)
    away = (weight * divergence(best, learned)).sum()
    return float(2.0 * evidence.rho * width - mdp.beta * away)


def bound_b_1(evidence: Evidence) -> float:
    """Theorem B.1: 2ϱ ‖E_{d*}[Σ_h φ(s_h, a_h)]‖_{Σ_𝒟⁻¹}."""
    mdp = evidence.problem.mdp
    mean = expectation(mdp, soft_optimal(mdp).logp, evidence.problem.features)
    return float(2.0 * evidence.rho * inverse_norm(mean, evidence.sigma))
