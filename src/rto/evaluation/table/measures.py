"""What each column of a comparison measures of each row, and how to measure it again on other prompts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from rto.data.errors import DataError
from rto.evaluation.benchmarks.judgments import AlpacaAnnotations, read_difficulties, read_gamed
from rto.evaluation.benchmarks.types import Key
from rto.evaluation.statistics import arena_hard, length_control, winrate
from rto.evaluation.statistics.estimates import Z, bootstrap_weights, percentile_interval
from rto.evaluation.table.sources import Entry, RunMethod
from rto.ranges import is_finite
from rto.report.table import REWARD_MODEL, measure


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
        for path in (self.difficulty, self.gamed):
            if path is not None and not path.is_file():
                raise ValueError(f"{path}: no such file")

    def draw(self, has: Bool[np.ndarray, " U"]) -> Float[np.ndarray, "R U"]:
        """Draw the prompts that ``has`` names, with replacement; equal ``has``, equal draws."""
        weights = np.zeros((self.rounds, len(has)))
        weights[:, has] = bootstrap_weights(int(has.sum()), self.rounds, self.seed)
        return weights


@dataclass(kw_only=True)
class Told:
    """What a reader should know beside the numbers: notes, and details by row."""

    notes: list[str]
    details: dict[str, dict[str, Any]]


Estimator = Callable[[Float[np.ndarray, "R U"]], Float[np.ndarray, " R"]]
"""Of R weightings of a column's prompts, R numbers."""


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
        estimate: it, of any prompts.
    """

    entry: str
    group: tuple[str, ...]
    value: float
    centre: float
    has: Bool[np.ndarray, " U"]
    draws: Float[np.ndarray, " R"]
    estimate: Estimator

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, percentiles of the draws moved to the shown value."""
        low, high = percentile_interval(self.draws)
        return low + self.value - self.centre, high + self.value - self.centre


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of a column before it is measured: whose it is, and where its prompts stand among the column's."""

    entry: str
    group: tuple[str, ...]
    at: Int[np.ndarray, " n"]
    prompts: int

    def has(self, at: np.ndarray) -> Bool[np.ndarray, " U"]:
        has = np.zeros(self.prompts, dtype=bool)
        has[at] = True
        return has

    def measure(self, at: np.ndarray, estimate: Estimator, settings: Settings, value: float | None = None) -> Measure:
        """An estimate over the prompts ``at``; ``value`` is shown instead of it where given."""
        has = self.has(at)
        centre = float(estimate(has[None].astype(float))[0])
        return Measure(
            entry=self.entry,
            group=self.group,
            value=centre if value is None else value,
            centre=centre,
            has=has,
            draws=estimate(settings.draw(has)),
            estimate=estimate,
        )

    def mean(self, x: np.ndarray, settings: Settings) -> Measure:
        """The mean of one number a prompt, nan where there is none."""
        known = ~np.isnan(x)
        at, y = self.at[known], x[known]
        return self.measure(at, lambda weights: weights[:, at] @ y / weights[:, at].sum(1), settings)


def _rows(found: Sequence[tuple[str, tuple[str, ...], Sequence[Any]]]) -> list[_Row]:
    """Of (row, group, prompts): the column's prompts are all of theirs, each once."""
    number = {p: i for i, p in enumerate(dict.fromkeys(itertools.chain.from_iterable(p for *_, p in found)))}
    return [
        _Row(entry=entry, group=group, at=np.array([number[p] for p in prompts], dtype=int), prompts=len(number))
        for entry, group, prompts in found
    ]


# --- AlpacaEval 2


def _alpacas(entries: Sequence[Entry]) -> list[tuple[_Row, AlpacaAnnotations]]:
    found = [(e.model, e.alpaca) for e in entries if e.alpaca is not None]
    return list(zip(_rows([(name, (a.judge, a.baseline), a.prompts) for name, a in found]), [a for _, a in found]))


def alpaca_wr(entries: Sequence[Entry], settings: Settings) -> list[Measure]:
    """Win rates."""
    return [row.mean(100 * a.shares, settings) for row, a in _alpacas(entries)]


def alpaca_lc(entries: Sequence[Entry], settings: Settings, told: Told) -> list[Measure]:
    """Length-controlled win rates.

    Raises:
        DataError: an extra file cannot be used.
        ValueError: there is no scikit-learn, or the official package cannot do it.
    """
    found = _alpacas(entries)
    difficulties = read_difficulties(settings.difficulty) if found and settings.difficulty else None
    gamed = read_gamed(settings.gamed) if found and settings.gamed else None
    measures = []
    for row, a in found:
        data, at = _length_data(a, difficulties), row.at
        try:
            fit = length_control.fit_length_controlled(data, gamed)
        except ValueError as error:
            told.notes.append(f"AE LC of {row.entry} is left out: {error}.")
            continue
        told.details[row.entry]["length_controlled"] = asdict(fit)
        value = fit.win_rate
        if settings.length_control == "alpaca_eval":
            official = length_control.official_length_controlled(a.rows)
            told.details[row.entry]["length_controlled_official"] = official
            value = official["length_controlled_winrate"]

        def estimate(
            weights: np.ndarray, data: length_control.LengthControlData = data, at: np.ndarray = at
        ) -> np.ndarray:
            return length_control.refit_win_rates(data, weights[:, at], gamed)

        measures.append(row.measure(at[~np.isnan(a.shares)], estimate, settings, value))
        _tell_variant(fit.glm, settings, told)
    return measures


