"""The loss of a batch by TRL's DPOTrainer, from the same models and rows."""

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rto.batches import PairBatch, collate
from rto.data.formats import read_pairs
from rto.functional.preference import DPO, Completions
from rto.models.actor import policy_outputs

ROWS = [
    {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " No, I will not do that."},
    {"prompt": "What is ab?", "chosen": " Two letters, abab.", "rejected": " ?"},
    {"prompt": "x", "chosen": "yes", "rejected": "nonono"},
]


# TRL 1.16 reads attributes that transformers 5.23 renamed
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.02, 0.0), (0.02, 0.25)])
def test_loss_and_gradient_are_trls(tiny_model, tokenizer, tmp_path, beta, smoothing):
    model, ref = tiny_model(seed=1), tiny_model(seed=2)
    data = Dataset.from_list(ROWS)
    # TRL smooths labels in its "robust" loss only, where our loss is divided by 1 − 2ε and ε counts negatively
    kind = {"loss_type": ["robust"], "label_smoothing": smoothing} if smoothing else {}
    args = DPOConfig(
        output_dir=str(tmp_path),
        beta=beta,
        per_device_train_batch_size=len(ROWS),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None,
        activation_checkpointing=False,
        disable_tqdm=True,
        **kind,
    )
    trainer = DPOTrainer(model=model, ref_model=ref, args=args, train_dataset=data, processing_class=tokenizer)
    theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    theirs.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    pairs, _ = read_pairs(data, tokenizer, max_length=1000)
    prompts = [p.prompt for p in pairs]
    batch = PairBatch(
        chosen=collate(prompts, [p.chosen for p in pairs], pad=0),
        rejected=collate(prompts, [p.rejected for p in pairs], pad=0),
    ).stacked()
    model.zero_grad()
    logp = policy_outputs(model, batch)[0]
    with torch.no_grad():
        ref_logp = policy_outputs(ref, batch)[0]
    sides = [
        Completions(logp=a, ref_logp=b, mask=m) for a, b, m in zip(*(x.chunk(2) for x in (logp, ref_logp, batch.mask)))
    ]
    ours = DPO(beta=beta)(*sides).loss.mean()
    if smoothing:  # −[(1−ε) log σ(h) − ε log σ(−h)] / (1 − 2ε), from −log σ(±h)
        flipped = DPO(beta=beta)(*reversed(sides)).loss.mean()
        smooth = DPO(beta=beta, label_smoothing=smoothing)(*sides).loss.mean()
        assert smooth.item() == pytest.approx(((1 - smoothing) * ours + smoothing * flipped).item(), rel=1e-6)
        ours = (smooth - 2 * smoothing * flipped) / (1 - 2 * smoothing)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5)
