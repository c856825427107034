"""Is this token reward any good? Numbers about token rewards on held-out pairs, and where a ground truth exists.

Pure statistics on arrays; `rto.inspect` gathers what they read.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from rto.evaluation.statistics.estimates import Estimate, wilson
from rto.inspection.stacking import Stacked, stack


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """One completion with its token rewards."""

    pieces: tuple[str, ...]
    """Text that each token adds; together they are the completion. A special token adds none."""
    labels: tuple[str, ...]
    """How the tokenizer writes each token."""
    rewards: np.ndarray
    """Raw token rewards, before the clip and β₁; nats for a log-ratio."""
    score: float | None = None
    """A sentence reward model's score of the completion."""
    ended: bool = True
    """Its last token is EOS or the end of turn."""

    @property
    def total(self) -> float:
        """Σ_t r_t."""
        return float(self.rewards.sum())

    def clipped(self, bound: float | None) -> float:
        """Σ_t clip(r_t, −c, c), what the on-line stage sees divided by β₁."""
        return self.total if bound is None else float(self.rewards.clip(-bound, bound).sum())


@dataclass(frozen=True, kw_only=True)
class RewardedPair:
    """A held-out pair with its token rewards."""

    prompt: str
    chosen: Rewarded
    rejected: Rewarded


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rate with its 95 % interval."""

    rate: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: float, n: int) -> "Share":
        """``hits`` of ``n`` with Wilson's interval; a draw is half a hit."""
        if n == 0:
            return cls(rate=math.nan, low=math.nan, high=math.nan, n=0)
        low, high = wilson(hits / n, n)
        return cls(rate=hits / n, low=low, high=high, n=n)


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs whose predicted probability falls into one interval."""

    predicted: float
    """Mean σ(β · margin)."""
    observed: Share


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """σ(β · margin) as the probability that people prefer one side: does it mean what it says?"""

    beta: float
    bins: tuple[Bin, ...]
    error: float
    """Expected calibration error: Σ (n_b/n) |observed − predicted|."""
    log_loss: float
    """Mean −log σ(β · margin), nats; ln 2 says nothing."""
    fitted_beta: float
    """The β that labels are most likely under; below β: the reward is overconfident. 0: no better than chance."""
    fitted_log_loss: float


@dataclass(frozen=True, kw_only=True)
class LengthControl:
    """What is left of the accuracy when length cannot help."""

    longer_wins: Share
    """How often the longer side was chosen, among pairs that differ in length: what length alone can predict."""
    where_longer: Share
    """Accuracy on pairs whose chosen side is the longer one."""
    where_shorter: Share
    """Accuracy on pairs whose chosen side is the shorter one."""
    controlled: Estimate
    """The mean of these two: the accuracy if the longer side were chosen half of the time."""
    reward_length: float
    """Spearman correlation of the summed token reward with length, over completions."""
    margin_length: float
    """Spearman correlation of margin and difference in length, over pairs."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """How much of Σ|r_t| one kind of token carries, beside its share of the tokens."""

    reward: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """What the bound on raw token rewards does."""

    bound: float
    fraction: float
    """Share of tokens whose reward is beyond the bound."""
    removed: float
    """Share of Σ|r_t| that lies beyond it."""
    accuracy: Share
    """Pair accuracy of what is left."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The token reward beside a sentence reward model on the same pairs."""

    score_accuracy: Share
    agree: Share
    """How often both prefer the same side."""
    correlation: float
    """Spearman correlation of the two margins."""


@dataclass(frozen=True, kw_only=True)
class SuggestedBeta:
    """β₁ such that the token reward's spread is a stated fraction of the score's."""

    beta: float
    fraction: float
    reward_spread: float
    """Deviation of Σ_t clip(r_t) between two completions of a prompt."""
    score_spread: float
    """Deviation of the score, in the same way."""


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """Everything that held-out pairs tell."""

    accuracy: Share
    length: LengthControl
    calibration: Calibration
    carried: dict[str, Carried]
    clipping: Clipping | None
    agreement: Agreement | None
    suggested: SuggestedBeta | None
    stacked: Stacked | None
    mean_length: float