def _length_data(a: AlpacaAnnotations, difficulties: dict[int, float] | None) -> length_control.LengthControlData:
    return length_control.LengthControlData(
        shares=a.shares,
        baseline_length=a.baseline_length,
        model_length=a.model_length,
        difficulty=None if difficulties is None else _difficulty(a, difficulties),
    )


def _difficulty(a: AlpacaAnnotations, difficulties: dict[int, float]) -> np.ndarray:
    """Of each row's instruction, by its place in the benchmark; a file of all of it stands in its order."""
    if a.index is None and len(a.shares) != len(difficulties):
        raise DataError(
            f"{a.path}: {len(a.shares)} rows of {a.model!r} for {len(difficulties)} difficulties; add the key "
            "'index', the row's place in the benchmark"
        )
    index = range(len(a.shares)) if a.index is None else a.index.tolist()
    unknown = [i for i in index if i not in difficulties]
    if unknown:
        raise DataError(f"{a.path}: index {unknown[0]} of {a.model!r} has no instruction difficulty")
    return np.array([difficulties[i] for i in index])


def _tell_variant(glm: str, settings: Settings, told: Told) -> None:
    if settings.length_control == "alpaca_eval":
        told.notes.append(f"AE LC is the alpaca-eval package's own number; its interval is of refits of {glm}.")
    elif glm != "length_controlled_v1":
        told.notes.append(
            f"AE LC is the official variant {glm}, not the leaderboard's length_controlled_v1, which needs two files "
            "of the hub data set tatsu-lab/alpaca_eval: --difficulty instruction_difficulty.csv --gamed df_gamed.csv"
        )


# --- Arena-Hard


def arena_wr(entries: Sequence[Entry], settings: Settings, told: Told) -> list[Measure]:
    """Bradley–Terry scores; into the details the interval over battles."""
    found = [(e.model, e.arena) for e in entries if e.arena is not None]
    pools = [arena_hard.pool(a.games) for _, a in found]
    rows = _rows([(name, (a.judge, a.baseline), games.questions) for (name, a), games in zip(found, pools)])
    measures = []
    for row, games in zip(rows, pools):

        def estimate(weights: np.ndarray, games: arena_hard.Games = games, at: np.ndarray = row.at) -> np.ndarray:
            return arena_hard.arena_scores(games, games.resample_questions(weights[:, at]))[:, 0]

        measures.append(row.measure(row.at, estimate, settings))
        by_battle = arena_hard.arena_scores(games, games.resample_battles(settings.rounds, settings.seed))
        told.details[row.entry]["arena_hard"]["wr_by_battle"] = list(percentile_interval(by_battle[:, 0]))
    return measures


_Styled = tuple[arena_hard.Outcome, np.ndarray]
"""A game, named by its row, and the style difference of its answers."""


def arena_sc(entries: Sequence[Entry], settings: Settings, told: Told) -> list[Measure]:
    """Style-controlled scores, fitted over all rows of one judge and baseline together."""
    groups: dict[tuple[str, str], list[_Styled]] = {}
    for e in entries:
        if e.arena is not None:
            groups.setdefault((e.arena.judge, e.arena.baseline), []).extend(_styled(e, told))
    return [m for group, games in groups.items() if games for m in _style_pool(group, games, settings, told)]


def _styled(entry: Entry, told: Told) -> list[_Styled]:
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
        named = arena_hard.Outcome(model=entry.model, question=g.question, share=g.share, battles=g.battles)
        out.append((named, arena_hard.style_difference(a.baseline_style[g.question], a.model_style[g.question])))
    return out


def _style_pool(group: tuple[str, str], styled: list[_Styled], settings: Settings, told: Told) -> list[Measure]:
    games = arena_hard.pool([g for g, _ in styled], {(g.model, g.question): style for g, style in styled})
    everywhere = np.ones(len(games.questions), dtype=bool)
    whole = arena_hard.style_controlled(games, games.once)
    drawn = arena_hard.style_controlled(games, games.resample_questions(settings.draw(everywhere)))
    by_battle = arena_hard.style_controlled(games, games.resample_battles(settings.rounds, settings.seed))
    told.notes.append(
        f"AH SC of judge {group[0]} is at the average style of the {len(games.models)} row(s) fitted together: it "
        "changes with them, and alone a row has nothing to be corrected for."
    )
    measures = []
    for i, name in enumerate(games.models):

        def estimate(weights: np.ndarray, i: int = i) -> np.ndarray:
            return arena_hard.style_controlled(games, games.resample_questions(weights)).scores[:, i]

        has = np.zeros(len(games.questions), dtype=bool)
        has[games.question[games.model == i]] = True
        value = float(whole.scores[0, i])
        measures.append(
            Measure(
                entry=name,
                group=group,
                value=value,
                centre=value,
                has=has,
                draws=drawn.scores[:, i],  # one fit serves all rows
                estimate=estimate,
            )
        )
        told.details[name]["arena_hard"] |= {
            "sc_by_battle": list(percentile_interval(by_battle.scores[:, i])),
            "style_coefficients": dict(zip(arena_hard.STYLE, whole.style[0].tolist())),
        }
    return measures


