"""Several processes in one: each rank is a thread, and `all_reduce` waits for all of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """``on_ranks(work, shards)`` runs ``work(shard, all_reduce)`` on a rank for each shard."""

    def run(work: Callable[[Any, Callable[[Tensor], Tensor]], Any], shards: Sequence[Any]) -> list[Any]:
        barrier = threading.Barrier(len(shards), timeout=20)
        slots: list[Any] = [None] * len(shards)

        def rank(i: int) -> Any:
            def all_reduce(x: Tensor) -> Tensor:
                slots[i] = x.clone()
                barrier.wait()
                total = torch.stack(slots).sum(0)
                barrier.wait()
                return total

            return work(shards[i], all_reduce)

        with ThreadPoolExecutor(len(shards)) as pool:
            return list(pool.map(rank, range(len(shards))))

    return run
