"""A folder to one page of HTML that needs nothing but itself: no request, model text escaped.

The page works without its scripts, which step through tokens and, while a run is watched, bring the page up to date;
its policy of contents names them by their digests, so that no other script runs.
"""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from rto.alarms import Alarm, Bounds, check
from rto.files import plain, write_atomically
from rto.report import heatmap, plots
from rto.report.folder import Run, number, read_run
from rto.report.table import results_cells

OFFLINE = (
    # title, key, unit
    ("loss", "loss", ""),
    ("loss", "eval_loss", "held-out rows"),
    ("accuracy", "accuracy", "share of pairs"),
    ("accuracy", "eval_accuracy", "share of held-out pairs"),
    ("preferred side", "logratio/chosen", "log π/π_ref, nats a token"),
)
"""What is drawn of a stage that trained on rows, where it was logged."""
SHOWN = 6
"""Completions on the page: the first ones of the evaluation, not picked."""

FUNCTIONS = 4
"""Reward functions of a stage that have a curve of their own."""

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
    """Write ``report.html`` into the folder of a run or of one stage, from what the folder holds; returns its path.

    What is missing is left out, and the page says so.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    path = Path(run) / "report.html"
    write_atomically(path, render(read_run(Path(run))), errors="replace")  # a lone surrogate has no UTF-8
    return path


def render(run: Run, *, every: float | None = None, bounds: Bounds | None = None) -> str:
    """The page.

    Args:
        run: what it is of.
        every: it is served while the run goes on, and asks for a newer one after so many seconds; None: it is a file.
        bounds: of the alarms.
    """
    headings, cells = results_cells(run.results)
    colours = _colours(run)
    drawn = {} if run.samples else run.drawn
    shown = run.token_rewards[:SHOWN]
    rewards = [row.rewards for row in shown] + [row.rewards for rows in drawn.values() for row in rows]
    scale = heatmap.Scale.of(r for completion in rewards for r in completion)
    return template("report.html.j2", scripts=("step",) if every is None else ("step", "live")).render(
        run=run,
        every=every,
        bounds=bounds or Bounds(),
        alarms=alarms(run, bounds),
        colours=colours,
        headings=headings,
        rows=cells,
        learning=_learning(run, colours),
        reached=reached(run),
        frontier=plots.gold_against_kl(run, colours),
        by_labels=plots.gold_against_labels(run, colours),
        diagnostics=_diagnostics(run, colours),
        offline=_offline(run, colours),
        samples=run.samples[:SHOWN],
        drawn={
            name: [(row, heatmap.cells(row.tokens, row.rewards, scale)) for row in ds] for name, ds in drawn.items()
        },
        heat=[(row, heatmap.cells(row.tokens, row.rewards, scale)) for row in shown],
        scale=scale,
    )


def _colours(run: Run) -> dict[str, str]:
    """One a learner or method, which its rounds share."""
    of = {name: plain(m["of"]) for name, m in run.methods.items() if isinstance(m.get("of"), str)}
    found = plots.palette(list(dict.fromkeys(of.get(n, n) for n in (*run.methods, *run.online, *run.offline))))
    return found | {name: found[base] for name, base in of.items()}


def alarms(run: Run, bounds: Bounds | None = None) -> list[tuple[str, Alarm]]:
    """What is out of bounds at present, by method or stage."""
    logs = {**run.offline, **run.online}
    return [(name, alarm) for name, log in logs.items() for alarm in check(log, bounds)]


def template(name: str, package: str = "rto.report", scripts: Sequence[str] = ()) -> Template:
    """A page of a package, over this one's layout and parts; what it is given is text and is escaped.

    Control characters in it are shown as symbols.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(p, "") for p in dict.fromkeys((package, "rto.report"))]),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sources = [files("rto.report").joinpath(f"{script}.js").read_text(encoding="utf-8") for script in scripts]
    environment.filters |= {"signed": heatmap.signed, "listed": listed}
    environment.globals |= {
        "light": heatmap.levels(heatmap.LIGHT),
        "dark": heatmap.levels(heatmap.DARK),
        "ends": {name: _ends(palette) for name, palette in (("light", heatmap.LIGHT), ("dark", heatmap.DARK))},
        "ink": {"light": heatmap.css(heatmap.LIGHT.ink), "dark": heatmap.css(heatmap.DARK.ink)},
        "paper": {"light": heatmap.css(heatmap.LIGHT.zero), "dark": heatmap.css(heatmap.DARK.zero)},
        "scripts": [Markup(source) for source in sources],
        "digests": [b64encode(sha256(source.encode()).digest()).decode() for source in sources],
    }
    return environment.get_template(name)


def _visible(x: Any) -> Any:
    return plain(x) if isinstance(x, str) and not isinstance(x, Markup) else x


def _ends(palette: heatmap.Palette) -> str:
    return ", ".join(heatmap.css(c) for c in (palette.negative, palette.zero, palette.positive))


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
    offline = {n: m for n, m in run.methods.items() if n not in run.online and m.get("of") not in run.online}
    levels = {name: gold for name, m in offline.items() if (gold := number(m.get("gold"))) is not None}
    title = run.measure.capitalize()
    others = [panel for panel in LEARNING if panel[1] != run.gold_key]
    if run.stage:  # it does not say which of its scores is the gold
        keys = dict.fromkeys(key for log in run.online.values() for row in log for key in row)
        named = [key for key in keys if key.startswith("score/") and not key.endswith("_std") and key != run.gold_key]
        others += [(f"Score: {plain(key.removeprefix('score/'))}", key, "") for key in named[:FUNCTIONS]]
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
        plots.curves(f"{stage}: {title}", key, {stage: log}, colours, unit=unit, x=("step", "updates"))
        for stage, log in run.offline.items()
        for title, key, unit in OFFLINE
    ]
    return [panel for panel in panels if panel]
