"""RTO with every role on one base takes the steps that five separate models take, and loses nothing."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
)
from sharing import share
from test_checkpoints import comparable
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import warm
from rto.batches import collate
from rto.models.actor import policy_logprobs, token_values
from rto.models.roles import Role
from rto.trainers.preference import PreferenceConfig, PreferenceTrainer

PROGRAM = Path(__file__).with_name("sharing.py")
BATCH = collate([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], pad=0)


def write_adapter(base: Path, folder: Path, seed: int, tokenizer, *, scalar: bool = False) -> Path:
    if scalar:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    kind = TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type=kind))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tiny_folder, tokenizer, tmp_path_factory):
    """The base, a DPO adapter and a reward adapter."""
    root = tmp_path_factory.mktemp("shared")
    dpo = write_adapter(tiny_folder, root / "dpo", 1, tokenizer)
    reward = write_adapter(tiny_folder, root / "reward", 2, tokenizer, scalar=True)
    return str(tiny_folder), str(dpo), str(reward)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    policy = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    critic = safetensors.torch.load_file(folder / "value_model" / "adapter_model.safetensors")
    return policy | {f"critic.{name}": x for name, x in critic.items()}


def train(run):
    run.train()
    run.save_model()
    return saved(Path(run.args.output_dir)), comparable(Path(run.args.output_dir) / "log.jsonl")


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """One process, uninterrupted."""
    return train(share(*folders, str(tmp_path_factory.mktemp("alone"))))


def test_one_base_does_what_separate_models_do(folders, alone, tmp_path):
    """DPO and reward as merged models, the critic as an adapter of its own: same losses, same weights."""
    base, dpo, reward = folders
    run = share(*folders, str(tmp_path / "shared"))
    roles = [run.reference, run.scoring.token_reward.dpo_model, run.scoring.sources[0].model, run.model.value_model]
    assert all(isinstance(role, Role) and role.base.model is run.model.policy for role in roles)
    weights = {p.data_ptr(): p.numel() for p in run.model.parameters()}
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    adapters = sum(p.numel() for n, p in run.model.named_parameters() if "lora_" in n or "score" in n)
    assert sum(weights.values()) == whole + adapters

    apart = share(
        base,
        AutoPeftModelForCausalLM.from_pretrained(dpo).merge_and_unload(),
        reward_model_of(reward),
        str(tmp_path / "apart"),
        value_model=AutoPeftModelForSequenceClassification.from_pretrained(reward, num_labels=1, is_trainable=True),
        ref_model=AutoModelForCausalLM.from_pretrained(base),
    )
    models = (
        apart.reference,
        apart.scoring.token_reward.dpo_model,
        apart.scoring.sources[0].model,
        apart.model.value_model,
    )
    assert not any(isinstance(model, Role) for model in models)
    weights, rows = train(apart)
    expected, log = alone
    assert expected.keys() == weights.keys()
    for name, x in expected.items():
        torch.testing.assert_close(weights[name], x, rtol=0, atol=1e-5, msg=name)
    assert len(rows) == len(log) == 7  # six updates and what they amount to
    for a, b in zip(log, rows):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    assert abs(log[0]["loss/policy"]) + abs(log[0]["loss/value"]) > 1e-3


def reward_model_of(folder: str) -> torch.nn.Module:
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).merge_and_unload()
    model.config._name_or_path = folder
    return model


def test_only_policy_and_critic_learn(folders, tmp_path):
    """Each at its own rate and norm; base, DPO and reward adapters end as they began."""
    run = share(*folders, str(tmp_path), learning_rate=0.3, value_learning_rate=0.1, max_grad_norm=1e-3)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    rates = {id(p): g["lr"] for g in run.create_optimizer().param_groups for p in g["params"]}
    names = {n: rates[id(p)] for n, p in run.model.named_parameters() if id(p) in rates}
    assert {rate for n, rate in names.items() if ".default" in n} == {0.3}
    assert {rate for n, rate in names.items() if ".value_model." in n or n == "value_model.score.weight"} == {0.1}
    assert "value_model.score.weight" in names
    assert all(".default" in n or "value_model" in n for n in names)
    run.train()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in changed if ".default" in n}
    assert {n for n in changed if "value_model" in n}
    assert changed <= set(names)


def test_saved_roles_load_with_peft(folders, tmp_path):
    run = share(*folders, str(tmp_path))
    run.train()
    run.save_model()
    assert (
        sorted(p.name for p in tmp_path.rglob("adapter_model.safetensors") if "checkpoint" not in str(p))
        == ["adapter_model.safetensors"] * 2
    )
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    critic = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "value_model", num_labels=1).eval()
    run.model.eval()
    with torch.no_grad():
        expected = policy_logprobs(run.model.policy, BATCH), token_values(run.model.value_model, BATCH)
        torch.testing.assert_close(policy_logprobs(policy, BATCH), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(token_values(critic, BATCH), expected[1], rtol=1e-5, atol=1e-5)


def start(*args: str, processes: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return warm.run(PROGRAM, *args, processes=processes, environment=environment)


def test_two_processes_share_as_one_does(folders, alone, tmp_path):
    """Policy and critic have a backward pass each, so gradients are exchanged by the trainer and not by DDP."""
    both = start(*folders, str(tmp_path), "--batch", "4", processes=2)
    assert both.returncode == 0, both.stderr[-2000:]
    expected, log = alone
    for name, x in saved(tmp_path).items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-5, msg=name)
    for a, b in zip(log, comparable(tmp_path / "log.jsonl"), strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name


def test_killed_run_on_one_base_resumes_bit_for_bit(folders, alone, tmp_path):
    killed = start(*folders, str(tmp_path), "--kill", "mid-rollout")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = share(*folders, str(tmp_path))
    run.train(resume_from_checkpoint=True)
    run.save_model()
    expected, log = alone
    found = saved(tmp_path)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    assert comparable(tmp_path / "log.jsonl") == log


def test_checkpointing_changes_no_gradient_on_one_base(folders, tmp_path):
    """Layers of the policy and of the critic are computed again in the backward pass, each in its role."""
    grads = []
    for on in (False, True):
        run = share(*folders, str(tmp_path), activation_checkpointing=on)
        prompts = list(run.train_dataset[:8])
        if on:
            run.model.activation_checkpointing_enable()
        rollout = run.score(run.model, run.sample(run.model, prompts, seed=3), prompts)
        targets = run.credit(rollout, text=str).targets
        run.update(run.model, targets)
        grads.append({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_an_adapter_goes_on_being_trained(folders, tmp_path):
    """π_ref is the adapter as it was; the critic a new one on the same base."""
    _, dpo, _ = folders
    run = share(dpo, dpo, count, str(tmp_path), peft_config=None)
    assert isinstance(run.model.policy, PeftModel)
    assert run.reference.base is run.model.value_model.base
    assert not run.model.value_model.score.weight.any()
    run.train()
    run.save_model()
    assert run.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert run.state.log_history[0]["logratio/dpo"] == pytest.approx(0, abs=1e-5)
    start, after = (AutoPeftModelForCausalLM.from_pretrained(folder).eval() for folder in (dpo, tmp_path))
    with torch.no_grad():
        frozen = policy_logprobs(run.reference.eval(), BATCH)
        torch.testing.assert_close(frozen, policy_logprobs(start, BATCH), rtol=1e-5, atol=1e-5)
        assert (policy_logprobs(after, BATCH) - frozen).abs().max() > 1e-3


def count(completions: list[str]) -> list[float]:
    return [completion.count("b") + 0.1 * len(completion) for completion in completions]


def test_a_reward_model_of_its_own_stays_one(folders, reward_folder, tmp_path):
    """As in the paper: a small reward model beside a large base; the critic is an adapter then."""
    base, dpo, _ = folders
    run = share(base, dpo, str(reward_folder), str(tmp_path))
    assert not isinstance(run.scoring.sources[0].model, Role)
    assert isinstance(run.model.value_model, Role)
    run.train()


@pytest.mark.parametrize("precompute", [True, False])
def test_preference_adapter_has_its_start_as_reference(folders, pairs, tmp_path, precompute):
    """π_ref of an adapter that goes on being trained is a copy on the same base: the loss starts at ln 2."""
    args = PreferenceConfig(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        max_steps=3,
        logging_steps=1,
        precompute_ref_log_probs=precompute,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    run = PreferenceTrainer(folders[1], args, train_dataset=pairs)
    assert precompute == (run.reference is None)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses[-1] < losses[0] - 1e-3
    if not precompute:
        assert run.reference.base.model is run.model.policy


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_adapters_that_trl_trained_share_the_base(folders, pairs, tokenizer, tmp_path):
    """A DPO and a reward adapter as TRL's trainers save them."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    base, common = folders[0], {"learning_rate": 1e-2, "max_steps": 2, "report_to": "none", "use_cpu": True}
    common |= {"bf16": False, "activation_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"}
    lora = {"r": 2, "target_modules": "all-linear"}
    scorer = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = [
        DPOTrainer(
            model=base,
            args=DPOConfig(output_dir=str(tmp_path / "dpo"), **common),
            train_dataset=pairs,
            peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, **lora),
        ),
        RewardTrainer(
            model=scorer,
            args=RewardConfig(output_dir=str(tmp_path / "reward"), **common),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type=TaskType.SEQ_CLS, **lora),
        ),
    ]
    for trainer in theirs:
        trainer.train()
        trainer.save_model()
    run = share(base, str(tmp_path / "dpo"), str(tmp_path / "reward"), str(tmp_path / "run"), max_steps=1)
    assert isinstance(run.scoring.token_reward.dpo_model, Role)
    assert isinstance(run.scoring.sources[0].model, Role)
    dpo = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "dpo").eval()
    reward = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
    run.model.eval()
    with torch.no_grad():
        for ours, alone, number in (
            (run.scoring.token_reward.dpo_model, dpo, policy_logprobs),
            (run.scoring.sources[0].model, reward, token_values),
            (run.model.value_model, reward, token_values),
        ):
            assert number(alone, BATCH).abs().sum() > 0.01
            torch.testing.assert_close(number(ours, BATCH), number(alone, BATCH), rtol=1e-5, atol=1e-5)
    run.train()


def test_the_best_policy_and_critic_come_back(folders, prompts, tmp_path):
    """`load_best_model_at_end` puts adapter and head of the best checkpoint in place."""
    run = share(
        *folders,
        str(tmp_path),
        load_best_model_at_end=True,
        metric_for_best_model="score",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_strategy="steps",
        eval_dataset=prompts,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    run.save_model()
    expected, found = saved(best), saved(tmp_path)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    other = next(p for p in tmp_path.glob("checkpoint-*") if p != best)
    assert any(not torch.equal(found[name], x) for name, x in saved(other).items())
