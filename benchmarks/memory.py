"""Peak memory of RTO with all five roles on one frozen base, beside supervised LoRA and beside five models.

    python benchmarks/memory.py                                            # a Llama of 110 M parameters, CPU, fp32
    python benchmarks/memory.py --device cuda --shape llama-3.2-1b
    python benchmarks/memory.py --device cuda --shape llama-3-8b --sides sft sft-trl shared

Weights are random, shapes real; nothing is downloaded. Every side does the same kind of step: so many rows of so many
prompt and completion tokens in one forward and backward pass, AdamW, no activation checkpointing unless it is asked
for. The sides:

- ``sft``: supervised LoRA fine-tuning of the policy alone, a plain loop, the output layer at completion tokens only
  and in chunks, as everywhere here: what the goals are measured by.
- ``sft-trl``: the same by `trl.SFTTrainer`.
- ``shared``: `RTOTrainer` with LoRA; policy, reference, DPO model, reward model and critic on one base.
- ``separate-lora``: `RTOTrainer` with the same adapters, each on a base of its own: what sharing saves.
- ``separate``: `RTOTrainer` with five full models, policy and critic trained whole: what sharing and LoRA save.

Every side is a process of its own. What is measured: the largest memory of any moment from the first step to the last,
after the models were built. On the CPU that is resident memory above what the process had after its imports, as Linux
counts it (``VmHWM``, which the process sets back before the first step), with large blocks of the allocator given back
as they are freed; the whole process is reported, too. On CUDA it is what torch has allocated, and beside it what it
has reserved. ``parameters`` counts the weights that exist, once each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppo_iteration import KEEP_MEMORY, REPOSITORY, machine, revision, versions

SIDES = {
    "sft": "supervised LoRA, plain loop",
    "sft-trl": "supervised LoRA, TRL SFTTrainer",
    "shared": "RTO, one base",
    "separate-lora": "RTO, the same adapters on five bases",
    "separate": "RTO, five full models",
}
GOALS = (
    ("peak of a step, one base / supervised LoRA", "shared", "sft", 1.3),
    ("peak of a step, one base / five full models", "shared", "separate", 0.35),
)
PARAMETER_GOAL = 1.1
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama, and how much of what it reads at once."""

    config: dict[str, Any]
    dtype: str
    prompt_tokens: int
    new_tokens: int
    rank: int


