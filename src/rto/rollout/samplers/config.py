"""Which sampler a run draws with, and how its distance to the policy is made up for."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from rto.functional.importance import MODES, Correction
from rto.models.loading import eos_ids, pad_id
from rto.ranges import COUNT, POSITIVE, POSITIVE_SHARE, Range
from rto.rollout.samplers.base import Sampler, SamplingConfig
from rto.rollout.samplers.engines import EngineSampler
from rto.rollout.samplers.second_process import SecondProcess
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.samplers.vllm import Colocated, Server
from rto.values import check_choice

logger = logging.getLogger(__name__)
VLLM_MODES = ("colocate", "server")


@dataclass(repr=False)
class VLLMArguments:
    """Arguments of on-line training that say who draws; names are those of TRL's ``GRPOConfig``.

    Attributes:
        use_vllm: draw with vLLM instead of transformers.
        vllm_mode: colocate, in the trainer's process and on its device; or server, over HTTP.
        vllm_server_base_url: where the server is; host and port below are then not read.
        vllm_server_timeout: seconds that a request may take.
        vllm_sync_folder: where weights are written for the server, on a file system that both see; None means a
            temporary folder of this machine.
        vllm_gpu_memory_utilization: share of the device's memory that vLLM takes in colocate mode; on processors, of
            the machine's.
        vllm_max_model_length: longest prompt and completion that vLLM makes room for; None goes by the model.
        vllm_enable_sleep_mode: vLLM gives its memory back during the update, where its platform can.
        async_rollouts: 1 draws the next batch while the present one is learned from, by the server or, without vLLM,
            in a second process of this machine's processors; its weights are then one version old. 0 draws each batch
            when its turn has come.
        vllm_importance_sampling_correction: weigh the policy's loss by π/μ (`rto.functional.importance`), whatever
            draws: it is 1 to rounding where transformers do, in the policy's own precision.
        vllm_importance_sampling_mode: token or sequence, truncate or mask.
        vllm_importance_sampling_clip_max: the largest weight; None means any.
        vllm_importance_sampling_clip_min: the smallest; None means any.
    """

    use_vllm: bool = field(default=False, metadata={"help": "Draw with vLLM instead of transformers."})
    vllm_mode: str = field(default="colocate", metadata={"help": "colocate (in this process) or server."})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Like http://localhost:8000."})
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Where no base_url is given."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Where no base_url is given."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds that a request may take."})
    vllm_sync_folder: str | None = field(
        default=None, metadata={"help": "Where weights are written for the server; None: a temporary folder."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the device's memory for vLLM in colocate mode."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and completion in vLLM; None: the model's."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "vLLM gives memory back during the update, where it can."}
    )
    async_rollouts: int = field(
        default=0, metadata={"help": "1: draw the next batch while the present one is learned from."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Weigh the policy's loss by policy over sampler."}
    )
    vllm_importance_sampling_mode: str = field(default="token_truncate", metadata={"help": f"{', '.join(MODES)}."})
    vllm_importance_sampling_clip_max: float | None = field(
        default=2.0, metadata={"help": "The largest weight; None: any."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "The smallest weight; None: any."}
    )

    vllm_ranges: ClassVar[Mapping[str, Range]] = {
        "vllm_server_port": COUNT,
        "vllm_server_timeout": POSITIVE,
        "vllm_gpu_memory_utilization": POSITIVE_SHARE,
        "vllm_max_model_length": COUNT,
        "vllm_importance_sampling_clip_max": POSITIVE,
        "vllm_importance_sampling_clip_min": POSITIVE,
    }

    def check_vllm(self) -> None:
        """Refuse a mode that is none and bounds that leave nothing, and warn of samples that nothing weighs.

        Raises:
            ValueError: it is none, or no weight is within the bounds; the message names what is at fault.
        """
        check_choice("vllm_mode", self.vllm_mode, VLLM_MODES)
        check_choice("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, tuple(MODES))
        self.correction()
        if self.async_rollouts not in (0, 1):
            raise ValueError(
                f"async_rollouts={self.async_rollouts}: samples may be one version old at most; choose from 0, 1"
            )
        if self.async_rollouts and self.use_vllm and self.vllm_mode == "colocate":
            raise ValueError(
                "async_rollouts draws while the policy is learned, which a colocated engine cannot: use "
                "vllm_mode: server, or use_vllm=False for a second process"
            )
        if self.async_rollouts and not self.vllm_importance_sampling_correction:
            logger.warning(
                "async_rollouts learns from samples of the policy before, and "
                "vllm_importance_sampling_correction=False does not make up for it: the gradient is biased"
            )
        args: Any = self
        if (args.top_p < 1 or args.top_k) and not self.vllm_importance_sampling_correction:
            logger.warning(
                "top_p and top_k draw from another distribution than the policy's, and "
                "vllm_importance_sampling_correction=False does not make up for it: the gradient is biased"
            )

    def correction(self) -> Correction | None:
        """Weights of the policy's loss; None where they are off."""
        if not self.vllm_importance_sampling_correction:
            return None
        smallest, largest = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        return Correction(
            self.vllm_importance_sampling_mode,
            cap=math.inf if largest is None else largest,
            floor=0.0 if smallest is None else smallest,
        )


def sampler_of(args: Any, sampling: SamplingConfig, policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """The sampler that the arguments of on-line training ask for.

    Raises:
        SamplerError: vLLM is not installed, or the server does not answer.
        ValueError: models of this type cannot be sampled right by transformers.
    """
    if not args.use_vllm:
        ours = TransformersSampler.of(policy, tokenizer, sampling, max_cache_tokens=args.max_cache_tokens)
        if not args.async_rollouts:
            return ours
        return EngineSampler(SecondProcess(ours.pad_id, args.max_cache_tokens), sampling, ours.eos_ids, ours.pad_id)
    return EngineSampler(_engine(args), sampling, eos_ids(policy, tokenizer), pad_id(tokenizer))


def _engine(args: Any) -> Colocated | Server:
    if args.vllm_mode == "server":
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        return Server(url, timeout=args.vllm_server_timeout, folder=args.vllm_sync_folder)
    return Colocated(
        dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        sleep=args.vllm_enable_sleep_mode,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_len=args.vllm_max_model_length,
        max_num_seqs=min(args.per_device_train_batch_size, 256),
        **{"distributed_executor_backend": "external_launcher"} if args.world_size > 1 else {},
    )
