"""`rto run` by several processes: they know each other, share what they can, and wait for who works alone."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import SMALL

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("several.py")


def start(argument: str, processes: int) -> str:
    """Run the program; what it said on stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, str(PROGRAM), argument], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    start(str(folder), 1)
    return folder


def results(folder: Path) -> dict[str, dict[str, float]]:
    methods = json.loads((folder / "evaluation" / "results.json").read_text())["methods"]
    return {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in methods.items()}


def test_shared_work_is_the_same_work(by_one: Path, tmp_path: Path) -> None:
    """Pairs, answers and judgments of two processes are those of one, to the bit, and each draws half of them."""
    again = tmp_path / "run"
    shutil.copytree(by_one, again)
    recipe = again / "recipe.yaml"
    halves = {name: int(value) // 2 for name, value in _batch_sizes(recipe.read_text()).items()}
    recipe.write_text(_with_batch_sizes(recipe.read_text(), halves))  # else it is another recipe's folder
    for stage, left in (("pairs", "pairs.jsonl"), ("evaluation", "results.json")):
        (again / stage / "done.json").unlink()
        (again / stage / left).unlink()
    drew = [int(n) for n in re.findall(r"drew (\d+) completions", start(str(again), 2))]
    pairs, policies = 2 * SMALL["data.pair_prompts.rows"], len(results(by_one))
    assert drew == [(pairs + policies * SMALL["data.test_prompts.rows"]) // 2] * 2
    assert (again / "pairs" / "pairs.jsonl").read_bytes() == (by_one / "pairs" / "pairs.jsonl").read_bytes()
    assert results(again) == results(by_one)
    for name in ("completions.jsonl", "token_rewards.jsonl"):
        assert (again / "evaluation" / name).read_bytes() == (by_one / "evaluation" / name).read_bytes()


def _batch_sizes(text: str) -> dict[int, str]:
    lines = enumerate(text.splitlines())
    return {i: line.split(": ")[1] for i, line in lines if line.strip().startswith("per_device_train_batch_size:")}


def _with_batch_sizes(text: str, sizes: dict[int, int]) -> str:
    lines = text.splitlines()
    for i, size in sizes.items():
        lines[i] = f"{lines[i].split(': ')[0]}: {size}"
    return "\n".join(lines) + "\n"


def test_two_processes_do_every_stage_once(tmp_path: Path) -> None:
    """One of them is the main one: a rank that takes itself for it deletes the other's checkpoints."""
    folder = tmp_path / "run"
    start(str(folder), 2)
    for stage in ("sft", "pairs", "dpo", "reward", "ppo", "rto", "evaluation"):
        assert (folder / stage / "done.json").is_file()
    for stage in ("dpo", "rto"):
        log = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in log if "loss" in row]
        assert steps == sorted(set(steps))
    assert list(results(folder)) == ["SFT", "DPO", "PPO", "RTO"]


def test_waiting_outlasts_the_time_out_of_exchanges() -> None:
    said = start("--nap", 2)
    assert "process 0 goes on" in said
    assert "process 1 goes on" in said
    assert said.count("done by [0, 1, 0, 1]") == 2  # each has done its share, and knows of the other's
    assert re.findall("the last one comes|gone", said) == [
        "the last one comes",
        "gone",
        "gone",
    ]  # and they go together
