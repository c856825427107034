"""Each stage alone, from the command line, on files: what one writes the next reads.

In a process of its own: the parser of arguments rewrites the annotations of the configurations, which the run-time
shape checks of the other tests read.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import warm

WORDS = ["ab", "cab", "back", "abacus", "crab", "dab", "fable", "garb"]
COMMON = ["--report_to", "none", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
TRL = ["--bf16", "false", "--gradient_checkpointing", "false"]
PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from rto.cli import main
for args in json.loads(sys.argv[1]):
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    print("exit code", code, flush=True)
    print("--- end of", args[0], file=sys.stderr, flush=True)
"""


def rto(*commands: list[str]) -> tuple[list[int], str, str]:
    """Exit codes, standard output and standard error of several commands."""
    path = [str(Path(__file__).parents[1] / "trainers"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = warm.run(PROGRAM, json.dumps(commands), environment=environment, timeout=240)
    codes = [int(line.split()[-1]) for line in done.stdout.split("\n") if line.startswith("exit code")]
    assert len(codes) == len(commands), done.stderr[-3000:]
    return codes, done.stdout, done.stderr


def write(path: Path, rows: list[dict]) -> str:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def test_four_stages(tiny_folder: Path, tmp_path: Path) -> None:
    demos = write(tmp_path / "demos.jsonl.gz", [{"prompt": w, "completion": w + w} for w in WORDS])
    pairs = write(tmp_path / "pairs.jsonl.gz", [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in WORDS])
    prompts = write(tmp_path / "prompts.jsonl.gz", [{"prompt": w} for w in WORDS])
    sft, dpo, reward, out = (str(tmp_path / name) for name in ("sft", "dpo", "reward", "out"))
    config = tmp_path / "train.yaml"
    config.write_text("dpo_coef: 0.1\nper_device_train_batch_size: 8\nmax_completion_length: 4\nlearning_rate: 0.5\n")
    on_pairs = ["--model_name_or_path", sft, "--dataset_name", pairs, *COMMON]
    held_out = ["--eval_dataset_name", pairs, "--dataset_test_split", "train"]
    rewards = ["--dpo_model", dpo, "--reward_funcs", reward, "killable:score"]
    codes, output, errors = rto(
        ["sft", "--model_name_or_path", str(tiny_folder), "--dataset_name", demos, "--output_dir", sft, *COMMON, *TRL],
        ["prefer", *on_pairs, *held_out, "--output_dir", dpo, "--loss_kwargs", '{"beta": 0.2}'],
        ["reward", *on_pairs, "--output_dir", reward, *TRL],
        [
            *("train", "--model_name_or_path", sft, *rewards, "--dataset_name", prompts),
            *("--config", str(config), "--learning_rate", "0.001", "--output_dir", out, *COMMON),
            *("--report_to", "tensorboard"),
        ],
    )
    assert codes == [0, 0, 0, 0], errors[-3000:]
    for folder in (sft, dpo, reward, out):  # what it is about to do, before it is done
        told = output.index(f"{folder}: {len(WORDS)} rows, ")
        assert told < output.index(f"weights learn; to see it: rto watch {folder}") < output.index(f"model: {folder}")
    for folder in (sft, dpo, out):
        AutoModelForCausalLM.from_pretrained(folder)
    for folder, method in ((sft, "SFT"), (dpo, "DPO"), (reward, "reward model"), (out, "RTO")):
        card = ModelCard.load(Path(folder) / "README.md")
        about = json.loads((Path(folder) / "rto_config.json").read_text())
        assert about["method"] == method
        assert about["data"]["rows"] == len(WORDS)
        assert {"rto", "generated_from_trainer"} <= set(card.data.tags)
        assert card.data.base_model is None  # a folder of this machine is nobody else's
        assert str(tmp_path) not in card.content + json.dumps(about)
        assert f"# {Path(folder).name}" in card.content
    assert "`eval_accuracy`" in (Path(dpo) / "README.md").read_text()
    assert "| `dpo_coef` | 0.1 |" in card.content
    assert "| `kl` |" in card.content
    assert AutoModelForSequenceClassification.from_pretrained(reward).config.num_labels == 1
    first = json.loads((Path(out) / "log.jsonl").read_text().split("\n")[0])
    assert first["share/token"] > 0
    assert {"score/reward", "score/score"} <= first.keys()  # a model by its folder, a function by its name
    assert first["learning_rate"] <= 0.001  # the flag wins over the file
    assert list(Path(out).rglob("events.out.tfevents*"))


def test_stages_with_adapters_and_their_export(tiny_folder: Path, tmp_path: Path) -> None:
    """With --use_peft every stage writes an adapter, `rto train` puts them on one base, `rto export` merges one."""
    pairs = write(tmp_path / "pairs.jsonl.gz", [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in WORDS])
    prompts = write(tmp_path / "prompts.jsonl.gz", [{"prompt": w} for w in WORDS])
    dpo, reward, out, merged = (str(tmp_path / name) for name in ("dpo", "reward", "out", "merged"))
    lora = ["--model_name_or_path", str(tiny_folder), "--use_peft", "--lora_target_modules", "all-linear", *COMMON]
    small = ["--per_device_train_batch_size", "8", "--max_completion_length", "4"]
    codes, _, errors = rto(
        ["prefer", *lora, "--dataset_name", pairs, "--output_dir", dpo],
        ["reward", *lora, "--dataset_name", pairs, "--output_dir", reward, *TRL],
        [
            *("train", *lora, "--dataset_name", prompts, "--output_dir", out, *small),
            *("--dpo_model", dpo, "--reward_funcs", reward),
        ],
        ["export", "--model_name_or_path", out, "--output_dir", merged],
        ["export", "--model_name_or_path", out, "--output_dir", merged],
        ["train", *lora, "--dataset_name", prompts, "--output_dir", out, "--model_name_or_path", dpo],
        ["sft", *COMMON, "--model_name_or_path", dpo, "--dataset_name", pairs, "--output_dir", out, "--load_in_4bit"],
    )
    assert codes == [0, 0, 0, 0, 2, 2, 2], errors[-3000:]
    for folder, kind in (
        (dpo, "CAUSAL_LM"),
        (reward, "SEQ_CLS"),
        (out, "CAUSAL_LM"),
        (f"{out}/value_model", "SEQ_CLS"),
    ):
        assert json.loads((Path(folder) / "adapter_config.json").read_text())["task_type"] == kind
    AutoModelForCausalLM.from_pretrained(merged)
    *_, again, _, four_bits, _ = errors.split("--- end of")
    assert "merged exists already" in again
    assert "add --use_peft" in four_bits


def test_bad_input_ends_in_a_line(tiny_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("dpo_cof: 0.1\n")
    flags = ["--model_name_or_path", str(tiny_folder), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    codes, output, errors = rto(
        ["train", *flags, "--dataset_name", "x.jsonl", "--config", str(config)],
        ["prefer", *flags, "--dataset_name", "nothere.jsonl"],
        ["train", *flags, "--dataset_name", "x.jsonl", "--dpo_cof", "0.1"],
        ["train", "--help"],
        ["train", *flags, "--dataset_name", "x.jsonl", "--dry_run"],
    )
    assert codes == [2, 2, 2, 0, 2]
    unknown_key, missing_file, unknown_flag, _, dry = errors.split("--- end of")[:5]
    assert "rto run RECIPE.yaml --dry_run" in dry
    assert "dpo_cof" in unknown_key
    assert "rto prefer: nothere.jsonl: no such file" in missing_file
    assert "dpo_cof" in unknown_flag
    assert "--dpo_coef" in output


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag: str, capsys: pytest.CaptureFixture) -> None:
    from rto.cli import main

    assert main([flag]) == 0
    assert "the whole method" in capsys.readouterr().out


def test_every_learner_by_its_recipe(tiny_folder: Path, tmp_path: Path) -> None:
    """The shipped settings of each loss, on a tiny model and one update."""
    recipes = sorted((Path(__file__).parents[2] / "recipes" / "prefer").glob("*.yaml"))
    pairs = write(tmp_path / "pairs.jsonl.gz", [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in WORDS])
    inputs = ["--model_name_or_path", str(tiny_folder), "--dataset_name", pairs, "--eval_dataset_name", pairs]
    small = ["--dataset_test_split", "train", "--max_steps", "1", "--bf16", "false", *COMMON]
    commands = [
        ["prefer", "--config", str(path), *inputs, *small, "--output_dir", str(tmp_path / path.stem)]
        for path in recipes
    ]
    assert {path.stem for path in recipes} == {"dpo", "ipo", "kto", "simpo", "rdpo", "tdpo"}
    codes, out, errors = rto(*commands)
    assert codes == [0] * len(recipes), errors[-3000:]
    assert out.count("'eval_accuracy'") == len(recipes)
    for path in recipes:
        AutoModelForCausalLM.from_pretrained(tmp_path / path.stem)


FAULTS = """
import resource, sys
from rto.cli import _keep_freed_memory
if sys.argv[1] == "keep":
    _keep_freed_memory()
if sys.argv[2] == "tensors":
    import torch
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
paid = []
for _ in range(20):
    before = pages()
    torch.empty(2**24).fill_(1.0) if sys.argv[2] == "tensors" else bytearray(2**26)
    paid.append(pages() - before > 1000)
print(sum(paid))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_freed_memory_is_used_again() -> None:
    """Twenty times 64 MiB, made and freed in turn: the command's process does not pay for new pages each time.

    In processes of their own: the allocator reads its settings when one starts, and a forked one has its parent's.
    """

    def paid(how: str, what: str, own: dict[str, str]) -> int:
        command = [sys.executable, "-c", FAULTS, how, what]
        done = subprocess.run(command, env=environment | own, capture_output=True, text=True, check=True)
        return int(done.stdout)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    theirs = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    settings = [("leave", "bytes", {}), ("keep", "bytes", {}), ("keep", "tensors", {}), ("keep", "bytes", theirs)]
    usual, kept, kept_by_torch, asked = (paid(*setting) for setting in settings)
    assert usual == 20
    assert max(kept, kept_by_torch) < 10  # the heap grows for a few rounds, then serves them all
    assert asked == 20  # the user's own setting stays
