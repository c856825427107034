"""A stage knows what it was made from, its time and its end; workers end with their parent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rto import stages
from rto.data.errors import DataError
from rto.finite import NotFiniteError
from rto.stages import digest_of, stage


def run(folder: Path, inputs: Mapping[str, str | None], work: Callable[[Path], None] = lambda _: None) -> bool:
    """Do a stage; whether there was work."""
    with stage(folder, lambda: inputs, lambda _: None, main=True) as found:
        if found is not None:
            work(found)
    return found is not None


def checkpoint(folder: Path) -> None:
    (folder / "checkpoint-1").mkdir()
    for name in ("complete.json", "weights"):
        (folder / "checkpoint-1" / name).write_text("{}")


def test_a_change_of_any_input_is_refused_by_name(tmp_path: Path) -> None:
    inputs: dict[str, str | None] = {"sft": "a" * 32, "data.pairs": "b" * 32, "hub": None}
    assert run(tmp_path, inputs)
    assert not run(tmp_path, inputs)
    assert not run(tmp_path, {**inputs, "hub": "c" * 32, "new in this version": "d" * 32})  # what was not known
    for name in ("sft", "data.pairs"):
        with pytest.raises(DataError, match=f"{tmp_path} was made from another {name} .*delete this folder"):
            run(tmp_path, {**inputs, name: "e" * 32})


def test_done_comes_before_checkpoints_go_and_seals_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each of these moments, a run goes on."""

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, {}, checkpoint)
    assert (tmp_path / "done.json").is_file()
    assert [p.name for p in (tmp_path / "checkpoint-1").iterdir()] == ["weights"]
    assert not run(tmp_path, {})
    assert not (tmp_path / "checkpoint-1").exists()


def test_seconds_are_of_all_attempts(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        time.sleep(0.3)
        (folder / "log.jsonl").write_text("{}\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {}, killed)
    assert run(tmp_path, {}, lambda _: time.sleep(0.1))
    assert json.loads((tmp_path / "done.json").read_text())["seconds"] >= 0.4
    assert not (tmp_path / "attempt.json").exists()


def test_a_stage_with_weights_that_are_not_finite_is_not_done(tmp_path: Path) -> None:
    bad = {"w": torch.tensor([1.0, torch.nan])}
    with pytest.raises(NotFiniteError, match=r"model\.safetensors: the weight w is not finite"):
        run(tmp_path, {}, lambda folder: save_file(bad, folder / "model.safetensors"))
    assert not (tmp_path / "done.json").exists()


def test_digests_see_a_byte_a_name_and_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.json").write_text("1")
    seen = {digest_of(folder), digest_of(folder / "a.json")}
    (folder / "a.json").write_text("22")
    seen |= {digest_of(folder), digest_of(folder / "a.json")}
    (folder / "a.json").rename(folder / "b.json")
    seen.add(digest_of(folder))
    assert len(seen) == 5
    assert digest_of(folder, ("*.safetensors",)) != digest_of(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert digest_of("someone/model") is None
    ref = tmp_path / "hub" / "models--someone--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("0123abc\n")
    assert digest_of("someone/model") == "0123abc"


PARENT = """
import os, sys, time
from rto.workers import end_with
parent = os.getpid()
child = os.fork()
if not child:
    end_with(parent)
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_parent(signum: int) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)  # it asks the system to be told
        parent.send_signal(signum)
        parent.wait(20)
        deadline = time.monotonic() + 20
        while (alive := at_work(child)) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not alive


def at_work(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As ``rto --help | head -0``."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "rto", "--help"], stdout=gone, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
