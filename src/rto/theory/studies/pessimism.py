"""Algorithm 1 against the amount of data: rates, the bound of Theorem 4.2, and when pessimism pays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from matplotlib.axes import Axes

from rto.theory.instances import LinearMDP, linear_mdp, random_mdp
from rto.theory.mdp import mean_value, soft_optimal, suboptimality
from rto.theory.page import PALETTE, Plot, Section, Table, canvas, mean_error, plot
from rto.theory.pessimism import (
    LEARNERS,
    bound_4_2,
    bound_b_1,
    no_pessimism,
    solve_value_pessimism,
    token_pessimism,
    weigh,
)
from rto.theory.preferences import Preferences, draw_preferences

DELTA = 0.1
BETA = 0.1
LOOK = {
    "token pessimism (Alg. 1)": ("token", "o"),
    "value pessimism (App. B)": ("pale", "v"),
    "sentence pessimism": ("sentence", "D"),
    "no pessimism": ("exact", "s"),
    "bandit, an arm a response": ("final", "^"),
}
SCALES = {0.0: ("exact", "no pessimism"), 0.1: ("pale", "0.1 ϱ"), 1.0: ("token", "ϱ as proven")}


def problem(seed: int, *, prompts: int = 2, spread: float = 0.5, dimension: int = 4) -> LinearMDP:
    """A = 3, H = 3, ‖φ‖ = L = ½, ‖θ*‖ = B = 1."""
    mdp = random_mdp(3, 3, prompts=prompts, beta=BETA, spread=spread, seed=seed)
    return linear_mdp(mdp, dimension, bound=0.5, seed=10_000 + seed)


@dataclass(frozen=True)
class Sweep:
    """Arrays [sizes, seeds] of what was measured."""

    sizes: tuple[int, ...]
    loss: dict[str, np.ndarray]
    bound: np.ndarray
    value_bound: np.ndarray
    error: np.ndarray
    covered: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """‖θ_MLE − θ*‖_Σ / ϱ; the guarantee holds where it is at most 1."""
    gap: float = 0.0
    worst: float = 0.0
    """The sub-optimality of π_ref, averaged: what learning nothing costs."""


def coverage_sweep(sizes: tuple[int, ...], seeds: range) -> Sweep:
    """All learners on π_ref's own responses: every token is seen."""
    shape = (len(sizes), len(seeds))
    loss = {name: np.full(shape, np.nan) for name in LEARNERS}
    bound, value_bound, error, covered = (np.zeros(shape) for _ in range(4))
    gap, worst = 0.0, []
    for j, seed in enumerate(seeds):
        lab = problem(seed)
        worst.append(suboptimality(lab.mdp, lab.mdp.ref_logp))
        for i, size in enumerate(sizes):
            data = draw_preferences(lab.mdp, lab.mdp.ref_logp, size, np.random.default_rng([seed, size]))
            evidence = weigh(lab, data, delta=DELTA)
            for name, learner in LEARNERS.items():
                learned = learner(evidence)
                loss[name][i, j] = suboptimality(lab.mdp, learned)
                if learner is token_pessimism:
                    bound[i, j] = bound_4_2(evidence, learned)
            value_bound[i, j] = bound_b_1(evidence)
            error[i, j] = float((evidence.theta - lab.theta).norm())
            covered[i, j] = evidence.error / evidence.rho
            gap = max(gap, solve_value_pessimism(evidence).gap)
    return Sweep(sizes, loss, bound, value_bound, error, covered, gap, float(np.mean(worst)))


