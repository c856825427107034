"""A table of what people get wrong: each is refused before work, by a message that names it and the remedy."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, RTOTrainer
from rto.cli import main
from rto.pipeline import Pipeline
from rto.recipe import EMBEDDED, RecipeError, load_recipe

WORDS = [{"prompt": word} for word in ["abba", "cab", "back", "abacus", "crab", "dab", "fable", "garb"]]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """The embedded recipe with changes, as a file."""

    def write(**changes: Any) -> Path:
        tree = yaml.safe_load(EMBEDDED.read_text())
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                tree[section][name] = value
            else:
                tree[section] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


RECIPES = [
    ({"gamma": 1.0}, ["recipe.yaml", "unknown key gamma"]),
    ({"completion_lenght": 80}, ["completion_lenght", "did you mean completion_length"]),
    ({"train__learning_rat": 1e-4}, ["train.learning_rat", "did you mean learning_rate"]),
    ({"methods": {"RTO": {"dpo_coeff": 0.1}}}, ["methods.RTO.dpo_coeff", "did you mean dpo_coef"]),
    ({"sft__seed": 3}, ["sft.seed", "set by the recipe itself"]),
    ({"data__prompts": {"path": "x", "row": 3}}, ["data.prompts.row", "did you mean rows"]),
    ({"data__prompts": {"rows": 3}}, ["data.prompts", "path"]),
    ({"data__prompts": "prompts.jsonl"}, ["data.prompts", "must be a mapping"]),
    ({"gold": None}, ["without data.pairs", "gold"]),
    ({"gold": "rto.demo.embedded:golden"}, ["gold", "golden", "cannot be imported"]),
    ({"peft": {"rank": 4}}, ["peft.rank is not known"]),
    ({"peft": {"task_type": "SEQ_CLS"}}, ["peft.task_type is set by the stages themselves"]),
    ({"peft": {"bias": "all"}}, ["peft: ", "leave the base as it is"]),
    ({"peft": True}, ["peft must be a mapping"]),
    ({"reward": None}, ["methods.PPO", "score_coef: 0"]),
    (
        {"gold": None, "reward": None, "data__pairs": {"path": "x"}, "methods": {"RTO": {"score_coef": 0.0}}},
        ["judge the evaluation", "reward: {}"],
    ),
    ({"model": "${RTO_NO_SUCH_VARIABLE}/m"}, ["RTO_NO_SUCH_VARIABLE", "not set"]),
]


@pytest.mark.parametrize(("changes", "says"), RECIPES, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_recipe_is_refused(changes: dict, says: list[str], recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(**changes))
    for part in says:
        assert part in str(error.value)


def test_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothere\.yaml: no such recipe"):
        load_recipe(tmp_path / "nothere.yaml")
    for text, says in (("a: [", "not valid YAML"), ("- a", "a recipe is a mapping")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match=says):
            load_recipe(tmp_path / "r.yaml")


def test_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    from rich.console import Console

    Pipeline(load_recipe(None), tmp_path, Console()).claim()
    Pipeline(load_recipe(None), tmp_path, Console()).claim()
    with pytest.raises(RecipeError, match=r"another recipe \(train\.learning_rate is 0\.0002 there and 0\.1 here\)"):
        Pipeline(load_recipe(None, {"train.learning_rate": 0.1}), tmp_path, Console()).claim()


def test_a_folder_of_an_earlier_version_is_this_recipes_own(tmp_path: Path) -> None:
    """Its recipe does not know the keys that have come since; what they are by default is what it ran with."""
    from rich.console import Console

    Pipeline(load_recipe(None), tmp_path, Console()).claim()
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    for key in ("rounds", "labels", "label_temperature", "evaluate_temperature"):
        del saved[key]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(saved))
    Pipeline(load_recipe(None), tmp_path, Console()).claim()
    with pytest.raises(RecipeError, match=r"another recipe \(label_temperature is"):
        Pipeline(load_recipe(None, {"label_temperature": 0.5}), tmp_path, Console()).claim()


def test_a_run_has_its_folder_alone(tmp_path: Path) -> None:
    import fcntl

    from rto.data.errors import DataError
    from rto.pipeline import run

    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is in use by another process"):
            run(load_recipe(None), tmp_path)


def test_command_line_says_it_in_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "nothere.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "rto run: nothere.yaml: no such recipe\n"
    assert main(["run", "--seed"]) == 2
    assert "expected --KEY VALUE" in capsys.readouterr().err
    assert main(["runn"]) == 2
    assert "no such command: runn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"dpo_coef": 0.1}, "pass dpo_model, or set dpo_coef=0"),
        ({"dpo_coef": 0.0, "reward_funcs": None}, "pass reward_funcs, or set score_coef=0"),
        ({"dpo_coef": 0.0, "reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries for 1"),
        ({"dpo_coef": 0.0, "per_device_train_batch_size": 16}, "8 prompts do not fill one batch of 16"),
        ({"dpo_coef": 0.0, "max_completion_length": 128}, "leaves no room for a prompt"),
        ({"dpo_coef": 0.0, "max_prompt_length": 1}, "8 with a prompt over 1 tokens (first: row 0)"),
        ({"dpo_coef": 0.0, "train_dataset": Dataset.from_list([{"text": "a"}])}, "no column 'prompt'; it has 'text'"),
    ],
)
def test_rto_refuses(kwargs: dict, says: str, tiny_folder: Path, tmp_path: Path) -> None:
    inputs = {"reward_funcs": lambda completions: [0.0] * len(completions), "train_dataset": Dataset.from_list(WORDS)}
    inputs |= {name: kwargs.pop(name) for name in list(kwargs) if name in inputs}
    settings = {"per_device_train_batch_size": 8, "max_completion_length": 4, "report_to": "none", "use_cpu": True}
    args = RTOConfig(output_dir=str(tmp_path), **settings | kwargs)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is checked below)
        RTOTrainer(str(tiny_folder), args, **inputs)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"reward_placement": "word"}, "choose from token, sentence, final"),
        ({"advantage_estimator": "vine"}, r"choose from gae, reinforce\+\+"),
        ({"gradient_accumulation_steps": 2}, "set max_tokens_per_micro_batch"),
        ({"temperature": 0.0}, "explores nothing"),
        ({"per_device_train_batch_size": 10, "num_mini_batches": 4}, "does not divide"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
    ],
)
def test_rto_config_refuses(kwargs: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        RTOConfig(output_dir=str(tmp_path), use_cpu=True, **kwargs)


def test_preference_config_refuses(tmp_path: Path) -> None:
    for config in (PreferenceConfig, RTOConfig):
        with pytest.raises(ValueError, match=r"neftune_noise_alpha is for fine-tuning \(rto sft\)"):
            config(output_dir=str(tmp_path), neftune_noise_alpha=0.0, use_cpu=True)
    with pytest.raises(ValueError, match="choose from dpo"):
        PreferenceConfig(output_dir=str(tmp_path), loss="dpoo", use_cpu=True)
    with pytest.raises(ValueError, match="its fields are beta, label_smoothing"):
        PreferenceConfig(output_dir=str(tmp_path), loss_kwargs={"betta": 1}, use_cpu=True)


def test_dpo_model_with_another_vocabulary(
    tiny_folder: Path, tiny_model: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "other")
    args = RTOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"dpo_model .*other has a vocabulary of 300 tokens, the policy one of"):
        RTOTrainer(
            str(tiny_folder),
            args,
            dpo_model=str(tmp_path / "other"),
            reward_funcs=lambda completions: [0.0],
            train_dataset=Dataset.from_list(WORDS),
        )


@pytest.mark.parametrize("kind", ["pad", "eos", "bos"])
def test_a_special_token_that_the_model_does_not_have(
    kind: str, tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """In every stage and in sampling, before an embedding is asked for what it does not hold."""
    from rto.models.loading import load_policy
    from rto.rollout.samplers.base import SamplingConfig
    from rto.rollout.samplers.transformers import TransformersSampler
    from rto.trainers.supervised import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({f"{kind}_token": "<added>"})
    settings: Any = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    stages: Any = [
        (SFTTrainer, SFTConfig, {"prompt": "ab", "completion": "c"}),
        (RewardTrainer, RewardConfig, {"prompt": "ab", "chosen": "c", "rejected": "d"}),
        (PreferenceTrainer, PreferenceConfig, {"prompt": "ab", "chosen": "c", "rejected": "d"}),
        (partial(RTOTrainer, reward_funcs=lambda completions: [0.0]), partial(RTOConfig, dpo_coef=0), {"prompt": "a"}),
    ]
    for trainer, config, row in stages:
        with pytest.raises(ValueError, match=f"the {kind}_token '<added>' of the tokenizer of .* has the id"):
            trainer(
                str(tiny_folder), config(**settings), train_dataset=Dataset.from_list([row]), processing_class=other
            )
    with pytest.raises(ValueError, match=f"the {kind}_token"):
        TransformersSampler.of(load_policy(str(tiny_folder)), other, SamplingConfig())


@pytest.mark.parametrize(
    ("returned", "says"),
    [(lambda n: [0.0] * (n - 1), "returned 7 scores for 8"), (lambda n: [float("nan")] * n, "returned nan")],
)
def test_reward_function_that_misbehaves(returned: Callable, says: str, tiny_folder: Path, tmp_path: Path) -> None:
    def bad(completions: list[str]) -> list[float]:
        return returned(len(completions))

    settings = {"per_device_train_batch_size": 8, "max_completion_length": 4, "dpo_coef": 0.0, "report_to": "none"}
    run = RTOTrainer(
        str(tiny_folder),
        RTOConfig(output_dir=str(tmp_path), disable_tqdm=True, use_cpu=True, **settings),
        reward_funcs=bad,
        train_dataset=Dataset.from_list(WORDS),
    )
    with pytest.raises(ValueError, match=f"bad {says}"):
        run.train()


def test_unusable_pairs_are_counted(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "ab", "chosen": "good", "rejected": "bad"},
        {"prompt": "ab", "chosen": "", "rejected": "bad"},
        {"prompt": "ab", "chosen": "same", "rejected": "same"},
        {"prompt": "ab" * 100, "chosen": "good", "rejected": "bad"},
    ]
    args = PreferenceConfig(output_dir=str(tmp_path), max_length=64, report_to="none", use_cpu=True)
    run = PreferenceTrainer(str(tiny_folder), args, train_dataset=Dataset.from_list(rows))
    assert len(run.train_dataset) == 1
    assert sum(run.skipped["train"].counts.values()) == 3
    for part in ("1 with an empty side (first: row 1)", "1 with two equal sides (first: row 2)", "over 64 tokens"):
        assert part in caplog.text


def test_pickled_weights_are_refused(tiny_model: Callable, tokenizer: Any, tmp_path: Path) -> None:
    import torch

    from rto.models.loading import load_policy

    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("named", ["LlamaForCausalLM", -1, [-1], [None], {"a": 1}])
def test_architectures_that_are_no_names(named: Any, tiny_folder: Path, tmp_path: Path) -> None:
    from rto.models.loading import load_policy, load_scalar

    tree = json.loads((tiny_folder / "config.json").read_text())
    for load, labels in ((load_policy, {}), (load_scalar, {"id2label": {0: "a", 1: "b", 2: "c"}})):
        (tmp_path / "config.json").write_text(json.dumps({**tree, **labels, "architectures": named}))
        with pytest.raises(ValueError, match=f"{tmp_path}: architectures in config.json is .*expected a list"):
            load(str(tmp_path))


def test_saved_recipe_is_the_resolved_one(tmp_path: Path) -> None:
    from rich.console import Console

    recipe = load_recipe(None, {"train.gamma": 0.5})
    Pipeline(recipe, tmp_path, Console()).claim()
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert saved["train"]["gamma"] == 0.5
    assert saved["evaluate_temperature"] == 1.0
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


LISTS = ["study.tune.factors", "study.fractions"]
NUMBERS = [
    "label_temperature",
    "evaluate_temperature",
    "study.tune.max_kl",
    "completion_length",
    "study.seeds",
    "seed",
]
NUMBERS += ["data.prompts.rows", "peft.r", "peft.lora_alpha", "peft.lora_dropout", *LISTS]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_of_a_recipe_is_refused_by_its_range(key: str, value: float) -> None:
    """Of the recipe itself and of its adapters; those of the stages are their configurations'."""
    changes: dict[str, Any] = {
        key: [value] if key.endswith("s") and key[-5:] != "seeds" and "rows" not in key else value
    }
    changes["data.validation_prompts"] = {"path": "rto.demo.embedded:prompts", "rows": 4}
    with pytest.raises(RecipeError, match=key.split(".")[-1]):
        load_recipe(None, changes)
