"""The on-line trainer: what it computes, that it learns, what it writes."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto.batches import Rollout, Samples, Targets
from rto.credit import METHODS, Credit
from rto.rollout.samplers.base import SamplingConfig
from rto.trainers.config import settings_of
from rto.trainers.prompts import RolloutSampler
from rto.trainers.rto import RTOTrainer


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rollout_of(trainer: RTOTrainer) -> Rollout:
    prompts = list(trainer.train_dataset[:8])
    samples = trainer.sample(trainer.model, prompts, seed=3)
    return trainer.score(trainer.model, samples, prompts)


def test_learns_a_reward_it_can_see(trainer: Callable[..., RTOTrainer]) -> None:
    """A policy paid for tokens of the lower half of the vocabulary comes to write little else."""

    def low(completion_ids: list[list[int]]) -> list[float]:
        return [sum(i < 130 for i in ids) / len(ids) for ids in completion_ids]

    run = trainer(dpo_coef=0.0, kl_coef=0.0, reward_funcs=low, num_ppo_epochs=2, num_train_epochs=40)
    before = run.evaluate(run.train_dataset)["eval_score"]
    run.train()
    after = run.evaluate(run.train_dataset)["eval_score"]
    assert before < 0.65
    assert after > 0.9


def test_token_reward_alone_pulls_towards_the_dpo_model(trainer: Callable[..., RTOTrainer]) -> None:
    """With β₃ = 0 and no reward function, RTO raises the DPO log-ratio of what it writes."""
    run = trainer(
        score_coef=0.0, reward_funcs=None, dpo_coef=1.0, token_reward_clip=None, kl_coef=0.0, num_train_epochs=20
    )
    prompts = list(run.train_dataset)

    def log_ratio() -> float:
        samples = run.sample(run.model, prompts, seed=0)
        ratio = run.score(run.model, samples, prompts).token_logratio
        assert ratio is not None
        return float(ratio.sum() / samples.mask.sum())

    before = log_ratio()
    run.train()
    assert log_ratio() > before + 1.0


def test_beta1_zero_is_ppo_exactly(trainer: Callable[..., RTOTrainer], dpo_folder: Path, tmp_path: Path) -> None:
    """β₁ = 0 never loads the DPO model, and takes the same steps as a run that has none."""
    with_model = trainer(dpo_coef=0.0, dpo_model="/no/such/model", output_dir=str(tmp_path / "a"))
    without = trainer(dpo_coef=0.0, output_dir=str(tmp_path / "b"))
    assert with_model.scoring.token_reward is None
    with_model.train()
    without.train()
    assert torch.equal(weights(with_model.model), weights(without.model))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_credit_is_the_equation(trainer: Callable[..., RTOTrainer], clip: float | None) -> None:
    """Rewards to advantages against loops over Eq. 4.7 and the definition of GAE."""
    run = trainer(
        dpo_coef=0.5, kl_coef=0.2, score_coef=2.0, token_reward_clip=clip, whiten_advantages=False, gamma=0.9
    )
    rollout = rollout_of(run)
    targets = run.credit(rollout, text=str).targets
    assert rollout.token_logratio is not None
    assert rollout.values is not None
    for b in range(len(rollout)):
        length = int(rollout.mask[b].sum())
        rewards = []
        for t in range(length):
            ratio = float(rollout.token_logratio[b, t])
            ratio = ratio if clip is None else max(-clip, min(clip, ratio))
            r = 0.5 * ratio - 0.2 * float(rollout.policy_logp[b, t] - rollout.ref_logp[b, t])
            rewards.append(r + (2.0 * float(rollout.scores[b]) if t == length - 1 else 0.0))
        values = [*rollout.values[b, :length].tolist(), 0.0]
        deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            expected = sum((0.9 * 0.95) ** (k - t) * deltas[k] for k in range(t, length))
            assert math.isclose(float(targets.advantages[b, t]), expected, rel_tol=1e-4, abs_tol=1e-4)
    assert not targets.advantages[~rollout.mask].any()


def test_first_update_starts_from_ratio_one(trainer: Callable[..., RTOTrainer]) -> None:
    """Before any step the update's own forward pass must reproduce the old log-probabilities, whatever the cuts."""
    run = trainer(num_mini_batches=1, max_tokens_per_micro_batch=7)
    run.create_optimizer()
    run.update(run.model, run.credit(rollout_of(run), text=str).targets)
    assert abs(run._metrics["approx_kl"][-1]) < 1e-9
    assert run._metrics["clip/ratio"][-1] == 0


