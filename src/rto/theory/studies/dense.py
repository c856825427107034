"""Stage 2 in miniature: what paying the token reward token by token saves, and why."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest

from rto.theory.identities import response_reward
from rto.theory.instances import random_mdp
from rto.theory.mdp import TokenMDP, advantage, evaluate, mean_value, soft_optimal
from rto.theory.miniature import ESTIMATORS, Recipe, dense, train
from rto.theory.page import PALETTE, Plot, Section, Table, canvas, plot
from rto.theory.studies.identities import on_the_way, to_go

PLACES = {"token": "token (RTO)", "sentence": "sentence (Semi-RTO)", "final": "final (DDPO)"}
RATES = (0.05, 0.1, 0.2)
BUDGET = 150
"""Iterations of 32 rollouts."""
CEILING = 32 * BUDGET
SHARES = (0.9, 0.98)
"""How far on the way from V(π_ref) to V* a policy has to come."""


def credit_noise(horizon: int, seeds: range) -> dict[str, np.ndarray]:
    """√E[(Ĝ_h − A^π(s_h, a_h))²] by position and placement, half way to π*; arrays [seeds, H]. Exact."""
    out: dict[str, list[list[float]]] = {place: [] for place in PLACES}
    for seed in seeds:
        mdp = random_mdp(3, horizon, beta=0.5, spread=0.5, seed=seed)
        policy, best = on_the_way(mdp, 0.5), soft_optimal(mdp).logp
        responses = mdp.tree.responses
        weight = mdp.prompts[:, None] * responses.read(policy).sum(-1).exp()
        truth = responses.read(advantage(mdp, policy))
        for place, rows in out.items():
            off = (to_go(place)(mdp, policy, best) - truth).square()
            rows.append((weight[..., None] * off).sum((0, 1)).sqrt().tolist())
    return {place: np.array(rows) for place, rows in out.items()}


def value_at(mdp: TokenMDP, share: float) -> float:
    """V(π_ref) + share · (V* − V(π_ref))."""
    start = mean_value(mdp, evaluate(mdp, mdp.ref_logp))
    return start + share * (mean_value(mdp, soft_optimal(mdp).value) - start)


@dataclass(frozen=True)
class Effort:
    """Rollouts [rates, shares, seeds] to a share of the way to V*; inf: not within the budget."""

    used: np.ndarray

    def best(self, share: float) -> tuple[np.ndarray, float]:
        """Rollouts by seed at the learning rate with the lowest median, ties by capped mean; the rate.

        Every arm has the same rates to choose from.
        """
        rows = self.used[:, SHARES.index(share)]
        order = [(float(np.median(r)), float(np.minimum(r, 2 * CEILING).mean())) for r in rows]
        first = order.index(min(order))
        return rows[first], RATES[first]


def rollouts_needed(horizon: int, place: str, estimator: str, seeds: range) -> Effort:
    """Train one arm at every learning rate on every seed, each its own MDP, until the farthest share."""
    used = np.full((len(RATES), len(SHARES), len(seeds)), np.inf)
    for j, seed in enumerate(seeds):
        mdp = random_mdp(3, horizon, beta=0.5, spread=0.5, seed=seed)
        goals, best = [value_at(mdp, share) for share in SHARES], soft_optimal(mdp).logp
        for i, rate in enumerate(RATES):
            recipe = Recipe(reward=dense(mdp), placement=place, estimator=ESTIMATORS[estimator], learning_rate=rate)
            scores = torch.zeros_like(response_reward(mdp))
            run = train(mdp, recipe, dpo=best, scores=scores, iterations=BUDGET, seed=seed, until=max(goals))
            used[i, :, j] = [run.rollouts_to(goal) for goal in goals]
    return Effort(used)


def _dense_figure(noise: dict[str, np.ndarray], horizons: tuple[int, ...], needed: dict) -> Plot:
    figure = canvas(3, width=4.3, height=4.6)
    axes = figure.subplots(1, 3)
    for place, label in PLACES.items():
        rows = noise[place]
        at = np.arange(1, rows.shape[1] + 1)
        low, high = np.quantile(rows, (0.25, 0.75), axis=0)
        axes[0].plot(at, np.median(rows, axis=0), "o-", ms=4, color=PALETTE[place], label=label)
        axes[0].fill_between(at, low, high, color=PALETTE[place], alpha=0.15, lw=0)
    axes[0].set_xlabel("position $h$ of the token")
    axes[0].set_ylabel(r"RMS of $\hat G_h - A^\pi(s_h,a_h)$")
    axes[0].set_title("error of the credit a token is given", fontsize=10)
    axes[0].set_ylim(bottom=0)
    plain = next(iter(ESTIMATORS))
    for axis, share in zip(axes[1:], SHARES):
        for shift, place in zip((-0.12, 0.0, 0.12), PLACES):
            runs = [needed[plain, place, h].best(share)[0] for h in horizons]
            for horizon, used in zip(horizons, runs):
                at = np.full(len(used), horizon + shift)
                axis.plot(at, np.minimum(used, CEILING), ".", ms=5, alpha=0.5, color=PALETTE[place])
            middle = [min(float(np.median(used)), CEILING) for used in runs]
            axis.plot(np.array(horizons) + shift, middle, "o-", ms=6, color=PALETTE[place])
        axis.axhline(CEILING, color=PALETTE["bound"], lw=0.8, ls=":")
        axis.set_xlabel("horizon $H$")
        axis.set_xticks(horizons)
        axis.set_yscale("log")
        axis.set_title(f"rollouts to {share:.0%} of the way to $V^*$", fontsize=10)
    axes[1].set_ylabel("rollouts")
    axes[2].sharey(axes[1])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return plot(
        figure,
        name="dense",
        statement=r"Eq. 4.7 — why dense helps: the same total reward, paid at other places",
        caption="Left: how wrong the credit of the h-th token is, exactly (H = 6, half way to π*). Paid "
        "token by token, the past is out of the sum, and the last tokens are told nearly the truth; paid "
        "at the end, all are told about the whole. Middle and right: rollouts that PPO with REINFORCE++ "
        "credit needs, a dot a seed (each its own MDP), lines through medians; each arm at the best of "
        "three learning rates; dotted: the budget.",
    )


def _effort(effort: Effort, share: float) -> str:
    used, rate = effort.best(share)
    return f"{np.median(used):,.0f} ({used.min():,.0f} – {used.max():,.0f}; {rate:g})".replace("inf", "∞")


def study(seed: int, quick: bool) -> Section:
    """The credit, exactly; the rollouts, by training."""
    noise = credit_noise(5 if quick else 6, range(seed, seed + (4 if quick else 12)))
    horizons = (2, 4) if quick else (2, 4, 6)
    few = range(seed, seed + (3 if quick else 16))
    plain, learned = ESTIMATORS
    top = horizons[-1]
    needed = {(plain, p, h): rollouts_needed(h, p, plain, few) for p in PLACES for h in horizons}
    needed |= {(learned, p, top): rollouts_needed(top, p, learned, few) for p in PLACES}

    def duel(estimator: str) -> str:
        token, final = (needed[estimator, p, top].best(0.98)[0] for p in ("token", "final"))
        won, lost = int((token < final).sum()), int((token > final).sum())
        return f"{won} of {won + lost} MDPs, sign test p = {binomtest(won, max(won + lost, 1)).pvalue:.2g}"

    def middle(estimator: str, share: float, horizon: int = top) -> str:
        parts = []
        for place in PLACES:
            m = float(np.median(needed[estimator, place, horizon].best(share)[0]))
            parts.append(f"{place} {f'{m:,.0f}' if np.isfinite(m) else f'more than {CEILING:,}'}")
        return ", ".join(parts)

    return Section(
        key="dense",
        title="RTO in miniature: why dense helps",
        statement="Algorithm 2, stage 2: optimise r_t = β₁ log π_dpo/π_ref − β₂ log π/π_ref + 1[t = T] "
        "β₃ r_MLE by PPO (Eq. 4.7). Token, sentence and final placement (RTO, Semi-RTO, DDPO) pay the "
        "same total.",
        findings=(
            f"Paid at each token, the credit's error falls from {np.median(noise['token'][:, 0]):.2f} at "
            f"the first token to {np.median(noise['token'][:, -1]):.2f} at the last; paid at the end it "
            f"is {np.median(noise['final'][:, 0]):.2f} and {np.median(noise['final'][:, -1]):.2f}.",
            f"REINFORCE++, H = {top}, median rollouts over {len(few)} MDPs: to 90 % of the way to V* "
            f"{middle(plain, 0.9)}; to 98 % {middle(plain, 0.98)} (token before final on {duel(plain)}). "
            f"At H = 2, to 90 %: {middle(plain, 0.9, horizons[0])}: nothing to gain.",
            f"GAE with a critic learned from 0, H = {top}: to 90 % {middle(learned, 0.9)}; to 98 % "
            f"{middle(learned, 0.98)} (token before final on {duel(learned)}). A critic that fits takes "
            "the place of the dense reward, as potential shaping says, so less is left to gain.",
        ),
        reading=(
            "π_dpo = π* and β₁ = β₂ = β, β₃ = 0, no clip, so that all placements have the one optimum "
            "π*, and what differs is the way there.",
            "Values are V_β of the true reward, computed exactly after every iteration. One token of the "
            "three is the full stop.",
            "Every arm has the same three learning rates and shows the one that suits it best. A table "
            "shares nothing between states; how much dense rewards save a language model is not measured "
            "here.",
        ),
        plots=(_dense_figure(noise, horizons, needed),),
        tables=(
            Table(
                caption=f"Rollouts on the way to V* over {len(few)} random MDPs: median (fewest – most; "
                "rate). ∞: not within the budget.",
                header=("estimator", "H", *(f"{p}, {s:.0%}" for s in SHARES for p in PLACES)),
                rows=tuple(
                    (
                        estimator,
                        str(h),
                        *(_effort(needed[estimator, p, h], s) for s in SHARES for p in PLACES),
                    )
                    for estimator, hs in ((plain, horizons), (learned, (top,)))
                    for h in hs
                ),
            ),
        ),
        checks={
            "paid token by token, the last token's credit is closer to the truth than the first's": bool(
                np.median(noise["token"][:, -1]) < np.median(noise["token"][:, 0])
            ),
            "paid at the end, it is farther": bool(np.median(noise["final"][:, -1]) > np.median(noise["final"][:, 0])),
        },
    )
