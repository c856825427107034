"""The next batch is drawn while the present one is learned from: its weights are those of one version before."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from rto.batches import Samples
from rto.rollout.samplers.base import Sampler


class Ahead:
    """At most one batch under way, by its iteration.

    Drawing goes on in a thread that waits for an engine elsewhere; weights go over before it, in the caller's.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._iteration: int | None = None
        self._drawing: Future[Samples] | None = None

    def begin(
        self, policy: nn.Module, prompts: list[list[int]], seeds: Sequence[int], *, iteration: int, version: int
    ) -> None:
        """Draw the batch of an iteration with the policy's present weights."""
        assert self._drawing is None, "one batch at a time"
        self.sampler.sync(policy, version)
        self._iteration, self._drawing = iteration, self._pool.submit(self.sampler.draw, prompts, seeds)

    def wait(self) -> None:
        """Until nothing is being drawn; whatever went wrong is raised when the batch is taken."""
        if self._drawing is not None:
            self._drawing.exception()

    def take(self, iteration: int) -> Samples | None:
        """The batch of this iteration; None where none was begun, or another.

        Raises:
            SamplerError: drawing it went wrong.
        """
        drawing, begun = self._drawing, self._iteration
        self._drawing = self._iteration = None
        return drawing.result() if drawing is not None and begun == iteration else None

    def save(self, path: Path) -> None:
        """The batch under way, when it is there: a run that is resumed learns from the same one."""
        if self._drawing is None:
            return
        samples = self._drawing.result()
        says = {"iteration": str(self._iteration), "version": str(samples.version)}
        tensors = {name: x.cpu().contiguous() for name, x in samples.tensors().items()}
        safetensors.torch.save_file(tensors, path, metadata=says)

    def load(self, path: Path, device: Any) -> None:
        """What `save` wrote, if it wrote something."""
        if not path.is_file():
            return
        with safetensors.safe_open(path, framework="pt") as file:
            says = file.metadata()
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._iteration, self._drawing = int(says["iteration"]), Future()
        self._drawing.set_result(Samples(**tensors, version=int(says["version"])).to(device))
