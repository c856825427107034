"""Code that comes with a model or a tokenizer runs only when asked for: in every role of every command.

In a process of its own, where standard input holds a yes to whatever might be asked.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from pathlib import Path
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

with Path({mark!r}).open("a") as file:
    file.write("ran ")

class MarkedConfig(LlamaConfig):
    model_type = "marked"

class MarkedForCausalLM(LlamaForCausalLM):
    config_class = MarkedConfig

class MarkedForSequenceClassification(LlamaPreTrainedModel):
    config_class = MarkedConfig

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model, self.score = LlamaModel(config), nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        every = self.score(self.model(input_ids, attention_mask)[0])
        last = (input_ids != self.config.pad_token_id).long().cumsum(1).argmax(1)
        return SequenceClassifierOutput(logits=every[range(len(last)), last])

class MarkedTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "MarkedConfig",
    "AutoModelForCausalLM": "MarkedForCausalLM",
    "AutoModelForSequenceClassification": "MarkedForSequenceClassification",
}
PROGRAM = """
import json, os, sys, torch
torch.set_num_threads(1)
from rto.cli import main
mark = sys.argv[2]
for args in json.load(open(sys.argv[1])):
    if os.path.exists(mark):
        os.remove(mark)
    print("--- begin", file=sys.stderr, flush=True)
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    print("RESULT", json.dumps([code, os.path.exists(mark)]), flush=True)
assert sys.stdin.read() == "y" * 9, "standard input was read"
"""
COMMON = ["--report_to", "none", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
SMALL = ["--per_device_train_batch_size", "4", "--max_completion_length", "4"]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    """Folders that bring code: a model, a tokenizer alone, and adapters on a base or with a tokenizer of that kind."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("marked")
    found = {"root": root, "plain": tiny_folder, "mark": root / "mark"}
    for name in ("model", "tokenizer", "scorer"):
        folder = found[name] = root / name
        shutil.copytree(tiny_folder, folder)
        (folder / "marked.py").write_text(CODE.format(mark=str(found["mark"])))
        edit(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": [None, "marked.MarkedTokenizer"]},
            tokenizer_class="MarkedTokenizer",
        )
    auto_map = {auto: f"marked.{name}" for auto, name in CLASSES.items()}
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    scorer.save_pretrained(root / "scorer")
    for name, kind in (("model", "MarkedForCausalLM"), ("scorer", "MarkedForSequenceClassification")):
        edit(root / name / "config.json", model_type="marked", architectures=[kind], auto_map=auto_map)
    for name, base, own in (("adapter", "model", None), ("adapter_tokenizer", "plain", "tokenizer")):
        found[name] = root / name
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_folder),
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        )
        adapted.save_pretrained(found[name])
        edit(found[name] / "adapter_config.json", base_model_name_or_path=str(found[base]))
        if own is not None:
            for file in (*(root / own).glob("tokenizer*"), root / own / "marked.py"):
                shutil.copy(file, found[name])
    rows = {
        "pairs": {"prompt": "ab", "chosen": "cab", "rejected": "zq"},
        "demos": {"prompt": "ab", "completion": "cab"},
        "prompts": {"prompt": "ab"},
    }
    for name, row in rows.items():
        found[name] = root / f"{name}.jsonl"
        found[name].write_text((json.dumps(row) + "\n") * 8)
    for name in ("a", "b"):
        found[name] = root / f"{name}.json"
        row = {"instruction": "ab", "output": "c" + name, "generator": name, "dataset": "x"}
        found[name].write_text(json.dumps([row]))
    return found


def rto(folders: dict[str, Path], commands: list[list[str]]) -> tuple[list[tuple[int, bool]], list[str]]:
    """Exit code, and whether code of a model ran, of each command; and what each said on standard error."""
    path = folders["root"] / "commands.json"
    path.write_text(json.dumps(commands))
    cache = {"HF_MODULES_CACHE": str(folders["root"] / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(path), str(folders["mark"])],
        env={**os.environ, **cache},
        input="y" * 9,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line.partition(" ")[2]) for line in done.stdout.split("\n") if line.startswith("RESULT")]
    return [(code, ran) for code, ran in results], done.stderr.split("--- begin\n")[1:]


