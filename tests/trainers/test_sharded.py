"""Models cut over processes by FSDP2 train as one whole model does: two processes × half a batch, and one process.

One launch runs many cases, since starting processes costs more than most do; those that are not slow begin as forks
(`warm.py`). See `sharded.py` for how a CPU is made
to shard, without which these tests would test DDP.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sharded_cases
import torch
from filelock import FileLock
from test_checkpoints import free_port
from test_shared_base import write_adapter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import warm

PROGRAM = Path(__file__).with_name("sharded.py")
sys.path.append(str(PROGRAM.parents[1] / "pipeline"))
SHARDED = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
SAVING = {"num_mini_batches": 2, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 3}
SAVING |= {"normalize_scores": True, "kl_target": 0.5}
ADAM = {"optim": "adamw_torch_fused"}
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""What `accelerate launch` sets for ``recipes/accelerate/fsdp2.yaml``; of a host, one process reads weights."""

EQUAL: dict[str, dict[str, Any]] = {
    "dpo": {"run": "prefer", "loss": "dpo"},
    "kto": {"run": "prefer", "loss": "kto", "rows": 7},  # an epoch's last batch of three, in two and one
    "tdpo": {"run": "prefer", "loss": "tdpo", "rows": 5},  # or of one, and the other process has none
    "ppo": {"run": "rto", "dpo_coef": 0.0},
    "rto": {"run": "rto"},
    "rto on one base": {"run": "rto", "lora": 4},
}
"""What is compared with one process, by settings that both have."""
SLOWER: dict[str, dict[str, Any]] = {
    "dpo under an adapter": {"run": "prefer", "loss": "dpo", "lora": 4, "start": "narrow"},  # in fp32, all the same
    "tdpo under an adapter": {"run": "prefer", "loss": "tdpo", "lora": 4},
    "dpo of odd rows, accumulated, of experts": {
        "run": "prefer", "loss": "dpo", "rows": 11, "gradient_accumulation_steps": 2, "start": "experts",
    },
    "dpo with a reference": {"run": "prefer", "loss": "dpo", "ref_model": "dpo"},
    "dpo, accumulated, clipped": {
        "run": "prefer", "loss": "dpo", "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "optim": "adamw_torch",
        "learning_rate": 1e-3, "batch": 2,
    },
    "rto, gathered once": {"run": "rto", "gather_once": True},
    "rto on one base, gathered by layer": {"run": "rto", "lora": 4, "gather_once": False},
    "rto, watched": {"run": "rto", "watched": True, "eval_strategy": "steps", "eval_steps": 1},
    "rto, recomputed": {"run": "rto", "gradient_checkpointing": True},
    "rto on one base of rank 1": {"run": "rto", "lora": 1},  # half of each adapter's pieces are empty
    "rto on one base, recomputed": {"run": "rto", "lora": 4, "gradient_checkpointing": True},
    "rto of unlike references": {"run": "rto", "num_ppo_epochs": 2, "token_reward_clip": None},
}  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def launch(cases: list[dict[str, Any]], where: Path, processes: int = 2, program: Path = PROGRAM) -> str:
    """Run cases one after the other in one group of processes; what they said on stderr."""
    path = where / "cases.json"
    path.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(free_port()), str(program), str(path)]
    code, said = wait(
        subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    )
    assert code == 0, said[-4000:]
    return said


