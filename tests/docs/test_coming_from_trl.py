"""The page for those who come from TRL's PPOTrainer: complete, and true of both sides.

`trl_1_12_ppo.json` holds what TRL 1.12 has, read off its sources: ``pip download trl==1.12.0 --no-deps``,
``trl/experimental/ppo``. A slow test fetches the release into a folder of its own and runs the script before on it.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from desk import lay
from pages import ROOT, blocks
from transformers import TrainingArguments

from rto import RTOConfig, RTOTrainer
from rto.trl_names import ONLINE, As

PAGE = "docs/coming-from-trl.md"
TRL = json.loads(Path(__file__).with_name("trl_1_12_ppo.json").read_text())
NONE = "–"


def table(name: str) -> list[list[str]]:
    """Cells of the rows of a table between its comments, without its head."""
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    inside = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines()[2:]]


def names(cell: str) -> list[str]:
    return [] if cell == NONE else re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("name", "known"), [("PPOConfig", "config"), ("PPOTrainer", "trainer"), ("metrics", "metrics")]
)
def test_each_name_of_trl_has_its_row(name: str, known: str) -> None:
    assert [names(row[0]) for row in table(name)] == [[x] for x in TRL[known]]


def test_arguments_and_their_defaults_are_there() -> None:
    ours = {f.name: f.default for f in fields(RTOConfig) if f.default is not MISSING}
    arguments = inspect.signature(RTOTrainer).parameters
    for theirs, default, here, defaults, _ in table("PPOConfig"):
        assert same(default, TRL["config"][names(theirs)[0]]), theirs
        values = defaults.split(", ")
        for i, name in enumerate(names(here)):
            assert name in ours or name in arguments, f"{name} is no argument here"
            if name in ours:
                assert same(values[i], ours[name]), f"{name} is {ours[name]} by default"
    trainers = {*arguments, *inspect.signature(TrainingArguments).parameters, "optimizers", "callbacks"}
    for _, here, _ in table("PPOTrainer"):
        assert set(names(here)) <= trainers


def test_a_name_of_trl_is_taken_or_refused_by_name() -> None:
    own = {f.name for f in fields(RTOConfig)}
    for theirs, _, here, _, _ in table("PPOConfig"):
        (name,) = names(theirs)
        assert name in own or name in ONLINE, f"{name} is unknown to RTOConfig"
        if isinstance(ONLINE.get(name), As):
            assert names(here) == [str(ONLINE[name])]


def same(written: str, value: Any) -> bool:
    """A default as the table has it."""
    if isinstance(value, float):
        return float(written) == value
    return written == str(value)


def test_metrics_are_logged(tmp_path: Path, tiny_model: Callable, tokenizer: Any) -> None:
    args = RTOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_mini_batches=1,
        max_completion_length=3,
        dpo_coef=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    prompts = Dataset.from_dict({"prompt": ["ab", "c", "ba", "d"]})
    RTOTrainer(tiny_model(), args, reward_funcs=len_of, train_dataset=prompts, processing_class=tokenizer).train()
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    for theirs, here, _ in table("metrics"):
        assert names(here)[0] in logged, theirs


def len_of(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_the_script_before_uses_arguments_that_were_there() -> None:
    (before,) = (block for block in blocks(PAGE) if block.title == "before.py")
    known = {
        "PPOConfig": {*TRL["config"], *(f.name for f in fields(TrainingArguments))},
        "PPOTrainer": set(TRL["trainer"]),
    }
    calls = [node for node in ast.walk(ast.parse(before.text)) if isinstance(node, ast.Call)]
    found = {node.func.id: node for node in calls if isinstance(node.func, ast.Name) and node.func.id in known}
    assert set(found) == set(known)
    for name, call in found.items():
        assert {keyword.arg for keyword in call.keywords} <= known[name], name


@pytest.mark.slow
def test_the_script_before_runs_on_that_release(tmp_path: Path, tiny_model: Callable, tokenizer: Any) -> None:
    """TRL alone is of another version: its dependencies are those that are here."""
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "old")]
    fetched = subprocess.run([*fetch, "trl==1.12.0"], capture_output=True, text=True, timeout=300)
    if fetched.returncode:
        pytest.skip(f"TRL 1.12 cannot be had: {fetched.stderr.strip().splitlines()[-1]}")
    folder = tmp_path / "desk"
    folder.mkdir()
    lay(folder, tiny_model, tokenizer)
    rows = [json.dumps({"prompt": f"Once upon a time there were {i}"}) for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (before,) = (block.text for block in blocks(PAGE) if block.title == "before.py")
    text = before.replace('output_dir="ppo",', 'output_dir="ppo", bf16=False, use_cpu=True, num_train_epochs=1,')
    assert text != before
    run = [sys.executable, "-c", "import trl; assert trl.__version__ == '1.12.0'\n" + text]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "old")}
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "ppo" / "config.json").is_file()
