"""What lays models over processes, as far as one process shows it; `test_sharded.py` has the rest."""

import argparse
import ast
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

import rto
from rto import PreferenceConfig, RTOConfig
from rto.models.actor import Actor
from rto.models.loading import clone, load_policy
from rto.models.precision import settle, widen
from rto.models.scalars import critic_of
from rto.trainers import engine
from rto.trainers.engine import Engine, EngineError, check_layout, shared_out
from rto.trainers.supervised import RewardConfig, SFTConfig

LAUNCHES = Path(rto.__file__).parent / "recipes" / "accelerate"


@pytest.mark.parametrize("kind", [RTOConfig, PreferenceConfig, SFTConfig, RewardConfig])
@pytest.mark.parametrize("way", ["launched", "launched with a file", "given", "given as a file"])
def test_zero_3_is_refused_before_any_model_loads(
    kind: Any, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line that names what to use, whether or not DeepSpeed is installed."""
    file = tmp_path / "zero3.json"
    settings = {"zero_optimization": {"stage": 3}}
    file.write_text(json.dumps(settings))
    if way.startswith("launched"):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    if way == "launched with a file":
        monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    given = {"given": settings, "given as a file": str(file)}.get(way)
    with pytest.raises(EngineError, match=r"ZeRO-3 is not supported.*FSDP2") as caught:
        kind(output_dir="x", report_to="none", deepspeed=given)
    assert "\n" not in str(caught.value)


def test_first_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def args(fsdp: bool | None, version: int) -> Any:
        return SimpleNamespace(deepspeed=None, fsdp=fsdp, fsdp_config={"version": version})

    check_layout(args(True, 2))
    check_layout(args(None, 1))
    with pytest.raises(EngineError, match=r"version 1.*FSDP2"):
        check_layout(args(True, 1))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(EngineError, match=r"version 1.*FSDP2"):
        check_layout(args(None, 2))


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("accelerate launch --cpu --num_processes 2 train.py", 2),
        ("accelerate launch --num-processes=4 --cpu train.py", 4),
        ("accelerate launch --cpu train.py", 0),
        ("accelerate launch --config_file CONFIG train.py", 3),
    ],
)
def test_one_process_where_several_were_asked_for_is_told(
    command: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("num_processes: 3\n")
    words = command.replace("CONFIG", str(config)).split()
    monkeypatch.setattr(engine, "_command_of_parent", lambda: words)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    engine.warn_of_one_process.cache_clear()
    with caplog.at_level(logging.WARNING):
        engine.warn_of_one_process()
    engine.warn_of_one_process.cache_clear()
    said = [record.getMessage() for record in caplog.records if "has started one process" in record.getMessage()]
    assert len(said) == (asked > 1)
    assert all(f"torchrun --nproc_per_node {asked}" in line for line in said)


def test_an_actor_names_the_layers_that_it_has(tiny_model: Any) -> None:
    """Names that no module has would be refused by accelerate."""
    actor = Actor(tiny_model(), tiny_model(seed=1))
    actor.policy._no_split_modules = [*actor.policy._no_split_modules, "NobodysLayer"]
    assert actor._no_split_modules == {"LlamaDecoderLayer"}


def test_models_that_were_to_be_cut_and_are_not_have_memory_of_their_own(tiny_folder: Path) -> None:
    """FSDP asked for where accelerate does not cut, on processors: the reference is a copy all the same."""
    engine = Engine(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, device=torch.device("cpu")))
    policy = load_policy(tiny_folder, dtype=torch.float32, as_stored=True)
    reference = clone(policy, torch.float32)
    assert policy.model.norm.weight.data_ptr() == reference.model.norm.weight.data_ptr()
    engine.lay_out(reference)
    engine.ready(policy)
    mapped = in_file(tiny_folder / "model.safetensors")
    for name, x in policy.named_parameters():
        assert x.data_ptr() != reference.get_parameter(name).data_ptr()
        assert not mapped(x)


def test_clipping_by_one_norm_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where each group has its own everywhere else, and only where there are groups and a limit."""
    whole = Engine(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    plugin = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    zero_2 = Engine(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=plugin))
    with caplog.at_level(logging.WARNING):
        whole.tell_of_clipping(2, 1.0)
        zero_2.tell_of_clipping(1, 1.0)
        zero_2.tell_of_clipping(2, 0.0)
        assert not caplog.records
        zero_2.tell_of_clipping(2, 1.0)
    assert "policy and critic by one norm" in caplog.text


def test_gradients_are_exchanged_once_an_update(tmp_path: Path) -> None:
    """DDP, which would do it with every micro-batch: its buckets are counted, and the gradient is that of all."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
        exchanged: list[int] = []

        def hook(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            exchanged.append(bucket.buffer().numel())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, hook)
        accelerator = SimpleNamespace(
            distributed_type=DistributedType.MULTI_CPU,
            device=torch.device("cpu"),
            num_processes=1,
            sync_gradients=True,
            autocast=nullcontext,
            backward=lambda loss: loss.backward(),
            no_sync=lambda wrapped: wrapped.no_sync(),
            reduce=lambda x, reduction: x,
        )
        parts = list(torch.randn(4, 2, 3))
        for updates in (1, 2):
            model.zero_grad()
            Engine(accelerator).backward(model, parts, lambda x: model(x).sum())
            assert exchanged == [4] * updates
            torch.testing.assert_close(model.module.weight.grad[0], torch.stack(parts).sum((0, 1)))
    finally:
        torch.distributed.destroy_process_group()


def in_file(file: Path) -> Callable[[torch.Tensor], bool]:
    """Whether a tensor's memory is a mapping of a file, as mappings are now."""
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(x, 16) for x in row[0].split("-")] for row in rows if row[-1] == str(file.resolve())]
    return lambda x: any(low <= x.data_ptr() < high for low, high in spans)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_weights_stay_in_their_file_until_they_are_cut(tiny_folder: Path, tmp_path: Path, stored: torch.dtype) -> None:
    """A model, its copy as reference and a critic of it take no memory of the process, and are then what they were."""
    whole = load_policy(tiny_folder).to(stored)
    whole.save_pretrained(tmp_path)
    file, kwargs = tmp_path / "model.safetensors", {"dtype": torch.float32, "as_stored": True}
    policy = load_policy(tmp_path, **kwargs)
    reference = clone(policy, torch.bfloat16)
    critic = critic_of(policy)
    mapped = in_file(file)
    assert all(map(mapped, (*policy.parameters(), *reference.parameters(), *critic.base_model.parameters())))
    assert widen(policy) == 0
    for model in (policy, reference, critic):
        settle(model)
        assert not any(map(mapped, model.parameters()))
    ours, theirs = policy.state_dict(), load_policy(tmp_path, dtype=torch.float32).state_dict()
    assert all(x.dtype == torch.float32 and torch.equal(x, theirs[name]) for name, x in ours.items())
    assert {x.dtype for x in critic.parameters()} == {torch.float32}
    assert {x.dtype for x in reference.parameters()} == {torch.bfloat16}
    expected = critic_of(load_policy(tmp_path, dtype=torch.float32)).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in critic.state_dict().items())


