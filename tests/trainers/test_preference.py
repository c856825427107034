"""The preference trainer: it learns, its gradient does not depend on cuts, its reference stays."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto import PreferenceConfig, PreferenceTrainer
from rto.data.formats import DataError
from rto.functional.preference import DPO, LOSSES
from rto.trainers.examples import Example, mismatch


@pytest.fixture
def trainer(tiny_folder: Path, pairs: Dataset, tmp_path: Path) -> Callable[..., PreferenceTrainer]:
    def build(
        *,
        model: Any = None,
        peft_config: Any = None,
        ref_model: Any = None,
        loss: Any = None,
        data: Any = None,
        **kwargs: Any,
    ) -> PreferenceTrainer:
        kwargs |= {"loss": loss} if isinstance(loss, str) else {}
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
            model or str(tiny_folder),
            config,
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
            train_dataset=data or pairs,
            eval_dataset=data or pairs,
            peft_config=peft_config,
            ref_model=ref_model,
            loss=None if isinstance(loss, str) else loss,
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
        for side, sign in zip(pair.completions, (1, -1), strict=True):
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


# --- every loss


SIDES = ("chosen", "rejected")


@pytest.fixture
def labelled(pairs: Dataset) -> Dataset:
    """The pairs' completions one by one, in TRL's unpaired format."""
    rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"} for p in pairs for side in SIDES]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("adapter", [False, True], ids=["whole model", "adapter"])
def test_every_loss_learns_the_pairs(trainer: Callable[..., PreferenceTrainer], loss: str, adapter: bool) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=8, target_modules="all-linear") if adapter else None
    run = trainer(loss=loss, peft_config=config, num_train_epochs=8)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_accuracy"] == 1.0
    assert after["eval_margin"] > 3 * after["eval_margin_se"] > 0
    assert after["eval_pairs"] == len(run.eval_dataset)


@pytest.mark.parametrize("loss", LOSSES)
def test_swapped_pairs_are_the_other_sides_preferred(
    trainer: Callable[..., PreferenceTrainer], pairs: Dataset, loss: str
) -> None:
    turned = Dataset.from_list([{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs])
    ours, theirs = trainer(loss=loss, swap_pairs=True), trainer(loss=loss, data=turned)
    assert [e.completions for e in ours.train_dataset] == [e.completions for e in theirs.train_dataset]
    assert torch.equal(gradient(ours), gradient(theirs))


def test_swapped_labels_are_the_other_ones(trainer: Callable[..., PreferenceTrainer], labelled: Dataset) -> None:
    ours, theirs = (trainer(loss="kto", data=labelled, swap_pairs=swap) for swap in (True, False))
    assert [e.labels for e in ours.train_dataset] == [tuple(not x for x in e.labels) for e in theirs.train_dataset]


def test_kto_learns_from_labels_one_by_one(trainer: Callable[..., PreferenceTrainer], labelled: Dataset) -> None:
    run = trainer(loss="kto", data=labelled, num_train_epochs=8)
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(0.5, abs=1e-5)  # σ(0) on both sides
    assert before["eval_completions"] == len(labelled)
    run.train()
    after = run.evaluate()
    assert after["eval_accuracy"] == 1.0
    assert after["eval_reward/chosen"] > 0 > after["eval_reward/rejected"]
    assert "eval_margin" not in after  # nobody is anybody's other side
    assert all("kl" in row for row in run.state.log_history if "margin" in row)


def test_kto_on_pairs_is_kto_on_their_sides(
    trainer: Callable[..., PreferenceTrainer], labelled: Dataset, tmp_path: Path
) -> None:
    """Where z₀ is the same (π = π_ref: 0), the gradient of a pair is the mean of its sides'."""
    paired, single = (trainer(loss="kto", data=data) for data in (None, labelled))
    torch.testing.assert_close(gradient(paired), gradient(single), rtol=1e-4, atol=1e-7)


