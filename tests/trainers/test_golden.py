"""The fast paths change no number: a fixed run beside its textbook form, and beside what it gave when it was written.

The textbook form is one row at a time, every position's logits, `log_softmax` and autograd: no micro-batches, no rows
moved to the left, no cuts of the vocabulary, no gradient of our own, no critic apart from the policy.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto.batches import Samples
from rto.trainers.rto import RTOTrainer

BETA1, BETA2, CLIP, EPSILON, LAMBDA, RATE = 0.5, 0.1, 1.0, 0.2, 0.95, 0.05
ROLLOUTS, PARTS = 8, 2
GOLDEN = {
    "loss/policy": [-0.00707315, 0.01126608, -0.00056364],
    "loss/value": [1.42528255, 1.61127572, 1.24129723],
    "kl": [0.0, -0.13239806, 0.13106824],
    "return": [-3.05795764, -3.54364728, -3.03371315],
    "entropy": [4.39106533, 4.38317879, 4.42537747],
    "grad_norm/policy": [3.37402471, 3.59945356, 4.34560835],
}
"""By iteration: the textbook form in float64."""
WITHIN = {"loss/policy": 1e-6, "loss/value": 2e-6}
"""Losses, over the kernels of several processors; sums over a completion and norms 1e-5, the default below."""


@pytest.fixture
def run(trainer: Callable[..., RTOTrainer], reward_folder: Any) -> tuple[RTOTrainer, list[Samples], list[list[float]]]:
    """Three iterations by the trainer, in small micro-batches; what was sampled, and how it was scored."""
    drawn: list[Samples] = []
    scored: list[list[float]] = []

    def score(completions: list[str], **columns: Any) -> list[float]:
        scored.append([completion.count("b") + 0.1 * len(completion) for completion in completions])
        return scored[-1]

    done = trainer(
        dpo_coef=BETA1,
        kl_coef=BETA2,
        token_reward_clip=CLIP,
        reward_funcs=score,
        value_model=str(reward_folder),
        per_device_train_batch_size=ROLLOUTS,
        num_mini_batches=PARTS,
        total_episodes=3 * ROLLOUTS,
        max_tokens_per_micro_batch=40,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=RATE,
        value_learning_rate=RATE,
        max_grad_norm=1.0,
        max_completion_length=12,
    )
    sampler = done.sampler

    def recorded(*args: Any) -> Samples:
        drawn.append(sampler(*args))
        return drawn[-1]

    done.sampler = recorded
    done.train()
    return done, drawn, scored


def logged(trainer: RTOTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss/policy" in row]


def textbook(
    trainer: RTOTrainer, drawn: list[Samples], scored: list[list[float]], folders: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The same run by the formulas: what it logs, and the policy's weights at its end."""
    policy, reference, dpo = (
        AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64) for name in ("start", "start", "dpo")
    )
    critic = AutoModelForSequenceClassification.from_pretrained(folders["value"], num_labels=1, dtype=torch.float64)

    def rows(samples: Samples) -> list[tuple[torch.Tensor, int]]:
        whole = [
            torch.cat([x[: samples.prompt_mask.shape[1]][keep], y[written]])
            for x, keep, y, written in zip(samples.tokens, samples.prompt_mask, samples.responses, samples.mask)
        ]
        return list(zip(whole, samples.prompt_mask.sum(1).tolist()))

    def logits(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        return model(input_ids=ids[None]).logits[0, prompt - 1 : -1]

    def logp(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        return logits(model, ids, prompt).log_softmax(-1).gather(-1, ids[prompt:, None])[:, 0]

    def values(ids: torch.Tensor, prompt: int) -> torch.Tensor:
        return critic.score(critic.model(input_ids=ids[None]).last_hidden_state)[0, prompt - 1 : -1, 0]

    found = []
    for iteration, samples in enumerate(drawn):
        batch = rows(samples)
        advantages, returns, kls, totals, entropies = [], [], [], [], []
        with torch.no_grad():
            old = [logp(policy, *row) for row in batch]
            before = [values(*row) for row in batch]
            for row, own, v, score in zip(batch, old, before, scored[iteration]):
                ref = logp(reference, *row)
                r = BETA1 * (logp(dpo, *row) - ref).clamp(-CLIP, CLIP) - BETA2 * (own - ref)
                r[-1] += score
                following, gae = torch.cat([v[1:], v.new_zeros(1)]), []
                for delta in (r + following - v).flip(0):
                    gae.append(delta + (LAMBDA * gae[-1] if gae else 0.0))
                advantages.append(torch.stack(gae).flip(0))
                returns.append(advantages[-1] + v)
                kls.append((own - ref).sum())
                totals.append(r.sum())
                p = logits(policy, *row).softmax(-1)
                entropies.append(-(p * p.log()).sum(-1))
        flat = torch.cat(advantages)
        mean, deviation = flat.mean(), flat.var(correction=0).add(1e-8).sqrt()
        advantages = [(a - mean) / deviation for a in advantages]
        logs: dict[str, list[torch.Tensor]] = {"loss/policy": [], "loss/value": [], "grad_norm/policy": []}
        order = torch.randperm(ROLLOUTS, generator=torch.Generator().manual_seed(trainer._seed(iteration)))
        for part in order.chunk(PARTS):
            ratio = torch.cat([(logp(policy, *batch[i]) - old[i]).exp() for i in part])
            a = torch.cat([advantages[i] for i in part])
            loss = -torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a).mean()
            v, was, target = (
                torch.cat(x) for x in zip(*[(values(*batch[i]), before[i], returns[i]) for i in part], strict=True)
            )
            bounded = was + (v - was).clamp(-EPSILON, EPSILON)
            value = 0.5 * torch.maximum((v - target).square(), (bounded - target).square()).mean()
            (loss + value).backward()
            logs["loss/policy"].append(loss.detach())
            logs["loss/value"].append(value.detach())
            logs["grad_norm/policy"].append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            for parameter in (*policy.parameters(), *critic.parameters()):
                parameter.data -= RATE * parameter.grad
                parameter.grad = None
        means = {name: float(torch.stack(x).mean()) for name, x in logs.items()}
        means |= {"kl": float(torch.stack(kls).mean()), "return": float(torch.stack(totals).mean())}
        found.append({**means, "entropy": float(torch.cat(entropies).mean())})
    return found, policy.state_dict()


def test_a_run_is_its_textbook_form(run: Any, tiny_folder: Any, dpo_folder: Any, reward_folder: Any) -> None:
    trainer, drawn, scored = run
    folders = {"start": tiny_folder, "dpo": dpo_folder, "value": reward_folder}
    expected, weights = textbook(trainer, drawn, scored, folders)
    for row, theirs in zip(logged(trainer), expected, strict=True):
        for name, value in theirs.items():
            assert row[name] == pytest.approx(value, abs=WITHIN.get(name, 1e-5)), name
    for name, parameter in trainer.model.policy.state_dict().items():
        torch.testing.assert_close(parameter.double(), weights[name], rtol=0, atol=1e-6)


def test_a_run_gives_what_it_gave(run: Any) -> None:
    found = {name: [row[name] for row in logged(run[0])] for name in GOLDEN}
    assert found == {name: pytest.approx(values, abs=WITHIN.get(name, 1e-5)) for name, values in GOLDEN.items()}
