"""What a reward model says in training is what its own stage trained it to say; critics, names, objects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig

from rto import RTOTrainer
from rto.data.errors import DataError
from rto.models.actor import response_states
from rto.models.loading import load_scalar, load_tokenizer
from rto.rollout.rewards import Completed, RewardModel, reward_source
from rto.trainers.preference import PreferenceConfig, PreferenceTrainer
from rto.trainers.supervised import RewardTrainer


def without_pad(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer as it comes with Llama 3: no padding token."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")


# --- the reward stage and its reader


@pytest.mark.parametrize("pad", ["its own", "EOS"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_is_read_as_its_stage_evaluates_it(
    tiny_model: Callable, tokenizer: Any, tmp_path: Path, pad: str, adapter: bool
) -> None:
    """Accuracy and margin on the same pairs: TRL's evaluation, and our scores of the folder it wrote."""
    base = tmp_path / "base"
    tiny_model(pad_token_id=None).save_pretrained(base)
    (tokenizer if pad == "its own" else without_pad(tokenizer)).save_pretrained(base)
    rows = [
        {"prompt": f"{w} ", "chosen": "ba" * (1 + i % 3), "rejected": "zq" * (1 + i % 4) + w}
        for i, w in enumerate(["dog", "cat", "emu", "eel", "ant", "bee", "cow", "yak"])
    ]
    settings = {"output_dir": str(tmp_path / "reward"), "max_steps": 3, "learning_rate": 1e-3, "report_to": "none"}
    settings |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    trainer = RewardTrainer(
        load_scalar(base),
        RewardConfig(per_device_train_batch_size=4, per_device_eval_batch_size=4, **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear") if adapter else None,
    )
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()

    source = reward_source(str(tmp_path / "reward"), max_tokens=100)
    sides = {}
    for side in ("chosen", "rejected"):
        texts = [row[side] for row in rows]
        batch = Completed(
            prompts=[row["prompt"] for row in rows],
            completions=texts,
            completion_ids=[[]] * len(rows),
            ended=[True] * len(rows),
        )
        sides[side] = torch.tensor(source(batch))
    gap = sides["chosen"] - sides["rejected"]
    assert gap.abs().max() > 1e-2
    assert (gap > 0).float().mean().item() == pytest.approx(found["eval_accuracy"])
    assert gap.mean().item() == pytest.approx(found["eval_margin"], abs=1e-4)


# --- critics


def bert(tokenizer: Any, folder: Path) -> Path:
    """An encoder that scores, with the policy's tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_scores_but_is_no_critic(
    trainer: Callable[..., RTOTrainer], tokenizer: Any, tmp_path: Path
) -> None:
    """Passed over where nobody asked for it, refused where somebody did."""
    judge = bert(tokenizer, tmp_path / "bert")
    run = trainer(reward_funcs=str(judge))
    assert isinstance(run.scoring.sources[0].model, BertForSequenceClassification)
    critic, policy = run.model.value_model.model.state_dict(), run.model.policy.model.state_dict()
    assert all(torch.equal(critic[name], policy[name]) for name in policy)
    run.train()
    with pytest.raises(ValueError, match=r"value_model .*bert, a BertForSequenceClassification, cannot be a critic"):
        trainer(value_model=str(judge))


def moved(model: Any) -> Any:
    """Other weights than those of the folder that a model came from."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return model


def hidden(model: Any) -> torch.Tensor:
    from rto.batches import collate

    with torch.no_grad():
        return response_states(model, collate([[5, 6, 7]], [[8, 9, 2]], pad=0))


@pytest.mark.parametrize("kind", ["whole", "adapter", "new adapter"])
def test_the_critic_starts_from_the_policy_that_is_given(
    tiny_folder: Path, dpo_folder: Path, prompts: Dataset, config: Callable, kind: str
) -> None:
    live: Any = moved(LlamaForCausalLM.from_pretrained(tiny_folder))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if kind == "adapter":
        live = moved(get_peft_model(live, lora))
    run = RTOTrainer(
        live,
        config(dpo_coef=0.0),
        reward_funcs=lambda completions: [0.0] * len(completions),
        train_dataset=prompts,
        peft_config=lora if kind == "new adapter" else None,
    )
    torch.testing.assert_close(hidden(run.model.value_model), hidden(run.model.policy))
    assert (hidden(run.model.policy) - hidden(LlamaForCausalLM.from_pretrained(tiny_folder))).abs().max() > 0.1
    assert not run.model.value_model.score.weight.any()
    assert run.model.value_parameters


def test_an_object_without_a_folder_is_a_policy_too(
    tiny_model: Callable, tokenizer: Any, prompts: Dataset, config: Callable
) -> None:
    policy = tiny_model()
    policy.config._name_or_path = ""
    run = RTOTrainer(
        policy,
        config(dpo_coef=0.0, max_steps=1),
        reward_funcs=lambda completions: [float(len(x)) for x in completions],
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    run.train()


# --- tokenizers without padding, contexts, names


def test_a_tokenizer_without_padding_works(
    tiny_folder: Path, reward_folder: Path, prompts: Dataset, pairs: Dataset, config: Callable, tokenizer: Any
) -> None:
    """Padding is told by position: the numbers are those of the tokenizer that has a token for it."""
    losses = []
    for own in (tokenizer, without_pad(tokenizer)):
        run = RTOTrainer(
            str(tiny_folder),
            config(dpo_coef=0.0, max_steps=1, logging_steps=1),
            reward_funcs=str(reward_folder),
            reward_processing_classes=own,
            train_dataset=prompts,
            processing_class=own,
        )
        run.train()
        other = PreferenceTrainer(
            str(tiny_folder),
            PreferenceConfig(output_dir=run.args.output_dir, max_steps=1, report_to="none", use_cpu=True),
            train_dataset=pairs,
            processing_class=own,
        )
        losses.append((run.state.log_history[0]["score"], other.train().training_loss))
    assert losses[0] == losses[1]


def test_prompts_that_a_reward_model_cannot_read_are_counted(
    trainer: Callable[..., RTOTrainer],
    reward_folder: Path,
    prompts: Dataset,
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load_scalar(reward_folder)
    lengths = [len(tokenizer(row["prompt"]).input_ids) for row in prompts]
    longest = max(lengths)
    model.config.max_position_embeddings = 6 + longest - 1
    with caplog.at_level("WARNING"):
        run = trainer(reward_funcs=model)
    assert len(run.train_dataset) == sum(n < longest for n in lengths) < len(prompts)
    assert f"with no room for a completion in the {6 + longest - 1} tokens that {reward_folder.name}" in caplog.text
    model.config.max_position_embeddings = 6
    with pytest.raises(DataError, match="Nothing is left to train on: lower max_completion_length"):
        trainer(reward_funcs=model)


def test_reward_models_of_one_name_are_told_apart(
    trainer: Callable[..., RTOTrainer], reward_folder: Path, tmp_path: Path
) -> None:
    """In the log and in the table of completions."""
    folders = [tmp_path / name / "final" for name in ("a", "b")]
    for i, folder in enumerate(folders):
        model = load_scalar(reward_folder)
        with torch.no_grad():
            model.score.weight.mul_(i + 2)
        model.save_pretrained(folder)
        load_tokenizer(reward_folder).save_pretrained(folder)
    run = trainer(reward_funcs=[str(folder) for folder in folders], max_steps=1)
    run.train()
    row = json.loads((Path(run.args.output_dir) / "completions.jsonl").read_text().splitlines()[0])
    assert row["score/final_1"] == pytest.approx(1.5 * row["score/final"], rel=1e-4)
    assert row["score/final"] != 0
    logged = run.state.log_history[0]
    assert logged["score/final_1"] == pytest.approx(1.5 * logged["score/final"], rel=1e-4)


# --- arguments of transformers.Trainer


@pytest.mark.parametrize("kind", [RTOTrainer, PreferenceTrainer])
@pytest.mark.parametrize(
    "name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "data_collator", "model_init"]
)
def test_what_nobody_would_call_is_refused_before_a_model_is_loaded(kind: type, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__} does not use {name}: "):
        kind("/no/such/model", **{name: len})


def test_an_unknown_argument_is_refused_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="RTOTrainer has no argument 'reward_func'; did you mean reward_funcs"):
        RTOTrainer("/no/such/model", reward_func=len)


def test_an_optimizer_of_ones_own(tiny_folder: Path, prompts: Dataset, config: Callable) -> None:
    """A class and its arguments serve policy and critic; one that was made before cannot know the critic."""
    inputs = {"reward_funcs": lambda completions: [0.0] * len(completions), "train_dataset": prompts}
    own = (torch.optim.SGD, {"momentum": 0.5, "lr": 1.0})
    run = RTOTrainer(str(tiny_folder), config(dpo_coef=0.0), optimizer_cls_and_kwargs=own, **inputs)
    optimizer = run.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    policy = LlamaForCausalLM.from_pretrained(tiny_folder)
    made = torch.optim.SGD(policy.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"does not hold value_model\.model\.embed_tokens\.weight, which is trained"):
        RTOTrainer(policy, config(dpo_coef=0.0), optimizers=(made, None), **inputs)


def test_a_reward_model_object_with_any_tokenizer(reward_folder: Path, tokenizer: Any) -> None:
    batch = Completed(prompts=["ab", "cab"], completions=["x", "yz"], completion_ids=[[], []], ended=[True, False])
    scores = [RewardModel(load_scalar(reward_folder), t)(batch) for t in (tokenizer, without_pad(tokenizer))]
    assert scores[0] == scores[1]
