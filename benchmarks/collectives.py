"""Bytes that processes exchange in one iteration of sharded RTO, beside those of FSDP of what is trained alone.

    torchrun --nproc_per_node 2 benchmarks/collectives.py                              # 2 micro-batches an update
    torchrun --nproc_per_node 2 benchmarks/collectives.py --prompts 128 --tokens 32    # 8

Random Llamas over gloo on CPU processes (accelerate is told that a CPU is an accelerator, as in the tests), bf16. An
iteration is a rollout and its updates. Counted is what a ring sends from each process: (N − 1)/N of what is gathered
or scattered, twice that of what is reduced everywhere. "Update" is FSDP's own work of training; all else is what RTO
adds: the policy gathered once for decoding and for its log-probabilities, the critic once, each frozen model once.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tests" / "trainers"))
import sharded  # noqa: E402

CALLS = {
    # function: which tensor is the whole one, how often a ring sends it
    "all_gather_single": (0, 1),
    "all_gather_into_tensor": (0, 1),
    "reduce_scatter_single": (1, 1),
    "reduce_scatter_tensor": (1, 1),
    "all_reduce": (0, 2),
    "broadcast": (0, 1),
}
NAMES = {"output_tensor": 0, "output": 0, "tensor": 0, "input_tensor": 1, "input": 1}


class Wire:
    """Bytes by phase and kind, from wrapped collectives of `torch.distributed`."""

    def __init__(self) -> None:
        self.phase, self.sent = "other", Counter[tuple[str, str]]()
        self._inside = False  # one may be made of another
        for name, (which, times) in CALLS.items():
            if hasattr(dist, name):
                self._count(name, which, times)

    def _count(self, name: str, which: int, times: int) -> None:
        plain = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return plain(*args, **kwargs)
            given = {**{NAMES[n]: x for n, x in kwargs.items() if n in NAMES}, **dict(enumerate(args))}
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            self.sent[self.phase, name] += int(times * share * given[which].numel() * given[which].element_size())
            self._inside = True
            try:
                return plain(*args, **kwargs)
            finally:
                self._inside = False

        setattr(dist, name, counted)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count as of a phase."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *map(chr, range(32, 126))])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def models(root: Path, layers: int, hidden: int) -> list[str]:
    """A policy, a DPO model, a reward model; the last two also as adapters of the policy."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    kinds = {"policy": AutoModelForCausalLM, "dpo": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
    for name, kind in kinds.items():
        kind.from_config(config).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    for name in ("dpo", "reward"):
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS" if name == "reward" else "CAUSAL_LM")
        base = kinds[name].from_pretrained(root / "policy", **({"num_labels": 1} if name == "reward" else {}))
        get_peft_model(base, lora).save_pretrained(root / f"{name}_adapter")
        tokenizer().save_pretrained(root / f"{name}_adapter")
    return [str(root / name) for name in ("policy", "dpo", "reward", "dpo_adapter", "reward_adapter")]


def iteration(
    wire: Wire, found: list[str], output: Path, *, lora: bool, estimator: str, once: bool, tokens: int, prompts: int
) -> dict[str, Any]:
    """Bytes of the second iteration of a run, by phase and kind; a smaller token budget is more micro-batches."""
    from accelerate.state import AcceleratorState

    from rto import RTOConfig, RTOTrainer

    policy, dpo, reward = [found[0], *found[3:]] if lora else found[:3]
    args = RTOConfig(
        output_dir=str(output),
        fsdp=True,
        bf16=True,
        use_cpu=True,
        per_device_train_batch_size=prompts // 2,
        num_mini_batches=8,
        max_tokens_per_micro_batch=tokens,
        gather_once=once,
        max_completion_length=24,
        advantage_estimator=estimator,
        num_train_epochs=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RTOTrainer(
        policy,
        args,
        dpo_model=dpo,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": "ab" * (1 + i % 4)} for i in range(prompts)]),
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
    )
    for name in ("sample", "score", "update"):
        setattr(trainer, name, _counted(wire, name, getattr(trainer, name)))
    passes = []
    plain = trainer.backward
    trainer.backward = lambda model, parts, *rest, **kw: passes.append(len(parts)) or plain(model, parts, *rest, **kw)
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 8:  # the second iteration
            wire.sent.clear()
            passes.clear()
        with wire.within("gathered once"):
            return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    sizes = {"policy": sum(p.numel() for p in trainer.model.policy.parameters())}
    if trainer.model.value_model is not None:
        sizes["critic"] = sum(p.numel() for p in trainer.model.value_model.parameters())
    AcceleratorState._reset_state()
    return {"sent": dict(wire.sent), "passes": sum(passes), "sizes": sizes}


def _counted(wire: Wire, phase: str, work: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        with wire.within(phase):
            return work(*args, **kwargs)

    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=64, help="of both processes")
    parser.add_argument("--tokens", type=int, default=64, help="in a micro-batch: fewer are more passes an update")
    flags = parser.parse_args()
    sharded.call_it_an_accelerator()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wire = Wire()
    root = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(root)
    folder = Path(root[0])
    if dist.get_rank() == 0:
        models(folder, flags.layers, flags.hidden)
    dist.barrier()
    found = [str(folder / name) for name in ("policy", "dpo", "reward", "dpo_adapter", "reward_adapter")]
    rows = {
        "RTO without a critic": {"lora": False, "estimator": "reinforce++"},
        "RTO": {"lora": False, "estimator": "gae"},
        "RTO, gathered once an update": {"lora": False, "estimator": "gae", "once": True},
        "RTO, five roles on one base, gathered by layer": {"lora": True, "estimator": "gae"},
        "RTO, five roles on one base": {"lora": True, "estimator": "gae", "once": True},
    }
    rows = {
        name: {"once": False, "tokens": flags.tokens, "prompts": flags.prompts, **row} for name, row in rows.items()
    }
    print_here = dist.get_rank() == 0
    if print_here:
        print("| | passes with gradients | update, MB | all else, MB | all ÷ policy alone | all ÷ what is trained |")
        print("|---|---|---|---|---|---|")
    alone: dict[bool, float] = {}
    trained: dict[tuple[bool, str], int] = {}
    for name, settings in rows.items():
        result = iteration(wire, found, folder / "run", **settings)
        sent = Counter[str]()
        for (phase, _), size in result["sent"].items():
            sent["update" if phase == "update" else "else"] += size
        # FSDP of the policy alone: without a critic, or half of two models that are alike. FSDP of what is trained:
        # the update where nothing is gathered once.
        alone.setdefault(settings["lora"], sent["update"] / (2 if settings["lora"] else 1))
        both = trained.setdefault((settings["lora"], settings["estimator"]), sent["update"])
        total = sum(sent.values())
        if print_here:
            shares = f"{total / alone[settings['lora']]:.3f} | {total / both:.3f}"
            print(
                f"| {name} | {result['passes']} | {sent['update'] / 1e6:.2f} | {sent['else'] / 1e6:.2f} | {shares} |"
            )
            print(json.dumps({" ".join(k): v for k, v in result["sent"].items()}), file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
