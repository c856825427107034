"""`rto plan`: what fits, what would make it fit, what is refused, and the table in the docs."""

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rto import cli
from rto.planning.command import GB, Plan, plan, verdict
from rto.planning.job import LORA, OFFLOAD, SHARD, TOKENS
from rto.planning.workload import workload
from rto.recipe import load_recipe
from tables import check_table

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "recipes" / "paper"
PAGE = ROOT / "docs" / "planning.md"


def planned(
    name: str = "llama3-8b", *, devices: int = 8, memory: float = 80, overrides: Any = None, **kwargs: Any
) -> Plan:
    recipe = load_recipe(PAPER / f"{name}.yaml", overrides)
    return plan(recipe, name=name, devices=devices, memory=memory * GB, **kwargs)


@cache
def papers(devices: int) -> Plan:
    return planned(devices=devices)


def test_the_papers_recipe_fits_sharded_on_eight_cards_and_as_adapters_on_one() -> None:
    eight = {v.name: v for v in papers(8).variants}
    assert eight["full, FSDP2"].fits
    assert not eight["full, DDP"].fits
    assert eight["full, DDP"].fewer is None
    (full, _, lora) = papers(1).variants
    assert lora.fits
    assert not full.fits


def test_the_table_of_the_paper() -> None:
    plans = {f"{hosts}{n} × 80 GB": papers(d) for hosts, n, d in (("", 1, 1), ("", 8, 8), ("2 × ", 8, 16))}
    names = [v.name.replace(", DDP", "") for v in papers(8).variants]
    rows = []
    for name in names:
        row = {"variant": name.replace("full", "full fine-tuning")}
        for where, found in plans.items():
            v = next(
                (v for v in found.variants if v.name.replace(", DDP", "").replace(", one device", "") == name), None
            )
            row[where] = "—" if v is None else f"{v.peak.memory.total / GB:.0f} GB in {v.peak.name}: {verdict(v)}"
        rows.append(row)
    check_table(PAGE, "the paper's recipe", rows)


def test_the_table_of_traffic() -> None:
    """What the paper's runs exchange, beside FSDP of the policy alone by layer, of as many passes and of two.

    The goal of 1.1 is met beside two passes, and without a critic beside as many; not with one beside as many.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    alone: dict[int, float] = {}
    trained: dict[tuple[str, int], float] = {}
    for passes, name in product((2, 1), ("llama3-8b", "rto-reinforce++")):
        for way in ("by layer", "`gather_once`"):
            settings = {
                "train.gather_once": way == "`gather_once`",
                "train.max_tokens_per_micro_batch": 32768 // passes,
            }
            work = workload(load_recipe(PAPER / f"{name}.yaml", settings), papers(8).shapes)
            phases = work.job.phases(papers(8).shown.place)
            own = {x.name: x.traffic / GB for x in phases if x.per == "iteration"}
            updates = {x: own[x] for x in own if x.startswith("update")}
            if way == "by layer":
                alone[passes], trained[name, passes] = updates["update of policy"], sum(updates.values())
            traffic = sum(own.values())
            ratios = [traffic / alone[passes], traffic / alone[2], traffic / trained[name, passes]]
            found[name, way, passes] = [traffic, *ratios]
    columns = ("GB an iteration", "÷ policy alone, as many passes", "÷ policy alone, two passes", "÷ what is trained")
    names = {"llama3-8b": "RTO", "rto-reinforce++": "RTO without a critic"}
    rows = [
        {"": f"{names[name]}, {way}", "passes an update": str(passes)}
        | {x: f"{y:,.0f}" if x == columns[0] else f"{y:.2f}" for x, y in zip(columns, numbers)}
        for (name, way, passes), numbers in found.items()
    ]
    check_table(ROOT / "docs" / "scaling.md", "the paper's traffic", rows)
    own = papers(8)
    assert own.shown.name == "full, FSDP2"
    assert own.shown.fits
    traffic, same, two, _ = found["llama3-8b", "`gather_once`", 1]
    assert sum(x.traffic for x in own.phases if x.per == "iteration") == traffic * GB
    assert two < 1.1 < same
    assert found["rto-reinforce++", "`gather_once`", 1][1] < 1.1


def test_the_table_of_measurements() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())
    rows = []
    for x in report["update"]:
        kind = ("LoRA" if x["lora"] else "full") + (", bf16" if x["bf16"] else ", fp32")
        kind += ", checkpointing" if x["checkpointing"] else ""
        rows.append(_row(x, x["model"], kind, f"update of {x['passes']} pass" + ("es" if x["passes"] > 1 else "")))
    for x in (*report["trainer"], *report.get("processes", [])):
        kind = {"separate": "five full models", "shared": "five roles on one base"}[x["side"]] + ", fp32"
        rows.append(_row(x, x["model"], kind + (", 2 processes" if x["processes"] > 1 else ""), x["phase"]))
    check_table(PAGE, "measurements", rows)
    for x in (*report["update"], *report["trainer"], *report.get("processes", [])):
        assert x["predicted"] == pytest.approx(x["measured"], rel=0.15)
        assert x["predicted_operations"] == pytest.approx(x["operations"], rel=0.05)


def _row(x: dict[str, Any], model: str, kind: str, phase: str) -> dict[str, str]:
    resident = x["resident"]
    return {
        "model": model,
        "what": kind,
        "phase": phase,
        "predicted, MB": f"{x['predicted'] / 1e6:.0f}",
        "live tensors, MB": f"{x['measured'] / 1e6:.0f}",
        "predicted / live": f"{x['predicted'] / x['measured']:.3f}",
        "resident, MB": f"{resident / 1e6:.0f}" if resident else "—",
        "operations, predicted / counted": f"{x['predicted_operations'] / x['operations']:.4f}",
    }


def test_off_loading_is_planned_where_the_recipe_off_loads() -> None:
    """The recipe's own way is then the variant that does, for whole models and for adapters."""
    for more in ({}, {"peft.r": 8}):
        at_hand, away = (
            planned(devices=1, memory=1e6, overrides={**more, "train.offload_frozen": offloads})
            for offloads in (False, True)
        )
        assert (at_hand.shown.place.offload, away.shown.place.offload) == (False, True)
        assert "off-loading" in away.shown.name
    whole = [planned(devices=1, memory=1e6, overrides={"train.offload_frozen": x}) for x in (False, True)]
    update = [next(p for p in found.phases if p.name == "update of policy").memory.total for found in whole]
    assert update[1] < update[0]


