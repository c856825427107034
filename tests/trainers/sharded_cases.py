"""Small runs that leave behind what two ways of laying a model over processes are compared by.

Each writes into ``output``: the exported model, ``history.json`` (what was logged at every update) and
``layout_RANK.json`` (how the models lay over the processes).
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from killable import WORDS, arm
from peft import LoraConfig
from preferring import ROWS
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.batches import Samples, collate
from rto.evaluation.judging.callback import WinRateCallback
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler

FLOW = ("kill", "resume", "early", "push")
COUNTED = ("steps", "passes", "sent", "whole", "evaluated")
SETTINGS = {
    "optim": "sgd",  # a step is the gradient itself
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "max_steps": 3,
}


def experts(like: Any) -> Any:
    """A random model of experts with the vocabulary and the sizes of a Llama, whose folder holds them one by one."""
    sizes = {
        name: getattr(like, name) for name in ("vocab_size", "hidden_size", "num_attention_heads", "pad_token_id")
    }
    sizes |= {"num_hidden_layers": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(3)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, head_dim=8, initializer_range=0.4))


def prefer(policy: str, output: str, loss: str, batch: int, **kwargs: Any) -> None:
    """Preference learning on rows of unlike lengths, in micro-batches that differ between processes."""
    own = {name: kwargs.pop(name) for name in ("ref_model",) if name in kwargs}
    rows = ROWS[: kwargs.pop("rows", None)]
    flow = {name: kwargs.pop(name) for name in FLOW if name in kwargs}
    counted = kwargs.pop("counted", False)
    if rank := kwargs.pop("lora", 0):
        own["peft_config"] = LoraConfig(r=rank, target_modules="all-linear")
    settings = SETTINGS | {"loss": loss, "per_device_train_batch_size": batch, "learning_rate": 1e-1}
    settings |= {"max_tokens_per_micro_batch": 64}
    trainer = PreferenceTrainer(
        policy,
        PreferenceConfig(output_dir=output, **settings | kwargs),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(ROWS[:7]),  # does not divide by two
        **own,
    )
    if counted:
        count_updates(trainer)
    plain, trainer.evaluated = trainer._outcome, 0

    def outcome(model: Any, examples: Any, kl: Any) -> Any:
        trainer.evaluated += 0 if trainer.model.training else len(examples)
        return plain(model, examples, kl)

    trainer._outcome = outcome
    finish(trainer, output, {"reference": trainer.reference}, **flow)


RTO_SETTINGS = SETTINGS | {
    "num_mini_batches": 1,
    "num_train_epochs": 3,
    "max_steps": -1,
    "learning_rate": 0.03,
    "value_learning_rate": 0.01,
    "max_tokens_per_micro_batch": 64,
    "max_completion_length": 9,
    "missing_eos_penalty": 1.0,
}


def rto(models: list[str], output: str, batch: int, **kwargs: Any) -> None:
    """RTO, or PPO where β₁ = 0, with a model for each role, or (``lora``) a role for each on one base."""
    policy, dpo, reward = models
    rank = kwargs.pop("lora", 0)
    own: dict[str, Any] = {"peft_config": LoraConfig(r=rank, target_modules="all-linear")} if rank else {}
    flow = {name: kwargs.pop(name) for name in FLOW if name in kwargs}
    watched, counted = kwargs.pop("watched", False), kwargs.pop("counted", False)
    args = RTOConfig(output_dir=output, per_device_train_batch_size=batch, **RTO_SETTINGS | kwargs)
    if args.dpo_coef:
        own["dpo_model"] = dpo
    prompts = [{"prompt": word * (1 + i % 3)} for i, word in enumerate(WORDS)]
    own |= {"train_dataset": Dataset.from_list(prompts), "eval_dataset": Dataset.from_list(prompts[:5])}
    trainer = RTOTrainer(policy, args, reward_funcs=reward, **own)
    # Greedy: not by which process a prompt is on. A third of the vocabulary ends a completion, so that lengths differ.
    config = SamplingConfig(max_completion_length=9, temperature=0.0)
    decoder = TransformersSampler(config=config, eos_ids=tuple(range(2, 260, 3)), pad_id=trainer.sampler.pad_id)
    steps: list[int] = []

    def sample(policy: Any, prompts: list[list[int]], seed: int) -> Samples:
        samples = decoder(policy, prompts, seed)
        steps.append(int(samples.mask.sum(1).max()))
        trainer.evaluated = len(prompts)  # the last is of an evaluation
        return samples

    if watched:
        sampling = SamplingConfig(max_completion_length=9)
        judged = Dataset.from_list([{"prompt": word} for word in WORDS[:7]])  # does not divide by two
        trainer.add_callback(WinRateCallback(trainer, judged, fuller, sampling=sampling, batch_size=2))
    if counted:
        count_updates(trainer)
    trainer.sampler = sample
    trainer.steps = steps
    finish(trainer, output, {n: m for n, m in trainer.models().items() if n != "model"}, **flow)


def count_updates(trainer: Any) -> None:
    """Keep how many passes updates make, how many bytes they gather and reduce, and what lies whole beside a pass."""
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from collectives import Wire

    wire, plain = Wire(), trainer.backward
    trainer.sent = {"gathered": 0, "reduced": 0}
    trainer.passes, trainer.whole = 0, []

    def backward(model: Any, parts: Any, loss: Any, **kwargs: Any) -> Any:
        wire.sent.clear()

        def looked_at(part: Any) -> Any:
            found = loss(part)
            trainer.whole.append({name: whole_layers(m) for name, m in trainer.model.named_children()})
            return found

        total = plain(model, parts, looked_at, **kwargs)
        trainer.passes += len(parts)
        for (_, kind), size in wire.sent.items():
            if kind.startswith(("all_gather", "reduce_scatter")):
                trainer.sent["gathered" if "gather" in kind else "reduced"] += size
        return total

    trainer.backward = backward


def whole_layers(model: Any) -> int:
    """Weights in a model's layers that are gathered at this moment."""
    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    return sum(not isinstance(p, DTensor) for layer in layers for p in layer.parameters())


