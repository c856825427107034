"""Which preference learner gives the best token-wise reward? Rank correlation with a known credit, learner by learner.

    python experiments/token_credit.py embedded --seeds 3
    RTO_DATA=../shared/data python experiments/token_credit.py stories --seeds 3

For each seed: one starting policy, one set of sampled pairs labelled by Bradley-Terry on the gold, and on them every
learner of `rto prefer`. Each learner has the same tuning budget: four settings (three learning rates and one other
value of its own parameter), judged by the accuracy of its summed token reward on validation pairs of a seed that is
not reported. Token rewards are then compared, word by word and within completions of test pairs, with two truths:

- paid: where the gold is paid out (the embedded task's spans; a word's rating in the stories);
- advantage: E[gold | up to and with this word] - E[gold | before it] under the starting policy, by Monte Carlo: the
  credit of the decision rather than the place of payment.

Writes docs/results/token_credit_TASK.json and prints the table of docs/token-rewards.md.
"""

import argparse
import functools
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.utils import logging as hf_logging

from rto import PreferenceConfig, PreferenceTrainer
from rto.batches import Sequences
from rto.data.formats import Pair, load_rows, read_pairs
from rto.files import write_atomically
from rto.inspection.reading import Inspector
from rto.inspection.statistics import (
    RewardedPair,
    Span,
    by_word,
    credit_of_words,
    report_on_credit,
    report_on_pairs,
    words,
)
from rto.models.actor import hidden_states
from rto.models.loading import eos_ids, load_policy, load_scalar, load_tokenizer, scalar_head
from rto.pipeline import Pipeline
from rto.recipe import load_recipe, resolve
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.token_rewards import MeanLogProb, TokenReward, token_source

ROOT = Path(__file__).resolve().parents[1]
TUNING_SEED = 1000
MODELS_IN_ENSEMBLE = 3


@dataclass(frozen=True)
class Task:
    """Where pairs, gold and credit come from."""

    recipe: Path | None
    overrides: dict[str, Any]
    train: int
    held_out: int
    credit: str
    rates: tuple[float, float, float]
    rolled_out: int
    """Completions whose advantage is estimated."""
    rollouts: int
    """Continuations of each prefix."""


TASKS = {
    "embedded": Task(None, {}, 1500, 250, "rto.demo.embedded:gold_credit", (3e-5, 1e-4, 3e-4), 48, 32),
    "stories": Task(
        ROOT / "recipes" / "stories" / "run.yaml",
        {},
        2000,
        500,
        "experiments.token_credit:rating_spans",
        (3e-5, 1e-4, 3e-4),
        48,
        32,
    ),
}


@dataclass(frozen=True)
class Learner:
    """A loss, and the other setting that its tuning budget buys."""

    loss: str
    kwargs: dict[str, float]
    other: dict[str, float]


LEARNERS = {
    "DPO": Learner("dpo", {"beta": 0.1}, {"beta": 0.5}),
    "IPO": Learner("ipo", {"beta": 0.1}, {"beta": 1.0}),
    "KTO": Learner("kto", {"beta": 0.1}, {"beta": 0.5}),
    "SimPO": Learner("simpo", {"beta": 2.5, "gamma": 0.5}, {"beta": 10.0, "gamma": 2.0}),
    "R-DPO": Learner("rdpo", {"beta": 0.1, "alpha": 0.001}, {"beta": 0.1, "alpha": 0.02}),
    "TDPO": Learner("tdpo", {"beta": 0.1, "alpha": 0.2}, {"beta": 0.1, "alpha": 0.5}),
    "TDPO1": Learner("tdpo1", {"beta": 0.1}, {"beta": 0.5}),
}


def settings_of(learner: Learner, rates: Sequence[float]) -> list[dict[str, Any]]:
    """The four settings of its tuning budget."""
    own = [{"learning_rate": rate, "loss_kwargs": learner.kwargs} for rate in rates]
    return [*own, {"learning_rate": rates[1], "loss_kwargs": learner.other}]


def rating_spans(prompts: list[str], completions: list[str], **columns: Any) -> list[list[Span]]:
    """The rated words of completions."""
    import re

    from experiments.stories import ratings

    table = ratings()
    return [
        [(m.start(), m.end(), table[m[0]]) for m in re.finditer(r"[a-z']+", text.lower()) if m[0] in table]
        for text in completions
    ]


# --- one seed


