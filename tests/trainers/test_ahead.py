"""Rollouts drawn one version before they are learned from; a critic that learns before the policy moves."""

import copy
import itertools
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rto import RTOTrainer
from rto.batches import Samples
from rto.rollout.samplers.base import SamplerError, SamplingConfig
from rto.rollout.samplers.engines import Drawn, EngineSampler
from rto.rollout.samplers.second_process import SecondProcess, serve
from rto.rollout.samplers.transformers import TransformersSampler
from rto.trainers.prompts import RolloutSampler

EOS, T = (2, 30, 60), 6


class Copy:
    """An engine on a copy of the policy."""

    name = "the copy"

    def __init__(self) -> None:
        self.model: Any = None

    def load(self, policy: nn.Module) -> None:
        self.model = copy.deepcopy(policy)

    def complete(self, prompts: Any, seeds: Any, config: SamplingConfig, stop_ids: tuple[int, ...]) -> list[Drawn]:
        sampler = TransformersSampler(config=config, eos_ids=stop_ids, pad_id=0)
        sampler.sync(self.model, 0)
        drawn = sampler.draw(prompts, seeds)
        rows = zip(drawn.responses, drawn.sampler_logp, drawn.mask, drawn.stopped.tolist())
        return [Drawn(y[m].tolist(), p[m].tolist(), stopped) for y, p, m, stopped in rows]

    def rest(self) -> None: ...


def on_copy() -> EngineSampler:
    return EngineSampler(Copy(), SamplingConfig(max_completion_length=T), EOS, 0)


@pytest.fixture
def start(trainer: Callable[..., RTOTrainer], prompts: Dataset) -> Callable[..., RTOTrainer]:
    """Five iterations of two updates on two batches an epoch."""
    return lambda **kwargs: trainer(
        **{"num_train_epochs": 3, "max_steps": 10, "sampler": on_copy(), "learning_rate": 0.05} | kwargs
    )


def watched(run: RTOTrainer) -> list[tuple[Samples, list[Any]]]:
    seen: list[tuple[Samples, list[Any]]] = []
    score = run.score

    def spy(model: Any, samples: Samples, prompts: Any, *args: Any) -> Any:
        seen.append((samples, [p.ids for p in prompts]))
        return score(model, samples, prompts, *args)

    run.score = spy
    return seen


def logged(run: RTOTrainer, name: str) -> list[float]:
    return [row[name] for row in run.state.log_history if name in row]


def test_each_batch_is_of_the_version_before_and_for_its_own_prompts(start: Callable[..., RTOTrainer]) -> None:
    runs = {n: start(async_rollouts=n) for n in (0, 1)}
    seen = {n: watched(run) for n, run in runs.items()}
    for run in runs.values():
        run.train()
    assert [samples.version for samples, _ in seen[0]] == [0, 1, 2, 3, 4]
    assert [samples.version for samples, _ in seen[1]] == [0, 0, 1, 2, 3]
    assert [prompts for _, prompts in seen[0]] == [prompts for _, prompts in seen[1]]
    for samples, prompts in seen[1]:
        width = samples.prompt_mask.shape[1]
        assert [row[:width][keep].tolist() for row, keep in zip(samples.tokens, samples.prompt_mask)] == prompts
    assert torch.equal(seen[0][0][0].tokens, seen[1][0][0].tokens)
    gap = "sampling/sampling_logp_difference/mean"
    assert max(logged(runs[0], gap)) < 1e-5
    assert logged(runs[1], gap)[0] < 1e-5
    assert min(logged(runs[1], gap)[1:]) > 1e-3
    assert all(0 < x < 1 for x in logged(runs[1], "sampling/effective_sample_size")[1:])


