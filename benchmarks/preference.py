"""DPO training, side by side with TRL's `DPOTrainer`: time and peak memory on the same pairs, threads and steps.

    RTO_DATA=../shared/data python benchmarks/preference.py

Two sizes: stories260K (what is not arithmetic counts) and a random Llama of hidden 384, 8 layers, vocabulary 32,000
(arithmetic counts). Pairs are real (HH harmless, those of at most 512 tokens), fp32, full fine-tuning, one epoch, the
same batches of pairs, no activation checkpointing. The sides:

- ``trl``: `DPOTrainer`; the reference model reads each batch beside the policy.
- ``trl-precomputed``: with ``precompute_ref_log_probs=True``.
- ``rto``: `PreferenceTrainer` as it comes: the reference reads the data once and is let go.
- ``rto-online``: with ``precompute_ref_log_probs=False``.

What is timed: everything from the data set to the trained model, split into construction (tokenizing, and the
reference's pass where it is precomputed) and training. Loading models and imports are left out. Peak memory is the
process's largest resident size, less that before the trainer was built. Every side of every round is a process of its
own, rounds alternate, ratios compare sides of one round. At the end the loss of all sides on the same pairs is
compared: they must have learned the same.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppo_iteration import DATA, REPOSITORY, machine, revision, versions

SIDES = {
    "trl": "TRL DPOTrainer",
    "trl-precomputed": "TRL DPOTrainer, precomputed reference",
    "rto": "PreferenceTrainer",
    "rto-online": "PreferenceTrainer, reference beside the policy",
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every side does."""

    size: str
    pairs: int
    batch: int
    max_length: int = 512
    threads: int = 2
    seed: int = 0


SIZES = {"stories260K": (256, 16), "llama-384x8-32k": (24, 8)}
"""Pairs, and pairs in one update."""


def prepare(work: Work, folder: Path) -> None:
    """The model and the pairs that fit, in order, as files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

    from rto.data.formats import load_rows, read_pairs

    set_seed(work.seed)
    source = DATA / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    if work.size == "stories260K":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = load_rows(DATA / "prefs" / "hh_harmless_pairs_train.jsonl.gz")
    pairs, _ = read_pairs(rows, tokenizer, max_length=work.max_length)
    few = [rows[p.row] for p in pairs[: work.pairs]]
    if len(few) < work.pairs:
        raise RuntimeError(f"only {len(few)} pairs fit {work.max_length} tokens, {work.pairs} are asked for")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))


def arguments(work: Work, output: Path) -> dict[str, Any]:
    """What both configurations share by name."""
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": work.batch,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_length": work.max_length,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": work.seed,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
    }


def trl_trainer(work: Work, folder: Path, dataset: Any, *, precompute: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        **arguments(work, folder / f"trl-{os.getpid()}"),
        beta=0.1,
        precompute_ref_log_probs=precompute,
        activation_checkpointing=False,
    )
    load = AutoModelForCausalLM.from_pretrained
    return DPOTrainer(
        model=load(folder / "model", dtype=torch.float32),
        ref_model=None if precompute else load(folder / "model", dtype=torch.float32),
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )


def rto_trainer(work: Work, folder: Path, dataset: Any, *, precompute: bool) -> Any:
    from rto import PreferenceConfig, PreferenceTrainer

    args = PreferenceConfig(**arguments(work, folder / f"rto-{os.getpid()}"), precompute_ref_log_probs=precompute)
    return PreferenceTrainer(str(folder / "model"), args, train_dataset=dataset)


RUN = {
    "trl": lambda *a: trl_trainer(*a, precompute=False),
    "trl-precomputed": lambda *a: trl_trainer(*a, precompute=True),
    "rto": lambda *a: rto_trainer(*a, precompute=True),
    "rto-online": lambda *a: rto_trainer(*a, precompute=False),
}


def worker(side: str, folder: Path) -> None:
    """One process of one side: its measurements as a line of JSON, the last of its output."""
    import datasets
    import torch

    work = Work(**json.loads((folder / "work.json").read_text()))
    torch.set_num_threads(work.threads)
    if side == "prepare":
        prepare(work, folder)
        return
    import trl  # noqa: F401  both sides pay for the same imports before the clock starts

    import rto.trainers.preference  # noqa: F401

    datasets.disable_caching()
    dataset = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    before, load = _peak(), os.getloadavg()[0]
    start = time.perf_counter()
    trainer = RUN[side](work, folder, dataset)
    built = time.perf_counter()
    trainer.train()
    end = time.perf_counter()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(
        json.dumps(
            {
                "seconds": {"construction": built - start, "training": end - built, "total": end - start},
                "peak_mib": _peak() - before,
                "loss": {"first": losses[0], "last five": statistics.mean(losses[-5:])},
                "updates": trainer.state.global_step,
                "load_before": load,
                "versions": versions(),
            }
        )
    )


def _peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def spawn(side: str, folder: Path, threads: int) -> str:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", side, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def measure(work: Work, rounds: int) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="rto-benchmark-") as name:
        folder = Path(name)
        (folder / "work.json").write_text(json.dumps(asdict(work)))
        spawn("prepare", folder, work.threads)
        for i in range(rounds):
            for side in SIDES:
                run = json.loads(spawn(side, folder, work.threads).splitlines()[-1])
                runs[side].append(run)
                seconds = run["seconds"]
                print(
                    f"{work.size} round {i + 1}/{rounds}  {side}: {seconds['total']:.1f} s "
                    f"({seconds['construction']:.1f} + {seconds['training']:.1f}), {run['peak_mib']:.0f} MiB, "
                    f"loss {run['loss']['first']:.4f} to {run['loss']['last five']:.4f}",
                    flush=True,
                )
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians of each side, and ratios to TRL's own default within each round."""
    rows = {}
    for side, results in runs.items():
        ratios = [a["seconds"]["total"] / b["seconds"]["total"] for a, b in zip(results, runs["trl"])]
        rows[side] = {
            "seconds": {k: statistics.median(r["seconds"][k] for r in results) for k in results[0]["seconds"]},
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "peak_mib": statistics.median(r["peak_mib"] for r in results),
            "loss": results[0]["loss"],
        }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | total, s | × TRL (min–max) | construction, s | training, s | peak, MiB | last losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, row in rows.items():
        s, r = row["seconds"], row["ratio"]
        lines.append(
            f"| {SIDES[side]} | {s['total']:.1f} | {r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f}) | "
            f"{s['construction']:.1f} | {s['training']:.1f} | {row['peak_mib']:.0f} | {row['loss']['last five']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models")
    results = REPOSITORY / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=results / "preference.json", help="the report")
    parser.add_argument("--worker", choices=("prepare", *RUN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder)
        return
    report: dict[str, Any] = {"machine": machine(), "revision": revision(), "rounds": options.rounds, "sizes": {}}
    for size in options.sizes:
        pairs, batch = SIZES[size]
        work = Work(size=size, pairs=pairs, batch=batch, threads=options.threads)
        runs = measure(work, options.rounds)
        rows = summarize(runs)
        print(f"\n{size}\n{table(rows)}\n")
        report["versions"] = runs["rto"][0]["versions"]
        report["sizes"][size] = {"work": asdict(work), "summary": rows, "runs": runs}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
