"""One PPO iteration, side by side with TRL's `trl.experimental.ppo.PPOTrainer` (1.12, the last that has it).

TRL needs an environment of its own, because its newer releases have no PPO trainer::

    python -m venv ../trl112
    ../trl112/bin/pip install -r benchmarks/requirements-trl.txt
    python benchmarks/ppo_iteration.py --trl-python ../trl112/bin/python

Two sizes (``--size``): ``stories260K``, where what is not arithmetic counts (128 prompts of 16 tokens, 48 new
tokens), and a random Llama of hidden 384, 8 layers and a vocabulary of 32,000, where arithmetic counts (64 prompts
of 64 tokens, 128 new tokens). The same work on both sides: model, prompts, completions (neither side stops at EOS),
one PPO epoch over 4 minibatches with one optimizer step each, optimizer, learning rates, threads. The sides:

- ``trl``: policy, critic, reference, reward model, fp32.
- ``ppo``: `RTOTrainer` with β₁ = 0, the same four models.
- ``rto``: `RTOTrainer` with a DPO model: one more model to score.
- ``trl-bf16``, ``ppo-bf16``, ``rto-bf16``: the same with ``bf16=True``: autocast, fp32 weights.

Each side cuts its batches as it does by itself: TRL a whole minibatch and a whole rollout batch at a time, ours by
``max_tokens_per_micro_batch``.

Where the two differ by design, each does its own thing and is charged for it. Ours decodes the completions
and gives the reward model text, clips both gradient norms, recomputes the policy's log-probabilities with its
own forward pass, and writes its log and two completions to disk; TRL keeps the sampler's logits instead,
collects garbage by hand and prints its log.

What is timed: wall clock between the ends of the last optimizer steps of two consecutive iterations, taken by
a `TrainerCallback` on both sides. So an iteration holds everything: data loading, sampling, scoring,
advantages, all minibatches, optimizer and scheduler, metrics and logging. Loading and the first iterations
are left out. Every side of every round is a new process; rounds alternate, and ratios compare sides of one
round. CPU seconds are of the whole process: where other programs share the cores, they say more than wall
clock.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("RTO_DATA", REPOSITORY.parent / "shared" / "data"))
SIDES = {
    "trl": "TRL PPO",
    "ppo": "ours, PPO (β₁ = 0)",
    "rto": "ours, RTO: one model more",
    "trl-bf16": "TRL PPO, bf16 autocast",
    "ppo-bf16": "ours, PPO, bf16 autocast",
    "rto-bf16": "ours, RTO, bf16 autocast",
}
SIZES: dict[str, dict[str, int]] = {
    "stories260K": {"prompts": 128, "prompt_tokens": 16, "new_tokens": 48},
    "llama-384x8-32k": {"prompts": 64, "prompt_tokens": 64, "new_tokens": 128},
}
PACKAGES = ("reinforced-token-optimization", "trl", "transformers", "torch", "accelerate", "datasets", "tokenizers")
RANDOM: dict[str, dict[str, int]] = {
    "llama-384x8-32k": {
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "intermediate_size": 1024,
        "vocab_size": 32_000,
    },
    "llama-64x4-1k": {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 192, "vocab_size": 1024},
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both sides do in an iteration; a worker reads it from ``work.json``."""

    size: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    mini_batches: int = 4
    micro_batch_tokens: int = 16384
    learning_rate: float = 1e-6
    warmup: int = 2
    iterations: int = 8
    threads: int = 1
    seed: int = 0

    @property
    def total(self) -> int:
        """Iterations, those that are not timed among them."""
        return self.warmup + self.iterations

    def arguments(self, output: Path, *, bf16: bool) -> dict[str, Any]:
        """What the two configurations share by name."""
        return {
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": bf16,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": self.prompts,
            "num_mini_batches": self.mini_batches,
            "num_ppo_epochs": 1,
            "total_episodes": self.total * self.prompts,
            "learning_rate": self.learning_rate,
            "adam_beta2": 0.95,
            "lr_scheduler_type": "constant",
            "temperature": 1.0,
            "kl_coef": 0.01,
            "vf_coef": 0.1,
            "gamma": 1.0,
            "lam": 0.95,
            "cliprange": 0.2,
            "cliprange_value": 0.2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": self.seed,
        }


# --- shared by the workers


def prepare(work: Work, folder: Path) -> None:
    """Write what all sides read: the starting policy, prompts, a reward model, a DPO model."""
    import torch
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(work.seed)
    policy, tokenizer, prompts = stories(work) if work.size == "stories260K" else random_llama(work)
    policy.save_pretrained(folder / "model")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", num_labels=1, dtype=torch.float32
    )
    reward_model.save_pretrained(folder / "reward_model")
    # Any model with the policy's shape costs the same; this one has a log-ratio that is not 0.
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    policy.save_pretrained(folder / "dpo_model")
    for name in ("model", "reward_model", "dpo_model"):
        tokenizer.save_pretrained(folder / name)


