"""A task of a few letters for runs of several rounds, and such a run as a program that can be killed.

usage: rounds_task.py RECIPE.yaml OUTPUT [--kill N]    SIGKILL at the N-th flush of a file to disk
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

WORDS = ["ab", "cab", "back", "abacus", "crab", "dab", "fable", "garb"]


def words(rows: int, seed: int, split: str) -> list[str]:
    """Distinct prompts; those of splits differ."""
    return [f"{split[0]}{WORDS[i % len(WORDS)]}{i}" for i in range(rows)]


def gold(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """How many letters a completion has of those up to m, less the others, as text or as messages."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(1 if x < "n" else -1 for x in text)) / 4 for text in texts]


def main() -> None:
    import torch

    torch.set_num_threads(1)
    from rto import pipeline
    from rto.recipe import load_recipe

    path, folder, *rest = sys.argv[1:]
    if rest:
        left, flush = int(rest[1]), os.fsync

        def fsync(file: int) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(file)

        os.fsync = fsync
    pipeline.SIDE_BY_SIDE = 8
    pipeline.run(load_recipe(path), Path(folder))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