def test_changes_come_in_the_order_of_preference() -> None:
    found = papers(8).changes
    assert [x.names for x in found] == [(LORA,), (SHARD,), (OFFLOAD,), (TOKENS,)]
    assert [x.fits for x in found] == [True, True, False, False]
    assert not planned("llama3-8b", overrides={"peft": {"r": 8, "target_modules": "all-linear"}}).changes


def test_two_changes_where_one_is_not_enough() -> None:
    *single, both = planned(memory=34).changes
    assert not any(x.fits for x in single)
    assert both.fits
    assert len(both.names) > 1
    assert both.peak.memory.total <= 34 * GB


def test_fewer_tokens_are_the_same_work_in_more_passes() -> None:
    found = papers(8)
    place = found.variants[2].place
    whole, cut = found.workload.job.phases(place), found.workload.job.smaller(4).phases(place)
    for x, y in zip(whole, cut, strict=True):
        assert y.memory.total < x.memory.total
        assert y.work.operations == pytest.approx(x.work.operations, rel=1e-6)
        assert y.traffic >= x.traffic


def test_ppo_has_no_dpo_model_and_reinforce_no_critic() -> None:
    def roles(name: str, **kwargs: Any) -> list[str]:
        return [role.name for role in planned(name, **kwargs).workload.job.parts[-1].roles]

    assert roles("rto") == ["policy", "critic", "reference", "dpo", "reward"]
    assert roles("llama3-8b", method="PPO") == ["policy", "critic", "reference", "reward"]
    assert roles("rto-reinforce++") == ["policy", "reference", "dpo", "reward"]
    assert roles("rto-pessimistic").count("dpo") == 3


@pytest.mark.parametrize("asked", ["gold", "judge"])
def test_rounds_are_planned_by_their_first(asked: str) -> None:
    """What a round holds and does is planned; that there are more is told."""
    judge = {"labels.by": "judge", "labels.judge.model": "m", "labels.judge.base_url": "http://127.0.0.1:1/v1"}
    more = judge if asked == "judge" else {}
    one, two = (
        plan(load_recipe(None, settings), name="demo", devices=2, memory=GB, configs={"policy": "pythia-1b"})
        for settings in ({}, {"rounds": 2, **more})
    )
    assert two.phases == one.phases
    (told,) = (note for note in two.workload.notes if note not in one.workload.notes)
    assert told.startswith("2 rounds: ")


def test_configurations_by_role(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 100,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            }
        )
    )
    found = planned(configs={"policy": str(file), "reward": "pythia-1b"}).shapes
    assert (found["critic"].hidden, found["dpo"].layers) == (16, 2)
    assert found["reward"].scalar_model == 908_759_040 + 2048


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--memory", "-80"], "memory above 0"),
        (["--devices", "0"], "at least one device"),
        (["--config", "judge=llama-3-8b"], "no such role; a run has policy"),
        (["--config", "policy"], "expected ROLE=FILE_OR_SHAPE"),
        (["--config", "policy=nowhere/nothing"], "--config policy=FILE_OR_SHAPE"),
        (["--method", "GRPO"], "the recipe has PPO, RTO"),
        (["--variant", "9"], "choose from 1 to"),
        (["--utilisation", "0"], "--utilisation must be positive"),
        (["--network", "nan"], "--network must be positive"),
        (["--model", "rto.demo.embedded:build"], "give --config policy="),
        (["--train.optim", "galore_adamw"], "does not know how much state"),
    ],
)
def test_bad_input_is_one_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(PAPER / "llama3-8b.yaml"), *args]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_models_that_a_plan_does_not_know_are_refused() -> None:
    from transformers import AutoConfig

    from rto.planning.configs import shape_of

    for family in ("mixtral", "mamba", "gpt2"):
        with pytest.raises(ValueError, match=f"a plan for model type {family} is not known"):
            shape_of(AutoConfig.for_model(family, num_hidden_layers=2), family)


def test_the_command_prints_tables_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    recipe = str(PAPER / "rto.yaml")
    assert cli.main(["plan", recipe, "--devices", "8"]) == 0
    out = capsys.readouterr().out
    assert "full, FSDP2" in out
    assert "Assumed, not measured" in out
    assert cli.main(["plan", recipe, "--devices", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {x["name"] for x in found["phases"]} >= {"DPO", "reward", "sample", "score"}
    assert all(x["memory"]["total"] <= 80 * GB for x in found["phases"])
