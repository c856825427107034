"""Logistic fits of one design under many weightings at once: what makes a bootstrap of a fit fast. numpy only."""

import numpy as np
from jaxtyping import Float

ROWS_AT_ONCE = 4_000_000
"""Entries of a rounds × rows array that are held at a time (32 MB)."""


class FitError(ValueError):
    """A logistic fit did not converge."""


def fit_logistic(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "R n"],
    *,
    l2: float,
    tolerance: float = 1e-8,
) -> Float[np.ndarray, "R d"]:
    """argmin_w Σᵢ cᵢ [log(1 + e^{xᵢ·w}) − yᵢ xᵢ·w] + (l2 / 2) ‖w‖², for each row c of ``weights``.

    Newton's method with step halving, all rounds side by side. y may be any number in [0, 1]: y = ½ with weight 2 is
    one win and one loss. ``l2`` is 1 / C of ``sklearn.linear_model.LogisticRegression``; it must be positive, since
    without it separable data have no finite optimum.

    Raises:
        FitError: a round has not converged after 100 steps.
    """
    if l2 <= 0:
        raise ValueError(f"l2 must be positive, got {l2}")
    chunk = max(1, ROWS_AT_ONCE // len(x))
    start = np.zeros(x.shape[1])
    if len(weights) > 1:  # every round ends near the fit to the average weights
        start = _newton(x, y, weights.mean(0, keepdims=True), start, l2, tolerance)[0]
    parts = [
        _newton(x, y, weights[i : i + chunk].astype(float), start, l2, tolerance)
        for i in range(0, len(weights), chunk)
    ]
    return np.concatenate(parts)


def _newton(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray, l2: float, tolerance: float
) -> np.ndarray:
    rounds, d = len(weights), x.shape[1]
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), d * d)
    w = np.repeat(start[None], rounds, axis=0)
    open_ = np.arange(rounds)
    for _ in range(100):
        c, at = weights[open_], w[open_]
        z = at @ x.T
        q = sigmoid(z)
        gradient = (c * (q - y)) @ x + l2 * at
        hessian = ((c * q * (1 - q)) @ products).reshape(-1, d, d) + l2 * np.eye(d)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        w[open_] = _descend(x, y, c, at, step, l2)
        open_ = open_[np.abs(step).max(1) > tolerance]
        if not len(open_):
            return w
    raise FitError(f"{len(open_)} of {rounds} logistic fits have not converged after 100 Newton steps")


def _descend(x: np.ndarray, y: np.ndarray, c: np.ndarray, at: np.ndarray, step: np.ndarray, l2: float) -> np.ndarray:
    """``at − s·step`` with the largest s in {1, ½, ¼, …} that does not raise the loss."""
    before = _loss(x, y, c, at, l2)
    s = np.ones(len(at))
    for _ in range(30):
        worse = _loss(x, y, c, at - s[:, None] * step, l2) > before + 1e-10 * (1 + np.abs(before))
        if not worse.any():
            break
        s[worse] /= 2
    return at - s[:, None] * step


def _loss(x: np.ndarray, y: np.ndarray, c: np.ndarray, w: np.ndarray, l2: float) -> np.ndarray:
    z = w @ x.T
    return (c * (np.logaddexp(0, z) - y * z)).sum(1) + l2 / 2 * (w**2).sum(1)


def sigmoid(z: np.ndarray | float) -> np.ndarray:
    """1 / (1 + e^{−z}), without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(z, dtype=float)))
