"""Token MDPs small enough to solve exactly: a state is a prefix, a transition appends a token.

Notation, used in the whole of `rto.theory`: X prompts, A tokens, H horizon, N states a prompt, Y responses.

A state is s_h = (x, y_<h). The N = 1 + A + … + A^{H−1} prefixes shorter than H are numbered like an A-ary
heap: 0 is the empty prefix, and token a leads from n to A·n + 1 + a. Rewards and policies are tables
[X, N, A], values are tables [X, N]. With an end-of-sequence token, a prefix that holds it is *ended*: it pays
nothing, goes on with that token alone, and belongs to no response.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """The states of one prompt.

    Attributes:
        vocabulary: A, at least 2.
        horizon: H, the most tokens in a response.
        eos: the token that ends a response before the horizon; None if every response has H tokens.
    """

    vocabulary: int
    horizon: int
    eos: int | None = None

    def __post_init__(self) -> None:
        if self.vocabulary < 2 or self.horizon < 1:
            raise ValueError(f"need A ≥ 2 and H ≥ 1, got A = {self.vocabulary}, H = {self.horizon}")
        if self.eos is not None and not 0 <= self.eos < self.vocabulary:
            raise ValueError(f"eos {self.eos} is not one of the {self.vocabulary} tokens")

    @property
    def size(self) -> int:
        """N = (A^H − 1) / (A − 1)."""
        return (self.vocabulary**self.horizon - 1) // (self.vocabulary - 1)

    def level(self, depth: int) -> slice:
        """The states that are prefixes of ``depth`` tokens; one level past the horizon are the leaves."""
        start = (self.vocabulary**depth - 1) // (self.vocabulary - 1)
        return slice(start, start + self.vocabulary**depth)

    @cached_property
    def ended(self) -> Bool[Tensor, " N"]:
        """True on the states whose prefix holds the end-of-sequence token."""
        ended = torch.zeros(self.size, dtype=torch.bool)
        if self.eos is not None:
            for child in range(1, self.size):
                parent, token = divmod(child - 1, self.vocabulary)
                ended[child] = ended[parent] | (token == self.eos)
        return ended

    @cached_property
    def legal(self) -> Bool[Tensor, "N A"]:
        """True where a token may be chosen: everywhere, but an ended prefix goes on with eos alone."""
        legal = torch.ones(self.size, self.vocabulary, dtype=torch.bool)
        if self.eos is not None:
            legal[self.ended] = torch.arange(self.vocabulary) == self.eos
        return legal

    @cached_property
    def responses(self) -> "Responses":
        """Every response once."""
        return Responses.of(self)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """All Y responses of a tree, enumerated: what brute force runs on, and what `rto.functional` is given."""

    tree: PrefixTree
    tokens: Int[Tensor, "Y H"]
    """y_1 … y_H; after an end-of-sequence token, that token again."""
    mask: Bool[Tensor, "Y H"]
    """True on the tokens of the response, end-of-sequence included."""
    nodes: Int[Tensor, "Y H"]
    """s_h, the state in which y_h is chosen."""

    @classmethod
    def of(cls, tree: PrefixTree) -> "Responses":
        """Enumerate: the Cartesian product of the tokens, less what goes on after the end."""
        tokens = torch.tensor(list(product(range(tree.vocabulary), repeat=tree.horizon)))
        nodes = torch.zeros_like(tokens)
        for h in range(1, tree.horizon):
            nodes[:, h] = nodes[:, h - 1] * tree.vocabulary + 1 + tokens[:, h - 1]
        kept = tree.legal[nodes, tokens].all(-1)
        tokens, nodes = tokens[kept], nodes[kept]
        return cls(tree=tree, tokens=tokens, mask=~tree.ended[nodes], nodes=nodes)

    def read(self, table: Float[Tensor, "X N A"]) -> Float[Tensor, "X Y H"]:
        """The table's entries along each response, 0 after its end."""
        return torch.where(self.mask, table[:, self.nodes, self.tokens], 0.0)

    def read_states(self, values: Float[Tensor, "X N"]) -> Float[Tensor, "X Y H"]:
        """The values of the states along each response, 0 after its end."""
        return torch.where(self.mask, values[:, self.nodes], 0.0)

    def write(self, along: Float[Tensor, "X Y H"], *, tolerance: float = 1e-9) -> Float[Tensor, "X N A"]:
        """The table whose `read` is ``along``.

        Raises:
            ValueError: responses that share a state and a token disagree, so it is no function of (s, a).
        """
        table = along.new_zeros(along.shape[0], self.tree.size, self.tree.vocabulary)
        y, h = self.mask.nonzero(as_tuple=True)
        table[:, self.nodes[y, h], self.tokens[y, h]] = along[:, y, h]
        if not torch.allclose(self.read(table), torch.where(self.mask, along, 0.0), rtol=0, atol=tolerance):
            raise ValueError("the rewards differ between responses that share a prefix")
        return table


