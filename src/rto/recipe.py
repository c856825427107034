"""A run as a value: what `rto run` reads, checks before any work, and saves beside the results."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from rto.data.formats import DataError, load_rows

EMBEDDED = Path(__file__).parent / "recipes" / "embedded.yaml"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the key and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where rows come from.

    Attributes:
        path: a local file or folder, a hub name, or ``module:function``, a Python function
            ``f(rows, seed, split)`` that returns rows (a string stands for a prompt).
        split: split of the data set.
        name: configuration of a hub data set.
        rows: how many to take; None takes all.
    """

    path: str
    split: str = "train"
    name: str | None = None
    rows: int | None = None

    def load(self, seed: int) -> Dataset:
        """The rows.

        Raises:
            DataError: they cannot be had.
        """
        if is_function(self.path):
            if self.rows is None:
                raise DataError(f"{self.path}: say how many rows a function is to make (rows: N)")
            made = resolve(self.path)(self.rows, seed, self.split)
            return Dataset.from_list([{"prompt": row} if isinstance(row, str) else row for row in made])
        dataset = load_rows(self.path, name=self.name, split=self.split)
        if self.rows is None:
            return dataset
        if len(dataset) < self.rows:
            raise DataError(f"{self.path} has {len(dataset)} rows in split {self.split!r}, {self.rows} are asked for")
        return dataset.shuffle(seed=seed).select(range(self.rows))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Inputs of a run.

    Attributes:
        demonstrations: prompt-completion rows for supervised fine-tuning; None starts from ``model`` as it is.
        pairs: preference pairs; None samples them from the SFT policy and labels them by ``gold``.
        pair_prompts: prompts for sampled pairs.
        prompts: prompts for reinforcement learning, the same for every method.
        test_prompts: held-out prompts for the evaluation.
        eval_pairs: held-out pairs; DPO and reward model are measured on them (``held_out.json`` in their folders).
    """

    prompts: Rows
    test_prompts: Rows
    demonstrations: Rows | None = None
    pairs: Rows | None = None
    pair_prompts: Rows | None = None
    eval_pairs: Rows | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of the whole method.

    Attributes:
        model: the starting point: a folder, a hub id, or ``module:function`` that returns (model, tokenizer).
        data: inputs.
        seed: seed of every stage.
        gold: ``module:function`` with TRL's reward signature, the ground truth where a task has one. Training
            sees it only through the labels of sampled pairs; runs log it beside the learned score.
        label_temperature: pairs are labelled by Bradley–Terry, P(a ≻ b) = σ((gold_a − gold_b) / temperature).
        completion_length: longest completion, in tokens, in every stage.
        sft: arguments of TRL's ``SFTConfig``; None skips the stage.
        prefer: arguments of `PreferenceConfig`.
        reward: arguments of TRL's ``RewardConfig``; None trains no reward model.
        reward_model: what the reward model starts from, another family and size if need be; None: the SFT policy.
        train: arguments of `RTOConfig` that all methods share.
        methods: name to the arguments of `RTOConfig` that are its own.
        evaluate_temperature: sampling temperature of the evaluation.
        peft: arguments of PEFT's ``LoraConfig``; every stage then trains an adapter. That of SFT is merged into
            ``sft/``, the base that all other roles share; a ``reward_model`` of its own is trained whole. None trains
            whole models.
    """

    model: str
    data: Data
    seed: int = 0
    gold: str | None = None
    label_temperature: float = 1.0
    completion_length: int = 256
    sft: dict[str, Any] | None = None
    prefer: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] | None = None
    reward_model: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"RTO": {}})
    evaluate_temperature: float = 1.0
    peft: dict[str, Any] | None = None

    def lora(self, task: str = "CAUSAL_LM") -> Any:
        """A new ``LoraConfig`` for a language model, or for one that scores (``SEQ_CLS``); None without ``peft``."""
        if self.peft is None:
            return None
        from peft import LoraConfig

        return LoraConfig(task_type=task, **self.peft)

    def to_yaml(self) -> str:
        """The resolved recipe."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe (the embedded one when none is named) and apply dotted overrides, ``train.gamma: 0.9``.

    Raises:
        RecipeError: the file is missing or no mapping, a key is unknown or missing, or keys contradict each other.
    """
    path = EMBEDDED if path is None else Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe")
    try:
        tree = yaml.safe_load(_expand(path.read_text(encoding="utf-8"), path))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is {type(tree).__name__}")
    for key, value in (overrides or {}).items():
        _set(tree, key.split("."), value)
    if not isinstance(tree.get("peft"), dict | None):
        raise RecipeError(f"{path}: peft must be a mapping of LoraConfig's arguments, not {tree['peft']!r}")
    recipe = _build(Recipe, tree, str(path), "")
    check_recipe(recipe, str(path))
    return recipe


