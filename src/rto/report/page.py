"""A run folder to one page of HTML that needs nothing but itself: no script, no request, model text escaped."""

import os
from collections.abc import Iterable
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from rto.report import heatmap, plots
from rto.report.folder import Run, number, read_run
from rto.report.table import results_cells

SHOWN = 6
"""Completions on the page: the first ones of the evaluation, not picked."""

LEARNING = (
    # title, key, unit
    ("Score", "score", "reward model"),
    ("KL", "kl", "nats per completion"),
    ("Completion length", "completions/mean_length", "tokens"),
)
DIAGNOSTICS = (
    ("Explained variance", "explained_variance", "of returns, by the critic"),
    ("Entropy", "entropy", "nats per token"),
    ("Return", "return", "per completion"),
    ("Clipped: policy ratio", "clip/ratio", "share of tokens"),
    ("Clipped: value", "clip/value", "share of tokens"),
    ("Clipped: token reward", "clip/token_reward", "share of tokens"),
    ("Completions that end", "completions/eos_rate", "share with EOS"),
    ("Policy gradient", "grad_norm/policy", "norm before clipping"),
    ("KL coefficient β₂", "kl_coef", ""),
)


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder from what the folder holds, and return its path.

    What is missing is left out, and the page says so.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    path = Path(run) / "report.html"
    partial = path.with_suffix(".html.partial")
    text = render(read_run(Path(run)))
    partial.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate has no UTF-8
    os.replace(partial, path)
    return path


def render(run: Run) -> str:
    """The page."""
    headings, rows = results_cells(run.results)
    scale = heatmap.Scale.of(r for row in run.token_rewards[:SHOWN] for r in row.rewards)
    colours = plots.palette([*run.methods, *run.online, *run.offline])
    return template("report.html.j2").render(
        run=run,
        colours=colours,
        headings=headings,
        rows=rows,
        learning=_learning(run, colours),
        reached=reached(run),
        frontier=plots.gold_against_kl(run, colours),
        diagnostics=_diagnostics(run, colours),
        offline=_offline(run, colours),
        samples=run.samples[:SHOWN],
        heat=[(row, heatmap.cells(row.tokens, row.rewards, scale)) for row in run.token_rewards[:SHOWN]],
        scale=scale,
    )


def template(name: str, package: str = "rto.report") -> Template:
    """A page of a package, over this one's layout and parts; what it is given is text and is escaped."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(p, "") for p in dict.fromkeys((package, "rto.report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": heatmap.signed, "listed": listed}
    environment.globals |= {
        "ends": [heatmap.css(c) for c in (heatmap.NEGATIVE, heatmap.ZERO, heatmap.POSITIVE)],
        "ink": heatmap.css(heatmap.INK),
    }
    return environment.get_template(name)


def reached(run: Run) -> list[str]:
    """How soon each on-line method reaches the gold at which the lowest of them is."""
    golds = {name: plots.series(log, run.gold_key) for name, log in run.online.items()}
    golds = {name: (x, plots.smooth(y)) for name, (x, y) in golds.items() if len(x) > 1}
    if len(golds) < 2:
        return []
    lowest = min(golds, key=lambda name: golds[name][1][-1])
    level, last = golds[lowest][1][-1], golds[lowest][0][-1]
    said = []
    for name, (x, y) in golds.items():
        if name != lowest:
            first = x[(y >= level).argmax()]
            said.append(
                f"{lowest} is at {run.measure} {level:.3g} after {last:,.0f} prompts; "
                f"{name} first reached that level after {first:,.0f} ({first / last:.0%} of them)."
            )
    return said


def listed(names: Iterable[str]) -> str:
    """A, B and C."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _learning(run: Run, colours: dict[str, str]) -> list[plots.Panel]:
    levels = {
        name: gold
        for name, method in run.methods.items()
        if name not in run.online and (gold := number(method.get("gold"))) is not None
    }
    title = run.measure.capitalize()
    others = [panel for panel in LEARNING if panel[1] != run.gold_key]
    panels = [
        plots.curves(title, run.gold_key, run.online, colours, levels=levels, size=plots.LARGE),
        *(plots.curves(t, key, run.online, colours, unit=unit, size=plots.LARGE) for t, key, unit in others),
    ]
    return [panel for panel in panels if panel]


def _diagnostics(run: Run, colours: dict[str, str]) -> list[plots.Panel]:
    panels = [
        *(plots.curves(t, key, run.online, colours, unit=unit) for t, key, unit in DIAGNOSTICS),
        *(plots.reward_shares(name, log) for name, log in run.online.items()),
        plots.seconds_per_phase(run.online),
    ]
    return [panel for panel in panels if panel]


def _offline(run: Run, colours: dict[str, str]) -> list[plots.Panel]:
    panels = [
        plots.curves(f"{stage}: {key}", key, {stage: log}, colours, x=("step", "updates"))
        for stage, log in run.offline.items()
        for key in ("loss", "accuracy")
    ]
    return [panel for panel in panels if panel]
