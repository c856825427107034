"""Files written tensor by tensor are those that the libraries write of a whole model."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

from rto.models import saving
from rto.models.saving import Piece, as_it_is, save_merged, save_model, write_file, write_weights
from rto.planning.tracker import LiveTensors


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in safetensors.torch.load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_model_s_folder_is_the_library_s_own_to_the_byte(kind: Any, tiny_folder: Path, tmp_path: Path) -> None:
    model = kind.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours", as_it_is, writes=True)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_is_merged_layer_by_layer_as_peft_merges_it(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    auto = AutoModelForCausalLM if kind == "CAUSAL_LM" else AutoModelForSequenceClassification
    config = LoraConfig(r=3, target_modules="all-linear", task_type=kind, init_lora_weights=False)
    model: Any = get_peft_model(auto.from_pretrained(tiny_folder), config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    save_merged(model, tmp_path / "ours", as_it_is, writes=True)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    start = stored(tiny_folder)["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(stored(tmp_path / "ours")["model.layers.0.mlp.up_proj.weight"], start)


def test_one_tensor_is_whole_at_a_time(tmp_path: Path) -> None:
    """Each piece is made when its turn has come, by every process, and let go before the next."""
    alive: list[int] = []

    class Counted:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    most = 0

    def make(i: int) -> Tensor:
        nonlocal most
        x = torch.full((4, i), float(i))
        x.token = Counted()  # type: ignore[attr-defined]
        most = max(most, len(alive))
        return x

    pieces = {
        f"w{i}": Piece(dtype=torch.float32, shape=torch.Size((4, i)), make=lambda i=i: make(i)) for i in (1, 2, 3)
    }
    write_weights(tmp_path, pieces, writes=True)
    assert most <= 2  # the last one and the next
    assert {name: x.shape for name, x in stored(tmp_path).items()} == {name: p.shape for name, p in pieces.items()}
    write_weights(tmp_path / "elsewhere", pieces, writes=False)
    assert not (tmp_path / "elsewhere").exists()


class Gathered:
    """Gathers weights as processes do, into memory of their own, and takes down which."""

    def __init__(self, model: Any) -> None:
        self.names = {x.data_ptr(): name for name, x in model.state_dict(keep_vars=True).items()}
        self.largest = max(x.nbytes for x in model.parameters())
        self.found: list[str] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.found.append(self.names[x.data_ptr()])
        return x.clone()


@pytest.mark.parametrize("files_of", [10**9, 60_000])
def test_experts_that_are_stored_one_by_one_are_written_weight_by_weight(
    files_of: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library writes, to the byte; each weight is gathered once, and beside it there is what it becomes."""
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    sizes |= {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 24, "intermediate_size": 32}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts=4, shared_expert_intermediate_size=8))
    model.save_pretrained(tmp_path / "theirs")
    names = stored(tmp_path / "theirs").keys()
    assert "model.layers.5.mlp.experts.3.gate_proj.weight" in names
    assert names != model.state_dict().keys()
    gather = Gathered(model)
    monkeypatch.setattr(saving, "LARGEST_FILE", files_of)
    with LiveTensors(model.state_dict().values()) as live:
        there = live.now
        save_model(model, tmp_path / "ours", gather, writes=True)
    assert sorted(gather.found) == sorted(model.state_dict())
    assert live.peak - there <= 2 * gather.largest + 1000
    assert there > 12 * gather.largest
    if files_of == 10**9:
        assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    else:
        assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    again = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())


class Twice(ConversionOps):
    """A file's weight is two of the model's, of its own size; the file is given their mean."""

    def convert(self, weights: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        found = [x[0] for x in weights.values()]
        return {target_patterns[0]: sum(found) / len(found)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


@pytest.mark.parametrize("operation", [Chunk(dim=0), Twice()], ids=["joined", "mean"])
def test_what_is_stored_of_several_weights_takes_their_module(
    operation: ConversionOps, tiny_folder: Path, tmp_path: Path
) -> None:
    """Two maps of a model that its folder holds as one: both are gathered for it, with all else in their module."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder)
    maps = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter("mlp.both.weight", maps, operations=[operation])]
    gather = Gathered(model)
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours", gather, writes=True)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert "model.layers.0.mlp.both.weight" in stored(tmp_path / "ours")
    layers = [name.partition(".mlp.")[0] for name in gather.found if ".mlp." in name]
    assert layers == [f"model.layers.{i}" for i in (0, 1) for _ in range(3)]  # and not of both at once


def test_large_models_are_several_files_with_an_index(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LARGEST_FILE", 20_000)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    save_model(model, tmp_path, as_it_is, writes=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_full_disk_is_told_after_all_pieces_were_made(tmp_path: Path) -> None:
    """Who gathers with this process must not wait for it for ever."""
    made: list[str] = []

    def piece(name: str) -> Piece:
        return Piece(dtype=torch.float32, shape=torch.Size((2,)), make=lambda: made.append(name) or torch.ones(2))

    (tmp_path / "w.safetensors.partial").mkdir()
    with pytest.raises(OSError, match="partial"):
        write_file(tmp_path / "w.safetensors", {name: piece(name) for name in "abc"}, writes=True)
    assert made == ["a", "b", "c"]
