"""RTO in miniature: what DPO's log-ratio learns, and what paying it token by token saves."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from rto.functional.rewards import RTOReward
from rto.theory.identities import response_reward, trained_reward
from rto.theory.instances import linear_mdp, random_mdp
from rto.theory.mdp import (
    TokenMDP,
    advantage,
    evaluate,
    expectation,
    mean_value,
    occupancy,
    soft_optimal,
    suboptimality,
)
from rto.theory.miniature import ESTIMATORS, Recipe, dense, fit_dpo, train
from rto.theory.page import PALETTE, Plot, Section, Table, canvas, plot
from rto.theory.pessimism import response_features
from rto.theory.preferences import differences, draw_preferences, fit_bradley_terry
from rto.theory.studies.identities import on_the_way, to_go

PLACES = {"token": "token (RTO)", "sentence": "sentence (Semi-RTO)", "final": "final (DDPO)"}
RATES = (0.05, 0.1, 0.2)
BUDGET = 150
"""Iterations of 32 rollouts."""
CEILING = 32 * BUDGET
SHARES = (0.9, 0.98)
"""How far on the way from V(π_ref) to V* a policy has to come."""


def fit_errors(sizes: tuple[int, ...], seeds: range) -> dict[str, np.ndarray]:
    """How far β log π_dpo/π_ref is from β log π*/π_ref; arrays [sizes, seeds], or [sizes, seeds · cells].

    ``reference`` and ``optimal``: root mean square a token, over responses of π_ref (as in the data) and of
    π*. ``loss``: SubOpt(π_dpo). ``visits``, ``error``: for each (s, a), how often the data showed it on
    average, and how wrong its log-ratio is.
    """
    out: dict[str, list] = {k: [] for k in ("reference", "optimal", "loss", "visits", "error")}
    for size in sizes:
        rows: dict[str, list] = {k: [] for k in out}
        for seed in seeds:
            mdp = random_mdp(3, 3, beta=0.5, spread=1.0, seed=seed)
            best = soft_optimal(mdp).logp
            data = draw_preferences(mdp, mdp.ref_logp, size, np.random.default_rng([seed, size]))
            fitted = fit_dpo(mdp, data)
            error = mdp.beta * (fitted - best)
            horizon = mdp.tree.horizon
            for name, policy in (("reference", mdp.ref_logp), ("optimal", best)):
                rows[name].append(float(expectation(mdp, policy, error.square()) / horizon) ** 0.5)
            rows["loss"].append(suboptimality(mdp, fitted))
            seen = 2 * size * occupancy(mdp, mdp.ref_logp)[..., None] * mdp.ref_logp.exp()
            rows["visits"].extend(seen.flatten().tolist())
            rows["error"].extend(error.abs().flatten().tolist())
        for name, values in rows.items():
            out[name].append(values)
    return {name: np.array(values) for name, values in out.items()}


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
        """Rollouts by seed at the learning rate with the lowest median, then the lowest capped mean; the rate.

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
            recipe = Recipe(
                reward=dense(mdp), placement=place, estimator=ESTIMATORS[estimator], learning_rate=rate
            )
            scores = torch.zeros_like(response_reward(mdp))
            run = train(mdp, recipe, dpo=best, scores=scores, iterations=BUDGET, seed=seed, until=max(goals))
            used[i, :, j] = [run.rollouts_to(goal) for goal in goals]
    return Effort(used)


