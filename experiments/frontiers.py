"""Methods at equal KL over the runs of several studies of the same seeds: each point of any of them may be chosen.

    python experiments/frontiers.py docs/results/stacked
    python experiments/frontiers.py runs/stacked/results.json --share 1/8=runs/eighth/results.json

For every seed and KL the best mixture of a method's points (and the start) on validation prompts, measured on test
prompts, as in the table "At equal KL" of `rto reproduce`, where the points are of one study. A study of a share of the
prompts is set against the baseline at all of them. Of a folder all studies are read that it keeps: `results.json`,
`results_eighth.json` and so on, each with the one at the lowest rate beside it (`results_eighth_lowest.json`). Prints
the table of docs/results.md; p is Holm's over all differences from the baseline.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from rto.evaluation.statistics.estimates import holm
from rto.studies.replicates import Interval, interval, paired
from rto.studies.report import Study, mixed


def at_equal_kl(studies: list[Study], method: str, level: float) -> dict[str, np.ndarray]:
    """Test gold and KL, a number a seed."""
    return mixed([s.results["policies"][name]["runs"] for s in studies for name in s.frontier(method)], level)


def table(studies: list[Study], shares: dict[str, list[Study]] | None = None) -> str:
    """Markdown: a row a method, and one for each method of a share of the prompts (one study or several), by its name.

    Raises:
        ValueError: a share was run with other seeds.
    """
    first = studies[0]
    levels, baseline = first.study["frontier"]["levels"], first.baseline
    rows = {name: (studies, name) for name in [baseline, *(n for n in first.compared if n != baseline)]}
    for share, of_share in (shares or {}).items():
        for study in of_share:
            if study.results["seeds"] != first.results["seeds"]:
                raise ValueError(f"{share}: seeds {study.results['seeds']}, not {first.results['seeds']}")
        rows |= {f"{name}, {share} of the prompts": (of_share, name) for name in of_share[0].compared}
    found = {(row, k): at_equal_kl(*of, k) for row, of in rows.items() for k in levels}
    tests = {at: paired(x["gold"], found[baseline, at[1]]["gold"]) for at, x in found.items() if at[0] != baseline}
    adjusted = dict(zip(tests, holm([t.p for t in tests.values()]), strict=True))
    lines = ["| method | " + " | ".join(f"at KL {k:g} | − {baseline} (p, Holm)" for k in levels) + " |"]
    lines.append("|---" * (1 + 2 * len(levels)) + "|")
    for row in rows:
        cells = []
        for k in levels:
            cells.append(f"{_said(interval(found[row, k]['gold']))} ({found[row, k]['kl'].mean():.2f})")
            test = tests.get((row, k))
            cells.append("" if test is None else f"{_said(test.difference)} ({adjusted[row, k]:.1g})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(x: Interval) -> str:
    return f"{x.mean:.2f} ± {x.half:.2f}"


def read(path: str) -> Study:
    return Study(json.loads(Path(path).read_text(encoding="utf-8")))


SHARES = {"eighth": "1/8", "quarter": "1/4", "half": "1/2"}


def kept(folder: Path) -> tuple[list[Study], dict[str, list[Study]]]:
    """The studies of a folder: those of all prompts, and those of each share."""

    def those(name: str) -> list[Study]:
        paths = (folder / f"{name}.json", folder / f"{name}_lowest.json")
        return [read(str(path)) for path in paths if path.is_file()]

    shares = {share: those(f"results_{name}") for name, share in SHARES.items()}
    return those("results"), {share: studies for share, studies in shares.items() if studies}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="of studies of one budget: files, or folders of docs/results")
    parser.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="1/8=RESULTS",
        help="a share of the prompts; again for more of its studies",
    )
    given = parser.parse_args()
    studies: list[Study] = []
    shares: dict[str, list[Study]] = {}
    for path in map(Path, given.results):
        of_all, of_shares = kept(path) if path.is_dir() else ([read(str(path))], {})
        studies += of_all
        for name, of_share in of_shares.items():
            shares.setdefault(name, []).extend(of_share)
    for name, file in (share.split("=", 1) for share in given.share):
        shares.setdefault(name, []).append(read(file))
    print(table(studies, shares))


if __name__ == "__main__":
    main()
