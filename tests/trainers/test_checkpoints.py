"""Nothing is lost: killed runs resume bit for bit, damaged checkpoints are named, processes agree."""

import json
import logging
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from killable import build
from preferring import prefer
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

import warm
from rto.trainers.checkpoints import SEAL, CheckpointError, check_seal, last_checkpoint
from rto.trainers.logs import keep_lines

RTO, PREFERENCE = (Path(__file__).with_name(name) for name in ("killable.py", "preferring.py"))


def start(*args: str, processes: int = 1, program: Path = RTO) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return warm.run(program, *args, processes=processes, environment=environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    policy = safetensors.torch.load_file(folder / "model.safetensors")
    critic = safetensors.torch.load_file(folder / "value_model" / "model.safetensors")
    return policy | {f"critic.{name}": x for name, x in critic.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, dpo_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = build(str(tiny_folder), str(dpo_folder), str(folder))
    run.train()
    run.save_model()
    return folder


@pytest.mark.parametrize(("where", "resumes_at"), [("mid-rollout", 3), ("half-written", 3), ("before-seal", 3)])
def test_killed_run_resumes_bit_for_bit(
    where: str, resumes_at: int, uninterrupted: Path, tiny_folder: Path, dpo_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL, then resume: the weights, the log and the samples of a run that was left alone."""
    killed = start(str(tiny_folder), str(dpo_folder), str(tmp_path), "--kill", where)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{resumes_at}")
    run = build(str(tiny_folder), str(dpo_folder), str(tmp_path))
    run.train(resume_from_checkpoint=True)
    run.save_model()

    expected, found = final_weights(uninterrupted), final_weights(tmp_path)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    assert comparable(tmp_path / "log.jsonl") == comparable(uninterrupted / "log.jsonl")
    assert (tmp_path / "completions.jsonl").read_text() == (uninterrupted / "completions.jsonl").read_text()


def comparable(log: Path) -> list[dict]:
    """The rows of a log without what a clock wrote."""
    rows = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    clock = ("seconds/", "tokens_per_second", "train_runtime", "train_samples_per", "train_steps_per")
    rows = [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]
    return [row for row in rows if "episodes" in row or "train_loss" in row]


def test_checkpoint_holds_everything(uninterrupted: Path) -> None:
    """Policy, critic, both optimizers' moments, schedule, random streams, controller, statistics, rollout."""
    folder = Path(last_checkpoint(uninterrupted) or "")
    for name in (
        *("model.safetensors", "value_model/model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("rto_state.json", "trainer_state.json", SEAL),
    ):
        assert (folder / name).is_file(), name
    state = json.loads((folder / "rto_state.json").read_text())
    assert state["score_moments"]["count"] > 0
    assert state["kl_control"]["coef"] != 0.01
    middle = sorted(uninterrupted.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert [p.name for p in middle] == ["checkpoint-9", "checkpoint-12"]  # save_total_limit
    assert (middle[0] / "rollout_0.safetensors").is_file()  # between the two updates of a rollout
    assert not (middle[1] / "rollout_0.safetensors").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "unseal"])
def test_damaged_checkpoint_is_refused_by_name(damage: str, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-12"
    folder.mkdir()
    for path in (uninterrupted / "checkpoint-12").rglob("*"):
        if path.is_file():
            (folder / path.relative_to(uninterrupted / "checkpoint-12")).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(uninterrupted / "checkpoint-12")).write_bytes(path.read_bytes())
    check_seal(folder)
    victim = folder / (SEAL if damage == "unseal" else "optimizer.pt")
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-10])
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name) as error:
        check_seal(folder)
    assert "delete this folder" in str(error.value)


def test_unsealed_folders_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert "checkpoint-7" in caplog.text


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "completion": "}')
    keep_lines(log, lambda row: row["step"] <= 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_two_processes_do_what_one_does(tiny_folder: Path, dpo_folder: Path, tmp_path: Path) -> None:
    """Half the batch on each of two processes gives the updates of the whole batch on one.

    With SGD: a step is then the gradient itself, where Adam would divide rounding noise by its own size.
    """
    folders = str(tiny_folder), str(dpo_folder)
    flags = "--batch", "4", "--greedy", "--mini_batches", "1", "--optim", "sgd"
    both = start(*folders, str(tmp_path / "two"), *flags, processes=2)
    assert both.returncode == 0, both.stderr[-2000:]
    run = build(*folders, str(tmp_path / "one"), batch=8, greedy=True, num_mini_batches=1, optim="sgd")
    run.train()
    run.save_model()
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)
    before = safetensors.torch.load_file(tiny_folder / "model.safetensors")
    assert max(float((one[name] - x).abs().max()) for name, x in before.items()) > 1e-3
    together = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert together == pytest.approx(run.evaluate(run.train_dataset[:5]), rel=1e-4, abs=1e-5)
    rows = comparable(tmp_path / "one" / "log.jsonl"), comparable(tmp_path / "two" / "log.jsonl")
    assert len(rows[0]) == len(rows[1]) == 7
    for a, b in zip(*rows):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_two_processes_prefer_as_one_does(tiny_folder: Path, tmp_path: Path) -> None:
    """Losses with a reference read beforehand, with KTO's global z₀, and with whole distributions."""
    losses = ["dpo", "kto", "tdpo"]
    both = start(str(tiny_folder), str(tmp_path / "two"), "4", *losses, processes=2, program=PREFERENCE)
    assert both.returncode == 0, both.stderr[-2000:]
    before = safetensors.torch.load_file(tiny_folder / "model.safetensors")
    for loss in losses:
        alone = prefer(str(tiny_folder), str(tmp_path / "one" / loss), loss, batch=8)
        one, two = (safetensors.torch.load_file(tmp_path / n / loss / "model.safetensors") for n in ("one", "two"))
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)
        assert max(float((one[name] - x).abs().max()) for name, x in before.items()) > 1e-3
        together = json.loads((tmp_path / "two" / loss / "evaluation.json").read_text())
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_a_share_of_training_is_no_mismatch_when_a_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """The library compares ``save_steps=0.25`` with the updates that it made of it; other differences stay."""
    state = TrainerState(train_batch_size=8, logging_steps=1, save_steps=2)
    args = TrainingArguments(output_dir="x", logging_steps=1, save_steps=0.25, use_cpu=True)
    with caplog.at_level(logging.WARNING, logger="transformers.trainer_utils"):
        compare_trainer_and_checkpoint_args(args, state)
        assert not caplog.records
        args.logging_steps = 3
        compare_trainer_and_checkpoint_args(args, state)
    assert "logging_steps: 3 (from args) != 1" in caplog.text
