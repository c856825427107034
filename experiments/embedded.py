"""The embedded task over seeds: RTO beside PPO on held-out prompts, at equal prompts and at equal KL.

    python experiments/embedded.py --seeds 3      (about 12 minutes on 2 cores)

runs the embedded recipe once a seed into runs/embedded/ and writes docs/results/embedded.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from stories import ROOT, gold_at, interval


def curve(folder: Path) -> np.ndarray:
    """(prompts used, gold, KL) of the training rollouts."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().split("\n")[:-1]]
    kept = [[row["episodes"], row["score/gold_reward"], row["kl"]] for row in rows if "episodes" in row]
    return np.array(kept)


def first_reach(ppo: np.ndarray, rto: np.ndarray) -> float:
    """Prompts after which RTO is at PPO's final gold; both smoothed over three iterations."""
    smooth = [np.array([c[max(0, i - 1) : i + 2, 1].mean() for i in range(len(c))]) for c in (ppo, rto)]
    return float(rto[np.argmax(smooth[1] >= smooth[0][-1]), 0])


def report(runs: Path, seeds: int) -> None:
    """Print the comparison and write its numbers."""
    folders = [runs / f"seed-{seed}" for seed in range(seeds)]
    results = [json.loads((f / "evaluation" / "results.json").read_text())["methods"] for f in folders]
    for method in results[0]:
        gold, kl = (np.array([run[method][key] for run in results]) for key in ("gold", "kl"))
        print(f"{method}: gold {interval(gold)}, KL {interval(kl)}")
    print("RTO - PPO, held out:", interval(np.array([run["RTO"]["gold"] - run["PPO"]["gold"] for run in results])))
    curves = {name: [curve(f / name.lower()) for f in folders] for name in ("PPO", "RTO")}
    print("RTO is at PPO's final level after", [first_reach(p, r) for p, r in zip(curves["PPO"], curves["RTO"])])
    most = min(c[:, 2].max() for both in curves.values() for c in both)
    for level in (most / 4, most / 2, most):
        at = {name: np.array([gold_at(c[:, 2], c[:, 1], level) for c in cs]) for name, cs in curves.items()}
        print(f"RTO - PPO at KL {level:.1f}: {interval(at['RTO'] - at['PPO'])}")
    table = {"evaluation": results, "curves": {name: [c.round(4).tolist() for c in cs] for name, cs in curves.items()}}
    (ROOT / "docs" / "results" / "embedded.json").write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/embedded"))
    flags = parser.parse_args()

    from rto.pipeline import run
    from rto.recipe import load_recipe

    for seed in range(flags.seeds):
        run(load_recipe(None, {"seed": seed}), flags.runs / f"seed-{seed}")
    report(flags.runs, flags.seeds)
