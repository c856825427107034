"""What lays models over processes, as far as one process shows it; `test_sharded.py` has the rest."""

import argparse
import ast
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
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
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import rto
from rto import PreferenceConfig, PreferenceTrainer, RTOConfig, cli
from rto.batches import collate
from rto.models.actor import Actor, TokenOutputs
from rto.models.loading import clone, load_policy
from rto.models.precision import settle, widen
from rto.models.roles import adapt, shared_base
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


@pytest.mark.parametrize(
    ("stored", "held", "own"),
    [
        *((x, y, {}) for x in (torch.bfloat16, torch.float32) for y in (torch.bfloat16, torch.float32)),
        *((torch.bfloat16, x, {"modules_to_save": ["lm_head"]}) for x in (torch.bfloat16, torch.float32)),
        (torch.bfloat16, torch.float32, {"use_dora": True}),  # it starts from the norms of the weights
    ],
)
def test_a_base_under_adapters_stays_in_its_file_until_it_is_cut(
    stored: torch.dtype, held: torch.dtype, own: dict[str, Any], tiny_model: Any, tmp_path: Path
) -> None:
    """A new adapter and a critic's beside it start as on a whole base, to the bit, and are all that takes memory."""
    tiny_model(tie_word_embeddings=False).to(stored).save_pretrained(tmp_path)
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **own)

    def adapted(**kwargs: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        policy = adapt(load_policy(tmp_path, dtype=held, **kwargs), config)
        base = shared_base(policy)
        assert base is not None
        critic = base.new_critic("value")
        widen(policy)
        return policy, critic

    (expected, their_head), (policy, head) = adapted(), adapted(as_stored=True)
    mapped = in_file(tmp_path / "model.safetensors")
    trained = {*map(id, policy.parameters())} - {id(x) for n, x in policy.named_parameters() if _of_base(n)}
    frozen = [x for x in policy.parameters() if id(x) not in trained]
    of_its_own = sum(x.nbytes for x in frozen if not mapped(x))
    assert of_its_own == (policy.lm_head.original_module.weight.nbytes if "modules_to_save" in own else 0)
    assert sum(map(mapped, frozen)) > 15  # weights: it does tell
    settle(policy)
    assert not any(map(mapped, policy.parameters()))
    ours, theirs = policy.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]) for name, x in ours.items())
    assert {x.dtype for name, x in policy.named_parameters() if "lora_A" in name} == {torch.float32}
    tokens = torch.arange(3, 9)[None]
    assert torch.equal(policy(tokens).logits, expected(tokens).logits)
    assert torch.equal(head.score.weight, their_head.score.weight)


def _of_base(name: str) -> bool:
    return not any(part in name for part in ("lora_", "modules_to_save"))


@pytest.mark.parametrize("rank", [0, 4])
def test_models_that_stay_as_stored_are_read_in_their_own_precision(
    rank: int, tiny_model: Any, tokenizer: Any, pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fp32 run on a bf16 file, told that models will be cut where they are not: π_ref is read before training."""
    tiny_model().bfloat16().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    found = []
    for cuts in (False, True):
        monkeypatch.setattr("rto.trainers.precision.will_cut", lambda args, cuts=cuts: cuts)
        folder = str(tmp_path / f"run{cuts}")
        settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True}
        settings |= {"report_to": "none", "use_cpu": True, "save_strategy": "no"}
        run = PreferenceTrainer(
            str(tmp_path / "start"),
            PreferenceConfig(output_dir=folder, precompute_ref_log_probs=not rank, **settings),
            train_dataset=pairs,
            peft_config=LoraConfig(r=rank, target_modules="all-linear") if rank else None,
        )
        frozen = [x for x in run.model.parameters() if not x.requires_grad]
        assert sum(map(in_file(tmp_path / "start" / "model.safetensors"), frozen)) == (len(frozen) if cuts else 0)
        run.train()
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
        found.append((losses, {name: x for name, x in run.model.named_parameters() if x.requires_grad}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(x, found[1][1][name]) for name, x in found[0][1].items())


def test_a_model_that_is_only_read_goes_where_it_is_read(tiny_model: Any) -> None:
    engine = Engine(SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("meta")))
    reference = clone(tiny_model())
    engine.lay_out(reference)
    assert {x.device.type for x in reference.state_dict().values()} == {"meta"}


def test_models_that_were_to_be_cut_and_are_not_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """accelerate would train something else (DDP) without a word."""
    cut = {"state": SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))}
    monkeypatch.setenv("LOCAL_RANK", "0")
    for kind, asked, told in (("FSDP", True, 0), ("MULTI_CPU", None, 0), ("MULTI_CPU", True, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Engine(SimpleNamespace(distributed_type=DistributedType[kind], **cut)).tell_of_layout(
                SimpleNamespace(fsdp=asked)
            )
        assert caplog.text.count("every process holds all") == told


def test_zero_2_steps_with_the_last_part_alone() -> None:
    """DeepSpeed's engine takes a step with each backward pass while gradients "sync"; nothing divides again."""
    state = SimpleNamespace(sync_gradients=True)
    state._set_sync_gradients = lambda x: setattr(state, "sync_gradients", x)
    seen: list[tuple[bool, float, dict[str, Any]]] = []
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)),
        gradient_state=state,
        sync_gradients=True,
        num_processes=2,
        device=torch.device("cpu"),
        autocast=nullcontext,
        backward=lambda loss, **kwargs: seen.append((state.sync_gradients, loss.item(), kwargs)),
        reduce=lambda x, reduction: x,
        clip_grad_norm_=lambda parameters, norm: 5.0,
    )
    layout = Engine(accelerator)
    steps: list[int] = []
    parts, model = [torch.tensor(x) for x in (1.0, 2.0, 3.0)], torch.nn.Linear(1, 1)
    total = layout.backward(model, parts, lambda x: x, before_step=lambda: steps.append(len(seen)))
    whole = {"scale_wrt_gas": False}
    assert seen == [(False, 2.0, whole), (False, 4.0, whole), (True, 6.0, whole)]  # DeepSpeed divides by the processes
    assert (total, steps, state.sync_gradients) == (6.0, [2], True)
    accelerator.sync_gradients = False  # gradient accumulation over batches: no step in this one
    layout.backward(model, parts, lambda x: x)
    assert [sync for sync, _, _ in seen[3:]] == [False] * 3
    assert layout.clip({"policy": [], "value": []}, 1.0) == {"joint": torch.tensor(5.0)}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("recomputed", [False, True])
