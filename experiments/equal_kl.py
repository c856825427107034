"""What does a reward buy at equal KL, whoever optimises it? Sources of reward from the same pairs, tilted exactly.

    rto run embedded --seed 1000 --output_dir runs/start
    RTO_START=runs/start/sft python experiments/equal_kl.py
    RTO_DATA=../shared/data python experiments/equal_kl.py --recipe recipes/stories/frontiers.yaml
    RTO_DATA=../shared/data python experiments/equal_kl.py --recipe recipes/imdb/frontiers.yaml --seeds 20 21 22 \
        --factors 1 2

For each seed, from one starting policy: pairs sampled and labelled by Bradley-Terry on the gold, and learned from them
a DPO model, a reverse DPO model (the same pairs, swapped) and a reward model. K completions of each of n held-out
prompts are then drawn from the start and paid by each source. π* ∝ π_ref exp(paid / β₂) on these completions is the
optimum of Eq. 4.7, so its gold at a KL needs no training and says what the *reward* is worth there.

Everything chosen is chosen on the tuning seed, which is reported nowhere else: the learning rate of every learner and
of the reward model, half to four times the recipe's, by the log loss of labels on pairs of completions that it has
not seen, and the weights of the stacked sources (β₁ : β₃), regressed on the same labels. Differences are paired by
seed; p is Holm's over `TESTED` at all levels.

TASK is the recipe's folder, with the recipe's name behind it where that is not frontiers.yaml.
Writes docs/results/equal_kl_TASK.json, equal_kl_TASK.svg beside it, and prints the tables of docs/results.md.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from rto.batches import collate
from rto.data.formats import read_prompts
from rto.evaluation.statistics.estimates import holm
from rto.evaluation.statistics.gain import foretell, tilted_gain
from rto.files import write_atomically
from rto.inspection.stacking import Stacked, stack
from rto.models.loading import load_policy, load_tokenizer, pad_id
from rto.pipeline import Pipeline, scores_by
from rto.recipe import Recipe, folder_of, load_recipe
from rto.report.plots import METADATA, STYLE
from rto.rollout.rewards import reward_source
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.scoring import draw
from rto.rollout.token_rewards import PowerDifference, TokenReward
from rto.studies.replicates import interval, paired
from rto.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "embedded" / "frontiers.yaml"
TUNING_SEED, BASELINE = 1000, "reward model (PPO)"
FACTORS = (0.5, 1.0, 2.0, 4.0)
LEVELS = (0.25, 0.5, 1.0)
PROMPTS, COMPLETIONS = 48, 16
CLIP = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="with the learner DPO; reverse DPO as you like")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20, 28)))
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="of the rates; 1 among them")
    parser.add_argument("--runs", type=Path, default=Path("runs/equal_kl"))
    args = parser.parse_args(argv)
    if TUNING_SEED in args.seeds:
        parser.error(f"{TUNING_SEED} is the tuning seed: it is not reported")
    if 1.0 not in args.factors:
        parser.error("--factors: the recipe's own rate, 1, is to be among them")
    recipe, at = load_recipe(args.recipe), args.recipe.resolve()
    task = at.parent.name if at.stem == RECIPE.stem else f"{at.parent.name}_{at.stem}"
    runs = args.runs / task
    trials = {x: measured(with_rates(recipe, dict.fromkeys(RATES, x)), runs, f"x{x}") for x in args.factors}
    losses, factors = tuned_rates(trials, recipe.label_temperature)
    chosen = {name: trials[factors[RATED[name]]][name] for name in RATED if name in trials[1.0]}
    tuned = trials[1.0] | chosen
    weights = stacked_weights(tuned, recipe.label_temperature)
    recipe = with_rates(recipe, factors)
    rows = [report(measured(replace(recipe, seed=seed), runs), weights) for seed in args.seeds]
    found = {
        "task": task,
        "seeds": args.seeds,
        "levels": LEVELS,
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "tuning": {"seed": TUNING_SEED, "drawn": tuned["gold"].shape, "losses": losses, "factors": factors},
        "weights": {name: asdict(x) for name, x in weights.items()},
        "sources": {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)},
    }
    out = ROOT / "docs" / "results" / f"equal_kl_{task}.json"
    write_atomically(out, json.dumps(found, indent=1) + "\n")
    figure = drawn(found)
    with matplotlib.rc_context({"svg.hashsalt": out.stem}):
        figure.savefig(out.with_suffix(".svg"), metadata=dict.fromkeys(METADATA))
    print(tuning_table(found), table(found), sep="\n\n")


# --- the tuning seed

RATES = ("DPO", "reverse DPO", "reward")
RATED = {"dpo": "DPO", "power": "DPO", "reverse": "reverse DPO", "score": "reward"}
"""What pays, and whose learning rate made it."""


def with_rates(recipe: Recipe, factors: dict[str, float]) -> Recipe:
    """The tuning seed's recipe, learning rates multiplied."""
    base = recipe.prefer["learning_rate"]
    learners = {name: own | {"learning_rate": base * factors[name]} for name, own in recipe.learners.items()}
    assert recipe.reward is not None
    reward = recipe.reward | {"learning_rate": recipe.reward["learning_rate"] * factors["reward"]}
    return replace(recipe, seed=TUNING_SEED, learners=learners, reward=reward)