def _expand(text: str, path: Path) -> str:
    """Put environment variables in the place of ``${NAME}``."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise RecipeError(f"{path}: it reads the environment variable {match[1]}, which is not set")
        return found

    return re.sub(r"\$\{(\w+)\}", value, text)


def check_recipe(recipe: Recipe, where: str) -> None:
    """Everything that can be wrong in a recipe and seen without loading a model.

    Raises:
        RecipeError: with the key and the remedy.
    """
    from trl import RewardConfig, SFTConfig

    from rto.trainers.preference import PreferenceConfig
    from rto.trainers.rto import RTOConfig

    if recipe.sft is not None and recipe.data.demonstrations is None:
        raise RecipeError(f"{where}: sft needs data.demonstrations; give them, or set sft to null")
    if recipe.data.pairs is None and (recipe.gold is None or recipe.data.pair_prompts is None):
        raise RecipeError(
            f"{where}: without data.pairs, pairs are sampled and labelled: give gold and data.pair_prompts"
        )
    stages: list[tuple[str, Any, dict[str, Any] | None]] = [
        ("sft", SFTConfig, recipe.sft),
        ("prefer", PreferenceConfig, recipe.prefer),
        ("reward", RewardConfig, recipe.reward),
        ("train", RTOConfig, recipe.train),
        *((f"methods.{name}", RTOConfig, own) for name, own in recipe.methods.items()),
    ]
    ours = {"output_dir", "seed", "max_completion_length"}
    for key, config, kwargs in stages:
        known = {f.name for f in fields(config)} - ours
        for name in kwargs or {}:
            if name not in known:
                why = "is set by the recipe itself" if name in ours else "is not known"
                raise RecipeError(f"{where}: {key}.{name} {why}{_nearest(name, known)}")
    _check_peft(recipe, where)
    if recipe.reward is None:
        for name, own in recipe.methods.items():
            if {**recipe.train, **own}.get("score_coef", 1.0) != 0:
                raise RecipeError(
                    f"{where}: methods.{name} has a score_coef but reward is null: give reward: {{}}, or score_coef: 0"
                )
    for key in ("gold", "model"):
        value = getattr(recipe, key)
        if value is not None and is_function(value):
            try:
                resolve(value)
            except (ImportError, AttributeError) as error:
                raise RecipeError(f"{where}: {key}: {value} cannot be imported: {error}") from error


def _check_peft(recipe: Recipe, where: str) -> None:
    if recipe.peft is None:
        return
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RecipeError(f"{where}: peft needs the package peft: pip install peft") from error
    from rto.models.loading import check_adapter

    ours = {"task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"}
    known = {f.name for f in fields(LoraConfig)} - ours
    for name in recipe.peft:
        if name not in known:
            why = "is set by the stages themselves" if name in ours else "is not known"
            raise RecipeError(f"{where}: peft.{name} {why}{_nearest(name, known)}")
    try:
        check_adapter("peft", recipe.lora())
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: peft: {error}") from error


def is_function(path: str) -> bool:
    """``module:function``, not a path or a hub name."""
    module, _, name = path.partition(":")
    return bool(name) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def resolve(path: str) -> Callable[..., Any]:
    """Import ``module:function``; modules beside the present folder count."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    return getattr(importlib.import_module(module), name)


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree.get(key)
        if not isinstance(child, dict):
            child = tree[key] = {}
        tree = child
    tree[keys[-1]] = value


def _build(kind: Any, tree: Any, where: str, prefix: str) -> Any:
    """A (nested) dataclass from a mapping; unknown and missing keys are errors."""
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: {prefix.rstrip('.')} must be a mapping, not {tree!r}")
    known = {f.name: f for f in fields(kind)}
    for key in tree:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {prefix}{key}{_nearest(key, known)}")
    values = {}
    for key, value in tree.items():
        nested = {"data": Data}.get(key) if kind is Recipe else Rows if kind is Data else None
        is_nested = nested is not None and is_dataclass(nested) and value is not None
        values[key] = _build(nested, value, where, f"{prefix}{key}.") if is_nested else value
    try:
        return kind(**values)
    except TypeError as error:
        missing = str(error).partition("argument")[2].lstrip("s: ")
        raise RecipeError(f"{where}: {prefix or 'the recipe '}lacks {missing or error}") from error


def _nearest(name: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return (
        f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}" if len(known) < 30 else ""
    )
