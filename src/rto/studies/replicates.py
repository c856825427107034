"""What a handful of seeds says: Student intervals, tests paired by seed, and curves read at equal KL or equal gold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from rto.evaluation.statistics.estimates import LEVEL


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over n seeds, ± half of its 95 % interval; NaN where one seed cannot tell."""

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """The difference is there at the 5 % level."""
        return abs(self.mean) > self.half


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A difference by seed with its two-sided p-value (Student, n − 1 degrees of freedom)."""

    difference: Interval
    p: float


def interval(x: Sequence[float] | np.ndarray) -> Interval:
    """x̄ ± t_{n−1, 0.975} · s / √n."""
    x = np.asarray(x, dtype=float)
    n = len(x)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Interval(mean=float(x.mean()), half=half, n=n)


def paired(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> Paired:
    """d_i = ours_i − theirs_i,  t = d̄ √n / s_d,  p = 2 P(T_{n−1} > |t|).

    Seed i gave both the same start, pairs and prompts.

    Raises:
        ValueError: the two are not numbers of the same seeds.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a paired test needs one number a seed for both: got {a.shape} and {b.shape}")
    d = a - b
    if len(d) < 2:
        return Paired(difference=interval(d), p=float("nan"))
    se = d.std(ddof=1) / np.sqrt(len(d))
    t = abs(d.mean()) / se if se > 0 else (np.inf if d.mean() else 0.0)
    return Paired(difference=interval(d), p=float(2 * stats.t.sf(t, len(d) - 1)))


def smooth(y: Sequence[float] | np.ndarray, width: int = 3) -> Float[np.ndarray, " n"]:
    """Centred running mean; at both ends over what is there."""
    y, half = np.asarray(y, dtype=float), width // 2
    return np.array([y[max(i - half, 0) : i + half + 1].mean() for i in range(len(y))])


def at_level(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, level: float) -> float:
    """Y where x first reaches a level, by a straight line from the point before; NaN where it never does."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if not (x >= level).any():
        return float("nan")
    i = int(np.argmax(x >= level))
    if i == 0:
        return float(y[0])
    share = (level - x[i - 1]) / (x[i] - x[i - 1])
    return float(y[i - 1] + share * (y[i] - y[i - 1]))


@dataclass(frozen=True, kw_only=True)
class OverOptimisation:
    """What happened after the gold was highest: how far it fell, and how far the learned score still rose."""

    fall: float
    rise: float


def over_optimisation(learned: Sequence[float] | np.ndarray, gold: Sequence[float] | np.ndarray) -> OverOptimisation:
    """Fall = max_t gold_t − gold_T,  rise = learned_T − learned_{argmax gold}; both positive: over-optimised."""
    learned, gold = np.asarray(learned, dtype=float), np.asarray(gold, dtype=float)
    peak = int(np.argmax(gold))
    return OverOptimisation(fall=float(gold[peak] - gold[-1]), rise=float(learned[-1] - learned[peak]))