@dataclass(frozen=True, kw_only=True)
class TokenMDP:
    """A KL-regularised token MDP with deterministic transitions by concatenation (§3.1 of the paper).

    V_β^π(s) = E_π[Σ_h r(s_h, a_h) − β log π(a_h|s_h)/π_ref(a_h|s_h)].

    Attributes:
        tree: the states.
        reward: r(s, a), 0 on ended states.
        ref_logp: log π_ref(a|s); −inf exactly where a token is not legal.
        prompts: the distribution of the prompts.
        beta: β > 0.
    """

    tree: PrefixTree
    reward: Float[Tensor, "X N A"]
    ref_logp: Float[Tensor, "X N A"]
    prompts: Float[Tensor, " X"]
    beta: float

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.reward.dtype != torch.float64 or self.ref_logp.dtype != torch.float64:
            raise ValueError("the theory runs in float64")
        if self.reward.shape[1:] != self.tree.legal.shape:
            raise ValueError(f"reward is {tuple(self.reward.shape)}, the tree {tuple(self.tree.legal.shape)}")
        if not torch.equal(self.ref_logp > -torch.inf, self.tree.legal.expand_as(self.ref_logp)):
            raise ValueError("the reference must be positive on every legal token and on no other")
        if not torch.allclose(self.ref_logp.logsumexp(-1), torch.zeros(()).double(), atol=1e-9):
            raise ValueError("the reference does not sum to one")
        if self.reward[:, self.tree.ended].any():
            raise ValueError("an ended response pays nothing")

    def logratio(self, logp: Float[Tensor, "X N A"]) -> Float[Tensor, "X N A"]:
        """The log-ratio log π/π_ref, 0 where a token is not legal."""
        return torch.where(self.tree.legal, logp - self.ref_logp, 0.0)


@dataclass(frozen=True, kw_only=True)
class SoftOptimum:
    """What `soft_optimal` returns."""

    value: Float[Tensor, "X N"]
    q: Float[Tensor, "X N A"]
    logp: Float[Tensor, "X N A"]


def soft_optimal(mdp: TokenMDP) -> SoftOptimum:
    r"""Soft value iteration, exact in H steps.

    Q*(s, a) = r(s, a) + V*(s'),   V*(s) = β log Σ_a π_ref(a|s) exp{Q*(s, a)/β},
    π*_β(a|s) = π_ref(a|s) exp{(Q*(s, a) − V*(s))/β}.

    The paper (§3.1) puts β log π_ref into its reward, so that its π*_β = exp{(Q* − V*)/β} has no π_ref in
    front; this Q* is the paper's less β log π_ref.
    """
    tree, shape = mdp.tree, mdp.reward.shape
    value, q = mdp.reward.new_zeros(shape[:2]), torch.zeros_like(mdp.reward)
    following = mdp.reward.new_zeros(shape[0], tree.vocabulary**tree.horizon)
    for depth in reversed(range(tree.horizon)):
        at = tree.level(depth)
        q[:, at] = mdp.reward[:, at] + following.view(shape[0], -1, tree.vocabulary)
        following = mdp.beta * torch.logsumexp(mdp.ref_logp[:, at] + q[:, at] / mdp.beta, -1)
        value[:, at] = following
    return SoftOptimum(value=value, q=q, logp=mdp.ref_logp + (q - value[..., None]) / mdp.beta)


