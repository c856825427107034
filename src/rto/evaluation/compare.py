"""`rto evaluate compare RUN RUN …`: the paper's table with intervals, and which differences are significant.

What is done to each column, top to bottom: gather the rows, measure each, draw the same prompts again and again for
all of them, subtract pair by pair, correct for the number of pairs.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.text import Text

from rto.data.errors import DataError
from rto.evaluation import arena_hard, length_control, winrate
from rto.evaluation.estimates import Difference, bootstrap_weights, holm, paired_difference, percentile_interval
from rto.evaluation.results_files import AlpacaAnnotations, Entry, read_difficulties, read_gamed, read_sources

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compare.

    Attributes:
        rounds, seed: of the bootstrap.
        difficulty, gamed: the official extra files of the length control, by path.
        length_control: ``fit`` (ours) or ``alpaca_eval`` (the official package computes the value).
    """

    rounds: int = 1000
    seed: int = 0
    difficulty: Path | None = None
    gamed: Path | None = None
    length_control: str = "fit"

    def __post_init__(self) -> None:
        if self.rounds < 100:
            raise ValueError(f"--rounds {self.rounds} is too few for 2.5 % tails; use 100 or more")
        if self.gamed is not None and self.difficulty is None:
            raise ValueError("--gamed needs --difficulty too: the official fit uses both files")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of one row, and how to get it again from other prompts.

    Attributes:
        entry: the row's name.
        group: what must be equal for two numbers to be comparable (judge, baseline).
        value: as shown.
        centre: the estimate at weights of one; differs from ``value`` where the shown fit is not the one resampled.
        has: which prompts of the column the row was judged on.
        draws: the estimate in each round.
        estimate: of R weightings of the column's prompts, R numbers.
    """

    entry: str
    group: tuple[str, ...]
    value: float
    centre: float
    has: Bool[np.ndarray, " U"]
    draws: Float[np.ndarray, " R"]
    estimate: Callable[[Float[np.ndarray, "R U"]], Float[np.ndarray, " R"]]

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, percentiles of the draws moved to the shown value."""
        low, high = percentile_interval(self.draws)
        return low + self.value - self.centre, high + self.value - self.centre


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
class Cell:
    """A number of the table with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    leads: bool = False
    """No comparable row is significantly better, and there is one to compare with."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table."""

    key: str
    title: str
    digits: int
    cells: dict[str, Cell]
    pairs: list[Pair] = field(default_factory=list)


@dataclass(kw_only=True)
class Told:
    """What a reader should know beside the numbers: notes, and details by row."""

    notes: list[str]
    details: dict[str, dict[str, Any]]


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
    told = Told(notes=list(notes), details={e.model: _details(e) for e in entries})
    columns = [
        _column("ae_lc", "AE LC", _alpaca_lc(entries, settings, told), settings, told),
        _column("ae_wr", "AE WR", _alpaca_wr(entries, settings), settings, told),
        _column("ah_sc", "AH SC", _arena_sc(entries, settings, told), settings, told),
        _column("ah_wr", "AH WR", _arena_wr(entries, settings, told), settings, told),
        _column("gold", "gold", _gold(entries, settings), settings, told, given=_summary(entries, "gold")),
        _column("gold_wr", _baseline_title(entries), _gold_wins(entries, settings), settings, told),
        Column(key="kl", title="KL (nats)", digits=2, cells=_summary(entries, "kl")),
        Column(key="tokens", title="length (tokens)", digits=0, cells=_tokens(entries)),
        Column(key="characters", title="length (chars)", digits=0, cells=_characters(entries)),
    ]
    return Comparison(
        entries=[e.model for e in entries],
        columns=[c for c in columns if c.cells],
        details={name: found for name, found in told.details.items() if found},
        notes=list(dict.fromkeys(told.notes)),
        settings=settings,
    )


# --- one column


