"""What `rto plan` predicts beside what is measured: memory and operations, models of 10 to 150 M parameters.

    python benchmarks/plan.py                            # everything, about a quarter of an hour on one core
    python benchmarks/plan.py --parts update             # updates of one model only

Random Llamas, CPU. Three parts:

- ``update``: updates of a language model, full fine-tuning and LoRA, fp32 and bf16 autocast (a frozen base in bf16),
  with and without activation checkpointing, one micro-batch and several.
- ``trainer``: whole iterations of `RTOTrainer`, five full models and five roles on one base, by phase, fp32.
- ``processes``: the same on two processes over gloo (DDP); figures of the first process.

Memory is measured twice: bytes of live tensors (`rto.planning.tracker.LiveTensors`), which a plan predicts, and, in
processes of their own, resident memory of the process above what it had after its imports (``VmHWM``; freed blocks
given back by glibc, see `memory.py`), which has allocator and library buffers on top. Operations are those of
`torch.utils.flop_counter.FlopCounterMode`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memory import GIVE_BACK, SHAPES, Meter, Shape, Work, prepare, run_separate, run_shared
from ppo_iteration import REPOSITORY, machine, revision, versions


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": tied,
    }


CONFIGS = {
    "9M": _llama(256, 688, 6, 8, 4, 8000, False),
    "25M": _llama(384, 1024, 8, 6, 6, 16_000, False),
    "110M": _llama(768, 2048, 12, 12, 12, 32_000, True),
    "148M": _llama(896, 2432, 10, 14, 2, 32_000, False),
}
for _name, _config in CONFIGS.items():
    SHAPES[_name] = Shape(config=_config, dtype="float32", prompt_tokens=64, new_tokens=64, rank=8)
RUNS = {"separate": run_separate, "shared": run_shared}
RANK = 8


class Tracked:
    """The meter that `memory.run_rto` takes, on live tensors and operations."""

    def __init__(self) -> None:
        from rto.planning.tracker import LiveTensors, counter

        self.live, self.count = LiveTensors(), counter()
        self.before = 0
        self.operations: list[int] = []

    def reset(self) -> None:
        """A phase begins."""
        self.live.reset()
        self.before = self.count.get_total_flops()

    def since_reset(self) -> int:
        """A phase ends."""
        self.operations.append(self.count.get_total_flops() - self.before)
        return self.live.peak


def llama_config(name: str, length: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **CONFIGS[name], max_position_embeddings=2 * length, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )


# --- updates of one model


def _warm_up() -> None:
    """What libraries import and set aside at their first use belongs to nobody's peak."""
    import peft  # noqa: F401
    import torch

    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(64, 64)).sum().backward()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()


