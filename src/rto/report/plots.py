"""The figures of the page. One axis a figure: small SVGs that the page lays out in a grid and a phone stacks."""

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rto.report.folder import Log, Run, number

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be selected and read aloud, and takes the page's font
    "font.size": 7.2,
    "axes.edgecolor": "#9aa0a6",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": "#5f6368",
    "axes.labelsize": 7.2,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#eceff1",
    "grid.linewidth": 0.6,
    "xtick.color": "#9aa0a6",
    "ytick.color": "#9aa0a6",
    "xtick.labelcolor": "#5f6368",
    "ytick.labelcolor": "#5f6368",
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}
LARGE, SMALL = (3.6, 2.25), (2.9, 1.7)  # inches: text is about 12 px where the page shows them
METADATA = ("Creator", "Date", "Format", "Type")  # left out of the SVG

METHODS = {"SFT": "#6b7075", "start": "#6b7075", "DPO": "#2a8159", "PPO": "#0b6fb3", "RTO": "#cb4b16"}
OTHERS = ("#8e5aa8", "#b07d00", "#3a9bb5", "#c2528b", "#5b6abf", "#7a7a2e")
SOURCES = {"token": ("token reward", "#8e5aa8"), "kl": ("KL penalty", "#b8bec4"), "score": ("score", "#e0a800")}
PHASES = {"sample": "#264e70", "score": "#5b8fb0", "credit": "#e0a800", "update": "#b4cfdf"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure with its words; ``legend`` holds (name, colour) where the lines do not carry their names."""

    title: str
    unit: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()


def palette(names: Sequence[str]) -> dict[str, str]:
    """One colour a method, the same everywhere on the page."""
    others = [name for name in names if name not in METHODS]
    return {**METHODS, **{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}}


def series(log: Log, key: str, x: str = "episodes") -> tuple[np.ndarray, np.ndarray]:
    """The finite values of a key, and where they stand."""
    pairs = [(number(row.get(x)), number(row.get(key))) for row in log]
    xs, ys = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2).T
    return xs, ys


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the points; at both ends, over the half that is there."""
    half = len(y) // 40
    return np.array([y[max(i - half, 0) : i + half + 1].mean() for i in range(len(y))])


def curves(
    title: str,
    key: str,
    logs: Mapping[str, Log],
    colours: Mapping[str, str],
    *,
    unit: str = "",
    x: tuple[str, str] = ("episodes", "prompts used"),
    levels: Mapping[str, float] | None = None,
    size: tuple[float, float] = SMALL,
) -> Panel | None:
    """A key of several logs on one axis: each logged value faint, the running mean solid.

    Args:
        title: of the figure.
        key: of the logs.
        logs: by method; those without the key are left out.
        colours: by method.
        unit: of the key.
        x: key and name of the horizontal axis.
        levels: horizontal lines to compare with, by name.
        size: in inches.

    Returns:
        None if no log has the key.
    """
    drawn = {name: xy for name, log in logs.items() if len((xy := series(log, key, x[0]))[0])}
    if not drawn:
        return None
    levels = levels or {}
    with styled():
        figure, ax = axes(size, x[1])
        ends = {}
        for name, (at, ys) in drawn.items():
            mean = smooth(ys)
            ax.plot(at, ys, color=colours[name], alpha=0.22, linewidth=0.7)
            ax.plot(at, mean, color=colours[name], marker="o" if len(at) == 1 else None, markersize=3)
            ends[name] = mean[-1]
        for name, level in levels.items():
            ax.axhline(level, color=colours[name], linewidth=0.9, linestyle=(0, (1, 2)))
        _show_flat_lines_flat(ax)
        if unit.startswith("share"):
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, -0.02), min(high, 1.02))
        ax.set_xlim(left=0)
        _room_for_numbers(ax)
        if any(name not in title for name in ends):
            _name_lines(ax, {**ends, **levels}, colours)
        said = [f"{name} from {smooth(ys)[0]:.3g} to {ends[name]:.3g}" for name, (_, ys) in drawn.items()]
        said += [f"{name} at {level:.3g}" for name, level in levels.items()]
        return panel(figure, f"{title} against {x[1]}: {'; '.join(said)}.", title=title, unit=unit)


