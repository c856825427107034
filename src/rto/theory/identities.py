"""The identities that make β log π*/π_ref a token reward, and what runs `rto.functional` on them.

Each function returns what should agree; the tests and the page check that it does.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.functional.rewards import RTOReward
from rto.theory.mdp import TokenMDP


def dense_reward(mdp: TokenMDP, logp: Float[Tensor, "X N A"]) -> Float[Tensor, "X N A"]:
    r"""β log π(a|s)/π_ref(a|s); with π = π*_β the token reward of §4.3.

    Identity (Rafailov et al., 2024; §4.3 of the paper): Σ_h β log π*/π_ref = r(τ) − V*(s₁).
    """
    return mdp.beta * mdp.logratio(logp)


def response_reward(mdp: TokenMDP) -> Float[Tensor, "X Y"]:
    """r(τ) = Σ_h r(s_h, a_h) of every response."""
    return mdp.tree.responses.read(mdp.reward).sum(-1)


def shaped(mdp: TokenMDP, potential: Float[Tensor, "X N"]) -> TokenMDP:
    """The MDP paying r(s, a) + Φ(s') − Φ(s), with Φ = 0 once a response is over (Ng et al., 1999).

    π*_β is unchanged and V* becomes V* − Φ.
    """
    tree = mdp.tree
    live = torch.where(tree.ended, 0.0, potential)
    leaves = live.new_zeros(live.shape[0], tree.vocabulary**tree.horizon)
    following = torch.cat([live, leaves], dim=1)[:, 1:].view(mdp.reward.shape)
    added = torch.where(tree.ended[:, None], 0.0, following - live[..., None])
    return replace(mdp, reward=mdp.reward + added)


def trained_reward(
    mdp: TokenMDP,
    reward: RTOReward,
    *,
    policy: Float[Tensor, "X N A"],
    dpo: Float[Tensor, "X N A"] | None,
    scores: Float[Tensor, "X Y"],
    anchors: Bool[Tensor, "Y H"] | None = None,
) -> Float[Tensor, "X Y H"]:
    """Eq. 4.7 by the code that trains language models, on every response to every prompt.

    Args:
        mdp: the token MDP.
        reward: the coefficients.
        policy: log π.
        dpo: log π_dpo, or None when β₁ = 0.
        scores: r_MLE(x, y).
        anchors: where token rewards are paid; None pays every token where it stands.
    """
    responses = mdp.tree.responses
    x, y, h = len(mdp.prompts), *responses.mask.shape

    def rows(table: Float[Tensor, "X N A"]) -> Float[Tensor, "B H"]:
        return responses.read(table).reshape(x * y, h)

    mask = responses.mask.repeat(x, 1)
    terms = reward(
        policy_logp=rows(policy),
        ref_logp=rows(mdp.ref_logp),
        token_logratio=None if dpo is None else rows(mdp.logratio(dpo)),
        scores=scores.reshape(-1),
        mask=mask,
        anchors=mask if anchors is None else anchors.repeat(x, 1),
    )
    return terms.total.view(x, y, h)
