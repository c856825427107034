import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import rto
from rto.functional.masked import masked_mean

BLOCKED = ("transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def test_the_formulas_need_torch_only():
    """Every module of rto.functional imports in a fresh process where nothing but torch can be had."""
    code = f"""
        import importlib, pkgutil, sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if any(name == b or name.startswith(b + ".") for b in {BLOCKED!r}):
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Blocked())
        import rto.functional

        names = [m.name for m in pkgutil.iter_modules(rto.functional.__path__, "rto.functional.")]
        assert len(names) >= 6, names
        for name in [*names, "rto.batches", "rto.credit"]:
            importlib.import_module(name)
        try:
            import transformers
        except ImportError:
            print("blocked as it should be")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked as it should be"


ORDER = ("functional", "batches", "credit models", "rollout", "trainers", "pipeline", "cli")
"""Lowest first; what stands together does not know each other."""


def test_imports_go_down_only() -> None:
    """Every import of every module on the way from formulas to the command, also within functions."""
    level = {name: i for i, names in enumerate(ORDER) for name in names.split()}
    root = Path(rto.__file__).parent
    files = [path for name in level for path in sorted(root.glob(f"{name}/**/*.py")) + sorted(root.glob(f"{name}.py"))]
    assert len(files) > 30
    wrong = []
    for path in files:
        own = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            parts = [name.split(".") for name in named]
            rooms = {p[1] for p in parts if p[0] == "rto" and len(p) > 1}
            above = [room for room in rooms - {own} if level.get(room, -1) >= level[own]]
            wrong += [f"{path.relative_to(root)} imports rto.{room}" for room in above]
    assert not wrong


def test_signatures_are_checked_while_the_tests_run():
    """Otherwise every other test would pass with the import hook gone."""
    x = torch.zeros(2, 3)
    with pytest.raises(Exception, match="masked_mean"):
        masked_mean(x, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(Exception, match="masked_mean"):
        masked_mean(x, torch.ones(2, 3))