def report_on_pairs(
    pairs: Sequence[RewardedPair], *, beta: float, clip: float | None, fraction: float = 0.5, bins: int = 10
) -> PairReport:
    """All statistics of a set of held-out pairs.

    Args:
        pairs: what to look at.
        beta: β of the implicit reward, as in training; the calibration is of σ(β · margin).
        clip: bound on raw token rewards in the on-line stage.
        fraction: how large the token reward's spread is to be beside the score's.
        bins: of the calibration.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there are no pairs to look at")
    margin = np.array([p.chosen.total - p.rejected.total for p in pairs])
    scored = all(side.score is not None for p in pairs for side in (p.chosen, p.rejected))
    sides = [side for p in pairs for side in (p.chosen, p.rejected)]
    return PairReport(
        accuracy=accuracy(margin),
        length=length_control(pairs, margin),
        calibration=calibrate(margin, beta, bins=bins),
        carried=carried_by_kind(sides),
        clipping=None if clip is None else clipping(pairs, clip),
        agreement=agreement(pairs, margin) if scored else None,
        suggested=suggest_beta(pairs, clip, fraction) if scored else None,
        stacked=stack(_clipped_gap(pairs, clip), _score_gap(pairs)) if scored else None,
        mean_length=float(np.mean([len(side.rewards) for side in sides])),
    )


def accuracy(margin: np.ndarray) -> Share:
    """How often the chosen side has the higher number; a draw is half a hit."""
    return Share.of(float((margin > 0).sum() + 0.5 * (margin == 0).sum()), len(margin))


def length_control(pairs: Sequence[RewardedPair], margin: np.ndarray) -> LengthControl:
    """See `LengthControl`; pairs of equal length count in neither half."""
    lengths = np.array([[len(p.chosen.rewards), len(p.rejected.rewards)] for p in pairs])
    gap = lengths[:, 0] - lengths[:, 1]
    longer, shorter = accuracy(margin[gap > 0]), accuracy(margin[gap < 0])
    error = [(s.rate * (1 - s.rate) / s.n) if s.n else math.nan for s in (longer, shorter)]
    totals = np.array([[p.chosen.total, p.rejected.total] for p in pairs])
    return LengthControl(
        longer_wins=Share.of(int((gap > 0).sum()), int((gap != 0).sum())),
        where_longer=longer,
        where_shorter=shorter,
        controlled=Estimate(mean=(longer.rate + shorter.rate) / 2, se=math.sqrt(sum(error)) / 2),
        reward_length=spearman(totals.ravel(), lengths.ravel()),
        margin_length=spearman(margin, gap),
    )


def calibrate(margin: np.ndarray, beta: float, *, bins: int = 10) -> Calibration:
    """Reliability of σ(β · margin).

    A pair is two cases, (m, chosen) and (−m, not chosen): which side is named first is no information. Bins hold
    equally many pairs, by |m|, since most margins may crowd into one decile of probability; each is shown on the
    side of the prediction, p ≥ ½.
    """
    size = np.abs(margin)
    right = np.where(margin == 0, 0.5, margin > 0)
    cuts = [rows for rows in np.array_split(np.argsort(size, kind="stable"), bins) if len(rows)]
    found = tuple(
        Bin(
            predicted=float(special.expit(beta * size[rows]).mean()),
            observed=Share.of(float(right[rows].sum()), len(rows)),
        )
        for rows in cuts
    )
    fitted = fit_scale(margin)
    return Calibration(
        beta=beta,
        bins=found,
        error=float(sum(b.observed.n * abs(b.observed.rate - b.predicted) for b in found) / len(margin)),
        log_loss=log_loss(margin, beta),
        fitted_beta=fitted,
        fitted_log_loss=log_loss(margin, fitted),
    )


def log_loss(margin: np.ndarray, beta: float) -> float:
    """Mean −log σ(β · margin), nats."""
    size = np.multiply(beta, margin, out=np.zeros(len(margin)), where=margin != 0)  # ∞ · 0 says nothing of the draw
    return float(np.logaddexp(0, -size).mean())


def fit_scale(margin: np.ndarray) -> float:
    """argmax_β Σ log σ(β · margin) over β ≥ 0: 0 where the sign carries nothing, ∞ where it is always right."""
    if (margin >= 0).all() and (margin > 0).any():
        return math.inf
    if margin.sum() <= 0:  # the slope at β = 0 is Σ margin / 2, and the objective is concave
        return 0.0

    def slope(beta: float) -> float:
        return float((margin * special.expit(-beta * margin)).mean())

    high = 1.0 / float(np.abs(margin).mean())
    while slope(high) > 0:
        high *= 2
    return float(optimize.brentq(slope, 0.0, high))


KINDS = ("last token", "punctuation", "whitespace", "words")


def kind_of(piece: str) -> str:
    """What a token is, by its text; byte pieces of one character count as words."""
    text = piece.strip()
    if not text:
        return "whitespace" if piece else "words"
    marks = all(unicodedata.category(c)[0] in "PS" for c in text)
    return "punctuation" if marks else "words"


def carried_by_kind(completions: Sequence[Rewarded]) -> dict[str, Carried]:
    """Share of Σ|r_t| by kind of token; the last token of a completion that ended is a kind of its own."""
    reward, tokens = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for completion in completions:
        kinds = [kind_of(piece) for piece in completion.pieces]
        if completion.ended:
            kinds[-1] = "last token"
        for kind, r in zip(kinds, completion.rewards, strict=True):
            reward[kind] += abs(float(r))
            tokens[kind] += 1
    total, count = sum(reward.values()) or math.nan, sum(tokens.values())
    return {kind: Carried(reward=reward[kind] / total, tokens=tokens[kind] / count) for kind in KINDS}


def clipping(pairs: Sequence[RewardedPair], bound: float) -> Clipping:
    """See `Clipping`."""
    rewards = np.abs(np.concatenate([side.rewards for p in pairs for side in (p.chosen, p.rejected)]))
    return Clipping(
        bound=bound,
        fraction=float((rewards > bound).mean()),
        removed=float((rewards - bound).clip(min=0).sum() / (rewards.sum() or math.nan)),
        accuracy=accuracy(_clipped_gap(pairs, bound)),
    )


def agreement(pairs: Sequence[RewardedPair], margin: np.ndarray) -> Agreement:
    """See `Agreement`."""
    score = _score_gap(pairs)
    return Agreement(
        score_accuracy=accuracy(score),
        agree=accuracy(np.sign(margin) * np.sign(score)),
        correlation=spearman(margin, score),
    )


def suggest_beta(pairs: Sequence[RewardedPair], clip: float | None, fraction: float) -> SuggestedBeta:
    """β₁ = fraction · s(score) / s(Σ_t clip(r_t)), s the deviation between two completions of one prompt.

    Only differences between completions of a prompt move a policy, so both spreads are √(mean Δ² / 2) over pairs.
    The paper asks that the token reward must not dominate the score; its β₁ = 0.05 was chosen by hand.
    """
    reward = _spread(_clipped_gap(pairs, clip))
    score = _spread(_score_gap(pairs))
    return SuggestedBeta(
        beta=fraction * score / reward if reward > 0 else math.nan,
        fraction=fraction,
        reward_spread=reward,
        score_spread=score,
    )


def _clipped_gap(pairs: Sequence[RewardedPair], clip: float | None) -> np.ndarray:
    return np.array([p.chosen.clipped(clip) - p.rejected.clipped(clip) for p in pairs])


def _score_gap(pairs: Sequence[RewardedPair]) -> np.ndarray:
    return np.array([float(p.chosen.score or 0.0) - float(p.rejected.score or 0.0) for p in pairs])


def _spread(gap: np.ndarray) -> float:
    return float(np.sqrt(np.mean(gap**2) / 2))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; NaN where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)


# --- where the truth is known

Span = tuple[int, int, float]
"""(start, end, value): characters [start, end) of a completion are worth ``value``."""


def words(pieces: Sequence[str]) -> list[list[int]]:
    """Tokens by the word they belong to; white space goes with the word after it.

    A last token without text (EOS) is a word of its own.
    """
    groups: list[list[int]] = []
    closed = True  # a word is complete, or nothing has begun
    for i, piece in enumerate(pieces):
        end = i == len(pieces) - 1 and not piece
        if end or not groups or (closed and piece.strip()) or (piece[:1].isspace() and not _blank(pieces, groups[-1])):
            groups.append([])
        groups[-1].append(i)
        closed = bool(piece) and piece[-1].isspace() and not _blank(pieces, groups[-1])
    return groups


def _blank(pieces: Sequence[str], group: Sequence[int]) -> bool:
    return not "".join(pieces[i] for i in group).strip()


def by_word(rewards: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Sums over the tokens of each word."""
    return np.array([rewards[list(group)].sum() for group in groups])


