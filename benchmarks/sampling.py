"""Tokens per second of sampling, side by side: our decoder, transformers' `generate` and continuous batching, vLLM.

    make vllm
    .venv-vllm/bin/python benchmarks/sampling.py FOLDER --prompts 32 --tokens 64 --dtype float32 bfloat16

FOLDER is a causal model with its tokenizer. Prompts are random tokens, equal (32) or ragged (8 to 56, 32 on average);
no side stops before the limit, so all draw the same number of tokens; with lengths ``ends`` our rows end one
after the other, and draw together as many. Sides take turns, each time in a process of its
own; what is timed is one draw after a short one that warms up, and what handing over the weights takes. The limit of
the new tokens is, a step, the larger of two times: all weights and the cache read once, at the rate of a copy, and
2 · parameters · rows operations, at the rate of square products in the same precision, both measured in the same
process after the draw; rows that have ended count no more. ``of_limit`` is that time over the time of the whole draw,
``of_limit_with_prompts`` has the prompts' 2 · parameters · tokens operations beside it (the output layer's once a
row). vLLM runs as RTO runs it: in process, with weights that can be replaced; ``vllm-packed`` shows what packing
gives, with which they cannot. All sides run with the settings of memory that the command `rto` makes (`MEMORY`).

With ``--iterations N`` it is iterations of RTO that are timed, by their phases, the model as policy, critic, reference
and DPO model, all whole: what share of an iteration sampling is, by our decoder and by vLLM.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rto.rollout.samplers.transformers import cache_bytes

MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Freed memory is kept, and large tensors lie in large pages."""
EOS = 49_151
"""A token that nobody draws in a vocabulary of 49,152: here it ends a row where it is put in."""
SIDES = ("ours", "generate", "continuous", "vllm", "vllm-packed")


def prompts_of(rows: int, ragged: bool, vocabulary: int) -> list[list[int]]:
    """The same on every side."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.linspace(8, 56, rows).round().int().tolist() if ragged else [32] * rows
    return [torch.randint(vocabulary, (n,), generator=g).tolist() for n in lengths]


def best(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(times))


def fastest_products(dtype: torch.dtype) -> float:
    """Operations per second of square products: torch's own, or oneDNN's with packed weights where that is faster."""
    n = 1024
    x, weight = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    seconds = [best(lambda: x @ weight)]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, n)
        seconds.append(best(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")))
    return 2 * n**3 / min(seconds)


def limit(model: Any, prompts: list[list[int]], ends: list[int]) -> dict[str, float]:
    """Seconds that rows of so many new tokens cannot go below, those of the prompts, and what that comes from."""
    dtype, read = model.dtype, sum(map(len, prompts))
    parameters = sum(p.numel() for p in model.parameters())
    source = torch.ones(2**27 // dtype.itemsize, dtype=dtype)
    target = torch.empty_like(source)
    copy = 2**28 / best(lambda: target.copy_(source))  # bytes read and written
    products = fastest_products(dtype)
    seconds = 0.0
    for step in range(max(ends)):
        cached = [len(x) + step for x, end in zip(prompts, ends) if end > step]
        moved = (parameters * dtype.itemsize + cache_bytes(model) * sum(cached)) / copy
        seconds += max(moved, 2 * parameters * len(cached) / products)
    head = model.get_output_embeddings().weight.numel()  # reads the last token of each prompt alone
    prompt = 2 * ((parameters - head) * read + head * len(prompts)) / products
    return {"copy": copy, "products": products, "seconds": seconds, "prompts": prompt}


def timed(found: dict[str, list[float]]) -> None:
    """Let our decoder note the seconds of its prompts, its steps and its choices of a token."""
    from rto.rollout.samplers import transformers

    for owner, name in ((transformers._Decoder, "read"), (transformers._Decoder, "step"), (transformers, "draw")):
        work = getattr(owner, name)

        def spy(*args: Any, work: Callable[..., Any] = work, name: str = name) -> Any:
            start = time.perf_counter()
            out = work(*args)
            found.setdefault(name, []).append(time.perf_counter() - start)
            return out

        setattr(owner, name, spy)


def ours(model: Any, tokens: int, eos: int = -1) -> Callable[[list[list[int]]], Any]:
    """Our sampler, on its own cache."""
    from rto.rollout.samplers import transformers
    from rto.rollout.samplers.base import SamplingConfig

    transformers.WAYS = tuple(w for w in transformers.WAYS if w.name == "own cache")
    config = SamplingConfig(max_completion_length=tokens)
    sampler = transformers.TransformersSampler(config=config, eos_ids=(eos,), pad_id=0)
    return lambda prompts: sampler(model, prompts, 0)


def ends(rows: int, longest: int) -> list[int]:
    """After how many tokens each row ends."""
    lengths: list[int] = torch.linspace(8, longest, rows).round().int().tolist()
    return lengths


def ending(ends: Any) -> None:
    """Make our sampler end its rows, shortest prompts first, after these numbers of tokens."""
    from rto.rollout.samplers import transformers

    class Ending(transformers._Drawing):
        def __call__(self, logits: Any, rows: Any, step: int) -> Any:
            return super().__call__(logits, rows, step).masked_fill(ends[rows] == step + 1, EOS)

    transformers._Drawing = Ending  # type: ignore[misc]


def generate(model: Any, tokens: int) -> Callable[[list[list[int]]], Any]:
    """The library's own loop, prompts padded on the left."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=tokens, do_sample=True, eos_token_id=-1, pad_token_id=0)

    def draw(prompts: list[list[int]]) -> Any:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts])
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts])
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)

    return draw


