"""vLLM as an engine: in this process, or behind `vllm serve`.

Neither loads weights from the policy's folder twice. In this process the engine starts with random ones, and every
`load` hands over tensors, adapters merged into them. A server gets a file of all weights through our worker extension
(`rto.rollout.samplers.vllm_worker`); of a LoRA policy the base goes once, then the adapter alone, through vLLM's own
route.
"""

import http.client
import json
import logging
import os
import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import safetensors.torch
import torch
from torch import Tensor, nn

from rto.models.loading import max_positions, unwrap_peft
from rto.rollout.samplers.base import SamplerError, SamplingConfig
from rto.rollout.samplers.engines import Drawn
from rto.rollout.samplers.plain import keep_weights_plain
from rto.rollout.samplers.transformers import cache_bytes
from rto.rollout.samplers.weights import is_adapted, named_weights, write_adapter

logger = logging.getLogger(__name__)
INSTALL = (
    "vLLM is not installed: `pip install vllm` where there is a GPU (docs/samplers.md has processors), or "
    "use_vllm=False"
)


def sampling_params(config: SamplingConfig, seed: int, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``SamplingParams``: our distribution and stop ids, nothing of the model's own."""
    return {
        "n": 1,
        "max_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "ignore_eos": True,
        "stop_token_ids": [i for i in stop_ids if i >= 0],
        "logprobs": 0,
        "detokenize": False,
    }


def why(finish_reason: str | None, tokens: Sequence[int], stop_ids: tuple[int, ...]) -> int:
    """`Samples.stopped` of what vLLM says."""
    if tokens and tokens[-1] in stop_ids:
        return 1
    return 0 if finish_reason == "length" else 2


class Colocated:
    """vLLM in this process, on its device.

    Args:
        dtype: precision of the engine's weights, by torch's name; None means the policy's.
        sleep: give memory back between `rest` and `load`, where vLLM's platform can.
        arguments: keyword arguments of ``vllm.LLM``.

    Raises:
        SamplerError: vLLM is not installed.
    """

    name = "vLLM"

    def __init__(self, *, dtype: str | None = None, sleep: bool = False, **arguments: Any) -> None:
        self.dtype, self.sleep, self.arguments = dtype, sleep, arguments
        self._engine: Any = None
        self._asleep = False
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's model is then an object of this process
        try:
            from vllm import SamplingParams  # noqa: F401
        except ImportError as error:
            raise SamplerError(f"{INSTALL} ({error})") from error

    def load(self, policy: nn.Module) -> None:
        """See `Engine`. The first time, the engine is started."""
        if self._engine is None:
            self._engine = self._start(policy)
        elif self._asleep:
            self._engine.wake_up()
            self._asleep = False
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(policy)})
        self._engine.reset_prefix_cache()

    def complete(
        self, prompts: list[list[int]], seeds: Sequence[int], config: SamplingConfig, stop_ids: tuple[int, ...]
    ) -> list[Drawn]:
        """See `Engine`."""
        from vllm import SamplingParams

        how = [SamplingParams(**sampling_params(config, seed, stop_ids)) for seed in seeds]
        asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
        with _random_states():
            outputs = self._engine.generate(asked, how, use_tqdm=False)
        drawn = []
        for (output,) in (request.outputs for request in outputs):
            tokens = list(output.token_ids)
            logp = [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]
            drawn.append(Drawn(tokens, logp, why(output.finish_reason, tokens, stop_ids)))
        return drawn

    def rest(self) -> None:
        """See `Engine`."""
        if self.sleep:
            self._engine.sleep(level=2)  # weights are handed over again before the next draw
            self._asleep = True

    def _start(self, policy: nn.Module) -> Any:
        """An engine of the policy's shape with random weights: what it computes is what `load` gives it."""
        from vllm import LLM
        from vllm.platforms import current_platform

        settings = self._on_processors(policy) if current_platform.is_cpu() else {}
        if self.sleep and not current_platform.is_sleep_mode_available():
            logger.warning("vllm_enable_sleep_mode: vLLM cannot sleep on this platform and keeps its memory")
            self.sleep = False
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's own threads stay as they are
        keep_weights_plain()
        folder = tempfile.mkdtemp(prefix="rto-vllm-")
        inner = unwrap_peft(policy)
        inner.config.save_pretrained(folder)
        threads = torch.set_num_threads
        try:
            with _random_states():
                return LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    dtype=self.dtype or str(next(inner.parameters()).dtype).removeprefix("torch."),
                    logprobs_mode="processed_logprobs",
                    enable_sleep_mode=self.sleep,
                    seed=0,
                    **self.arguments | settings,
                )
        except (ValueError, NotImplementedError) as error:
            raise SamplerError(f"vLLM does not start: {' '.join(str(error).split())[:300]}") from error
        finally:
            torch.set_num_threads = threads  # on processors vLLM takes this function away
            shutil.rmtree(folder, ignore_errors=True)

    def _on_processors(self, policy: nn.Module) -> dict[str, Any]:
        # No kernels are compiled, and the cache is as large as the rows need: vLLM's own measure of what is free takes
        # the trainer's memory for its own.
        rows, block = self.arguments.get("max_num_seqs") or 256, 128
        length = self.arguments.get("max_model_len") or max_positions(policy) or 2048
        need = rows * (length + block) * cache_bytes(policy)
        share = self.arguments.get("gpu_memory_utilization", 0.3) * psutil.virtual_memory().total
        return {"enforce_eager": True, "kv_cache_memory_bytes": int(min(need, share))}


