"""Values of recipes, flags and --config files: typed, built before any work, refused with the nearest known one."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import RewardConfig, SFTConfig

import warm
from rto import PreferenceConfig, RTOConfig
from rto.cli import main
from rto.flags import overrides
from rto.recipe import EMBEDDED, RecipeError, load_recipe, stage_config
from rto.stage_parser import StageParser
from rto.trainers.base import check_training
from rto.values import read_yaml, typed, write_yaml

REFUSED = [
    ({"train.learning_rate": "abc"}, ["train.learning_rate must be a number, not 'abc'"]),
    ({"train.reward_placement": "sentnce"}, ["train.reward_placement", "'sentnce'", "did you mean sentence?"]),
    ({"prefer.loss": "dpoo"}, ["prefer.loss", "'dpoo'", "did you mean dpo?"]),
    ({"learners": {"A": {"loss": "simpoo"}}}, ["learners.A.loss", "did you mean simpo?"]),
    ({"train.advantage_estimator": "gea"}, ["train.advantage_estimator", "did you mean gae?"]),
    ({"methods": {"RTO": {"token_reward": "logratoi"}}}, ["methods.RTO.token_reward", "did you mean logratio?"]),
    ({"seed": "abc"}, ["seed must be a whole number, not 'abc'"]),
    ({"seed": True}, ["seed must be a whole number, not true"]),
    ({"seed": -1}, ["seed", "-1", "greater than or equal to 0"]),
    ({"completion_length": "many"}, ["completion_length must be a whole number, not 'many'"]),
    ({"label_temperature": 0}, ["label_temperature", "greater than 0"]),
    ({"data.prompts.rows": 12.5}, ["data.prompts.rows must be a whole number or null, not 12.5"]),
    ({"data.prompts.path": None}, ["data.prompts.path must be text, not null"]),
    ({"learners": ["DPO"]}, ["learners must be a mapping, not ['DPO']"]),
    ({"methods": None}, ["methods must be a mapping, not null"]),
    ({"methods": {"RTO": None}}, ["methods.RTO must be a mapping, not null"]),
    ({"methods": {"RTO": {"paid_by": "golden"}}}, ["methods.RTO.paid_by", "did you mean gold?"]),
    ({"train.whiten_rewards": "maybe"}, ["train.whiten_rewards must be true or false, not 'maybe'"]),
    ({"train.num_mini_batches": 2.5}, ["train.num_mini_batches must be a whole number, not 2.5"]),
    ({"train.num_mini_batches": 7}, ["train.", "=64 does not divide into num_mini_batches=7"]),
    ({"sft.lr_scheduler_type": "cosin"}, ["sft.lr_scheduler_type", "did you mean cosine"]),
    ({"sft.optim": "adamw"}, ["sft.optim", "did you mean adamw_torch"]),
    ({"sft.save_strategy": "step"}, ["sft.save_strategy", "did you mean steps?"]),
    ({"sft.report_to": "wandbb"}, ["sft.report_to", "did you mean wandb?"]),
    ({"sft.per_device_train_batch_size": 0}, ["sft.per_device_train_batch_size: ", "must be at least 1"]),
    ({"reward.learning_rate": -1.0}, ["reward.learning_rate", "not be negative, got -1.0"]),
    ({"prefer.lr_scheduler_kwargs": {"min_lrr": 1}}, ["prefer.lr_scheduler_kwargs", "min_lrr"]),
    ({"prefer.loss_kwargs": {"betta": 0.1}}, ["prefer.loss_kwargs", "betta", "did you mean beta?"]),
    ({"prefer.loss_kwargs": {"beta": "x"}}, ["loss_kwargs.beta must be a number, not 'x'"]),
    ({"prefer.eval_strategy": "steps"}, ["prefer.eval_strategy", "held-out"]),
    ({"train.reward_weights": 1.0}, ["train.reward_weights is set by the recipe itself"]),
    ({"train.resume_from_checkpoint": "x"}, ["train.resume_from_checkpoint is set by the recipe itself"]),
    ({"peft": {"r": "x"}}, ["peft.r must be a whole number, not 'x'"]),
    ({"peft": {"bias": "al"}}, ["peft.bias", "did you mean all?"]),
    ({"study.fractions": ["x"]}, ["study.fractions.0 must be a number, not 'x'"]),
    ({"study.tune": 5}, ["study.tune must be a mapping"]),
    ({"gold": "nomod:f"}, ["gold: nomod:f cannot be imported", "no module nomod"]),
    ({"logged": "rto.demo.embedded:gold_rewrd"}, ["logged: ", "did you mean gold_reward?"]),
    ({"gold": "rto.recipe:EMBEDDED"}, ["gold: ", "EMBEDDED in rto.recipe is not a function"]),
    ({"data.prompts.path": "nomod:f"}, ["data.prompts.path: nomod:f cannot be imported"]),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_recipe_values_are_refused(changes: dict, says: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(None, changes)
    for part in ("embedded.yaml: ", *says):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "given", "read"),
    [
        ("train.learning_rate", "5e-7", 5e-7),
        ("train.gamma", 1, 1.0),
        ("train.num_mini_batches", "8", 8),
        ("train.whiten_rewards", "no", False),
        ("train.token_reward_clip", None, None),
        ("sft.save_strategy", "no", "no"),
        ("sft.run_name", 2024, "2024"),
        ("data.prompts.rows", 1e3, 1000),
        ("logged", "rto.demo.embedded:gold_reward", ["rto.demo.embedded:gold_reward"]),
        ("study.scaled", "RTO", ["RTO"]),
    ],
)
def test_values_are_read_as_their_fields_want_them(key: str, given: Any, read: Any, tmp_path: Path) -> None:
    found: Any = load_recipe(None, {key: given})
    path = tmp_path / "recipe.yaml"
    path.write_text(found.to_yaml())
    assert load_recipe(path) == found
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == read
    assert type(found) is type(read)


def test_yaml_reads_numbers_as_version_1_2_does() -> None:
    text = "{a: 5e-7, b: 1E3, c: -.5e+2, d: 1.5e3, e: no, f: true, g: 2024-01-01, h: '5e-7', i: 7, j: 1e-7x}"
    read = read_yaml(text)
    numbers = {"a": 5e-7, "b": 1e3, "c": -50.0, "d": 1500.0}
    assert read == {**numbers, "e": "no", "f": True, "g": "2024-01-01", "h": "5e-7", "i": 7, "j": "1e-7x"}
    assert read_yaml(write_yaml(read)) == read
    for bad in ("a: 1\na: 2", "a: ["):
        with pytest.raises(ValueError, match="not valid YAML"):
            read_yaml(bad)


@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig, RTOConfig, PreferenceConfig])
def test_every_field_takes_its_own_default(kind: Any, tmp_path: Path) -> None:
    """What a configuration holds when nobody set anything must be of the types that its fields are read as."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
    given = {n: getattr(v, "value", v) for n, v in defaults.items() if v is not dataclasses.MISSING}
    assert len(given) > 100
    del given["output_dir"]
    assert typed(kind, given) == given
    assert typed(kind, {"learning_rate": "5e-7"}) == {"learning_rate": 5e-7}