def planning(sizes: tuple[int, ...], seeds: range) -> dict[str, np.ndarray]:
    """SubOpt [sizes, seeds] of the exact optima of Eq. 4.7, for what stage 1 learned from |𝒟| comparisons."""
    arms: dict[str, list[list[float]]] = {}
    for size in sizes:
        rows: dict[str, list[float]] = {}
        for seed in seeds:
            lab = linear_mdp(random_mdp(3, 3, beta=0.2, spread=0.5, seed=seed), 8, radius=2.0, seed=seed)
            mdp, beta = lab.mdp, lab.mdp.beta
            data = draw_preferences(mdp, mdp.ref_logp, size, np.random.default_rng([seed, size, 5]))
            dpo, phi = fit_dpo(mdp, data), response_features(lab)
            blind = phi[..., :4]
            full = phi @ fit_bradley_terry(differences(data, phi), data.count, data.wins, 2.0).theta
            part = blind @ fit_bradley_terry(differences(data, blind), data.count, data.wins, 2.0).theta
            for name, scores, weight, dpo_coef in (
                ("DPO", full, 0.0, None),
                ("RTO β₁=β, β₃=0", full, 0.0, beta),
                ("PPO, good r_MLE", full, 1.0, 0.0),
                ("RTO β₁=β/2, β₃=½, good r_MLE", full, 0.5, beta / 2),
                ("PPO, blind r_MLE", part, 1.0, 0.0),
                ("RTO β₁=β/2, β₃=½, blind r_MLE", part, 0.5, beta / 2),
            ):
                policy = dpo
                if dpo_coef is not None:
                    reward = RTOReward(
                        dpo_coef=dpo_coef, kl_coef=0.0, score_coef=weight, token_reward_clip=None
                    )
                    paid = trained_reward(mdp, reward, policy=dpo, dpo=dpo, scores=scores)
                    policy = soft_optimal(replace(mdp, reward=mdp.tree.responses.write(paid))).logp
                rows.setdefault(name, []).append(suboptimality(mdp, policy))
        for name, values in rows.items():
            arms.setdefault(name, []).append(values)
    return {name: np.array(values) for name, values in arms.items()}