def roles(folders: dict[str, Path]) -> dict[str, list[str]]:
    """Every place of every command that takes a model, MODEL standing for it."""
    plain = str(folders["plain"])
    pairs, demos, prompts = (["--dataset_name", str(folders[name])] for name in ("pairs", "demos", "prompts"))
    start = ["--model_name_or_path", plain]
    dense, paid = ["--score_coef", "0"], ["--score_coef", "0", "--dpo_model", plain]
    judged = ["--answers", str(folders["a"]), "--baseline", str(folders["b"])]
    return {
        "sft": ["sft", "--model_name_or_path", "MODEL", *demos],
        "prefer": ["prefer", "--model_name_or_path", "MODEL", *pairs],
        "prefer ref_model": ["prefer", *start, *pairs, "--ref_model", "MODEL"],
        "reward": ["reward", "--model_name_or_path", "MODEL", *pairs],
        "train": ["train", "--model_name_or_path", "MODEL", *prompts, *paid],
        "train ref_model": ["train", *start, *prompts, *paid, "--ref_model", "MODEL"],
        "train dpo_model": ["train", *start, *prompts, *dense, "--dpo_model", "MODEL"],
        "train dpo_model, adapters": ["train", "--use_peft", *start, *prompts, *dense, "--dpo_model", "MODEL"],
        "train dpo_ref_model": ["train", *start, *prompts, *paid, "--dpo_ref_model", "MODEL"],
        "train value_model": ["train", *start, *prompts, *paid, "--value_model", "MODEL"],
        "train reward_funcs": ["train", *start, *prompts, "--dpo_coef", "0", "--reward_funcs", "MODEL"],
        "export": ["export", "--model_name_or_path", "MODEL"],
        "inspect dpo_model": ["inspect", *pairs, "--dpo_model", "MODEL", "--ref_model", plain],
        "inspect ref_model": ["inspect", *pairs, "--dpo_model", plain, "--ref_model", "MODEL"],
        "inspect reward_model": [
            *("inspect", *pairs, "--dpo_model", plain, "--ref_model", plain, "--reward_model", "MODEL")
        ],
        "generate": ["evaluate", "generate", "--benchmark", str(folders["a"]), "--model", "MODEL"],
        "judge": ["evaluate", "judge", *judged, "--judge", "MODEL"],
        "run model": ["run", "--model", "MODEL", "--data.demonstrations.path", str(folders["demos"])],
        "run reward_model": ["run", "--reward_model", "MODEL"],
        "reproduce model": [
            "reproduce",
            "RECIPE",
            "--model",
            "MODEL",
            "--data.demonstrations.path",
            str(folders["demos"]),
        ],
        "plan": ["plan", "RECIPE", "--model", "MODEL"],
    }


def command(folders: dict[str, Path], role: str, kind: str, *, trust: bool) -> list[str]:
    """A role's command with a folder of a kind in its place, complete with what it needs besides."""
    out = str(folders["root"] / "out" / f"{role} {kind} {trust}")
    words = [str(folders[kind]) if word == "MODEL" else word for word in roles(folders)[role]]
    name, recipe = words[0], name_of_recipe(folders)
    words = [recipe if word == "RECIPE" else word for word in words]
    if name == "run":
        words.insert(1, recipe)
    if name in ("run", "reproduce", "plan"):
        flag = ["--trust_remote_code", "true"] if name != "plan" else []
        output = ["--output_dir", out] if name != "plan" else []
        return [*words, *output, *(flag if trust else [])]
    flag = ["--trust_remote_code"] if trust else []
    if name == "evaluate":
        return [*words, "--output", out, *flag]
    small = SMALL if name == "train" else []
    common = COMMON if name in ("sft", "prefer", "reward", "train") else []
    return [*words, "--output_dir", out, *common, *small, *flag]


def name_of_recipe(folders: dict[str, Path]) -> str:
    """A recipe whose every stage takes a step."""
    path = folders["root"] / "recipe.yaml"
    rows = {name: {"path": str(folders[name])} for name in ("pairs", "prompts")}
    step = {"per_device_train_batch_size": 8}
    recipe = {
        "model": str(folders["plain"]),
        "data": {**rows, "test_prompts": rows["prompts"], "demonstrations": {"path": str(folders["demos"])}},
        "completion_length": 4,
        "methods": {"RTO": {}},
        "study": {"baseline": "RTO", "seeds": 1},
        "sft": step,
        "prefer": step,
        "reward": step,
        "train": step,
    }
    path.write_text(json.dumps(recipe))
    return str(path)


KINDS = ["model", "tokenizer", "scorer", "adapter", "adapter_tokenizer"]


@pytest.mark.slow
def test_code_that_comes_with_a_model_does_not_run_unasked(folders: dict[str, Path]) -> None:
    members = [(role, kind) for role in roles(folders) for kind in KINDS]
    results, said = rto(folders, [command(folders, role, kind, trust=False) for role, kind in members])
    refused = set()
    for (role, kind), (code, ran), lines in zip(members, results, said, strict=True):
        assert not ran, f"{role}, {kind}"
        last = lines.strip().split("\n")[-1]
        assert code in (0, 2), f"{role}, {kind}: {lines[-2000:]}"
        if code == 2 and "trust_remote_code" in last:
            assert last.startswith("rto ")
            assert str(folders["root"]) in last, f"it names the folder: {last}"
            refused.add((role, kind))
    assert {(role, "model") for role in roles(folders)} <= refused


@pytest.mark.slow
def test_code_that_comes_with_a_model_runs_when_asked_for(folders: dict[str, Path]) -> None:
    kinds = {"export": "adapter_tokenizer", "judge": "scorer"}
    found = {role: kinds.get(role, "scorer" if "reward_" in role else "model") for role in roles(folders)}
    del found["plan"]  # it runs nobody's code, and takes a configuration instead
    results, said = rto(folders, [command(folders, role, kind, trust=True) for role, kind in found.items()])
    for role, (code, _), lines in zip(found, results, said, strict=True):
        assert code == 0, f"{role}: {lines[-2000:]}"
    assert results[0][1], "the code ran, once in a process"
