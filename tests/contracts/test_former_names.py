"""Names that users' scripts may import from where they were before."""

from importlib import import_module

import pytest

FORMER = {
    "rto.rollout.sampling": ("Sampler", "SamplingConfig", "TransformersSampler", "_Decoder"),
    "rto.data.embedded": ("gold_reward", "prompts", "demonstrations", "build"),
}


@pytest.mark.parametrize("module", FORMER)
def test_they_are_there(module: str) -> None:
    found = import_module(module)
    assert all(hasattr(found, name) for name in FORMER[module])