@contextmanager
def _random_states() -> Iterator[None]:
    """What a library seeds, draws and sets, it puts back: a run's own random numbers go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def is_main() -> bool:
    """Whether this process speaks for all of its run."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def by_main(work: Callable[[], None]) -> None:
    """The main process does it, when all have come here; if it fails, all fail.

    Raises:
        SamplerError: what the main process met.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return work()
    torch.distributed.barrier()
    met: list[str | None] = [None]
    if is_main():
        try:
            work()
        except SamplerError as error:
            met = [str(error)]
    torch.distributed.broadcast_object_list(met)
    if met[0] is not None:
        raise SamplerError(met[0])
    return None


ADAPTER = "rto-policy"
"""What adapters are called on a server, with a number behind."""
CONNECTIONS = 64
"""Requests that are under way at a time; the server makes its batches of them."""


class RefusedError(SamplerError):
    """A server is there, and answers with an error."""


class Server:
    """`vllm serve`, started by ``python -m rto.rollout.samplers.vllm_server`` or with what that sets.

    Args:
        base_url: like ``http://localhost:8000``.
        timeout: seconds that a request may take: to draw one completion beside all others, or to load weights.
        folder: where weights are written for the server to read, on a file system that both see; None means a
            temporary folder of this machine.

    Raises:
        SamplerError: the address is none, or nothing answers there.
    """

    def __init__(self, base_url: str, *, timeout: float = 240.0, folder: str | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SamplerError(f"vllm_server_base_url must be like http://localhost:8000, got {base_url}")
        self.base_url, self.timeout, self.parts = base_url.rstrip("/"), timeout, parts
        self.name = f"the vLLM server at {self.base_url}"
        self._folder = Path(tempfile.mkdtemp(prefix="rto-vllm-", dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._loads = 0
        self._has_base = False
        self._model: str = self._ask("GET", "/v1/models")["data"][0]["id"]
        self._base = self._model

    def load(self, policy: nn.Module) -> None:
        """See `Engine`."""
        self._loads += 1  # names and paths that were not used before: nothing that older weights left is used again
        at = self._folder / str(self._loads)
        if is_adapted(policy):
            self._send_base(policy)
            by_main(lambda: self._send_adapter(policy, at))
            self._model = f"{ADAPTER}-{self._loads}"
        else:
            by_main(self._send_weights(named_weights(policy), at))
            self._model = self._base
        for older in self._folder.iterdir():
            if older != at or not is_adapted(policy):
                shutil.rmtree(older, ignore_errors=True)

    def _send_base(self, policy: nn.Module) -> None:
        """What an adapter is added to, once: the server may have another run's weights.

        A server without our extension keeps what it started with; the first sync's check says whether that is right.
        """
        if self._has_base:
            return
        self._has_base = True
        at = self._folder / "base"
        send = self._send_weights(named_weights(policy, merged=False), at)

        def try_to() -> None:
            with suppress(RefusedError):
                send()

        by_main(try_to)

    def _send_adapter(self, policy: nn.Module, at: Path) -> None:
        """The server may read the folder again as long as the adapter is in use."""
        write_adapter(policy, at)
        what = {"lora_name": f"{ADAPTER}-{self._loads}", "lora_path": str(at)}
        self._ask("POST", "/v1/load_lora_adapter", what, remedy=ADAPTERS)
        if self._model != self._base:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": self._model}, remedy=ADAPTERS)

    def _send_weights(self, named: Iterable[tuple[str, Tensor]], at: Path) -> Callable[[], None]:
        weights = {}
        for name, x in named:  # a sharded policy is gathered, which takes all processes
            if is_main():
                weights[name] = x.cpu().contiguous()

        def send() -> None:
            at.mkdir()
            safetensors.torch.save_file(weights, at / "weights.safetensors")
            what = {"method": "load_file", "args": [str(at / "weights.safetensors")], "timeout": self.timeout}
            self._ask("POST", "/collective_rpc", what, remedy=EXTENSION)
            self._ask("POST", "/reset_prefix_cache", remedy=EXTENSION)

        return send

    def complete(
        self, prompts: list[list[int]], seeds: Sequence[int], config: SamplingConfig, stop_ids: tuple[int, ...]
    ) -> list[Drawn]:
        """See `Engine`. One request a prompt, so that each has its own seed."""

        def one(prompt: list[int], seed: int) -> Drawn:
            what = {
                "model": self._model,
                "token_ids": prompt,
                "sampling_params": sampling_params(config, seed, stop_ids),
                "stream": False,
            }
            (choice,) = self._ask("POST", "/inference/v1/generate", what)["choices"]
            tokens, content = choice["token_ids"], choice["logprobs"]["content"]
            logp = [at["logprob"] for at in content]
            return Drawn(tokens, logp, why(choice["finish_reason"], tokens, stop_ids))

        with ThreadPoolExecutor(min(CONNECTIONS, len(prompts))) as pool:
            return list(pool.map(one, prompts, seeds))

    def rest(self) -> None:
        """See `Engine`; a server goes on being there."""

    def _ask(self, method: str, route: str, body: Any = None, *, remedy: str = "") -> Any:
        """One request.

        Raises:
            SamplerError: it is refused, cut off or takes too long, or the server answers with an error.
        """
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.parts.hostname or "", self.parts.port, timeout=self.timeout)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(
                method, self.parts.path.rstrip("/") + route, content, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise SamplerError(
                f"{self.name} does not answer ({str(error) or type(error).__name__}): start it again, and resume the "
                "run from its last checkpoint"
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            said = " ".join(text.split())[:300]
            raise RefusedError(f"{self.name} answers {response.status} to {route}: {said}{remedy}")
        try:
            return json.loads(text)
        except ValueError:
            return text


START = "python -m rto.rollout.samplers.vllm_server MODEL"
EXTENSION = f". Whole weights need our worker extension and vLLM's development routes: start it with `{START}`"
ADAPTERS = f". An adapter needs a server that takes them: start it with `{START} --enable-lora`"