def labelled_gaps(found: dict[str, np.ndarray], temperature: float) -> dict[str, np.ndarray]:
    """Payment of the chosen completion less the rejected one's: Bradley-Terry labels on pairs of one prompt."""
    rng = np.random.default_rng(TUNING_SEED)
    gap = {name: (x[:, 0::2] - x[:, 1::2]).ravel() for name, x in found.items()}
    first = rng.random(len(gap["gold"])) < 1 / (1 + np.exp(-gap["gold"] / temperature))
    return {name: np.where(first, x, -x) for name, x in gap.items()}


def tuned_rates(
    trials: dict[float, dict[str, np.ndarray]], temperature: float
) -> tuple[dict[str, dict[float, float]], dict[str, float]]:
    """Log loss of the labels by each source alone at each factor, and the best factor."""
    losses: dict[str, dict[float, float]] = {name: {} for name in RATES}
    for x, found in trials.items():
        gaps = labelled_gaps(found, temperature)
        for source, name in (("dpo", "DPO"), ("reverse", "reverse DPO"), ("score", "reward")):
            if source not in gaps:
                continue
            fit = stack(gaps[source], gaps["length"])
            losses[name][x] = math.inf if fit is None else fit.log_loss["token"]
    return losses, {name: min(loss, key=loss.__getitem__) for name, loss in losses.items() if loss}


def stacked_weights(tuned: dict[str, np.ndarray], temperature: float) -> dict[str, Stacked]:
    """Each token source beside the score."""
    gaps = labelled_gaps(tuned, temperature)
    found = {name: stack(gaps[name], gaps["score"]) for name in SOURCES if name in gaps}
    return {name: x for name, x in found.items() if x is not None}


# --- one seed


def measured(recipe: Recipe, runs: Path, suffix: str = "") -> dict[str, np.ndarray]:
    """Gold and every source's total of n · K completions by the start; kept in the seed's folder once it is done."""
    folder = runs / f"seed-{recipe.seed}{suffix}"
    path = folder / "paid.json"
    if not path.is_file():
        started, spent = time.perf_counter(), time.process_time()
        folder.mkdir(parents=True, exist_ok=True)
        pipeline = Pipeline(recipe, folder, Terminal())
        pipeline.sft()
        pipeline.pairs()
        for learner in recipe.learners:
            pipeline.prefer(learner)
        pipeline.reward()
        write_atomically(path, json.dumps(paid(pipeline.recipe, folder)))
        wall, cpu = time.perf_counter() - started, time.process_time() - spent
        print(f"{folder.name}: {cpu:.0f} s of a processor, {wall:.0f} s on the clock", flush=True)
    return {name: np.array(x) for name, x in json.loads(path.read_text()).items()}


@torch.no_grad()
def paid(recipe: Recipe, folder: Path) -> dict[str, list[list[float]]]:
    start = folder / "sft"
    tokenizer, policy = load_tokenizer(start), load_policy(str(start)).eval()
    rows = recipe.data.validation_prompts
    assert rows is not None
    assert recipe.gold is not None
    asked = read_prompts(rows.load(recipe.seed), tokenizer, max_length=2**31, what="prompts")[0][:PROMPTS]
    sampler = TransformersSampler.of(policy, tokenizer, SamplingConfig(max_completion_length=recipe.completion_length))
    dpo, reverse = (str(folder / folder_of(name)) for name in ("DPO", "reverse DPO"))
    tokens: dict[str, Any] = {"dpo": TokenReward(dpo, str(start)), "power": PowerDifference(dpo, str(start))}
    if "reverse DPO" in recipe.learners:
        tokens["reverse"] = TokenReward(dpo, reverse)
    score = reward_source(str(folder / "reward"), max_tokens=2**15)
    found: dict[str, list[list[float]]] = {name: [] for name in ("gold", "score", "length", *tokens)}
    for i in range(0, len(asked), 16):
        part = [prompt for prompt in asked[i : i + 16] for _ in range(COMPLETIONS)]
        some = draw(sampler, policy, tokenizer, [p.ids for p in part], recipe.seed * 1_000_003 + 2**20 + i)
        completed = some.completed(part)
        sequences = collate([p.ids for p in part], some.ids, pad=pad_id(tokenizer))
        numbers: dict[str, Any] = {
            "gold": scores_by(recipe.gold, completed),
            "score": score(completed),
            "length": sequences.mask.sum(1).tolist(),
        }
        for name, source in tokens.items():
            numbers[name] = source(sequences).clamp(-CLIP, CLIP).sum(1).tolist()
        for name, values in numbers.items():
            found[name] += np.asarray(values, dtype=float).reshape(-1, COMPLETIONS).round(5).tolist()
    return found