def fuller(completions: list[str], **columns: Any) -> list[float]:
    """What a win rate is judged by."""
    return [len(set(completion)) + 0.01 * len(completion) for completion in completions]


def push(trainer: Any) -> list[list[str]]:
    """Push to a hub that takes down which files it is sent."""
    sent: list[list[str]] = []

    def upload_folder(folder_path: str, **kwargs: Any) -> None:
        sent.append(sorted(path.name for path in Path(folder_path).iterdir() if path.is_file()))

    hub = SimpleNamespace(create_repo=lambda name, **kw: SimpleNamespace(repo_id=name), upload_folder=upload_folder)
    transformers.trainer.hf_api = lambda: hub
    trainer.push_to_hub()
    return sent


def finish(
    trainer: Any,
    output: str,
    frozen: dict[str, Any],
    kill: str = "",
    resume: bool | str = False,
    early: bool = False,
    **flow: Any,
) -> None:
    """Train, push where asked, evaluate (``early``: before that, too), export, and tell."""
    if kill:
        arm(kill, trainer)
    before = trainer.evaluate() if early else {}
    trainer.train(resume_from_checkpoint=resume)
    pushed = push(trainer) if flow.get("push") else []
    trainer.save_model()
    found = trainer.evaluate()
    folder = Path(output)
    if trainer.is_world_process_zero():
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
        (folder / "evaluation.json").write_text(json.dumps(found))
        (folder / "before.json").write_text(json.dumps(before))
    rank = dist.get_rank() if dist.is_initialized() else 0
    models = {"trained": trainer.model, **{n: m for n, m in frozen.items() if m is not None}}
    facts: dict[str, Any] = {name: layout(m) for name, m in models.items()}
    facts |= {name: getattr(trainer, name, []) for name in COUNTED} | read(trainer)
    (folder / f"layout_{rank}.json").write_text(json.dumps(facts | {"wrote": wrote(folder), "pushed": pushed}))


@torch.no_grad()
def read(trainer: Any) -> dict[str, Any]:
    """In which precision log-probabilities leave the trained model, and how many of them bf16 could hold."""
    x = collate([[5, 6], [7]], [[8, 9, 10, 11], [12, 13]], pad=0, device=trainer.args.device)
    with trainer.accelerator.autocast():
        logp = trainer.model_wrapped(x.tokens, x.prompt_mask, x.mask).logp[x.mask]
    policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    exact = int((logp == logp.bfloat16().float()).sum())
    return {"logp": str(logp.dtype), "narrow": exact, "gradients": str(getattr(policy, "reduce_dtype", None))}


def wrote(folder: Path) -> list[str]:
    """Which files under a folder this process has touched."""
    written = getattr(sys.modules.get("sharded"), "WRITTEN", [])  # where it is the program that runs this
    home = f"{folder.absolute()}/"
    return sorted({path.removeprefix(home) for path in written if path.startswith(home)})


def layout(model: Any) -> dict[str, Any]:
    """Units, kinds and precisions of a model's parameters; numbers here, of the smallest, and in all."""
    parameters = list(model.parameters())
    here = [(p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters]
    return {
        "units": sum(isinstance(m, FSDPModule) for m in model.modules()),
        "cut": all(isinstance(p, DTensor) for p in parameters),
        "here": sum(here),
        "least": min(here, default=0),
        "all": sum(p.numel() for p in parameters),
        "dtypes": sorted({str(p.dtype) for p in parameters}),
    }


SMALL: dict[str, Any] = {
    "methods": {"RTO": {"dpo_coef": 0.05}},
    "data.demonstrations.rows": 32,
    "data.pair_prompts.rows": 16,
    "data.prompts.rows": 16,
    "data.test_prompts.rows": 8,
    "completion_length": 12,
}


def pipeline(output: str, batch: int, recipe: str | None = None, **values: Any) -> None:
    """Every stage of `rto run`, of the embedded task on a few rows or of a recipe, and how its models lay."""
    from rto.pipeline import run
    from rto.recipe import load_recipe
    from rto.trainers.checkpoints import SealedCheckpoints

    if recipe:
        sys.path.append(str(Path(__file__).parents[1] / "pipeline"))  # where its functions are
    stages = ("prefer", "reward", "train") if recipe else ("sft", "prefer", "reward", "train")
    sizes = {f"{stage}.per_device_train_batch_size": batch for stage in stages}
    values = {**({} if recipe else SMALL), **sizes, **values}
    plain, laid = SealedCheckpoints.save_model, {}

    def save_model(self: Any, *args: Any, **kwargs: Any) -> None:
        engine = self.engine
        name = "FSDP2" if engine.sharded else "DeepSpeed" if engine.deepspeed else type(self.model_wrapped).__name__
        laid[type(self).__name__] = layout(self.model) | {"engine": name}
        plain(self, *args, **kwargs)

    SealedCheckpoints.save_model = save_model
    run(load_recipe(recipe, values), output)
    SealedCheckpoints.save_model = plain
    folder, rank = Path(output), dist.get_rank() if dist.is_initialized() else 0
    (folder / f"layout_{rank}.json").write_text(json.dumps(laid | {"wrote": wrote(folder)}))
