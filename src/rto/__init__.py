"""Reinforced Token Optimization (Zhong et al., ICML 2025, arXiv:2404.18922)."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, str]:
    """Name to module, from the stub beside this file: one table for Python and for type checkers."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {name.name: str(x.module) for x in stub.body if isinstance(x, ast.ImportFrom) for name in x.names}


_MODULES = _public_names()


def module_of(name: str) -> str:
    """The module that defines a public name."""
    return _MODULES[name]


__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import what is asked for on first use: the pure parts need torch only, and the command starts at once."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rto' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