@pytest.mark.parametrize("saved", [3, 4], ids=["within an iteration", "between two"])
def test_a_resumed_run_learns_from_the_same_batches(
    start: Callable[..., RTOTrainer], saved: int, tmp_path: Path
) -> None:
    """Bit for bit, the batch among them that was under way at the checkpoint."""
    settings = {"async_rollouts": 1, "save_strategy": "steps", "save_steps": saved}
    whole = start(**settings, output_dir=str(tmp_path / "run"))
    whole.train()
    resumed = start(**settings, output_dir=str(tmp_path / "run"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{saved}"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_an_older_version_is_refused(start: Callable[..., RTOTrainer]) -> None:
    run = start(async_rollouts=1)
    begin = run._ahead.begin
    run._ahead.begin = lambda *args, version, **kwargs: begin(*args, version=max(0, version - 1), **kwargs)
    with pytest.raises(SamplerError, match=r"step 5: .* version 0 of the weights, the policy is of version 2"):
        run.train()


@pytest.mark.slow
def test_an_evaluation_leaves_the_batch_under_way_alone(start: Callable[..., RTOTrainer], prompts: Dataset) -> None:
    plain, watching = start(async_rollouts=1), start(async_rollouts=1, eval_dataset=prompts.select(range(3)))
    watching.args.eval_strategy, watching.args.eval_steps = "steps", 1
    plain.train()
    for step in range(2):
        assert watching.evaluate()["eval_kl"] is not None, step
    watching.train()
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, watching.model.state_dict()[name]), name


def test_a_batch_that_could_not_be_drawn_stops_the_run(start: Callable[..., RTOTrainer]) -> None:
    run = start(async_rollouts=1)
    draw = run.sampler.draw

    def fails(prompts: Any, seeds: Any) -> Samples:
        if run.sampler._version == 2:
            raise SamplerError("the copy is gone")
        return draw(prompts, seeds)

    run.sampler.draw = fails
    with pytest.raises(SamplerError, match="the copy is gone"):
        run.train()
    assert run.state.global_step == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"async_rollouts": 2}, "async_rollouts=2: samples may be one version old at most"),
        ({"async_rollouts": 1, "use_vllm": True, "sampler": None}, "a colocated engine cannot"),
        ({"async_rollouts": 1, "sampler": lambda *args: None}, "must hold weights of its own"),
        ({"use_vllm": True}, "use_vllm names a sampler, and another one is given"),
        ({"vllm_mode": "other"}, "vllm_mode='other' is not known"),
        ({"vllm_importance_sampling_clip_min": 3.0}, "clip_min=3.0 must not exceed"),
        ({"vllm_importance_sampling_mode": "none"}, "vllm_importance_sampling_mode='none' is not known"),
        ({"critic_warmup_steps": 2, "advantage_estimator": "reinforce++"}, "critic_warmup_steps asks for a critic"),
    ],
    ids=lambda x: x if isinstance(x, str) else ", ".join(x),
)
def test_what_does_not_go_together_is_told(start: Callable[..., RTOTrainer], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(**settings)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 3}, {"async_rollouts": 1}], ids=str)
def test_samples_that_nothing_weighs_are_warned_of(config: Callable, cut: dict, caplog: Any) -> None:
    config(**cut)
    assert "biased" not in caplog.text
    config(**cut, vllm_importance_sampling_correction=False)
    assert "vllm_importance_sampling_correction=False does not make up for it: the gradient is biased" in caplog.text


def test_the_order_of_prompts_is_the_same_ahead() -> None:
    done = [0]
    order = RolloutSampler(size=11, rollouts=2, repeats=3, seed=5, rank=1, world=2, updates_done=lambda: done[0])
    batches = []
    for _ in range(3):
        batches += list(order)[::3]
        done[0] += len(order)
    assert [order.batch(i) for i in range(len(batches))] == batches


def test_weights_of_the_loss_are_those_of_the_samples(start: Callable[..., RTOTrainer]) -> None:
    """A sampler that says it drew every token with twice its probability halves the policy's loss, and no other."""

    class Boasts(EngineSampler):
        def draw(self, prompts: Any, seeds: Any) -> Samples:
            samples = super().draw(prompts, seeds)
            samples.sampler_logp.add_(torch.tensor(2.0).log())
            return samples

    sampler = Boasts(Copy(), SamplingConfig(max_completion_length=T), EOS, 0)
    honest, boasting = start(max_steps=1), start(max_steps=1, sampler=sampler)
    off = start(max_steps=1, sampler=sampler, vllm_importance_sampling_correction=False)
    for run in (honest, boasting, off):
        run.train()
    for name in ("grad_norm/policy", "grad_norm/value"):
        half = 0.5 if name.endswith("policy") else 1.0
        (one,), (other,), (none,) = (logged(run, name) for run in (honest, boasting, off))
        assert other == pytest.approx(half * one, rel=1e-4)
        assert none == pytest.approx(one, rel=1e-4)


# --- the second process


class Pipe(queue.Queue):
    """Lines from one thread to another; an empty one ends them."""

    write = queue.Queue.put
    readline = queue.Queue.get

    def flush(self) -> None: ...

    def __iter__(self) -> Any:
        return iter(self.get, "")


def test_the_second_process_answers_with_what_the_policy_draws(tiny_model: Callable, tmp_path: Any) -> None:
    """Its loop, without another process around it."""
    policy, prompts = tiny_model(), [[5, 6, 7], [8], [9, 10]]
    requests, answers = Pipe(), Pipe()
    engine = SecondProcess(0)
    policy.config.save_pretrained(engine._folder)
    engine._process = SimpleNamespace(stdin=requests, stdout=answers, poll=lambda: None)
    loop = threading.Thread(target=serve, args=(str(engine._folder), requests, answers))
    loop.start()
    sampler = EngineSampler(engine, SamplingConfig(max_completion_length=T), EOS, 0)
    sampler.sync(policy, 0)
    found = sampler.draw(prompts, [1, 2, 3])
    with pytest.raises(SamplerError, match=r"the process that draws: KeyError"):
        engine._ask({"nothing": 0, "prompts": [[1]], "seeds": [0], "sampler": {"nothing": 0}})
    requests.write("")
    loop.join()
    ours = TransformersSampler(config=sampler.config, eos_ids=EOS, pad_id=0)
    ours.sync(policy, 0)
    for name, tensor in ours.draw(prompts, [1, 2, 3]).tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, equal_nan=True)


