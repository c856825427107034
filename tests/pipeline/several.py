"""`rto run` of a few rows in small pieces, as a program of one process or several; or a long wait.

usage: several.py OUTPUT | --nap
"""

import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from test_pipeline import SMALL

from rto import pipeline
from rto.recipe import load_recipe
from rto.rollout.samplers.transformers import TransformersSampler
from rto.trainers import engine


def main() -> None:
    if sys.argv[1] == "--nap":  # longer than an exchange of tensors may take
        engine.TIMEOUT = timedelta(seconds=10)  # processes that start unlike fast meet within it
        if engine.processes().is_main_process:
            time.sleep(14)
        engine.wait_for_all()
        doers = engine.shared_out(range(4), lambda i: engine.processes().process_index)
        print(f"done by {doers}", file=sys.stderr)
        print(f"process {engine.processes().process_index} goes on", file=sys.stderr)
        if engine.processes().is_main_process:
            time.sleep(2)
            print("the last one comes", file=sys.stderr)
        engine.leave()
        print("gone" if not dist.is_initialized() else "still there", file=sys.stderr)
        return
    pipeline.SIDE_BY_SIDE = 16
    plain, drawn = TransformersSampler.draw, []

    def draw(self: Any, prompts: list[list[int]], seeds: Any) -> Any:
        drawn.append(len(prompts))
        return plain(self, prompts, seeds)

    TransformersSampler.draw = draw  # type: ignore[method-assign]
    halved = {name: n // engine.processes().num_processes if "batch_size" in name else n for name, n in SMALL.items()}
    pipeline.run(load_recipe(None, halved), sys.argv[1])
    print(f"drew {sum(drawn)} completions", file=sys.stderr)


if __name__ == "__main__":
    main()
    engine.leave()
