"""The paper's table over runs and judgments with intervals, and which differences are significant.

What is done to each column, top to bottom: measure each row, draw the same prompts again and again for all of them,
subtract pair by pair, correct for the number of pairs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rto.evaluation.statistics.estimates import Difference, holm, paired_difference
from rto.evaluation.table import measures
from rto.evaluation.table.measures import Cell, Measure, Settings, Told
from rto.evaluation.table.sources import Entry

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A tested difference; ``p_holm`` is corrected for all pairs of its column."""

    first: str
    second: str
    difference: Difference
    p_holm: float

    @property
    def significant(self) -> bool:
        """At 5 %, over the family."""
        return self.p_holm < ALPHA


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table."""

    key: str
    title: str
    digits: int
    cells: dict[str, Cell]
    pairs: list[Pair] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The whole page, before it is written in any format."""

    entries: list[str]
    columns: list[Column]
    details: dict[str, dict[str, Any]]
    notes: list[str]
    settings: Settings


def compare(entries: Sequence[Entry], settings: Settings, notes: Sequence[str] = ()) -> Comparison:
    """Every column that a row has something for.

    Raises:
        ValueError: a measure cannot be computed; the message names the file.
    """
    told = Told(notes=list(notes), details={e.model: measures.details(e) for e in entries})
    columns = [
        _column("ae_lc", "AE LC", measures.alpaca_lc(entries, settings, told), settings, told),
        _column("ae_wr", "AE WR", measures.alpaca_wr(entries, settings), settings, told),
        _column("ah_sc", "AH SC", measures.arena_sc(entries, settings, told), settings, told),
        _column("ah_wr", "AH WR", measures.arena_wr(entries, settings, told), settings, told),
        _column(
            "gold",
            measures.gold_title(entries),
            measures.gold(entries, settings),
            settings,
            told,
            given=measures.summary(entries, "gold"),
        ),
        _column("gold_wr", measures.baseline_title(entries), measures.gold_wins(entries, settings), settings, told),
        Column(key="kl", title="KL (nats)", digits=2, cells=measures.summary(entries, "kl")),
        Column(key="tokens", title="length (tokens)", digits=0, cells=measures.tokens(entries)),
        Column(key="characters", title="length (chars)", digits=0, cells=measures.characters(entries)),
    ]
    return Comparison(
        entries=[e.model for e in entries],
        columns=[c for c in columns if c.cells],
        details={name: found for name, found in told.details.items() if found},
        notes=list(dict.fromkeys(told.notes)),
        settings=settings,
    )


def _column(
    key: str,
    title: str,
    measured: list[Measure],
    settings: Settings,
    told: Told,
    given: dict[str, Cell] | None = None,
) -> Column:
    """Cells and tested pairs of some measures; ``given`` cells stand where nothing could be measured."""
    pairs = _pairs(title, measured, settings, told)
    behind = {p.second if p.difference.value > 0 else p.first for p in pairs if p.significant}
    tested = {name for p in pairs for name in (p.first, p.second)}
    cells = dict(given or {})
    for m in measured:
        low, high = m.interval
        cells[m.entry] = Cell(value=m.value, low=low, high=high, leads=m.entry in tested - behind)
    return Column(key=key, title=title, digits=2, cells=cells, pairs=pairs)


def _pairs(title: str, measured: list[Measure], settings: Settings, told: Told) -> list[Pair]:
    """Differences of all comparable pairs, with p-values corrected for their number."""
    found = []
    for a, b in itertools.combinations(measured, 2):
        if a.group == b.group:
            difference = _difference(a, b, settings)
            if difference is None:
                told.notes.append(f"{title}: {a.entry} and {b.entry} have no two prompts in common; not tested.")
            else:
                found.append((a, b, difference))
    if len({m.group for m in measured}) > 1:
        groups = "; ".join(", ".join(g) for g in dict.fromkeys(m.group for m in measured))
        told.notes.append(f"{title}: rows were judged differently ({groups}); only like is tested against like.")
    adjusted = holm([d.p for _, _, d in found])
    return [
        Pair(first=a.entry, second=b.entry, difference=d, p_holm=float(p)) for (a, b, d), p in zip(found, adjusted)
    ]


def _difference(a: Measure, b: Measure, settings: Settings) -> Difference | None:
    """A − b; over the prompts that both have, when they do not have the same."""
    if (a.has == b.has).all():
        return paired_difference(
            a.value - b.value, a.draws - b.draws, prompts=int(a.has.sum()), centre=a.centre - b.centre
        )
    both = a.has & b.has
    if both.sum() < 2:
        return None
    at_one, drawn = both[None].astype(float), settings.draw(both)
    value = float(a.estimate(at_one)[0] - b.estimate(at_one)[0])
    return paired_difference(value, a.estimate(drawn) - b.estimate(drawn), prompts=int(both.sum()))
