"""The whole method on a few rows: every stage leaves what the next one and the report read."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from rto.data.formats import DataError
from rto.dry_run import dry_run, show
from rto.pipeline import Pipeline, run
from rto.recipe import folder_of, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in ROOT.glob("recipes/**/*.yaml") if p.parent.name != "prefer")
SMALL = {
    "data.demonstrations.rows": 32,
    "data.pair_prompts.rows": 32,
    "data.prompts.rows": 16,
    "data.test_prompts.rows": 8,
    "completion_length": 16,
    "train.per_device_train_batch_size": 8,
    "train.num_mini_batches": 2,
    "prefer.per_device_train_batch_size": 16,
    "reward.per_device_train_batch_size": 16,
    "reward.num_train_epochs": 1,
    "sft.per_device_train_batch_size": 16,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert run(load_recipe(None, SMALL), folder) == folder / "report.html"
    return folder


def test_every_stage_leaves_its_work(finished: Path) -> None:
    for stage in ("sft", "dpo", "ppo", "rto"):
        AutoModelForCausalLM.from_pretrained(finished / stage)
    for stage in ("sft", "pairs", "dpo", "reward", "ppo", "rto", "evaluation"):
        assert json.loads((finished / stage / "done.json").read_text())["seconds"] > 0
        assert not list((finished / stage).glob("checkpoint-*"))
    results = json.loads((finished / "evaluation" / "results.json").read_text())
    assert list(results["methods"]) == ["SFT", "DPO", "PPO", "RTO"]
    assert results["methods"]["SFT"]["kl"] == pytest.approx(0, abs=1e-4)
    assert results["methods"]["RTO"]["kl"] != 0


def test_pairs_carry_labels_only(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "pairs" / "pairs.jsonl").read_text().split("\n")[:-1]]
    assert len(rows) == 32
    assert all(row.keys() == {"prompt", "chosen", "rejected", "chosen_ended", "rejected_ended"} for row in rows)
    assert not all(row["chosen_ended"] for row in rows)  # 16 tokens do not suffice for a reply


def test_a_dry_run_tells_what_the_run_did(finished: Path, tmp_path: Path) -> None:
    """Rows and updates of every stage, without a weight trained or a file written."""
    recipe = load_recipe(None, SMALL)
    planned = {folder_of(x.stage): x for x in dry_run(recipe, tmp_path)}
    assert list(planned) == ["sft", "pairs", "dpo", "reward", "ppo", "rto", "evaluation"]
    for stage in ("sft", "dpo", "reward", "ppo", "rto"):
        about = json.loads((finished / stage / "rto_config.json").read_text())
        assert planned[stage].updates == about["steps"]
        assert planned[stage].rows == about["data"]["rows"]
        assert planned[stage].memory > 0
        assert planned[stage].seconds > 0
    assert not list(tmp_path.iterdir())
    assert all(x.done for x in dry_run(recipe, finished))


@pytest.mark.parametrize("key", ["pairs", "eval_pairs", "prompts", "test_prompts"])
def test_a_dry_run_names_the_key_of_rows_that_cannot_be_had(key: str, tmp_path: Path) -> None:
    row = {"prompt": "Where is it? ", "chosen": "Sorry.", "rejected": "No."}
    (tmp_path / "rows.jsonl").write_text(8 * (json.dumps(row) + "\n"))
    rows = {"path": str(tmp_path / "rows.jsonl"), "split": "train"}
    given = dict.fromkeys(("pairs", "eval_pairs", "prompts", "test_prompts"), rows)
    changes = {f"data.{name}": own | ({"rows": 9} if name == key else {}) for name, own in given.items()}
    with pytest.raises(DataError, match=rf"^data\.{key}: .*rows\.jsonl has 8 rows .*9 are asked for: lower rows"):
        dry_run(load_recipe(None, SMALL | changes), tmp_path / "run")


def test_a_dry_run_counts_what_is_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "Where is it? ", "chosen": "Sorry.", "rejected": "No."}] * 20
    rows += [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "long " * 400, "rejected": "y"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(None, SMALL | {"data.pairs.path": str(tmp_path / "pairs.jsonl")})
    planned = {x.stage: x for x in dry_run(recipe, tmp_path / "run")}
    for stage in ("DPO", "reward"):
        assert planned[stage].rows == 22
        assert sum(int(part.split()[0]) for part in planned[stage].left_out.split("; ")) == 2
        assert planned[stage].updates == 2  # 20 rows by 16
    console = Console(width=200, record=True, file=io.StringIO())
    show(list(planned.values()), console)
    text = console.export_text()
    assert all(stage in text for stage in planned)
    assert "Nothing was trained" in text


def test_second_run_does_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != "report.html"}
    run(load_recipe(None, SMALL), finished)
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_a_stage_that_died_is_done_again_and_no_other(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = (finished / "evaluation" / "results.json").read_text()
    (finished / "evaluation" / "done.json").unlink()
    (finished / "evaluation" / "results.json").unlink()
    trained = []
    original: Callable = Pipeline._stage

    def stage(self: Pipeline, name: str, title: str) -> object:
        if not (self.folder / name / "done.json").is_file():
            trained.append(name)
        return original(self, name, title)

    monkeypatch.setattr(Pipeline, "_stage", stage)
    run(load_recipe(None, SMALL), finished)
    assert trained == ["evaluation"]
    assert (finished / "evaluation" / "results.json").read_text() == results


@pytest.mark.slow
def test_same_recipe_same_results(finished: Path, tmp_path: Path) -> None:
    """One seed decides everything: a second folder holds the same numbers but for the clock."""
    run(load_recipe(None, SMALL), tmp_path)
    numbers = []
    for folder in (finished, tmp_path):
        methods = json.loads((folder / "evaluation" / "results.json").read_text())["methods"]
        numbers.append({name: {k: v for k, v in row.items() if k != "seconds"} for name, row in methods.items()})
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_adapters_on_one_base(tmp_path: Path) -> None:
    """With ``peft``, SFT leaves a whole model and every later stage an adapter on it that PEFT reads."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    run(load_recipe(None, SMALL | {"peft.r": 4, "peft.target_modules": "all-linear"}), tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert not (tmp_path / "sft" / "adapter_config.json").exists()
    for stage in ("dpo", "ppo", "rto"):
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / stage)
        assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "sft")
        assert not list((tmp_path / stage).glob("model*.safetensors"))
    for folder in (tmp_path / "reward", tmp_path / "rto" / "value_model"):
        scorer = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        assert scorer.base_model.model.score.modules_to_save["default"].weight.any()
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())["methods"]
    assert results["SFT"]["kl"] == pytest.approx(0, abs=1e-4)
    assert all(abs(results[name]["kl"]) > 1e-4 for name in ("DPO", "PPO", "RTO"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_recipes_are_valid(
    path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("RTO_DATA", str(data_dir))
    for name in ("RTO_START", "RTO_LM"):
        monkeypatch.setenv(name, str(tiny_folder))
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = load_recipe(path)
    (saved := tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert str(data_dir) not in saved.read_text()  # variables by their names
    assert load_recipe(saved) == recipe