def continuous(model: Any, tokens: int, rows: int) -> Callable[[list[list[int]]], Any]:
    """The library's continuous batching with room for all rows: left to itself it takes most of the memory."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    room = ContinuousBatchingConfig(
        num_blocks=rows * (2 + tokens // 256), max_batch_tokens=64 * rows, max_memory_percent=0.3
    )
    config = GenerationConfig(max_new_tokens=tokens, do_sample=True, eos_token_id=-1, pad_token_id=0)
    return lambda prompts: model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=room, progress_bar=False
    )


def vllm(
    model: Any, tokens: int, rows: int, packed: bool
) -> tuple[Callable[[list[list[int]]], Any], Callable[[], Any]]:
    """An engine in this process, and what hands the weights over."""
    from rto.rollout.samplers import vllm as engines
    from rto.rollout.samplers.base import SamplingConfig

    if packed:
        engines.keep_weights_plain = lambda: None
    engine = engines.Colocated(max_num_seqs=rows, max_model_len=512, gpu_memory_utilization=0.3)
    config = SamplingConfig(max_completion_length=tokens)
    engine.load(model)

    def draw(prompts: list[list[int]]) -> Any:
        return engine.complete(prompts, list(range(len(prompts))), config, (-1,))

    return draw, lambda: engine.load(model)


PHASES = ("sample", "score", "credit", "update")


def phases(job: dict[str, Any]) -> dict[str, float]:
    """Median seconds of the phases of an iteration of RTO, after one to warm up."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from rto.trainers.rto import RTOConfig, RTOTrainer

    torch.set_num_threads(job["threads"])
    folder, rows = job["folder"], job["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer.batch_decode(prompts_of(rows * (job["iterations"] + 1), False, len(tokenizer)))
    with tempfile.TemporaryDirectory(prefix="rto-benchmark-") as out:
        args = RTOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=job["dtype"] == "bfloat16",
            use_vllm=job["side"] == "vllm",
            vllm_mode="colocate",
            vllm_max_model_length=512,
            vllm_gpu_memory_utilization=0.3,
            per_device_train_batch_size=rows,
            max_completion_length=job["tokens"],
            max_tokens_per_micro_batch=2048,
            learning_rate=1e-7,
            score_coef=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            log_completions=0,
        )
        trainer = RTOTrainer(folder, args, dpo_model=folder, train_dataset=Dataset.from_dict({"prompt": prompts}))
        trainer.train()
    logs = [row for row in trainer.state.log_history if "seconds/sample" in row][1:]
    return {name: statistics.median(row[f"seconds/{name}"] for row in logs) for name in PHASES}