TESTED = (
    "DPO alone (on-policy distillation)",
    "RTO, β₁ = 0.05",
    "stacked: score and DPO",
    "stacked: score and reverse reference",
    "stacked: score and power transform",
)
SOURCES = {"dpo": "DPO", "reverse": "reverse reference", "power": "power transform"}


def report(found: dict[str, np.ndarray], weights: dict[str, Stacked]) -> dict[str, Any]:
    """Every payment of one seed: its correlation with the gold and its gain at each level."""
    s, d = found["score"], found["dpo"]
    payments = {BASELINE: s, "DPO alone (on-policy distillation)": d, "RTO, β₁ = 0.05": 0.05 * d + s}
    for name, weight in weights.items():
        x = found[name]
        w_d, w_s = (max(w.value, 0.0) for w in (weight.token_weight, weight.score_weight))
        payments[f"stacked: score and {SOURCES[name]}"] = w_d * x + w_s * s
        if name != "dpo":
            payments[f"{SOURCES[name]} alone"] = x
    payments |= {"short replies": -found["length"]} if found["length"].std(1).all() else {}
    payments["the gold itself"] = found["gold"]
    return {
        name: {
            **asdict(foretell(p, found["gold"])),
            "gain": [float(x) for x in tilted_gain(p, found["gold"], LEVELS)],
        }
        for name, p in payments.items()
    }


# --- all seeds


def tuning_table(found: dict[str, Any]) -> str:
    """Log loss of the tuning seed's labels at each learning rate."""
    tried = {name: losses for name, losses in found["tuning"]["losses"].items() if losses}
    factors = next(iter(tried.values()))
    lines = ["| log loss of labels, learning rate × | " + " | ".join(f"{float(x):g}" for x in factors) + " |"]
    lines.append("|---" * (1 + len(factors)) + "|")
    for name, losses in tried.items():
        lines.append(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in losses.values()) + " |")
    return "\n".join(lines)


def table(found: dict[str, Any]) -> str:
    levels = found["levels"]
    gains = {name: np.array([run["gain"] for run in runs]) for name, runs in found["sources"].items()}
    tested = [name for name in TESTED if name in gains]
    tests = {(n, i): paired(gains[n][:, i], gains[BASELINE][:, i]) for n in tested for i in range(len(levels))}
    adjusted = dict(zip(tests, holm([t.p for t in tests.values()]), strict=True))
    lines = ["| paid by | ρ | " + " | ".join(f"gain at KL {k:g} (foretold)" for k in levels) + " |"]
    lines.append("|---" * (2 + len(levels)) + "|")
    for name, runs in found["sources"].items():
        rho = interval([run["correlation"]["value"] for run in runs])
        cells = [f"{rho.mean:.2f} ± {rho.half:.2f}"]
        for i, level in enumerate(levels):
            gain = interval(gains[name][:, i])
            told = np.mean([run["slope"]["value"] for run in runs]) * np.sqrt(2 * level)
            cells.append(f"{gain.mean:.2f} ± {gain.half:.2f} ({told:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| less the reward model's | " + " | ".join(f"at KL {k:g} (p, Holm)" for k in levels) + " |"]
    lines.append("|---" * (1 + len(levels)) + "|")
    for name in tested:
        found_at = [(tests[name, i].difference, adjusted[name, i]) for i in range(len(levels))]
        cells = [f"{d.mean:.2f} ± {d.half:.2f} ({p:.2g})" for d, p in found_at]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawn(found: dict[str, Any]) -> Figure:
    """Gain at each KL by source; bars: 95 % over seeds, dotted: what ρ σ √(2 KL) foretells."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        ax = figure.subplots()
        levels = np.array(found["levels"])
        grid = np.linspace(0, levels[-1], 50)
        shown = [name for name in (BASELINE, *TESTED, "the gold itself") if name in found["sources"]]
        for i, name in enumerate(shown):
            runs, colour = found["sources"][name], f"C{i % 10}"
            gains = [interval([run["gain"][j] for run in runs]) for j in range(len(levels))]
            at = levels + 0.012 * (i - len(shown) // 2)
            mean, half = zip(*((x.mean, x.half) for x in gains))
            ax.errorbar(at, mean, half, fmt="o", ms=3, lw=0.8, color=colour, label=name)
            slope = np.mean([run["slope"]["value"] for run in runs])
            ax.plot(grid, slope * np.sqrt(2 * grid), ":", lw=0.8, color=colour)
        ax.set(xlabel="KL from the start (nats a completion)", ylabel="gold gained")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=6.5)
        return figure


if __name__ == "__main__":
    main()