@dataclass
class Seed:
    """Everything that the learners of one seed share."""

    task: Task
    folder: Path
    train: Dataset
    validation: list[Pair]
    test: list[Pair]
    rows: Dataset
    gold: Callable[..., list[float]]
    completion_length: int
    tokenizer: Any

    @property
    def start(self) -> str:
        return str(self.folder / "sft")


def prepare(name: str, seed: int, runs: Path) -> Seed:
    """SFT, pairs and reward model by the pipeline; pairs beyond those for training are held out."""
    task = TASKS[name]
    rows = task.train + 2 * task.held_out
    recipe = load_recipe(task.recipe, {"seed": seed, "data.pair_prompts.rows": rows, **task.overrides})
    folder = runs / name / f"seed-{seed}"
    from rich.console import Console

    pipeline = Pipeline(recipe, folder, Console())
    pipeline.claim()
    pipeline.sft()
    pipeline.pairs()
    every = load_rows(folder / "pairs" / "pairs.jsonl")
    train = every.select(range(task.train))
    train.to_json(folder / "train_pairs.jsonl")
    tokenizer = load_tokenizer(folder / "sft")
    pairs, _ = read_pairs(every, tokenizer, max_length=512)
    first, last = task.train, task.train + task.held_out
    return Seed(
        task=task,
        folder=folder,
        train=train,
        validation=[p for p in pairs if first <= p.row < last],
        test=[p for p in pairs if p.row >= last],
        rows=every,
        gold=resolve(str(recipe.gold)),
        completion_length=recipe.completion_length,
        tokenizer=tokenizer,
    )


def train(seed: Seed, folder: Path, loss: str, settings: dict[str, Any], order: int = 0) -> str:
    """A policy of one learner; ``order`` is the seed of its data order."""
    if not (folder / "config.json").is_file():
        trainer = PreferenceTrainer(
            seed.start,
            PreferenceConfig(
                output_dir=str(folder),
                loss=loss,
                per_device_train_batch_size=32,
                num_train_epochs=1,
                seed=order,
                report_to="none",
                save_strategy="no",
                logging_steps=20,
                disable_tqdm=True,
                max_length=512,
                ref_cache_dir=str(seed.folder / "reference"),
                dataloader_pin_memory=False,
                **settings,
            ),
            train_dataset=seed.train,
        )
        trainer.train()
        trainer.save_model()
    return str(folder)


def rewarded(seed: Seed, source: Any, pairs: list[Pair]) -> list[RewardedPair]:
    """Token rewards of held-out pairs."""
    return Inspector(source, seed.tokenizer).pairs(pairs, seed.rows)


class ScoreDifference:
    """A sentence reward model read at every token: r_t = s(x, y_≤t) − s(x, y_<t). It was trained at the last only."""

    def __init__(self, model: str) -> None:
        self.model = load_scalar(model, new_head=False).eval()

    def to(self, device: Any) -> "ScoreDifference":
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, sequences: Sequences, *, ref_logp: Any = None, completed: Any = None) -> torch.Tensor:
        scores = scalar_head(self.model)(hidden_states(self.model, sequences)).squeeze(-1)
        rewards = scores.diff(dim=1)[:, -sequences.mask.shape[1] :]
        return torch.where(sequences.mask, rewards, 0.0)


