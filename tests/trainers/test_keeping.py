"""Checkpoints know their bytes and their run; a folder has one process; signals save; logs survive damage."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from killable import WORDS, build
from preferring import ROWS
from safetensors import SafetensorError
from transformers.trainer_utils import IntervalStrategy

from rto import PreferenceConfig, PreferenceTrainer, signals
from rto.data.errors import DataError
from rto.files import alone, write_atomically
from rto.trainers.checkpoints import (
    SEAL,
    CheckpointError,
    check_seal,
    checkpoints,
    last_checkpoint,
    remove,
    rotate,
    seal,
)
from rto.trainers.logs import keep_lines


def prefer(folder: str, output: Path, **kwargs: Any) -> PreferenceTrainer:
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "logging_steps": 3,  # not a divisor of save_steps: a checkpoint falls between two logs
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
    }
    rows = kwargs.pop("rows", ROWS)
    return PreferenceTrainer(folder, PreferenceConfig(**settings | kwargs), train_dataset=Dataset.from_list(rows))


def sealed(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 64)
    seal(folder)
    return folder


def test_a_flipped_byte_is_found_and_an_old_seal_is_accepted(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    check_seal(folder)
    data = bytearray((folder / "weights").read_bytes())
    data[5000] ^= 1
    (folder / "weights").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint-1/weights has other bytes than were written"):
        check_seal(folder)
    (folder / SEAL).write_text(json.dumps({"files": {"weights": len(data)}}))  # of an earlier version
    check_seal(folder)
    for damage in ("", "[]", '{"files": 3}', "\0", "[" * 100_000):
        (folder / SEAL).write_text(damage)
        with pytest.raises(CheckpointError, match=f"{SEAL} cannot be read"):
            check_seal(folder)


def test_removal_unseals_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, what is left is no checkpoint, and the run goes on from the one before."""
    for step in (1, 2, 3):
        sealed(tmp_path / f"checkpoint-{step}")
    monkeypatch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "checkpoint-3")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 7}, "seed is 42 there and 7 here"),
        ({"learning_rate": 0.5}, "learning_rate is 0.01 there and 0.5 here"),
        ({"num_train_epochs": 5}, "num_train_epochs is 2 there and 5 here"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size is 4 there and 2 here"),
        ({"rows": ROWS[:-1]}, "rows of train_dataset is 16 there and 15 here"),
        ({"rows": [*ROWS[:-1], {**ROWS[-1], "chosen": "other"}]}, "digest of train_dataset is"),
        ({"loss": "ipo"}, "loss is 'dpo' there and 'ipo' here"),
    ],
)
def test_resume_knows_its_run(changes: dict, says: str, tiny_folder: Path, tmp_path: Path) -> None:
    prefer(str(tiny_folder), tmp_path, max_steps=2).train()
    same = {"max_tokens_per_micro_batch": 64, "save_steps": 1, "logging_steps": 1}  # these may change
    prefer(str(tiny_folder), tmp_path, max_steps=2, **same).train("last")
    with pytest.raises(CheckpointError, match="belongs to another run") as error:
        prefer(str(tiny_folder), tmp_path, max_steps=2, **changes).train(resume_from_checkpoint=True)
    assert says in str(error.value)


def test_another_model_is_another_run(tiny_folder: Path, dpo_folder: Path, tmp_path: Path) -> None:
    prefer(str(tiny_folder), tmp_path, max_steps=2).train()
    with pytest.raises(CheckpointError, match="weights of model is '"):
        prefer(str(dpo_folder), tmp_path, max_steps=2).train("true")


def test_starting_anew_sets_the_other_run_aside(tiny_folder: Path, tmp_path: Path) -> None:
    prefer(str(tiny_folder), tmp_path).train()
    log = (tmp_path / "log.jsonl").read_text()
    prefer(str(tiny_folder), tmp_path, seed=7, max_steps=2).train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert [p.name for p in checkpoints(tmp_path / "earlier-1")][-1] == "checkpoint-8"
    assert (tmp_path / "earlier-1" / "log.jsonl").read_text() == log
    prefer(str(tiny_folder), tmp_path, seed=7, max_steps=2).train("last")


