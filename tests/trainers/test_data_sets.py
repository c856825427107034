"""Data sets in all the forms that trainers are given, and the limits that a model's context sets to rows."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    CamembertConfig,
    CTRLConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    LongformerConfig,
    MambaConfig,
    MistralConfig,
    MPNetConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    XLMRobertaConfig,
    XLNetConfig,
)
from trl import RewardConfig, SFTConfig

from conftest import count_b
from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.data.formats import DataError
from rto.models.loading import load_scalar, max_positions, positions_of
from rto.trainers.supervised import RewardTrainer, SFTTrainer

QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


# --- the context

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ENCODER = SMALL | {"max_position_embeddings": 20, "num_labels": 1}
GPT: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
MPT: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 20}
OPT = {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 20}
LEARNED = [
    (AutoModelForSequenceClassification, BertConfig(**ENCODER), 20),
    (AutoModelForSequenceClassification, RobertaConfig(**ENCODER), 18),
    (AutoModelForSequenceClassification, RobertaConfig(**{**ENCODER, "pad_token_id": 3}), 16),
    (AutoModelForSequenceClassification, XLMRobertaConfig(**ENCODER), 18),
    (AutoModelForSequenceClassification, CamembertConfig(**ENCODER), 18),
    (AutoModelForSequenceClassification, MPNetConfig(**ENCODER), 18),
    (AutoModelForSequenceClassification, LongformerConfig(**ENCODER, attention_window=4), 18),
    (AutoModelForCausalLM, GPT2Config(**GPT, bos_token_id=0, eos_token_id=2), 20),
    (AutoModelForCausalLM, CTRLConfig(**GPT, dff=16), 20),
    (AutoModelForCausalLM, OPTConfig(**OPT), 20),
    (AutoModelForCausalLM, MptConfig(**MPT), 20),
]


@pytest.mark.parametrize(("kind", "config", "expected"), LEARNED, ids=[f"{x[1].model_type}-{x[2]}" for x in LEARNED])
def test_a_position_table_is_used_to_its_last_entry_and_no_further(kind: Any, config: Any, expected: int) -> None:
    """Oracle: the model's own forward pass, which fails at one token more."""
    model = kind.from_config(config).eval()
    assert max_positions(model) == expected
    for length, fits in ((expected, True), (expected + 1, False)):
        ids = torch.full((1, length), 5)
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            assert not fits
        else:
            assert fits


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=20), 20),
        (MistralConfig(max_position_embeddings=20, sliding_window=4), 20),
        (BloomConfig(), None),
        (FalconConfig(alibi=True, max_position_embeddings=20), None),
        (FalconConfig(alibi=False, max_position_embeddings=20), 20),
        (MambaConfig(), None),
        (XLNetConfig(), None),
    ],
    ids=["rotary", "window", "bloom", "falcon-alibi", "falcon", "mamba", "xlnet"],
)
def test_positions_that_are_computed(config: Any, expected: int | None) -> None:
    assert positions_of(config) == expected


LONG = [
    {"prompt": "ab", "chosen": "c" * 30, "rejected": "d"},
    {"prompt": "ab", "chosen": "c", "rejected": "d"},
    {"prompt": "ab", "chosen": "c" * 60, "rejected": "d"},
    {"prompt": "ba", "chosen": "d", "rejected": "e"},
]