def test_micro_batches_do_not_change_the_gradient(trainer: Callable[..., RTOTrainer]) -> None:
    grads = []
    for budget in (10_000, 13):
        run = trainer(num_mini_batches=1, max_tokens_per_micro_batch=budget)
        targets = run.credit(rollout_of(run), text=str).targets
        run.update(run.model, targets)
        grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert grads[0].abs().max() > 1e-3


def test_bf16_rounds_and_does_no_more(trainer: Callable[..., RTOTrainer], tmp_path: Path) -> None:
    """Autocast, with or without an accelerator: log-probabilities are those of fp32 up to rounding."""
    fp32 = trainer(output_dir=str(tmp_path / "a"))
    bf16 = trainer(
        output_dir=str(tmp_path / "b"),
        bf16=True,
        use_cpu=torch.accelerator.is_available(),
        learning_rate=0.0,
        value_learning_rate=0.0,
    )
    bf16.train()  # wraps the model, and moves no weight
    assert torch.equal(weights(bf16.model), weights(fp32.model))
    rollout = rollout_of(fp32)
    samples = Samples(**{name: getattr(rollout, name) for name in Samples.__dataclass_fields__})
    rounded = bf16.score(bf16.model, samples, list(bf16.train_dataset[:8]))
    for name in ("policy_logp", "ref_logp"):
        gap = (getattr(rounded, name) - getattr(rollout, name))[rollout.mask].abs()
        assert 1e-5 < float(gap.mean()) < 0.1, name


def test_policy_and_critic_have_their_own_rates_and_clips(trainer: Callable[..., RTOTrainer]) -> None:
    run = trainer(learning_rate=1e-3, value_learning_rate=5e-3, max_grad_norm=1e-3, num_mini_batches=1)
    optimizer = run.create_optimizer()
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {rates[id(p)] for p in run.model.policy.parameters()} == {1e-3}
    assert {rates[id(p)] for p in run.model.value_model.parameters()} == {5e-3}
    run.update(run.model, run.credit(rollout_of(run), text=str).targets)
    run._clip_grad_norm(run.model)
    for part in (run.model.policy, run.model.value_model):
        norm = torch.cat([p.grad.flatten() for p in part.parameters()]).norm()
        assert math.isclose(float(norm), 1e-3, rel_tol=1e-3)


def test_critic_starts_from_the_reward_model(trainer: Callable[..., RTOTrainer], reward_folder: Path) -> None:
    run = trainer(reward_funcs=str(reward_folder))
    reward = AutoModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1)
    assert torch.equal(weights(run.model.value_model), weights(reward))
    assert all(p.requires_grad for p in run.model.value_model.parameters())


def test_critic_free_estimator_has_no_critic(trainer: Callable[..., RTOTrainer]) -> None:
    run = trainer(advantage_estimator="reinforce++")
    assert run.model.value_model is None
    run.train()
    assert not any("value" in key for row in run.state.log_history for key in row)