def test_losses_and_time_are_of_all_attempts(tiny_folder: Path, tmp_path: Path) -> None:
    def rows(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().split("\n")[:-1]]
        return [{k: v for k, v in row.items() if "per_second" not in k and "runtime" not in k} for row in lines]

    prefer(str(tiny_folder), tmp_path / "whole").train()
    prefer(str(tiny_folder), tmp_path / "cut").train()
    for path in checkpoints(tmp_path / "cut"):
        if path.name != "checkpoint-4":
            remove(path)
    progress = tmp_path / "cut" / "checkpoint-4" / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "seconds": 1000.0}))
    seal(progress.parent)
    again = prefer(str(tiny_folder), tmp_path / "cut")
    assert again.train("last").metrics["train_runtime"] > 1000
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_of_several_writers_one_comes_last_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    path, texts = tmp_path / "x.json", [c * 100_000 for c in "abcd"]

    def write(text: str) -> None:
        for _ in range(20):
            write_atomically(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    whole = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: No space left")]
)
def test_a_disk_that_is_full_at_the_end_is_told_with_the_path(
    error: Exception, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prefer(str(tiny_folder), tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(run, "_save", full)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be written .*No space left.*make room"):
        run.save_model()
    monkeypatch.setattr(os, "fsync", full)
    if isinstance(error, OSError):
        with pytest.raises(OSError, match="No space left") as caught:
            write_atomically(tmp_path / "x.json", "{}")
        assert caught.value.filename == str(tmp_path / "x.json")
        assert not list(tmp_path.glob("x.json*"))


def test_one_process_a_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from rto.files import alone\nwith alone(Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with alone(tmp_path), alone(tmp_path):  # within a process it may be nested
        held = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert f"is in use by another process (process {os.getpid()} on " in held.stderr
    assert subprocess.run(command, timeout=60).returncode == 0
    (tmp_path / "lock").write_text("process 1 on mars")  # of a process that has died
    assert subprocess.run(command, timeout=60).returncode == 0
    assert not (tmp_path / "lock").exists()


def test_a_second_trainer_is_refused(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    run = prefer(str(tiny_folder), tmp_path / "run")
    with (tmp_path / "run" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is in use by another process"):
            run.train()


def test_a_signal_ends_the_update_saves_and_stops(tiny_folder: Path, tmp_path: Path) -> None:
    whole = prefer(str(tiny_folder), tmp_path / "whole")
    whole.train()
    run = prefer(str(tiny_folder), tmp_path / "cut", save_strategy="no")
    original = run.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if run.state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    run.training_step = training_step
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        signals.listen()
        with pytest.raises(signals.Interrupted, match="step 5 is saved") as stop:
            run.train()
        signals.listen()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert stop.value.signum == signal.SIGTERM
    again = prefer(str(tiny_folder), tmp_path / "cut", save_strategy="no")
    again.train("last")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_a_signal_that_a_destructor_would_swallow_still_stops(capsys: pytest.CaptureFixture) -> None:
    """Python reports and drops what a destructor raises."""

    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def command() -> int:
        made = Dying()
        del made
        threading.Event().wait(20)
        return 0

    before = sys.unraisablehook
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert signals.in_one_line(command)() == 128 + signal.SIGTERM
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert capsys.readouterr().err == "rto: stopped by SIGTERM\n"
    assert sys.unraisablehook is before


def test_damaged_lines_are_dropped_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n\x00\xff\n[1]\n{"loss": 2}\n{"step": 2}\n{"step": 3, "lo')
    keep_lines(log, lambda row: row["step"] <= 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "3 damaged lines are dropped, the first is line 2" in caplog.text


def test_a_full_disk_is_told_with_the_path(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before it stays, and the run goes on from there when there is room."""
    run = prefer(str(tiny_folder), tmp_path)
    original = run._save_rng_state

    def full(folder: str) -> None:
        if folder.endswith("checkpoint-4"):
            raise OSError(28, "No space left on device", f"{folder}/rng_state.pth")
        original(folder)

    run._save_rng_state = full
    with pytest.raises(CheckpointError, match=r"checkpoint-4 cannot be written .*No space left on device.*make room"):
        run.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    prefer(str(tiny_folder), tmp_path).train("last")


def test_evaluation_within_training_is_marked(tiny_folder: Path, dpo_folder: Path, tmp_path: Path) -> None:
    run = build(str(tiny_folder), str(dpo_folder), str(tmp_path), eval_steps=4)
    run.args.eval_strategy = IntervalStrategy.STEPS
    run.eval_dataset = run.train_dataset[:5]
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().split("\n")[:-1]]
    marked = {row["step"] for row in rows if row.get("split") == "eval"}
    assert marked == {4, 8, 12}
    assert {row["step"] for row in rows if "split" not in row} == {0, 2, 4, 6, 8, 10}
    assert len(WORDS) == 16