def wait(started: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a launcher; one that takes too long is ended with all that it has started."""
    try:
        _, said = started.communicate(timeout=1200)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    return started.returncode, said or ""


@pytest.fixture(scope="session")
def models(tiny_folder: Path, dpo_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by kind: whole models, adapters on one base, weights in bf16, experts."""
    root = tmp_path_factory.mktemp("models")
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    with torch.no_grad():
        scorer.score.weight.copy_(torch.linspace(-1, 1, scorer.score.in_features)[None])
    scorer.save_pretrained(root / "reward")
    tokenizer.save_pretrained(root / "reward")
    adapters = [write_adapter(tiny_folder, root / f"adapter{i}", i, tokenizer, scalar=i == 2) for i in (1, 2)]
    whole = [str(tiny_folder), str(dpo_folder), str(root / "reward")]
    narrow = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    for kind, model in {"narrow": narrow, "experts": sharded_cases.experts(narrow.config)}.items():
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    starts = {kind: str(root / kind) for kind in ("narrow", "experts")}
    return {"whole": whole, "adapters": [str(tiny_folder), *map(str, adapters)], **starts}


def case(models: Any, name: str, settings: dict[str, Any], where: Path, *, processes: int) -> dict[str, Any]:
    """A case's keyword arguments, by how many processes share its batch."""
    kwargs = {**settings, "output": str(where / re.sub(r"\W+", "-", name))}
    run = kwargs.pop("run")
    if run == "prefer":
        start = models[kwargs.pop("start")] if "start" in kwargs else models["whole"][0]
        kwargs |= {"policy": start, "batch": kwargs.get("batch", 4) // processes}
        kwargs |= {"ref_model": models["whole"][1]} if "ref_model" in kwargs else {}
    elif run == "rto":
        kwargs |= {"models": models["adapters" if kwargs.get("lora") else "whole"], "batch": 8 // processes}
    else:
        kwargs |= {"batch": 8 // processes}
    if processes > 1 and "launched" not in kwargs:
        kwargs.setdefault("fsdp", True)
    return {"run": f"sharded_cases:{run}", **kwargs}


def alone(settings: dict[str, Any]) -> None:
    """A case in this process."""
    getattr(sharded_cases, settings.pop("run").partition(":")[2])(**settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run has exported: policy and critic."""
    found = [p for part in ("", "value_model") for p in (folder / part).glob("*.safetensors")]
    return {f"{p.relative_to(folder)} {n}": x for p in found for n, x in safetensors.torch.load_file(p).items()}


def furthest(a: Path, b: Path) -> float:
    """The largest difference of two runs' exported weights, which go by the same names."""
    ours, theirs = weights(a), weights(b)
    assert ours
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def logged(folder: Path, *names: str) -> list[list[float]]:
    """Series of an export's log."""
    history = json.loads((folder / "history.json").read_text())
    return [[row[name] for row in history if name in row] for name in names]


def layouts(folder: Path) -> list[dict[str, Any]]:
    """How models lay over the processes, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("layout_*.json"))]


def at(root: Path, name: str) -> Path:
    return root / re.sub(r"\W+", "-", name)


def check_equal(one: Path, two: Path) -> None:
    """Losses, gradient norms, evaluation and weights."""
    names = ("loss", "grad_norm", "grad_norm/policy", "grad_norm/value", "kl", "score")
    names += ("eval_win_rate", "eval_win_rate_length", "eval_win_rate_score")
    for name, ours, theirs in zip(names, logged(one, *names), logged(two, *names)):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5), name
    assert len(logged(two, "loss")[0]) >= 3
    found = [json.loads((folder / "evaluation.json").read_text()) for folder in (one, two)]
    timed = re.compile("runtime|per_second")
    for name in (n for n in found[0] if not timed.search(n) and not math.isnan(found[0][n])):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-5), name
    assert furthest(one, two) < 1e-5


def moved(folder: Path, start: Path) -> dict[str, torch.Tensor]:
    """What training added to the policy's weights."""
    before, after = (safetensors.torch.load_file(f / "model.safetensors") for f in (start, folder))
    return {name: after[name] - before[name] for name in before}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a − b‖ / ‖a‖."""
    gap, size = (sum(x.square().sum().item() for x in xs) for xs in ([a[n] - b[n] for n in a], a.values()))
    return math.sqrt(gap / size)


@pytest.fixture(scope="module")
def launched(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of the default suite on two processes, each with half a batch; once, however many run the tests."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "two"
    with FileLock(f"{root}.lock"):
        if not (root / "done").is_file():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            run_all(models, root)
            (root / "done").touch()
    return root


def run_all(models: Any, root: Path) -> None:
    """The cases of `launched`, in forks of a process that has imported everything."""
    cases = [case(models, name, settings, root, processes=2) for name, settings in EQUAL.items()]
    saving = {"run": "rto", **SAVING}
    cases += [case(models, "straight", saving | SHARDED | ADAM, root, processes=2)]
    resume = str(at(root, "straight") / "checkpoint-3")
    cases += [case(models, "resumed", saving | SHARDED | ADAM | {"resume": resume}, root, processes=2)]
    cases += [case(models, "not cut", saving | {"fsdp": None, "log_completions": 4}, root, processes=2)]
    cases += [case(models, "bf16", {"run": "prefer", "loss": "dpo", "bf16": True}, root, processes=2)]
    (root / "cases.json").write_text(json.dumps(cases))
    done = warm.run(PROGRAM, str(root / "cases.json"), processes=2, environment=ENVIRONMENT, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def by_one(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same in one process, whole."""
    root = tmp_path_factory.mktemp("one")

    def run(name: str, settings: dict[str, Any]) -> Path:
        if not at(root, name).is_dir():
            alone(case(models, name, settings, root, processes=1))
        return at(root, name)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_cut_models_train_as_a_whole_one(name: str, launched: Path, by_one: Callable[..., Path]) -> None:
    check_equal(by_one(name, EQUAL[name]), at(launched, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_every_model_is_cut_by_its_layers(name: str, launched: Path) -> None:
    """DTensors everywhere, more than one unit, and no process with more than its share: it really is FSDP2."""
    ranks = layouts(at(launched, name))
    assert len(ranks) == 2
    roles = "one base" in name
    for model in ("trained", *(m for m in ranks[0] if m.startswith(("reference", "dpo_model", "reward model")))):
        for layout in (rank[model] for rank in ranks if not (roles and model != "trained")):
            assert layout["cut"]
            assert layout["units"] > 2
        if not roles or model == "trained":
            assert sum(rank[model]["here"] for rank in ranks) == ranks[0][model]["all"]
            assert max(rank[model]["here"] for rank in ranks) < 0.52 * ranks[0][model]["all"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EQUAL if EQUAL[name]["run"] == "rto"])
def test_processes_decode_unlike_numbers_of_steps(name: str, launched: Path) -> None:
    """What is equal above is so although one process has decoded further than the other."""
    first, second = (rank["steps"] for rank in layouts(at(launched, name)))
    assert len(first) == len(second) > 3  # three rollouts and an evaluation
    assert sum(a != b for a, b in zip(first, second)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shares"), [("dpo", [4, 3]), ("kto", [4, 3]), ("rto", [3, 3]), ("not cut", [3, 3])])
def test_each_process_reads_its_share_of_held_out_rows(name: str, shares: list[int], launched: Path) -> None:
    """Seven pairs; five prompts, of which a last one makes up the number."""
    assert [rank["evaluated"] for rank in layouts(at(launched, name))] == shares


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EQUAL, "straight", "resumed", "not cut", "bf16"])
def test_only_the_process_that_saves_writes(name: str, launched: Path) -> None:
    """Checkpoints, logs, exports, cards: what two processes write at once, one of them spoils."""
    first, second = (rank["wrote"] for rank in layouts(at(launched, name)))
    assert "model.safetensors" in first or "adapter_model.safetensors" in first
    assert [path for path in second if not re.search(r"(_1|__1_\d+)\.\w+$", path)] == []


@pytest.mark.slow
def test_a_run_in_pieces_resumes_bit_for_bit(launched: Path) -> None:
    """SHARDED_STATE_DICT, in the middle of a rollout, with AdamW's moments; and the export is whole all the same."""
    straight, resumed = at(launched, "straight"), at(launched, "resumed")
    assert (straight / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()
    assert furthest(straight, resumed) == 0
    assert logged(straight, "loss")[0][3:] == logged(resumed, "loss")[0][3:]
    assert json.loads((straight / "evaluation.json").read_text())["eval_kl"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "rto", "straight"])
def test_plain_transformers_loads_what_is_exported(name: str, launched: Path, models: Any) -> None:
    folder = at(launched, name)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.architectures == ["LlamaForCausalLM"]
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert stored.keys() == safetensors.torch.load_file(Path(models["whole"][0]) / "model.safetensors").keys()
    assert {x.dtype for x in stored.values()} == {torch.float32}


@pytest.mark.slow
def test_adapters_of_a_cut_base_are_peft_s(launched: Path) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    folder = at(launched, "rto on one base")
    AutoPeftModelForCausalLM.from_pretrained(folder)
    critic = AutoPeftModelForSequenceClassification.from_pretrained(folder / "value_model", num_labels=1)
    assert critic.base_model.model.score.modules_to_save["default"].weight.any()


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_adds_up_in_fp32(launched: Path, by_one: Callable[..., Path], models: Any) -> None:
    """Log-probabilities come out in fp32, trained weights stay fp32, frozen ones are bf16.

    FSDP2 gathers weights in bf16, so that norms and embeddings are rounded, too, which one process's autocast keeps:
    both are as far from fp32, and from each other.
    """
    for rank in layouts(at(launched, "bf16")):
        assert rank["trained"]["dtypes"] == ["torch.float32"]
        assert rank["reference"]["dtypes"] == ["torch.bfloat16"]
        assert (rank["logp"], rank["gradients"]) == ("torch.float32", "torch.float32")
        assert rank["narrow"] < 3  # of 6
    start = Path(models["whole"][0])
    exact = moved(by_one("dpo", EQUAL["dpo"]), start)
    one = moved(by_one("bf16", EQUAL["dpo"] | {"bf16": True}), start)
    two = moved(at(launched, "bf16"), start)
    assert 0 < apart(exact, one) < 0.06
    assert 0 < apart(exact, two) < 0.09
    assert 0 < apart(one, two) < 0.12


# --- one launch each, or many: not in the default suite


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOWER)
def test_more_cases_train_as_a_whole_model(
    name: str, models: Any, by_one: Callable[..., Path], tmp_path: Path
) -> None:
    launch([case(models, name, SLOWER[name], tmp_path, processes=2)], tmp_path)
    check_equal(by_one(name, SLOWER[name]), at(tmp_path, name))


@pytest.mark.slow
def test_one_process_pushes_a_whole_model(models: Any, tmp_path: Path) -> None:
    """Also where nobody has saved one yet, and checkpoints are kept in pieces."""
    launch(
        [case(models, "pushed", {"run": "prefer", "loss": "dpo", "push": True, **SHARDED}, tmp_path, processes=2)],
        tmp_path,
    )
    first, second = layouts(tmp_path / "pushed")
    (sent,) = first["pushed"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(sent)
    assert second["pushed"] == second["wrote"] == []


@pytest.mark.slow
def test_gathered_once_is_gathered_once(models: Any, tmp_path: Path) -> None:
    """By bytes: policy and critic once an update, where by layer it is twice a pass; gradients go as they did.

    The policy is let go before the critic's passes. Under an adapter one gather serves policy and reference.
    """
    ways = {"once": True, "by layer": False}
    settings = {"run": "rto", "counted": True}
    cases = [case(models, n, settings | {"gather_once": once}, tmp_path, processes=2) for n, once in ways.items()]
    settings = {"run": "prefer", "loss": "dpo", "lora": 4, "counted": True, "max_tokens_per_micro_batch": 8}
    launch([*cases, case(models, "adapter", settings, tmp_path, processes=2)], tmp_path)
    once, by_layer, adapter = (layouts(at(tmp_path, name))[0] for name in (*ways, "adapter"))
    updates = len(logged(at(tmp_path, "once"), "loss")[0])
    whole = 4 * once["trained"]["all"] / 2  # what a process receives of all fp32 weights of both models
    assert once["passes"] == by_layer["passes"] > 2 * updates  # more than one of each model
    assert once["sent"]["gathered"] == pytest.approx(updates * whole, rel=0.05)  # pieces are filled up to equal sizes
    assert by_layer["sent"]["gathered"] == pytest.approx(by_layer["passes"] * whole, rel=0.1)
    assert once["sent"]["reduced"] == by_layer["sent"]["reduced"]
    beside = [(part["policy"] > 0, part["value_model"] > 0) for part in once["whole"]]
    assert set(beside) == {(True, False), (False, True)}  # in each pass the model that it reads, and no other
    updates = len(logged(at(tmp_path, "adapter"), "loss")[0])
    assert adapter["passes"] > updates
    assert adapter["sent"]["gathered"] == pytest.approx(updates * 4 * adapter["trained"]["all"] / 2, rel=0.1)


@pytest.mark.slow
def test_no_process_holds_a_model_whole(tmp_path: Path) -> None:
    """While models are read and cut, and while they are exported: beyond its pieces a process has a unit, or a tensor.

    A model of 52 M parameters, its file in bf16, as policy, critic and reference; memory of a process's own.
    """
    program = PROGRAM.parents[2] / "benchmarks" / "sharded_memory.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(program), "--size", "52M", "--json", str(tmp_path / "found")]
    code, said = wait(
        subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    )
    assert code == 0, said[-4000:]
    for process in json.loads((tmp_path / "found").read_text()):
        sizes = {name: 4 * n / 1e6 for name, n in process["parameters"].items()}  # MB in fp32
        pieces = sizes["policy"] / 2 + sizes["critic"] / 2 + sizes["reference"] / 4
        assert process["at rest"] == pytest.approx(pieces, rel=0.2)
        assert process["read and cut"] - process["at rest"] < sizes["policy"] / 3
        assert process["exported"] - process["at rest"] < sizes["policy"] / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "tdpo", "rto", "rto on one base"])
def test_weights_are_read_by_every_process_whatever_is_asked(
    name: str, models: Any, by_one: Callable[..., Path], tmp_path: Path
) -> None:
    """``cpu_ram_efficient_loading``, by which one process of a host would read and the others be sent theirs."""
    launch([case(models, name, EQUAL[name] | {"launched": LAUNCHED}, tmp_path, processes=2)], tmp_path)
    check_equal(by_one(name, EQUAL[name]), at(tmp_path, name))


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_a_whole_checkpoint_resumes_bit_for_bit(optim: str, models: Any, tmp_path: Path) -> None:
    """FULL_STATE_DICT; plain SGD has no state, which torch does not expect."""
    settings = {"run": "rto", "optim": optim, **SAVING}
    straight = case(models, "straight", settings, tmp_path, processes=2)
    settings["resume"] = str(tmp_path / "straight" / "checkpoint-3")
    launch([straight, case(models, "resumed", settings, tmp_path, processes=2)], tmp_path)
    assert furthest(tmp_path / "straight", tmp_path / "resumed") == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "checkpoint-3")


@pytest.mark.slow
def test_checkpoints_with_empty_pieces_resume_bit_for_bit(models: Any, tmp_path: Path) -> None:
    """Adapters of rank 1 on two processes: AdamW's state of what a process has nothing of, in pieces and whole."""
    ways, cases = {"pieces": SHARDED, "whole": {}}, []
    for way, kind in ways.items():
        settings = {"run": "rto", "lora": 1, **SAVING, **ADAM, **kind}
        cases += [case(models, f"straight {way}", settings, tmp_path, processes=2)]
        settings["resume"] = str(at(tmp_path, f"straight {way}") / "checkpoint-3")
        cases += [case(models, f"resumed {way}", settings, tmp_path, processes=2)]
    launch(cases, tmp_path)
    assert layouts(at(tmp_path, "straight pieces"))[1]["trained"]["least"] == 0
    for way in ways:
        straight, resumed = at(tmp_path, f"straight {way}"), at(tmp_path, f"resumed {way}")
        assert furthest(straight, resumed) == 0
        assert logged(straight, "loss")[0][3:] == logged(resumed, "loss")[0][3:]


@pytest.mark.slow
def test_killed_processes_resume(models: Any, tmp_path: Path) -> None:
    settings = {"run": "rto", **SAVING, **SHARDED, **ADAM, "save_steps": 2, "num_train_epochs": 2}
    straight = case(models, "straight", settings, tmp_path, processes=2)
    broken = case(models, "broken", settings | {"kill": "mid-rollout"}, tmp_path, processes=2)
    with pytest.raises(AssertionError, match=r"SIGKILL|-9"):
        launch([straight, broken], tmp_path)
    assert (tmp_path / "straight" / "model.safetensors").is_file()
    assert not (tmp_path / "broken" / "model.safetensors").is_file()
    launch([case(models, "broken", settings | {"resume": True}, tmp_path, processes=2)], tmp_path)
    assert furthest(tmp_path / "straight", tmp_path / "broken") == 0


@pytest.mark.slow
def test_the_best_model_is_loaded_and_reading_may_come_first(
    models: Any, by_one: Callable[..., Path], tmp_path: Path
) -> None:
    """An evaluation before training reads a cut model; after it the best checkpoint's weights are exported.

    Before it policy and reference are one model: a loss of ln 2. What the log begins with is of after the first step:
    training begins with a new log.
    """
    settings = {"run": "prefer", "loss": "dpo", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    settings |= {"greater_is_better": True, "eval_strategy": "steps", "eval_steps": 1, "early": True}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    launch([case(models, "best", settings, tmp_path, processes=2)], tmp_path)
    best = tmp_path / "best"
    before, (losses,) = json.loads((best / "before.json").read_text()), logged(best, "eval_loss")
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_margin"] == pytest.approx(0, abs=1e-5)
    one = by_one("best", settings | {"load_best_model_at_end": False})
    assert losses[:3] == pytest.approx(logged(one, "eval_loss")[0][:3], rel=1e-5)
    assert losses[0] < math.log(2)
    first = safetensors.torch.load_file(best / "checkpoint-1" / "model.safetensors")  # the loss falls, so it is best
    found = safetensors.torch.load_file(best / "model.safetensors")
    assert all(torch.equal(first[name], found[name]) for name in first)
    last = safetensors.torch.load_file(best / "checkpoint-3" / "model.safetensors")
    assert not torch.equal(last["model.norm.weight"], found["model.norm.weight"])


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces on one wire: the beginning of a command on each."""
    names = [f"rto{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are two network namespaces, which take root and iproute2")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError:
        pytest.skip("this machine makes no network namespaces")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_as_one(
    hosts: list[list[str]], models: Any, by_one: Callable[..., Path], tmp_path: Path
) -> None:
    """torchrun on two hosts that reach each other by one address each: the models are cut over both."""
    chosen = ("tdpo", "rto")
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case(models, name, EQUAL[name], tmp_path, processes=2) for name in chosen]))
    environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "wire"}
    started = []
    for rank, host in enumerate(hosts):
        command = [*host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        command += ["--node_rank", str(rank), "--master_addr", "10.77.0.1", "--master_port", "29400"]
        with (tmp_path / f"host{rank}.log").open("w") as log:
            settings: dict[str, Any] = {"env": environment, "stdout": log, "stderr": log, "start_new_session": True}
            started.append(subprocess.Popen([*command, str(PROGRAM), str(path)], text=True, **settings))
    codes = [wait(launcher)[0] for launcher in started]
    assert codes == [0, 0], [(tmp_path / f"host{rank}.log").read_text()[-2000:] for rank in range(2)]
    for name in chosen:
        assert len(layouts(at(tmp_path, name))) == 2
        check_equal(by_one(name, EQUAL[name]), at(tmp_path, name))


ZERO_2 = {
    "use_cpu": False,  # under which accelerate knows no DeepSpeed
    "deepspeed": {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
    },
    "launched": {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"},
}
NO_DEEPSPEED = "needs pip install deepspeed, which builds with g++ and ninja"
LEARNING = {
    f"{stage}.{name}": value
    for stage, rate in {"sft": 0.3, "prefer": 1.0, "reward": 0.1}.items()
    for name, value in {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": rate}.items()
}
"""Of what does not sample, by steps that are the gradient itself: one process and two then learn the same."""
ADAPTERS = {"peft.r": 4, "peft.target_modules": "all-linear"}
ENGINES: dict[str, dict[str, str]] = {"DDP": {}, "FSDP2": LAUNCHED, "DeepSpeed": ZERO_2["launched"]}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "adapters"), [("FSDP2", False), *((engine, True) for engine in ENGINES)])
def test_every_stage_of_a_run_by_each_engine(
    engine: str, adapters: bool, by_one: Callable[..., Path], tmp_path: Path
) -> None:
    """SFT and reward model, too: as by one process, exported whole, each the start of the next."""
    if engine == "DeepSpeed":
        pytest.importorskip("deepspeed", reason=NO_DEEPSPEED)
    settings = {"run": "pipeline", **LEARNING, **(ADAPTERS if adapters else {})}
    two = {**settings, "run": "sharded_cases:pipeline", "output": str(tmp_path / "run"), "batch": 4}
    launch([two | {"launched": ENGINES[engine]}], tmp_path)
    ranks = layouts(tmp_path / "run")
    assert len(ranks) == 2
    for rank in ranks:
        trainers = {"SFTTrainer", "PreferenceTrainer", "RewardTrainer", "RTOTrainer"}
        assert rank.keys() == trainers | {"wrote"}
        assert {rank[name]["engine"] for name in trainers} == {{"DDP": "DistributedDataParallel"}.get(engine, engine)}
        if engine == "FSDP2":
            assert all(rank[name]["cut"] and rank[name]["units"] > 1 for name in trainers)
    assert [
        path
        for path in ranks[1]["wrote"]
        if not re.search(r"(_1|__1_\d+|zero_pp_rank_1_mp_rank_\d+_optim_states)\.\w+$", path)
    ] == []
    one = by_one("pipeline" + " with adapters" * adapters, settings)
    for stage in ("sft", "dpo", "reward"):
        assert furthest(one / stage, tmp_path / "run" / stage) < 1e-5, stage
    pairs = [(folder / "pairs" / "pairs.jsonl").read_text() for folder in (one, tmp_path / "run")]
    assert pairs[0] == pairs[1]
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["methods"]
    assert results["SFT"]["kl"] == pytest.approx(0, abs=1e-4)
    assert results["DPO"]["kl"] != 0
    assert results["RTO"]["kl"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("source", ["gold", "judge"])
def test_rounds_of_labels(source: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Two rounds cut over two processes: one asks, nothing twice; what follows from the same weights is the same."""
    from test_rounds import JudgeServer, longer, tree

    from rto.inspection.reading import InspectArguments, inspect

    recipe = tmp_path / "rounds.yaml"
    with JudgeServer(longer) as server:
        labels = {
            "judge": {"by": "judge", "judge": {"model": "judge", "base_url": server.url}},
            "gold": {"by": "gold"},
        }
        recipe.write_text(json.dumps(tree(tiny_folder, labels=labels[source])))
        rates = {"prefer.optim": "sgd", "prefer.learning_rate": 0.1, "prefer.lr_scheduler_type": "constant"}
        case = {"run": "sharded_cases:pipeline", "recipe": str(recipe), **rates}
        launch([{**case, "output": str(tmp_path / "two"), "batch": 4, "launched": LAUNCHED}], tmp_path)
        asked = [json.dumps(body, sort_keys=True) for body in server.bodies]
        assert len(asked) == len(set(asked))
        assert (len(asked) > 0) == (source == "judge")
        alone({**case, "output": str(tmp_path / "one"), "batch": 8})
    for rank in layouts(tmp_path / "two"):
        assert all(rank[name]["units"] > 1 for name in ("PreferenceTrainer", "RewardTrainer", "RTOTrainer"))
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "pairs" / "pairs.jsonl").read_bytes() == (two / "pairs" / "pairs.jsonl").read_bytes()
    assert furthest(one / "dpo", two / "dpo") < 1e-5
    told = json.loads((two / "round-2" / "pairs" / "counts.json").read_text())
    assert told["sampled"] == 8 == told["labels"] + sum(told["not asked"].values())
    assert furthest(two / "rto", two / "round-2" / "rto") > 0  # it went on
    reads: dict[str, Any] = {"dpo_model": [str(two / "round-2" / "dpo")], "ref_model": str(two / "sft")}
    rows = str(two / "round-2" / "pairs" / "pairs.jsonl")
    found = inspect(InspectArguments(**reads, dataset_name=rows, output_dir=str(tmp_path / "inspection")))
    assert found is not None


@pytest.mark.slow
def test_zero_2_takes_one_step_an_update(models: Any, by_one: Callable[..., Path], tmp_path: Path) -> None:
    """Several micro-batches an update; policy and critic are clipped by one norm, so here by none. And it resumes."""
    pytest.importorskip("deepspeed", reason=NO_DEEPSPEED)
    free = {"max_grad_norm": 1e9}
    slow = {"learning_rate": 3e-3, "value_learning_rate": 1e-3}  # norms of 80 without a clip: rounding would grow
    shared = {"dpo": EQUAL["dpo"] | free, "rto": EQUAL["rto"] | free | slow}
    shared["rto on one base"] = EQUAL["rto on one base"] | free | slow
    cases = [case(models, name, settings | ZERO_2, tmp_path, processes=2) for name, settings in shared.items()]
    saving = {"run": "rto", **SAVING, **ADAM, **ZERO_2}
    cases += [case(models, "straight", saving, tmp_path, processes=2)]
    saving |= {"resume": str(tmp_path / "straight" / "checkpoint-3")}
    launch([*cases, case(models, "resumed", saving, tmp_path, processes=2)], tmp_path)
    for name, settings in shared.items():
        one, two = by_one(f"{name} unclipped", settings), at(tmp_path, name)
        assert furthest(one, two) < 2e-6
        ours, theirs = logged(one, "loss", "kl"), logged(two, "loss", "kl")
        assert all(b == pytest.approx(a, rel=1e-5, abs=1e-5) for a, b in zip(ours, theirs))
    policy, critic = logged(by_one("rto unclipped", shared["rto"]), "grad_norm/policy", "grad_norm/value")
    joint = [math.hypot(a, b) for a, b in zip(policy, critic)]
    assert logged(tmp_path / "rto", "grad_norm/joint")[0] == pytest.approx(joint, rel=1e-4)
    assert furthest(tmp_path / "straight", tmp_path / "resumed") == 0