def test_weights_of_reward_functions(trainer: Callable[..., RTOTrainer], tmp_path: Path) -> None:
    """Scores are the weighted sum; a function of weight 0 is logged and nothing else."""

    def one(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    def index(prompts: list[str]) -> list[float]:
        return [float(i) for i in range(len(prompts))]

    run = trainer(reward_funcs=[one, index], reward_weights=[2.0, 0.0])
    assert rollout_of(run).scores.tolist() == [2.0] * 8
    assert run._metrics["score/index"] == [3.5]


def test_two_functions_of_one_name_are_told_apart(trainer: Callable[..., RTOTrainer]) -> None:
    def make(value: float) -> Callable[..., list[float]]:
        def judge(completions: list[str]) -> list[float]:
            return [value] * len(completions)

        return judge

    run = trainer(reward_funcs=[make(1.0), make(2.0)])
    assert rollout_of(run).scores.tolist() == [3.0] * 8
    assert run._metrics["score/judge"] == [1.0]
    assert run._metrics["score/judge_1"] == [2.0]


def test_activation_checkpointing_changes_no_gradient(trainer: Callable[..., RTOTrainer]) -> None:
    """Recomputed in the backward pass, in both models, and the same to the last bit; sampling is left alone."""
    grads = []
    for on in (False, True):
        run = trainer(num_mini_batches=1)
        targets = run.credit(rollout_of(run), text=str).targets
        if on:
            run.model.activation_checkpointing_enable()
            assert run.model.policy.model.layers[0].gradient_checkpointing
            assert run.model.value_model.model.layers[0].gradient_checkpointing
            assert rollout_of(run).tokens.shape == targets.tokens.shape
        run.update(run.model, targets)
        grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert torch.equal(grads[0], grads[1])


def test_reference_is_the_start_and_stays(trainer: Callable[..., RTOTrainer], tiny_folder: Path) -> None:
    run = trainer(num_train_epochs=2)
    run.train()
    start = weights(AutoModelForCausalLM.from_pretrained(tiny_folder))
    assert torch.equal(weights(run.reference), start)
    assert not torch.equal(weights(run.model.policy), start)
    assert all(p.grad is None for p in run.scoring.token_reward.dpo_model.parameters())


def test_saved_folders_load_elsewhere(trainer: Callable[..., RTOTrainer]) -> None:
    run = trainer()
    run.train()
    run.save_model()
    folder = Path(run.args.output_dir)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
    assert torch.equal(weights(policy), weights(run.model.policy))
    assert torch.equal(weights(critic), weights(run.model.value_model))


def test_log_says_what_happened(trainer: Callable[..., RTOTrainer]) -> None:
    run = trainer(num_train_epochs=2, logging_steps=0)
    run.train()
    lines = (Path(run.args.output_dir) / "log.jsonl").read_text().split("\n")
    rows = [row for row in map(json.loads, filter(None, lines)) if "episodes" in row]
    assert [row["episodes"] for row in rows] == [8, 16, 24, 32]
    for row in rows:
        total = row["reward/token"] + row["reward/kl"] + row["reward/score"]
        assert math.isclose(row["return"], total, rel_tol=1e-4, abs_tol=1e-5)
        assert math.isclose(row["share/token"] + row["share/kl"] + row["share/score"], 1.0, rel_tol=1e-5)
        for key in (
            *("score/count_b", "kl", "entropy", "explained_variance", "clip/ratio", "clip/value", "clip/token_reward"),
            *("completions/mean_length", "completions/eos_rate", "tokens_per_second"),
            *(f"seconds/{phase}" for phase in ("sample", "score", "credit", "update")),
        ):
            assert key in row
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_score_is_paid_once_and_eos_penalty_only_when_cut_off(trainer: Callable[..., RTOTrainer]) -> None:
    run = trainer(dpo_coef=0.0, kl_coef=0.0, missing_eos_penalty=5.0, gamma=1.0, lam=1.0, whiten_advantages=False)
    rollout = rollout_of(run)
    metrics = run.credit(rollout, text=str).metrics
    cut = (~rollout.ended).float()
    assert float(metrics["reward/score"]) == pytest.approx(float((rollout.scores - 5 * cut).mean()), rel=1e-5)


def test_adaptive_kl_moves_the_coefficient(trainer: Callable[..., RTOTrainer]) -> None:
    run = trainer(kl_target=1e-6, kl_horizon=80, num_train_epochs=2)
    run.train()
    coefs = [row["kl_coef"] for row in run.state.log_history if "kl_coef" in row]
    assert coefs[0] == 0.01
    assert coefs[-1] > coefs[1]


GIVEN = {
    "rto": {},
    "ppo": {"dpo_coef": 0.0},
    "semi-rto": {"reward_placement": "sentence"},
    "ddpo": {"reward_placement": "final"},
    "rs-ppo": {"reward_shaping": True},
    "reinforce++": {"dpo_coef": 0.0, "advantage_estimator": "reinforce++"},
    "rto-reinforce++": {"advantage_estimator": "reinforce++"},
}


@pytest.mark.parametrize("method", METHODS)
def test_credit_and_config_say_the_same(method: str, trainer: Callable[..., RTOTrainer], tmp_path: Path) -> None:
    """A method that is given as an object is the one that the configuration describes: same fields, same weights."""
    by_config = trainer(**GIVEN[method], output_dir=str(tmp_path / "a"))
    dpo = {"dpo_model": None} if GIVEN[method].get("dpo_coef") == 0 else {}
    by_object = trainer(credit=Credit.of(method), **dpo, output_dir=str(tmp_path / "b"))
    for name in settings_of(by_config.credit):
        assert getattr(by_config.args, name) == getattr(by_object.args, name), name
    assert by_config.credit == by_object.credit
    start = weights(by_config.model)
    by_config.train()
    by_object.train()
    assert torch.equal(weights(by_config.model), weights(by_object.model))
    assert not torch.equal(weights(by_config.model), start)


def test_credit_that_contradicts_the_config_is_refused(trainer: Callable[..., RTOTrainer]) -> None:
    with pytest.raises(ValueError, match=r"kl_coef=0\.2 in args contradicts the credit .* has 0\.01"):
        trainer(kl_coef=0.2, credit=Credit.of("rto"))
    agreed = trainer(kl_coef=0.2, credit=Credit.of("semi-rto", kl_coef=0.2))
    assert agreed.args.reward_placement == "sentence"


def test_models_that_are_read_wait_in_host_memory(trainer: Callable[..., RTOTrainer], reward_folder: Path) -> None:
    """Off-loaded, each visits the device while it is read, alone, and the numbers are the same."""
    moves: list[tuple[str, str]] = []
    found = []
    for offload in (False, True):
        run = trainer(offload_frozen=offload, reward_funcs=str(reward_folder))
        for name, model in run.scoring.models().items():
            move = partial(lambda to, name, device: (moves.append((name, str(device))), to(device)), model.to, name)
            model.to = move  # type: ignore[assignment]
        found.append(rollout_of(run))
    for name, x in found[0].tensors().items():
        torch.testing.assert_close(found[1].tensors()[name], x, rtol=0, atol=0, equal_nan=True, msg=name)
    each = ("reference", "dpo_model 0", "reward model 0")
    assert [name for name, _ in moves] == [name for name in each for _ in range(2)]
    assert all(device == "cpu" for _, device in moves)  # also the device of this machine


def test_normalized_scores_use_running_statistics(trainer: Callable[..., RTOTrainer]) -> None:
    run = trainer(normalize_scores=True)
    rollout = rollout_of(run)
    raw, found = rollout.scores, run.credit(rollout, text=str)
    assert float(found.metrics["reward/score"]) == pytest.approx(0, abs=1e-5)
    assert run.credit.score_moments.mean == pytest.approx(float(raw.mean()))
    assert run.credit.score_moments.std == pytest.approx(float(raw.std(unbiased=False)))
    run.evaluate(run.train_dataset)
    assert run.credit.score_moments.count == 8


def test_evaluation_leaves_training_alone(trainer: Callable[..., RTOTrainer], tmp_path: Path) -> None:
    """Same weights with and without evaluations in between."""
    plain = trainer(normalize_scores=True, num_train_epochs=2, output_dir=str(tmp_path / "a"))
    watched = trainer(
        normalize_scores=True,
        num_train_epochs=2,
        output_dir=str(tmp_path / "b"),
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=Dataset.from_list([{"prompt": "ab"}, {"prompt": "cab"}]),
    )
    plain.train()
    watched.train()
    assert torch.equal(weights(plain.model), weights(watched.model))
    assert any("eval_score" in row for row in watched.state.log_history)


def test_a_tail_that_fills_no_batch_is_told_and_completions_need_no_reward_function(
    trainer: Callable[..., RTOTrainer], prompts: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(score_coef=0.0, reward_funcs=None, train_dataset=prompts.select(range(11)), log_completions=3)
    run.train()
    assert "each pass over 11 prompts leaves out 3, which fill no batch of 8" in caplog.text
    lines = (Path(run.args.output_dir) / "completions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 3
    assert all(json.loads(line)["completion"] is not None for line in lines)


def test_conversations(trainer: Callable[..., RTOTrainer], reward_folder: Path) -> None:
    """Messages go through the chat template; functions and reward models are given messages, as in TRL."""
    seen: list[Any] = []

    def look(prompts: list[Any], completions: list[Any], topic: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, topic))
        return [float(len(messages[0]["content"])) for messages in completions]

    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "topic": f"t{i}"} for i in range(8)]
    run = trainer(reward_funcs=[look, str(reward_folder)], train_dataset=Dataset.from_list(rows))
    ids = run.train_dataset[0].ids
    assert run.processing_class.decode(ids) == "<user>say 0<eos><assistant>"
    run.train()
    prompt, completion, topic = seen[0]
    assert prompt[0]["content"].startswith("say")
    assert topic == "t" + prompt[0]["content"].split()[1]
    assert completion[0].keys() == {"role", "content"}


