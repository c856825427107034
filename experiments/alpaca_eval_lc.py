"""Our length-controlled win rates beside the published ones, and where the gap between them comes from.

    RTO_DATA=../shared/data python experiments/alpaca_eval_lc.py      (seconds)

reads the published AlpacaEval 2 annotations, leaderboard and GLM coefficients (CC BY-NC 4.0, not part of the project)
and writes docs/results/alpaca_eval_lc.json, aggregates only, and docs/figures/alpaca_eval_lc.svg. Four fits of each
model:

- `own rows`: `fit_length_controlled` on the model's annotations and the difficulties (length_controlled_noreg);
- `own rows, no L1`: the same optimum without penalty, which is what the bootstrap refits;
- `published φ and ψ`: only θ is fitted, φ and ψ are the published ones;
- `pull of the gamed baselines`: the published fit also contains annotations of two baselines that are not here. At its
  optimum their gradient is minus the model's own, which can be computed. A linear function of (φ, ψ) is fitted to that
  gradient over all *other* models, and the model is fitted against it.
"""

import argparse
import csv
import gzip
import json
import os
from pathlib import Path

import matplotlib
import numpy as np
from scipy.optimize import root
from scipy.special import expit

from rto.evaluation.statistics.length_control import LengthControlData, fit_length_controlled, refit_win_rates
from rto.evaluation.statistics.winrate import preference_shares

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "gpt4_1106_preview"
WEIGHTS = ("np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)")


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, compressed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(data.decode().splitlines()))


def load(folder: Path) -> tuple[dict[str, LengthControlData], dict[str, np.ndarray], dict[str, float]]:
    """Annotations, published (φ, ψ, θ) and published win rates, of the models that have all three."""
    gamma = np.array(
        [float(r["instruction_difficulty"]) for r in read(folder / "instruction_difficulty_recovered.csv")]
    )
    weights = {
        r[""]: np.array([float(r[k]) for k in WEIGHTS]) for r in read(folder / "glm_weights_length_controlled_v1.csv")
    }
    published = {r[""]: float(r["length_controlled_winrate"] or "nan") for r in read(folder / "leaderboard.csv")}
    rows: dict[str, list[dict[str, str]]] = {}
    for row in read(folder / "annotations_slim.csv.gz"):
        rows.setdefault(row["model"], []).append(row)
    data = {}
    for name in sorted(set(rows) & set(weights) & set(published) - {BASELINE}):
        index, preference, base, ours = (
            np.array([float(r[k]) for r in rows[name]])
            for k in ("index", "preference", "len_output_1", "len_output_2")
        )
        data[name] = LengthControlData(
            shares=preference_shares(preference),
            baseline_length=base,
            model_length=ours,
            difficulty=gamma[index.astype(int)],
        )
    return data, weights, published


def design(d: LengthControlData) -> np.ndarray:
    """Columns of φ, ψ and θ."""
    return np.stack([d.length_feature(), d.difficulty, np.ones(len(d.shares))], axis=1)


def at_equal_length(d: LengthControlData, w: np.ndarray) -> float:
    """The win rate that coefficients stand for."""
    return 100 * float(expit(w[2] + w[1] * d.difficulty).mean())


def with_theta_only(d: LengthControlData, published: np.ndarray) -> float:
    """φ and ψ as published, θ by maximum likelihood."""
    x = design(d)

    def excess(theta: np.ndarray) -> float:
        return float((expit(x @ np.r_[published[:2], theta]) - d.shares).sum())

    theta = root(excess, published[2]).x[0]
    return at_equal_length(d, np.r_[published[:2], theta])


def pull(own: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(3, 2): the least-squares gradient of the missing rows, linear in φ, ψ and 1."""
    return np.linalg.lstsq(np.c_[weights[:, :2], np.ones(len(weights))], own, rcond=None)[0]


def with_pull(d: LengthControlData, linear: np.ndarray, start: np.ndarray) -> float:
    """The model's optimum against the pull that the other models felt."""
    x = design(d)

    def gradient(w: np.ndarray) -> np.ndarray:
        return x.T @ (d.shares - expit(x @ w)) - np.r_[np.r_[w[:2], 1] @ linear, 0]

    return at_equal_length(d, root(gradient, start).x)


def fits(data: dict[str, LengthControlData], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The win rates of all models by each fit."""
    names = list(data)
    published = np.array([weights[name] for name in names])
    own = np.array([(design(d).T @ (d.shares - expit(design(d) @ weights[n])))[:2] for n, d in data.items()])
    rates: dict[str, list[float]] = {
        "own rows": [],
        "own rows, no L1": [],
        "published φ and ψ": [],
        "pull of the gamed baselines": [],
    }
    for i, (name, d) in enumerate(data.items()):
        others = np.arange(len(names)) != i
        rates["own rows"].append(fit_length_controlled(d).win_rate)
        rates["own rows, no L1"].append(float(refit_win_rates(d, np.ones((1, len(d.shares))))[0]))
        rates["published φ and ψ"].append(with_theta_only(d, weights[name]))
        start = published[others].mean(0)  # nothing of the model's own published fit
        rates["pull of the gamed baselines"].append(with_pull(d, pull(own[others], published[others]), start))
    return {key: np.array(x) for key, x in rates.items()}


def summary(rates: np.ndarray, published: np.ndarray, names: list[str]) -> dict[str, object]:
    """Median and largest gap."""
    gap = np.abs(rates - published)
    order = np.argsort(-gap)
    return {
        "median_gap": round(float(np.median(gap)), 4),
        "largest_gap": round(float(gap[order[0]]), 4),
        "largest_gap_of": names[order[0]],
        "second_largest_gap": round(float(gap[order[1]]), 4),
        "second_largest_gap_of": names[order[1]],
        "mean_signed": round(float((rates - published).mean()), 4),
    }


def draw(rates: dict[str, np.ndarray], published: np.ndarray, names: list[str], path: Path) -> None:
    """Gap against the published value."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "alpaca_eval_lc"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    styles = {"own rows": "o", "pull of the gamed baselines": "x"}
    for key, marker in styles.items():
        axes.plot(published, rates[key] - published, marker, ms=5, label=f"fit: {key}")
    for i in np.argsort(-np.abs(rates["own rows"] - published))[:2]:
        at = (published[i], rates["own rows"][i] - published[i])
        axes.annotate(names[i], at, xytext=(7, -3), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="0.6", lw=0.8, zorder=0)
    axes.set(xlabel="published LC win rate (%)", ylabel="ours − published (points)")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RTO_DATA", ROOT.parent / "shared" / "data")))
    data, weights, leaderboard = load(parser.parse_args().data / "alpaca_eval")
    names, published = list(data), np.array([leaderboard[name] for name in data])
    rates = fits(data, weights)
    table = {"models": len(names), "fits": {key: summary(x, published, names) for key, x in rates.items()}}
    for key, found in table["fits"].items():
        print(f"{key}: {found}")
    (ROOT / "docs" / "results" / "alpaca_eval_lc.json").write_text(
        json.dumps(table, ensure_ascii=False, indent=1) + "\n"
    )
    draw(rates, published, names, ROOT / "docs" / "figures" / "alpaca_eval_lc.svg")
