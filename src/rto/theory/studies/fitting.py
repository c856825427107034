"""Stage 1 in miniature: what DPO's log-ratio learns, where, and what Eq. 4.7 makes of it."""

from dataclasses import replace

import numpy as np

from rto.functional.rewards import RTOReward
from rto.theory.identities import trained_reward
from rto.theory.instances import linear_mdp, random_mdp
from rto.theory.mdp import expectation, occupancy, soft_optimal, suboptimality
from rto.theory.miniature import fit_dpo
from rto.theory.page import PALETTE, Plot, Section, Table, canvas, mean_error, plot
from rto.theory.pessimism import response_features
from rto.theory.preferences import differences, draw_preferences, fit_bradley_terry


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
                    reward = RTOReward(dpo_coef=dpo_coef, kl_coef=0.0, score_coef=weight, token_reward_clip=None)
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
        left.errorbar(sizes, rows.mean(1), bars, marker="o", ms=4, capsize=2, color=PALETTE[color], label=label)
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
        statement=r"§4.3 — the log-ratio of $\pi_{\rm dpo}$ becomes the token reward, where data are",
        caption="Left: means and standard errors over random MDPs (A = 3, H = 3, β = 0.5). Right: each "
        "point is one state and token; what the data hardly visit keeps an error of the size of the "
        "reward itself.",
    )


def study(seed: int, quick: bool) -> Section:
    """The fit of π_dpo, and the exact optima of what was learned."""
    seeds = range(seed, seed + (4 if quick else 12))
    sizes, plan_sizes = (100, 1_000, 10_000, 100_000), (100, 1_000, 10_000)
    errors, plans = fit_errors(sizes, seeds), planning(plan_sizes, seeds)
    rare, often = errors["visits"] < 10, errors["visits"] >= 1_000

    return Section(
        key="fitting",
        title="RTO in miniature: the token reward",
        statement="Algorithm 2, stage 1: fit π_dpo to preferences; β log π_dpo/π_ref stands for the "
        "token reward β log π*/π_ref (§4.3).",
        findings=(
            "DPO's log-ratio approaches the token reward: RMS error a token "
            f"{errors['reference'][0].mean():.2f} at |D| = 100, {errors['reference'][-1].mean():.3f} at "
            f"100,000 where the data lie, {errors['optimal'][-1].mean():.3f} where π* goes.",
            f"Off the data it does not: a median error of {np.median(errors['error'][rare]):.2f} on "
            f"tokens seen less than 10 times, {np.median(errors['error'][often]):.3f} on those seen a "
            "thousand times. The error goes with the visits, whatever |D| is.",
            "With exact optimisation, β₁ = β₂ and β₃ = 0, RTO returns π_dpo itself (checked): the token "
            "reward then changes how fast one learns and nothing in the end.",
            "A better policy than π_dpo needs r_MLE. SubOpt at |D| = 1,000: π_dpo "
            f"{plans['DPO'][1].mean():.3f}; with an r_MLE that has all features, PPO "
            f"{plans['PPO, good r_MLE'][1].mean():.3f} and half of each "
            f"{plans['RTO β₁=β/2, β₃=½, good r_MLE'][1].mean():.3f}; with one blind to half the features, "
            f"PPO {plans['PPO, blind r_MLE'][1].mean():.3f} and half of each "
            f"{plans['RTO β₁=β/2, β₃=½, blind r_MLE'][1].mean():.3f}. Mixing is a hedge: it ends between "
            "its parts or near the better one, and which that is depends on r_MLE and |D|.",
        ),
        reading=(
            "A ridge of 0.1 on the log-ratio stands for early stopping. Without it DPO's minimum is at "
            "infinity for responses that always won.",
            "π_dpo has a parameter for every state and token and shares nothing between them; a language "
            "model does, so “visits” there means visits of similar states.",
        ),
        plots=(_fit_figure(sizes, errors),),
        tables=(
            Table(
                caption="SubOpt of the exact optimum of Eq. 4.7 (β₂ = β = 0.2, d = 8), mean ± standard "
                f"error over {len(seeds)} random MDPs; the blind r_MLE sees 4 of 8 features.",
                header=("|D|", *plans),
                rows=tuple(
                    (f"{size:,}", *(mean_error(rows[i]) for rows in plans.values()))
                    for i, size in enumerate(plan_sizes)
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
