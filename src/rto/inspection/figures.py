"""The figures of an inspection, in the style of the report."""

from collections.abc import Mapping

import numpy as np

from rto.inspection.statistics import Calibration, Carried
from rto.report.plots import LARGE, METHODS, SOURCES, Panel, axes, panel, styled

CARRIED = {"reward": ("share of Σ|reward|", SOURCES["token"][1]), "tokens": ("share of tokens", "#b8bec4")}


def reliability(calibration: Calibration) -> Panel:
    """How often the side that the reward prefers was chosen, against the probability it gave; p ≥ ½."""
    predicted = np.array([b.predicted for b in calibration.bins])
    observed, low, high = np.array([(b.observed.rate, b.observed.low, b.observed.high) for b in calibration.bins]).T
    with styled():
        figure, ax = axes(LARGE, "predicted: mean σ(β · margin)")
        ax.set_ylabel("observed")
        ax.plot([0.5, 1], [0.5, 1], color="#9aa0a6", linewidth=0.9, linestyle=(0, (1, 2)))
        error = np.clip([observed - low, high - observed], 0, None)  # at 0 and 1 rounding would turn them negative
        ax.errorbar(predicted, observed, error, fmt="o", markersize=3.5, color=METHODS["PPO"], elinewidth=0.9)
        ax.set_xlim(0.5 - 0.01, 1 + 0.01)
        ax.set_ylim(min(0.5, float(low.min())) - 0.02, 1.02)
        figure.subplots_adjust(left=0.13)
        said = "; ".join(f"{p:.3g} predicted, {o:.3g} observed" for p, o in zip(predicted, observed))
        return panel(figure, f"Calibration: {said}.", title="Calibration", unit="95 % intervals; dotted: perfect")


def carried_shares(carried: Mapping[str, Carried]) -> Panel:
    """How much of the reward each kind of token carries, beside how many of the tokens it is."""
    with styled():
        figure, ax = axes(LARGE, "share")
        for i, (part, (_, colour)) in enumerate(CARRIED.items()):
            shares = np.nan_to_num([getattr(share, part) for share in carried.values()])
            at = np.arange(len(carried)) + 0.38 * (i - 0.5)
            ax.barh(at, shares, height=0.34, color=colour)
            for y, share in zip(at, shares):
                ax.text(share + 0.012, y, f"{share:.2f}", va="center", color="#5f6368")
        ax.set_yticks(range(len(carried)), list(carried), parse_math=False)
        ax.set_ylim(len(carried) - 0.4, -0.6)
        ax.set_xlim(0, 1.08)
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        figure.subplots_adjust(left=0.2)
        said = "; ".join(
            f"{kind}: {c.reward:.3g} of the reward, {c.tokens:.3g} of tokens" for kind, c in carried.items()
        )
        return panel(
            figure,
            f"What carries the reward. {said}.",
            title="What carries the reward",
            unit="by kind of token",
            legend=tuple(CARRIED.values()),
        )