def test_another_sampler(trainer: Callable[..., RTOTrainer]) -> None:
    """Anything that returns `Samples` is a sampler; its weights are those of the moment."""
    seen = []

    def sampler(model: torch.nn.Module, prompts: list[list[int]], seed: int) -> Samples:
        seen.append(float(weights(model).sum()))
        rows, width = len(prompts), 2
        prompt_mask = torch.ones(rows, width, dtype=torch.bool)
        mask = torch.ones(rows, 1, dtype=torch.bool)
        tokens = torch.full((rows, width + 1), 7)
        return Samples(tokens=tokens, prompt_mask=prompt_mask, mask=mask, ended=torch.zeros(rows, dtype=torch.bool))

    run = trainer(sampler=sampler, num_train_epochs=2)
    run.train()
    assert len(seen) == 4
    assert len(set(seen)) == 4


def test_peft_policy_has_the_base_as_reference(trainer: Callable[..., RTOTrainer], tiny_folder: Path) -> None:
    from peft import LoraConfig, PeftModel

    run = trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), num_train_epochs=2)
    assert run.reference.adapter is None
    assert run.reference.get_base_model() is run.model.policy.get_base_model()
    run.train()
    assert run.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)
    run.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run.args.output_dir)
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, run.model.policy.eval()(tokens).logits)


