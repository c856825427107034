"""Reinforced Token Optimization where everything is known: Algorithm 2 with a table for a language model.

Stage 1 fits π_dpo with the loss that trains language models (`rto.functional.preference`); stage 2 runs
proximal policy optimisation on Eq. 4.7 with `rto.functional.rewards`, `advantages` and `ppo`. The value of
every policy on the way is exact.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from torch import Tensor

from rto.functional.advantages import GAE, ReinforcePlusPlus
from rto.functional.masked import masked_mean, whiten
from rto.functional.ppo import policy_loss, value_loss
from rto.functional.preference import DPO, Completions
from rto.functional.rewards import PLACEMENTS, RTOReward
from rto.theory.instances import normalise
from rto.theory.mdp import TokenMDP, evaluate, mean_value
from rto.theory.preferences import Preferences


def dpo_loss(mdp: TokenMDP, data: Preferences, logp: Float[Tensor, "X N A"]) -> Float[Tensor, ""]:
    """Σ over the comparisons of DPO's loss, by `rto.functional.preference.DPO`."""
    responses, loss = mdp.tree.responses, DPO(beta=mdp.beta)
    legal = torch.where(mdp.tree.legal, logp, 0.0)
    policy, ref = responses.read(legal), responses.read(mdp.ref_logp)

    def side(which: Tensor) -> Completions:
        at = (data.prompt, which)
        return Completions(logp=policy[at], ref_logp=ref[at], mask=responses.mask[which])

    first, second = side(data.first), side(data.second)
    return data.wins @ loss(first, second).loss + (data.count - data.wins) @ loss(second, first).loss