def evaluate(mdp: TokenMDP, logp: Float[Tensor, "X N A"]) -> Float[Tensor, "X N"]:
    """V_β^π(s) of any policy, by backward induction."""
    tree, shape = mdp.tree, mdp.reward.shape
    value, prob = mdp.reward.new_zeros(shape[:2]), logp.exp()
    pay = mdp.reward - mdp.beta * (logp - mdp.ref_logp)
    following = mdp.reward.new_zeros(shape[0], tree.vocabulary**tree.horizon)
    for depth in reversed(range(tree.horizon)):
        at = tree.level(depth)
        total = pay[:, at] + following.view(shape[0], -1, tree.vocabulary)
        following = torch.where(prob[:, at] > 0, prob[:, at] * total, 0.0).sum(-1)
        value[:, at] = following
    return value


def advantage(mdp: TokenMDP, logp: Float[Tensor, "X N A"]) -> Float[Tensor, "X N A"]:
    """A^π(s, a) = r − β log π/π_ref + V^π(s') − V^π(s); the KL of the token at hand counts as its reward."""
    value = evaluate(mdp, logp)
    leaves = value.new_zeros(value.shape[0], mdp.tree.vocabulary**mdp.tree.horizon)
    following = torch.cat([value, leaves], dim=1)[:, 1:].view(mdp.reward.shape)
    full = mdp.reward - mdp.beta * mdp.logratio(logp) + following - value[..., None]
    return torch.where(mdp.tree.legal, full, 0.0)


def occupancy(mdp: TokenMDP, logp: Float[Tensor, "X N A"]) -> Float[Tensor, "X N"]:
    """d^π(s|x), the probability that a response to x passes through s; 0 on ended states."""
    tree = mdp.tree
    reach = logp.new_zeros(logp.shape[:2])
    reach[:, 0] = 1.0
    for depth in range(tree.horizon - 1):
        onward = reach[:, tree.level(depth), None] * logp[:, tree.level(depth)].exp()
        reach[:, tree.level(depth + 1)] = onward.flatten(1)
    return torch.where(tree.ended, 0.0, reach)


def expectation(mdp: TokenMDP, logp: Float[Tensor, "X N A"], table: Float[Tensor, "X N A *D"]) -> Float[Tensor, "*D"]:
    """E_{x, d^π}[Σ_h f(s_h, a_h)], for a table of numbers or of vectors."""
    weight = mdp.prompts[:, None, None] * occupancy(mdp, logp)[..., None] * logp.exp()
    return torch.tensordot(weight, table, dims=3)


def divergence(p: Float[Tensor, "X N A"], q: Float[Tensor, "X N A"]) -> Float[Tensor, "X N"]:
    """KL(p(·|s) ‖ q(·|s)) in each state, nats."""
    prob = p.exp()
    return torch.where(prob > 0, prob * (p - q), 0.0).sum(-1)


def mean_value(mdp: TokenMDP, value: Float[Tensor, "X N"]) -> float:
    """E_x[V(s_1)]."""
    return float(mdp.prompts @ value[:, 0])


def suboptimality(mdp: TokenMDP, logp: Float[Tensor, "X N A"]) -> float:
    """SubOpt_β(π) = E_x[V*_β(s_1) − V_β^π(s_1)]."""
    return mean_value(mdp, soft_optimal(mdp).value - evaluate(mdp, logp))


def sample(
    mdp: TokenMDP, logp: Float[Tensor, "X N A"], count: int, generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """``count`` prompts x ~ ρ and responses y ~ π(·|x), as indices into the prompts and into `Responses`."""
    prompts = torch.multinomial(mdp.prompts, count, replacement=True, generator=generator)
    whole = mdp.tree.responses.read(logp).sum(-1).exp()
    return prompts, torch.multinomial(whole[prompts], 1, generator=generator)[:, 0]
