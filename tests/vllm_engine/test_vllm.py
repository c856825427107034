"""RTO with vLLM drawing, in this process and behind a server; whole policies and adapters."""

import itertools
import math
from typing import Any

import pytest
import torch
from vllm.model_executor.layers import utils
from vllm.platforms import current_platform

from rto.models.actor import policy_logprobs
from rto.rollout.samplers import vllm
from rto.rollout.samplers.base import SamplerError, SamplingConfig
from rto.rollout.samplers.engines import EngineSampler
from rto.rollout.samplers.transformers import TransformersSampler

MODES, KINDS = ("colocate", "server"), ("whole", "lora")  # an adapter goes to a server that a whole policy has left
PACKED = utils.dispatch_cpu_unquantized_gemm
WITHIN = 1e-3
"""Nats, in fp32."""


@pytest.fixture(params=MODES)
def mode(request):
    """Arguments of a mode."""
    if request.param == "colocate":
        return {"vllm_mode": "colocate"}
    return {"vllm_mode": "server", "vllm_server_base_url": request.getfixturevalue("server").url}


def watched(trainer: Any) -> list[dict[str, Any]]:
    """What is drawn, with the policy's own numbers for it and for the first rollout, as training goes on."""
    seen: list[dict[str, Any]] = []
    score = trainer.score

    def spy(model: Any, samples: Any, *args: Any) -> Any:
        policy = trainer.model.policy
        with torch.no_grad():
            first = seen[0]["samples"] if seen else samples
            logp, again = (policy_logprobs(policy, x, trainer.args.temperature) for x in (samples, first))
        seen.append({"samples": samples, "logp": logp, "first": again[first.mask]})
        return score(model, samples, *args)

    trainer.score = spy
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_three_iterations(run, mode, kind):
    trainer = run(kind, **mode)
    seen = watched(trainer)
    trainer.train()
    assert [row["samples"].version for row in seen] == [0, 1, 2]
    for row in seen:
        samples, mask = row["samples"], row["samples"].mask
        gap = (samples.sampler_logp - row["logp"])[mask].abs().max()
        assert gap < WITHIN
    # the policy has moved by far more than that, and the engine with it
    assert all((b["first"] - a["first"]).abs().max() > 100 * WITHIN for a, b in itertools.pairwise(seen))
    logs = [row for row in trainer.state.log_history if "sampling/kl" in row]
    assert len(logs) == 3
    for row in logs:
        assert (
            0 <= row["sampling/sampling_logp_difference/mean"] <= row["sampling/sampling_logp_difference/max"] < WITHIN
        )
        assert row["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-4)
        assert row["clip/importance"] == 0
        assert math.isfinite(row["loss/policy"])

    # the same engine with the policy as it is now: greedy tokens are the trainer's, seeds are the samples'
    policy, engine = trainer.model.policy, trainer.sampler
    prompts = [[5, 6, 7], [8, 9], [10] * 20, [11]]
    config = SamplingConfig(max_completion_length=20, temperature=0.0)
    greedy = EngineSampler(engine.engine, config, engine.eos_ids, engine.pad_id)
    ours = TransformersSampler(config=config, eos_ids=engine.eos_ids, pad_id=engine.pad_id)
    assert torch.equal(greedy(policy, prompts, 0).tokens, ours(policy, prompts, 0).tokens)
    engine.sync(policy, 3)
    draws = [engine.draw(prompts, seeds) for seeds in ([1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8])]
    assert torch.equal(draws[0].tokens, draws[1].tokens)
    assert draws[0].tokens.tolist() != draws[2].tokens.tolist()
    for row in draws:
        assert torch.equal(row.stopped == 1, row.ended)
        assert ((row.stopped == 0) == (row.mask.sum(1) == 12) & ~row.ended).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_iteration_in_bf16(run, kind):
    """The policy's own numbers are autocast's, the engine's weights are bfloat16."""
    trainer = run(kind, bf16=True, total_episodes=16)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "sampling/kl" in row]
    assert len(logs) == 2
    assert all(1e-5 < row["sampling/sampling_logp_difference/mean"] < 0.1 for row in logs)


def test_a_platform_that_cannot_sleep_stays_awake_and_says_so(run, caplog):
    """vLLM's own answer on processors, to which its engine would not start, is that there is no sleep mode."""
    assert not current_platform.is_sleep_mode_available()
    trainer = run("whole", vllm_enable_sleep_mode=True, total_episodes=16)
    seen = watched(trainer)
    trainer.train()
    assert "vLLM cannot sleep on this platform" in caplog.text
    for row in seen:
        assert (row["samples"].sampler_logp - row["logp"])[row["samples"].mask].abs().max() < WITHIN


def test_packed_weights_stop_the_run(run, monkeypatch):
    """As vLLM is on processors when it is left alone."""
    monkeypatch.setattr(vllm, "keep_weights_plain", lambda: None)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", PACKED)
    with pytest.raises(SamplerError, match="vLLM is stale"):
        run("whole").train()


def test_a_run_leaves_threads_and_random_numbers_alone(run):
    trainer = run("whole")
    trainer.sampler.sync(trainer.model.policy, 0)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    trainer.sampler.sync(trainer.model.policy, 1)
    trainer.sampler.draw([[5, 6]], [0])
    assert torch.equal(torch.random.get_rng_state(), before)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_a_server_that_is_killed_ends_in_one_line_and_the_run_goes_on(run, server):
    """The last test of the server: it is started twice."""
    settings = {"vllm_mode": "server", "vllm_server_base_url": server.url, "save_strategy": "steps", "save_steps": 2}
    trainer = run("whole", **settings)
    sample = trainer.sample

    def dies(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            server.kill()
        return sample(*args, **kwargs)

    trainer.sample = dies
    with pytest.raises(SamplerError, match=r"^the vLLM server at .* does not answer .*resume the run") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    server.start()
    resumed = run("whole", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
