"""Policy gradients of a tabular softmax policy, exactly: their mean and their variance, by enumeration."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rto.theory.mdp import TokenMDP, advantage, occupancy


@dataclass(frozen=True, kw_only=True)
class GradientMoments:
    """Mean and total variance of the one-sample estimator."""

    mean: Float[Tensor, "X N A"]
    variance: float
    """E‖g‖² − ‖E g‖², the trace of the covariance."""

    @property
    def noise_to_signal(self) -> float:
        """Variance over ‖mean‖²: about how many samples an estimate of the direction needs."""
        return self.variance / float(self.mean.square().sum())


def exact_gradient(mdp: TokenMDP, logp: Float[Tensor, "X N A"]) -> Float[Tensor, "X N A"]:
    """∂/∂θ(x,s,a) E_x[V_β^π] = ρ(x) d^π(s|x) π(a|s) A^π(s, a), the policy gradient theorem."""
    weight = mdp.prompts[:, None] * occupancy(mdp, logp)
    return weight[..., None] * logp.exp() * advantage(mdp, logp)


def gradient_moments(mdp: TokenMDP, logp: Float[Tensor, "X N A"], credit: Float[Tensor, "X Y H"]) -> GradientMoments:
    r"""Moments of g = Σ_h Ĝ_h ∇_θ log π(a_h|s_h) over x ~ ρ, y ~ π(·|x), for logits θ(x, s, a).

    ∇_{θ(x,s,·)} log π(a|s) = e_a − π(·|s), and a response passes each state at most once, so
    ‖g‖² = Σ_h Ĝ_h² ‖e_{a_h} − π(·|s_h)‖².

    Args:
        mdp: where the prompts come from.
        logp: log π.
        credit: Ĝ_h, what multiplies each score: advantages, or rewards to go.
    """
    responses, prob = mdp.tree.responses, logp.exp()
    x, y, h = credit.shape
    weight = mdp.prompts[:, None] * responses.read(logp).sum(-1).exp()
    credit = torch.where(responses.mask, credit, 0.0)
    here = prob[:, responses.nodes]  # [X, Y, H, A]
    score = -here
    score.scatter_add_(-1, responses.tokens.expand(x, y, h)[..., None], torch.ones_like(here[..., :1]))
    each = weight[..., None, None] * credit[..., None] * score
    mean = torch.zeros_like(prob).index_add_(1, responses.nodes.flatten(), each.view(x, y * h, -1))
    second = (weight[..., None] * credit.square() * score.square().sum(-1)).sum()
    return GradientMoments(mean=mean, variance=float(second - mean.square().sum()))
