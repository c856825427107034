"""What lies in the present folder is run for ``module:function`` alone, whichever way a command is started.

The folder is full: a file for every module of the standard library, for every installed package, and for packages
that libraries look for and that are not there. Each leaves a mark when it is run.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

MARK = "import os\nopen(os.path.join(os.environ['RTO_MARK'], {name!r}), 'w').close()\n"
ABSENT = (
    "wandb",
    "mlflow",
    "comet_ml",
    "tensorflow",
    "flax",
    "flash_attn",
    "kernels",
    "deepspeed",
    "vllm",
    "sitecustomize",
)
WORKER = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rto.imports import close_present_folder


if __name__ == "__main__":
    close_present_folder()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        print(pool.submit(abs, -7).result())
"""
TWICE = """
import sys
from rto.__main__ import main

if code := main():
    sys.exit(code)
sys.argv[-1] = "statistics:by_length"
sys.exit(main())
"""
ENTRY, MODULE = ["-P", "-c", TWICE], ["-m", "rto"]
"""How the command is started: as pip's script does it, twice in one process, since it imports for seconds."""
JUDGE = ["evaluate", "judge", "--answers", "a.json", "--baseline", "b.json", "--judge", "mine.judges:by_length"]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder of traps, with a module of the user's own that imports others of theirs, at once and later."""
    names = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), *ABSENT}
    folder = tmp_path / "here"
    (folder / "mine").mkdir(parents=True)
    for name in names - {"rto", "__future__"}:
        if name.isidentifier() and not name.startswith("__"):
            (folder / f"{name}.py").write_text(MARK.format(name=name))
    (folder / "mine" / "judges.py").write_text(
        "import my_helper\nfrom mine import sizes\n\n\n"
        "def by_length(completions):\n    import my_later\n\n    return [sizes.of(x) for x in completions]\n"
    )
    (folder / "mine" / "sizes.py").write_text("def of(x):\n    return float(len(x))\n")
    (folder / "my_helper.py").write_text("")
    (folder / "my_later.py").write_text("")
    for name in ("a", "b"):
        row = f'[{{"instruction": "x", "output": "{name * 3}", "generator": "{name}", "dataset": "d"}}]'
        (folder / f"{name}.json").write_text(row)
    (tmp_path / "marks").mkdir()
    return folder


def ran(folder: Path, words: list[str]) -> tuple[set[str], subprocess.CompletedProcess]:
    """The traps that a process of Python fell into."""
    marks = folder.parent / "marks"
    for mark in marks.iterdir():
        mark.unlink()
    environment = {**os.environ, "RTO_MARK": str(marks), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    return {mark.name for mark in marks.iterdir()}, done


def without_pythons_own(folder: Path) -> None:
    """Take the traps away that ``python -m`` would fall into before any module of ours."""
    program = "import sys, runpy, pkgutil; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    for name in loaded.stdout.split():
        (folder / f"{name}.py").unlink(missing_ok=True)


def test_no_file_of_the_present_folder_is_run(full: Path) -> None:
    """Nor when the user's module has a name that is taken: the second command of the process tells that."""
    marks, done = ran(full, [*ENTRY, *JUDGE])
    assert done.returncode == 2, done.stderr[-2000:]
    assert "1 of 1 games read" in done.stdout
    assert "searched last: rename it" in done.stderr
    assert not marks


@pytest.mark.slow
def test_no_file_of_the_present_folder_is_run_by_the_module(full: Path) -> None:
    without_pythons_own(full)
    marks, done = ran(full, [*MODULE, *JUDGE])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 of 1 games read" in done.stdout
    assert not marks


def test_no_file_is_run_by_a_worker(full: Path) -> None:
    """Python starts one with ``-c``, which puts the present folder first."""
    (full.parent / "start.py").write_text(WORKER)
    marks, done = ran(full, ["-P", str(full.parent / "start.py")])
    assert done.stdout.strip() == "7", done.stderr[-2000:]
    assert not marks


@pytest.mark.slow
def test_no_file_is_run_by_a_study_and_its_workers(full: Path) -> None:
    small = {"demonstrations": 64, "pair_prompts": 16, "prompts": 64, "test_prompts": 8}
    recipe = Path(sys.modules["rto"].__file__).parent / "recipes" / "embedded.yaml"
    sizes = [word for name, n in small.items() for word in (f"--data.{name}.rows", str(n))]
    words = ["reproduce", str(recipe), "--output_dir", "out", "--jobs", "2", "--seeds", "1", "--methods", "RTO"]
    more = ["--study.baseline", "RTO", "--completion_length", "8", "--logged", "[mine.judges:by_length]"]
    without_pythons_own(full)
    marks, done = ran(full, [*MODULE, *words, *sizes, *more])
    assert done.returncode == 0, done.stderr[-2000:]
    assert not marks