def test_a_run_trains_with_what_was_checked(monkeypatch: Any, tmp_path: Path) -> None:
    """The pipeline's stages and the check of the recipe share one function, called once for each of both."""
    import rto.pipeline
    import rto.recipe

    built: list[tuple[str, str]] = []

    def watched(recipe: Any, stage: str, folder: Any) -> Any:
        built.append((stage, str(folder)))
        return stage_config(recipe, stage, folder)

    monkeypatch.setattr(rto.recipe, "stage_config", watched)
    recipe = load_recipe(None, {"train.learning_rate": "5e-7"})
    assert [stage for stage, _ in built] == ["sft", "reward", "DPO", "PPO", "RTO"]
    assert stage_config(recipe, "RTO", "x").learning_rate == 5e-7
    assert stage_config(recipe, "RTO", "x").reward_weights == [1.0, 0.0]
    assert rto.pipeline.stage_config is stage_config


# --- flags


def test_overrides() -> None:
    known = ["train", "seed", "output_dir"]
    args = ["--train.gamma=0.9", "--train.kl_coef", "-1e-3", "--seed", "1", "--seed=2", "--output_dir", "a=b"]
    found = {"train.gamma": 0.9, "train.kl_coef": -1e-3, "seed": 2, "output_dir": "a=b"}
    assert overrides(args, known) == found
    for args, says in (
        (["--train.gamma"], "expected --KEY VALUE"),
        (["--train.gamma", "--seed", "1"], "expected --KEY VALUE"),
        (["--train.gamma", "--x=1"], "expected --KEY VALUE"),
        (["--sede", "1"], "unknown flag --sede; did you mean --seed?"),
        (["--seed", "["], "--seed: not valid YAML"),
    ):
        with pytest.raises(ValueError, match=r"--") as error:
            overrides(args, known)
        assert says in str(error.value)


