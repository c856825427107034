"""Methods at equal KL over the runs of several studies of the same seeds: each point of any of them may be chosen.

    python experiments/frontiers.py docs/results/stacked/results.json docs/results/stacked/results_half_rate.json

For every seed and KL the best mixture of a method's points (and the start) on validation prompts, measured on test
prompts, as in the table "At equal KL" of `rto reproduce`, where the points are of one study. Prints the table of
docs/results.md; p is Holm's over all differences from the baseline.
"""

import json
import sys
from pathlib import Path

import numpy as np

from rto.evaluation.statistics.estimates import holm
from rto.studies.replicates import Interval, interval, paired
from rto.studies.report import Study, mixed


def at_equal_kl(studies: list[Study], method: str, level: float) -> dict[str, np.ndarray]:
    """Test gold and KL, a number a seed."""
    return mixed([s.results["policies"][name]["runs"] for s in studies for name in s.frontier(method)], level)


def table(studies: list[Study]) -> str:
    first = studies[0]
    levels, baseline = first.study["frontier"]["levels"], first.baseline
    others = [name for name in first.compared if name != baseline]
    found = {(n, k): at_equal_kl(studies, n, k) for n in [baseline, *others] for k in levels}
    tests = {(n, k): paired(found[n, k]["gold"], found[baseline, k]["gold"]) for n in others for k in levels}
    adjusted = dict(zip(tests, holm([t.p for t in tests.values()]), strict=True))
    lines = ["| method | " + " | ".join(f"at KL {k:g} | − {baseline} (p, Holm)" for k in levels) + " |"]
    lines.append("|---" * (1 + 2 * len(levels)) + "|")
    for name in (baseline, *others):
        cells = []
        for k in levels:
            cells.append(f"{_said(interval(found[name, k]['gold']))} ({found[name, k]['kl'].mean():.2f})")
            test = tests.get((name, k))
            cells.append("" if test is None else f"{_said(test.difference)} ({adjusted[name, k]:.1g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(x: Interval) -> str:
    return f"{x.mean:.2f} ± {x.half:.2f}"


if __name__ == "__main__":
    print(table([Study(json.loads(Path(path).read_text(encoding="utf-8"))) for path in sys.argv[1:]]))
