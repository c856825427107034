"""Files written tensor by tensor are those that the libraries write of a whole model."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto.models import saving
from rto.models.saving import Piece, as_it_is, save_merged, save_model, write_file, write_weights


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