def _column(
    key: str,
    title: str,
    measures: list[Measure],
    settings: Settings,
    told: Told,
    given: dict[str, Cell] | None = None,
) -> Column:
    """Cells and tested pairs of some measures; ``given`` cells stand where nothing could be measured."""
    pairs = _pairs(title, measures, settings, told)
    behind = {p.second if p.difference.value > 0 else p.first for p in pairs if p.significant}
    tested = {name for p in pairs for name in (p.first, p.second)}
    cells = dict(given or {})
    for m in measures:
        low, high = m.interval
        cells[m.entry] = Cell(value=m.value, low=low, high=high, leads=m.entry in tested - behind)
    return Column(key=key, title=title, digits=2, cells=cells, pairs=pairs)


def _pairs(title: str, measures: list[Measure], settings: Settings, told: Told) -> list[Pair]:
    """Differences of all comparable pairs, with p-values corrected for their number."""
    found = []
    for a, b in itertools.combinations(measures, 2):
        if a.group == b.group:
            difference = _difference(a, b, settings)
            if difference is None:
                told.notes.append(f"{title}: {a.entry} and {b.entry} have no two prompts in common; not tested.")
            else:
                found.append((a, b, difference))
    if len({m.group for m in measures}) > 1:
        groups = "; ".join(", ".join(g) for g in dict.fromkeys(m.group for m in measures))
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
    at_one, drawn = both[None].astype(float), _draw(both, settings)
    value = float(a.estimate(at_one)[0] - b.estimate(at_one)[0])
    return paired_difference(value, a.estimate(drawn) - b.estimate(drawn), prompts=int(both.sum()))


def _draw(has: Bool[np.ndarray, " U"], settings: Settings) -> Float[np.ndarray, "R U"]:
    """Draw the prompts that ``has`` names, with replacement; rows that have the same prompts get the same draws."""
    weights = np.zeros((settings.rounds, len(has)))
    weights[:, has] = bootstrap_weights(int(has.sum()), settings.rounds, settings.seed)
    return weights


def _measured(
    entry: str,
    group: tuple[str, ...],
    has: np.ndarray,
    estimate: Callable[[np.ndarray], np.ndarray],
    settings: Settings,
    value: float | None = None,
) -> Measure:
    centre = float(estimate(has[None].astype(float))[0])
    return Measure(
        entry=entry,
        group=group,
        value=centre if value is None else value,
        centre=centre,
        has=has,
        draws=estimate(_draw(has, settings)),
        estimate=estimate,
    )


def _union(prompts: Sequence[Sequence[Any]]) -> dict[Any, int]:
    return {p: i for i, p in enumerate(dict.fromkeys(itertools.chain.from_iterable(prompts)))}


def _mean(at: np.ndarray, x: np.ndarray, size: int) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """``has`` and ``estimate`` of the mean of x, whose entries belong to the column's prompts ``at``."""
    has = np.zeros(size, dtype=bool)
    has[at] = True
    return has, lambda weights: weights[:, at] @ x / weights[:, at].sum(1)


# --- AlpacaEval 2


def _alpacas(entries: Sequence[Entry]) -> tuple[list[tuple[str, AlpacaAnnotations]], dict[Any, int]]:
    found = [(e.model, e.alpaca) for e in entries if e.alpaca is not None]
    return found, _union([a.prompts for _, a in found])


def _alpaca_wr(entries: Sequence[Entry], settings: Settings) -> list[Measure]:
    found, union = _alpacas(entries)
    measures = []
    for name, a in found:
        judged = ~np.isnan(a.shares)
        at = np.array([union[p] for p in a.prompts])[judged]
        has, estimate = _mean(at, 100 * a.shares[judged], len(union))
        measures.append(_measured(name, (a.judge, a.baseline), has, estimate, settings))
    return measures


def _alpaca_lc(entries: Sequence[Entry], settings: Settings, told: Told) -> list[Measure]:
    found, union = _alpacas(entries)
    if not found:
        return []
    difficulties = None if settings.difficulty is None else read_difficulties(settings.difficulty)
    gamed = None if settings.gamed is None else read_gamed(settings.gamed)
    measures = []
    for name, a in found:
        data = _length_data(a, difficulties)
        try:
            fit = length_control.fit_length_controlled(data, gamed)
        except ValueError as error:
            told.notes.append(f"AE LC of {name} is left out: {error}.")
            continue
        told.details[name]["length_controlled"] = asdict(fit)
        value = fit.win_rate
        if settings.length_control == "alpaca_eval":
            official = length_control.official_length_controlled(a.rows)
            told.details[name]["length_controlled_official"] = official
            value = official["length_controlled_winrate"]
        measures.append(_length_controlled(name, a, data, gamed, union, value, settings))
        _tell_variant(fit.glm, settings, told)
    return measures


