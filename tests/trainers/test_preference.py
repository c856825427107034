"""The preference trainer: it learns, its gradient does not depend on cuts, its reference stays."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rto import PreferenceConfig, PreferenceTrainer
from rto.functional.preference import DPO


@pytest.fixture
def trainer(tiny_folder: Path, pairs: Dataset, tmp_path: Path) -> Callable[..., PreferenceTrainer]:
    def build(*, peft_config: Any = None, ref_model: Any = None, loss: Any = None, **kwargs: Any) -> PreferenceTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
        }
        config = PreferenceConfig(**settings | kwargs)
        return PreferenceTrainer(
            str(tiny_folder),
            config,
            train_dataset=pairs,
            eval_dataset=pairs,
            peft_config=peft_config,
            ref_model=ref_model,
            loss=loss,
        )

    return build


def gradient(run: PreferenceTrainer) -> torch.Tensor:
    batch = list(run.train_dataset)
    run.training_step(run.model, batch, run._get_num_items_in_batch([batch], torch.device("cpu")))
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def test_learns_the_pairs(trainer: Callable[..., PreferenceTrainer]) -> None:
    run = trainer(num_train_epochs=6)
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)  # π = π_ref: every margin is 0
    assert before["eval_margin"] == pytest.approx(0, abs=1e-5)
    run.train()
    after = run.evaluate()
    assert after["eval_accuracy"] == 1.0
    assert after["eval_loss"] < 0.3


def test_first_step_is_the_textbook_gradient(trainer: Callable[..., PreferenceTrainer], tiny_folder: Path) -> None:
    """∇loss at π = π_ref is −β/2 · mean ∇[log π(y_w|x) − log π(y_l|x)], a pair at a time by transformers' loss."""
    run = trainer(loss_kwargs={"beta": 0.3})
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for pair in run.train_dataset:
        for side, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            ids = torch.tensor([pair.prompt + side])
            labels = ids.clone()
            labels[:, : len(pair.prompt)] = -100
            nll = model(input_ids=ids, labels=labels).loss * len(side)
            (sign * 0.5 * 0.3 * nll / len(run.train_dataset)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient(run), expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_do_not_change_the_gradient(trainer: Callable[..., PreferenceTrainer]) -> None:
    whole, cut = (gradient(trainer(max_tokens_per_micro_batch=budget)) for budget in (10_000, 1))
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-6)


def test_accumulation_is_one_large_batch(trainer: Callable[..., PreferenceTrainer], tmp_path: Path) -> None:
    """4 × 4 pairs or 16 at once, the last batch of an epoch included: same weights."""
    finals = []
    for size, steps in ((16, 1), (4, 4)):
        run = trainer(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            output_dir=str(tmp_path / str(size)),
            num_train_epochs=2,
        )
        run.train()
        finals.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*finals, rtol=0, atol=1e-6)


def test_a_loss_object_is_the_seam(trainer: Callable[..., PreferenceTrainer]) -> None:
    by_name = gradient(trainer(loss_kwargs={"beta": 0.5, "label_smoothing": 0.1}))
    by_object = gradient(trainer(loss=DPO(beta=0.5, label_smoothing=0.1)))
    assert torch.equal(by_name, by_object)


def test_adapter_uses_its_base_as_reference(trainer: Callable[..., PreferenceTrainer], tiny_folder: Path) -> None:
    from peft import LoraConfig, PeftModel

    run = trainer(peft_config=LoraConfig(r=4, target_modules="all-linear"), num_train_epochs=4)
    assert run.reference is None
    assert run.evaluate()["eval_margin"] == pytest.approx(0, abs=1e-5)
    run.train()
    assert run.evaluate()["eval_margin"] > 0.1
    run.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run.args.output_dir)
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, run.model.policy.eval()(tokens).logits)


def test_resumes_bit_for_bit(trainer: Callable[..., PreferenceTrainer], tmp_path: Path) -> None:
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole = trainer(output_dir=str(tmp_path / "a"), **settings)
    whole.train()
    trainer(output_dir=str(tmp_path / "b"), **settings).train()
    for folder in (tmp_path / "b").glob("checkpoint-*"):
        if folder.name != "checkpoint-3":
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            folder.rmdir()
    again = trainer(output_dir=str(tmp_path / "b"), **settings)
    again.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)
    lines = [(tmp_path / run / "log.jsonl").read_text().split("\n")[:-1] for run in "ab"]
    steps = [[json.loads(line)["step"] for line in log] for log in lines]
    assert steps[0] == steps[1]


def test_evaluation_does_not_take_what_training_recorded(trainer: Callable[..., PreferenceTrainer]) -> None:
    run = trainer(logging_steps=2, eval_strategy="steps", eval_steps=1)
    run.train()
    evaluations = [row for row in run.state.log_history if "eval_loss" in row]
    training = [row for row in run.state.log_history if "accuracy" in row]
    assert [row["step"] for row in evaluations] == [1, 2]
    assert [row["step"] for row in training] == [2]
    assert not any("accuracy" in row for row in evaluations)
