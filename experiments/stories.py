"""RTO beside PPO on a real language model: stories260K, paid for words that reviewers rate well.

The policy is Karpathy's stories260K; prompts are its own story openings; the gold reward of a completion is the mean
of its words' ratings in IMDb reviews (Potts, 2011). Training sees the gold only through Bradley-Terry labels of
sampled pairs: reward model and DPO model are learned from those, then PPO and RTO start from the same policy.

    RTO_DATA=../shared/data python experiments/stories.py --seeds 3      (about 12 minutes on 2 cores)

runs recipes/stories.yaml once a seed into runs/stories/, then writes docs/results/stories.json and
docs/figures/stories.svg.
"""

import argparse
import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import torch

DATA = Path(os.environ.get("RTO_DATA", "../shared/data"))
MODEL = DATA / "models" / "stories260K"
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def ratings() -> dict[str, float]:
    """Word to expected rating: 0 is neutral, awful -2.5, great 1.1."""
    words = (DATA / "imdb" / "imdb.vocab").read_text(encoding="utf-8").split("\n")
    values = (DATA / "imdb" / "imdbEr.txt").read_text(encoding="utf-8").split()
    return dict(zip(words, map(float, values)))


def word_rating(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Gold: ten times the mean rating of the words of a completion; 0 where none is rated."""
    table = ratings()
    scores = []
    for text in completions:
        found = [table[w] for w in re.findall(r"[a-z']+", text.lower()) if w in table]
        scores.append(10 * float(np.mean(found)) if found else 0.0)
    return scores


def openings(rows: int, seed: int, split: str) -> list[str]:
    """Story openings: the policy's own first 16 tokens from BOS, distinct, splits disjoint."""
    from rto.models.loading import load_policy, load_tokenizer
    from rto.rollout.sampling import SamplingConfig, TransformersSampler

    policy, tokenizer = load_policy(str(MODEL)), load_tokenizer(MODEL)
    sampler = TransformersSampler(config=SamplingConfig(max_completion_length=16), eos_ids=(1, 2), pad_id=0)
    splits = {"pairs": 0, "rl": 1, "test": 2}
    found: dict[str, None] = {}
    batch = 0
    while len(found) < rows:
        drawn = sampler(policy, [[tokenizer.bos_token_id]] * 512, seed=(seed * 3 + splits[split]) * 1000 + batch)
        batch += 1
        full = drawn.mask.all(1)
        for text in tokenizer.batch_decode(drawn.responses[full], skip_special_tokens=True):
            if sum(text.encode()) % 3 == splits[split]:
                found.setdefault(text)
    return list(found)[:rows]


STYLES = {
    "PPO": {"color": "#3b6ea8"},
    "RTO": {"color": "#c8553d"},
    "PPO weak KL": {"color": "#3b6ea8", "ls": "--"},
    "RTO weak KL": {"color": "#c8553d", "ls": "--"},
}


def curves(runs: Path, seeds: list[int], method: str) -> np.ndarray:
    """(prompts used, gold, KL) of the training rollouts: [seeds, iterations, 3]."""
    folder = method.lower().replace(" ", "-")
    out = []
    for seed in seeds:
        lines = (runs / f"seed-{seed}" / folder / "log.jsonl").read_text().split("\n")
        rows = [row for row in map(json.loads, filter(None, lines)) if "episodes" in row]
        out.append([[row["episodes"], row["score/word_rating"], row["kl"]] for row in rows])
    return np.array(out)


def figure(seeds: list[int], runs: Path) -> None:
    """Gold against prompts used and against KL, a thin line a seed and their mean; and the numbers behind it."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True)
    table: dict[str, dict] = {"methods": {}}
    for method, style in STYLES.items():
        x = curves(runs, seeds, method)
        for axis, column in ((left, 0), (right, 2)):
            for curve in x:
                axis.plot(curve[:, column], curve[:, 1], **style, alpha=0.3, lw=0.8)
            axis.plot(x[..., column].mean(0), x[..., 1].mean(0), **style, lw=2, label=method)
        table["methods"][method] = {
            "episodes": x[0, :, 0].tolist(),
            "gold": x[..., 1].round(4).tolist(),
            "kl": x[..., 2].round(4).tolist(),
        }
    left.set(xlabel="prompts used", ylabel="gold: 10 x mean word rating")
    right.set(xlabel="KL from the reference (nats a completion)")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    table["evaluation"] = [
        json.loads((runs / f"seed-{seed}" / "evaluation" / "results.json").read_text())["methods"] for seed in seeds
    ]
    for folder in ("figures", "results"):
        (ROOT / "docs" / folder).mkdir(exist_ok=True)
    fig.savefig(ROOT / "docs" / "figures" / "stories.svg")
    (ROOT / "docs" / "results" / "stories.json").write_text(json.dumps(table) + "\n")
    report(table)


def interval(x: np.ndarray) -> str:
    """Mean over seeds with a 95 % interval (t)."""
    from scipy import stats

    if len(x) < 2:
        return f"{x.mean():.3f} (one seed)"
    return f"{x.mean():.3f} +- {stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)):.3f}"


def report(table: dict) -> None:
    """The evaluation on held-out prompts, and RTO - PPO paired by seed during training and at equal KL."""
    for method in table["evaluation"][0]:
        gold = np.array([run[method]["gold"] for run in table["evaluation"]])
        kl = np.array([run[method]["kl"] for run in table["evaluation"]])
        print(f"{method}: gold {interval(gold)}, KL {interval(kl)}")
    for kind in ("", " weak KL"):
        ppo, rto = (table["methods"][name + kind] for name in ("PPO", "RTO"))
        gap = np.array(rto["gold"]) - np.array(ppo["gold"])
        n = gap.shape[1]
        print(f"RTO - PPO{kind}, training rollouts:")
        for i in (n // 3, 2 * n // 3, n - 1):
            print(f"  after {rto['episodes'][i]:.0f} prompts: {interval(gap[:, i])}")
        most = min(np.max(ppo["kl"], axis=1).min(), np.max(rto["kl"], axis=1).min())
        for level in (most / 3, 2 * most / 3, most):
            at = [np.array([gold_at(k, g, level) for k, g in zip(m["kl"], m["gold"])]) for m in (rto, ppo)]
            print(f"  at KL {level:.1f}: {interval(at[0] - at[1])}")


def gold_at(kl: list[float], gold: list[float], level: float) -> float:
    """Gold where a run first reaches a KL, between its iterations by a straight line."""
    i = next(i for i, k in enumerate(kl) if k >= level)
    if i == 0:
        return gold[0]
    share = (level - kl[i - 1]) / (kl[i] - kl[i - 1])
    return gold[i - 1] + share * (gold[i] - gold[i - 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/stories"))
    flags = parser.parse_args()
    os.environ.setdefault("RTO_DATA", str(DATA))
    torch.manual_seed(0)

    from rto.pipeline import run
    from rto.recipe import load_recipe

    for seed in range(flags.seeds):
        run(load_recipe(ROOT / "recipes" / "stories.yaml", {"seed": seed}), flags.runs / f"seed-{seed}")
    figure(list(range(flags.seeds)), flags.runs)
