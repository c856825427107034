"""Token MDPs whose transitions are drawn, for what Proposition C.2 says about them.

A state is one of S; transitions P_h(s'|s, a). A *policy fixed in advance* writes the whole response before it
sees a state: the sentence-level bandit's policy. With concatenation it loses nothing; here it does.
"""

from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from rto.theory.mdp import TokenMDP


@dataclass(frozen=True, kw_only=True)
class StochasticMDP:
    """A finite-horizon MDP with drawn transitions, started in state 0.

    Attributes:
        reward: r_h(s, a).
        transition: P_h(s'|s, a), for the steps that have a successor.
        ref_logp: log π_ref,h(a|s).
        beta: β ≥ 0; 0 is the unregularised problem.
    """

    reward: Float[Tensor, "H S A"]
    transition: Float[Tensor, "H1 S A S"]
    ref_logp: Float[Tensor, "H S A"]
    beta: float

    def __post_init__(self) -> None:
        if len(self.transition) != len(self.reward) - 1:
            raise ValueError("H steps have H − 1 transitions")
        if not torch.allclose(self.transition.sum(-1), torch.ones(()).double(), atol=1e-12):
            raise ValueError("transitions do not sum to one")

    def onward(self, step: int, value: Float[Tensor, " S"]) -> Float[Tensor, "S A"]:
        """E[V(s_{h+1}) | s_h, a_h]; 0 after the last step."""
        if step == len(self.transition):
            return torch.zeros_like(self.reward[step])
        return self.transition[step] @ value


def soft_optimal(mdp: StochasticMDP) -> tuple[Float[Tensor, "H S"], Float[Tensor, "H S A"]]:
    """V* and Q* by (soft, or hard when β = 0) value iteration."""
    values, qs = torch.zeros_like(mdp.reward[..., 0]), torch.zeros_like(mdp.reward)
    following = torch.zeros_like(values[0])
    for h in reversed(range(len(mdp.reward))):
        qs[h] = mdp.reward[h] + mdp.onward(h, following)
        if mdp.beta == 0:
            following = qs[h].amax(-1)
        else:
            following = mdp.beta * torch.logsumexp(mdp.ref_logp[h] + qs[h] / mdp.beta, -1)
        values[h] = following
    return values, qs


def value_fixed_in_advance(mdp: StochasticMDP) -> float:
    """The maximum of E[Σ r] over responses written before any state is seen, by enumerating all A^H of them.

    A distribution over responses does no better: its value is the mean of theirs.
    """
    best = -torch.inf
    for response in product(range(mdp.reward.shape[2]), repeat=len(mdp.reward)):
        where = torch.zeros_like(mdp.reward[0, :, 0])
        where[0] = 1.0
        total = 0.0
        for h, token in enumerate(response):
            total += float(where @ mdp.reward[h, :, token])
            if h < len(mdp.transition):
                where = where @ mdp.transition[h, :, token]
        best = max(best, total)
    return best


def counter_example(vocabulary: int = 2, beta: float = 0.0) -> StochasticMDP:
    """Proposition C.2: after any first token a state s ∈ {1, …, A} is drawn; the token that names it pays 1.

    Who sees the state gets 1. Whatever is written in advance gets 1/A: it loses 1 − 1/A ≥ 1/2.
    """
    states = vocabulary + 1
    reward = torch.zeros(2, states, vocabulary, dtype=torch.float64)
    reward[1, 1:] = torch.eye(vocabulary, dtype=torch.float64)
    transition = torch.zeros(1, states, vocabulary, states, dtype=torch.float64)
    transition[..., 1:] = 1.0 / vocabulary
    uniform = -torch.log(torch.full_like(reward, float(vocabulary)))
    return StochasticMDP(reward=reward, transition=transition, ref_logp=uniform, beta=beta)


def random_stochastic(horizon: int, states: int, vocabulary: int, *, beta: float, seed: int) -> StochasticMDP:
    """Normal rewards, and transitions and a reference that are softmaxes of normal logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return StochasticMDP(
        reward=normal(horizon, states, vocabulary),
        transition=normal(horizon - 1, states, vocabulary, states).softmax(-1),
        ref_logp=normal(horizon, states, vocabulary).log_softmax(-1),
        beta=beta,
    )


def from_tokens(mdp: TokenMDP) -> StochasticMDP:
    """The first prompt of a token MDP as a stochastic one, with S = N and every transition certain.

    Both solvers must agree on it.

    Raises:
        ValueError: the token MDP has an end-of-sequence token.
    """
    tree = mdp.tree
    if tree.eos is not None:
        raise ValueError("only trees without an end-of-sequence token are converted")
    n, a, h = tree.size, tree.vocabulary, tree.horizon
    transition = torch.zeros(h - 1, n, a, n, dtype=torch.float64)
    transition[..., 0] = 1.0
    for depth in range(h - 1):
        for s in range(*tree.level(depth).indices(n)):
            for token in range(a):
                transition[depth, s, token, 0] = 0.0
                transition[depth, s, token, s * a + 1 + token] = 1.0
    return StochasticMDP(
        reward=mdp.reward[0].expand(h, n, a).clone(),
        transition=transition,
        ref_logp=mdp.ref_logp[0].expand(h, n, a).clone(),
        beta=mdp.beta,
    )


def telescoping_gap(mdp: StochasticMDP, states: list[int], tokens: list[int]) -> tuple[float, float]:
    r"""How far Σ_h β log π*/π_ref is from r(τ) − V*(s₁) on one trajectory, and what explains it.

    Returns the gap and Σ_h (E[V*(s_{h+1})|s_h, a_h] − V*(s_{h+1})). They are equal; with deterministic
    transitions both are 0, and that is where the derivation of the token reward uses them.
    """
    values, qs = soft_optimal(mdp)
    total, paid, surprise = 0.0, 0.0, 0.0
    for h, (s, a) in enumerate(zip(states, tokens)):
        total += float(qs[h, s, a] - values[h, s])
        paid += float(mdp.reward[h, s, a])
        if h + 1 < len(states):
            surprise += float(mdp.onward(h, values[h + 1])[s, a] - values[h + 1, states[h + 1]])
    return total - (paid - float(values[0, states[0]])), surprise