def credit_of_words(pieces: Sequence[str], groups: Sequence[Sequence[int]], spans: Sequence[Span]) -> np.ndarray:
    """Each span's value in equal parts on the words it touches; an empty span at the end goes to the last word."""
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    bounds = []
    for group in groups:  # the word itself, without the white space before it
        text = "".join(pieces[i] for i in group)
        first = int(starts[group[0]]) + len(text) - len(text.lstrip())
        bounds.append((first, first + len(text.strip())))
    credit = np.zeros(len(groups))
    for start, end, value in spans:
        touched = [i for i, (a, b) in enumerate(bounds) if a < end and start < b] or [len(groups) - 1]
        credit[touched] += value / len(touched)
    return credit


@dataclass(frozen=True, kw_only=True)
class CreditReport:
    """Agreement of token rewards with a known credit, within completions."""

    rank: Estimate
    """Mean over completions of the Spearman correlation over the words of one completion."""
    concordance: Estimate
    """Mean over completions: of two words with different credit, how often the better one has the higher reward."""
    total: float
    """Spearman correlation of the sums over completions."""
    completions: int
    """Completions in which credit and reward vary."""


def report_on_credit(rewards: Sequence[np.ndarray], credit: Sequence[np.ndarray]) -> CreditReport:
    """How well rewards follow a known credit; one array of words (or tokens) for each completion.

    Both are compared within a completion, so neither a scale nor an offset that differs between prompts counts.
    """
    ranks = [rho for r, c in zip(rewards, credit, strict=True) if not math.isnan(rho := spearman(r, c))]
    pairs = [x for r, c in zip(rewards, credit, strict=True) if not math.isnan(x := concordance(r, c))]
    sums = [np.array([x.sum() for x in side]) for side in (rewards, credit)]
    return CreditReport(
        rank=Estimate.of(ranks or [math.nan]),
        concordance=Estimate.of(pairs or [math.nan]),
        total=spearman(*sums),
        completions=len(ranks),
    )


def concordance(reward: np.ndarray, credit: np.ndarray) -> float:
    """P(reward_i > reward_j | credit_i > credit_j), a draw counts half; NaN where all credit is the same."""
    better = credit[:, None] > credit[None, :]
    gap = reward[:, None] - reward[None, :]
    return float(((gap > 0) + 0.5 * (gap == 0))[better].mean()) if better.any() else math.nan
