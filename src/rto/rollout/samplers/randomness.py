"""Random numbers of a row: a function of its seed and the step, whatever else is decoded beside it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the state grows by the first, a number mixes it by the others."""


def row_seeds(seed: int, rows: int) -> list[int]:
    """One seed a row, from 0 to 2⁶³ − 1."""
    states = torch.arange(1, rows + 1) * _signed(INCREMENT) + _signed(seed % 2**64)
    return [int(z) for z in _shifted(_mixed(states), 1)]


def uniforms(seeds: Sequence[int], steps: int, device: torch.device | str = "cpu") -> Float[Tensor, "B T"]:
    """Numbers in [0, 1) of 53 bits, one for each row and step, in float64; the same ones on every device."""
    start: Int[Tensor, "B 1"] = _mixed(torch.tensor([_signed(s % 2**64) for s in seeds], device=device))[:, None]
    states = start + torch.arange(1, steps + 1, device=device) * _signed(INCREMENT)
    return _shifted(_mixed(states), 11).double() * 2.0**-53


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right with zeros from the left: torch's own shift keeps the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    """64 bits as torch holds them."""
    return x - 2**64 if x >= 2**63 else x
