"""Reinforced Token Optimization (Zhong et al., ICML 2025, arXiv:2404.18922)."""

from importlib import import_module

__version__ = "0.1.0"
_MODULES: dict[str, str] = {}


def _modules() -> dict[str, str]:
    """Name to module, from the stub beside this file: one table for Python and for type checkers.

    It is read on first use: ``python -m rto`` imports this file while the present folder is still first on the path,
    so no library is imported above.
    """
    if not _MODULES:
        import ast
        from pathlib import Path

        stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
        found = [(name.name, str(x.module)) for x in stub.body if isinstance(x, ast.ImportFrom) for name in x.names]
        _MODULES.update(found)
    return _MODULES


def module_of(name: str) -> str:
    """The module that defines a public name."""
    return _modules()[name]


def __getattr__(name: str) -> object:
    """Import what is asked for on first use: the pure parts need torch only, and the command starts at once."""
    if name == "__all__":
        return sorted(_modules())
    if name.startswith("__") or name not in _modules():
        raise AttributeError(f"module 'rto' has no attribute {name!r}")
    found: object = getattr(import_module(_modules()[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})
