"""The first minute: names of the package, versions, help; what of it must not wait for a library."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import rto
import warm
from rto.cli import COMMANDS
from rto.recipe import Data, Recipe, Rows, Study, Tuning
from rto.stage_help import COMMON, STAGES, recipe_help, shown_flags, stage_help

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "datasets", "numpy", "accelerate")


def fresh(code: str, *args: str) -> str:
    """What a new process prints."""
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout


def test_every_public_name_is_there_and_where_it_says() -> None:
    stub = (ROOT / "src" / "rto" / "__init__.pyi").read_text(encoding="utf-8")
    assert len(rto.__all__) == len(re.findall("^from ", stub, re.MULTILINE)) > 40
    for name in rto.__all__:
        assert getattr(rto, name) is getattr(import_module(rto.module_of(name)), name)
        assert name in dir(rto)
    with pytest.raises(AttributeError, match="RTOTrainr"):
        _ = rto.RTOTrainr  # type: ignore[attr-defined]


def test_type_checkers_are_asked_for_every_public_name() -> None:
    tree = ast.parse((ROOT / "tests" / "typing" / "public_names.py").read_text(encoding="utf-8"))
    asked = [
        ast.unparse(x.value.args[0]) for x in tree.body if isinstance(x, ast.Expr) and isinstance(x.value, ast.Call)
    ]
    assert asked == [f"rto.{name}" for name in rto.__all__]


def test_the_version_stands_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert rto.__version__ in fresh("from rto.cli import main; main()", "--version")


LIGHT = """
import sys, time
began = time.process_time()
{what}
used = time.process_time() - began
print(used)
print([name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("what", "seconds"),
    [
        ("import rto; dir(rto)", 0.2),
        *((f"from rto.cli import main; main({args!r})", 0.5) for args in ([], ["--help"], ["--version"])),
        *((f"from rto.cli import main; main([{command!r}, '--help'])", 1.0) for command in (*STAGES, "run")),
    ],
)
def test_help_waits_for_no_library(what: str, seconds: float) -> None:
    *_, used, loaded = fresh(LIGHT.format(what=what, heavy=HEAVY)).splitlines()
    assert loaded == "[]"
    assert float(used) < seconds  # processor time: no matter what else the machine does


REAL = """
import sys
from rto.cli import DataArguments, ReferenceArguments, RewardArguments
from rto.stage_parser import StageParser
from rto.trainers.precision import ModelArguments
import json, rto, rto.cli
found = {}
for command, (config, groups) in json.loads(sys.argv[1]).items():
    kinds = [*(getattr(rto.cli, g) for g in groups), getattr(rto, config), ModelArguments]
    parser = StageParser(kinds, command)
    found[command] = {a.dest: [a.help or "", "" if a.required else str(a.default)] for a in reversed(parser._actions)}
    found[command, "all"] = parser.help_all("PAGE", sorted(found[command])[:3])
print(json.dumps({str(k): v for k, v in found.items()}))
"""


@pytest.fixture(scope="module")
def parsers() -> dict:
    """What the parsers say, of a process of its own: one rewrites the annotations of the configurations."""
    stages = {command: (stage.config, stage.groups) for command, stage in STAGES.items()}
    done = warm.run(REAL, json.dumps(stages), environment={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", STAGES)
def test_the_short_help_is_what_the_parser_says(parsers: dict, command: str) -> None:
    """Every flag of our own with the parser's own help and default; every inherited one exists."""
    said, real = (
        dict(re.findall(r"^  --([\w-]+)(.*(?:\n {10}.*)*)", stage_help(command), re.MULTILINE)),
        parsers[command],
    )
    assert shown_flags(command) <= real.keys()
    assert said.keys() == shown_flags(command) | {"help-all"}
    ours = said.keys() - COMMON.keys() - STAGES[command].common.keys() - {"model_name_or_path", "config", "help-all"}
    assert len(ours) >= 8
    for name in ours:
        text, default = real[name]
        shown = "" if default == "None" else "(required)" if default == "" else f"({default})"
        expected = f"{text} {shown}".lower().split()
        assert said[name].lower().split()[-len(expected) :] == expected, name


def test_the_long_help_has_the_rest(parsers: dict) -> None:
    for command in STAGES:
        page = parsers[str((command, "all"))]
        assert page.startswith("PAGE")
        hidden = sorted(parsers[command])[:3]
        assert all(f"--{name}" in page for name in parsers[command] if name not in hidden and real_flag(name))


def real_flag(name: str) -> bool:
    from rto.trl_names import ONLINE, PREFERENCE, ROWS

    return name not in {"help", *ONLINE, *PREFERENCE, *ROWS}


def test_every_key_of_a_recipe_is_told() -> None:
    page = recipe_help()
    for kind in (Recipe, Data, Rows, Study, Tuning):
        for name in kind.__dataclass_fields__.keys() - {"references"}:  # no key of a file
            line = next(line for line in page.splitlines() if line.startswith(f"  {name} "))
            assert len(line.split()) > 1, name
    assert "references" not in page


def test_every_command_is_in_the_first_page() -> None:
    page = fresh("from rto.cli import main; main(['--help'])")
    assert all(re.search(rf"^  {command}\b", page, re.MULTILINE) for command in COMMANDS)


def test_a_reader_who_has_gone_ends_it_without_a_word() -> None:
    """As in ``rto --help | head -1``: here whoever would read is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from rto.__main__ import main; raise SystemExit(main())", "--help"]
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (141, "")
