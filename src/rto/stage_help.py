"""`rto COMMAND --help` of a stage, and the keys of a recipe: what is ours, at once.

Most flags of a stage are those of `transformers.TrainingArguments`. This page has ours and the few of the others that
nearly every run sets; ``--help-all`` has the rest.
"""

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rto import module_of
from rto.declared import Declared, declared


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command that trains.

    Attributes:
        does: what, in a line.
        config: its configuration, a public name.
        groups: dataclasses of `rto.cli` with its other flags.
        common: inherited flags that most runs set, name to meaning, beside `COMMON`.
    """

    does: str
    config: str
    groups: tuple[str, ...]
    common: Mapping[str, str]


COMMON = {
    "output_dir": "folder of the trained model, checkpoints and log",
    "bf16": "compute in bfloat16 by autocast",
    "gradient_checkpointing": "compute activations again in the backward pass, to save memory",
    "max_steps": "stop after so many updates",
    "lr_scheduler_type": "linear, cosine, constant, ...",
    "warmup_steps": "updates, or a share of them below 1, over which the learning rate rises",
    "save_steps": "write a checkpoint every so many updates, or at every such share of them below 1",
    "save_total_limit": "keep so many checkpoints",
    "resume_from_checkpoint": "true or last: continue from the last whole checkpoint; or its folder",
    "eval_strategy": "no, steps or epoch: when to evaluate on eval_dataset_name",
    "report_to": "tensorboard, wandb, ...; none",
    "push_to_hub": "upload the model when it is trained; hub_model_id names it",
    "seed": "of everything drawn at random",
    "use_peft": "train a LoRA adapter: lora_r, lora_alpha, lora_target_modules",
    "load_in_4bit": "hold the frozen base in four bits (QLoRA); needs use_peft",
}
RATE = {"learning_rate": "initial learning rate", "num_train_epochs": "passes over the rows"}
BATCH = {
    "per_device_train_batch_size": "rows a process reads at a time",
    "gradient_accumulation_steps": "such batches in one update",
}
LENGTH = {"max_length": "tokens of a row; longer ones are cut"}
STAGES = {
    "sft": Stage(
        does="fine-tune on demonstrations: prompt and completion, messages, or text",
        config="SFTConfig",
        groups=("DataArguments",),
        common=RATE
        | BATCH
        | LENGTH
        | {
            "packing": "fill rows of max_length with several demonstrations",
            "completion_only_loss": "whether a prompt has no part in the loss",
            "assistant_only_loss": "learn the assistant's turns alone, by marks in the template",
        },
    ),
    "prefer": Stage(
        does="learn π_dpo from preference pairs, or from completions labelled one by one (KTO)",
        config="PreferenceConfig",
        groups=("DataArguments", "ReferenceArguments"),
        common=BATCH,
    ),
    "reward": Stage(
        does="learn a sentence reward model from preference pairs",
        config="RewardConfig",
        groups=("DataArguments",),
        common=RATE | BATCH | {"max_length": "longer rows are left out"},
    ),
    "train": Stage(
        does="PPO on the token reward of π_dpo (RTO), or without it (--dpo_coef 0)",
        config="RTOConfig",
        groups=("DataArguments", "RewardArguments"),
        common={},
    ),
}


def stage_help(command: str) -> str:
    """The page of ``rto sft``, ``prefer``, ``reward`` or ``train``."""
    stage = STAGES[command]
    model = Declared("model_name_or_path", "str", None, "The model to start from: a folder or a hub id.")
    inputs = [model, *(flag for group in stage.groups for flag in declared("rto.cli", group))]
    own = declared(module_of(stage.config), stage.config)
    named = {flag.name for flag in own}
    common = [Declared(n, "str", "", text) for n, text in {**stage.common, **COMMON}.items() if n not in named]
    files = [
        Declared("config", "FILE.yaml", "", "the same keys in a file; a flag wins over it"),
        Declared("help-all", "", "", "every flag, with those of transformers and TRL"),
    ]
    parts = {
        "flags in a file, and all of them": files,
        "models and data": inputs,
        f"{stage.config}": own,
        "of transformers, TRL and PEFT, what most runs set": common,
    }
    lines = [f"usage: rto {command} --model_name_or_path MODEL --dataset_name DATA [--NAME VALUE ...]", "", stage.does]
    for title, flags in parts.items():
        lines += ["", f"{title}:", *rows((f"--{flag.name} {_value(flag)}".rstrip(), _said(flag)) for flag in flags)]
    return "\n".join(lines)


def shown_flags(command: str) -> set[str]:
    """Names of the flags on the page of a command."""
    return {"model_name_or_path", "config", *_own(command), *STAGES[command].common, *COMMON}


def _own(command: str) -> list[str]:
    stage = STAGES[command]
    groups = [("rto.cli", group) for group in stage.groups] + [(module_of(stage.config), stage.config)]
    return [flag.name for module, name in groups for flag in declared(module, name)]


RECIPE = {"": "Recipe", "data": "Data", "data.prompts, and every other key of data": "Rows", "study": "Study"}
RECIPE |= {"study.tune": "Tuning", "labels": "Labels", "labels.judge": "JudgeEndpoint"}


def recipe_help() -> str:
    """The keys of a recipe."""
    lines = ["keys of a recipe, in its file or on the command line as --KEY VALUE, dotted (--train.gamma 0.9):"]
    for key, kind in RECIPE.items():
        lines += ["", f"{key}:"] if key else [""]
        lines += rows((flag.name, _said(flag)) for flag in declared("rto.recipe", kind) if flag.name != "references")
    stages = ", ".join(f"{key} ({name})" for key, name in SECTIONS.items())
    lines += [
        "",
        *textwrap.wrap(f"Arguments of the stages: {stages}. rto sft, prefer, reward, train --help tell them."),
    ]
    return "\n".join(lines)


SECTIONS = {
    "sft": "SFTConfig",
    "prefer, learners.NAME": "PreferenceConfig",
    "reward": "RewardConfig",
    "train, methods.NAME": "RTOConfig",
    "peft": "LoraConfig of PEFT",
}


def rows(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Names and what is said of them in two columns."""
    width = min(shutil.get_terminal_size().columns, 119)
    for name, said in pairs:
        head = f"  {name}"
        if len(head) > COLUMN - 2:
            yield head
            head = ""
        indent = " " * COLUMN
        yield from textwrap.wrap(
            said, width, initial_indent=head.ljust(COLUMN), subsequent_indent=indent, break_on_hyphens=False
        ) or [head]


COLUMN = 36
METAVARS = (
    ("bool", "[true|false]"),
    ("int", "N"),
    ("float", "X"),
    ("list", "TEXT ..."),
    ("dict", "JSON"),
    ("str", "TEXT"),
)


def _value(flag: Declared) -> str:
    if flag.name in ("config",):
        return flag.annotation
    for kind, word in METAVARS:
        if flag.default != "" and flag.annotation.startswith(kind):
            return word
    return ""


def _said(flag: Declared) -> str:
    said = flag.help.replace("``", "")
    if flag.default is None:
        return f"{said} (required)"
    default = WRITTEN.get(flag.default, flag.default.strip("'"))
    return f"{said} ({default})" if default else said


WRITTEN = {"None": "", "True": "true", "False": "false"}
"""How files and flags have it; nothing is said of None."""