def stories(work: Work) -> tuple[Any, Any, list[str]]:
    """Karpathy's stories260K, and openings by the model itself, kept where text and tokens agree on the length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = DATA / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found: dict[str, None] = {}
    need = work.prompts * work.total
    while len(found) < need:
        start = torch.full((512, 1), tokenizer.bos_token_id)
        ids = policy.generate(start, max_new_tokens=work.prompt_tokens - 1, do_sample=True, top_k=0)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        found |= dict.fromkeys(t for t in texts if len(tokenizer(t).input_ids) == work.prompt_tokens)
    return policy, tokenizer, list(found)[:need]


def random_llama(work: Work) -> tuple[Any, Any, list[str]]:
    """A random Llama with a tokenizer of one made-up word a token, and random prompts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = RANDOM[work.size]
    heads = shape["hidden_size"] // 64 or 1
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, config.vocab_size))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    ids = torch.randint(3, config.vocab_size, (work.prompts * work.total, work.prompt_tokens))
    prompts = [" ".join(words[i] for i in row) + " " for row in ids.tolist()]
    return LlamaForCausalLM(config), tokenizer, prompts


class Meter:
    """The time at the end of each iteration's last optimizer step, on whichever trainer."""

    def __init__(self, updates: int) -> None:
        from transformers import TrainerCallback

        self.wall: list[float] = []
        self.cpu: list[float] = []

        class AtStepEnd(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs) -> None:
                if state.global_step % updates == 0:
                    self.wall.append(time.perf_counter())
                    self.cpu.append(time.process_time())

        self.callback = AtStepEnd()

    def seconds(self, work: Work) -> dict[str, list[float]]:
        """One number a timed iteration."""
        assert len(self.wall) == work.total, f"{len(self.wall)} iterations were run, not {work.total}"
        return {
            name: [after - before for before, after in itertools.pairwise(ticks)][work.warmup - 1 :]
            for name, ticks in (("wall", self.wall), ("cpu", self.cpu))
        }


def operations(work: Work, config: Any) -> float:
    """Floating-point operations an RTO iteration cannot do without: two for each multiply-add of a matrix product.

    One forward pass of a model over a row of L = P + T tokens takes F = 2·M·L + 2·D·L²·layers (M weights in the
    blocks' matrices, causal attention); its head takes H = 2·D·V·T. Sampling is F + H with a cache; scoring reads
    policy, reference and DPO model with their heads, critic and reward model without: 5F + 3H; the update goes
    through policy and critic forwards and backwards: 6F + 3H.
    """
    hidden, length = config.hidden_size, work.prompt_tokens + work.new_tokens
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    block = 2 * hidden * (hidden + keys) + 3 * hidden * config.intermediate_size
    blocks = config.num_hidden_layers * (2.0 * block * length + 2.0 * hidden * length**2)
    head = 2.0 * hidden * config.vocab_size * work.new_tokens
    return work.prompts * (12 * blocks + 7 * head)


def matrix_rate(dtype: Any, *, size: int = 2048, repeats: int = 10) -> float:
    """Operations a second of square matrix products, the best of several."""
    import torch

    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def check_lengths(lengths: list[int], work: Work) -> None:
    """Refuse to report a measurement of less work."""
    if set(lengths) != {work.new_tokens}:
        raise RuntimeError(f"completions have {sorted(set(lengths))} tokens, not {work.new_tokens}")


def measured(meter: Meter, work: Work, trainer: Any) -> dict[str, Any]:
    """What every side reports."""
    return {
        "seconds": meter.seconds(work),
        "optimizer": str(trainer.args.optim),
        "attention": trainer.model.policy.config._attn_implementation,
    }