def test_a_second_process_draws_what_the_policy_draws_and_its_end_is_one_line(tiny_model: Callable) -> None:
    """A process of its own, weights that change, and a kill."""
    policy, prompts, seeds = tiny_model(), [[5, 6, 7], [8]], [1, 2]
    sampler = EngineSampler(SecondProcess(0), SamplingConfig(max_completion_length=T), EOS, 0)
    ours = TransformersSampler(config=sampler.config, eos_ids=EOS, pad_id=0)
    for version in range(2):
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1.1)
        for one in (sampler, ours):
            one.sync(policy, version)
        found, expected = (one.draw(prompts, seeds) for one in (sampler, ours))
        assert found.version == version
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(found.tensors()[name], tensor, equal_nan=True)
    sampler.engine._process.kill()
    with pytest.raises(SamplerError, match=r"^the process that draws has ended .* last checkpoint$"):
        sampler.draw(prompts, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_three_iterations_with_a_second_process(trainer: Callable[..., RTOTrainer], kind: str, bf16: bool) -> None:
    from peft import LoraConfig

    own = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if kind == "lora" else {}
    run = trainer(async_rollouts=1, max_steps=6, num_train_epochs=2, bf16=bf16, **own)
    seen = watched(run)
    run.train()
    assert [samples.version for samples, _ in seen] == [0, 0, 1]
    run.sampler.engine._process.kill()
    with pytest.raises(SamplerError, match="the process that draws has ended"):
        run.sampler.draw([[5]], [0])


# --- critic warm-up


def test_the_critic_learns_before_the_policy_moves(trainer: Callable[..., RTOTrainer]) -> None:
    """Four updates of the critic alone, then both."""
    run = trainer(critic_warmup_steps=4, max_steps=8, num_train_epochs=4)
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    step = run.training_step

    def spy(*args: Any) -> Any:
        seen.append((weights(run.model.policy), weights(run.model.value_model)))
        return step(*args)

    run.training_step = spy
    run.train()
    same = [all(torch.equal(a[0][name], b[0][name]) for name in a[0]) for a, b in itertools.pairwise(seen)]
    assert same == [True] * 4 + [False] * 3
    assert not any(all(torch.equal(a[1][name], b[1][name]) for name in a[1]) for a, b in itertools.pairwise(seen))
    assert logged(run, "kl")[1] == pytest.approx(0, abs=1e-5)
    learned = logged(run, "explained_variance")
    assert len(learned) == len(logged(run, "kl"))
    assert all(x <= 1 for x in learned)


def test_the_first_step_of_the_policy_has_a_critic_that_learned(trainer: Callable[..., RTOTrainer]) -> None:
    """Explained variance rises over the warm-up, in which the policy stays as it was to the bit.

    What a completion is worth is its prompt's to say, so a critic can learn it, and none knows it beforehand.
    """

    def by_prompt(prompts: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, prompt)) % 3) for prompt in prompts]

    moved: dict[int, list[bool]] = {}
    explained: dict[int, list[float]] = {}
    for warm_up in (0, 30):
        run = trainer(
            reward_funcs=by_prompt,
            dpo_coef=0.0,
            critic_warmup_steps=warm_up,
            max_steps=warm_up + 2,
            num_train_epochs=100,
            value_learning_rate=1e-2,
        )
        start = {name: weight.detach().clone() for name, weight in run.model.policy.named_parameters()}
        moved[warm_up], step = [], run.training_step

        def spy(*args: Any, run: Any = run, start: Any = start, step: Any = step, warm_up: int = warm_up) -> Any:
            weights = dict(run.model.policy.named_parameters())
            moved[warm_up].append(any(not torch.equal(weight, start[name]) for name, weight in weights.items()))
            return step(*args)

        run.training_step = spy
        run.train()
        explained[warm_up] = logged(run, "explained_variance")
    assert moved == {0: [False, True], 30: [False] * 31 + [True]}
    learned = explained[30]
    assert len(learned) == 16  # rollouts of two updates; the last one is the policy's first
    assert sum(learned[:5]) / 5 < 0.15
    assert sum(learned[10:15]) / 5 > 0.4
    assert learned[15] > explained[0][0] + 0.3