def gold_against_kl(run: Run, colours: Mapping[str, str]) -> Panel | None:
    """What each nat of KL buys: the path of every on-line method, and where the evaluation found each method."""
    paths = {}
    for name, log in run.online.items():
        rows = [row for row in log if number(row.get("kl")) is not None and number(row.get(run.gold_key)) is not None]
        if rows:
            paths[name] = [smooth(series(rows, key)[1]) for key in ("kl", run.gold_key)]
    points = {
        name: (kl, gold, number(m.get("kl_se")) or 0.0, number(m.get("gold_se")) or 0.0)
        for name, m in run.methods.items()
        if (kl := number(m.get("kl"))) is not None and (gold := number(m.get("gold"))) is not None
    }
    if not paths and not points:
        return None
    with styled():
        figure, ax = axes(LARGE, "KL from the reference, nats per completion")
        ax.set_ylabel(run.measure)
        for name, (at, path) in paths.items():
            ax.plot(at, path, color=colours[name], alpha=0.55, linewidth=1.1)
            if name not in points:
                _name_point(ax, name, at[-1], path[-1], colours[name])
        for name, (x, y, xerr, yerr) in points.items():
            ax.errorbar(x, y, yerr, xerr, fmt="o", markersize=4, color=colours[name], elinewidth=0.9, zorder=5)
            _name_point(ax, name, x, y, colours[name])
        ax.margins(x=0.1, y=0.12)
        figure.subplots_adjust(left=0.13)
        said = [f"{name} at KL {kl:.3g}, {run.measure} {gold:.3g}" for name, (kl, gold, *_) in points.items()]
        title = run.measure.capitalize()
        return panel(figure, f"{title} against KL. {'; '.join(said) or ', '.join(paths)}.", title=title, unit="by KL")


def gold_against_labels(run: Run, colours: Mapping[str, str]) -> Panel | None:
    """What labels buy: where the evaluation found each learner and method after each round, from the start on."""
    paths = {
        name: [
            (labels, gold, number(m.get("gold_se")) or 0.0)
            for m in rounds
            if (labels := number(m.get("labels"))) is not None and (gold := number(m.get("gold"))) is not None
        ]
        for name, rounds in run.by_labels.items()
    }
    paths = {name: path for name, path in paths.items() if len(path) > 1}
    if not paths:
        return None
    with styled():
        figure, ax = axes(LARGE, "labels used")
        ends = {}
        for name, path in paths.items():
            xs, ys, errors = (np.array(column) for column in zip(*path))
            ax.errorbar(xs, ys, errors, color=colours[name], marker="o", markersize=4, elinewidth=0.9, linewidth=1.1)
            ends[name] = float(ys[-1])
        ax.margins(x=0.05, y=0.12)
        _name_lines(ax, ends, colours)
        said = [
            f"{name}: {', '.join(f'{gold:.3g} at {labels:,.0f}' for labels, gold, _ in path)}"
            for name, path in paths.items()
        ]
        title = run.measure.capitalize()
        return panel(figure, f"{title} against labels used. {'; '.join(said)}.", title=title, unit="by labels")


def reward_shares(name: str, log: Log) -> Panel | None:
    """Which source the reward comes from: Σ|term| of each over the sum of the three."""
    rows = [row for row in log if all(number(row.get(f"share/{s}")) is not None for s in SOURCES)]
    if not rows:
        return None
    xs, _ = series(rows, "share/token")
    shares = {label: smooth(series(rows, f"share/{s}")[1]) for s, (label, _) in SOURCES.items()}
    with styled():
        figure, ax = axes(SMALL, "prompts used")
        if len(xs) == 1:  # a line has no area: one batch is drawn as far as it reaches
            xs, shares = np.array([0.0, *xs]), {label: share.repeat(2) for label, share in shares.items()}
        ax.stackplot(xs, *shares.values(), colors=[colour for _, colour in SOURCES.values()], linewidth=0)
        ax.set_ylim(0, 1)
        ax.set_xlim(xs[0], xs[-1])
        ax.grid(False)
        figure.subplots_adjust(left=0.15, right=0.96)
        said = ", ".join(f"{label} {share[-1]:.0%}" for label, share in shares.items())
        return panel(
            figure,
            f"{name}: share of the reward by source at the end: {said}.",
            title=f"{name}: reward by source",
            unit="share of Σ|reward|",
            legend=tuple(SOURCES.values()),
        )


