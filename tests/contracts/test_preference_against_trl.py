"""The losses and gradients of TRL's trainers on a batch, and ours from the same models and rows."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer

from rto.batches import collate
from rto.data.formats import read_labelled, read_pairs
from rto.functional.preference import DPO, IPO, KTO, Completions, SimPO
from rto.models.actor import policy_logprobs

PAIRS = [
    {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " No, I will not do that."},
    {"prompt": "What is ab?", "chosen": " Two letters, abab.", "rejected": " ?"},
    {"prompt": "x", "chosen": "yes", "rejected": "nonono"},
]
LABELLED = [
    {"prompt": "Say hello.", "completion": " Hello!", "label": True},
    {"prompt": "What is ab?", "completion": " ?", "label": False},
    {"prompt": "x", "completion": "yes", "label": True},
    {"prompt": "Say bye.", "completion": " No, I will not do that.", "label": False},
    {"prompt": "yy", "completion": "z", "label": True},
]
# TRL 1.16 reads attributes that transformers 5.23 renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning"),
]


@pytest.fixture
def models(tiny_model):
    return tiny_model(seed=1), tiny_model(seed=2)


@pytest.fixture
def theirs(models, tokenizer, tmp_path):
    """Loss and gradients by one of TRL's trainers on one batch of all rows."""

    def run(trainer_type, config_type, rows, **kwargs):
        args = config_type(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(rows),
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=None,
            activation_checkpointing=False,
            disable_tqdm=True,
            **kwargs,
        )
        model, ref = models
        data = Dataset.from_list(rows)
        trainer = trainer_type(model=model, ref_model=ref, args=args, train_dataset=data, processing_class=tokenizer)
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
        model.zero_grad()
        return loss.item(), grads

    return run


def score(models, prompts, completions) -> Completions:
    batch = collate(prompts, completions, pad=0)
    logp = policy_logprobs(models[0], batch)
    with torch.no_grad():
        ref_logp = policy_logprobs(models[1], batch)
    return Completions(logp=logp, ref_logp=ref_logp, mask=batch.mask)


def score_pairs(models, tokenizer) -> tuple[Completions, Completions]:
    pairs, _ = read_pairs(Dataset.from_list(PAIRS), tokenizer, max_length=1000)
    prompts = [p.prompt for p in pairs]
    return score(models, prompts, [p.chosen for p in pairs]), score(models, prompts, [p.rejected for p in pairs])


def agree(model, ours, theirs) -> None:
    loss, grads = theirs
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-5, abs=1e-5)
    largest = max(g.abs().max() for g in grads.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-5 * float(largest))
    assert largest > 1e-3


@pytest.mark.parametrize("beta", [0.1, 0.02])
@pytest.mark.parametrize(("kind", "loss_type"), [(DPO, "sigmoid"), (IPO, "ipo")])
def test_losses_on_pairs(models, tokenizer, theirs, kind, loss_type, beta):
    expected = theirs(DPOTrainer, DPOConfig, PAIRS, beta=beta, loss_type=[loss_type])
    agree(models[0], kind(beta=beta)(*score_pairs(models, tokenizer)).loss.mean(), expected)


def test_label_smoothing(models, tokenizer, theirs):
    """TRL smooths in its "robust" loss only, where our loss is divided by 1 − 2ε and ε counts negatively."""
    beta, eps = 0.02, 0.25
    kwargs = {"loss_type": ["robust"], "label_smoothing": eps}
    expected = theirs(DPOTrainer, DPOConfig, PAIRS, beta=beta, **kwargs)
    sides = score_pairs(models, tokenizer)
    flipped = DPO(beta=beta)(*reversed(sides)).loss.mean()
    smooth = DPO(beta=beta, label_smoothing=eps)(*sides).loss.mean()
    agree(models[0], (smooth - 2 * eps * flipped) / (1 - 2 * eps), expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_kto(models, tokenizer, theirs, beta, weights):
    """TRL puts each completion behind the next row's prompt for its KL estimate; we are given the same ones here."""
    desirable, undesirable = weights
    kwargs = {"beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable}
    expected = theirs(KTOTrainer, KTOConfig, LABELLED, train_sampling_strategy="sequential", **kwargs)
    rows, _ = read_labelled(Dataset.from_list(LABELLED), tokenizer, max_length=1000)
    prompts, completions = [r.prompt for r in rows], [r.completion for r in rows]
    with torch.no_grad():
        kl = score(models, prompts, [completions[-1], *completions[:-1]]).logratio.mean()
    assert kl.abs() > 1e-2
    labels = torch.tensor([r.desirable for r in rows])
    agree(models[0], KTO(**kwargs)(score(models, prompts, completions), labels, kl).loss.mean(), expected)


@pytest.mark.parametrize(("beta", "gamma"), [(2.5, 0.5), (1.0, 0.0)])
def test_simpo_is_that_of_trls_cpo_trainer(models, tokenizer, beta, gamma):
    sides = score_pairs(models, tokenizer)
    means = [x.logprob / x.length for x in sides]
    settings = SimpleNamespace(
        loss_type="simpo",
        simpo_gamma=gamma,
        beta=beta,
        alpha=0.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected, chosen, rejected = CPOTrainer.cpo_loss(settings, *means)
    ours = SimPO(beta=beta, gamma=gamma)(*sides)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.chosen_reward, chosen, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.rejected_reward, rejected, rtol=1e-6, atol=1e-6)