# --- runs of ours


def _runs(entries: Sequence[Entry]) -> list[tuple[str, RunMethod]]:
    return [(e.model, e.run) for e in entries if e.run is not None]


def gold(entries: Sequence[Entry], settings: Settings) -> list[Measure]:
    """Mean gold rewards."""
    runs = [(name, r) for name, r in _runs(entries) if r.gold]
    rows = _rows([(name, _gold_group(r), list(r.gold)) for name, r in runs])
    return [row.mean(np.array(list(r.gold.values())), settings) for row, (_, r) in zip(rows, runs)]


def _gold_group(r: RunMethod) -> tuple[str, ...]:
    """A learned reward model is the run's own: its scale means nothing elsewhere."""
    return ("reward model of", str(r.run)) if r.gold_name == REWARD_MODEL else (r.gold_name,)


def gold_title(entries: Sequence[Entry]) -> str:
    """What the means of runs are: gold, or the score of a run's own reward model."""
    return " or ".join(sorted({measure(r.gold_name) for _, r in _runs(entries)}))


def gold_wins(entries: Sequence[Entry], settings: Settings) -> list[Measure]:
    """Win rates against the run's baseline under its gold; a draw counts half."""
    runs = _runs(entries)
    baselines = {r.run: r.gold for _, r in runs if r.method == r.baseline}
    found: list[tuple[str, RunMethod, list[Key]]] = []
    for name, r in runs:
        shared = [p for p in r.gold if p in baselines.get(r.run, {})]
        if r.method != r.baseline and shared:
            found.append((name, r, shared))
    rows = _rows([(name, (f"{r.baseline} of", str(r.run)), shared) for name, r, shared in found])
    gaps = [np.array([r.gold[p] - baselines[r.run][p] for p in shared]) for _, r, shared in found]
    return [row.mean(50 * (np.sign(gap) + 1), settings) for row, gap in zip(rows, gaps)]


def baseline_title(entries: Sequence[Entry]) -> str:
    """What the win rates of runs are against."""
    names = {r.baseline for _, r in _runs(entries) if r.baseline}
    return f"win rate vs {names.pop()}" if len(names) == 1 else "win rate vs baseline"


# --- numbers that are shown, not tested


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of the table with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    leads: bool = False
    """No comparable row is significantly better, and there is one to compare with."""


def summary(entries: Sequence[Entry], key: str) -> dict[str, Cell]:
    """Means that results.json has, with 95 % intervals by their standard errors."""
    cells = {}
    for name, r in _runs(entries):
        value, se = _finite(r.summary.get(key)), _finite(r.summary.get(f"{key}_se"))
        if value is not None:
            low, high = (None, None) if se is None else (value - Z * se, value + Z * se)
            cells[name] = Cell(value=value, low=low, high=high)
    return cells


def _finite(x: Any) -> float | None:
    return x if isinstance(x, int | float) and is_finite(x) else None


def tokens(entries: Sequence[Entry]) -> dict[str, Cell]:
    """Mean lengths of completions, or of Arena-Hard answers."""
    cells = summary(entries, "mean_length")
    for e in entries:
        if e.arena is not None and e.arena.model_style:
            cells[e.model] = Cell(value=float(np.mean([style[0] for style in e.arena.model_style.values()])))
    return cells


def characters(entries: Sequence[Entry]) -> dict[str, Cell]:
    """Mean lengths of AlpacaEval outputs."""
    return {e.model: Cell(value=float(e.alpaca.model_length.mean())) for e in entries if e.alpaca is not None}


def details(entry: Entry) -> dict[str, Any]:
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
        shares, questions = np.array([g.share for g in b.games]), [g.question for g in b.games]
        found["arena_hard"] = {"judge": b.judge, "baseline": b.baseline, "games": len(b.games), "missing": b.missing}
        found["arena_hard"]["position"] = asdict(winrate.position_bias(shares, np.array(b.rounds) == 1, questions))
        ours, theirs = b.model_style or {}, b.baseline_style or {}
        extra = np.array([ours[q][0] - theirs[q][0] if q in ours and q in theirs else 0.0 for q in questions])
        if extra.any():
            found["arena_hard"]["length"] = asdict(winrate.length_bias(shares, extra))
    return found
