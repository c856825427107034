"""Memory of each process while models are read and cut, exported, and in an iteration, beside what a plan says.

    torchrun --nproc_per_node 2 benchmarks/sharded_memory.py                  # 148 M parameters, file in bf16
    torchrun --nproc_per_node 2 benchmarks/sharded_memory.py --stored float32
    torchrun --nproc_per_node 2 benchmarks/sharded_memory.py --size 52M --iterations layer    # or: once (gather_once)
    torchrun --nproc_per_node 2 benchmarks/sharded_memory.py --adapters       # roles on one base, in fp32

A policy, its critic and its reference (PPO), FSDP2 over gloo on CPU processes (accelerate is told that a CPU is an
accelerator, as in the tests), bf16. Measured is what a process has of its own (``RssAnon``): pages of a mapped file
are the system's, shared by all processes of a host and given back when it needs them. Figures are above what the
process had after its imports; freed blocks go back to the system (`memory.py`). An iteration is 4 rollouts a process
of 64 + 64 tokens and two updates of two passes.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from collectives import tokenizer
from memory import GIVE_BACK

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tests" / "trainers"))
import sharded  # noqa: E402

MB = 1e6
SIZES = {
    "52M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 16, "num_attention_heads": 8},
    "148M": {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 10, "num_attention_heads": 14},
}
TOKENS = 64
"""Of a prompt, and of a completion."""
VOCABULARY = {"52M": 1000, "148M": 32_000}


class Peak:
    """The most memory of its own that this process has had since the last look, bytes."""

    def __init__(self) -> None:
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def since(self) -> int:
        """The peak; from here on another one."""
        most, self.most = max(self.most, anonymous()), anonymous()
        return most

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, anonymous())


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory is a process's own")


def llama(size: str) -> LlamaConfig:
    return LlamaConfig(
        **SIZES[size],
        vocab_size=VOCABULARY[size],
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def write_model(folder: Path, size: str, stored: str) -> None:
    """A random Llama with a tokenizer of characters."""
    AutoModelForCausalLM.from_config(llama(size)).to(getattr(torch, stored)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def measure(folder: str, output: str, iterations: str | None, adapters: bool) -> dict[str, Any]:
    """Peaks of this process in each phase, MB above where it began, and the sizes of the models."""
    from rto import RTOConfig, RTOTrainer
    from rto.rollout.samplers.transformers import TransformersSampler

    warm = torch.nn.Linear(64, 64)
    warm(torch.ones(1, 64)).sum().backward()
    args = RTOConfig(
        output_dir=output,
        fsdp=True,
        bf16=not adapters,
        use_cpu=True,
        dpo_coef=0.0,
        gather_once=iterations == "once",
        per_device_train_batch_size=4,
        num_mini_batches=2,
        max_tokens_per_micro_batch=2 * TOKENS,
        max_completion_length=TOKENS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": "ab" * (TOKENS // 2)}] * 16)
    peak = Peak()
    before = peak.since()
    lora = LoraConfig(r=8, target_modules="all-linear") if adapters else None
    trainer = RTOTrainer(folder, args, reward_funcs=lengths, train_dataset=rows, peft_config=lora)
    trainer.engine.ready(trainer.model)
    found = {"read and cut": peak.since(), "at rest": anonymous()}
    trainer.save_model()
    found["exported"] = peak.since()
    if iterations:
        config, pad = trainer.sampler.config, trainer.sampler.pad_id
        trainer.sampler = TransformersSampler(config=config, eos_ids=(), pad_id=pad)  # all of full length
        for name in ("sample", "score", "update"):
            setattr(trainer, name, _until(peak, found, name, getattr(trainer, name)))
        trainer.train()
        found["update"] = max(found["update"], peak.since())
    models = {"policy": trainer.model.policy, "critic": trainer.model.value_model, "reference": trainer.reference}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {**{name: round((x - before) / MB) for name, x in found.items()}, "parameters": sizes}


def _until(peak: Peak, found: dict[str, int], name: str, work: Any) -> Any:
    """Keep the most memory from the end of the phase before until this one's: an optimizer's step is an update's."""

    def done(*args: Any, **kwargs: Any) -> Any:
        before = peak.since()
        if "update" in found and name == "sample":
            found["update"] = max(found["update"], before)
        result = work(*args, **kwargs)
        found[name] = peak.since()
        return result

    return done


def planned(size: str, devices: int, once: bool) -> dict[str, float]:
    """What `rto plan` says of the same iteration, MB."""
    from rto.planning.configs import shape_of
    from rto.planning.job import Iteration
    from rto.planning.memory import Placement, Role

    shape = shape_of(llama(size), size)
    policy, critic = (
        Role(name=name, shape=shape, trained=True, speaks=name == "policy") for name in ("policy", "critic")
    )
    iteration = Iteration(
        policy=policy,
        critic=critic,
        frozen=(Role(name="reference", shape=shape, trained=False),),
        rollouts=4,
        prompt=TOKENS,
        response=TOKENS,
        tokens=2 * TOKENS,
        decoded=2**33,
        epochs=1,
        mini_batches=2,
        checkpointing=False,
        once=once,
    )
    found: dict[str, float] = {}
    for phase in iteration.phases(Placement(devices=devices, sharded=True, compute=2, packed=True)):
        name = phase.name.split()[0]
        found[name] = max(found.get(name, 0.0), phase.memory.total / MB)
    return found


def lengths(completions: list[str], **columns: Any) -> list[float]:
    """A reward."""
    return [float(len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="148M")
    parser.add_argument("--stored", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--iterations", choices=["layer", "once"], help="two of them, too; how updates gather")
    parser.add_argument("--adapters", action="store_true", help="new ones on one base, and all of it in fp32")
    parser.add_argument("--json", help="write what is found here, too")
    flags = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in GIVE_BACK.items()):  # read when a process begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **GIVE_BACK})
    sharded.call_it_an_accelerator()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    root = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(root)
    if dist.get_rank() == 0:
        write_model(Path(root[0]) / "model", flags.size, flags.stored)
    dist.barrier()
    found: list[Any] = [None] * dist.get_world_size()
    folder, output = (str(Path(root[0]) / name) for name in ("model", "run"))
    dist.all_gather_object(found, measure(folder, output, flags.iterations, flags.adapters))
    if dist.get_rank() == 0:
        sizes = found[0]["parameters"]
        print({name: f"{4 * n / MB:.0f} MB in fp32" for name, n in sizes.items()})
        print("| MB of a process's own | plan | " + " | ".join(f"process {i}" for i in range(len(found))) + " |")
        print("|---|---|" + "---|" * len(found))
        plan = planned(flags.size, len(found), flags.iterations == "once") if flags.iterations else {}
        for phase in ("read and cut", "at rest", "exported", *plan):
            said = f"{plan[phase]:.0f}" if phase in plan else ""
            print(f"| {phase} | {said} | " + " | ".join(str(one[phase]) for one in found) + " |")
        if flags.json:
            Path(flags.json).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
