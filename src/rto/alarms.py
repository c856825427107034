"""When a run is going wrong: bounds on what training logs, in one place for trainers, `rto watch` and the report.

Of rollouts:

    kl          mean over the last rollouts of KL(π ‖ π_ref) / tokens of a completion
    token       mean share of Σ|token reward| in Σ|reward|
    explained   mean explained variance of the returns, 1 − Var[G − V] / Var[G]
    eos         the best mean share of completions with EOS so far less the present one
    clip/…      mean share of tokens whose ratio, or whose token reward, was clipped

Of pairs, in preference learning and reward modelling:

    chosen      −mean log π/π_ref of the preferred completions, nats a token: likelihood displacement
    accuracy    mean share of pairs whose preferred side has the higher reward

Of every stage:

    gap, rise   accuracy on training less held-out rows; the held-out loss above its best, as a share of it
    gradient    mean norm of the last updates over the median of those before

A bound is a judgment, not a law. The default of KL is from this project's own studies (docs/results): every run that
passed it ended with less gold than PPO of the same seed, but for those that were paid by the gold itself. That of the
gradient and that of the preferred completions' likelihood are above what any sound run of these studies showed (3.9
times, 0.39 nats a token). The others are rules of thumb.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What may not be exceeded; None turns an alarm off.

    Attributes:
        kl: nats a token.
        token_share: share of the reward that token rewards may be, where there is a score beside them.
        explained_variance: below this the critic is worse than the mean return; the first ``warm_up`` rollouts, in
            which it learns, do not count.
        eos_fall: how far the share of completions that end may fall below its best, of 1.
        clip_ratio: share of tokens whose policy ratio is clipped.
        clip_token_reward: share of tokens whose token reward is clipped.
        chosen_fall: nats a token by which the preferred completions may become less likely than under the reference.
        pair_accuracy: below this share of training pairs in the right order, something is upside down.
        held_out_gap: how far accuracy on held-out pairs may be below that of training, of 1.
        held_out_rise: how far the held-out loss may be above its best, as a share of it.
        grad_norm: times the median of the norms before.
        window: rollouts, or rows of the log, that each mean is over.
        warm_up: rollouts, updates or rows that do not count yet, for the rules that need some.
    """

    kl: float | None = 0.5
    token_share: float | None = 0.9
    explained_variance: float | None = 0.0
    eos_fall: float | None = 0.2
    clip_ratio: float | None = 0.3
    clip_token_reward: float | None = 0.5
    chosen_fall: float | None = 0.5
    pair_accuracy: float | None = 0.4
    held_out_gap: float | None = 0.3
    held_out_rise: float | None = 0.1
    grad_norm: float | None = 10.0
    window: int = 5
    warm_up: int = 10

    def __post_init__(self) -> None:
        if self.window < 1 or self.warm_up < 0:
            raise ValueError(f"window is at least 1 and warm_up at least 0, got {self.window} and {self.warm_up}")


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One bound that is exceeded at present.

    Attributes:
        name: of the bound.
        title: what is wrong, in a few words.
        value, bound: in the unit of the bound.
        remedy: what to try.
    """

    name: str
    title: str
    value: float
    bound: float
    remedy: str

    @property
    def reading(self) -> str:
        """Title, value and bound in a line."""
        return f"{self.title}: {self.value:.3g}, bound {self.bound:.3g}"


@dataclass(frozen=True, kw_only=True)
class _Rule:
    name: str
    measure: Callable[[Sequence[Row], Bounds], float | None]
    title: str
    remedy: str
    of: str = "episodes"
    """The key of the rows that it reads; "" reads all of them."""
    below: bool = False
    """The bound is one from below."""


def check(log: Sequence[Row], bounds: Bounds | None = None) -> list[Alarm]:
    """The alarms of a log as it stands, in the order of `Bounds`.

    Args:
        log: rows of training, oldest first; a rule passes over those that it has nothing to read in.
        bounds: None means the defaults.
    """
    bounds = bounds or Bounds()
    rows = {key: [row for row in log if not key or key in row] for key in {rule.of for rule in RULES}}
    found = []
    for rule in RULES:
        bound = getattr(bounds, rule.name)
        value = None if bound is None or not rows[rule.of] else rule.measure(rows[rule.of], bounds)
        if value is not None and (value < bound if rule.below else value > bound):
            found.append(Alarm(name=rule.name, title=rule.title, value=value, bound=bound, remedy=rule.remedy))
    return found


def _numbers(rows: Sequence[Row], key: str) -> list[float]:
    return [float(x) for row in rows if isinstance(x := row.get(key), int | float) and isfinite(x)]


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = _numbers(rows, key)
    return sum(values) / len(values) if values else None


def _recent(key: str) -> Callable[[Sequence[Row], Bounds], float | None]:
    return lambda rows, bounds: _mean(rows[-bounds.window :], key)


def _kl(rows: Sequence[Row], bounds: Bounds) -> float | None:
    kl, tokens = (_mean(rows[-bounds.window :], key) for key in ("kl", "completions/mean_length"))
    return None if kl is None or not tokens else kl / tokens


def _token_share(rows: Sequence[Row], bounds: Bounds) -> float | None:
    """None where no score is paid: there the token reward is meant to be all."""
    recent = rows[-bounds.window :]
    return _mean(recent, "share/token") if _mean(recent, "share/score") else None


def _explained(rows: Sequence[Row], bounds: Bounds) -> float | None:
    learned = rows[bounds.warm_up :]
    return _mean(learned[-bounds.window :], "explained_variance") if len(learned) >= bounds.window else None


def _eos_fall(rows: Sequence[Row], bounds: Bounds) -> float | None:
    rates, n = _numbers(rows, "completions/eos_rate"), bounds.window
    means = [sum(rates[i : i + n]) / n for i in range(len(rates) - n + 1)]
    return max(means) - means[-1] if means else None


def _chosen_fall(rows: Sequence[Row], bounds: Bounds) -> float | None:
    risen = _mean(rows[-bounds.window :], "logratio/chosen")
    return None if risen is None else -risen


def _pair_accuracy(rows: Sequence[Row], bounds: Bounds) -> float | None:
    """The first row does not count: it has the first update, in which π = π_ref and nothing is higher."""
    steps = _numbers(rows, "step")
    learned = bool(steps) and steps[-1] - steps[0] >= bounds.warm_up
    return _mean(rows[1:][-bounds.window :], "accuracy") if learned else None


def _held_out_gap(rows: Sequence[Row], bounds: Bounds) -> float | None:
    held_out = _numbers(rows, "eval_accuracy")
    known = _mean([row for row in rows if "accuracy" in row][-bounds.window :], "accuracy")
    return known - held_out[-1] if held_out and known is not None else None


def _held_out_rise(rows: Sequence[Row], bounds: Bounds) -> float | None:
    losses = _numbers(rows, "eval_loss")
    return losses[-1] / min(losses) - 1 if losses and min(losses) > 0 else None


def _grad_norm(rows: Sequence[Row], bounds: Bounds) -> float | None:
    norms, n = _numbers(rows, "grad_norm"), bounds.window
    before = norms[-EARLIER:-n]
    usual = median(before) if len(before) >= bounds.warm_up else 0.0
    return sum(norms[-n:]) / n / usual if usual > 0 else None


EARLIER = 200
"""Norms that the last ones are compared with, at most."""

RULES = (
    _Rule(
        name="kl",
        measure=_kl,
        title="KL from the reference, nats a token",
        remedy="raise kl_coef or set kl_target, lower learning_rate; text this far from the reference is often gamed",
    ),
    _Rule(
        name="token_share",
        measure=_token_share,
        title="share of the reward that is token reward",
        remedy="lower dpo_coef or raise score_coef; token_reward_clip bounds what a single token can earn",
    ),
    _Rule(
        name="explained_variance",
        measure=_explained,
        title="explained variance of the returns",
        remedy="the critic is worse than a constant: raise value_learning_rate, start it from a reward model "
        "(value_model), take more rollouts an iteration, or advantage_estimator=reinforce++, which needs none",
        below=True,
    ),
    _Rule(
        name="eos_fall",
        measure=_eos_fall,
        title="fall of the share of completions that end",
        remedy="set missing_eos_penalty, raise max_completion_length, or lower dpo_coef if token rewards pay for "
        "length",
    ),
    _Rule(
        name="clip_ratio",
        measure=_recent("clip/ratio"),
        title="share of tokens with a clipped policy ratio",
        remedy="updates are too large for their rollouts: lower learning_rate or num_ppo_epochs, or take fewer "
        "num_mini_batches",
    ),
    _Rule(
        name="clip_token_reward",
        measure=_recent("clip/token_reward"),
        title="share of tokens with a clipped token reward",
        remedy="the clip, not the DPO model, says what most tokens are worth: raise token_reward_clip, or train "
        "the DPO model less far from its reference",
    ),
    _Rule(
        name="chosen_fall",
        measure=_chosen_fall,
        title="fall of the preferred completions' log-probability, nats a token",
        remedy="both sides become unlikely and what is left is neither: lower learning_rate, raise beta, train fewer "
        "epochs, or fine-tune on the preferred completions first",
        of="logratio/chosen",
    ),
    _Rule(
        name="pair_accuracy",
        measure=_pair_accuracy,
        title="share of training pairs in the right order",
        remedy="look whether chosen and rejected are swapped; else lower learning_rate",
        of="accuracy",
        below=True,
    ),
    _Rule(
        name="held_out_gap",
        measure=_held_out_gap,
        title="accuracy on training pairs less that on held-out pairs",
        remedy="the pairs are learned by heart: fewer epochs, a lower learning_rate, or more pairs",
        of="",
    ),
    _Rule(
        name="held_out_rise",
        measure=_held_out_rise,
        title="rise of the held-out loss over its best, as a share of it",
        remedy="the best was earlier: load_best_model_at_end, fewer epochs, or a lower learning_rate",
        of="eval_loss",
    ),
    _Rule(
        name="grad_norm",
        measure=_grad_norm,
        title="gradient norm, times the median before",
        remedy="lower learning_rate or max_grad_norm, raise warmup_steps, and look at the rows of these updates",
        of="grad_norm",
    ),
)
