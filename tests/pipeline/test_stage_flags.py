"""One stage from the command line: what its flags say of precision and revision reaches the models.

In a process of its own, as in `test_cli`: the parser of arguments rewrites the annotations of the configurations.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import warm

PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
torch.set_num_threads(1)
commands, start = json.loads(sys.argv[1]), sys.argv[2]
seen = {}

def record(kind):
    original = kind.from_pretrained
    def recorded(source, *args, **kwargs):
        if str(source) == start:
            name = "tokenizer" if kind is AutoTokenizer else "model"
            seen.setdefault(name, {key: str(value) for key, value in kwargs.items()})
        return original(source, *args, **kwargs)
    kind.from_pretrained = recorded

for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer):
    record(kind)
original = Trainer.train

def train(self, *args, **kwargs):
    for name, trained in (("frozen", False), ("trained", True)):
        seen[name] = sorted({str(p.dtype) for p in self.model.parameters() if p.requires_grad == trained})
    return original(self, *args, **kwargs)

Trainer.train = train
from rto.cli import main
found = []
for args in commands:
    seen.clear()
    found.append({"code": main(args), **seen})
print(json.dumps(found))
"""
PAIRS = [{"prompt": "ab", "chosen": "bab", "rejected": "zq"}, {"prompt": "c", "chosen": "b", "rejected": "q"}] * 4
ROWS = {"sft": [{"prompt": "ab", "completion": "bab"}] * 8, "reward": PAIRS, "prefer": PAIRS}
ADAPTER = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "1"]
FLAGS = {
    "none": [],
    "bf16": [*ADAPTER, "--bf16"],
    "all": [
        *ADAPTER,
        *("--dtype", "bfloat16", "--attn_implementation", "eager", "--model_revision", "v2", "--trust_remote_code"),
    ],
}


@pytest.fixture(scope="module")
def ran(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What each stage read and trained under each set of flags, and its folder."""
    folder, commands = tmp_path_factory.mktemp("stages"), {}
    for stage, rows in ROWS.items():
        data = folder / f"{stage}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, flags in FLAGS.items():
            if name == "bf16" and stage != "sft":
                continue
            common = {"model_name_or_path": tiny_folder, "dataset_name": data, "output_dir": folder / stage / name}
            named = [text for flag, value in common.items() for text in (f"--{flag}", str(value))]
            commands[stage, name] = [stage, *named, *flags]
    arguments = [json.dumps(list(commands.values())), str(tiny_folder)]
    done = warm.run(PROGRAM, *arguments, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert all(row["code"] == 0 for row in found), done.stderr[-3000:]
    return {key: {**row, "folder": folder / key[0] / key[1]} for key, row in zip(commands, found, strict=True)}


@pytest.mark.parametrize("stage", ROWS)
def test_a_stage_needs_no_further_flags_on_a_processor(ran: Any, stage: str) -> None:
    """fp32 unless bf16 is asked for, no tracker, no activations computed twice."""
    folder = ran[stage, "none"]["folder"]
    args = torch.load(folder / "training_args.bin", weights_only=False)
    assert args.mixed_precision == "no"
    assert not args.activation_checkpointing
    assert not args.report_to
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    assert auto.from_pretrained(folder, dtype="auto").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"


@pytest.mark.parametrize("stage", ROWS)
def test_flags_reach_the_model_and_its_tokenizer(ran: Any, stage: str) -> None:
    model, tokenizer = ran[stage, "all"]["model"], ran[stage, "all"]["tokenizer"]
    expected = {"dtype": "torch.bfloat16", "attn_implementation": "eager", "revision": "v2"}
    assert {name: model[name] for name in expected} == expected
    assert model["trust_remote_code"] == tokenizer["trust_remote_code"] == "True"
    assert tokenizer["revision"] == "v2"
    assert "revision" not in ran[stage, "none"]["model"]


@pytest.mark.parametrize(("stage", "flags"), [("sft", "all"), ("reward", "all"), ("prefer", "all"), ("sft", "bf16")])
def test_the_base_is_held_in_dtype_or_in_the_compute_precision(ran: Any, stage: str, flags: str) -> None:
    # PEFT keeps the head that its trained copy came from.
    original_head = ["torch.float32"] if stage == "reward" else []
    assert ran[stage, flags]["frozen"] == ["torch.bfloat16", *original_head]
    assert ran[stage, flags]["trained"] == ["torch.float32"]