class Noise:
    """Independent normal numbers: what chance looks like in this table."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def to(self, device: Any) -> "Noise":
        return self

    def __call__(self, sequences: Sequences, *, ref_logp: Any = None, completed: Any = None) -> torch.Tensor:
        return torch.randn(sequences.mask.shape, generator=self.generator) * sequences.mask


# --- the truths


def paid(seed: Seed, pairs: list[RewardedPair]) -> list[np.ndarray]:
    """Word by word, where the gold is paid out."""
    sides = [(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    texts = ["".join(side.pieces) for _, side in sides]
    spans = resolve(seed.task.credit)(prompts=[prompt for prompt, _ in sides], completions=texts)
    return [credit_of_words(side.pieces, words(side.pieces), s) for (_, side), s in zip(sides, spans)]


def advantages(seed: Seed, pairs: list[RewardedPair], tokens: list[Pair]) -> list[np.ndarray]:
    """Word by word, how much the expected gold moves; kept in a file, since every learner is compared with it."""
    path = seed.folder / "advantages.json"
    if not path.is_file():
        write_atomically(path, json.dumps([a.tolist() for a in _advantages(seed, pairs, tokens)]))
    return [np.array(a) for a in json.loads(path.read_text())]


@torch.no_grad()
def _advantages(seed: Seed, pairs: list[RewardedPair], tokens: list[Pair]) -> list[np.ndarray]:
    policy, tokenizer, k = load_policy(seed.start).eval(), seed.tokenizer, seed.task.rollouts
    prefixes: dict[int, list[tuple[int, int, str, list[int], list[int]]]] = {}
    values: list[np.ndarray] = []
    for pair, ids in zip(pairs, tokens):
        for side, completion in ((pair.chosen, ids.chosen), (pair.rejected, ids.rejected)):
            groups = words(side.pieces)
            cuts = [0, *(group[-1] + 1 for group in groups)]
            value = np.zeros(len(cuts))
            value[-1] = seed.gold(prompts=[pair.prompt], completions=["".join(side.pieces)])[0]
            for at, cut in enumerate(cuts[:-1]):
                prefixes.setdefault(cut, []).append((len(values), at, pair.prompt, ids.prompt, completion[:cut]))
            values.append(value)
    for cut, rows in sorted(prefixes.items()):
        config = SamplingConfig(max_completion_length=max(seed.completion_length - cut, 1))
        sampler = TransformersSampler(config=config, eos_ids=eos_ids(policy, tokenizer), pad_id=tokenizer.pad_token_id)
        drawn = sampler(policy, [x + y for *_, x, y in rows for _ in range(k)], seed=cut)
        ends = [row[keep].tolist() for row, keep in zip(drawn.responses, drawn.mask)]
        whole = [y + end for (*_, y), some in zip(rows, _chunks(ends, k)) for end in some]
        texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
        golds = np.array(seed.gold(prompts=[x for _, _, x, *_ in rows for _ in range(k)], completions=texts))
        for (i, at, *_), mean in zip(rows, golds.reshape(-1, k).mean(1)):
            values[i][at] = mean
    return [np.diff(value) for value in values]


def _chunks(x: list[Any], size: int) -> list[list[Any]]:
    return [x[i : i + size] for i in range(0, len(x), size)]


def measure(seed: Seed, source: Any, beta: float) -> dict[str, Any]:
    """A source beside both truths, and what `rto inspect` says of it."""
    pairs = rewarded(seed, source, seed.test)
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    by_words = [by_word(side.rewards, words(side.pieces)) for side in sides]
    few = seed.task.rolled_out // 2
    report = report_on_pairs(pairs, beta=beta, clip=1.0)
    clipped = [by_word(side.rewards.clip(-1, 1), words(side.pieces)) for side in sides]
    truth = paid(seed, pairs)
    moved = advantages(seed, pairs[:few], seed.test[:few])
    return {
        "accuracy": report.accuracy.rate,
        "controlled_accuracy": report.length.controlled.mean,
        "fitted_beta": report.calibration.fitted_beta,
        "last_token": report.carried["last token"].reward,
        "punctuation": report.carried["punctuation"].reward,
        "clipped_tokens": report.clipping.fraction if report.clipping else None,
        "clipped_accuracy": report.clipping.accuracy.rate if report.clipping else None,
        "paid": asdict(report_on_credit(by_words, truth)),
        "paid_after_clip": asdict(report_on_credit(clipped, truth)),
        "advantage": asdict(report_on_credit(by_words[: 2 * few], moved)),
    }


# --- the study


def tune(name: str, runs: Path) -> dict[str, dict[str, Any]]:
    """The setting of each learner with the best validation accuracy on the tuning seed."""
    path = runs / name / "tuned.json"
    if path.is_file():
        return json.loads(path.read_text())
    seed = prepare(name, TUNING_SEED, runs)
    chosen: dict[str, dict[str, Any]] = {}
    for label, learner in LEARNERS.items():
        scores = []
        options = settings_of(learner, seed.task.rates)
        for i, settings in enumerate(options):
            model = train(seed, seed.folder / "tuning" / f"{learner.loss}-{i}", learner.loss, settings)
            pairs = rewarded(seed, TokenReward(model, seed.start), seed.validation)
            scores.append(report_on_pairs(pairs, beta=0.1, clip=None).accuracy.rate)
            gc.collect()
        best = int(np.argmax(scores))
        chosen[label] = {"settings": options[best], "accuracies": scores, "options": options}
        print(
            f"{name} tuned {label}: {options[best]} at {scores[best]:.3f} of {np.round(scores, 3).tolist()}",
            flush=True,
        )
    write_atomically(path, json.dumps(chosen, indent=1))
    return chosen


def study(name: str, number: int, runs: Path, tuned: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every source on one seed."""
    seed = prepare(name, number, runs)
    path = seed.folder / "measured.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def keep(label: str, make: Callable[[], Any], beta: float) -> None:
        if label not in found:
            found[label] = measure(seed, make(), beta)
            write_atomically(path, json.dumps(found))
            gc.collect()
            rank, moved = found[label]["paid"]["rank"], found[label]["advantage"]["rank"]
            print(
                f"{name} seed {number} {label}: accuracy {found[label]['accuracy']:.3f}, rank {rank['mean']:.3f} "
                f"(paid), {moved['mean']:.3f} (advantage)",
                flush=True,
            )

    keep("noise", lambda: Noise(number), 0.1)
    for label, learner in LEARNERS.items():
        settings = tuned[label]["settings"]
        where = seed.folder / "models" / learner.loss
        model = functools.partial(train, seed, where, learner.loss, settings, number)
        keep(label, lambda model=model: TokenReward(model(), seed.start), settings["loss_kwargs"]["beta"])
        if label == "SimPO":
            keep("SimPO, no reference", lambda model=model: MeanLogProb(model()), settings["loss_kwargs"]["beta"])
    settings = tuned["DPO"]["settings"]

    def members() -> list[str]:
        others = range(1, MODELS_IN_ENSEMBLE)
        more = [train(seed, seed.folder / "models" / f"dpo-{i}", "dpo", settings, 100 * i + number) for i in others]
        return [str(seed.folder / "models" / "dpo"), *more]

    keep("DPO x 3", lambda: token_source(members(), seed.start), 0.1)
    keep("DPO x 3, pessimistic", lambda: token_source(members(), seed.start, pessimism=1.0), 0.1)
    keep("reward model, differences", lambda: ScoreDifference(reward_model(name, number, runs)), 1.0)
    return found