def side(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One measurement for each kind of lengths, in this process."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).eval()
    sync = 0.0
    if job["side"].startswith("vllm"):
        draw, load = vllm(model, job["tokens"], job["prompts"], job["side"] == "vllm-packed")
        sync = best(load, 2)
    elif job["side"] == "continuous":
        draw = continuous(model, job["tokens"], job["prompts"])
    elif job["side"] == "generate":
        draw = generate(model, job["tokens"])
    else:
        draw = ours(model, job["tokens"])
    rows, longest = [], 2 * job["tokens"] - 8
    parts: dict[str, list[float]] = {}
    if job["side"] == "ours":
        timed(parts)
    with torch.no_grad():
        draw(prompts_of(2, False, model.config.vocab_size))
        for lengths in job["lengths"]:
            if lengths == "ends":
                draw = ours(model, longest, EOS)
                draw(prompts_of(2, False, model.config.vocab_size))  # it checks itself once
                ending(torch.tensor(ends(job["prompts"], longest)))
            prompts = prompts_of(job["prompts"], lengths == "ragged", model.config.vocab_size)
            parts.clear()
            start, cpu = time.perf_counter(), time.process_time()
            draw(prompts)
            took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            even = [job["tokens"]] * len(prompts)
            found = limit(model, prompts, ends(len(prompts), longest) if lengths == "ends" else even)
            took |= {f"median {name}": statistics.median(x) for name, x in parts.items()}
            rows.append({"lengths": lengths, "sync": sync, "limit": found, "load": os.getloadavg()[0], **took})
    return rows


def main() -> None:
    """All sides, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[32])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", default=["equal", "ragged"], choices=["equal", "ragged", "ends"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240, help="that one side may take, its start included")
    parser.add_argument("--vllm_python", default=sys.executable, help="of an environment that has vLLM")
    parser.add_argument("--output", type=Path, help="a JSON file; rows are added to those that it has")
    parser.add_argument("--iterations", type=int, default=0, help="time iterations of RTO, not draws")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.job:
        given = json.loads(flags.job)
        print(json.dumps([phases(given)] if "iterations" in given else side(given)))
        return
    for dtype, prompts, tokens in itertools.product(flags.dtype, flags.prompts, flags.tokens):
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        job = {"folder": flags.folder, "dtype": dtype, "prompts": prompts, "tokens": tokens, "threads": flags.threads}
        if flags.iterations:
            keep(shares(job | {"iterations": flags.iterations}, flags), flags.output)
            continue
        for _, name in itertools.product(range(flags.rounds), flags.sides):
            for found in measured(job | {"side": name, "lengths": flags.lengths}, flags):
                runs.setdefault((name, found.pop("lengths")), []).append(found)
        rows = [
            {"dtype": dtype, "prompts": prompts, "tokens": tokens, "side": name, "lengths": lengths}
            | summary(found, prompts * tokens)
            for (name, lengths), found in runs.items()
        ]
        for row in rows:
            print(
                "| {dtype} | {prompts} × {tokens} {lengths} | {side} | {tokens_per_second:.0f} | {of_limit:.0%} | "
                "{of_limit_with_prompts:.0%} | {sync:.2f} | {load:.1f} |".format(**row),
                flush=True,
            )
        keep(rows, flags.output)


def keep(rows: list[dict[str, Any]], output: Path | None) -> None:
    """Add rows to those of a file."""
    if output:
        before = json.loads(output.read_text()) if output.exists() else []
        output.write_text(json.dumps(before + rows, indent=1) + "\n")


def shares(job: dict[str, Any], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """What share of an iteration sampling is, by who samples."""
    rows = []
    for name in ("ours", "vllm"):
        for found in measured(job | {"side": name}, flags):
            seconds = sum(found.values())
            print(
                "| {dtype} | {prompts} × {tokens} | {side} | ".format(**job, side=name)
                + " | ".join(f"{found[phase]:.1f}" for phase in PHASES)
                + f" | {found['sample'] / seconds:.0%} |",
                flush=True,
            )
            what = {key: job[key] for key in ("dtype", "prompts", "tokens", "iterations")}
            rows.append(what | {"side": name, "phases": {k: round(x, 3) for k, x in found.items()}})
    return rows


def measured(job: dict[str, Any], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """What a process of its own says; nothing where it fails or takes too long."""
    python = flags.vllm_python if job["side"].startswith("vllm") else sys.executable
    line = [python, __file__, flags.folder, "--job", json.dumps(job)]
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=flags.seconds, env=os.environ | MEMORY, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{job['side']} took more than {flags.seconds:.0f} s", file=sys.stderr)
        return []
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        print(f"{job['side']} ended with {done.returncode}: {said}", file=sys.stderr)  # -9: killed, as for memory
        return []
    rows: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def summary(found: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians over the rounds."""

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return round(statistics.median(map(value, found)), 4)

    return {
        "rounds": len(found),
        "tokens_per_second": median(lambda x: tokens / x["seconds"]),
        "of_limit": median(lambda x: x["limit"]["seconds"] / x["seconds"]),
        "of_limit_with_prompts": median(lambda x: (x["limit"]["seconds"] + x["limit"]["prompts"]) / x["seconds"]),
        "limit": median(lambda x: x["limit"]["seconds"]),
        "seconds": median(lambda x: x["seconds"]),
        "cpu": median(lambda x: x["cpu"]),
        "sync": median(lambda x: x["sync"]),
        "load": median(lambda x: x["load"]),
        "copy": round(statistics.median(x["limit"]["copy"] for x in found)),
        "products": round(statistics.median(x["limit"]["products"] for x in found)),
        **{name: median(lambda x, name=name: x[name]) for name in found[0] if name.startswith("median")},
    }


if __name__ == "__main__":
    main()
