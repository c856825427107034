"""What a checkpoint holds of an on-line run besides models and optimizer, the rollouts in progress among it."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from rto.batches import Targets
from rto.files import write_atomically
from rto.trainers.checkpoints import CheckpointError

STATE = "rto_state.json"


def save_state(folder: Path, state: dict[str, Any], *, processes: int) -> None:
    """Credit assignment and the seconds of the iteration so far; by the main process."""
    write_atomically(folder / STATE, json.dumps({**state, "processes": processes}))


def load_state(folder: Path, *, processes: int) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        CheckpointError: it was written by another number of processes.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["processes"] != processes:
        raise CheckpointError(
            f"{folder} was written by {state['processes']} processes, this run has {processes}: resume with as many"
        )
    return dict(state)


def save_targets(folder: Path, targets: Targets, *, rank: int) -> None:
    """The rollouts of one process that updates are left for."""
    tensors = {name: x.cpu().contiguous() for name, x in targets.tensors().items()}
    safetensors.torch.save_file(tensors, _targets_of(folder, rank), metadata={"version": str(targets.version)})


def load_targets(folder: Path, *, rank: int) -> Targets | None:
    """What `save_targets` wrote; None where the checkpoint falls between two rollouts."""
    path = _targets_of(folder, rank)
    if not path.is_file():
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        version = int((file.metadata() or {}).get("version", 0))  # checkpoints of earlier versions say none
    absent: dict[str, Any] = dict.fromkeys(("old_values", "returns"))
    return Targets(**absent | safetensors.torch.load_file(path), version=version)


def _targets_of(folder: Path, rank: int) -> Path:
    return folder / f"rollout_{rank}.safetensors"