def hardest(sizes: tuple[int, ...], seeds: range) -> np.ndarray:
    """Sub-optimality [sizes, seeds] at the worst of the rewards scaled by c/√|𝒟|, by the mean, at β = 0.001.

    The worst case a rate has to cover: an instance whose rewards are as small as the error, and a β smaller
    still. Plain maximum likelihood, without pessimism.
    """
    out = []
    for size in sizes:
        rows = []
        for c in (1.0, 3.0, 10.0, 30.0):
            losses = []
            for seed in seeds:
                lab = problem(seed)
                theta = lab.theta * min(1.0, c / size**0.5)
                lab = replace(lab, mdp=replace(lab.with_theta(theta), beta=0.001), theta=theta)
                rng = np.random.default_rng([seed, size, 7])
                evidence = weigh(lab, draw_preferences(lab.mdp, lab.mdp.ref_logp, size, rng))
                losses.append(suboptimality(lab.mdp, no_pessimism(evidence)))
            rows.append(losses)
        out.append(max(rows, key=np.mean))
    return np.array(out)


def pessimism_sweep(
    sizes: tuple[int, ...], seeds: range, scales: Iterable[float], *, expert: bool
) -> dict[float, np.ndarray]:
    """Sub-optimality [sizes, seeds] by how many ϱ are taken off, d = 8, one prompt, uniform π_ref.

    ``expert`` data come from π*_β, which covers what is good and hardly anything else; the other data from
    the uniform π_ref.
    """
    out = {scale: np.zeros((len(sizes), len(seeds))) for scale in scales}
    for j, seed in enumerate(seeds):
        lab = problem(seed, prompts=1, spread=0.0, dimension=8)
        behaviour = soft_optimal(lab.mdp).logp if expert else lab.mdp.ref_logp
        for i, size in enumerate(sizes):
            data = draw_preferences(lab.mdp, behaviour, size, np.random.default_rng([seed, size, 3]))
            evidence = weigh(lab, data, delta=DELTA)
            for scale, losses in out.items():
                scaled = replace(evidence, rho=scale * evidence.rho)
                losses[i, j] = suboptimality(lab.mdp, token_pessimism(scaled))
    return out


def slope(sizes: tuple[int, ...], values: np.ndarray, *, last: int = 4) -> tuple[float, float]:
    """Log-log slope of the mean over the ``last`` sizes, and its jackknife standard error over seeds."""
    x = np.log(sizes[-last:])

    def fit(rows: np.ndarray) -> float:
        return float(np.polyfit(x, np.log(rows.mean(-1)), 1)[0])

    values = values[-last:].reshape(last, -1)
    seeds = values.shape[1]
    without = np.array([fit(np.delete(values, seed, axis=1)) for seed in range(seeds)])
    return fit(values), float(np.sqrt((seeds - 1) / seeds * ((without - without.mean()) ** 2).sum()))


def _band(
    axis: Axes,
    xs: Sequence[int] | Sequence[float],
    rows: np.ndarray,
    *,
    color: str,
    label: str,
    marker: str = "o",
) -> None:
    mean, error = rows.mean(1), rows.std(1, ddof=1) / rows.shape[1] ** 0.5
    bars = np.minimum(error, 0.9 * mean)
    axis.errorbar(xs, mean, bars, color=PALETTE[color], label=label, marker=marker, ms=4, lw=1.3, capsize=2)


