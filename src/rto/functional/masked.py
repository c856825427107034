"""Sums, means and whitening under a mask: the only reducers in the project.

A mask means one thing: True = keep. What is masked out never reaches a statistic, even when it is NaN.
Every statistic is global: ``all_reduce`` sums a tensor over processes and is the identity in one process.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]


def local(x: Tensor) -> Tensor:
    """The sum over one process: the identity."""
    return x


def masked_sum(x: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], dim: int | None = None) -> Float[Tensor, "..."]:
    """Σ x over the kept entries, along ``dim`` or over everything."""
    kept = torch.where(mask, x, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(
    x: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], *, all_reduce: AllReduce = local
) -> Float[Tensor, ""]:
    """Σ x / n over the kept entries of all processes; 0 where nothing is kept."""
    total, count = all_reduce(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
    return total / count.clamp(min=1)


def masked_var(
    x: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], *, all_reduce: AllReduce = local
) -> Float[Tensor, ""]:
    """Σ (x − mean)² / n (biased) over the kept entries of all processes, in two passes for accuracy."""
    mean = masked_mean(x, mask, all_reduce=all_reduce)
    return masked_mean((x - mean).square(), mask, all_reduce=all_reduce)


def whiten(
    x: Float[Tensor, "*dims"],
    mask: Bool[Tensor, "*dims"],
    *,
    center: bool = True,
    eps: float = 1e-8,
    all_reduce: AllReduce = local,
) -> Float[Tensor, "*dims"]:
    """(x − mean) / √(var + eps) on the kept entries, 0 elsewhere.

    ``center=False`` adds the mean back: rewards keep their mean, advantages lose it (Huang et al., 2024,
    "The N+ implementation details of RLHF with PPO", details 12 and 13).
    """
    mean = masked_mean(x, mask, all_reduce=all_reduce)
    var = masked_mean((x - mean).square(), mask, all_reduce=all_reduce)
    white = (x - mean) * torch.rsqrt(var + eps)
    return torch.where(mask, white if center else white + mean, 0.0)


def last_kept(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True on the last kept entry of each row; a row that keeps nothing is all False."""
    after = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (after == 1)
