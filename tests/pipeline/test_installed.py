"""From the wheel alone, in a folder that is no checkout: what a user of ``pip install`` has.

A virtual environment with nothing in it but the wheel, beside the libraries of this one.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from rto.packaged import copied, find_packaged, listing, packaged
from rto.recipe import RecipeError, load_recipe

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--data.demonstrations.rows", "64", "--data.pair_prompts.rows", "16", "--data.prompts.rows", "64"),
    *("--data.test_prompts.rows", "8"),
]


def test_every_recipe_is_found_by_name_and_by_the_path_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    known = packaged()
    assert {"embedded", "embedded/study", "paper/rto", "prefer/simpo", "chat"} <= known.keys()
    page = listing()
    for name, path in known.items():
        assert find_packaged(name) == find_packaged(f"recipes/{name}.yaml") == path
        assert re.search(rf"^  {re.escape(name)} +\S", page, re.MULTILINE), f"{name} says nothing of itself"
    with pytest.raises(RecipeError, match="did you mean chat"):
        load_recipe("chatt")
    with pytest.raises(RecipeError, match=r"mine\.yaml: no such recipe$"):
        load_recipe("mine.yaml")


def test_a_recipe_is_listed_by_what_it_is_for_and_not_by_how_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    lines = listing().splitlines()
    assert max(map(len, lines)) <= 90
    assert not any("rto reproduce" in line or "rto run " in line for line in lines[1:])


@pytest.mark.parametrize("path", ["chat", ROOT / "experiments" / "chat.yaml"])
def test_the_chat_recipes_are_sound(path: str | Path) -> None:
    """The packaged one, and the one of docs/chat.md, which differs in rows, precision and size alone."""
    ours, packaged_one = load_recipe(path), load_recipe("chat")
    for name in ("model", "seed", "peft", "methods", "learners", "sft", "evaluate_temperature"):
        assert getattr(ours, name) == getattr(packaged_one, name)
    for stage in ("prefer", "reward", "train"):
        rates = {key for key in getattr(packaged_one, stage) if "learning_rate" in key or key.endswith("_coef")}
        assert rates
        assert all(getattr(ours, stage)[key] == getattr(packaged_one, stage)[key] for key in rates)


def test_a_copy_is_the_recipe_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Comments stay, values change, and a recipe on a base finds it from anywhere."""
    (tmp_path / "chat.yaml").write_text(copied("chat", {"model": "./mine", "data.pairs.path": "p: q.jsonl"}))
    ours, theirs = load_recipe(tmp_path / "chat.yaml"), load_recipe("chat")
    assert (ours.model, ours.data.pairs.path) == ("./mine", "p: q.jsonl")
    assert ours.methods == theirs.methods
    assert (theirs.data.pairs.rows, ours.data.pairs.rows) == (2000, None)  # so many are asked for of the file it names
    assert ours.data.eval_pairs == theirs.data.eval_pairs
    fewer = copied("chat", {"data.pairs.path": "p.jsonl", "data.pairs.rows": 7})
    assert "pairs: {path: p.jsonl, split: train, rows: 7}" in fewer
    assert "# yours: a hub id" in (tmp_path / "chat.yaml").read_text()
    (tmp_path / "rto.yaml").write_text(copied("paper/rto", {}))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("rto.yaml") == load_recipe("paper/rto")
    with pytest.raises(ValueError, match=r"--data\.pears: the recipe has no pears there; did you mean pairs"):
        copied("chat", {"data.pears": "x"})
    with pytest.raises(ValueError, match="one value at a time"):
        copied("chat", {"data.pairs": "x"})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that has the wheel."""
    work = tmp_path_factory.mktemp("installed")
    checkout = work / "checkout"
    checkout.mkdir()
    for name in ("src", "recipes", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(checkout)]
    subprocess.run(build, check=True, timeout=300)
    shutil.rmtree(checkout)
    venv.create(work / "venv", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(work / "venv"), "platbase": str(work / "venv")}))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *map(str, work.glob("*.whl"))], check=True)
    # Libraries of this environment; its own .pth files, which may name the checkout, are not read from there.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return work / "venv" / "bin" / "python"


@pytest.fixture
def rto(installed: Path, tmp_path: Path):
    def call(*args: str, code: int = 0, module: bool = True) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [str(installed), *(["-m", "rto"] if module else []), *args]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout + done.stderr

    return call


@pytest.mark.slow
def test_the_wheel_alone(rto, installed: Path, tmp_path: Path) -> None:
    where = rto("-c", "import rto; print(rto.__file__); rto.RTOConfig", module=False)
    assert str(installed.parents[1]) in where
    page = rto("run", "--list")
    for name in packaged():
        needs = "experiments." in packaged()[name].read_text()
        assert (re.search(rf"^  {re.escape(name)} ", page, re.MULTILINE) is None) == needs, name
    assert "chat.yaml" in rto("init", "chat", "--model", "mine")
    assert "model: mine" in (tmp_path / "chat.yaml").read_text()
    assert "is there already" in rto("init", "chat", code=2)
    assert "no task 'stories'" in rto("reproduce", "stories", code=2)
    assert "typed" in rto(
        "-c",
        "import rto, pathlib; p = pathlib.Path(rto.__file__); "
        "print('typed' * ((p.parent / 'py.typed').is_file() and p.with_suffix('.pyi').is_file()))",
        module=False,
    )
    rto("run", "--output_dir", "run", *SMALL)
    assert (tmp_path / "run" / "report.html").is_file()
    rto("reproduce", "embedded", "--methods", "PPO", "--seeds", "1", "--study.tune", "null", "--study.fractions", "[]",
        "--study.scaled", "[]", "--output_dir", "study", *SMALL)  # fmt: skip
    assert (tmp_path / "study" / "report.md").is_file()