@pytest.mark.parametrize(
    ("max_length", "context", "reason", "kept"),
    [
        (1024, 24, "over the model's context of 24 tokens", 2),
        (24, 128, "over 24 tokens", 2),
        (40, 40, "over 40 tokens", 3),
    ],
)
def test_preferences_and_rewards_count_what_the_context_cannot_hold(
    max_length: int, context: int, reason: str, kept: int, tiny_model: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    out = str(tmp_path)
    prefer = PreferenceTrainer(
        tiny_model(max_position_embeddings=context),
        PreferenceConfig(output_dir=out, max_length=max_length, **QUIET),
        train_dataset=Dataset.from_list(LONG),
        processing_class=tokenizer,
    )
    folder = tmp_path / "start"
    tiny_model(max_position_embeddings=context).save_pretrained(folder)
    reward = RewardTrainer(
        load_scalar(str(folder)),
        RewardConfig(output_dir=out, max_length=max_length, bf16=False, **QUIET),
        train_dataset=Dataset.from_list(LONG),
        processing_class=tokenizer,
    )
    for trainer in (prefer, reward):
        assert trainer.skipped["train"].counts == {reason: 4 - kept}
        assert len(trainer.train_dataset) == kept


def test_the_shortest_context_of_all_readers_counts(tiny_model: Callable, tokenizer: Any, tmp_path: Path) -> None:
    prefer = PreferenceTrainer(
        tiny_model(),
        PreferenceConfig(output_dir=str(tmp_path), **QUIET),
        ref_model=tiny_model(seed=1, max_position_embeddings=24),
        train_dataset=Dataset.from_list(LONG),
        processing_class=tokenizer,
    )
    assert prefer.skipped["train"].counts == {"over the model's context of 24 tokens": 2}


def test_prompts_leave_room_for_a_completion(trainer: Callable) -> None:
    run = trainer(
        dpo_coef=0.0,
        per_device_train_batch_size=2,
        train_dataset=[{"prompt": "a" * n} for n in (121, 122, 123, 5)],
    )
    (reason,) = run.skipped["train"].counts
    assert reason == "with a prompt over 122 tokens, all that a completion leaves of the model's context"
    assert [len(p.ids) for p in run.train_dataset] == [121, 122, 5]


# --- evaluation on several sets, and streams

HELD_OUT = {"short": [{"prompt": "ab"}, {"prompt": "cab"}], "long": [{"prompt": "abba"}, {"prompt": ""}]}


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    def each() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(each)


def test_prompts_in_a_dictionary_and_in_streams(trainer: Callable, prompts: Dataset, tmp_path: Path) -> None:
    sets = {name: Dataset.from_list(rows) for name, rows in HELD_OUT.items()}
    run = trainer(dpo_coef=0.0, eval_dataset=sets, train_dataset=stream(prompts.to_list()))
    assert len(run.train_dataset) == len(prompts)
    assert run.skipped["eval_long"].counts == {"with an empty prompt": 1}
    found = run.evaluate()
    for name, rows in sets.items():
        alone = run.evaluate(rows, metric_key_prefix=f"eval_{name}")
        assert alone.items() <= found.items()
        assert run.evaluate(name, metric_key_prefix=f"eval_{name}") == alone
    assert {key.split("_")[1] for key in found} == {"short", "long"}
    assert run.evaluate({"mine": stream(HELD_OUT["short"])}).keys() == {
        key.replace("_short_", "_mine_") for key in found if "_short_" in key
    }
    with pytest.raises(DataError, match=r"eval_dataset\['bad'\] has no column 'prompt'"):
        trainer(dpo_coef=0.0, eval_dataset={"bad": Dataset.from_list([{"question": "a"}])})


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_pairs_in_a_dictionary_and_in_streams(loss: str, tiny_folder: Path, pairs: Dataset, tmp_path: Path) -> None:
    args = PreferenceConfig(
        output_dir=str(tmp_path), loss=loss, max_steps=2, eval_strategy="steps", eval_steps=1, **QUIET
    )
    sets = {"a": pairs, "b": stream(pairs.to_list()[:3])}
    run = PreferenceTrainer(str(tiny_folder), args, train_dataset=stream(pairs.to_list()), eval_dataset=sets)
    run.train()
    logged = [row for row in run.state.log_history if "eval_a_loss" in row]
    assert len(logged) == 2
    found = run.evaluate()
    assert found["eval_a_pairs"] == len(pairs)
    assert found["eval_b_pairs"] == 3
    assert found["eval_a_loss"] == pytest.approx(logged[-1]["eval_a_loss"], abs=1e-6)


def test_the_reward_stage_with_a_dictionary_and_streams(
    tiny_folder: Path, tokenizer: Any, pairs: Dataset, tmp_path: Path
) -> None:
    run = RewardTrainer(
        load_scalar(str(tiny_folder)),
        RewardConfig(output_dir=str(tmp_path), max_steps=1, bf16=False, **QUIET),
        train_dataset=stream(pairs.to_list()),
        eval_dataset={"a": pairs, "b": stream(pairs.to_list()[:3])},
        processing_class=tokenizer,
    )
    run.train()
    found = run.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= found.keys()
    again = run.evaluate(pairs, metric_key_prefix="eval_a")
    assert again["eval_a_loss"] == pytest.approx(found["eval_a_loss"])


def test_fine_tuning_with_a_dictionary_and_streams(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": word} for word in ("cab", "back", "", "garb")]
    run = SFTTrainer(
        str(tiny_folder),
        SFTConfig(output_dir=str(tmp_path), max_steps=1, bf16=False, **QUIET),
        train_dataset=stream(rows),
        eval_dataset={"a": Dataset.from_list(rows), "b": stream(rows[:2])},
    )
    assert run.skipped["train"].counts == run.skipped["a"].counts == {"with an empty completion": 1}
    run.train()
    assert {"eval_a_loss", "eval_b_loss"} <= run.evaluate().keys()


# --- too few prompts for a batch


@pytest.fixture
def hollow(tiny_folder: Path, tmp_path: Path) -> str:
    """A model's folder without its weights: what is told of it is told before anything is loaded."""
    folder = tmp_path / "hollow"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def rollouts(count: int, model: str, folder: Path, **settings: Any) -> RTOTrainer:
    args = RTOConfig(output_dir=str(folder), dpo_coef=0.0, max_completion_length=4, **QUIET, **settings)
    rows = [{"prompt": "ab"}] * count
    return RTOTrainer(model, args, reward_funcs=count_b, train_dataset=rows)


def test_a_batch_that_nobody_chose_is_lowered(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rto.trainers.prompts"):
        run = rollouts(63, str(tiny_folder), tmp_path, total_episodes=100)
    assert run.args.per_device_train_batch_size == 60
    assert caplog.messages == [
        "63 prompts do not fill a batch of 64 rollouts: per_device_train_batch_size is 60 in this run"
    ]
    assert run.args.max_steps == 2 * 4
    assert [len(batch) for batch in run.get_train_dataloader()] == [60] * 4


@pytest.mark.parametrize(("count", "settings"), [(3, {}), (63, {"per_device_train_batch_size": 128})])
def test_other_batches_are_refused_before_a_model_is_loaded(
    count: int, settings: dict, hollow: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{count} prompts do not fill one batch"):
        rollouts(count, hollow, tmp_path, **settings)