def test_z0_is_the_mean_log_ratio_of_mismatched_completions(trainer: Callable[..., PreferenceTrainer]) -> None:
    """By hand from the two models, a completion at a time; cuts change nothing."""
    run = trainer(loss="kto", precompute_ref_log_probs=False, learning_rate=3e-2, max_tokens_per_micro_batch=40)
    run.train()
    examples = run.train_dataset
    ratios = []
    for example in examples:
        for ids in example.mismatched:
            tokens = torch.tensor([example.prompt + ids])
            labels = tokens.clone()
            labels[:, : len(example.prompt)] = -100
            with torch.no_grad():
                ours, ref = (m(input_ids=tokens, labels=labels).loss for m in (run.model.policy, run.reference))
            ratios.append((ref - ours).item() * len(ids))
    expected = sum(ratios) / len(ratios)
    assert abs(expected) > 1e-2
    assert run._kl(run.model, examples).item() == pytest.approx(expected, rel=1e-4)


def test_partners_answer_another_prompt_and_fit() -> None:
    """Neighbours share a prompt, as in a file of pairs taken apart; a long completion fits behind few prompts."""
    examples = [
        Example(prompt=[1] * (1 + i // 2), completions=([100 + i] * (9 if i == 0 else 2),), labels=(i % 2 == 0,))
        for i in range(20)
    ]
    answered = {e.completions[0][0]: e.prompt for e in examples}
    matched = mismatch(examples, max_length=12, what="data")
    assert matched == mismatch(examples, max_length=12, what="data")
    for example in matched:
        (partner,) = example.mismatched
        assert answered[partner[0]] != example.prompt
        assert len(example.prompt) + len(partner) <= 12
    assert len({e.mismatched[0][0] for e in matched}) > 10


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("adapter", [False, True], ids=["whole model", "adapter on the output layer"])
def test_tdpo_compares_whole_distributions(
    trainer: Callable[..., PreferenceTrainer], tiny_folder: Path, adapter: bool
) -> None:
    """TDPO1's loss and gradient on one batch, from full softmaxes of both models."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"]) if adapter else None
    run = trainer(loss="tdpo1", loss_kwargs={"beta": 0.3}, peft_config=config, max_tokens_per_micro_batch=50)
    run.train()  # away from π_ref
    examples, policy = run.train_dataset, run.model.policy
    ref = AutoModelForCausalLM.from_pretrained(tiny_folder)
    run.model.zero_grad()
    ours = run.training_step(run.model, examples, torch.tensor(float(len(examples))))
    grads = [p.grad.clone() for p in policy.parameters() if p.requires_grad]

    run.model.zero_grad()
    total = torch.zeros(())
    for example in examples:
        margin = torch.zeros(())
        for ids, sign in zip(example.completions, (1, -1)):
            tokens, start = torch.tensor([example.prompt + ids]), len(example.prompt)
            q = policy(tokens).logits[0, start - 1 : -1].log_softmax(-1)
            with torch.no_grad():
                p = ref(tokens).logits[0, start - 1 : -1].log_softmax(-1)
            at = torch.arange(len(ids)), torch.tensor(ids)
            margin = margin + sign * 0.3 * ((q[at] - p[at]).sum() + (p.exp() * (p - q)).sum())
        total = total - torch.nn.functional.logsigmoid(margin) / len(examples)
    total.backward()
    assert ours.item() == pytest.approx(total.item(), rel=1e-5)
    assert total.item() < math.log(2) - 1e-3
    for a, p in zip(grads, [p for p in policy.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-5)


# --- π_ref's numbers, once


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole model", "adapter"])
def test_precomputed_reference_changes_no_step(
    trainer: Callable[..., PreferenceTrainer], tmp_path: Path, loss: str, adapter: bool
) -> None:
    from peft import LoraConfig

    finals = []
    for before in (True, False):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear") if adapter else None
        run = trainer(
            loss=loss,
            peft_config=config,
            precompute_ref_log_probs=before,
            optim="sgd",
            num_train_epochs=2,
            output_dir=str(tmp_path / str(before)),
        )
        assert (run.reference is None) == (before or adapter)
        run.train()
        finals.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*finals, rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [True, False], ids=["read beforehand", "kept"])
def test_an_adapter_that_came_with_the_model_belongs_to_the_reference(
    trainer: Callable[..., PreferenceTrainer], tiny_folder: Path, before: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
    run = trainer(model=adapted, precompute_ref_log_probs=before)
    assert run.evaluate()["eval_margin"] == pytest.approx(0, abs=1e-5)
    run.train()
    assert run.evaluate()["eval_margin"] > 0.05


def test_reference_is_read_once_for_the_same_model_and_data(
    trainer: Callable[..., PreferenceTrainer], dpo_folder: Path, pairs: Dataset, tmp_path: Path, monkeypatch: Any
) -> None:
    reads = []
    read = PreferenceTrainer._read_by_reference
    monkeypatch.setattr(
        PreferenceTrainer, "_read_by_reference", lambda *args: (reads.append(args[-1]), read(*args))[1]
    )
    cache = {"ref_cache_dir": str(tmp_path / "cache")}
    first = trainer(**cache)
    assert len(reads) == 1  # training and held-out pairs are the same here
    again = trainer(output_dir=str(tmp_path / "other"), loss="ipo", **cache)
    assert len(reads) == 1
    for a, b in zip(first.train_dataset, again.train_dataset):
        assert all(map(torch.equal, a.ref_logp, b.ref_logp))
    trainer(ref_model=str(dpo_folder), **cache)
    assert len(reads) == 2
    trainer(data=pairs.select(range(8)), **cache)
    assert len(reads) == 3
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_new_data_after_the_reference_is_gone_is_an_error(
    trainer: Callable[..., PreferenceTrainer], pairs: Dataset
) -> None:
    with pytest.raises(ValueError, match=r"π_ref has been let go .* precompute_ref_log_probs=False"):
        trainer().evaluate(pairs.select(range(4)))
    assert "eval_loss" in trainer(precompute_ref_log_probs=False).evaluate(pairs.select(range(4)))
    assert "eval_loss" in trainer(loss="simpo").evaluate(pairs.select(range(4)))


# --- data that cannot be used


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b", "label": True}] * 2, "every label is True: a preference needs"),
        ([{"prompt": "a", "completion": "b"}], "has no column 'chosen', 'rejected'; it has 'prompt', 'completion'"),
        ([{"completion": "b", "label": True}], "has no column 'prompt'; it has 'completion', 'label'"),
        (
            [{"prompt": "a", "completion": "b", "label": None}, {"prompt": "a", "completion": "b", "label": 7}],
            r"2 of 2 rows left out: 1 without a label \(first: row 0\); 1 with a label that is neither true nor false",
        ),
        (
            [{"prompt": "a", "completion": c, "label": c == "b"} for c in "bc"],
            "no completion of another prompt fits behind prompt 0",
        ),
    ],
)
def test_unusable_labels(trainer: Callable[..., PreferenceTrainer], rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        trainer(loss="kto", data=Dataset.from_list(rows))


def test_unlabelled_rows_are_counted(trainer: Callable[..., PreferenceTrainer], labelled: Dataset) -> None:
    extra = [
        {"prompt": "a", "completion": "b", "label": None},
        {"prompt": "a", "completion": " ", "label": True},
        {"prompt": "", "completion": "b", "label": False},
    ]
    run = trainer(loss="kto", data=Dataset.from_list([*labelled, *extra]))
    assert len(run.train_dataset) == len(labelled)
    assert dict(run.skipped["train"].counts) == {
        "without a label": 1,
        "with an empty completion": 1,
        "with an empty prompt": 1,
    }
