"""The tables and figures of a study, made from its ``results.json`` alone: no number is typed by hand."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from rto.evaluation.statistics.estimates import holm
from rto.evaluation.statistics.gain import best_mixture
from rto.files import parse_json, write_atomically
from rto.report.plots import METADATA, STYLE, palette, panel
from rto.report.sheet import Titled, bold, render_sheet
from rto.report.table import duration, measure
from rto.studies.replicates import Interval, at_level, interval, over_optimisation, paired, smooth
from rto.studies.reproduce import fraction_name

LEVELS = (0.25, 0.5, 1.0)
"""Shares of the KL that both of two methods reach on every seed."""
MARKERS, LINES = "os^D", ("-", "--", ":", "-.")
"""What tells methods of one colour apart."""
FIGURES = ("frontier", "equal-kl", "foretold", "prompts", "labels", "scaling", "over-optimisation", "length")


class Study:
    """Results, by policy and key, in the order of the seeds."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results, self.recipe = results, results["recipe"]
        self.study = self.recipe["study"]
        self.policies: dict[str, Any] = {n: p for n, p in results["policies"].items() if p["of"] == n}
        self.start = next((n for n, p in self.policies.items() if p["kind"] == "start"), "SFT")
        self.measure = measure(results["gold"])
        self.baseline = self.study["baseline"] if self.study["baseline"] in self.policies else None
        self.on_line = [name for name in self.policies if self.curves(name)]

    def values(self, policy: str, key: str) -> np.ndarray:
        """One number a seed."""
        return np.array([run[key] for run in self.results["policies"][policy]["runs"]])

    def curves(self, policy: str) -> list[dict[str, list[float]]]:
        """One training curve a seed; empty for a policy without."""
        found = [run["curve"] for run in self.results["policies"][policy]["runs"]]
        return found if all("gold" in curve and "kl" in curve for curve in found) else []

    def points(self, method: str) -> list[tuple[float, str]]:
        """(share of the prompts, policy) of a scaled method, the whole last."""
        named = [(f, fraction_name(method, f)) for f in sorted(self.study["fractions"])]
        return [(f, name) for f, name in named if name in self.results["policies"]] + [(1.0, method)]

    def frontier(self, method: str) -> list[str]:
        """A method's candidates at equal KL: the start, the method and its other values of β₂."""
        points = [n for n, p in self.results["policies"].items() if p["of"] == method and n not in self._shares]
        return [self.start, *points]

    @property
    def _shares(self) -> set[str]:
        return {fraction_name(m, f) for m in self.study["scaled"] for f in self.study["fractions"]}

    @property
    def compared(self) -> list[str]:
        """Methods whose β₂ was tuned for every KL."""
        named = self.study.get("frontier")
        if named is None:
            return []
        methods = named["methods"] or [n for n, p in self.policies.items() if p["kind"] == "method"]
        return [name for name in methods if name in self.policies and all(map(self._validated, self.frontier(name)))]

    def _validated(self, policy: str) -> bool:
        return all("validation" in run for run in self.results["policies"][policy]["runs"])

    def at_equal_kl(self, method: str, level: float) -> dict[str, np.ndarray]:
        """Test gold and KL, a number a seed, of the mixture of a method's points that validation prompts call best."""
        return mixed([self.results["policies"][name]["runs"] for name in self.frontier(method)], level)

    @property
    def foretold(self) -> list[str]:
        """Methods whose gain was told from completions."""
        measured = self.results["policies"]
        return [n for n in self.policies if all("foretold" in run for run in measured[n]["runs"])]

    @property
    def by_labels(self) -> dict[str, list[str]]:
        """Learners and methods, and variants of them in more rounds, their policies of all rounds, start first."""
        found: dict[str, list[str]] = {}
        for name, policy in self.policies.items():
            if policy["runs"][0].get("round"):
                found.setdefault(family(name), [self.start]).append(name)
        return found if self.start in self.policies else {}

    @property
    def scaled(self) -> list[str]:
        """Methods that were trained on shares of the prompts, too."""
        return [name for name in self.study["scaled"] if name in self.policies and len(self.points(name)) > 1]