def _rates(sweep: Sweep, hard: np.ndarray, hard_sizes: tuple[int, ...]) -> Plot:
    figure = canvas(2, width=5.8, height=5.0)
    left, right = figure.subplots(1, 2)
    left.plot(sweep.sizes, sweep.bound.mean(1), color=PALETTE["bound"], lw=2, label="bound of Thm 4.2")
    left.plot(sweep.sizes, sweep.value_bound.mean(1), "--", color=PALETTE["bound"], label="bound of Thm B.1")
    for name, (color, marker) in LOOK.items():
        _band(left, sweep.sizes, sweep.loss[name], color=color, label=name, marker=marker)
    left.axhline(sweep.worst, color=PALETTE["other"], lw=1, ls=":", label=r"learn nothing ($\pi_{\rm ref}$)")
    left.set_ylabel(r"SubOpt$_\beta$")
    _band(right, sweep.sizes, sweep.error, color="bound", label=r"$\|\theta_{MLE}-\theta^*\|$")
    _band(
        right,
        sweep.sizes,
        sweep.loss["no pessimism"],
        color="exact",
        label="SubOpt, no pessimism",
        marker="s",
    )
    worst = r"SubOpt, hardest reward for each $|D|$"
    _band(right, hard_sizes, hard, color="final", label=worst, marker="^")
    x = np.array(sweep.sizes[1:], float)
    for power, start, style in ((-0.5, 1.6, "-."), (-1.0, 0.02, ":")):
        guide = start * (x / x[0]) ** power
        right.plot(x, guide, style, color="#999999", lw=1, label=f"slope {power:g}")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(r"comparisons $|D|$")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8.5, frameon=False)
    return plot(
        figure,
        name="rates",
        statement="Theorems 4.2 and B.1 — sub-optimality against the amount of data, every token covered",
        caption="Left: learners and bounds (δ = 0.1, all constants of ϱ as derived; A = 3, H = 3, d = 4, "
        "β = 0.1). Right: the parameter's error falls like |D|^−½; with β fixed the sub-optimality is "
        "quadratic in it, so falls like 1/|D|; the −½ of the theorem is met by the hardest instance for "
        "each |D| (β = 0.001). Means, standard errors over random MDPs.",
    )