def test_fsdp2_by_one_process_is_the_model_itself(recomputed: bool, tiny_model: Any) -> None:
    """accelerate's plugin, which would have outputs and reductions in bf16, and torch's own `fully_shard`.

    What one process shows of it, in every run of the tests.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=MixedPrecisionPolicy(*[torch.bfloat16] * 3),
        activation_checkpointing=recomputed,
    )
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=plugin),
        num_processes=1,
        device=torch.device("cpu"),
        sync_gradients=True,
        autocast=partial(torch.autocast, "cpu", torch.bfloat16),
        backward=lambda loss: loss.backward(),
        unscale_gradients=lambda: None,
        reduce=lambda x, reduction: x,
    )
    actor = Actor(tiny_model(), critic_of(tiny_model(seed=1)))
    layout = Engine(accelerator)
    layout.ready(actor)
    units = [m for m in actor.modules() if isinstance(m, FSDPModule) and m._get_fsdp_state()._fsdp_param_group]
    assert len(units) == 5  # two layers of each model, and all else
    assert all(isinstance(x, DTensor) and x.dtype == torch.float32 for x in actor.parameters())
    assert {
        (u._get_fsdp_state()._mp_policy.output_dtype, u._get_fsdp_state()._mp_policy.reduce_dtype) for u in units
    } == {(None, torch.float32)}
    x = collate([[5, 6], [7]], [[8, 9, 10, 11], [12, 13]], pad=0)
    seen: list[TokenOutputs] = []

    def loss(part: str) -> torch.Tensor:
        seen.append(actor(x.tokens, x.prompt_mask, x.mask, parts=[part]))
        found = seen[-1].logp if part == "policy" else seen[-1].values
        return (found * x.mask).sum()

    models = {"policy": actor.policy, "value": actor.value_model}
    layout.backward(actor, ["policy", "policy", "value"], loss, reads=lambda part: models[part])
    assert seen[0].logp is not None
    assert seen[0].logp.dtype == torch.float32
    assert not torch.equal(seen[0].logp, seen[0].logp.bfloat16().float())  # no number of bf16 in another dress
    assert {x.grad.dtype for x in actor.parameters() if x.grad is not None} == {torch.float32}
    assert all(isinstance(x, DTensor) for x in actor.parameters())  # let go again
    norms = layout.clip({"policy": actor.policy_parameters, "value": actor.value_parameters}, 0.5)
    assert all(norm > 0.5 for norm in norms.values())
    for group in (actor.policy_parameters, actor.value_parameters):
        left = torch.stack([x.grad.to_local().norm() for x in group if x.grad is not None]).norm()
        assert left.item() == pytest.approx(0.5, rel=1e-4)
    with layout.whole(actor.policy):
        assert not any(isinstance(x, DTensor) for x in actor.policy.model.layers[0].parameters())
        assert all(isinstance(x, DTensor) for x in actor.value_model.model.layers[0].parameters())
    assert all(torch.equal(layout.gather(x), y) for x, y in zip(actor.policy.parameters(), tiny_model().parameters()))


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


@pytest.mark.parametrize(("code", "launched", "waits"), [(0, True, 1), (2, True, 0), (0, False, 0)])
def test_a_command_that_is_done_leaves_with_the_others(
    code: int, launched: bool, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has failed does not wait: its launcher ends the others."""
    left: list[None] = []
    monkeypatch.setattr(engine, "leave", lambda: left.append(None))
    monkeypatch.setattr(cli, "close_present_folder", lambda: None)
    monkeypatch.setitem(cli.COMMANDS, "plan", lambda args: code)
    monkeypatch.setattr(sys, "argv", ["rto", "plan"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main() == code
    assert len(left) == waits


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