def mixed(points: Sequence[Sequence[Mapping[str, Any]]], level: float) -> dict[str, np.ndarray]:
    """Test gold and KL, a number a seed, of the mixture of points within a KL that validation prompts call best.

    Args:
        points: policies, each with its run of every seed.
        level: KL, nats a completion.
    """
    found: dict[str, list[float]] = {"gold": [], "kl": []}
    for of_seed in zip(*points, strict=True):
        gold, kl = (np.array([run["validation"][key] for run in of_seed]) for key in ("gold", "kl"))
        shares = best_mixture(gold, np.maximum(kl, 0.0), level)
        for key, values in found.items():
            values.append(float(shares @ np.array([run[key] for run in of_seed])))
    return {key: np.array(values) for key, values in found.items()}


def family(policy: str) -> str:
    """The policy after the last round: ``RTO in 2 rounds`` of ``RTO, round 1 of 2``."""
    found = re.fullmatch(r"(.+), round \d+(?: of (\d+))?", policy)
    if found is None:
        return policy
    return found[1] if found[2] is None else f"{found[1]} in {found[2]} rounds"


def write_study(results: Path) -> Path:
    """Write ``report.md``, its figures and ``report.html`` beside ``results.json``; returns the path of the first."""
    study = Study(parse_json(results.read_text(encoding="utf-8")))
    folder = results.parent
    drawn = {name: figure for name in FIGURES if (figure := DRAWN[name](study)) is not None}
    for name, figure in drawn.items():
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same results give the same bytes
            figure.savefig(folder / f"{name}.svg", metadata=dict.fromkeys(METADATA))
    write_atomically(folder / "report.md", markdown(study, list(drawn)))
    write_atomically(folder / "report.html", page(study, drawn, title=folder.resolve().name))
    return folder / "report.md"


# --- tables


