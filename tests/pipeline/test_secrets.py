"""``${NAME}`` in a recipe: its value is used, and stands in no file of the run."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rto.errors import told
from rto.files import digest
from rto.pipeline import Pipeline
from rto.pipeline import run as run_recipe
from rto.recipe import RecipeError, load_recipe, stage_config

SECRET = "hf_5ecretVa1ue: #{}[]"  # text that is no YAML
STEP = {"per_device_train_batch_size": 4, "report_to": "tensorboard", "hub_token": "${RTO_SECRET}"}
STEP["model_init_kwargs"] = {"token": "${RTO_SECRET}"}


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = {
        "demos": {"prompt": "ab", "completion": "cab"},
        "pairs": {"prompt": "ab", "chosen": "cab", "rejected": "zq"},
        "prompts": {"prompt": "ab"},
    }
    folder = tmp_path / "hidden-place"
    folder.mkdir()
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    monkeypatch.setenv("RTO_SECRET", SECRET)
    monkeypatch.setenv("RTO_PLACE", str(folder))
    monkeypatch.setenv("RTO_BATCH", "8")
    path = tmp_path / "recipe.yaml"
    tree = {
        "model": str(tiny_folder),
        "data": {
            "demonstrations": {"path": "${RTO_PLACE}/demos.jsonl"},
            "pairs": {"path": "${RTO_PLACE}/pairs.jsonl"},
            "prompts": {"path": "${RTO_PLACE}/prompts.jsonl"},
            "test_prompts": {"path": "${RTO_PLACE}/prompts.jsonl"},
        },
        "completion_length": 4,
        **dict.fromkeys(("sft", "prefer", "reward", "train"), STEP),
        "learners": {"DPO": {"hub_token": "${RTO_SECRET}"}},
        "methods": {"RTO": {"hub_token": "${RTO_SECRET}", "per_device_train_batch_size": "BATCH"}},
    }
    path.write_text(yaml.safe_dump(tree).replace("BATCH", "${RTO_BATCH}"))
    return path


def strings(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [text for item in tree.items() for x in item for text in strings(x)]
    return [text for x in tree for text in strings(x)] if isinstance(tree, list | tuple) else [str(tree)]


@pytest.mark.slow
def test_what_a_reference_stands_for_is_used_and_never_written(recipe: Path, tmp_path: Path) -> None:
    read = load_recipe(recipe)
    for stage in ("sft", "DPO", "reward", "RTO"):
        config = stage_config(read, stage, tmp_path)
        assert config.hub_token == SECRET
        assert SECRET not in "".join(strings(config.to_dict())), "what loggers are told"
        assert SECRET not in repr(config)
        assert SECRET not in str(config)
    assert SECRET not in repr(read), "what a traceback shows"
    assert "${RTO_SECRET}" in repr(read)
    assert stage_config(read, "RTO", tmp_path).per_device_train_batch_size == 8
    out = tmp_path / "out"
    run_recipe(read, out)
    values = [SECRET.encode(), b"5ecretVa1ue", b"hidden-place"]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "done.json", "report.html", "results.json", "training_args.bin"} <= {p.name for p in files}
    assert any("tfevents" in path.name for path in files)
    for path in files:
        held = path.read_bytes()
        assert not any(value in held for value in values), path
    assert "${RTO_SECRET}" in (out / "recipe.yaml").read_text()


def test_a_run_goes_on_with_another_credential_and_with_no_other_value(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def claim() -> None:
        Pipeline(load_recipe(recipe), out, Console()).claim()

    claim()
    before = {path: digest(path) for path in out.iterdir()}
    claim()
    monkeypatch.setenv("RTO_SECRET", "another")
    claim()
    assert before == {path: digest(path) for path in out.iterdir()}
    monkeypatch.setenv("RTO_BATCH", "4")
    with pytest.raises(RecipeError, match="the environment variable RTO_BATCH"):
        claim()
    monkeypatch.setenv("RTO_BATCH", "8")
    monkeypatch.setenv("RTO_SECRET", SECRET)
    earlier = load_recipe(recipe).tree(resolved=True)  # an earlier version wrote the values
    (out / "recipe.yaml").write_text(yaml.safe_dump(earlier))
    claim()


@pytest.mark.parametrize(
    ("text", "value", "read"),
    [
        ("label_temperature: ${X}", "2", 2.0),
        ("label_temperature: ${X}", "5e-1", 0.5),
        ('gold: "${X}"', "12", "12"),
        ("gold: '${X}'", "true", "true"),
        ("gold: a/${X}/b", "1: [", "a/1: [/b"),
        ("gold: ${X}", "- one\n- two", "- one\n- two"),
        ("reward_model: ${X}", "null", None),
        ("logged: [a, ${X}, b]", "c", ["a", "c", "b"]),
        ("peft: {r: ${X}}", "4", {"r": 4}),
    ],
)
def test_values_of_references_are_values_not_yaml(
    text: str, value: str, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rto.references import put_back, read_unresolved, resolve

    monkeypatch.setenv("X", value)
    tree, references = resolve(read_unresolved(text))
    (found,) = tree.values()
    assert found == read
    (again,) = put_back(tree, references).values()
    assert "${X}" in strings(again)[-1] or "${X}" in strings(again)


def test_a_message_about_a_credential_names_the_variable(recipe: Path, tmp_path: Path) -> None:
    load_recipe(recipe)
    assert told(ValueError(f"401: {SECRET} is no token")) == "401: ${RTO_SECRET} is no token"
    with pytest.raises(RecipeError, match="references is not known"):
        load_recipe(recipe, {"references.x": 1})
    assert pickle.loads(pickle.dumps(load_recipe(recipe))).references, "workers know them, too"
