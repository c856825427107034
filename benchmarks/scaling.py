"""How the cost of an RTO iteration grows: with completion length, with the batch, with time, and on ragged lengths.

    python benchmarks/scaling.py

Everything on random Llamas and made-up prompts, one process, fp32. Four measurements:

- ``length``: completions of 32 to 256 tokens, 32 prompts.
- ``batch``: 16 to 128 prompts, 64 new tokens.
- ``ragged``: completions that end between 5 and 128 tokens (each length as likely), beside the same number of
  tokens at equal lengths, on a model where arithmetic counts.
- ``leak``: 200 iterations: seconds and resident memory, the last 50 beside the 50 after warming up.

Seconds are medians of iterations, by the phases that the trainer logs.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_iteration import REPOSITORY, Work, machine, prepare, revision, versions

PHASES = ("sample", "score", "credit", "update")
PARTS = ("length", "batch", "leak", "ragged")


@contextmanager
def endings(first: int, last: int) -> Iterator[None]:
    """Let every completion end with EOS at a length drawn evenly from first … last."""
    import torch

    from rto.rollout.samplers import transformers

    generator = torch.Generator().manual_seed(0)

    class Ending(transformers._Drawing):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.ends = torch.randint(first, last + 1, (len(self.uniform),), generator=generator)

        def __call__(self, logits: Any, rows: Any, step: int) -> Any:
            tokens = super().__call__(logits, rows, step).clamp(min=3)
            return tokens.masked_fill(self.ends[rows] == step + 1, 2)

    drawing, transformers._Drawing = transformers._Drawing, Ending  # type: ignore[misc]
    try:
        yield
    finally:
        transformers._Drawing = drawing  # type: ignore[misc]


def resident_mib() -> float:
    """Memory the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(folder: Path, *, prompts: int, new_tokens: int, iterations: int, ragged: bool = False) -> dict[str, Any]:
    """Train for so many iterations after one to warm up; seconds by phase, tokens sampled, resident memory."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from rto.rollout.samplers.transformers import TransformersSampler
    from rto.trainers.rto import RTOConfig, RTOTrainer

    torch.manual_seed(0)
    args = RTOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        per_device_train_batch_size=prompts,
        num_mini_batches=4,
        total_episodes=prompts * (iterations + 1),
        num_train_epochs=1000,
        learning_rate=1e-6,
        max_completion_length=new_tokens,
        max_tokens_per_micro_batch=4096,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        log_completions=0,
    )
    lengths: list[int] = []
    resident: list[float] = []
    inner = TransformersSampler(config=args.sampling(), eos_ids=(2,) if ragged else (), pad_id=0)

    def sampler(*given: Any) -> Any:
        samples = inner(*given)
        lengths.append(int(samples.mask.sum()))
        return samples

    class Memory(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 4 == 0:
                resident.append(resident_mib())

    trainer = RTOTrainer(
        str(folder / "model"),
        args,
        dpo_model=str(folder / "dpo_model"),
        reward_funcs=str(folder / "reward_model"),
        train_dataset=Dataset.from_dict({"prompt": json.loads((folder / "prompts.json").read_text())}),
        sampler=sampler,
        callbacks=[Memory()],
    )
    if ragged:
        with endings(5, new_tokens):
            trainer.train()
    else:
        trainer.train()
    rows = [row for row in trainer.state.log_history if "seconds/sample" in row][1:]
    phases = {name: [row[f"seconds/{name}"] for row in rows] for name in PHASES}
    return {
        "prompts": prompts,
        "new_tokens": new_tokens,
        "tokens": statistics.mean(lengths[1:]),
        "phases": {name: statistics.median(seconds) for name, seconds in phases.items()},
        "seconds": [sum(parts) for parts in zip(*phases.values())],
        "resident_mib": resident[1:],
    }


def growth(folder: Path, settings: list[tuple[int, int]], iterations: int) -> list[dict[str, Any]]:
    """One row for each (prompts, new tokens)."""
    rows = []
    for prompts, new_tokens in settings:
        row = measure(folder, prompts=prompts, new_tokens=new_tokens, iterations=iterations)
        row["microseconds_a_token"] = 1e6 * statistics.median(row["seconds"]) / row["tokens"]
        rows.append(row)
        print(
            f"{prompts} prompts, {new_tokens} new tokens: {statistics.median(row['seconds']):.3f} s, "
            f"{row['microseconds_a_token']:.0f} µs a token",
            flush=True,
        )
    return rows


def ragged(folder: Path, iterations: int) -> dict[str, Any]:
    """Lengths from 5 to 128 beside equal lengths, seconds a sampled token, phase by phase."""
    uneven = measure(folder, prompts=64, new_tokens=128, iterations=iterations, ragged=True)
    even = measure(folder, prompts=64, new_tokens=round(uneven["tokens"] / 64), iterations=iterations)
    ratio = {}
    for phase in (*PHASES, "all"):
        cost = [
            (sum(row["phases"].values()) if phase == "all" else row["phases"][phase]) / row["tokens"]
            for row in (uneven, even)
        ]
        ratio[phase] = cost[0] / cost[1]
    print("ragged / equal, seconds a token:", {phase: round(x, 3) for phase, x in ratio.items()}, flush=True)
    return {"ragged": uneven, "equal": even, "ratio": ratio}


def leak(folder: Path, iterations: int) -> dict[str, Any]:
    """Seconds and memory of the last quarter beside the second."""
    run = measure(folder, prompts=32, new_tokens=16, iterations=iterations)
    quarter = iterations // 4
    seconds, resident = run["seconds"], run["resident_mib"]
    found = {
        "iterations": iterations,
        "seconds_ratio": statistics.median(seconds[-quarter:]) / statistics.median(seconds[quarter : 2 * quarter]),
        "resident_mib": {"early": statistics.median(resident[quarter : 2 * quarter]), "late": resident[-1]},
    }
    print("leak:", found, flush=True)
    return {**found, "curve": [round(x, 1) for x in resident]}


def plot(found: dict[str, Any], path: Path) -> None:
    """Seconds an iteration against completion length and against the batch, with a line through the origin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for ax, key, name, label in (
        (axes[0], "length", "new_tokens", "tokens a completion (32 prompts)"),
        (axes[1], "batch", "prompts", "prompts (64 tokens a completion)"),
    ):
        rows = found[key]
        x = [row[name] for row in rows]
        for phase in ("sample", "score", "update"):
            ax.plot(x, [row["phases"][phase] for row in rows], marker="o", label=phase)
        ax.plot(x, [statistics.median(row["seconds"]) for row in rows], marker="o", color="black", label="all")
        ax.set_xlabel(label)
        ax.set_ylabel("seconds an iteration")
        ax.set_xlim(0)
        ax.set_ylim(0)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    results = REPOSITORY / "benchmarks" / "results"
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations of a setting")
    parser.add_argument("--leak", type=int, default=200, help="iterations of the long run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="others are kept as they are")
    parser.add_argument("--output", type=Path, default=results / "scaling.json")
    parser.add_argument("--figure", type=Path, default=REPOSITORY / "docs" / "figures" / "scaling.svg")
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory(prefix="rto-benchmark-") as name:
        sizes = {"small": "llama-64x4-1k", "large": "llama-384x8-32k"}
        for folder, size in sizes.items():
            (Path(name) / folder).mkdir()
            prepare(Work(size=size, prompts=128, prompt_tokens=32, new_tokens=64, iterations=0), Path(name) / folder)
        small, large = (Path(name) / folder for folder in sizes)
        measurements: dict[str, Callable[[], Any]] = {
            "length": lambda: growth(small, [(32, n) for n in (32, 64, 128, 256)], options.iterations),
            "batch": lambda: growth(small, [(n, 64) for n in (16, 32, 64, 128)], options.iterations),
            "leak": lambda: leak(small, options.leak),
            "ragged": lambda: ragged(large, max(1, options.iterations // 2)),
        }
        found = json.loads(options.output.read_text()) if options.output.is_file() else {}
        for part in options.parts:
            found[part] = measurements[part]()
            here = {"machine": machine(), "revision": revision(), "versions": versions()}
            found.setdefault("measured", {})[part] = {**here, "threads": torch.get_num_threads()}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, options.figure)
    print(f"written to {options.output} and {options.figure}")


if __name__ == "__main__":
    main()
