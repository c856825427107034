"""A comparison for people and programs: the terminal, compare.md, compare.html and compare.json.

Names of models and judges are data: they are shown as text, never as markup, and control characters as symbols.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rto.evaluation.table.measures import Cell
from rto.evaluation.table.significance import ALPHA, Column, Comparison, Pair
from rto.files import printable, write_atomically
from rto.report.sheet import Titled, bold, render_sheet
from rto.report.table import MISSING

PAIRS = ("difference", "prompts", "p", "p (Holm)", "significant")
SHOWN_PAIRS = 15
"""Differences a column that the terminal shows; the files have all."""


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, the differences and the notes."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    longest = max(len(entry) for entry in comparison.entries)
    table.add_column("model", overflow="fold", min_width=min(longest, 16))
    for column in comparison.columns:
        table.add_column(Text(printable(column.title)), justify="right", overflow="fold")
    for entry in comparison.entries:
        table.add_row(Text(printable(entry)), *(_rich_cell(c, c.cells.get(entry)) for c in comparison.columns))
    console.print(table)
    for line in _legend(comparison):
        console.print(Text(line, style="dim"))
    for column in comparison.columns:
        if column.pairs:
            console.print()
            console.print(_pairs_table(column))
            if len(column.pairs) > SHOWN_PAIRS:
                console.print(Text(f"… and {len(column.pairs) - SHOWN_PAIRS} more in compare.md", style="dim"))
    for note in comparison.notes:
        console.print(Text(f"note: {printable(note)}", style="yellow"))


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.md, .html and .json into a folder, each whole or not at all, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"compare.{kind}" for kind in ("md", "html", "json")]
    texts = [markdown(comparison), html(comparison), json.dumps(_plain(_document(comparison)), indent=1)]
    for path, text in zip(paths, texts, strict=True):
        write_atomically(path, text)
    return paths


def markdown(comparison: Comparison) -> str:
    """The page in GitHub's Markdown."""
    return "\n".join(_markdown_lines(comparison)) + "\n"


def html(comparison: Comparison) -> str:
    """The page in the report's style."""
    columns = comparison.columns
    rows = [[e, *(_html_cell(c, c.cells.get(e)) for c in columns)] for e in comparison.entries]
    tables = [Titled(title="Models", rows=[["model", *(c.title for c in columns)], *rows])]
    for column in columns:
        if column.pairs:
            pairs = [[f"{p.first} − {p.second}", *_pair_cells(column, p)] for p in column.pairs]
            tables.append(Titled(title=f"Differences in {column.title}", rows=[["first − second", *PAIRS], *pairs]))
    if bias := list(_bias_rows(comparison)):
        tables.append(Titled(title="The judges", rows=[BIAS_HEADINGS, *bias]))
    about = list(_legend(comparison))
    return render_sheet(title="Comparison", kind="win rates", about=about, tables=tables, notes=comparison.notes)


def _markdown_lines(comparison: Comparison) -> Iterator[str]:
    columns = comparison.columns
    yield from ("# Comparison", "")
    yield from _table(
        ["model", *(_escaped(c.title) for c in columns)],
        [[_escaped(e), *(_markdown_cell(c, c.cells.get(e)) for c in columns)] for e in comparison.entries],
    )
    yield ""
    for line in _legend(comparison):
        yield from (line, "")
    for column in columns:
        if column.pairs:
            yield from (f"## Differences in {_escaped(column.title)}", "")
            yield from _table(
                ["first", "second", "first − second", *PAIRS[1:]],
                [[_escaped(p.first), _escaped(p.second), *_pair_cells(column, p)] for p in column.pairs],
            )
            yield ""
    if rows := list(_bias_rows(comparison)):
        yield from ("## The judges", "")
        yield from _table(BIAS_HEADINGS, [[_escaped(x) for x in row] for row in rows])
        yield ""
    for note in comparison.notes:
        yield f"- {_escaped(note)}"