def seconds_per_phase(logs: Mapping[str, Log]) -> Panel | None:
    """Where the time goes: mean seconds of each phase for one batch of rollouts."""
    means = {
        name: {p: float(ys.mean()) if len(ys := series(log, f"seconds/{p}")[1]) else 0.0 for p in PHASES}
        for name, log in logs.items()
    }
    means = {name: phases for name, phases in means.items() if sum(phases.values()) > 0}
    if not means:
        return None
    with styled():
        figure, ax = axes(SMALL, "seconds per batch of rollouts")
        left = np.zeros(len(means))
        for phase, colour in PHASES.items():
            width = np.array([phases[phase] for phases in means.values()])
            ax.barh(range(len(means)), width, left=left, color=colour, height=0.55)
            left += width
        for i, total in enumerate(left):
            ax.text(total + 0.02 * left.max(), i, f"{total:.3g} s", va="center", color="#5f6368")
        ax.set_yticks(range(len(means)), list(means), parse_math=False)
        ax.set_ylim(len(means) - 0.4, -0.6)
        ax.set_xlim(0, left.max() * 1.25)
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        figure.subplots_adjust(left=min(0.08 + 0.024 * max(map(len, means)), 0.5), right=0.98)
        said = "; ".join(
            f"{name}: " + ", ".join(f"{p} {s:.3g}" for p, s in phases.items()) for name, phases in means.items()
        )
        return panel(
            figure,
            f"Seconds per batch of rollouts. {said}.",
            title="Time by phase",
            unit="mean",
            legend=tuple(PHASES.items()),
        )


def styled() -> AbstractContextManager[None]:
    """Within it, figures are drawn in the page's style."""
    return matplotlib.rc_context(STYLE)


def axes(size: tuple[float, float], xlabel: str) -> tuple[Figure, Axes]:
    """An empty figure of a size in inches, and its one axis."""
    figure = Figure(figsize=size)
    ax = figure.subplots()
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(_tick))
    ax.margins(x=0)
    figure.subplots_adjust(left=0.3 / size[0] + 0.03, bottom=0.37 / size[1], top=0.97, right=0.97)
    return figure, ax


def _tick(value: float, at: int | None = None) -> str:
    """A number as short as can be: 12k, 0.25, 3.6e-6."""
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return re.sub(r"e-0*", "e-", f"{value:.4g}")


def _room_for_numbers(ax: Axes) -> None:
    """A margin on the left that holds the longest number of the axis."""
    figure: Any = ax.figure
    low, high = ax.get_ylim()
    longest = max((len(_tick(y)) for y in ax.get_yticks() if low <= y <= high), default=0)
    width = figure.get_size_inches()[0] * 72
    figure.subplots_adjust(left=max(figure.subplotpars.left, (7 + 4.7 * longest) / width))


def _show_flat_lines_flat(ax: Axes) -> None:
    """Without this, the axis of a constant would zoom in on its rounding."""
    low, high = ax.dataLim.intervaly
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) / 2 or 1.0
        ax.set_ylim(low - room, high + room)


def _name_lines(ax: Axes, ends: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Write each line's name where it ends, in its colour, names pushed apart where they would overlap."""
    figure: Any = ax.figure
    width, height = figure.get_size_inches() * 72
    room = (9 + 4.6 * max(map(len, ends))) / width
    figure.subplots_adjust(right=max(1 - room, 0.5))
    low, high = ax.get_ylim()
    gap = (high - low) * 9 / (height * 0.8)
    names = sorted(ends, key=lambda name: ends[name])
    at: list[float] = []
    for name in names:  # up, away from the name below ...
        at.append(max(ends[name], at[-1] + gap) if at else ends[name])
    for i in reversed(range(len(at))):  # ... and back down, under the top of the figure
        at[i] = min(at[i], high if i + 1 == len(at) else at[i + 1] - gap)
    for name, y in zip(names, at):
        ax.text(1.02, y, name, transform=ax.get_yaxis_transform(), color=colours[name], va="center", parse_math=False)


def _name_point(ax: Axes, name: str, x: float, y: float, colour: str) -> None:
    ax.annotate(
        name,
        (x, y),
        xytext=(5, -10),
        textcoords="offset points",
        color=colour,
        weight="bold",
        zorder=6,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.4},
        parse_math=False,
    )


def panel(figure: Figure, alt: str, *, title: str, unit: str, legend: tuple[tuple[str, str], ...] = ()) -> Panel:
    """The figure as an inline SVG that says in words what it shows."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": alt}):  # the same run gives the same bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    head, _, body = buffer.getvalue().partition("<svg ")[2].partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    own = f"f{zlib.crc32(alt.encode()):08x}-"  # an id belongs to the page, not to the figure
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}", body)
    start = Markup('<svg role="img" aria-label="{}" {}>').format(alt, Markup(box[0]))
    return Panel(title=title, unit=unit, svg=start + Markup(body), legend=legend)
