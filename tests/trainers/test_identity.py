"""What two runs are compared by, where a user has given an object instead of settings."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from rto.credit import METHODS, Credit
from rto.functional.advantages import GAE, ReinforcePlusPlus
from rto.functional.preference import LOSSES
from rto.functional.rewards import AdaptiveKL
from rto.trainers.checkpoints import CheckpointError
from rto.trainers.identity import compare, told, weights_digest


@dataclass(frozen=True)
class Halved(GAE):
    """An estimator of a user's own."""

    by: float = 2.0

    def __call__(self, *args: Any) -> Any:
        advantages, returns = super().__call__(*args)
        return advantages / self.by, returns


class Plain:
    """One that is no dataclass."""

    needs_values = False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, rewards: Float[Tensor, "B T"], values: Any, mask: Any) -> Any:
        return rewards * self.scale, rewards


CREDITS = {
    **{name: Credit.of(name) for name in METHODS},
    "own": Credit(estimator=Halved()),
    "own, other": Credit(estimator=Halved(by=3.0)),
    "plain": Credit(estimator=Plain(1.0)),
    "plain, other": Credit(estimator=Plain(2.0)),
    "lambda": Credit(estimator=GAE(lam=0.9)),
    "critic-free": Credit(estimator=ReinforcePlusPlus(gamma=0.9)),
    "steered": Credit(kl_control=AdaptiveKL(0.01, 1.0, 100)),
    "whitened": Credit(whiten_rewards=True),
}


def test_every_credit_is_told_from_every_other() -> None:
    """And written to a file and read back, none from itself; what it remembers does not count."""
    every = {name: told("credit", credit) for name, credit in CREDITS.items()}
    for name, theirs in every.items():
        for other, ours in every.items():
            found = compare(json.loads(json.dumps(theirs)), ours)
            assert (found is None) == (name == other), (name, other)
    credit = Credit(normalize_scores=True)
    before = told("credit", credit)
    credit.score_moments.update(torch.tensor([1.0, 3.0]))
    assert told("credit", credit) == before


def test_every_loss_is_told_from_every_other() -> None:
    every = [told("the loss", kind()) for kind in LOSSES.values()]
    assert len({json.dumps(x) for x in every}) == len(every)


def test_a_run_is_not_resumed_with_another_estimator(trainer: Callable[..., Any], tmp_path: Path) -> None:
    """Settings are the same; the message names what differs."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(credit=Credit(estimator=Halved()), **settings).train()
    with pytest.raises(CheckpointError, match=r"credit\.estimator\.by is 2\.0 there and 3\.0 here"):
        trainer(credit=Credit(estimator=Halved(by=3.0)), **settings).train(resume_from_checkpoint=True)


def test_a_digest_is_of_all_weights(tiny_model: Callable[..., Any]) -> None:
    model, other = tiny_model(), tiny_model()
    assert weights_digest(model, torch.clone) == weights_digest(other, torch.clone)
    with torch.no_grad():
        other.model.norm.weight[-1] += 1
    assert weights_digest(model, torch.clone) != weights_digest(other, torch.clone)
