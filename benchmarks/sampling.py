"""Tokens per second of sampling, side by side: our decoder, transformers' `generate` and continuous batching, vLLM.

    make vllm
    .venv-vllm/bin/python benchmarks/sampling.py FOLDER --prompts 32 --tokens 64 --dtype float32 bfloat16

FOLDER is a causal model with its tokenizer. Prompts are random tokens, equal (32) or ragged (8 to 56, 32 on average);
no side stops before the limit, so all draw the same number of tokens. Sides take turns, each time in a process of its
own; what is timed is one draw after another one that warms up, and what handing over the weights takes. The limit is
the larger of two times for the new tokens: all weights read once a step, at the rate of a copy in the same process,
and 2 · parameters · rows operations a step, at the rate of square products in the same precision. ``of_limit`` is that
time over the time it took. vLLM runs as RTO runs it: in process, with weights that can be replaced; ``vllm-packed``
shows what packing gives, with which they cannot.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


def limit(parameters: int, rows: int, steps: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds that the new tokens cannot go below, and what they were computed from."""
    source = torch.ones(2**27 // dtype.itemsize, dtype=dtype)
    target = torch.empty_like(source)
    copy = 2**28 / best(lambda: target.copy_(source))  # bytes read and written
    n = 1024
    a = torch.randn(n, n).to(dtype)
    products = 2 * n**3 / best(lambda: a @ a)
    bytes_read = parameters * dtype.itemsize / copy
    operations = 2 * parameters * rows / products
    return {"copy": copy, "products": products, "seconds": steps * max(bytes_read, operations)}


def ours(model: Any, tokens: int, way: str) -> Callable[[list[list[int]]], Any]:
    """Our sampler, kept to one of its ways."""
    from rto.rollout.samplers import transformers
    from rto.rollout.samplers.base import SamplingConfig

    transformers.WAYS = tuple(w for w in transformers.WAYS if w.name == way)
    config = SamplingConfig(max_completion_length=tokens)
    sampler = transformers.TransformersSampler(config=config, eos_ids=(-1,), pad_id=0)
    return lambda prompts: sampler(model, prompts, 0)


def continuous(model: Any, tokens: int) -> Callable[[list[list[int]]], Any]:
    """The library's continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=tokens, do_sample=True, eos_token_id=-1, pad_token_id=0)
    return lambda prompts: model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)


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


def side(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype).eval()
    prompts = prompts_of(job["prompts"], job["ragged"], model.config.vocab_size)
    found: dict[str, Any] = {"sync": 0.0}
    if job["side"].startswith("vllm"):
        draw, sync = vllm(model, job["tokens"], job["prompts"], job["side"] == "vllm-packed")
        found["sync"] = best(sync, 2)
    elif job["side"] == "continuous":
        draw = continuous(model, job["tokens"])
    else:
        draw = ours(model, job["tokens"], "own cache" if job["side"] == "ours" else "generate")
    with torch.no_grad():
        draw(prompts[:2])
        start, cpu = time.perf_counter(), time.process_time()
        draw(prompts)
        found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    parameters = sum(p.numel() for p in model.parameters())
    found["limit"] = limit(parameters, job["prompts"], job["tokens"], dtype)
    return found


def main() -> None:
    """All sides, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[32])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", default=["equal", "ragged"], choices=["equal", "ragged"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.job:
        print(json.dumps(side(json.loads(flags.job))))
        return
    rows = []
    shapes = [(d, p, t, r) for d in flags.dtype for p in flags.prompts for t in flags.tokens for r in flags.lengths]
    for dtype, prompts, tokens, lengths in shapes:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in flags.sides}
        job = {"folder": flags.folder, "dtype": dtype, "prompts": prompts, "tokens": tokens, "threads": flags.threads}
        for _ in range(flags.rounds):
            for name in flags.sides:
                asked = json.dumps(job | {"side": name, "ragged": lengths == "ragged"})
                done = subprocess.run(
                    [sys.executable, __file__, flags.folder, "--job", asked], capture_output=True, text=True
                )
                if done.returncode:
                    print(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
        for name, found in runs.items():
            if not found:
                continue
            seconds = statistics.median(x["seconds"] for x in found)
            row = {"dtype": dtype, "prompts": prompts, "tokens": tokens, "lengths": lengths, "side": name}
            row |= {"tokens_per_second": prompts * tokens / seconds, "runs": found}
            row["of_limit"] = statistics.median(x["limit"]["seconds"] for x in found) / seconds
            row["cpu"] = statistics.median(x["cpu"] for x in found)
            row["sync"] = statistics.median(x["sync"] for x in found)
            rows.append(row)
            print(
                f"| {dtype} | {prompts} × {tokens} {lengths} | {name} | {row['tokens_per_second']:.0f} | "
                f"{row['of_limit']:.0%} | {row['cpu']:.1f} | {row['sync']:.2f} |",
                flush=True,
            )
    if flags.output:
        flags.output.write_text(json.dumps({"arguments": {**vars(flags), "output": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
