"""RTO on vLLM: small random Llamas with heads of 64 numbers, which its attention on processors takes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from killable import WORDS
from peft import LoraConfig

from rto import RTOConfig, RTOTrainer

if find_spec("vllm") is None:  # `make vllm-test` has an environment of its own
    collect_ignore_glob = ["test_*.py"]

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}
LORA = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
KINDS = {"lora": LORA, "whole": {}}
START = 900
"""Seconds that a server may take to be there, on a machine that has other things to do."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, tokenizer: Any) -> dict[str, Path]:
    """A policy and a DPO model."""
    made = {}
    for seed, name in enumerate(("policy", "dpo")):
        made[name] = tmp_path_factory.mktemp(name)
        tiny_model(seed=seed, **SHAPE).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def run(folders: dict[str, Path], tmp_path: Path) -> Callable[..., RTOTrainer]:
    """Three iterations of steps that can be seen."""

    def build(kind: str, **kwargs: Any) -> RTOTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_mini_batches": 2,
            "total_episodes": 24,
            "max_completion_length": 12,
            "temperature": 0.8,
            "learning_rate": 0.02 if kind == "whole" else 0.1,
            "value_learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "use_vllm": True,
            "vllm_gpu_memory_utilization": 0.02,
        }
        return RTOTrainer(
            str(folders["policy"]),
            RTOConfig(**settings | kwargs),
            dpo_model=str(folders["dpo"]),
            reward_funcs=lambda completions, **columns: [float(text.count("b")) for text in completions],
            train_dataset=Dataset.from_list([{"prompt": word * (1 + i % 3)} for i, word in enumerate(WORDS)]),
            **KINDS[kind],
        )

    return build


class Served:
    """A server as its users start it."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log = folder, log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = ["--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--enable-lora"]
        options += ["--gpu-memory-utilization", "0.1", "--max-num-seqs", "16", "--max-lora-rank", "8"]
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rto.rollout.samplers.vllm_server", str(self.folder), *options],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        until = time.monotonic() + START
        while not self.is_there():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"the server does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(1)

    def is_there(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()


@pytest.fixture(scope="session")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(folders["policy"], tmp_path_factory.mktemp("server") / "log.txt")
    served.start()
    yield served
    served.kill()