def _table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|---" + "|---:" * (len(headings) - 1) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _legend(comparison: Comparison) -> Iterator[str]:
    s = comparison.settings
    yield (
        f"[low, high]: 95 % interval, {s.rounds:,} bootstrap rounds over prompts. Bold: no comparable row is "
        f"significantly better in a paired test (bootstrap standard error, Student's t; Holm over the pairs of a "
        f"column, {ALPHA:.0%})."
    )


def _value(column: Column, x: float) -> str:
    return f"{round(x, column.digits) + 0.0:,.{column.digits}f}".replace("-", "−")  # + 0: no "−0.00"


def _interval(column: Column, cell: Cell) -> str:
    return (
        "" if cell.low is None or cell.high is None else f"[{_value(column, cell.low)}, {_value(column, cell.high)}]"
    )


def _rich_cell(column: Column, cell: Cell | None) -> Text:
    if cell is None:
        return Text(MISSING)
    text = Text(_value(column, cell.value), style="bold" if cell.leads else "")
    return text.append(f"\n{_interval(column, cell)}", style="dim") if cell.low is not None else text


def _markdown_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    value = _value(column, cell.value)
    return " ".join(filter(None, [f"**{value}**" if cell.leads else value, _interval(column, cell)]))


def _html_cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    value = _value(column, cell.value)
    return Markup(" ").join(filter(None, [bold(value) if cell.leads else value, _interval(column, cell)]))


def _pairs_table(column: Column) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    for i, heading in enumerate([f"{column.title}: first − second", "difference", "prompts", "p", "p (Holm)", ""]):
        table.add_column(Text(printable(heading)), justify="right" if i else "left")
    for p in column.pairs[:SHOWN_PAIRS]:
        names = f"{printable(p.first)} − {printable(p.second)}"
        table.add_row(Text(names), *(Text(cell) for cell in _pair_cells(column, p)))
    return table


def _pair_cells(column: Column, pair: Pair) -> list[str]:
    d = pair.difference
    low, high = _value(column, d.low), _value(column, d.high)
    return [
        f"{_value(column, d.value)} [{low}, {high}]",
        f"{d.prompts:,}",
        _p(d.p),
        _p(pair.p_holm),
        "yes" if pair.significant else "no",
    ]


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


BIAS_HEADINGS = [
    "model",
    "benchmark",
    "judge",
    "verdicts",
    "no verdict",
    "for the first answer",
    "same both ways",
    "for the longer",
    "ρ(length)",
]


def _bias_rows(comparison: Comparison) -> Iterator[list[str]]:
    """What the verdicts owe to position and length, in percent ± one standard error."""
    for entry, details in comparison.details.items():
        for benchmark, judged, unit in (
            ("alpaca_eval", "AlpacaEval", "judged"),
            ("arena_hard", "Arena-Hard", "games"),
        ):
            if benchmark not in details:
                continue
            found = details[benchmark]
            position, length = found.get("position") or {}, found.get("length") or {}
            yield [
                entry,
                judged,
                found["judge"],
                str(found[unit]),
                str(found["missing"]),
                _percent(position.get("first")),
                _percent(position.get("agreement")),
                _percent(length.get("longer")),
                f"{length['correlation']:.2f}".replace("-", "−") if length else MISSING,
            ]


def _percent(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return MISSING
    return f"{100 * estimate['mean']:.1f} ± {100 * estimate['se']:.1f}"


def _document(comparison: Comparison) -> dict[str, Any]:
    return {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(comparison.settings).items()},
        "entries": comparison.entries,
        "columns": [
            {
                "key": c.key,
                "title": c.title,
                "cells": {name: asdict(cell) for name, cell in c.cells.items()},
                "pairs": [{**asdict(p), "significant": p.significant} for p in c.pairs],
            }
            for c in comparison.columns
        ],
        "details": comparison.details,
        "notes": comparison.notes,
    }


def _plain(x: Any) -> Any:
    """JSON has no nan: null."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|&~#!])", r"\\\1", printable(text))