def _length_controlled(
    name: str,
    a: AlpacaAnnotations,
    data: length_control.LengthControlData,
    gamed: length_control.GamedBaselines | None,
    union: dict[Any, int],
    value: float,
    settings: Settings,
) -> Measure:
    at = np.array([union[p] for p in a.prompts])
    has = np.zeros(len(union), dtype=bool)
    has[at[~np.isnan(a.shares)]] = True

    def estimate(weights: np.ndarray) -> np.ndarray:
        return length_control.refit_win_rates(data, weights[:, at], gamed)

    return _measured(name, (a.judge, a.baseline), has, estimate, settings, value)


def _length_data(a: AlpacaAnnotations, difficulties: dict[int, float] | None) -> length_control.LengthControlData:
    difficulty = None
    if difficulties is not None:
        index = a.index
        if index is None:
            if len(a.shares) != len(difficulties):
                raise DataError(
                    f"{a.path}: {len(a.shares)} rows of {a.model!r} for {len(difficulties)} difficulties; add the key "
                    "'index', the row's place in the benchmark"
                )
            index = np.arange(len(a.shares))
        unknown = [i for i in index.tolist() if i not in difficulties]
        if unknown:
            raise DataError(f"{a.path}: index {unknown[0]} of {a.model!r} has no instruction difficulty")
        difficulty = np.array([difficulties[i] for i in index.tolist()])
    return length_control.LengthControlData(
        shares=a.shares, baseline_length=a.baseline_length, model_length=a.model_length, difficulty=difficulty
    )


def _tell_variant(glm: str, settings: Settings, told: Told) -> None:
    if settings.length_control == "alpaca_eval":
        told.notes.append(f"AE LC is the alpaca-eval package's own number; its interval is of refits of {glm}.")
    elif glm != "length_controlled_v1":
        told.notes.append(
            f"AE LC is the official variant {glm}, not the leaderboard's length_controlled_v1, which needs two files "
            "of the hub data set tatsu-lab/alpaca_eval: --difficulty instruction_difficulty.csv --gamed df_gamed.csv"
        )


# --- Arena-Hard


def _arena_wr(entries: Sequence[Entry], settings: Settings, told: Told) -> list[Measure]:
    found = [(e.model, e.arena) for e in entries if e.arena is not None]
    union = _union([[g.question for g in a.games] for _, a in found])
    measures = []
    for name, a in found:
        games = arena_hard.pool(a.games)
        at = np.array([union[q] for q in games.questions])
        has = np.zeros(len(union), dtype=bool)
        has[at] = True

        def estimate(weights: np.ndarray, games: arena_hard.Games = games, at: np.ndarray = at) -> np.ndarray:
            return arena_hard.arena_scores(games, games.resample_questions(weights[:, at]))[:, 0]

        measures.append(_measured(name, (a.judge, a.baseline), has, estimate, settings))
        by_battle = arena_hard.arena_scores(games, games.resample_battles(settings.rounds, settings.seed))
        told.details[name]["arena_hard"]["wr_by_battle"] = _bounds(by_battle[:, 0])
    return measures


def _arena_sc(entries: Sequence[Entry], settings: Settings, told: Told) -> list[Measure]:
    """Style-controlled scores, fitted over all rows of one judge and baseline together."""
    groups: dict[tuple[str, str], list[tuple[str, arena_hard.Game, np.ndarray]]] = {}
    for e in entries:
        if e.arena is not None:
            styled = _styled(e, told)
            groups.setdefault((e.arena.judge, e.arena.baseline), []).extend(styled)
    return [m for group, games in groups.items() if games for m in _style_pool(group, games, settings, told)]


