import subprocess
import sys
import textwrap

import pytest
import torch

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
        for name in [*names, "rto.batches"]:
            importlib.import_module(name)
        try:
            import transformers
        except ImportError:
            print("blocked as it should be")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked as it should be"


def test_signatures_are_checked_while_the_tests_run():
    """Otherwise every other test would pass with the import hook gone."""
    x = torch.zeros(2, 3)
    with pytest.raises(Exception, match="masked_mean"):
        masked_mean(x, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(Exception, match="masked_mean"):
        masked_mean(x, torch.ones(2, 3))