def read(kinds: list[Any], *args: str) -> list[Any]:
    return StageParser(kinds, "rto test").read(args)


def test_config_files_and_flags(tmp_path: Path) -> None:
    from rto.cli import RewardArguments
    from rto.inspection.reading import InspectArguments

    file = tmp_path / "c.yaml"
    file.write_text(
        "dpo_model: dpo\nreward_funcs: r\nreward_weights: 1.0\nlearning_rate: 5e-7\nuse_cpu: yes\n"
        "save_strategy: no\nresume_from_checkpoint: true\nlr_scheduler_kwargs: {a: 1e-7}\n"
    )
    annotated = {f.name: f.type for f in dataclasses.fields(RTOConfig)}
    others, config = read(
        [RewardArguments, RTOConfig], "--config", str(file), "--score_coef=-1e-3", "--output_dir", str(tmp_path)
    )
    assert (others.dpo_model, others.reward_funcs, config.reward_weights) == (["dpo"], ["r"], [1.0])
    assert (config.score_coef, config.use_cpu, config.save_strategy.value) == (-1e-3, True, "no")
    assert (config.resume_from_checkpoint, config.lr_scheduler_kwargs) == ("True", {"a": 1e-7})
    assert {f.name: f.type for f in dataclasses.fields(RTOConfig)} == annotated  # the library rewrites them
    _, config = read([RewardArguments, RTOConfig], "--config", str(file))
    assert config.learning_rate == 5e-7
    file.write_text("completion: text\ndpo_model: a\nprompt: x\n")
    (inspected,) = read([InspectArguments], f"--config={file}")
    assert (inspected.completion, inspected.dpo_model) == (["text"], ["a"])


@pytest.mark.parametrize("value", ["True", "true", "last", "yes"])
def test_resume_means_the_last_whole_checkpoint(value: str, tmp_path: Path) -> None:
    from rto.cli import DataArguments, _parse

    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)]
    *_, config, _ = _parse("train", [*flags, "--resume_from_checkpoint", value], DataArguments, RTOConfig)
    assert config.resume_from_checkpoint is True
    *_, config, _ = _parse("train", [*flags, "--resume_from_checkpoint", "False"], DataArguments, RTOConfig)
    assert config.resume_from_checkpoint is False


def test_trackers(tmp_path: Path) -> None:
    for name, says in (("wandb", "pip install wandb"), ("wandbb", "did you mean wandb")):
        args = RTOConfig(output_dir=str(tmp_path), report_to=name, use_cpu=True)
        if name == "wandb" and __import__("importlib.util").util.find_spec("wandb"):
            continue
        with pytest.raises(ValueError, match=says):
            check_training(args)


