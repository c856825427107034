"""What a study hands back, and the self-contained page that shows it."""

import re
from base64 import b64encode
from dataclasses import dataclass, field
from io import BytesIO
from math import floor, log10

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

PALETTE = {
    "token": "#0072B2",
    "sentence": "#E69F00",
    "final": "#D55E00",
    "exact": "#009E73",
    "bound": "#444444",
    "other": "#CC79A7",
    "pale": "#56B4E9",
}
"""Okabe & Ito's colours, told apart by every reader; one meaning a colour on the whole page."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure as PNG, the statement it illustrates and how to read it."""

    name: str
    statement: str
    caption: str
    png: bytes

    @property
    def source(self) -> str:
        """The image as a data URI."""
        return "data:image/png;base64," + b64encode(self.png).decode()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers, already formatted."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One statement of the paper: what it says, how it has to be read, what was measured."""

    key: str
    title: str
    statement: str
    reading: tuple[str, ...]
    findings: tuple[str, ...]
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    checks: dict[str, bool] = field(default_factory=dict)
    """What must hold, by name; the command fails when one does not."""


def canvas(columns: int = 1, *, width: float = 4.6, height: float = 3.6) -> Figure:
    """An empty figure for panels side by side, in the page's style."""
    return Figure(figsize=(width * columns, height), layout="constrained", dpi=104)


def plot(figure: Figure, *, name: str, statement: str, caption: str) -> Plot:
    """Render a finished figure: quiet frames, readable sizes, its statement above it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=9)
    figure.suptitle(statement, fontsize=11, x=0.01, ha="left")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Plot(name=name, statement=statement, caption=caption, png=buffer.getvalue())


def mean_error(sample: np.ndarray) -> str:
    """Mean ± standard error, to the error's second digit."""
    mean, error = float(sample.mean()), float(sample.std(ddof=1)) / len(sample) ** 0.5
    digits = 3 if error == 0 else max(0, 1 - floor(log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


_SCRIPT = re.compile(r"([_^])(\{[^{}]*\}|[-−]?[\w½]+(?:\.\d+)?)")


def typeset(text: str) -> Markup:
    """Plain text as HTML, escaped: x_h and A^{ξ+1} get subscripts and superscripts, `code` its font."""

    def script(match: re.Match[str]) -> str:
        tag = "sub" if match[1] == "_" else "sup"
        return f"<{tag}>{_SCRIPT.sub(script, match[2].strip('{}'))}</{tag}>"

    parts = str(escape(text)).split("`")
    return Markup("".join(f"<code>{s}</code>" if i % 2 else _SCRIPT.sub(script, s) for i, s in enumerate(parts)))


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RTO: the theory, executed</title>
<style>
:root { color-scheme: light; --ink: #1d2129; --soft: #5b6472; --line: #dfe3e8;
  --good: #00734f; --bad: #b3261e; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 1020px; margin: 2.5rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 3rem; border-top: 1px solid var(--line);
  padding-top: 1.4rem } p.sub, figcaption, caption { color: var(--soft) }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid #0072B2; background: #f5f8fb }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
figure { margin: 1.6rem 0 } img { max-width: 100%; height: auto } figcaption { font-size: .92rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; margin: 1rem 0;
  font-variant-numeric: tabular-nums } caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: bottom }
td { white-space: nowrap } sub, sup { line-height: 0; font-size: .75em }
th:first-child, td:first-child { text-align: left } nav a { margin-right: 1.1rem }
.ok { color: var(--good) } .no { color: var(--bad); font-weight: 600 }
ul.checks { list-style: none; padding: 0 }
footer { margin-top: 4rem; color: var(--soft); font-size: .9rem }
</style>
</head>
<body>
<h1>Reinforced Token Optimization: the theory, executed</h1>
<p class="sub">Zhong et al., “DPO Meets PPO: Reinforced Token Optimization for RLHF”, ICML 2025,
arXiv:2404.18922. Tabular token MDPs, float64, every value exact unless called a sample.
Seed {{ seed }}{{ ", quick" if quick }}.</p>
<nav>{% for s in sections %}<a href="#{{ s.key }}">{{ s.title }}</a>{% endfor %}</nav>
{% for s in sections %}
<section id="{{ s.key }}">
<h2>{{ s.title }}</h2>
<blockquote>{{ s.statement | typeset }}</blockquote>
<h3>What was found</h3>
<ul>{% for line in s.findings %}<li>{{ line | typeset }}</li>{% endfor %}</ul>
{% for p in s.plots %}<figure><img src="{{ p.source }}" alt="{{ p.caption }}">
<figcaption>{{ p.caption | typeset }}</figcaption></figure>{% endfor %}
{% for t in s.tables %}<div class="wide"><table><caption>{{ t.caption | typeset }}</caption>
<thead><tr>{% for cell in t.header %}<th>{{ cell | typeset }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in t.rows %}
<tr>{% for cell in row %}<td>{{ cell | typeset }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div>{% endfor %}
<h3>How the statement has to be read</h3>
<ul>{% for line in s.reading %}<li>{{ line | typeset }}</li>{% endfor %}</ul>
<h3>Checked in this run</h3>
<ul class="checks">{% for name, holds in s.checks.items() %}
<li class="{{ "ok" if holds else "no" }}">
{{ "holds" if holds else "FAILS" }} — {{ name | typeset }}</li>{% endfor %}</ul>
</section>
{% endfor %}
<footer>Written by <code>rto theory</code>; the docs walk through it in <code>docs/theory.md</code>.</footer>
</body>
</html>
"""


def render(sections: list[Section], *, seed: int, quick: bool) -> str:
    """The page: one file, no network, everything escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["typeset"] = typeset
    return environment.from_string(TEMPLATE).render(sections=sections, seed=seed, quick=quick)