def run_trl(work: Work, folder: Path, *, bf16: bool = False) -> dict[str, Any]:
    """`PPOTrainer`, the way its documentation builds it."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    encoded = tokenizer(json.loads((folder / "prompts.json").read_text()))
    assert {len(ids) for ids in encoded.input_ids} == {work.prompt_tokens}
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
    reward_model, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    # Every minibatch in one forward pass: a micro-batch is min(per_device_train_batch_size, minibatch) rows.
    args = PPOConfig(
        **work.arguments(folder / "trl", bf16=bf16),
        gradient_accumulation_steps=1,
        response_length=work.new_tokens,
        local_rollout_forward_batch_size=work.prompts,
        stop_token=None,
        num_sample_generations=0,
        logging_steps=1,
    )
    meter = Meter(updates=1)  # its on_step_end comes once a rollout
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": encoded.input_ids}),
        # Nothing is evaluated, but the constructor makes a loader of it.
        eval_dataset=Dataset.from_dict({"input_ids": encoded.input_ids[:1]}),
        callbacks=[meter.callback],
    )
    lengths: list[int] = []
    generate = policy.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        responses = output.sequences[:, work.prompt_tokens :]
        real = responses.ne(tokenizer.pad_token_id).flip(1).cumsum(1).gt(0)  # up to the last that is not padding
        lengths.extend(real.sum(1).unique().tolist())
        return output

    policy.generate = counted
    trainer.train()
    check_lengths(lengths, work)
    return measured(meter, work, trainer)


def run_rto(work: Work, folder: Path, *, dpo_coef: float, bf16: bool = False) -> dict[str, Any]:
    """`RTOTrainer`; with ``dpo_coef=0`` it is PPO."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from rto.rollout.samplers.transformers import TransformersSampler
    from rto.trainers.rto import RTOConfig, RTOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    args = RTOConfig(
        **work.arguments(folder / "rto", bf16=bf16),
        value_learning_rate=work.learning_rate,
        max_completion_length=work.new_tokens,
        max_tokens_per_micro_batch=work.micro_batch_tokens,
        dpo_coef=dpo_coef,
    )
    lengths: list[int] = []
    endless = TransformersSampler(config=args.sampling(), eos_ids=(), pad_id=tokenizer.pad_token_id)

    def counted(*args: Any) -> Any:
        samples = endless(*args)
        lengths.extend(samples.mask.sum(1).unique().tolist())
        return samples

    trainer = RTOTrainer(
        str(folder / "model"),
        args,
        dpo_model=str(folder / "dpo_model") if dpo_coef else None,
        reward_funcs=str(folder / "reward_model"),
        train_dataset=Dataset.from_dict({"prompt": json.loads((folder / "prompts.json").read_text())}),
        processing_class=tokenizer,
        sampler=counted,
        callbacks=[(meter := Meter(updates=args.updates_per_rollout)).callback],
    )
    assert {len(p.ids) for p in trainer.train_dataset} == {work.prompt_tokens}
    trainer.train()
    check_lengths(lengths, work)
    rows = [row for row in trainer.state.log_history if "seconds/sample" in row][work.warmup :]
    phases = {
        name: statistics.median(row[f"seconds/{name}"] for row in rows)
        for name in ("sample", "score", "credit", "update")
    }
    return {**measured(meter, work, trainer), "phases": phases, "operations": operations(work, trainer.model.config)}


RUN: dict[str, Callable[[Work, Path], dict[str, Any]]] = {
    "trl": run_trl,
    "ppo": lambda work, folder: run_rto(work, folder, dpo_coef=0.0),
    "rto": lambda work, folder: run_rto(work, folder, dpo_coef=0.05),
    "trl-bf16": lambda work, folder: run_trl(work, folder, bf16=True),
    "ppo-bf16": lambda work, folder: run_rto(work, folder, dpo_coef=0.0, bf16=True),
    "rto-bf16": lambda work, folder: run_rto(work, folder, dpo_coef=0.05, bf16=True),
}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def worker(side: str, folder: Path) -> None:
    """One process of one side: its measurements as a line of JSON, the last of its output."""
    import torch

    work = Work(**json.loads((folder / "work.json").read_text()))
    torch.set_num_threads(work.threads)
    if side == "prepare":
        prepare(work, folder)
        return
    load = os.getloadavg()[0]
    before = peak_mib()
    rate = {str(dtype).removeprefix("torch."): matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    result = RUN[side](work, folder)
    result |= {"peak_rss_mib": peak_mib(), "before_mib": before, "matrix_rate": rate}
    print(json.dumps({**result, "load_before": load, "versions": versions()}))


def peak_mib() -> float:
    """The process's largest resident size so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- the driver


KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "2147483647", "MALLOC_TRIM_THRESHOLD_": "2147483647"}


def spawn(python: str, side: str, folder: Path, threads: int, *, keep_memory: bool = False) -> str:
    """Run a worker; with ``keep_memory`` glibc keeps freed memory in the process, as the command `rto` tells it to.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
    }
    environment |= KEEP_MEMORY if keep_memory else {}
    command = [python, str(Path(__file__).resolve()), "--worker", side, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed under {python}:\n{done.stderr[-4000:]}")
    return done.stdout


def machine() -> dict[str, Any]:
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = named[0].split(":", 1)[1].strip() if named else name
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.platform()}