class TestRolloutSampler:
    def batches(self, rank: int = 0, world: int = 1, done: int = 0) -> list[list[int]]:
        sampler = RolloutSampler(
            size=23, rollouts=8 // world, repeats=3, seed=5, rank=rank, world=world, updates_done=lambda: done
        )
        assert len(sampler) == 6
        return list(sampler)

    def test_each_batch_serves_its_updates(self) -> None:
        batches = self.batches()
        assert batches[0] == batches[1] == batches[2] != batches[3]
        assert not set(batches[0]) & set(batches[3])

    def test_processes_share_what_one_would_do(self) -> None:
        both = [a + b for a, b in zip(self.batches(0, 2), self.batches(1, 2))]
        assert both == self.batches()

    def test_epochs_differ_and_are_known_from_the_step(self) -> None:
        assert self.batches(done=0) == self.batches(done=5)
        assert self.batches(done=6) != self.batches(done=0)


def test_completed_sampling_config_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="top_p"):
        SamplingConfig(top_p=0.0)


def test_targets_hold_no_more_than_the_update_reads() -> None:
    """And what the tokens were drawn from, where a sampler says it."""
    assert set(Targets.__dataclass_fields__) == {
        *("tokens", "prompt_mask", "mask", "old_logp", "advantages", "old_values", "returns"),
        *("sampler_logp", "version"),
    }


def quiet(completion_ids: list[list[int]]) -> list[list[float]]:
    return [[-0.1 * (token % 7) for token in ids] for ids in completion_ids]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_dpo_model_by_trl_is_a_token_reward(
    trainer: Callable[..., RTOTrainer], tiny_folder: Path, pairs: Dataset, tmp_path: Path
) -> None:
    """An adapter trained and saved by TRL's DPOTrainer, read from its folder."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        learning_rate=1e-2,
        max_steps=3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=4, target_modules="all-linear")
    theirs = DPOTrainer(model=str(tiny_folder), args=args, train_dataset=pairs, peft_config=adapter)
    theirs.train()
    theirs.save_model()
    run = trainer(dpo_model=str(tmp_path / "trl"), max_steps=1)
    run.train()
    rows = [row for row in run.state.log_history if "logratio/dpo" in row]
    assert abs(rows[0]["logratio/dpo"]) > 1e-3
    assert rows[0]["share/token"] > 0


def test_every_source_fits_the_trainer(
    trainer: Callable[..., RTOTrainer], tiny_folder: Path, dpo_folder: Path
) -> None:
    """On the same first rollout; the second member of the pair of models is the reference, whose log-ratio is 0."""

    def logratio(dpo_model: Any, **settings: Any) -> float:
        run = trainer(dpo_model=dpo_model, max_steps=2, **settings)
        run.train()
        (found,) = [row["logratio/dpo"] for row in run.state.log_history if "logratio/dpo" in row]
        return found

    model, reference = str(dpo_folder), str(tiny_folder)
    alone, function = logratio(model), logratio(quiet)
    assert function < 0
    assert logratio([model, reference]) == pytest.approx(alone / 2, rel=1e-5)
    assert logratio([model, quiet]) == pytest.approx((alone + function) / 2, rel=1e-5)
    assert logratio([model, reference], token_reward_pessimism=2.0) < alone / 2 - 0.1
    assert -20 < logratio(model, token_reward="mean_logprob") < -1  # a mean over a vocabulary of a few hundred
