"""The table of results: one row a method, the same cells on the page and in the terminal."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

MISSING = "–"
REWARD_MODEL = "reward model"
"""What ``results.json`` says of a run that was judged by its own reward model, since its task has no gold reward."""


def measure(judged_by: str | None) -> str:
    """What people are told that the numbers under the key ``gold`` are."""
    return "reward model score" if judged_by == REWARD_MODEL else "gold"


def results_cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of each method, of ``evaluation/results.json``.

    A column that no method has a value for is left out; a single missing value is a dash.
    """
    methods: Mapping[str, Mapping[str, Any]] = results.get("methods") or {}
    rows = list(methods.values())
    columns = {
        "method": list(methods),
        measure(results.get("gold")): _measured(rows, "gold"),
        "labels": [_cell(row.get("labels"), 0) for row in rows],
        f"win rate vs {results.get('baseline') or 'baseline'} (%)": _measured(rows, "win_rate", scale=100.0),
        "KL (nats per completion)": _measured(rows, "kl"),
        "prompts used": [_cell(row.get("prompts_used"), 0) for row in rows],
        "mean length (tokens)": [_cell(row.get("mean_length"), 1) for row in rows],
        "wall time": [duration(row.get("seconds")) for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cell != MISSING for cell in cells)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def results_table(results: Mapping[str, Any]) -> Table:
    """The results for the terminal; values are shown with ± one standard error."""
    headings, rows = results_cells(results)
    prompts = results.get("prompts")
    caption = f"± one standard error over {prompts:,} test prompts" if prompts else None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption=caption)
    for i, (heading, *cells) in enumerate(zip(headings, *rows)):
        width = max(map(len, [*cells, *heading.split()]))  # headings fold so that values need not
        table.add_column(Text(textwrap.fill(heading, width)), justify="right" if i else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name with [brackets] is not markup
    return table


def duration(seconds: float | int | None) -> str:
    """Seconds in words: 45 s, 1 min 11 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def _measured(rows: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[str]:
    """``value ± standard error`` of a column; its largest standard error has two significant digits."""
    errors = [se * scale for row in rows if (se := row.get(f"{key}_se"))]
    largest = max(filter(math.isfinite, errors), default=0.0)
    digits = min(max(1 - math.floor(math.log10(largest)), 0), 6) if largest > 0 else 3
    return [
        value if value == MISSING or error == MISSING else f"{value} ± {error}"
        for row in rows
        for value, error in [(_cell(row.get(key), digits, scale), _cell(row.get(f"{key}_se"), digits, scale))]
    ]


def _cell(value: float | int | None, digits: int, scale: float = 1.0) -> str:
    return MISSING if value is None else f"{value * scale:.{digits}f}".replace("-", "−")
