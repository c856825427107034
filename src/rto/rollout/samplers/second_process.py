"""An engine on transformers in a process of its own, on this machine's processors: it draws while the trainer learns.

    python -m rto.rollout.samplers.second_process FOLDER

is the process: requests come as lines of JSON, answers go the same way, weights come as files. It ends when nobody is
left to ask it.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rto.models.loading import unwrap_peft
from rto.rollout.samplers.base import SamplerError, SamplingConfig
from rto.rollout.samplers.engines import Drawn
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.samplers.weights import named_weights


class SecondProcess:
    """See `Engine`. It is given whole weights, adapters merged into them.

    Args:
        pad_id: id written where nothing was sampled.
        max_cache_tokens: as `TransformersSampler` has it.
    """

    name = "the process that draws"

    def __init__(self, pad_id: int, max_cache_tokens: int | None = None) -> None:
        self.pad_id, self.max_cache_tokens = pad_id, max_cache_tokens
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="rto-second-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._numbers = itertools.count()

    def load(self, policy: nn.Module) -> None:
        """See `Engine`. The first time, the process is started.

        Raises:
            SamplerError: it cannot be, or the policy is not on processors.
        """
        inner = unwrap_peft(policy)
        if next(inner.parameters()).device.type != "cpu":
            raise SamplerError(
                "async_rollouts on an accelerator needs another one to draw on: use_vllm with vllm_mode: server"
            )
        if self._process is None:
            inner.config.save_pretrained(self._folder)
            self._process = self._start()
        path = self._folder / f"weights_{next(self._numbers)}.safetensors"
        safetensors.torch.save_file({n: x.contiguous() for n, x in named_weights(policy)}, path)
        dtype = str(next(inner.parameters()).dtype).removeprefix("torch.")
        self._ask({"load": str(path), "dtype": dtype, "attention": inner.config._attn_implementation})
        path.unlink()

    def complete(
        self, prompts: list[list[int]], seeds: Sequence[int], config: SamplingConfig, stop_ids: tuple[int, ...]
    ) -> list[Drawn]:
        """See `Engine`."""
        sampler = {"eos_ids": stop_ids, "pad_id": self.pad_id, "max_cache_tokens": self.max_cache_tokens}
        rows = self._ask({"prompts": prompts, "seeds": list(seeds), "config": asdict(config), "sampler": sampler})
        return [Drawn(**row) for row in rows]

    def rest(self) -> None:
        """See `Engine`; the process waits."""

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        line = [sys.executable, "-m", "rto.rollout.samplers.second_process", str(self._folder)]
        process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        weakref.finalize(self, _end, process)
        return process

    def _ask(self, what: dict[str, Any]) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:  # a pipe that is broken, or an end where an answer should be
            raise SamplerError(
                f"{self.name} has ended (exit status {self._process.poll()}): resume the run from its last checkpoint"
            ) from error
        if "error" in answer:
            raise SamplerError(f"{self.name}: {answer['error']}")
        return answer["result"]


def _end(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.terminate()
    process.wait()


def serve(folder: str, requests: Iterable[str], answers: Any) -> None:
    """Answer until requests end."""
    model: Any = None
    answer: dict[str, Any]
    for line in requests:
        asked = json.loads(line)
        try:
            if "load" in asked:
                if model is None:
                    config = AutoConfig.from_pretrained(folder)
                    how = {"dtype": getattr(torch, asked["dtype"]), "attn_implementation": asked["attention"]}
                    model = AutoModelForCausalLM.from_config(config, **how).eval()
                model.load_state_dict(safetensors.torch.load_file(asked["load"]), strict=False)
                result: Any = None
            else:
                result = _drawn(model, asked)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        else:
            answer = {"result": result}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _drawn(model: nn.Module, asked: dict[str, Any]) -> list[dict[str, Any]]:
    settings = {**asked["sampler"], "eos_ids": tuple(asked["sampler"]["eos_ids"])}
    sampler = TransformersSampler(config=SamplingConfig(**asked["config"]), **settings)
    sampler.sync(model, 0)
    samples = sampler.draw(asked["prompts"], asked["seeds"])
    assert samples.sampler_logp is not None
    assert samples.stopped is not None
    rows = zip(samples.responses, samples.sampler_logp, samples.mask, samples.stopped.tolist())
    return [{"tokens": y[m].tolist(), "logp": p[m].tolist(), "stopped": stopped} for y, p, m, stopped in rows]


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    serve(sys.argv[1], sys.stdin, answers)