# --- every command, every kind of bad input


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with good input and bad."""
    import shutil

    folder = tmp_path_factory.mktemp("bad")
    row = {"prompt": "ab", "chosen": "good", "rejected": "bad", "completion": "x"}
    (folder / "d.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    (folder / "file").write_text("x")
    (folder / "own.py").write_text("limit = 3\n\n\ndef score(completions):\n    return [0.0] * len(completions)\n")
    (folder / "needs.py").write_text("import a_package_that_nobody_has\n")
    for name, text in (("unknown", "dpo_cof: 1\n"), ("list", "- a\n"), ("typed", "seed: many\n")):
        (folder / f"{name}.yaml").write_text(text)
    for name in ("m", "damaged", "weightless", "speechless", "truncated"):
        shutil.copytree(tiny_folder, folder / name)
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "weightless" / "model.safetensors").unlink()
    for path in (folder / "speechless").glob("tokenizer*"):
        path.unlink()
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


STAGES = {
    name: [name, "--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", "out", "--use_cpu", "true"]
    for name in ("sft", "prefer", "reward", "train")
}
for name in ("sft", "reward"):
    STAGES[name] += ["--bf16", "false"]
STAGES["train"] += ["--reward_funcs", "own:score", "--dpo_coef", "0"]
OTHERS = {
    "inspect": ["inspect", "--dpo_model", "m", "--ref_model", "m", "--dataset_name", "d.jsonl"],
    "export": ["export", "--model_name_or_path", "m", "--output_dir", "out"],
    "generate": ["evaluate", "generate", "--model", "m", "--benchmark", "d.jsonl", "--output", "out"],
    "judge": ["evaluate", "judge", "--answers", "d.jsonl", "--baseline", "d.jsonl"],
    "compare": ["evaluate", "compare", "d.jsonl"],
    "run": ["run", "--output_dir", "out"],
    "reproduce": ["reproduce", str(EMBEDDED), "--output_dir", "out"],
    "report": ["report", "nothere"],
    "theory": ["theory", "--output_dir", "out"],
}
BAD: list[tuple[list[str], str]] = [
    *(([*flags, "--model_name_or_path", "nothere"], "nothere is neither a folder") for flags in STAGES.values()),
    *(([*flags, "--model_name_or_path", "./no/t"], "--model_name_or_path ./no/t is ") for flags in STAGES.values()),
    *(([*flags, "--model_name_or_path", "file"], "file is a file") for flags in STAGES.values()),
    *(([*flags, "--model_name_or_path", "damaged"], "damaged cannot be read") for flags in STAGES.values()),
    *(([*flags, "--model_name_or_path", "weightless"], "weightless has no weights") for flags in STAGES.values()),
    *(([*flags, "--model_name_or_path", "truncated"], "truncated has damaged w") for flags in STAGES.values()),
    *(([*flags, "--model_name_or_path", "speechless"], "speechless has no tok") for flags in STAGES.values()),
    *(([*flags, "--dataset_name", "no.jsonl"], "no.jsonl: no such file") for flags in STAGES.values()),
    *(
        ([*flags, "--learnign_rate", "1"], "--learnign_rate; did you mean --learning_rate?")
        for flags in STAGES.values()
    ),
    *(([*flags, "--seed", "abc"], "--seed: invalid int value: 'abc'") for flags in STAGES.values()),
    *(([*flags, "--lr_scheduler_type", "cosin"], "did you mean cosine") for flags in STAGES.values()),
    *(([*flags, "--report_to", "wandbb"], "did you mean wandb?") for flags in STAGES.values()),
    *(([*flags, "--output_dir", "file"], "--output_dir file: no folder") for flags in STAGES.values()),
    *(([*flags, "--config", "no.yaml"], "no.yaml: no such file") for flags in STAGES.values()),
    *(([*flags, "--config", "list.yaml"], "list.yaml: ") for flags in STAGES.values()),
    *(([*flags, "--config", "typed.yaml"], "typed.yaml: seed must be a whole") for flags in STAGES.values()),
    *(([*flags, "--config", "unknown.yaml"], "unknown.yaml: unknown key dpo_cof") for flags in STAGES.values()),
    *(([*flags, "--resume_from_checkpoint", "gone"], "gone: no such checkpoint") for flags in STAGES.values()),
    *(([*flags, "--eval_strategy", "steps"], "--eval_dataset_name") for flags in STAGES.values()),
    *((flags[:1], " missing; --help tells") for flags in [*STAGES.values(), OTHERS["inspect"], OTHERS["export"]]),
    ([*STAGES["prefer"], "--ref_model", "nothere"], "--ref_model nothere is neither"),
    ([*STAGES["prefer"], "--loss", "dpoo"], "did you mean dpo?"),
    ([*STAGES["prefer"], "--loss_kwargs", "{beta"], "is not JSON"),
    ([*STAGES["train"], "--reward_funcs", "nomod:f"], "--reward_funcs nomod:f cannot be imported"),
    ([*STAGES["train"], "--reward_funcs", "own:scor"], "did you mean score?"),
    ([*STAGES["train"], "--reward_funcs", "own:limit"], "limit in own is not a function"),
    ([*STAGES["train"], "--reward_funcs", "nothere"], "--reward_funcs nothere is neither"),
    ([*STAGES["train"], "--dpo_coef", "1", "--dpo_model", "nomod:f"], "--dpo_model nomod:f cannot be"),
    ([*STAGES["train"], "--dpo_coef", "1", "--dpo_model", "nothere"], "--dpo_model nothere is neither"),
    ([*STAGES["train"], "--value_model", "nothere"], "--value_model nothere is neither"),
    ([*STAGES["train"], "--num_mini_batches", "7"], "does not divide into num_mini_batches=7"),
    *(([*flags, "--betta", "1"], "unknown flag --betta") for flags in (OTHERS["inspect"], OTHERS["run"])),
    *(([*OTHERS[n], "--otput", "x"], "unknown flag --otput") for n in ("export", "generate", "judge", "compare")),
    ([*OTHERS["inspect"], "--dpo_model", "nothere"], "--dpo_model nothere is neither"),
    ([*OTHERS["inspect"], "--dpo_model", "truncated", "--dataset_test_split", "train"], "truncated has damaged"),
    ([*OTHERS["inspect"], "--credit", "nomod:f"], "--credit nomod:f cannot be imported"),
    ([*OTHERS["inspect"], "--reward_model", "own:limit"], "limit in own is not a function"),
    ([*OTHERS["inspect"], "--rows", "x"], "--rows: invalid int"),
    ([*OTHERS["inspect"], "--output_dir", "file"], "--output_dir file: no folder"),
    ([*OTHERS["export"], "--model_name_or_path", "nothere"], "nothere is neither"),
    ([*OTHERS["export"], "--dtype", "flaot32"], "did you mean float32?"),
    ([*OTHERS["generate"], "--model", "nothere"], "--model nothere is neither"),
    ([*OTHERS["generate"], "--model", "weightless"], "weightless has no weights"),
    ([*OTHERS["generate"], "--benchmark", "no.jsonl"], "--benchmark no.jsonl: neither"),
    ([*OTHERS["generate"], "--dtype", "float23"], "did you mean float32?"),
    ([*OTHERS["generate"], "--seed", "x"], "--seed: invalid int"),
    ([*OTHERS["judge"], "--answers", "no.json"], "no.json: no such file"),
    ([*OTHERS["judge"], "--parameters", "{a"], "--parameters: '{a' is not JSON"),
    (["evaluate", "compare", "nothere"], "nothere: no such file or folder"),
    ([*OTHERS["compare"], "--length_control", "fitt"], "did you mean fit?"),
    (["evaluate", "jugde"], "did you mean judge?"),
    ([*OTHERS["run"], "--seed", "abc"], "seed must be a whole number"),
    ([*OTHERS["run"], "--train.gama=0.9"], "train.gama is not known; did you mean gamma?"),
    ([*OTHERS["run"], "--model", "nothere"], "model nothere is neither"),
    ([*OTHERS["run"], "--reward_model", "truncated"], "truncated has damaged"),
    ([*OTHERS["run"], "--data.prompts", "{path: no.jsonl}"], "data.prompts: no.jsonl: no such file"),
    ([*OTHERS["run"], "--gold", "own:limit"], "gold: own:limit cannot be imported"),
    (["run", "--output_dir", "file"], "--output_dir file: no folder"),
    (["run", "nothere.yaml"], "nothere.yaml: no such recipe"),
    ([*OTHERS["reproduce"], "--seeds", "x"], "--seeds: invalid int"),
    ([*OTHERS["reproduce"], "--jbos", "2"], "did you mean --jobs?"),
    ([*OTHERS["reproduce"], "--model", "nothere"], "model nothere is neither"),
    (["reproduce", "nothere"], "no task 'nothere'"),
    (OTHERS["report"], "nothere is not a run folder"),
    ([*OTHERS["theory"], "--only", "idenities"], "did you mean identities?"),
    (["runn"], "did you mean run?"),
]


@pytest.mark.parametrize(("args", "says"), BAD, ids=lambda x: " ".join(x[:2] + x[-2:]) if isinstance(x, list) else "")
def test_bad_input_is_one_line_before_any_model_is_loaded(
    args: list[str], says: str, here: Path, monkeypatch: Any, capsys: pytest.CaptureFixture
) -> None:
    from transformers import PreTrainedModel

    def loads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(here)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rto")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not captured.out


def test_a_process_says_one_line_and_ends_with_2(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    flags = [*STAGES["train"], "--learning_rat", "1"]
    done = warm.run("import sys; from rto.cli import main; sys.exit(main(sys.argv[1:]))", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "did you mean --learning_rate?" in done.stderr


# --- errors that are the user's own

FAILS = {
    "value": ("raise ValueError('my own mistake')", ValueError),
    "file": ("open('there_is_no_such_file')", FileNotFoundError),
    "package": ("import a_package_that_nobody_has", ModuleNotFoundError),
}


@pytest.mark.parametrize("kind", FAILS)
def test_an_error_in_a_users_function_keeps_its_traceback(kind: str, here: Path, monkeypatch: Any) -> None:
    body, expected = FAILS[kind]
    (here / f"fails_{kind}.py").write_text(f"def score(completions):\n    {body}\n")
    monkeypatch.chdir(here)
    flags = [*STAGES["train"], "--reward_funcs", f"fails_{kind}:score", "--per_device_train_batch_size", "4"]
    flags += ["--max_completion_length", "4", "--save_strategy", "no", "--disable_tqdm", "true"]
    with pytest.raises(expected) as error:
        main(flags)
    assert any(str(frame.path).endswith(f"fails_{kind}.py") for frame in error.traceback)
    assert error.value.__notes__ == ["raised in score"]


def test_an_error_in_a_users_module_keeps_its_traceback(here: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(here)
    for flags in ([*STAGES["train"], "--reward_funcs", "needs:f"], ["run", "--gold", "needs:f"]):
        with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has") as error:
            main(flags)
        assert any(str(frame.path).endswith("needs.py") for frame in error.traceback)


def test_errors_of_rows_gold_and_models_are_the_users_own(here: Path, monkeypatch: Any) -> None:
    from rto.errors import is_users, told
    from rto.pipeline import scores_by
    from rto.recipe import Rows
    from rto.rollout.rewards import Completed

    (here / "wrong.py").write_text("def any(*args, **kwargs):\n    raise OSError(2, 'No such file', 'mine')\n")
    monkeypatch.chdir(here)
    calls: list[Callable[[], Any]] = [
        lambda: Rows(path="wrong:any", rows=2).load(0),
        lambda: scores_by("wrong:any", Completed(prompts=["a"], completions=["b"], completion_ids=[[]], ended=[True])),
    ]
    for call in calls:
        with pytest.raises(OSError, match="No such file") as error:
            call()
        assert is_users(error.value)
        assert told(error.value) is None
    assert told(OSError(2, "No such file", "ours")) == "ours: No such file"
    assert told(KeyError("a bug")) is None


def test_env_of_a_config_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("RTO_TEST_ENV", raising=False)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"env": {"RTO_TEST_ENV": 5}, "use_cpu": True}))
    read([RTOConfig], "--config", str(tmp_path / "c.yaml"))
    assert os.environ.pop("RTO_TEST_ENV") == "5"
