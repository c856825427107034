"""One PPO iteration, side by side with TRL's `trl.experimental.ppo.PPOTrainer` (1.12, the last that has it).

TRL needs an environment of its own, because its newer releases have no PPO trainer::

    python -m venv ../trl112
    ../trl112/bin/pip install -r benchmarks/requirements-trl.txt
    python benchmarks/ppo_iteration.py --trl-python ../trl112/bin/python

The same work on both sides: model, prompts (exactly 16 tokens), completions (exactly 48 tokens: neither side
stops at EOS), one PPO epoch over 4 minibatches with one forward and backward pass and one optimizer step
each, scoring in one batch, fp32, optimizer, learning rates, threads. The sides:

- ``trl``: policy, critic, reference, reward model.
- ``ppo``: `RTOTrainer` with β₁ = 0, the same four models.
- ``rto``: `RTOTrainer` with a DPO model: one more model to score.

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
SIDES = {"trl": "TRL PPO", "ppo": "RTO library, PPO (β₁ = 0)", "rto": "RTO library, RTO"}
PACKAGES = ("reinforced-token-optimization", "trl", "transformers", "torch", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both sides do in an iteration; a worker reads it from ``work.json``."""

    model: str
    prompts: int = 128
    prompt_tokens: int = 16
    new_tokens: int = 48
    mini_batches: int = 4
    learning_rate: float = 1e-6
    warmup: int = 2
    iterations: int = 8
    threads: int = 1
    seed: int = 0

    @property
    def total(self) -> int:
        """Iterations, those that are not timed among them."""
        return self.warmup + self.iterations

    def arguments(self, output: Path) -> dict[str, Any]:
        """What the two configurations share by name."""
        return {
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": False,
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
    """Write what both sides read: prompts, a reward model, a DPO model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(work.seed)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    policy = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    found: dict[str, None] = {}
    need = work.prompts * work.total
    # Story openings by the model itself, kept where text and tokens agree on the length.
    while len(found) < need:
        start = torch.full((512, 1), tokenizer.bos_token_id)
        ids = policy.generate(start, max_new_tokens=work.prompt_tokens - 1, do_sample=True, top_k=0)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        found |= dict.fromkeys(t for t in texts if len(tokenizer(t).input_ids) == work.prompt_tokens)
    (folder / "prompts.json").write_text(json.dumps(list(found)[:need]))

    reward_model = AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=1, dtype=torch.float32)
    reward_model.save_pretrained(folder / "reward_model")
    # Any model with the policy's shape costs the same; this one has a log-ratio that is not 0.
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    policy.save_pretrained(folder / "dpo_model")
    for name in ("reward_model", "dpo_model"):
        tokenizer.save_pretrained(folder / name)


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


def run_trl(work: Work, folder: Path) -> dict[str, Any]:
    """`PPOTrainer`, the way its documentation builds it."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    encoded = tokenizer(json.loads((folder / "prompts.json").read_text()))
    assert {len(ids) for ids in encoded.input_ids} == {work.prompt_tokens}
    policy, reference = (AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32) for _ in range(2))
    reward_model, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward_model", num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    # Every minibatch in one forward pass: a micro-batch is min(per_device_train_batch_size, minibatch) rows.
    args = PPOConfig(
        **work.arguments(folder / "trl"),
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


def run_rto(work: Work, folder: Path, *, dpo_coef: float) -> dict[str, Any]:
    """`RTOTrainer`; with ``dpo_coef=0`` it is PPO."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from rto.rollout.sampling import TransformersSampler
    from rto.trainers.rto import RTOConfig, RTOTrainer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    args = RTOConfig(
        **work.arguments(folder / "rto"),
        value_learning_rate=work.learning_rate,
        max_completion_length=work.new_tokens,
        max_tokens_per_micro_batch=work.prompts * (work.prompt_tokens + work.new_tokens),
        dpo_coef=dpo_coef,
    )
    lengths: list[int] = []
    endless = TransformersSampler(config=args.sampling(), eos_ids=(), pad_id=tokenizer.pad_token_id)

    def counted(*args: Any) -> Any:
        samples = endless(*args)
        lengths.extend(samples.mask.sum(1).unique().tolist())
        return samples

    trainer = RTOTrainer(
        work.model,
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
    return {**measured(meter, work, trainer), "phases": phases}


RUN: dict[str, Callable[[Work, Path], dict[str, Any]]] = {
    "trl": run_trl,
    "ppo": lambda work, folder: run_rto(work, folder, dpo_coef=0.0),
    "rto": lambda work, folder: run_rto(work, folder, dpo_coef=0.05),
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
    result = RUN[side](work, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    result["peak_rss_mib"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({**result, "load_before": load, "versions": versions()}))


# --- the driver


def spawn(python: str, side: str, folder: Path, threads: int) -> str:
    """Run a worker.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
    }
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


def compare(pythons: dict[str, str], work: Work, rounds: int, target: Path) -> None:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    with tempfile.TemporaryDirectory(prefix="rto-benchmark-") as name:
        folder = Path(name)
        (folder / "work.json").write_text(json.dumps(asdict(work)))
        spawn(sys.executable, "prepare", folder, work.threads)
        for i in range(rounds):
            for side, python in pythons.items():
                run = json.loads(spawn(python, side, folder, work.threads).splitlines()[-1])
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
        "work": {**asdict(work), "model": Path(work.model).name},
        "settings": {
            "rounds": rounds,
            "device": "cpu",
            "dtype": "float32",
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
        row["peak_rss_mib"] = max(r["peak_rss_mib"] for r in results)
        rows[side] = row
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """For a terminal, and valid Markdown."""

    def ratio(row: dict[str, Any], clock: str) -> str:
        found = row.get(f"{clock}_ratio")
        return "—" if found is None else f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"

    lines = [
        "| | s an iteration | × TRL (min–max) | CPU s | × TRL (min–max) | peak RSS, MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {SIDES[side]} | {row['wall_seconds']:.3f} | {ratio(row, 'wall')} | {row['cpu_seconds']:.3f} "
        f"| {ratio(row, 'cpu')} | {row['peak_rss_mib']:.0f} |"
        for side, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--trl-python", help="interpreter of the TRL environment; without it, ours alone")
    parser.add_argument("--model", type=Path, default=DATA / "models" / "stories260K", help="starting policy")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--iterations", type=int, default=8, help="timed iterations of a process")
    results = REPOSITORY / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=results / "ppo_iteration.json", help="the report")
    parser.add_argument("--worker", choices=("prepare", *RUN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder)
        return
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} is not a model folder: pass --model, or set RTO_DATA")
    pythons = dict.fromkeys(("trl", "ppo", "rto"), sys.executable)
    if options.trl_python:
        pythons["trl"] = options.trl_python
    else:
        del pythons["trl"]
    work = Work(model=str(options.model.resolve()), iterations=options.iterations, threads=options.threads)
    compare(pythons, work, options.rounds, options.output)


if __name__ == "__main__":
    main()
