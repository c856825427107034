"""A reader's desk: a small model, the rows that the pages speak of, and what each stage would have made."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pages import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

QUESTIONS = (
    *("How do I boil an egg?", "Why is the sky blue?", "What is a bee?", "Name a fruit.", "Who wrote Faust?"),
    *("How far is the moon?", "What is two plus two?", "Say hello."),
)
GOOD, BAD = "Gladly: ask me more.", "No."
CONTEXT = 512
MADE = ("sft", "dpo", "reward", "rto", "dpo-adapter", "reward-adapter")
"""Folders of models that stages make."""


def lay(folder: Path, tiny_model: Callable[..., LlamaForCausalLM], tokenizer: Any) -> None:
    """Write the files of the desk, and lay the clone's own beside them."""
    for name in ("recipes", "benchmarks", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    rows = {
        "demos.jsonl": [{"prompt": q, "completion": GOOD} for q in QUESTIONS],
        "pairs.jsonl": [{"prompt": q, "chosen": GOOD, "rejected": BAD} for q in QUESTIONS],
        "held_out.jsonl": [{"prompt": q.lower(), "chosen": GOOD, "rejected": BAD} for q in QUESTIONS],
        "prompts.jsonl": [{"prompt": q} for q in QUESTIONS],
        "test_prompts.jsonl": [{"prompt": q.upper()} for q in QUESTIONS],
        "answers.jsonl": [{"prompt": q, "completion": GOOD} for q in QUESTIONS[:2]],
    }
    for name, lines in rows.items():
        write_lines(folder / name, lines)
    base = tiny_model(max_position_embeddings=CONTEXT)
    _save(base, folder / "untaught", tokenizer)
    _teach(base, tokenizer)
    _save(base, folder / "base", tokenizer)
    for seed, name in enumerate(("sft", "dpo", "rto")):
        _save(_moved(base, seed), folder / name, tokenizer)
    _save(_scorer(tokenizer), folder / "reward", tokenizer)
    _save(_adapter(folder / "sft", "CAUSAL_LM"), folder / "dpo-adapter", tokenizer)
    _save(_adapter(folder / "sft", "SEQ_CLS"), folder / "reward-adapter", tokenizer)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _teach(model: LlamaForCausalLM, tokenizer: Any, steps: int = 120) -> None:
    """Answer in letters and come to an end: a model of random weights writes bytes until it is cut off."""
    rows = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": GOOD}]
        rows += [
            tokenizer.apply_chat_template(messages, return_dict=False),
            [*tokenizer(question + GOOD).input_ids, 2],
        ]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _moved(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """The same model with a little noise on its weights."""
    other = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=noise))
    return other


def _save(model: Any, folder: Path, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _scorer(tokenizer: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(3)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            max_position_embeddings=2 * CONTEXT,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _adapter(base: Path, task: str) -> PeftModel:
    kind: Any = LlamaForCausalLM if task == "CAUSAL_LM" else LlamaForSequenceClassification
    labels = {} if task == "CAUSAL_LM" else {"num_labels": 1}
    torch.manual_seed(4)
    model = kind.from_pretrained(base, **labels)
    model.config.pad_token_id = 0
    return get_peft_model(model, LoraConfig(task_type=task, r=4, target_modules="all-linear", init_lora_weights=False))