def _styled(entry: Entry, told: Told) -> list[tuple[str, arena_hard.Game, np.ndarray]]:
    """The row's games with their style differences; none, and a note, if a count is missing."""
    a = entry.arena
    assert a is not None
    if a.model_style is None or a.baseline_style is None:
        lacking = a.model if a.model_style is None else a.baseline
        told.notes.append(f"AH SC of {entry.model} is left out: no model_answer/ file with token counts of {lacking}.")
        return []
    out = []
    for g in a.games:
        if g.question not in a.model_style or g.question not in a.baseline_style:
            told.notes.append(
                f"AH SC of {entry.model} is left out: question {g.question} has no answer of both sides."
            )
            return []
        difference = arena_hard.style_difference(a.baseline_style[g.question], a.model_style[g.question])
        out.append((entry.model, g, difference))
    return out


def _style_pool(
    group: tuple[str, str],
    styled: list[tuple[str, arena_hard.Game, np.ndarray]],
    settings: Settings,
    told: Told,
) -> list[Measure]:
    named = [arena_hard.Game(model=m, question=g.question, share=g.share, battles=g.battles) for m, g, _ in styled]
    games = arena_hard.pool(named, {(m, g.question): style for m, g, style in styled})
    whole = arena_hard.style_controlled(games, games.once)
    drawn = arena_hard.style_controlled(games, games.resample_questions(_draw(_all(games), settings)))
    by_battle = arena_hard.style_controlled(games, games.resample_battles(settings.rounds, settings.seed))
    told.notes.append(
        f"AH SC of judge {group[0]} is at the average style of the {len(games.models)} row(s) fitted together: it "
        "changes with them, and alone a row has nothing to be corrected for."
    )
    measures = []
    for i, name in enumerate(games.models):
        has = np.zeros(len(games.questions), dtype=bool)
        has[games.question[games.model == i]] = True

        def estimate(weights: np.ndarray, i: int = i) -> np.ndarray:
            return arena_hard.style_controlled(games, games.resample_questions(weights)).scores[:, i]

        value = float(whole.scores[0, i])
        measures.append(
            Measure(
                entry=name,
                group=group,
                value=value,
                centre=value,
                has=has,
                draws=drawn.scores[:, i],
                estimate=estimate,
            )
        )
        told.details[name]["arena_hard"] |= {
            "sc_by_battle": _bounds(by_battle.scores[:, i]),
            "style_coefficients": dict(zip(arena_hard.STYLE, whole.style[0].tolist())),
        }
    return measures


def _all(games: arena_hard.Games) -> np.ndarray:
    return np.ones(len(games.questions), dtype=bool)


def _bounds(draws: np.ndarray) -> list[float]:
    return list(percentile_interval(draws))


# --- runs of ours


def _gold(entries: Sequence[Entry], settings: Settings) -> list[Measure]:
    runs = [(e.model, e.run) for e in entries if e.run is not None and e.run.gold]
    union = _union([list(r.gold) for _, r in runs])
    measures = []
    for name, r in runs:
        has, estimate = _mean(np.array([union[p] for p in r.gold]), np.array(list(r.gold.values())), len(union))
        measures.append(_measured(name, _gold_group(r.gold_name, r.run), has, estimate, settings))
    return measures


def _gold_group(gold: str, run: Path) -> tuple[str, ...]:
    """A learned reward model is the run's own: its scale means nothing elsewhere."""
    return ("reward model of", str(run)) if gold == "reward model" else (gold,)


def _gold_wins(entries: Sequence[Entry], settings: Settings) -> list[Measure]:
    """Win rate against the run's baseline under its gold; a draw counts half."""
    runs = [(e.model, e.run) for e in entries if e.run is not None]
    baselines = {r.run: r.gold for _, r in runs if r.method == r.baseline}
    union = _union([list(r.gold) for _, r in runs])
    measures = []
    for name, r in runs:
        shared = {p: g for p, g in r.gold.items() if p in baselines.get(r.run, {})}
        if r.method == r.baseline or not shared:
            continue
        gap = np.array([g - baselines[r.run][p] for p, g in shared.items()])
        has, estimate = _mean(np.array([union[p] for p in shared]), 50 * (np.sign(gap) + 1), len(union))
        measures.append(_measured(name, (f"{r.baseline} of", str(r.run)), has, estimate, settings))
    return measures


def _baseline_title(entries: Sequence[Entry]) -> str:
    names = {e.run.baseline for e in entries if e.run is not None and e.run.baseline}
    return f"win rate vs {names.pop()}" if len(names) == 1 else "win rate vs baseline"


