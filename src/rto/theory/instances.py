"""Random token MDPs, and the ways to pay in them: token by token, whole sentences, linear in features."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from rto.theory.mdp import PrefixTree, TokenMDP, soft_optimal

Rewards = Callable[[PrefixTree, int, torch.Generator], Float[Tensor, "X N A"]]
"""(tree, number of prompts, generator) to r(s, a)."""


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _alive(tree: PrefixTree) -> Tensor:
    return ~tree.ended[:, None].expand(tree.size, tree.vocabulary)


def token_rewards(tree: PrefixTree, prompts: int, generator: torch.Generator) -> Float[Tensor, "X N A"]:
    """r(s, a) ~ N(0, 1), at every token."""
    return torch.where(_alive(tree), _normal((prompts, tree.size, tree.vocabulary), generator), 0.0)


def sentence_rewards(tree: PrefixTree, prompts: int, generator: torch.Generator) -> Float[Tensor, "X N A"]:
    """r(y) ~ N(0, H), paid at the last token; nothing before."""
    last = torch.zeros(tree.size, tree.vocabulary, dtype=torch.bool)
    last[tree.level(tree.horizon - 1)] = True
    if tree.eos is not None:
        last[:, tree.eos] = True
    drawn = _normal((prompts, tree.size, tree.vocabulary), generator) * tree.horizon**0.5
    return torch.where(last & _alive(tree), drawn, 0.0)


def normalise(logits: Float[Tensor, "X N A"], tree: PrefixTree) -> Float[Tensor, "X N A"]:
    """The policy with these logits on the legal tokens."""
    return torch.where(tree.legal, logits, -torch.inf).log_softmax(-1)


def random_policy(
    tree: PrefixTree, prompts: int, generator: torch.Generator, *, spread: float = 1.0
) -> Float[Tensor, "X N A"]:
    """A policy, log π(a|s), with independent N(0, spread²) logits; spread 0 is uniform."""
    return normalise(spread * _normal((prompts, tree.size, tree.vocabulary), generator), tree)


def random_mdp(
    vocabulary: int,
    horizon: int,
    *,
    prompts: int = 1,
    beta: float = 1.0,
    eos: bool = False,
    spread: float = 1.0,
    rewards: Rewards = token_rewards,
    seed: int = 0,
) -> TokenMDP:
    """A token MDP with random rewards, a random reference (``spread``) and equally likely prompts.

    With ``eos`` the last token of the vocabulary ends a response.
    """
    generator = torch.Generator().manual_seed(seed)
    tree = PrefixTree(vocabulary=vocabulary, horizon=horizon, eos=vocabulary - 1 if eos else None)
    return TokenMDP(
        tree=tree,
        reward=rewards(tree, prompts, generator),
        ref_logp=random_policy(tree, prompts, generator, spread=spread),
        prompts=torch.full((prompts,), 1.0 / prompts, dtype=torch.float64),
        beta=beta,
    )


@dataclass(frozen=True, kw_only=True)
class LinearMDP:
    """A token MDP with r(s, a) = φ(s, a)ᵀθ*, ‖φ‖ ≤ L, ‖θ*‖ ≤ B (the setting of §4.2)."""

    mdp: TokenMDP
    features: Float[Tensor, "X N A D"]
    theta: Float[Tensor, " D"]
    radius: float
    """B, the bound on ‖θ*‖ that the learner knows."""

    def with_theta(self, theta: Float[Tensor, " D"]) -> TokenMDP:
        """The same MDP paying φᵀθ."""
        return replace(self.mdp, reward=self.features @ theta)

    def with_reward(self, reward: Float[Tensor, "X N A"]) -> TokenMDP:
        """The same MDP with another reward."""
        return replace(self.mdp, reward=reward)


def linear_mdp(
    mdp: TokenMDP,
    dimension: int,
    *,
    radius: float = 1.0,
    bound: float = 1.0,
    seed: int = 0,
) -> LinearMDP:
    """Features uniform on the sphere of radius L = ``bound``, θ* uniform on the sphere of radius B."""
    generator = torch.Generator().manual_seed(seed)
    features = _normal((*mdp.reward.shape, dimension), generator)
    features = bound * features / features.norm(dim=-1, keepdim=True)
    features = torch.where(_alive(mdp.tree)[..., None], features, 0.0)
    theta = _normal((dimension,), generator)
    theta = radius * theta / theta.norm()
    return LinearMDP(mdp=replace(mdp, reward=features @ theta), features=features, theta=theta, radius=radius)


def best_logp(mdp: TokenMDP) -> float:
    """max_y log π*(y|x) over the responses to the first prompt."""
    return float(mdp.tree.responses.read(soft_optimal(mdp).logp).sum(-1)[0].max())


def with_xi(mdp: TokenMDP, xi: float) -> TokenMDP:
    """The same MDP at the β for which max_y π*(y|x) = A^{−ξ}: Assumption 3.1 with equality.

    With a uniform reference, max_y π*(y|x) falls from 1 to A^{−H} as β rises, so that any ξ in (0, H) has
    one β; it is found by bisection.

    Raises:
        ValueError: ξ is not strictly between what β → ∞ and β → 0 give.
    """
    target = -xi * log(mdp.tree.vocabulary)
    low, high = -14.0, 14.0
    if not best_logp(replace(mdp, beta=2.0**high)) < target < best_logp(replace(mdp, beta=2.0**low)):
        raise ValueError(f"no β gives ξ = {xi} here")
    for _ in range(80):
        middle = (low + high) / 2
        if best_logp(replace(mdp, beta=2.0**middle)) > target:
            low = middle
        else:
            high = middle
    return replace(mdp, beta=2.0**low)


def comb(vocabulary: int, horizon: int, xi: int) -> Float[Tensor, "1 N A"]:
    """The log π* of the instance with the most nodes to visit: uniform for ξ steps, then one certain token.

    A^ξ responses of probability A^{−ξ} each, A^ξ − 1 of them not unique optima: the hardest case of
    Assumption 3.1 for integer ξ.
    """
    tree = PrefixTree(vocabulary=vocabulary, horizon=horizon)
    logp = torch.full((1, tree.size, vocabulary), -torch.inf, dtype=torch.float64)
    logp[..., 0] = 0.0
    logp[:, : tree.level(xi).start] = -log(vocabulary)
    return logp