def markdown(study: Study, figures: Sequence[str] = ()) -> str:
    """The tables as Markdown."""
    parts = [_head(study), *(_section(title, rows) for title, rows in _tables(study).items())]
    parts += [f"![{name}]({name}.svg)" for name in figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def page(study: Study, figures: Mapping[str, Figure], title: str) -> str:
    """Tables and figures as one page of HTML."""
    tables = [
        Titled(title=name, rows=[[_emphasised(cell) for cell in row] for row in rows])
        for name, rows in _tables(study).items()
    ]
    panels = []
    for name, figure in figures.items():
        what = (DRAWN[name].__doc__ or "").rstrip(".")
        alt = f"{what}. Policies: {', '.join(study.policies)}. The tables have the numbers."
        panels.append(panel(figure, alt, title=what, unit=""))
    return render_sheet(title=title, kind="study", about=[_head(study)], tables=tables, figures=panels)


def _head(study: Study) -> str:
    results = study.results
    seeds, machine = results["seeds"], results["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    head = f"{len(seeds)} seeds ({seeds[0]}–{seeds[-1]}), means ± 95 % intervals over seeds (Student's t). "
    return f"{head}Bold: the interval excludes zero. {machine}; {versions}."


def _tables(study: Study) -> dict[str, list[list[str]]]:
    return {"Held-out prompts": main_table(study), **{title: table(study) for title, table in TABLES.items()}}


def _emphasised(cell: str) -> str:
    """What `marked` puts in bold, for the page."""
    return bold(cell[2:-2]) if cell.startswith("**") and cell.endswith("**") else cell


def main_table(study: Study) -> list[list[str]]:
    """The paper's table: a row a policy, and its difference from the baseline paired by seed."""
    others = [name for name in study.policies if name not in (study.baseline, study.start)]
    tests = {}
    if study.baseline is not None:
        tests = {n: paired(study.values(n, "gold"), study.values(study.baseline, "gold")) for n in others}
    adjusted = dict(zip(tests, holm([t.p for t in tests.values()]) if tests else [], strict=True))
    logged = list(next(iter(study.policies.values()))["runs"][0]["logged"])
    named = [f"{f.partition(':')[2]} (only logged)" for f in logged]
    names = [study.measure, *named, f"win rate vs {study.start} (%)", "KL", "length"]
    differs = [] if study.baseline is None else [f"{study.measure} − {study.baseline}", "p (Holm)"]
    rows = [["method", *names, *differs, "time a seed"]]
    for name in study.policies:
        runs = study.policies[name]["runs"]
        cells = [said(interval(study.values(name, "gold")))]
        cells += [said(interval([run["logged"][f] for run in runs])) for f in logged]
        cells += [said(interval(100 * study.values(name, "win_rate")))]
        cells += [said(interval(study.values(name, key))) for key in ("kl", "length")]
        test = tests.get(name)
        cells += [""] * len(differs) if test is None else [marked(test.difference), _number(float(adjusted[name]))]
        rows.append([name, *cells, duration(float(study.values(name, "seconds").mean()))])
    return rows


def comparison_table(study: Study) -> list[list[str]]:
    """The questions of the recipe, each a difference paired by seed; p is Holm's over them."""
    asked = {q: pair for q, pair in study.study["comparisons"].items() if all(n in study.policies for n in pair)}
    tests = {q: paired(study.values(a, "gold"), study.values(b, "gold")) for q, (a, b) in asked.items()}
    if not tests:
        return []
    adjusted = holm([test.p for test in tests.values()])
    rows = [["question", f"difference in {study.measure}", "", "p (Holm)"]]
    for (question, test), p in zip(tests.items(), adjusted, strict=True):
        rows.append([question, " − ".join(asked[question]), marked(test.difference), _number(float(p))])
    return rows


def scaling_table(study: Study) -> list[list[str]]:
    """Gold by the share of prompts, and its difference from the whole-data baseline."""
    if study.baseline is None or not study.scaled:
        return []
    whole = study.values(study.baseline, "gold")
    rows = [["share of the prompts", *(x for n in study.scaled for x in (n, f"{n} − whole-data {study.baseline}"))]]
    for i, (share, _) in enumerate(study.points(study.scaled[0])):
        row = [_share(share)]
        for name in study.scaled:
            gold = study.values(study.points(name)[i][1], "gold")
            same = name == study.baseline and share == 1
            row += [said(interval(gold)), "" if same else marked(paired(gold, whole).difference)]
        rows.append(row)
    return rows


def labels_table(study: Study) -> list[list[str]]:
    """What labels buy: every policy by the labels and the prompts that it has used, mean over seeds."""
    if not study.by_labels:
        return []
    rows = [["policy", "round", "labels", "prompts used", study.measure, "KL"]]
    for name in [study.start, *(n for names in study.by_labels.values() for n in names[1:])]:
        numbers = [study.values(name, key).mean() for key in ("round", "labels", "prompts_used")]
        cells = [said(interval(study.values(name, key))) for key in ("gold", "kl")]
        rows.append([name, *(f"{x:,.0f}" for x in numbers), *cells])
    return rows


def matched_kl_table(study: Study) -> list[list[str]]:
    """Gold of training rollouts where each method first reaches a KL, less the baseline's there, by seed."""
    if study.baseline is None or not study.curves(study.baseline):
        return []
    rows = [["method", *(f"at {share:g} of the common KL" for share in LEVELS), "common KL (nats)"]]
    for name in study.on_line:
        if name != study.baseline:
            top = common_kl(study, name, study.baseline)
            ours, theirs = (gold_at_kl(study, n, top) for n in (name, study.baseline))
            cells = [marked(paired(a, b).difference) for a, b in zip(ours, theirs)]
            rows.append([name, *cells, _number(top)])
    return rows if len(rows) > 1 else []


def win_rate_table(study: Study) -> list[list[str]]:
    """Held-out win rate against SFT at equal held-out KL, between the policies of each share of the prompts."""
    if len(study.scaled) < 2 or study.baseline not in study.scaled:
        return []
    paths = {name: _win_rate_paths(study, name) for name in study.scaled}
    rows = [["method", *(f"at {share:g} of the common KL" for share in LEVELS), "common KL (nats)"]]
    for name in study.scaled:
        if name != study.baseline:
            top = min(kl.max() for n in (name, study.baseline) for kl, _ in paths[n])
            found = [
                [[at_level(kl, won, s * top) for kl, won in paths[n]] for n in (name, study.baseline)] for s in LEVELS
            ]
            rows.append([name, *(marked(paired(*both).difference) for both in found), _number(float(top))])
    return rows


def equal_kl_table(study: Study) -> list[list[str]]:
    """Each method with the β₂ that is best for a KL: held-out gold there, and its difference from the baseline's.

    For every seed the shares of a method's policies (each β₂, and the start) that make the best mixture within the KL
    on validation prompts; gold and KL of that mixture on test prompts. p is Holm's over all differences of the table.
    """
    names = study.compared
    if not names:
        return []
    levels = study.study["frontier"]["levels"]
    found = {(name, level): study.at_equal_kl(name, level) for name in names for level in levels}
    tests = {}
    if study.baseline in names:
        theirs = {level: found[study.baseline, level]["gold"] for level in levels}
        tests = {at: paired(x["gold"], theirs[at[1]]) for at, x in found.items() if at[0] != study.baseline}
    adjusted = dict(zip(tests, holm([t.p for t in tests.values()]) if tests else [], strict=True))
    differs = [f"− {study.baseline}", "p (Holm)"] if study.baseline in names else []
    rows = [["method", *(x for k in levels for x in (f"at KL {k:g}", *differs))]]
    for name in names:
        row = [name]
        for level in levels:
            at = (name, level)
            row.append(f"{said(interval(found[at]['gold']))} (KL {_number(found[at]['kl'].mean())})")
            row += [marked(tests[at].difference), _number(float(adjusted[at]))] if at in tests else [""] * len(differs)
        rows.append(row)
    return rows


def foretold_table(study: Study) -> list[list[str]]:
    """The gain that completions of the start foretell, and the one that training had, both over the start's gold."""
    names = study.foretold
    if not names:
        return []
    rows = [["method", "ρ at the start", "ρ when trained", "ρ σ_gold", "foretold", "measured", "at KL"]]
    told, had = _told_and_had(study)
    for i, name in enumerate(names):
        rho = {when: interval(_foretold(study, name, when, "correlation")) for when in ("start", "trained")}
        slope = interval(_foretold(study, name, "start", "slope"))
        cells = [said(x) for x in (*rho.values(), slope, interval(told[i]), interval(had[i]))]
        rows.append([name, *cells, said(interval(study.values(name, "kl")))])
    if len(names) > 2:
        ranks = [stats.spearmanr(a, b).statistic for a, b in zip(told.T, had.T)]
        rows.append(["rank correlation over methods, a seed", "", "", "", "", said(interval(ranks)), ""])
    return rows


def _foretold(study: Study, name: str, when: str, key: str) -> np.ndarray:
    runs = study.results["policies"][name]["runs"]
    return np.array([run["foretold"][when][key]["value"] for run in runs])


def _told_and_had(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """Gains of each method and seed: ρ σ_gold √(2 KL) at the KL where its training ended, and what it had there."""
    start = study.values(study.start, "gold")
    told, had = [], []
    for name in study.foretold:
        kl = np.maximum(study.values(name, "kl"), 0.0)
        told.append(_foretold(study, name, "start", "slope") * np.sqrt(2 * kl))
        had.append(study.values(name, "gold") - start)
    return np.array(told), np.array(had)


def over_optimisation_table(study: Study) -> list[list[str]]:
    """After the peak of the gold: how far it fell and how far the learned score rose."""
    rows = [["method", "gold fell by", "learned score rose by", "seeds with both"]]
    for name in study.on_line:
        curves = study.curves(name)
        if all("learned" in curve for curve in curves):
            found = [over_optimisation(smooth(c["learned"]), smooth(c["gold"])) for c in curves]
            both = sum(x.fall > 0 and x.rise > 0 for x in found)
            falls, rises = [x.fall for x in found], [x.rise for x in found]
            rows.append([name, said(interval(falls)), said(interval(rises)), f"{both} of {len(found)}"])
    return rows if len(rows) > 1 else []


def tuning_table(study: Study) -> list[list[str]]:
    """Every trial: gold on validation prompts at KL; the chosen one in bold."""
    trials = study.results["tuning"]
    if not trials:
        return []
    recipe = study.results["recipe"]
    rows = [["", *(f"× {trial['factor']:g}" for trial in next(iter(trials.values())))]]
    for name, found in trials.items():
        taken = recipe["learners" if name in recipe["learners"] else "methods"][name]["learning_rate"]
        cells = [f"{_number(t['gold'])} at KL {_number(t['kl'])} (lr {t['learning_rate']:.1e})" for t in found]
        rows.append([name, *(f"**{c}**" if t["learning_rate"] == taken else c for c, t in zip(cells, found))])
    return rows


TABLES = {
    "Questions": comparison_table,
    "Share of the prompts": scaling_table,
    "At equal KL, β₂ tuned for each": equal_kl_table,
    "Foretold and measured": foretold_table,
    "Labels used": labels_table,
    "Gold at equal KL, less the baseline's": matched_kl_table,
    "Win rate at equal KL, less the baseline's": win_rate_table,
    "Over-optimisation": over_optimisation_table,
    "Tuning": tuning_table,
}


def common_kl(study: Study, *names: str) -> float:
    """The KL that every one of these reaches on every seed."""
    return float(min(smooth(curve["kl"]).max() for name in names for curve in study.curves(name)))


def gold_at_kl(study: Study, name: str, top: float) -> list[list[float]]:
    """For each of `LEVELS`, a number a seed; curves are means over three iterations."""
    smoothed = [(smooth(curve["kl"]), smooth(curve["gold"])) for curve in study.curves(name)]
    return [[at_level(kl, gold, share * top) for kl, gold in smoothed] for share in LEVELS]


def _win_rate_paths(study: Study, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(KL, win rate) of a seed's policies by the share of prompts, from SFT (0, ½) on."""
    policies = [policy for _, policy in study.points(name)]
    kl, won = (np.stack([study.values(p, key) for p in policies], 1) for key in ("kl", "win_rate"))
    return [(np.r_[0.0, a], np.r_[0.5, b]) for a, b in zip(kl, won)]


def said(x: Interval) -> str:
    """``2.41 ± 0.44``; digits as the half-width allows."""
    if not math.isfinite(x.half):
        return _number(x.mean)
    digits = min(max(1 - math.floor(math.log10(x.half)), 0), 3) if x.half > 0 else 3
    return f"{x.mean:.{digits}f} ± {x.half:.{digits}f}".replace("-", "−")


def marked(x: Interval) -> str:
    """In bold where the interval excludes zero."""
    return f"**{said(x)}**" if x.excludes_zero else said(x)


def _number(x: float) -> str:
    return f"{x:.3g}".replace("-", "−") if math.isfinite(x) else "–"


def _share(share: float) -> str:
    return fraction_name("", share).strip()


def _section(title: str, rows: list[list[str]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]]
    return f"### {title}\n\n" + "\n".join(lines)


# --- figures


def frontier(study: Study) -> Figure | None:
    """Gold against KL: training rollouts, and held-out points of every policy."""
    if not study.on_line:
        return None
    figure, ax = _figure(study, "KL from the reference (nats a completion)", study.measure)
    means = []
    for name, (colour, turn) in _looks(study).items():
        for curve in study.curves(name):
            ax.plot(smooth(curve["kl"]), smooth(curve["gold"]), color=colour, alpha=0.25, lw=0.8)
        kl, gold = (interval(study.values(name, key)) for key in ("kl", "gold"))
        up, across = ([0.0 if math.isnan(x.half) else x.half] for x in (gold, kl))
        ax.errorbar(
            kl.mean, gold.mean, up, across, fmt=MARKERS[turn % len(MARKERS)], ms=3.5, color=colour, lw=0.6, label=name
        )
        means.append((kl.mean, gold.mean))
    low, high = np.min(means, axis=0), np.max(means, axis=0)  # one run that went astray must not set the scale
    margin = 0.12 * (high - low) + 1e-6
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    return _legend(figure, ax)


def equal_kl(study: Study) -> Figure | None:
    """Gold gained at each KL with the β₂ that is best there, over the start; bands: 95 % over seeds."""
    if not study.compared:
        return None
    figure, ax = _figure(study, "KL from the reference (nats a completion)", f"{study.measure} on held-out prompts")
    levels = np.linspace(0, max(study.study["frontier"]["levels"]), 25)
    for name, (colour, turn) in _looks(study).items():
        if name in study.compared:
            found = [interval(study.at_equal_kl(name, level)["gold"]) for level in levels]
            mean, half = (np.array([getattr(x, key) for x in found]) for key in ("mean", "half"))
            ax.plot(levels, mean, color=colour, ls=LINES[turn % len(LINES)], label=name)
            ax.fill_between(levels, mean - half, mean + half, color=colour, alpha=0.1, lw=0)
    return _legend(figure, ax)


def foretold(study: Study) -> Figure | None:
    """The gain that completions of the start foretell, and the gain that training had; a point a method and seed."""
    if not study.foretold:
        return None
    figure, ax = _figure(study, "foretold: ρ σ_gold √(2 KL)", f"measured gain in {study.measure}")
    told, had = _told_and_had(study)
    for name, x, y in zip(study.foretold, told, had):
        colour, turn = _looks(study)[name]
        ax.plot(x, y, MARKERS[turn % len(MARKERS)], ms=3.5, color=colour, label=name)
    top = float(max(told.max(), had.max(), 0.0))
    ax.plot([0, top], [0, top], color="0.6", lw=0.8, ls=":")
    return _legend(figure, ax)


def prompts(study: Study) -> Figure | None:
    """Gold against prompts used."""
    return _over_prompts(study, "gold", study.measure)


def labels(study: Study) -> Figure | None:
    """Held-out gold against the labels used, from the starting policy on."""
    if not study.by_labels:
        return None
    figure, ax = _figure(study, "labels used", f"{study.measure} on held-out prompts")
    looks = _looks(study)
    for name, policies in study.by_labels.items():
        colour, turn = looks[name]
        found = [interval(study.values(policy, "gold")) for policy in policies]
        halves = [0.0 if math.isnan(x.half) else x.half for x in found]
        at = [study.values(policy, "labels").mean() for policy in policies]
        line, marker = LINES[turn % len(LINES)], MARKERS[turn % len(MARKERS)]
        ax.errorbar(
            at, [x.mean for x in found], halves, color=colour, ls=line, marker=marker, ms=3.5, lw=1, label=name
        )
    return _legend(figure, ax)


def length(study: Study) -> Figure | None:
    """Completion length against prompts used."""
    return _over_prompts(study, "length", "tokens a completion")


def scaling(study: Study) -> Figure | None:
    """Held-out gold by the share of the prompts; dotted: the whole-data baseline."""
    if not study.scaled:
        return None
    figure, ax = _figure(study, "share of the prompts", f"{study.measure} on held-out prompts")
    colours = palette(list(study.policies))
    for name in study.scaled:
        shares, policies = zip(*study.points(name))
        found = [interval(study.values(policy, "gold")) for policy in policies]
        halves = [0.0 if math.isnan(x.half) else x.half for x in found]
        ax.errorbar(shares, [x.mean for x in found], halves, color=colours[name], marker="o", ms=3.5, label=name)
        if name == study.baseline:
            ax.axhline(found[-1].mean, color=colours[name], lw=0.8, ls=":")
    ax.set_xscale("log", base=2)
    ax.set_xticks(shares, [_share(share) for share in shares])
    return _legend(figure, ax)


def over_optimised(study: Study) -> Figure | None:
    """Gold against the learned score along training: a path that turns down is over-optimised."""
    figure, ax = _figure(study, "learned score", study.measure)
    for name, (colour, turn) in _looks(study).items():
        look: dict[str, Any] = {"color": colour, "ls": LINES[turn % len(LINES)], "alpha": 0.7, "lw": 0.9}
        for i, curve in enumerate(study.curves(name)):
            if "learned" in curve:
                label = name if i == 0 else None
                ax.plot(smooth(curve["learned"]), smooth(curve["gold"]), label=label, **look)
    return _legend(figure, ax) if ax.lines else None


DRAWN = {
    "frontier": frontier,
    "equal-kl": equal_kl,
    "foretold": foretold,
    "prompts": prompts,
    "labels": labels,
    "scaling": scaling,
    "over-optimisation": over_optimised,
    "length": length,
}


def _over_prompts(study: Study, key: str, label: str) -> Figure | None:
    if not study.on_line:
        return None
    figure, ax = _figure(study, "prompts used", label)
    for name, (colour, turn) in _looks(study).items():
        curves = study.curves(name)
        if curves and all(key in curve for curve in curves):
            y = np.stack([smooth(curve[key]) for curve in curves])
            ax.plot(curves[0]["episodes"], y.mean(0), color=colour, ls=LINES[turn % len(LINES)], label=name)
            ax.fill_between(curves[0]["episodes"], y.min(0), y.max(0), color=colour, alpha=0.1, lw=0)
    return _legend(figure, ax)


def _looks(study: Study) -> dict[str, tuple[str, int]]:
    """Each policy's colour, and how many before it have the same one."""
    colours = palette(list(study.policies))
    names = [name for name in colours if name in study.policies]
    return {n: (colours[n], [colours[m] for m in names[:i]].count(colours[n])) for i, n in enumerate(names)}


def _figure(study: Study, x: str, y: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        ax = figure.subplots()
        ax.set(xlabel=x, ylabel=y)
        return figure, ax


def _legend(figure: Figure, ax: Axes) -> Figure:
    """Names beside the axes."""
    columns = math.ceil(len(ax.get_legend_handles_labels()[0]) / 18)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=6.5, ncols=columns)
    return figure
