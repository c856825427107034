"""AlpacaEval 2's length-controlled win rate: what the win rate would be if both answers were equally long.

    logit P(m beats b | x) = θ + φ·tanh((ℓ_b − ℓ_m) / s) + ψ·γ_x

ℓ are the answers' lengths in characters, s the standard deviation of ℓ_b − ℓ_m over the prompts, γ_x the difficulty of
instruction x; θ, φ and ψ belong to the model m. The length-controlled win rate is 100·mean_x sigmoid(θ + ψ·γ_x).

Source: Dubois et al., "Length-Controlled AlpacaEval" (arXiv:2404.04475), and ``alpaca_eval.metrics.glm_winrate`` of
alpaca-eval 0.6.6, whose three variants these are:

- ``length_controlled_v1``, the leaderboard's: with γ, and with the annotations of two "gamed" baselines (the baseline
  asked to be verbose, and to be concise), which hold φ and ψ near values that fit those. Needs two official files.
- ``length_controlled_noreg``: with γ, on the model's own annotations alone.
- ``length_controlled_minimal``: without γ.

numpy and scikit-learn only (scikit-learn, the extra ``evaluate``, because the official fit *is* its cross-validated
liblinear L1 path; scipy has no such fit).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from rto.evaluation.statistics.logistic import fit_logistic, sigmoid

FOLDS = 5
PENALTIES = 10
"""C from 1e-4 to 1e4, evenly in log C."""
GAMED_WEIGHT = 0.2
"""Of both gamed baselines together, beside 1 of the model."""
SEED = 123
"""liblinear's, as in the official fit."""
WEAKEST_L2 = 1e-4
"""Ridge of bootstrap refits: as weak as the weakest penalty of the official grid, enough for a finite optimum."""


@dataclass(frozen=True, kw_only=True)
class LengthControlData:
    """One model's annotations.

    Attributes:
        shares: y in [0, 1], nan where there is no verdict.
        baseline_length, model_length: characters.
        difficulty: γ of each row's instruction, or None when not known.
    """

    shares: Float[np.ndarray, " n"]
    baseline_length: Float[np.ndarray, " n"]
    model_length: Float[np.ndarray, " n"]
    difficulty: Float[np.ndarray, " n"] | None = None

    def length_feature(self) -> Float[np.ndarray, " n"]:
        """tanh((ℓ_b − ℓ_m) / s); 0 where the difference is the same on all prompts and so explains nothing."""
        extra = np.asarray(self.baseline_length, dtype=float) - self.model_length
        s = extra.std(ddof=1) if len(extra) > 1 else 0.0
        return np.tanh(extra / s) if s > 0 else np.zeros(len(extra))


@dataclass(frozen=True, kw_only=True)
class GamedBaselines:
    """The official ``df_gamed.csv``: annotations of the two gamed baselines, θ = 0.

    Attributes:
        shares: y in [0, 1], nan where there is no verdict.
        std_delta_len: (ℓ_b − ℓ_m) / s, before the tanh.
        difficulty: γ.
    """

    shares: Float[np.ndarray, " g"]
    std_delta_len: Float[np.ndarray, " g"]
    difficulty: Float[np.ndarray, " g"]


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """A fit and what it says, in percent.

    Attributes:
        win_rate: length-controlled.
        standard_error: the official one: of the mean of the fitted probabilities over prompts. It does not know that
            φ, ψ and θ were estimated; the bootstrap of ``refit_win_rates`` does.
        glm: the official name of the variant.
        theta, phi, psi: the coefficients; psi is None without γ.
        c: the inverse L1 penalty that cross-validation chose.
    """

    win_rate: float
    standard_error: float
    glm: str
    theta: float
    phi: float
    psi: float | None
    c: float


def fit_length_controlled(data: LengthControlData, gamed: GamedBaselines | None = None) -> LengthControlled:
    """argmax_w Σ c [y log p + (1 − y) log(1 − p)] − ‖w‖₁ / C, with C by 5-fold cross-validation.

    The settings are the official ones: liblinear, no intercept beside θ, ten C from 1e-4 to 1e4, folds that keep both
    halves of a soft label together, weight 1 a row of the model and 0.1 a row of each gamed baseline.

    Raises:
        ValueError: fewer verdicts than folds; gamed baselines without difficulties; or no scikit-learn.
    """
    if gamed is not None and data.difficulty is None:
        raise ValueError("the gamed baselines need the instruction difficulties of the model's rows too")
    x, y, weight = _training_rows(data, gamed)
    if len(x) < FOLDS:
        raise ValueError(f"{len(x)} verdicts are too few for {FOLDS}-fold cross-validation of the length control")
    c, w = _cross_validated_l1(x, y, weight)
    p = sigmoid(_at_equal_length(data) @ w)
    return LengthControlled(
        win_rate=100 * float(p.mean()),
        standard_error=100 * float(p.std(ddof=1) / np.sqrt(len(p))),
        glm=_variant(data, gamed),
        phi=float(w[0]),
        psi=None if data.difficulty is None else float(w[1]),
        theta=float(w[-1]),
        c=c,
    )