def _coverage(
    sizes: tuple[int, ...],
    good: dict,
    poor: dict,
    scales: tuple,
    sweep: dict,
    starved_sizes: tuple,
    starve: dict,
) -> Plot:
    figure = canvas(2, width=5.4, height=7.6)
    axes = figure.subplots(2, 2).flatten()
    for axis, xs, runs, title in (
        (axes[0], sizes, good, r"responses of $\pi_{\rm ref}$: every token covered"),
        (axes[1], sizes, poor, r"responses of $\pi^*$: expert data only"),
        (axes[3], starved_sizes, starve, "one token compared once (after Zhu et al., Thm 3.9)"),
    ):
        for scale, (color, label) in SCALES.items():
            _band(axis, xs, runs[scale], color=color, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(r"comparisons $|D|$")
        axis.set_ylabel(r"SubOpt$_\beta$")
    axes[1].sharey(axes[0])
    axes[0].legend(fontsize=9, frameon=False, loc="lower left")
    for label, color in (("every token covered", "other"), ("expert data only", "final")):
        rows = np.stack([sweep[label][s][0] for s in scales])
        _band(axes[2], scales, rows, color=color, label=label)
    axes[2].set_xscale("symlog", linthresh=0.01)
    axes[2].set_xticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axes[2].set_xlabel("how many ϱ are taken off")
    axes[2].set_title(r"both, at $|D|=1000$", fontsize=10)
    axes[2].set_ylabel(r"SubOpt$_\beta$")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(fontsize=9, frameon=False, loc="upper left")
    return plot(
        figure,
        name="coverage",
        statement="Algorithm 1 — pessimism pays where the data do not cover",
        caption="Means and standard errors over random linear MDPs with d = 8, β = 0.1. Expert data are "
        "pairs of responses of π*, which hardly ever show a bad token. Below right: a constructed MDP "
        "where maximum likelihood keeps a constant loss however much data come in, and Algorithm 1 with "
        "the proven ϱ does not.",
    )


def starved(size: int, rng: np.random.Generator) -> tuple[LinearMDP, Preferences]:
    """After Zhu et al. (2023), Theorem 3.9: three first tokens, r = 0, ½, −½; the second pays nothing.

    ``size`` − 1 comparisons of the first two, and one with the third: whichever way that one label falls,
    maximum likelihood believes it as far as the ball allows.
    """
    mdp = random_mdp(3, 2, beta=BETA, spread=0.0)
    features = torch.zeros(1, 4, 3, 2, dtype=torch.float64)
    features[0, 0, 1, 0] = features[0, 0, 2, 1] = 1.0
    theta = torch.tensor([0.5, -0.5], dtype=torch.float64)
    lab = LinearMDP(mdp=replace(mdp, reward=features @ theta), features=features, theta=theta, radius=1.0)
    count = torch.tensor([size - 1.0, 1.0], dtype=torch.float64)
    first, second = torch.tensor([3, 6]), torch.tensor([0, 0])  # y = (1, 0), (2, 0) against (0, 0)
    total = mdp.tree.responses.read(lab.mdp.reward).sum(-1)[0]
    chance = torch.sigmoid(total[first] - total[second])
    wins = torch.from_numpy(rng.binomial(count.long().numpy(), chance.numpy())).double()
    prompt = torch.zeros(2, dtype=torch.long)
    return lab, Preferences(prompt=prompt, first=first, second=second, count=count, wins=wins)


def starved_sweep(sizes: tuple[int, ...], seeds: range) -> dict[float, np.ndarray]:
    """Sub-optimality [sizes, seeds] by how many ϱ are taken off, on `starved`."""
    out = {scale: np.zeros((len(sizes), len(seeds))) for scale in SCALES}
    for i, size in enumerate(sizes):
        for j, seed in enumerate(seeds):
            lab, data = starved(size, np.random.default_rng([seed, size, 11]))
            evidence = weigh(lab, data, delta=DELTA)
            for scale, losses in out.items():
                learned = token_pessimism(replace(evidence, rho=scale * evidence.rho))
                losses[i, j] = suboptimality(lab.mdp, learned)
    return out


def one_hot(seed: int, sizes: tuple[int, ...]) -> np.ndarray:
    """The bound of Theorem 4.2 [sizes] when φ is an indicator of (s, a): one direction is never compared."""
    mdp = random_mdp(2, 2, beta=BETA, spread=0.0, seed=seed)
    cells = mdp.reward.numel()
    features = torch.eye(cells, dtype=torch.float64).view(*mdp.reward.shape, cells)
    theta = mdp.reward.flatten() / mdp.reward.norm()
    lab = LinearMDP(mdp=replace(mdp, reward=features @ theta), features=features, theta=theta, radius=1.0)
    bounds = []
    for size in sizes:
        data = draw_preferences(lab.mdp, lab.mdp.ref_logp, size, np.random.default_rng([seed, size]))
        evidence = weigh(lab, data, delta=DELTA)
        bounds.append(bound_4_2(evidence, token_pessimism(evidence)))
    return np.array(bounds)


def study(seed: int, quick: bool) -> Section:
    """Rates, bound, coverage."""
    seeds = range(seed, seed + (5 if quick else 20))
    many = range(seed, seed + (10 if quick else 40))
    sizes = (100, 1_000, 10_000, 100_000) if quick else (30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
    sweep = coverage_sweep(sizes, seeds)
    hard_sizes = (100, 1_000, 10_000, 100_000)
    hard = hardest(hard_sizes, range(seed, seed + (10 if quick else 20)))
    poor_sizes = (10, 30, 100, 300, 1_000, 3_000, 10_000)
    good = pessimism_sweep(poor_sizes, many, SCALES, expert=False)
    poor = pessimism_sweep(poor_sizes, many, SCALES, expert=True)
    scales = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
    by_scale = {
        label: pessimism_sweep((1_000,), many, scales, expert=expert)
        for label, expert in (("every token covered", False), ("expert data only", True))
    }
    starved_sizes = (100, 1_000, 10_000, 100_000)
    starve = starved_sweep(starved_sizes, range(seed, seed + (20 if quick else 100)))
    token = sweep.loss["token pessimism (Alg. 1)"]
    value = sweep.loss["value pessimism (App. B)"]
    broken = int((token > sweep.bound).sum())
    broken_value = int((value > sweep.value_bound).sum())
    outside = int((sweep.covered > 1).sum())
    tenth = float(np.quantile(sweep.covered, 1 - DELTA))
    slopes = {
        "‖θ_MLE − θ*‖": slope(sizes, sweep.error),
        "bound of Theorem 4.2": slope(sizes, sweep.bound),
        "bound of Theorem B.1": slope(sizes, sweep.value_bound),
        **{f"SubOpt, {name}": slope(sizes, rows) for name, rows in sweep.loss.items()},
    }
    hard_slope, hard_error = slope(hard_sizes, hard, last=len(hard_sizes))
    at = poor_sizes.index(1_000)
    stuck = one_hot(seed, (100, 100_000))
    lab = problem(seed)
    best = mean_value(lab.mdp, soft_optimal(lab.mdp).value)

    return Section(
        key="pessimism",
        title="Algorithm 1 and Theorem 4.2",
        statement="With r = φᵀθ*, ‖φ‖ ≤ L, ‖θ*‖ ≤ B: θ_MLE by Bradley–Terry, r̂ = φᵀθ_MLE − "
        "ϱ‖φ‖_{Σ_D⁻¹}, π̂ = argmax V_β(·; r̂). Then with probability 1 − δ, SubOpt(π̂) ≤ 2ϱ "
        "E_{d*}‖φ‖_{Σ_D⁻¹} − β E_{d*}KL(π*‖π̂).",
        findings=(
            f"The bound held in {token.size - broken} of {token.size} runs (Theorem B.1's in "
            f"{value.size - broken_value}); at δ = {DELTA} a tenth might have failed. It is loose: ‖θ_MLE "
            f"− θ*‖_Σ exceeded ϱ in {outside} runs, and {tenth:.2f} ϱ would have been enough for 1 − δ of "
            "them. Most of it is 1/Υ, the worst curvature of σ on the ball.",
            f"At |D| = {sizes[-1]:,} the bound is {sweep.bound[-1].mean():.2f} where doing nothing costs "
            f"{sweep.worst:.2f} and Algorithm 1 loses {token[-1].mean():.4f}: with "
            "fewer comparisons than about that, the bound says nothing.",
            f"Rates: the parameter {slopes['‖θ_MLE − θ*‖'][0]:.2f}, the bound "
            f"{slopes['bound of Theorem 4.2'][0]:.2f}, as the theorem has it. The sub-optimality itself "
            f"falls faster, like |D|^{slopes['SubOpt, no pessimism'][0]:.2f} without pessimism and "
            f"|D|^{slopes['SubOpt, token pessimism (Alg. 1)'][0]:.2f} with it, because with β > 0 it is β "
            "E KL(π̂‖π*), quadratic in the reward's error. The −½ is what the hardest instance for each "
            f"|D| gives as β → 0: {hard_slope:.2f} ± {hard_error:.2f}.",
            "Under coverage, taking off the proven ϱ changes the sub-optimality at |D| = 1,000 by "
            f"{mean_error((good[1.0] - good[0.0])[at])}, a tenth of it by "
            f"{mean_error((good[0.1] - good[0.0])[at])}: nothing to be careful about. With expert data, "
            f"the proven ϱ changes it by {mean_error((poor[1.0] - poor[0.0])[at])}, a tenth by "
            f"{mean_error((poor[0.1] - poor[0.0])[at])}, of {poor[0.0][at].mean():.3f} (paired by MDP): "
            "a dose smaller than the proof's is the one that can pay there.",
            "Where one token was compared only once (a constructed MDP), maximum likelihood loses "
            f"{starve[0.0][-1].mean():.2f} at |D| = {starved_sizes[-1]:,}, a tenth of ϱ "
            f"{starve[0.1][-1].mean():.2f}, and Algorithm 1 with the proven ϱ goes from "
            f"{starve[1.0][0].mean():.2f} at |D| = 100 to {starve[1.0][-1].mean():.1g}: there the proven "
            "dose is what makes more data help.",
            "The bandit with an arm for every response cannot share what it learns between responses: at "
            "|D| = 1,000 it loses "
            f"{sweep.loss['bandit, an arm a response'][sizes.index(1_000)].mean():.2f} against "
            f"{sweep.loss['no pessimism'][sizes.index(1_000)].mean():.3f}. A sentence-level bandit with "
            "the linear features, without pessimism, is the same learner as the token one.",
        ),
        reading=(
            "ϱ is given up to a constant in the paper. Here it has all of them (½-sub-Gaussian labels, "
            "strong convexity at the largest ‖z‖B of the compared pairs rather than at 2HLB, optimality "
            "on the ball); the derivation is in `confidence_radius`. With 2HLB in place of the largest "
            "‖z‖B, ϱ is larger still.",
            "Coverage is of φ(s, a), but data only tell differences of Σ_h φ. What is the same in all "
            "responses is never learned: with indicator features the bound does not shrink "
            f"({stuck[0]:.1f} at |D| = 100, {stuck[1]:.1f} at 100,000), although the policy does. The "
            "remedy of Zhu et al., a reference vector taken off φ, is not in Theorem 4.2.",
            "Theorem B.1's bound is the smaller one (the norm of a mean, not the mean of norms), but its "
            "policy is not the better one here: on the value scale the ellipsoid's worst θ is very "
            "pessimistic.",
            "“Slope −½ under coverage” is true of the bound and of the worst case, not of a fixed MDP with β > 0.",
        ),
        plots=(
            _rates(sweep, hard, hard_sizes),
            _coverage(poor_sizes, good, poor, scales, by_scale, starved_sizes, starve),
        ),
        tables=(
            Table(
                caption=f"SubOpt, mean ± standard error over {len(seeds)} random MDPs (V* of the first is "
                f"{best:.2f}).",
                header=("|D|", "bound 4.2", "violated", "bound B.1", "violated", *LEARNERS),
                rows=tuple(
                    (
                        f"{size:,}",
                        f"{sweep.bound[i].mean():.2f}",
                        f"{int((token[i] > sweep.bound[i]).sum())}/{len(seeds)}",
                        f"{sweep.value_bound[i].mean():.2f}",
                        f"{int((value[i] > sweep.value_bound[i]).sum())}/{len(seeds)}",
                        *(mean_error(rows[i]) for rows in sweep.loss.values()),
                    )
                    for i, size in enumerate(sizes)
                ),
            ),
            Table(
                caption="Log-log slopes over the last four sizes ± jackknife standard error.",
                header=("quantity", "slope"),
                rows=(
                    *((name, f"{s:.2f} ± {e:.2f}") for name, (s, e) in slopes.items()),
                    (
                        "SubOpt, hardest reward for each |D|, β = 0.001",
                        f"{hard_slope:.2f} ± {hard_error:.2f}",
                    ),
                ),
            ),
            Table(
                caption=f"Expert data, d = 8: SubOpt, mean ± standard error over {len(many)} random MDPs.",
                header=("|D|", *(label for _, label in SCALES.values())),
                rows=tuple(
                    (f"{size:,}", *(mean_error(poor[scale][i]) for scale in SCALES))
                    for i, size in enumerate(poor_sizes)
                ),
            ),
        ),
        checks={
            f"Theorem 4.2 is violated in at most δ = {DELTA} of the runs": broken <= DELTA * token.size,
            "Theorem B.1 likewise": broken_value <= DELTA * value.size,
            "the confidence set misses θ* in at most δ of the runs": outside <= DELTA * sweep.covered.size,
            "‖θ_MLE − θ*‖ and the bound have slope −½ ± 0.1": all(
                abs(slopes[k][0] + 0.5) < 0.1 for k in ("‖θ_MLE − θ*‖", "bound of Theorem 4.2")
            ),
            "value pessimism is solved: duality gap < 1e-4": sweep.gap < 1e-4,
            "one token compared once: pessimism wins with enough data": bool(
                starve[1.0][-1].mean() < 0.5 * starve[0.0][-1].mean()
            ),
        },
    )