def test_a_file_of_two_precisions_is_read_in_the_wider(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_policy(tiny_folder).bfloat16()
    model.model.norm.float().weight.data.fill_(1 + 2**-20)
    model.save_pretrained(tmp_path)
    found = load_policy(tmp_path, dtype=torch.float32, as_stored=True)
    settle(found)
    assert found.model.norm.weight[0] == 1 + 2**-20


WRAPPERS = {
    *("DistributedDataParallel", "no_sync", "FSDPModule", "fully_shard", "DTensor", "full_tensor", "to_local"),
    *("unshard", "reshard", "register_fsdp_forward_method", "fsdp_plugin", "deepspeed_plugin", "is_fsdp_enabled"),
    *("is_deepspeed_enabled", "DistributedType", "distributed_type", "unwrap_model", "sync_gradients", "distributed"),
}
ELSEWHERE = {
    "finite.py": {"to_local"},  # below the trainers: a piece is looked at where it is
    "rollout/samplers/weights.py": {"full_tensor"},  # a sampler may be given a model that no trainer has gathered
    "rollout/samplers/vllm.py": {"distributed"},  # a server has one client among processes, with or without a trainer
    "evaluation/judging/callback.py": {"is_fsdp_enabled"},  # refuses trainers of others, which have no engine
}


def test_one_file_knows_how_models_lie_over_processes() -> None:
    """Names of wrappers and of what they do, in code; strings and comments may speak of them."""
    home, found = Path(rto.__file__).parent, {}
    for path in home.rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                whole = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                names.update(".".join(whole).split("."))
        if names & WRAPPERS:
            found[str(path.relative_to(home))] = names & WRAPPERS
    assert len(found.pop("trainers/engine.py")) > 10
    assert found == ELSEWHERE


def test_work_of_one_process_is_its_own() -> None:
    assert shared_out([3, 1, 2], lambda i: i * i) == [9, 1, 4]


@pytest.mark.parametrize("path", sorted(LAUNCHES.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_say_what_they_mean(path: Path) -> None:
    """accelerate reads each, every key is one of its own, and what it hands to a process is what the name says."""
    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert given.keys() <= {*vars(config)}
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "train.py"]))
    assert isinstance(args, argparse.Namespace)
    environment = {} if path.stem == "zero2" else prepare_multi_gpu_env(args)
    assert args.num_processes == 8
    assert args.mixed_precision == "bf16"
    assert args.use_fsdp == (path.stem == "fsdp2")
    assert args.use_deepspeed == (path.stem == "zero2")
    if args.use_deepspeed:
        assert args.zero_stage == 2
    if args.use_fsdp:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            plugin = FullyShardedDataParallelPlugin()
            check_layout(SimpleNamespace(deepspeed=None, fsdp=None, fsdp_config=None))
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward
        assert not plugin.cpu_ram_efficient_loading
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