SHAPES = {
    "tiny": Shape(  # to try the paths of the large shapes; its figures mean nothing
        config={
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        dtype="bfloat16",
        prompt_tokens=8,
        new_tokens=8,
        rank=2,
    ),
    "llama-110m": Shape(
        config={
            "vocab_size": 32_000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "tie_word_embeddings": True,
        },
        dtype="float32",
        prompt_tokens=128,
        new_tokens=128,
        rank=8,
    ),
    "llama-3.2-1b": Shape(
        config={
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        dtype="bfloat16",
        prompt_tokens=1024,
        new_tokens=1024,
        rank=16,
    ),
    "llama-3-8b": Shape(
        config={
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
        dtype="bfloat16",
        prompt_tokens=1024,
        new_tokens=1024,
        rank=16,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every side does; a worker reads it from ``work.json``."""

    shape: str
    device: str
    rows: int
    checkpointing: bool
    threads: int
    keep_memory: bool
    iterations: int = 1
    """Of RTO; each has two updates of two micro-batches. Supervised: two updates of one micro-batch for each."""
    seed: int = 0

    @property
    def size(self) -> Shape:
        """The shape by its name."""
        return SHAPES[self.shape]

    @property
    def allocator(self) -> dict[str, str]:
        """How glibc treats what is freed."""
        return KEEP_MEMORY if self.keep_memory else GIVE_BACK

    @property
    def rollouts(self) -> int:
        """Prompts of one iteration."""
        return 4 * self.rows

    @property
    def tokens(self) -> int:
        """Tokens of one row."""
        return self.size.prompt_tokens + self.size.new_tokens

    def lora(self, **kwargs: Any) -> Any:
        """The adapter of every role."""
        from peft import LoraConfig

        return LoraConfig(r=self.size.rank, lora_alpha=2 * self.size.rank, target_modules="all-linear", **kwargs)

    def arguments(self, output: Path) -> dict[str, Any]:
        """What every trainer's configuration shares by name."""
        return {
            "output_dir": str(output),
            "use_cpu": self.device == "cpu",
            "bf16": self.size.dtype == "bfloat16",
            "gradient_checkpointing": self.checkpointing,
            "model_init_kwargs": {"dtype": self.size.dtype},
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": self.seed,
        }


# --- the meter


class Meter:
    """Memory of this process, bytes: now, and at most since the first `reset`."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch: Any = torch.cuda if device == "cuda" else None
        self._highest: int | None = None
        self.baseline = self.now()

    def now(self) -> int:
        """At this moment."""
        return self._torch.memory_allocated() if self._torch else _status("VmRSS")

    def reset(self) -> None:
        """Forget how high it was, for `since_reset`; from the first time on, `highest` does not."""
        self._highest = 0 if self._highest is None else self.highest()
        if self._torch:
            self._torch.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS

    def since_reset(self) -> int:
        """At most, since the last `reset`."""
        return self._torch.max_memory_allocated() if self._torch else _status("VmHWM")

    def highest(self) -> int:
        """At most, since the first `reset`."""
        assert self._highest is not None
        return max(self._highest, self.since_reset())

    def whole(self) -> int:
        """Of the process at its end: reserved on the device, or the greatest resident size since the first `reset`."""
        return self._torch.memory_reserved() if self._torch else self.highest()


def _status(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def parameter_bytes(*models: Any) -> int:
    """Weights of the models, each counted once, however many models share it."""
    found = {p.data_ptr(): p.numel() * p.element_size() for model in models for p in model.parameters()}
    return sum(found.values())


# --- shared by the workers


def prepare(work: Work, folder: Path) -> None:
    """Write what the sides read: a base, a reward model with all of its weights, two adapters, prompts."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

    set_seed(work.seed)
    config = LlamaConfig(
        **work.size.config, max_position_embeddings=2 * work.tokens, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    words = tokenizer_of_words(config.vocab_size)
    config.dtype = getattr(torch, work.size.dtype)
    with torch.device(work.device):
        torch.set_default_dtype(config.dtype)
        base, scorer = LlamaForCausalLM(config), None
        torch.set_default_dtype(torch.float32)
    base.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    for name, kind in (("dpo", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        if kind == "SEQ_CLS":
            scorer = LlamaForSequenceClassification.from_pretrained(
                folder / "base", num_labels=1, dtype=config.dtype, device_map=work.device
            )
            scorer.save_pretrained(folder / "scorer")
            words.save_pretrained(folder / "scorer")
        adapter = get_peft_model(scorer or base, work.lora(task_type=kind, init_lora_weights=False))
        adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapter.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    random = torch.Generator().manual_seed(work.seed)
    shape = (work.rollouts * work.iterations, work.size.prompt_tokens)
    prompts = torch.randint(3, config.vocab_size, shape, generator=random)
    (folder / "prompts.json").write_text(json.dumps([" ".join(f"w{i}" for i in row) for row in prompts.tolist()]))


def tokenizer_of_words(size: int) -> Any:
    """One made-up word a token, so that text and tokens agree on every length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def run_sft(work: Work, folder: Path, meter: Meter) -> dict[str, Any]:
    """Negative log-likelihood of random completions, LoRA on the policy."""
    import torch
    from peft import get_peft_model

    from rto.batches import collate
    from rto.models.actor import policy_logprobs
    from rto.models.loading import load_policy

    policy = load_policy(str(folder / "base"), dtype=work.size.dtype).to(work.device)
    model: Any = get_peft_model(policy, work.lora())
    if work.checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    random = torch.Generator().manual_seed(work.seed)
    shape = (work.rows, work.tokens)
    meter.reset()
    for _ in range(2 * work.iterations):
        ids = torch.randint(3, work.size.config["vocab_size"], shape, generator=random).tolist()
        at = work.size.prompt_tokens
        batch = collate([row[:at] for row in ids], [row[at:] for row in ids], pad=0, device=work.device)
        with torch.autocast(work.device, torch.bfloat16, enabled=work.size.dtype == "bfloat16"):
            loss = -policy_logprobs(model, batch).sum() / batch.mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": parameter_bytes(model)}


def run_sft_trl(work: Work, folder: Path, meter: Meter) -> dict[str, Any]:
    """The same by TRL, as it comes but for activation checkpointing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = json.loads((folder / "prompts.json").read_text())
    rows = [{"prompt": x, "completion": f" {x}"} for x in texts]  # as many tokens behind the prompt as in it
    args = SFTConfig(
        **work.arguments(folder / "sft-trl"),
        per_device_train_batch_size=work.rows,
        max_steps=2 * work.iterations,
        max_length=work.tokens,
        learning_rate=1e-5,
        logging_steps=1,
    )
    trainer = SFTTrainer(
        model=str(folder / "base"), args=args, train_dataset=Dataset.from_list(rows), peft_config=work.lora()
    )
    meter.reset()
    trainer.train()
    return {"parameters": parameter_bytes(trainer.model)}


def run_rto(work: Work, folder: Path, meter: Meter, **models: Any) -> dict[str, Any]:
    """Whole iterations: sample, score, credit, update."""
    from datasets import Dataset

    from rto.rollout.samplers.transformers import TransformersSampler
    from rto.trainers.rto import RTOConfig, RTOTrainer

    args = RTOConfig(
        **work.arguments(folder / "rto"),
        per_device_train_batch_size=work.rollouts,
        num_mini_batches=2,
        max_tokens_per_micro_batch=work.rows * work.tokens,
        max_completion_length=work.size.new_tokens,
        total_episodes=work.iterations * work.rollouts * int(os.environ.get("WORLD_SIZE", "1")),
    )
    prompts = json.loads((folder / "prompts.json").read_text())
    trainer = RTOTrainer(
        str(folder / "base"),
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        sampler=TransformersSampler(config=args.sampling(), eos_ids=(), pad_id=0),  # every row to its full length
        **models,
    )
    peaks: dict[str, int] = {}

    def watched(phase: str) -> Callable[..., Any]:
        """A phase that takes down its own peak."""
        run = getattr(trainer, phase)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            meter.reset()
            result = run(*args, **kwargs)
            peaks[phase] = max(peaks.get(phase, 0), meter.since_reset())
            return result

        return wrapper

    for phase in ("sample", "score", "update"):
        setattr(trainer, phase, watched(phase))
    trainer.train()
    assert trainer.state.global_step == 2 * work.iterations
    (scorer,) = trainer.scoring.sources
    roles = [trainer.model, trainer.reference, trainer.scoring.token_reward.dpo_model, scorer.model]
    return {"parameters": parameter_bytes(*roles), "phases": peaks}


def run_shared(work: Work, folder: Path, meter: Meter) -> dict[str, Any]:
    """Folders of adapters made for the base: the trainer puts them on it."""
    return run_rto(
        work,
        folder,
        meter,
        peft_config=work.lora(),
        dpo_model=str(folder / "dpo"),
        reward_funcs=str(folder / "reward"),
    )


def run_separate_lora(work: Work, folder: Path, meter: Meter) -> dict[str, Any]:
    """The same adapters as live models, each of which has a base of its own."""
    from rto.models.loading import load_policy, load_scalar, load_tokenizer
    from rto.models.roles import trainable

    init = {"dtype": work.size.dtype}
    return run_rto(
        work,
        folder,
        meter,
        peft_config=work.lora(),
        ref_model=str(folder / "base"),
        dpo_model=load_policy(str(folder / "dpo"), **init),
        reward_funcs=load_scalar(str(folder / "reward"), **init),
        reward_processing_classes=load_tokenizer(folder / "reward"),
        value_model=trainable(load_scalar(str(folder / "reward"), **init)),
    )


def run_separate(work: Work, folder: Path, meter: Meter) -> dict[str, Any]:
    """Five full models; the critic starts as a copy of the reward model."""
    return run_rto(work, folder, meter, dpo_model=str(folder / "base"), reward_funcs=str(folder / "scorer"))


RUN: dict[str, Callable[[Work, Path, Meter], dict[str, Any]]] = {
    "sft": run_sft,
    "sft-trl": run_sft_trl,
    "shared": run_shared,
    "separate-lora": run_separate_lora,
    "separate": run_separate,
}


def worker(side: str, folder: Path) -> None:
    """One process of one side: its measurements as a line of JSON, the last of its output."""
    import torch

    work = Work(**json.loads((folder / "work.json").read_text()))
    torch.set_num_threads(work.threads)
    if side == "prepare":
        prepare(work, folder)
        return
    import peft
    import trl  # noqa: F401  every side has made the same imports before its memory is read

    import rto.trainers.rto  # noqa: F401

    torch.ones(64, 64, device=work.device) @ torch.ones(64, 64, device=work.device)  # the libraries' own buffers
    meter, start = Meter(work.device), time.perf_counter()
    found = RUN[side](work, folder, meter)
    report = {
        "parameters_mib": found["parameters"] / MIB,
        "peak_mib": (meter.highest() - meter.baseline) / MIB,
        "whole_mib": meter.whole() / MIB,
        "phases_mib": {name: (x - meter.baseline) / MIB for name, x in found.get("phases", {}).items()},
        "seconds": time.perf_counter() - start,
        "device": torch.cuda.get_device_name() if work.device == "cuda" else "cpu",
        "versions": {**versions(), "peft": peft.__version__},
    }
    print(json.dumps(report))


# --- the driver


def spawn(side: str, folder: Path, work: Work) -> str:
    """Run a worker.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    environment = dict(os.environ) | work.allocator | {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", side, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def measure(work: Work, sides: list[str], rounds: int, scratch: Path | None) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="rto-benchmark-", dir=scratch) as name:
        folder = Path(name)
        (folder / "work.json").write_text(json.dumps(asdict(work)))
        spawn("prepare", folder, work)
        for i in range(rounds):
            for side in sides:
                run = json.loads(spawn(side, folder, work).splitlines()[-1])
                runs[side].append(run)
                print(
                    f"round {i + 1}/{rounds}  {side}: {run['peak_mib']:.0f} MiB ({run['seconds']:.0f} s)",
                    flush=True,
                )
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds."""
    keys = ("parameters_mib", "peak_mib", "whole_mib")
    rows: dict[str, dict[str, Any]] = {}
    for side, results in runs.items():
        rows[side] = {key: statistics.median(run[key] for run in results) for key in keys}
        rows[side]["spread_mib"] = max(r["peak_mib"] for r in results) - min(r["peak_mib"] for r in results)
        phases = results[0]["phases_mib"]
        rows[side]["phases_mib"] = {p: statistics.median(run["phases_mib"][p] for run in results) for p in phases}
    return rows


def verdicts(rows: dict[str, dict[str, Any]], base_mib: float) -> list[dict[str, Any]]:
    """Each goal with what was measured, where both of its sides were run."""
    found = [
        {"claim": claim, "ratio": rows[side]["peak_mib"] / rows[other]["peak_mib"], "goal": goal}
        for claim, side, other, goal in GOALS
        if side in rows and other in rows
    ]
    if "shared" in rows:
        ratio = rows["shared"]["parameters_mib"] / base_mib
        found.append({"claim": "parameters, one base / the base itself", "ratio": ratio, "goal": PARAMETER_GOAL})
    return found


def table(rows: dict[str, dict[str, Any]], base_mib: float) -> str:
    """For a terminal, and valid Markdown."""

    def ratio(row: dict[str, Any], other: str) -> str:
        return f"{row['peak_mib'] / rows[other]['peak_mib']:.2f}" if other in rows else "—"

    lines = [
        "| | parameters, MiB (× base) | peak of a step | × supervised LoRA | × five full models "
        "| sample / score / update | whole process |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, row in rows.items():
        phases = " / ".join(f"{row['phases_mib'][p]:.0f}" for p in ("sample", "score", "update") if row["phases_mib"])
        lines.append(
            f"| {SIDES[side]} | {row['parameters_mib']:.0f} ({row['parameters_mib'] / base_mib:.2f}) "
            f"| {row['peak_mib']:.0f} | {ratio(row, 'sft')} | {ratio(row, 'separate')} "
            f"| {phases or '—'} | {row['whole_mib']:.0f} |"
        )
    return "\n".join(lines)


def base_bytes(shape: Shape) -> int:
    """Weights of the base alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        count = LlamaForCausalLM(LlamaConfig(**shape.config)).num_parameters()
    return count * getattr(torch, shape.dtype).itemsize


def compare(work: Work, sides: list[str], rounds: int, target: Path, scratch: Path | None) -> None:
    base_mib = base_bytes(work.size) / MIB
    runs = measure(work, sides, rounds, scratch)
    rows = summarize(runs)
    found = verdicts(rows, base_mib)
    print("\n" + table(rows, base_mib) + "\n")
    for x in found:
        met = "" if x["ratio"] <= x["goal"] else "  MISSED"
        print(f"{x['claim']}: {x['ratio']:.3f} (goal: at most {x['goal']}){met}")
    report = {
        "machine": {**machine(), "device": runs[sides[0]][0]["device"]},
        "revision": revision(),
        "work": asdict(work) | {"rollouts": work.rollouts, **asdict(work.size)},
        "settings": {"rounds": rounds, "allocator": work.allocator},
        "versions": runs[sides[0]][0]["versions"],
        "base_mib": base_mib,
        "goals": found,
        "summary": rows,
        "runs": {side: [{k: x for k, x in r.items() if k != "versions"} for r in rs] for side, rs in runs.items()},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {target}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-110m", help="the model, its precision and lengths")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; 4 on the CPU, 1 on CUDA when not given")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, on every side")
    parser.add_argument("--keep-memory", action="store_true", help="let glibc keep freed memory, as `rto` tells it to")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="which sides")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--scratch", type=Path, help="where models are written for the time of the run")
    parser.add_argument("--output", type=Path, help="the report; benchmarks/results/memory_SHAPE.json when not given")
    parser.add_argument("--worker", choices=("prepare", *RUN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder)
        return
    if options.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory on the CPU is read from /proc, which this system does not have: run it on Linux")
    work = Work(
        shape=options.shape,
        device=options.device,
        rows=options.rows or (4 if options.device == "cpu" else 1),
        checkpointing=options.checkpointing,
        threads=options.threads,
        keep_memory=options.keep_memory,
    )
    name = f"memory_{options.shape}{'_checkpointing' if options.checkpointing else ''}.json"
    target = options.output or REPOSITORY / "benchmarks" / "results" / name
    compare(work, options.sides, options.rounds, target, options.scratch)


if __name__ == "__main__":
    main()