def _summary(entries: Sequence[Entry], key: str) -> dict[str, Cell]:
    """Means that results.json has, ± 1.96 standard errors."""
    cells = {}
    for e in entries:
        value = None if e.run is None else e.run.summary.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            se = e.run.summary.get(f"{key}_se") if e.run else None
            half = 1.96 * se if isinstance(se, int | float) and math.isfinite(se) else None
            cells[e.model] = Cell(
                value=value, low=None if half is None else value - half, high=None if half is None else value + half
            )
    return cells


def _tokens(entries: Sequence[Entry]) -> dict[str, Cell]:
    cells = {}
    for e in entries:
        if e.run is not None and isinstance(length := e.run.summary.get("mean_length"), int | float):
            cells[e.model] = Cell(value=length)
        elif e.arena is not None and e.arena.model_style:
            cells[e.model] = Cell(value=float(np.mean([style[0] for style in e.arena.model_style.values()])))
    return cells


def _characters(entries: Sequence[Entry]) -> dict[str, Cell]:
    return {e.model: Cell(value=float(e.alpaca.model_length.mean())) for e in entries if e.alpaca is not None}


# --- details


def _details(entry: Entry) -> dict[str, Any]:
    """Counts and diagnostics of one row's judgments."""
    found: dict[str, Any] = {}
    if (a := entry.alpaca) is not None:
        extra = a.model_length - a.baseline_length
        found["alpaca_eval"] = {"judge": a.judge, "baseline": a.baseline, **asdict(winrate.win_rate(a.shares))}
        if a.model_first is not None:
            found["alpaca_eval"]["position"] = asdict(winrate.position_bias(a.shares, a.model_first, a.prompts))
        if (extra[~np.isnan(a.shares)] != 0).any():
            found["alpaca_eval"]["length"] = asdict(winrate.length_bias(a.shares, extra))
    if (b := entry.arena) is not None:
        shares, rounds = np.array([g.share for g in b.games]), np.array(b.rounds)
        questions = [g.question for g in b.games]
        found["arena_hard"] = {"judge": b.judge, "baseline": b.baseline, "games": len(b.games), "missing": b.missing}
        found["arena_hard"]["position"] = asdict(winrate.position_bias(shares, rounds == 1, questions))
        if b.model_style is not None and b.baseline_style is not None:
            tokens = [
                (b.model_style[q][0] - b.baseline_style[q][0]) if q in b.model_style and q in b.baseline_style else 0.0
                for q in questions
            ]
            if any(tokens):
                found["arena_hard"]["length"] = asdict(winrate.length_bias(shares, np.array(tokens)))
    return found


# --- the command


def main(argv: Sequence[str] | None = None) -> int:
    """`rto evaluate compare`.

    Raises:
        ValueError: bad input; the message names the file and the row.
    """
    parser = argparse.ArgumentParser(
        prog="rto evaluate compare",
        description="The paper's table over runs and judgments, with 95 % intervals and paired tests.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a folder of `rto run`, AlpacaEval annotations, Arena-Hard judgments, or a folder that holds such files",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("comparison"), help="for compare.md and compare.json")
    parser.add_argument(
        "--difficulty", type=Path, help="AlpacaEval's instruction_difficulty.csv, for its length control"
    )
    parser.add_argument("--gamed", type=Path, help="AlpacaEval's df_gamed.csv, for its regularised length control")
    parser.add_argument(
        "--length_control",
        choices=("fit", "alpaca_eval"),
        default="fit",
        help="who computes AE LC: the fit here, or the official package alpaca-eval",
    )
    parser.add_argument("--rounds", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    flags = vars(parser.parse_args(argv))
    sources, folder = flags.pop("sources"), flags.pop("output_dir")
    settings = Settings(**flags)

    from rto.evaluation.comparison_page import show, write

    entries, notes = read_sources(sources)
    comparison = compare(entries, settings, notes)
    console = Console()
    show(comparison, console)
    paths = write(comparison, folder)
    console.print(Text(f"\nwith all pairs and the judges' position and length bias: {', '.join(map(str, paths))}"))
    return 0
