"""Policies side by side on held-out prompts: the judge's score, win rate and KL, each with its standard error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rto.batches import Samples
from rto.evaluation.statistics.estimates import Estimate
from rto.functional.masked import masked_sum
from rto.models.actor import score_logprobs
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.scoring import draw


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one policy wrote, and how far it has moved."""

    completions: list[str]
    gold: list[float]
    """By the gold reward, or by the reward model where a task has none."""
    kl: list[float]
    """log π/π_ref of each completion, nats: its mean estimates KL(π ‖ π_ref) for a completion."""
    lengths: list[int]
    ended: list[bool]
    samples: Samples


@torch.no_grad()
def answer(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    judge: Callable[[list[str], list[bool]], list[float]],
    sampling: SamplingConfig,
    *,
    seed: int,
    max_tokens: int,
) -> Answers:
    """Complete each prompt once and judge the completions."""
    sampler = TransformersSampler.of(policy, tokenizer, sampling)
    drawn = draw(sampler, policy, tokenizer, prompts, seed)
    samples = drawn.samples
    score = partial(score_logprobs, temperature=sampling.temperature or 1.0, max_tokens=max_tokens)
    ratio = score(policy, samples) - score(reference, samples)
    return Answers(
        completions=drawn.texts,
        gold=judge(drawn.texts, drawn.ended),
        kl=masked_sum(ratio, samples.mask, dim=-1).tolist(),
        lengths=samples.mask.sum(1).tolist(),
        ended=drawn.ended,
        samples=samples,
    )


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Share of prompts on which ours scores higher; a draw counts half."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return Estimate.of((a > b) + 0.5 * (a == b))


def summary(answers: Answers, baseline: Answers | None, seconds: float, folder: str) -> dict[str, object]:
    """One row of the results table."""
    gold, kl = Estimate.of(answers.gold), Estimate.of(answers.kl)
    wins = None if baseline is None else win_rate(answers.gold, baseline.gold)
    return {
        "folder": folder,
        "gold": gold.mean,
        "gold_se": gold.se,
        "win_rate": None if wins is None else wins.mean,
        "win_rate_se": None if wins is None else wins.se,
        "kl": kl.mean,
        "kl_se": kl.se,
        "mean_length": float(np.mean(answers.lengths)),
        "eos_rate": float(np.mean(answers.ended)),
        "seconds": seconds,
    }