def reward_model(name: str, number: int, runs: Path) -> str:
    """A sentence reward model from the same training pairs."""
    task, folder = TASKS[name], runs / name / f"seed-{number}"
    overrides = {"seed": number, "data.pair_prompts": None, "data.pairs": {"path": str(folder / "train_pairs.jsonl")}}
    recipe = load_recipe(task.recipe, {**overrides, **task.overrides})
    from rich.console import Console

    pipeline = Pipeline(recipe, folder / "rm", Console())
    (folder / "rm").mkdir(exist_ok=True)
    if not (folder / "rm" / "sft").exists():
        (folder / "rm" / "sft").symlink_to(folder.resolve() / "sft")
    pipeline.reward()
    return str(folder / "rm" / "reward")


def interval(x: Sequence[float]) -> str:
    """Mean over seeds with a 95 % interval (t)."""
    from scipy import stats

    y = np.array([v for v in x if v is not None and np.isfinite(v)])
    if len(y) < 2:
        return f"{y.mean():.3f}" if len(y) else "–"
    return f"{y.mean():.3f} ± {stats.t.ppf(0.975, len(y) - 1) * y.std(ddof=1) / np.sqrt(len(y)):.3f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "pair accuracy": lambda r: r["accuracy"],
    "rank, paid": lambda r: r["paid"]["rank"]["mean"],
    "concordance, paid": lambda r: r["paid"]["concordance"]["mean"],
    "rank, advantage": lambda r: r["advantage"]["rank"]["mean"],
    "concordance, advantage": lambda r: r["advantage"]["concordance"]["mean"],
    "rank of sums": lambda r: r["paid"]["total"],
    "last token": lambda r: r["last_token"],
    "clipped at 1": lambda r: r["clipped_tokens"],
}


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown: one row a source, mean over seeds with 95 % intervals."""
    lines = [f"| token reward | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label in measured[0]:
        cells = [interval([column(seed[label]) for seed in measured]) for column in COLUMNS.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines.append("")
    for key in ("rank, paid", "rank, advantage"):
        column = COLUMNS[key]
        for label in measured[0]:
            if label not in ("DPO", "noise"):
                gap = [column(seed[label]) - column(seed["DPO"]) for seed in measured]
                lines.append(f"{key}, {label} - DPO, paired by seed: {interval(gap)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/token_credit"))
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    tuned = tune(args.task, args.runs)
    measured = [study(args.task, seed, args.runs, tuned) for seed in range(args.seeds)]
    out = ROOT / "docs" / "results" / f"token_credit_{args.task}.json"
    write_atomically(out, json.dumps({"tuned": tuned, "seeds": measured}, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