def revision() -> str | None:
    """The commit measured, marked when the tree differs from it; None outside a checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def compare(pythons: dict[str, str], work: Work, rounds: int, target: Path, *, keep_memory: bool) -> None:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    with tempfile.TemporaryDirectory(prefix="rto-benchmark-") as name:
        folder = Path(name)
        (folder / "work.json").write_text(json.dumps(asdict(work)))
        spawn(sys.executable, "prepare", folder, work.threads)
        for i in range(rounds):
            for side, python in pythons.items():
                run = json.loads(spawn(python, side, folder, work.threads, keep_memory=keep_memory).splitlines()[-1])
                runs[side].append(run)
                wall, cpu = (statistics.median(run["seconds"][clock]) for clock in ("wall", "cpu"))
                print(
                    f"round {i + 1}/{rounds}  {side}  {wall:.3f} s wall, {cpu:.3f} s CPU an iteration "
                    f"(load before: {run['load_before']:.1f})",
                    flush=True,
                )
    rows = summarize(runs)
    print("\n" + table(rows))
    target.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "revision": revision(),
        "work": asdict(work),
        "settings": {
            "rounds": rounds,
            "device": "cpu",
            "keep_memory": keep_memory,
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"),
        },
        "versions": {side: results[0]["versions"] for side, results in runs.items()},
        "summary": rows,
        "runs": {side: [_without(run, "versions") for run in results] for side, results in runs.items()},
    }
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {target}")


def _without(run: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: x for name, x in run.items() if name != key}


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians of each side; ratios to TRL within each round, with the least and the greatest."""
    rows = {}
    for side, results in runs.items():
        row: dict[str, Any] = {}
        for clock in ("wall", "cpu"):
            medians = [statistics.median(r["seconds"][clock]) for r in results]
            row[f"{clock}_seconds"] = statistics.median(medians)
            if "trl" in runs:
                theirs = [statistics.median(r["seconds"][clock]) for r in runs["trl"]]
                ratios = [ours / other for ours, other in zip(medians, theirs)]
                row[f"{clock}_ratio"] = {
                    "median": statistics.median(ratios),
                    "min": min(ratios),
                    "max": max(ratios),
                }
        if side == "rto":  # the operations counted are RTO's
            shares = [
                r["operations"] / statistics.median(r["seconds"]["wall"]) / r["matrix_rate"]["float32"]
                for r in results
            ]
            row["efficiency"] = statistics.median(shares)
        row["peak_rss_mib"] = max(r["peak_rss_mib"] for r in results)
        rows[side] = row
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """For a terminal, and valid Markdown."""

    def ratio(row: dict[str, Any], clock: str) -> str:
        found = row.get(f"{clock}_ratio")
        return "—" if found is None else f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"

    lines = [
        "| | s an iteration | × TRL (min–max) | CPU s | × TRL (min–max) | of the matrix rate | peak RSS, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {SIDES[side]} | {row['wall_seconds']:.3f} | {ratio(row, 'wall')} | {row['cpu_seconds']:.3f} "
        f"| {ratio(row, 'cpu')} | {format(row['efficiency'], '.0%') if 'efficiency' in row else '—'} "
        f"| {row['peak_rss_mib']:.0f} |"
        for side, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="stories260K", help="which work")
    parser.add_argument("--trl-python", help="interpreter of the TRL environment; without it, ours alone")
    parser.add_argument(
        "--sides", nargs="+", choices=tuple(RUN), default=["trl", "ppo", "rto"], help="what to measure"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--iterations", type=int, default=8, help="timed iterations of a process")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before those")
    parser.add_argument(
        "--keep-memory", action="store_true", help="all sides keep freed memory, as `rto` does (glibc)"
    )
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=Work.micro_batch_tokens, help="max_tokens_per_micro_batch of ours"
    )
    parser.add_argument("--output", type=Path, help="the report; benchmarks/results/ppo_iteration_SIZE.json")
    parser.add_argument("--worker", choices=("prepare", *RUN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder)
        return
    if options.size == "stories260K" and not (DATA / "models" / "stories260K").is_dir():
        parser.error(f"{DATA}/models/stories260K is not there: set RTO_DATA")
    theirs = options.trl_python
    pythons = {
        side: theirs if side.startswith("trl") else sys.executable
        for side in options.sides
        if theirs or not side.startswith("trl")
    }
    work = Work(
        size=options.size,
        iterations=options.iterations,
        warmup=options.warmup,
        threads=options.threads,
        micro_batch_tokens=options.micro_batch_tokens,
        **SIZES[options.size],
    )
    output = options.output or REPOSITORY / "benchmarks" / "results" / f"ppo_iteration_{options.size}.json"
    compare(pythons, work, options.rounds, output, keep_memory=options.keep_memory)


if __name__ == "__main__":
    main()
