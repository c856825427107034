"""Reinforced Token Optimization (Zhong et al., ICML 2025, arXiv:2404.18922)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_EXPORTS = {
    "RTOTrainer": "rto.trainers.rto",
    "RTOConfig": "rto.trainers.rto",
    "PreferenceTrainer": "rto.trainers.preference",
    "PreferenceConfig": "rto.trainers.preference",
    "WinRateCallback": "rto.evaluation.judging.callback",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import trainers on first use, so that the pure parts need torch only."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rto' has no attribute {name!r}")