def update_worker(case: dict[str, Any]) -> dict[str, Any]:
    """One update, predicted and measured."""
    import torch
    from transformers import LlamaForCausalLM

    from rto.planning.activations import Pass
    from rto.planning.arithmetic import train
    from rto.planning.configs import shape_of
    from rto.planning.memory import Placement, Role
    from rto.planning.shapes import Lora
    from rto.planning.tracker import measure_update

    torch.manual_seed(0)
    at, bf16 = Pass(rows=case["rows"], prompt=64, response=64), case["bf16"]
    _warm_up()
    meter = Meter("cpu") if case["resident"] else None
    config = llama_config(case["model"], at.length)
    model: Any = LlamaForCausalLM(config)
    shape, lora = shape_of(config, case["model"]), None
    if case["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model.bfloat16() if bf16 else model,
            LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        lora = Lora(rank=RANK, targets=frozenset(x.name for x in shape.linears))
    if case["checkpointing"]:
        (model.get_base_model() if lora else model).gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    model.train()
    place = Placement(lora=lora, compute=2 if bf16 else 4)
    role = Role(name="policy", shape=shape, trained=True, on_base=lora is not None)
    memory = place.resting([role]) + place.train(role, at, case["passes"], checkpointing=case["checkpointing"])
    work = train(place.forward(role, checkpointing=case["checkpointing"], training=True), at) * case["passes"]
    found = {"predicted": memory.total, "predicted_operations": work.operations, "memory": asdict(memory)}
    if meter is None:
        measured = measure_update(model, at, case["passes"], bf16=bf16)
        return {**found, "measured": measured.peak, "operations": measured.operations}
    from rto.batches import collate
    from rto.models.actor import policy_logprobs

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    meter.reset()
    for _ in range(2):
        for _ in range(case["passes"]):
            ids = torch.randint(3, shape.vocab, (at.rows, at.length)).tolist()
            batch = collate([x[: at.prompt] for x in ids], [x[at.prompt :] for x in ids], pad=0)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = -policy_logprobs(model, batch).sum() / batch.mask.sum()
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {**found, "resident": meter.highest() - meter.baseline}


# --- the trainer


def trainer_worker(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Two iterations of `RTOTrainer`, the worst of each phase."""
    import torch

    work = Work(**json.loads((folder / "work.json").read_text()))
    run: Any = RUNS[case["side"]]
    if case["resident"]:
        import trl  # noqa: F401

        import rto.trainers.rto  # noqa: F401

        torch.ones(64, 64) @ torch.ones(64, 64)
        meter = Meter("cpu")
        found = run(work, folder, meter)
        return {"resident": {name: x - meter.baseline for name, x in found["phases"].items()}}
    tracked = Tracked()
    with tracked.live, tracked.count:
        found = run(work, folder, tracked)
    # sample, score, then the updates, in each iteration
    counts = tracked.operations[len(tracked.operations) // 2 :]
    operations = {"sample": counts[0], "score": counts[1], "update": sum(counts[2:])}
    return {"measured": found["phases"], "operations": operations}


def predicted(case: dict[str, Any], work: Work) -> dict[str, dict[str, float]]:
    """What the plan says of the same iteration."""
    from rto.planning.configs import shape_of
    from rto.planning.job import Iteration
    from rto.planning.memory import Placement, Role
    from rto.planning.shapes import Lora

    shape = shape_of(llama_config(work.shape, work.tokens), work.shape)
    shared = case["side"] == "shared"

    def role(name: str, trained: bool = False) -> Role:
        return Role(name=name, shape=shape, trained=trained, speaks=name not in ("critic", "reward"), on_base=shared)

    iteration = Iteration(
        policy=role("policy", True),
        critic=role("critic", True),
        frozen=tuple(map(role, ("reference", "dpo", "reward"))),
        rollouts=work.rollouts,
        prompt=work.size.prompt_tokens,
        response=work.size.new_tokens,
        tokens=work.rows * work.tokens,
        decoded=2**33,
        epochs=1,
        mini_batches=2,
        checkpointing=work.checkpointing,
    )
    lora = Lora(rank=work.size.rank, targets=frozenset(x.name for x in shape.linears)) if shared else None
    place = Placement(devices=case["processes"], lora=lora, packed=True)
    phases: dict[str, dict[str, float]] = {}
    for x in iteration.phases(place):
        key = x.name.split()[0]
        old = phases.get(key, {"memory": 0.0, "operations": 0.0})
        phases[key] = {
            "memory": max(old["memory"], x.memory.total),
            "operations": old["operations"] + x.work.operations,
        }
    return phases


# --- the driver


def spawn(arguments: list[str], processes: int = 1) -> Any:
    """Run a worker; the last line that it prints."""
    environment = dict(os.environ) | GIVE_BACK | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*start, str(Path(__file__).resolve()), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr[-4000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def updates(models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        small = model == "9M"
        cases = [
            {
                "model": model,
                "lora": lora,
                "bf16": bf16,
                "checkpointing": again,
                "passes": passes,
                "rows": 4 if small else 2,
            }
            for lora in (False, True)
            for bf16 in ((False, True) if small else (False,))
            for again in (False, True)
            for passes in ((1, 2) if small else (1,))
        ]
        found = spawn(["--worker", json.dumps({"updates": [case | {"resident": False} for case in cases]})])
        for case, measured in zip(cases, found["updates"], strict=True):
            row = {**case, "resident": None} | measured
            if not (case["bf16"] or case["checkpointing"] or case["passes"] > 1):
                row |= spawn(["--worker", json.dumps({"updates": [case | {"resident": True}]})])["updates"][0]
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    resident = f", resident {row['resident'] / 1e6:.0f}" if row.get("resident") else ""
    return (
        f"{row['model']} lora={row['lora']} bf16={row['bf16']} checkpointing={row['checkpointing']} "
        f"passes={row['passes']}: predicted {row['predicted'] / 1e6:.0f} MB, live {row['measured'] / 1e6:.0f} "
        f"({row['predicted'] / row['measured']:.3f}){resident}; operations "
        f"{row['predicted_operations'] / row['operations']:.4f}"
    )


def iterations(models: list[str], processes: int) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        work = Work(shape=model, device="cpu", rows=2, checkpointing=False, threads=1, keep_memory=False, iterations=2)
        for side in RUNS:
            with tempfile.TemporaryDirectory(prefix="rto-benchmark-") as name:
                folder = Path(name)
                (folder / "work.json").write_text(json.dumps(asdict(work)))
                prepare(work, folder)
                case = {"model": model, "side": side, "processes": processes, "resident": False}
                start = time.perf_counter()
                found = spawn(["--worker", json.dumps(case), "--folder", name], processes)
                found |= spawn(["--worker", json.dumps(case | {"resident": True}), "--folder", name], processes)
            plan = predicted(case, work)
            for phase, expected in plan.items():
                row = {**case, "phase": phase, "predicted": expected["memory"]}
                row |= {"predicted_operations": expected["operations"]}
                row |= {key: found[key][phase] for key in ("measured", "operations", "resident")}
                rows.append(row)
                print(
                    f"{model} {side} processes={processes} {phase}: predicted {row['predicted'] / 1e6:.0f} MB, live "
                    f"{row['measured'] / 1e6:.0f} ({row['predicted'] / row['measured']:.3f}), resident "
                    f"{row['resident'] / 1e6:.0f}; operations {row['predicted_operations'] / row['operations']:.4f} "
                    f"({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("update", "trainer", "processes"), help="all when not given")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="sizes")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "plan.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        case = json.loads(options.worker)
        if options.folder:
            found = trainer_worker(case, options.folder)
        else:
            found = {"updates": list(map(update_worker, case["updates"]))}
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    report = json.loads(options.output.read_text()) if options.output.is_file() else {}
    report |= {"machine": machine(), "revision": revision(), "versions": versions()}
    for part in options.parts or ("update", "trainer", "processes"):
        if part == "update":
            report[part] = updates(options.models)
        else:
            report[part] = iterations(options.models, 1 if part == "trainer" else 2)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
