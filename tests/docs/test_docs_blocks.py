"""Every block of the README, of CONTRIBUTING and of the docs runs as it is written, on a desk of the reader's own.

What a page calls by a name on the hub is a folder of the desk (`HUB`), what takes hours on the data it names is given
flags that make it small (`SMALLER`), and what cannot run here stands in `CANNOT` with its reason. Nothing else is
changed. Pages run with ``-m slow``; that every block can be read is seen by default.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from desk import MADE, lay
from pages import PAGES, ROOT, RUN, SHOWN, Block, blocks, commands

HUB = {"HuggingFaceTB/SmolLM2-135M-Instruct": "base"}
"""Models on the hub, and which folder of the desk stands for each."""

SMALLER = {
    "rto run": (
        *("--data.demonstrations.rows", "64", "--data.pair_prompts.rows", "32", "--data.prompts.rows", "64"),
        *("--data.test_prompts.rows", "8", "--completion_length", "16"),
    ),
    "rto run rounds.yaml": ("--model", "untaught"),  # the others say nearly the same at every draw
    "rto theory --output_dir runs/theory": ("--quick", "--only", "search"),
}
"""Flags for commands that would take minutes or hours without a file that says otherwise: the same work on less."""

INSTALL = "it installs packages from an index"
HUB_DATA = "it reads from the hub"
ENDPOINT = "it needs an endpoint that answers, and a key"
VLLM = "it needs vLLM, which `make vllm-test` has"
FEW = "it compares twenty pairs of each kind, more than the desk has; tests/pipeline/test_inspect.py runs it"
HOURS = "it is a measurement of many minutes to hours, whose figures the page states"
CANNOT: dict[tuple[str, str], str] = {
    ("README.md", "pip install"): INSTALL,
    ("docs/chat.md", "RTO_DATA=../shared/data"): HOURS,
    ("docs/chat.md", "rto run experiments/chat.yaml"): HOURS,
    ("docs/evaluation.md", "hf download"): HUB_DATA,
    ("docs/judging.md", "rto evaluate generate --model rto --benchmark alpaca_eval"): HUB_DATA,
    ("docs/judging.md", "rto evaluate generate --model rto --benchmark arena_hard"): HUB_DATA,
    ("docs/judging.md", "rto evaluate judge --answers eval/rto/model_outputs.json"): ENDPOINT,
    ("docs/judging.md", "rto evaluate judge --answers eval/arena/model_answer/rto.jsonl"): ENDPOINT,
    ("docs/performance.md", "python benchmarks/"): HOURS,
    ("docs/planning.md", "python benchmarks/plan.py"): HOURS,
    ("docs/report.md", "rto watch"): "it serves until it is interrupted",
    ("docs/results.md", "rto reproduce"): HOURS,
    ("docs/results.md", "rto run embedded"): HOURS,
    ("docs/results.md", "python experiments/"): HOURS,
    ("docs/results.md", "RTO_DATA=../shared/data"): HOURS,
    ("docs/rounds.md", "rto inspect --dpo_model runs/rounds/dpo --ref_model runs/rounds/sft --reward_model"): FEW,
    ("docs/samplers.md", "python -m rto.rollout.samplers.vllm_server"): VLLM,
    ("docs/samplers.md", "rto train"): VLLM,
    ("docs/install.md", "python -m venv"): INSTALL,
    ("docs/install.md", "pip install"): INSTALL,
    ("docs/install.md", "pip wheel"): INSTALL,
    ("docs/install.md", "uv tool"): INSTALL,
    ("docs/install.md", "pipx"): INSTALL,
}
"""(page, start of a command or of a Python block) to why it cannot run here."""

MAKES_ALL = ("README.md",)
"""Pages whose own stages make every model they speak of; the others find them on the desk."""


def steps(page: str) -> Iterator[dict[str, Any]]:
    """What a reader of a page does: write the files it shows, then follow it from its first block to its last."""
    found = [(block, at_desk(block.text)) for block in blocks(page)]
    for block, text in found:
        if block.title is not None:
            yield {"at": block.at, "kind": "write", "file": block.title, "text": text}
    for block, text in found:
        if block.title is not None:
            continue
        if block.language == "python" and reason(page, text) is None:
            yield {"at": block.at, "kind": "python", "text": text}
        elif block.language == "bash":
            yield from filter(None, (step(block, words) for words in commands(text)))


def at_desk(text: str) -> str:
    """Folders for names on the hub."""
    for name, folder in HUB.items():
        text = text.replace(name, folder)
    return text


def step(block: Block, words: list[str]) -> dict[str, Any] | None:
    """A command as `run_blocks` takes it; None where it cannot run."""
    line = " ".join(words)
    if reason(block.page, line) is not None:
        return None
    if words[0] == "rto":
        more = next((flags for start, flags in SMALLER.items() if re.fullmatch(f"{start}( --.*)?", line)), ())
        return {"at": block.at, "kind": "rto", "words": [*words[1:], *more], "line": line}
    if re.match(r"\w+=", words[0]):
        return {"at": block.at, "kind": "assign", "words": words}
    if words[0] == "export":
        return {"at": block.at, "kind": "set", "variables": dict(word.split("=", 1) for word in words[1:])}
    return {"at": block.at, "kind": "shell", "words": words, "line": line}


def reason(page: str, text: str) -> str | None:
    """Why a command or block cannot run; None if it can."""
    return next((why for (where, start), why in CANNOT.items() if where == page and text.startswith(start)), None)


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    lay(folder, tiny_model, tokenizer)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(steps(page))])
def test_every_page_runs_as_written(page: str, desk: Path, tmp_path: Path) -> None:
    own, folder = MADE if page in MAKES_ALL else (), tmp_path / Path(page).stem
    shutil.copytree(desk, folder, symlinks=True, ignore=shutil.ignore_patterns(*own))
    plan: list[dict[str, Any]] = [{"at": page, "kind": "open", "folder": str(folder)}, *steps(page)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "ACCELERATE_USE_CPU": "true",
        "REPOSITORY": str(ROOT),
    }
    program = [sys.executable, str(Path(__file__).with_name("run_blocks.py")), json.dumps(plan)]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-6000:]
    print(done.stderr)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """So that none is passed over: a language this test knows, and text in it that can be read as such."""
    for block in blocks(page):
        assert block.language in (*RUN, *SHOWN), f"{block.at}: a block in {block.language!r} is run by no test"
        if block.language == "python":
            compile(block.text, block.at, "exec")
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)


def test_what_cannot_run_is_still_there() -> None:
    """An exception whose block is gone is removed, and scripts that are too long to run exist."""
    for page, start in CANNOT:
        lines = [" ".join(w) for b in blocks(page) if b.language == "bash" for w in commands(b.text)]
        texts = [*lines, *(b.text for b in blocks(page) if b.language == "python")]
        assert any(text.startswith(start) for text in texts), f"{page} has no block that starts with {start!r}"
    for page in PAGES:
        for block in (b for b in blocks(page) if b.language == "bash"):
            for words in commands(block.text):
                scripts = [w for w in words if w.endswith(".py") and "/" in w]
                missing = [w for w in scripts if not (ROOT / w).is_file()]
                assert not missing, f"{block.at}: {missing} is not there"
