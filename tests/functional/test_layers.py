"""The layout as imports: every import statement of the package, those inside functions too, read and not run."""

import ast
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rto

ROOT = Path(rto.__file__).parent
CHAIN = ("functional", "batches", "models", "rollout", "trainers", "pipeline", "cli")
MAY = {
    # room: what it may import besides itself and libraries
    "functional": {"ranges"},
    "batches": {"functional"},
    "evaluation.statistics": set(),
    "demo": set(),
    "theory": {"functional", "errors", "flags", "terminal", "workers"},
    "alarms": set(),
    "report": {"alarms", "files", "ranges", "flags", "values", "errors", "data.errors"},
    "evaluation.benchmarks.types": {"files"},
    "files": {"data.errors", "errors"},
}


@cache
def imported() -> dict[str, set[str]]:
    """The modules of the package that each module of it names in an import, without the leading "rto."."""
    found = {}
    for path in ROOT.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports say where they go from the top"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[module] = {_module(name.removeprefix("rto.")) for name in names if name.startswith("rto.")}
    return found


def _module(name: str) -> str:
    """What an imported name is part of: itself where it is a module, else the module that holds it."""
    path = ROOT.joinpath(*name.split("."))
    return name if path.is_dir() or path.with_suffix(".py").is_file() else name.rpartition(".")[0]


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def room_of(module: str) -> str:
    """A folder or file of the top level; the evaluation's rooms and `data.errors` stand apart."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "evaluation" or module == "data.errors" else parts[0]


@pytest.mark.parametrize("room", MAY)
def test_what_stands_below_or_aside_imports_nothing_above_it(room):
    modules = {module: names for module, names in imported().items() if within(module, room)}
    assert modules, f"no such room: {room}"
    for module, names in modules.items():
        above = {n for n in names if not within(n, room) and not any(within(n, other) for other in MAY[room])}
        assert not above, f"{module} imports {sorted(above)}"


def test_the_chain_imports_downwards():
    for module, names in imported().items():
        if (room := module.split(".")[0]) in CHAIN:
            above = [n for n in names if n.split(".")[0] in CHAIN[CHAIN.index(room) + 1 :]]
            assert not above, f"{module} imports {above}"


def test_no_two_rooms_import_each_other():
    """Over every room there is, whatever its name; a circle raises CycleError, which names its rooms."""
    graph = defaultdict(set)
    for module, names in imported().items():
        graph[room_of(module)] |= {room_of(name) for name in names} - {room_of(module)}
    assert len(graph) > 20
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("functional") < order.index("trainers") < order.index("cli")