def fit_dpo(mdp: TokenMDP, data: Preferences, *, ridge: float = 0.1) -> Float[Tensor, "X N A"]:
    """π_dpo = softmax(log π_ref + δ), with δ = argmin DPO loss + ridge/2 ‖δ‖², by L-BFGS; returns its log.

    The ridge stands for what early stopping does to a language model: without it, a response that was
    preferred in every comparison drives its log-ratio to infinity. At 0.1 it weighs as much as a fraction of
    one comparison.
    """
    shape = mdp.ref_logp.shape
    base = torch.where(mdp.tree.legal, mdp.ref_logp, 0.0)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        delta = torch.from_numpy(flat).view(shape).requires_grad_()
        loss = dpo_loss(mdp, data, normalise(base + delta, mdp.tree)) + 0.5 * ridge * delta.square().sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        return loss.item(), gradient.flatten().numpy()

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-8}
    start = np.zeros(base.numel())
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return normalise(base + torch.from_numpy(found.x).view(shape), mdp.tree)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to spend rollouts.

    Attributes:
        reward: Eq. 4.7's coefficients.
        placement: ``token``, ``sentence`` or ``final``.
        estimator: REINFORCE++, or GAE with a tabular critic that starts from 0.
        learning_rate: of Adam, for the logits; the critic's is ten times that.
        batch_size: rollouts an iteration.
        epochs: PPO epochs an iteration.
        cliprange: ε of PPO.
    """

    reward: RTOReward
    placement: str = "token"
    estimator: GAE | ReinforcePlusPlus = field(default_factory=ReinforcePlusPlus)
    learning_rate: float = 0.05
    batch_size: int = 32
    epochs: int = 2
    cliprange: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Run:
    """The exact value of the policy as rollouts are spent."""

    rollouts: Float[Tensor, " I"]
    value: Float[Tensor, " I"]

    def rollouts_to(self, value: float) -> float:
        """Rollouts until the value is first reached; inf if it never is."""
        reached = (self.value >= value).nonzero()
        return float(self.rollouts[reached[0, 0]]) if len(reached) else float("inf")


def token_text(mdp: TokenMDP, token: int) -> str:
    """Letters, but the token before the last is a full stop: what sentence placement looks for."""
    return "." if token == mdp.tree.vocabulary - 2 else chr(ord("a") + token)


def anchors(mdp: TokenMDP, placement: str) -> Bool[Tensor, "Y H"]:
    """Where the placement pays, on every response."""
    responses = mdp.tree.responses
    return PLACEMENTS[placement](responses.tokens, responses.mask, lambda token: token_text(mdp, token))


def train(
    mdp: TokenMDP,
    recipe: Recipe,
    *,
    dpo: Float[Tensor, "X N A"] | None,
    scores: Float[Tensor, "X Y"],
    iterations: int,
    seed: int,
    until: float = float("inf"),
) -> Run:
    """Sample → score → credit → update, at most ``iterations`` times; a forward pass is a look at the table.

    Args:
        mdp: the problem; prompts are drawn from it and every policy's value is computed in it.
        recipe: what is optimised, and how.
        dpo: log π_dpo, or None when β₁ = 0.
        scores: r_MLE(x, y) of all responses.
        iterations: batches of rollouts.
        seed: of the rollouts.
        until: stop as soon as the value is this high.
    """
    torch_rng = torch.Generator().manual_seed(seed)
    responses = mdp.tree.responses
    base = torch.where(mdp.tree.legal, mdp.ref_logp, 0.0)
    logits = base.clone().requires_grad_()
    critic = mdp.reward.new_zeros(mdp.reward.shape[:2]).requires_grad_()
    optimiser = torch.optim.Adam(
        [
            {"params": [logits], "lr": recipe.learning_rate},
            {"params": [critic], "lr": 10 * recipe.learning_rate},
        ]
    )
    pay_at = anchors(mdp, recipe.placement)
    ratio = None if dpo is None else mdp.logratio(dpo)
    value, spent = [mean_value(mdp, evaluate(mdp, mdp.ref_logp))], [0.0]
    for step in range(iterations):
        with torch.no_grad():  # sample
            now = normalise(logits, mdp.tree)
            x = torch.multinomial(mdp.prompts, recipe.batch_size, replacement=True, generator=torch_rng)
            whole = responses.read(now).sum(-1).exp()
            y = torch.multinomial(whole[x], 1, generator=torch_rng)[:, 0]
            mask, at = responses.mask[y], (x[:, None], responses.nodes[y], responses.tokens[y])
            old_logp = torch.where(mask, now[at], 0.0)
            old_values = torch.where(mask, critic[at[:2]], 0.0)
            terms = recipe.reward(  # score
                policy_logp=old_logp,
                ref_logp=torch.where(mask, mdp.ref_logp[at], 0.0),
                token_logratio=None if ratio is None else ratio[at],
                scores=scores[x, y],
                mask=mask,
                anchors=pay_at[y],
            )
            credit = recipe.estimator(terms.total, old_values, mask)  # credit
            advantages = whiten(credit.advantages, mask)
        for _ in range(recipe.epochs):  # update
            logp = torch.where(mask, normalise(logits, mdp.tree)[at], 0.0)
            each = policy_loss(logp, old_logp, advantages, cliprange=recipe.cliprange).loss
            loss = masked_mean(each, mask)
            if recipe.estimator.needs_values:
                values = torch.where(mask, critic[at[:2]], 0.0)
                fit = value_loss(values, old_values, credit.returns, cliprange=None).loss
                loss = loss + masked_mean(fit, mask)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        value.append(mean_value(mdp, evaluate(mdp, normalise(logits.detach(), mdp.tree))))
        spent.append(float((step + 1) * recipe.batch_size))
        if value[-1] >= until:
            break
    return Run(rollouts=torch.tensor(spent, dtype=torch.float64), value=torch.tensor(value, dtype=torch.float64))


def dense(mdp: TokenMDP) -> RTOReward:
    """β₁ = β₂ = β, β₃ = 0, no clip: with π_dpo = π* its optimum is π* wherever the reward is placed."""
    return RTOReward(dpo_coef=mdp.beta, kl_coef=mdp.beta, score_coef=0.0, token_reward_clip=None)


def score_only(mdp: TokenMDP) -> RTOReward:
    """β₁ = 0, β₂ = β, β₃ = 1: PPO. Its optimum is π* too."""
    return RTOReward(dpo_coef=0.0, kl_coef=mdp.beta, score_coef=1.0, token_reward_clip=None)


ESTIMATORS: dict[str, GAE | ReinforcePlusPlus] = {
    "REINFORCE++": ReinforcePlusPlus(),
    "GAE, learned critic": GAE(gamma=1.0, lam=0.95),
}