def _fit_figure(sizes: tuple[int, ...], errors: dict[str, np.ndarray]) -> Plot:
    figure = canvas(2, width=5.4, height=4.2)
    left, right = figure.subplots(1, 2)
    for name, color, label in (
        ("reference", "token", r"RMS error, responses of $\pi_{\rm ref}$ (as in $D$)"),
        ("optimal", "final", r"RMS error, responses of $\pi^*$"),
        ("loss", "exact", r"SubOpt$_\beta(\pi_{\rm dpo})$"),
    ):
        rows = errors[name]
        bars = np.minimum(rows.std(1, ddof=1) / rows.shape[1] ** 0.5, 0.9 * rows.mean(1))
        left.errorbar(
            sizes, rows.mean(1), bars, marker="o", ms=4, capsize=2, color=PALETTE[color], label=label
        )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel(r"comparisons $|D|$")
    left.set_ylabel(r"error of $\beta\log\pi_{\rm dpo}/\pi_{\rm ref}$ a token; SubOpt")
    left.legend(fontsize=9, frameon=False, loc="lower left")
    shades = ("#bcd7ea", PALETTE["pale"], PALETTE["token"], "#00344f", "#001a28")
    for size, visits, error, shade in zip(sizes, errors["visits"], errors["error"], shades):
        right.scatter(visits, error, s=5, alpha=0.35, color=shade, lw=0, label=f"$|D|$ = {size:,}")
    x = np.logspace(0.5, 5, 20)
    right.plot(x, 2.0 * x**-0.5, "--", color=PALETTE["bound"], lw=1, label="slope −½")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_ylim(bottom=1e-4)
    right.set_xlabel(r"expected visits of $(s,a)$ in $D$")
    right.set_ylabel(r"$|\beta\log\pi_{\rm dpo}/\pi^*|$ at $(s,a)$")
    right.legend(fontsize=8.5, frameon=False, markerscale=2.5, loc="lower left")
    return plot(
        figure,
        name="dpo",
        statement=r"§4.3 — the log-ratio of a fitted $\pi_{\rm dpo}$ becomes the token reward, where data went",
        caption="Left: means and standard errors over random MDPs (A = 3, H = 3, β = 0.5). Right: each "
        "point is one state and token; what the data hardly visit keeps an error of the size of the "
        "reward itself.",
    )


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
    """The fit, the credit, the rollouts, the exact optima."""
    seeds = range(seed, seed + (4 if quick else 12))
    sizes = (100, 1_000, 10_000, 100_000)
    errors = fit_errors(sizes, seeds)
    noise = credit_noise(5 if quick else 6, seeds)
    horizons = (2, 4) if quick else (2, 4, 6)
    few = range(seed, seed + (3 if quick else 8))
    plain, learned = ESTIMATORS
    top = horizons[-1]
    needed = {(plain, p, h): rollouts_needed(h, p, plain, few) for p in PLACES for h in horizons}
    needed |= {(learned, p, top): rollouts_needed(top, p, learned, few) for p in PLACES}
    plans = planning((100, 1_000, 10_000), seeds)

    def middle(estimator: str, share: float) -> str:
        parts = []
        for place in PLACES:
            m = float(np.median(needed[estimator, place, top].best(share)[0]))
            parts.append(f"{place} {f'{m:,.0f}' if np.isfinite(m) else f'more than {CEILING:,}'}")
        return ", ".join(parts)

    def mean(rows: np.ndarray) -> str:
        return f"{rows.mean():.4f} ± {rows.std(ddof=1) / len(rows) ** 0.5:.4f}"

    rare = errors["visits"] < 10
    often = errors["visits"] >= 1_000
    return Section(
        key="miniature",
        title="RTO in miniature",
        statement="Algorithm 2: fit π_dpo to preferences, then optimise r_t = β₁ log π_dpo/π_ref − β₂ "
        "log π/π_ref + 1[t = T] β₃ r_MLE by PPO (Eq. 4.7). Placement and estimator are its variants.",
        findings=(
            "DPO's log-ratio approaches the token reward: RMS error a token "
            f"{errors['reference'][0].mean():.2f} at |D| = 100, {errors['reference'][-1].mean():.3f} at "
            f"100,000 where the data lie, {errors['optimal'][-1].mean():.3f} where π* goes. Off the data "
            f"it does not: a median error of {np.median(errors['error'][rare]):.2f} on tokens seen less "
            f"than 10 times, {np.median(errors['error'][often]):.3f} on those seen a thousand times.",
            f"Paid at each token, the credit's error falls from {np.median(noise['token'][:, 0]):.2f} at "
            f"the first token to {np.median(noise['token'][:, -1]):.2f} at the last; paid at the end it "
            f"is {np.median(noise['final'][:, 0]):.2f} and {np.median(noise['final'][:, -1]):.2f}.",
            f"Rollouts, median over {len(few)} MDPs at H = {top}, REINFORCE++: to 90 % of the way to V* "
            f"{middle(plain, 0.9)}; to 98 % {middle(plain, 0.98)}. GAE with a learned critic: to 90 % "
            f"{middle(learned, 0.9)}; to 98 % {middle(learned, 0.98)}. At H = 2 there is next to nothing "
            "to gain.",
            "With exact optimisation, β₁ = β₂ and β₃ = 0, RTO returns π_dpo itself (checked): the token "
            "reward then speeds learning up and changes nothing in the end. A better policy than π_dpo "
            "needs r_MLE, and how good that is decides what mixing is worth (table).",
        ),
        reading=(
            "π_dpo = π* is assumed wherever placements are compared, so that all arms share one optimum; "
            "only the fit's study uses data.",
            "A ridge of 0.1 on the log-ratio stands for early stopping. Without it DPO's minimum is at "
            "infinity for responses that always won.",
            "Thresholds are on V_β of the true reward, computed exactly after every iteration.",
        ),
        plots=(_fit_figure(sizes, errors), _dense_figure(noise, horizons, needed)),
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
            Table(
                caption="SubOpt of the exact optimum of Eq. 4.7 (β₂ = β = 0.2, d = 8), mean ± standard "
                f"error over {len(seeds)} random MDPs; the blind r_MLE sees 4 of 8 features.",
                header=("|D|", *plans),
                rows=tuple(
                    (f"{size:,}", *(mean(rows[i]) for rows in plans.values()))
                    for i, size in enumerate((100, 1_000, 10_000))
                ),
            ),
        ),
        checks={
            "RTO with β₁ = β₂, β₃ = 0 has the sub-optimality of π_dpo": bool(
                np.allclose(plans["DPO"], plans["RTO β₁=β, β₃=0"], atol=1e-9)
            ),
            "the log-ratio's error falls with |D|": bool((np.diff(errors["reference"].mean(1)) < 0).all()),
            "what the data do not visit stays wrong": bool(
                np.median(errors["error"][rare]) > 3 * np.median(errors["error"][often])
            ),
        },
    )
