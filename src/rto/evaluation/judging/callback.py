"""Win rate during training: held-out prompts answered by the policy as it is, judged against a baseline's answers."""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from rto.data.formats import DataError, Prompt, read_prompts
from rto.evaluation.benchmarks.answers import batch_seed, batches, draw, weights_digest
from rto.evaluation.benchmarks.formats import read_answers
from rto.evaluation.benchmarks.types import Battle, Contest, Question
from rto.evaluation.judging.judges import Judge, ScoreJudge, hold, unread
from rto.evaluation.statistics.estimates import Estimate, wilson
from rto.files import Row, check_settings, parse_json, shown, write_atomically
from rto.models.actor import Actor
from rto.models.loading import Source, freeze, load_policy, max_positions, source_name, unwrap_peft
from rto.rollout.rewards import RewardFunc, RewardModel, reward_source
from rto.rollout.samplers.base import Sampler, SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.trainers.checkpoints import SealedCheckpoints
from rto.trainers.engine import unwrapped
from rto.trainers.logs import keep_lines

logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")


class WinRateCallback(TrainerCallback):
    """At every evaluation of a trainer, the win rate of its policy against a baseline, with its interval.

    It runs when the trainer evaluates (``eval_strategy``, ``eval_steps``, ``eval_on_start``) and adds its numbers to
    the trainer's own metrics, so ``metric_for_best_model="win_rate"``, ``save_strategy="best"``,
    ``load_best_model_at_end`` and `transformers.EarlyStoppingCallback` (added after this one) work with them.

    Both sides answer with the same seeds, which pairs them: a policy that has not moved draws with its own start on
    every prompt. Training is left as it was: random streams, train and eval modes, gradients. Processes share the
    prompts in fixed batches, so the numbers do not depend on how many there are; process 0 judges.

    Logged, with the prefix ``eval_NAME``: the win rate; ``_se`` (s / √n); ``_low`` and ``_high``, Wilson's 95 %
    interval; ``_judged`` and ``_unread`` prompts; ``_length``, mean tokens; and with a reward as judge ``_score`` and
    ``_score_se``. Completions, both sides, go to
    ``output_dir/NAME/completions.jsonl``, the baseline's answers to ``output_dir/NAME/baseline.json``.

    Args:
        trainer: trains a causal language model: any trainer here, or TRL's.
        prompts: held-out prompts in TRL's prompt-only format; other columns are handed to reward functions.
        judge: a `Judge`, or a reward (folder, hub id, model, Python function).
        baseline: a folder, hub id or model; an AlpacaEval answers file; None: the policy that training starts from.
        judge_tokenizer: of a reward model given as an object.
        sampling: how both sides answer; None asks the trainer's arguments, or samples at temperature 1.
        sampler: draws completions; None decodes with transformers.
        batch_size: prompts answered side by side.
        seed: of sampling, and of the order in which a judge sees both sides.
        name: of the metrics and the folder.

    Raises:
        DataError: no prompt can be used, or a baseline file lacks an answer.
        ValueError: the trainer trains no policy, or is none of these and cuts it over processes; when training or
            evaluation begins, another `WinRateCallback` of the trainer has this name.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Dataset,
        judge: Judge | RewardFunc,
        *,
        baseline: Source | None = None,
        judge_tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: SamplingConfig | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 32,
        seed: int = 0,
        name: str = "win_rate",
    ) -> None:
        if trainer.is_fsdp_enabled and not isinstance(trainer, SealedCheckpoints):
            raise ValueError(
                f"a win rate under FSDP needs a trainer of rto's, which gathers its policy: {type(trainer).__name__} "
                "does not"
            )
        self.trainer, self.baseline, self.seed, self.name = trainer, baseline, seed, name
        self.tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        policy, tokenizer = self._policy(), self.tokenizer
        if unwrap_peft(policy).get_output_embeddings() is None:
            raise ValueError(f"{type(trainer).__name__} trains no policy: {type(policy).__name__} writes no text")
        own = getattr(trainer.args, "sampling", None)
        self.sampling = sampling or (own() if callable(own) else SamplingConfig())
        self.sampler: Sampler = sampler or TransformersSampler.of(policy, tokenizer, self.sampling)
        room = (max_positions(policy) or 2**31) - self.sampling.max_completion_length
        self.prompts, _ = read_prompts(prompts, tokenizer, max_length=room, what="prompts")
        self.batches = batches([p.ids for p in self.prompts], batch_size)
        self._trust = {"trust_remote_code": bool(getattr(trainer.args, "trust_remote_code", False))}
        self.judge = _judge(judge, judge_tokenizer, trainer.args.device, self._trust)
        self._baseline: list[Row] | None = None
        self._settings: Row = {
            "prompts": hashlib.sha256(json.dumps([p.ids for p in self.prompts]).encode()).hexdigest()[:16],
            "sampling": asdict(self.sampling),
            "batch_size": batch_size,
            "seed": seed,
            "baseline": _identity(baseline),
        }

    @property
    def folder(self) -> Path:
        """Where completions and the baseline's answers are."""
        return Path(str(self.trainer.args.output_dir)) / self.name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take down the baseline's answers before the first update, or take them up again."""
        self._check_name()
        callbacks = self.trainer.callback_handler.callbacks
        if any(isinstance(c, EarlyStoppingCallback) for c in callbacks[: callbacks.index(self)]):
            raise ValueError(
                "add EarlyStoppingCallback after WinRateCallback: it could not see the win rate before it"
            )
        if args.eval_strategy == IntervalStrategy.NO:
            logger.warning("eval_strategy is 'no': no win rate will be measured during training")
        begun = state.global_step
        self._on_main(lambda: keep_lines(self.folder / "completions.jsonl", lambda row: 0 < begun >= row["step"]))
        if begun == 0 and self.baseline is None:
            self._keep(self._answers(self._policy()))
        else:
            self._recall(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Answer, judge, log, and add the numbers to the trainer's metrics."""
        self._check_name()
        if self._baseline is None:
            self._recall(state)
        answers = self._answers(self._policy())
        found = self._on_main(lambda: self._judged(answers, state.global_step))
        if metrics is not None:
            metrics.update(found)
        Trainer.log(self.trainer, dict(found))  # subclasses would mix in what training has recorded

    def _check_name(self) -> None:
        """Two win rates of one name would be one: the second judge's numbers and files in place of the first's."""
        callbacks = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, WinRateCallback)]
        if sum(c.name == self.name for c in callbacks) > 1:
            raise ValueError(f"two WinRateCallbacks are called {self.name!r}: give each a name of its own, name=…")

    # --- answers

    def _policy(self) -> nn.Module:
        model = unwrapped(self.trainer.accelerator, self.trainer.model)
        return model.policy if isinstance(model, Actor) else model

    def _whole(self, model: nn.Module) -> AbstractContextManager[None]:
        engine = getattr(self.trainer, "engine", None)
        if engine is None:
            return nullcontext()
        engine.ready(self.trainer.model)
        return engine.whole(model)

    def _answers(self, model: nn.Module) -> list[Row]:
        """One answer a prompt, in the order of the prompts, on every process."""
        ids, accelerator = [p.ids for p in self.prompts], self.trainer.accelerator
        mine: list[Row] = []

        def work() -> list[Row]:
            with undisturbed(model), accelerator.autocast():
                for k, batch in enumerate(self.batches):
                    if k % accelerator.num_processes == accelerator.process_index:
                        mine.extend(draw(model, self.tokenizer, self.sampler, ids, batch, batch_seed(self.seed, k)))
            return mine

        with self._whole(model):  # gathered once for all answers; processes may have different numbers of them
            rows, error = _attempt(work)
        if accelerator.num_processes > 1:  # everybody hears of an error, so nobody waits for ever
            shares = gather_object([(rows or [], None if error is None else repr(error))])
            rows = [row for share, _ in shares for row in share]
            failed = [text for _, text in shares if text is not None]
            if failed and error is None:
                raise RuntimeError(f"another process could not answer: {failed[0]}")
        if error is not None:
            raise error
        return sorted(rows or [], key=lambda row: row["index"])

    def _on_main(self, work: Callable[[], _Found]) -> _Found:
        """What process 0 finds, on every process."""
        accelerator = self.trainer.accelerator
        found, error = _attempt(work) if accelerator.is_main_process else (None, None)
        if accelerator.num_processes > 1:
            box = [(found, None if error is None else repr(error))]
            found, told = broadcast_object_list(box, from_process=0)[0]
            if told is not None and error is None:
                raise RuntimeError(f"process 0 could not judge: {told}")
        if error is not None:
            raise error
        return found  # type: ignore[return-value]

    # --- the baseline

    def _keep(self, answers: list[Row]) -> None:
        self._baseline = answers

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(
                self.folder / "baseline.json", json.dumps({"settings": self._settings, "answers": answers}, indent=1)
            )

        self._on_main(write)

    def _recall(self, state: TrainerState) -> None:
        """The baseline's answers: from its file, from its model, or those that the first start of this run kept."""
        if isinstance(self.baseline, str | Path) and Path(self.baseline).suffix in (".json", ".jsonl"):
            self._baseline = self._from_file(Path(self.baseline))
        elif self.baseline is not None:
            with undisturbed(self._policy()):
                model = freeze(load_policy(self.baseline, **self._trust))
            if (engine := getattr(self.trainer, "engine", None)) is not None:
                engine.lay_out(model)
            else:
                model.to(self.trainer.args.device)
            self._keep(self._answers(model))
        else:
            self._baseline = self._on_main(lambda: self._kept(state.global_step))

    def _kept(self, step: int) -> list[Row]:
        path = self.folder / "baseline.json"
        if not path.is_file():
            raise DataError(
                f"{path} is missing, and at step {step} the policy that training started from is not there to answer "
                "again: give it as baseline"
            )
        kept = parse_json(path.read_text(encoding="utf-8"))
        check_settings(path, kept["settings"], self._settings)
        return kept["answers"]

    def _from_file(self, path: Path) -> list[Row]:
        known = {instruction: output for (instruction, _), output in read_answers(path).texts.items()}
        rows = []
        for i, prompt in enumerate(self.prompts):
            if _text(prompt) not in known:
                raise DataError(f"{path}: no answer to prompt {i}, {shown(_text(prompt))}")
            rows.append({"index": i, "text": known[_text(prompt)]})
        return rows

    # --- judging

    def _judged(self, answers: list[Row], step: int) -> dict[str, float]:
        assert self._baseline is not None
        battles = [
            Battle(question=_question(prompt, i), baseline=b["text"], answer=a["text"], columns=prompt.columns)
            for i, (prompt, a, b) in enumerate(zip(self.prompts, answers, self._baseline, strict=True))
        ]
        with undisturbed():
            contests = hold(self.judge, battles, seed=self.seed)
        self._write(contests, step)
        wins = [c.preference - 1 for c in contests if c.preference is not None]
        if not wins:
            reasons = dict(unread(contests))
            raise ValueError(f"judge {self.judge.name} could be read on none of {len(contests)} prompts: {reasons}")
        rate = Estimate.of(wins)
        low, high = wilson(rate.mean, len(wins))
        found = {
            "": rate.mean,
            "_se": rate.se,
            "_low": low,
            "_high": high,
            "_judged": float(len(wins)),
            "_unread": float(len(contests) - len(wins)),
            "_length": float(np.mean([row["tokens"] for row in answers])),
        }
        if isinstance(self.judge, ScoreJudge):
            scores = Estimate.of([c.games[0].said[0 if c.switched[0] else 1] for c in contests])
            found |= {"_score": scores.mean, "_score_se": scores.se}
        return {f"eval_{self.name}{key}": value for key, value in found.items()}

    def _write(self, contests: Sequence[Contest], step: int) -> None:
        """The table of completions; a step measured again, after a resume, replaces itself and what followed."""
        path = self.folder / "completions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_lines(path, lambda row: row["step"] < step)
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [
            {
                "step": step,
                "prompt": c.battle.question.messages or c.battle.question.text,
                "completion": c.battle.answer,
                "baseline": c.battle.baseline,
                "preference": c.preference,
                "switched": c.switched,
                "judge": [{"said": g.said, "unread": g.reason} for g in c.games],
            }
            for c in contests
        ]
        write_atomically(path, kept + "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def undisturbed(model: nn.Module | None = None) -> Iterator[None]:
    """Put back random streams, and the train or eval mode of every module, however the work inside ends."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    plain, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (what libraries draw from)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, training in modes:
            module.training = training


def _attempt(work: Callable[[], _Found]) -> tuple[_Found | None, Exception | None]:
    """A result or the error, which the caller raises once every process knows of it."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _judge(
    judge: Judge | RewardFunc, tokenizer: PreTrainedTokenizerBase | None, device: torch.device, trust: dict[str, bool]
) -> Judge:
    if isinstance(judge, Judge) and not isinstance(judge, nn.Module):
        return judge
    source = reward_source(judge, tokenizer, max_tokens=2**14, **trust)
    if isinstance(source, RewardModel):
        source.model.to(device)
    return ScoreJudge(source)


def _identity(baseline: Source | None) -> str:
    """What tells a baseline from another one in a kept file."""
    if baseline is None:
        return "the starting policy"
    name = source_name(baseline)
    digest = weights_digest(Path(name)) if not isinstance(baseline, nn.Module) else None
    return name if digest is None else f"{name} {digest}"


def _question(prompt: Prompt, i: int) -> Question:
    messages = None if isinstance(prompt.raw, str) else list(prompt.raw)
    return Question(key=(str(i), 0), text=_text(prompt), messages=messages)


def _text(prompt: Prompt) -> str:
    """A prompt as text: itself, the only user message, or all messages with their roles."""
    if isinstance(prompt.raw, str):
        return prompt.raw
    if len(prompt.raw) == 1:
        return str(prompt.raw[0]["content"])
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt.raw)