def refit_win_rates(
    data: LengthControlData, weights: Float[np.ndarray, "R n"], gamed: GamedBaselines | None = None
) -> Float[np.ndarray, " R"]:
    """The length-controlled win rate of each round of a bootstrap over prompts, in percent.

    The GLM is refitted in every round without cross-validation and, but for a ridge of 1e-4, without penalty: a
    thousand rounds take a second. s stays the sample's. Rounds scatter around the value at weights of one, which
    differs a little from ``fit_length_controlled``.
    """
    x, y, weight = _training_rows(data, gamed)
    judged = ~np.isnan(data.shares)
    gamed_rows = len(x) - judged.sum()
    constant = np.broadcast_to(weight[:gamed_rows], (len(weights), gamed_rows))
    w = fit_logistic(x, y, np.concatenate([constant, weights[:, judged]], axis=1), l2=WEAKEST_L2)
    p = sigmoid(w @ _at_equal_length(data).T)
    return 100 * (weights * p).sum(1) / weights.sum(1)


def published_win_rate(theta: float, psi: float, difficulty: Float[np.ndarray, " n"]) -> float:
    """100·mean sigmoid(θ + ψ·γ): the length-controlled win rate that published coefficients stand for."""
    return 100 * float(sigmoid(theta + psi * np.asarray(difficulty, dtype=float)).mean())


def official_length_controlled(annotations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of the ``alpaca-eval`` package itself, which fetches its two extra files from the hub.

    Raises:
        ValueError: the package is not installed, or what it raises, said in one line.
    """
    try:
        import pandas as pd
        from alpaca_eval.metrics import get_length_controlled_winrate
    except ImportError as error:
        raise ValueError(
            f"the official length control needs the package alpaca-eval ({error}): "
            "pip install 'reinforced-token-optimization[alpaca-eval]'"
        ) from error
    try:
        numbers = get_length_controlled_winrate(
            pd.DataFrame([dict(row) for row in annotations]), save_weights_dir=None, is_warn_extreme_changes=False
        )
    except Exception as error:  # pandas, scikit-learn and the hub raise many kinds
        said = " ".join(str(error).split())
        raise ValueError(f"alpaca-eval could not compute the length-controlled win rate: {said}") from error
    return {name: float(value) for name, value in numbers.items()}


def _variant(data: LengthControlData, gamed: GamedBaselines | None) -> str:
    if data.difficulty is None:
        return "length_controlled_minimal"
    return "length_controlled_noreg" if gamed is None else "length_controlled_v1"


def _training_rows(data: LengthControlData, gamed: GamedBaselines | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design (φ, ψ, θ columns), labels and weights of rows with a verdict; gamed rows first, as officially."""
    columns = [
        data.length_feature(),
        *([] if data.difficulty is None else [data.difficulty]),
        np.ones(len(data.shares)),
    ]
    x, y, weight = np.stack(columns, axis=1).astype(float), data.shares, np.ones(len(data.shares))
    if gamed is not None:
        theirs = np.stack([np.tanh(gamed.std_delta_len), gamed.difficulty, np.zeros(len(gamed.shares))], axis=1)
        x, y = np.concatenate([theirs, x]), np.concatenate([gamed.shares, y])
        weight = np.concatenate([np.full(len(theirs), GAMED_WEIGHT / 2), weight])
    judged = ~np.isnan(y)
    return x[judged], y[judged], weight[judged]


def _at_equal_length(data: LengthControlData) -> np.ndarray:
    """The design of every row, judged or not, with φ's column at zero."""
    rest = [] if data.difficulty is None else [np.asarray(data.difficulty, dtype=float)]
    n = len(data.shares)
    return np.stack([np.zeros(n), *rest, np.ones(n)], axis=1)


def _cross_validated_l1(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """C and coefficients. A soft label y is a win of weight y and a loss of weight 1 − y."""
    try:
        import sklearn
        from sklearn.linear_model import LogisticRegressionCV
        from sklearn.metrics import make_scorer
        from sklearn.model_selection import GroupKFold
    except ImportError as error:
        raise ValueError(
            f"the length-controlled win rate needs scikit-learn ({error}): "
            "pip install 'reinforced-token-optimization[evaluate]'"
        ) from error
    n = len(y)
    share, twice = np.concatenate([y, y]), np.concatenate([weight, weight])
    of_label = np.concatenate([y, 1 - y])
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_scorer(_weighted_log_loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            Cs=PENALTIES,
            cv=GroupKFold(FOLDS),
            scoring=scorer.set_score_request(share=True, weight=True),
            l1_ratios=(1.0,),
            solver="liblinear",
            fit_intercept=False,
            random_state=SEED,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)
        model.fit(
            np.concatenate([x, x]),
            np.repeat([1, 0], n),
            sample_weight=of_label * twice,
            groups=np.tile(np.arange(n), 2),
            share=share,
            weight=twice,
        )
    return float(model.C_), model.coef_[0]


def _weighted_log_loss(label: np.ndarray, predicted: np.ndarray, *, share: np.ndarray, weight: np.ndarray) -> float:
    """Log loss of the soft label; ``label`` is scikit-learn's 0 or 1 of the doubled rows and says nothing new."""
    p = np.clip(predicted, 1e-15, 1 - 1e-15)
    return float(-np.mean(weight * (share * np.log(p) + (1 - share) * np.log(1 - p))))
