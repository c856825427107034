"""The whole method, stage by stage: sft → pairs → prefer → reward → train each method → evaluate → report.

A stage writes its folder and, when all of it is there, ``done.json``. A second run on the same folder passes over
what is done and resumes what is not from its last whole checkpoint.
"""

import gc
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from transformers import PreTrainedTokenizerBase, set_seed

from rto.data.chat import TEMPLATE_COLUMNS
from rto.data.formats import DataError, Prompt, load_rows, read_prompts
from rto.data.pieces import drawn
from rto.errors import make_folder, users_code, writing
from rto.evaluation.policies import Answers, answer, summary
from rto.files import alone, write_atomically
from rto.inspection.reading import spoken
from rto.models.actor import check_output_layer
from rto.models.loading import (
    check_weights,
    find_config,
    load_policy,
    load_scalar,
    load_tokenizer,
    max_positions,
    stop_at_eos,
)
from rto.recipe import Recipe, RecipeError, folder_of, is_function, resolve, saved_tree, stage_config
from rto.references import changed, digests
from rto.report.page import write_report
from rto.report.table import REWARD_MODEL, results_table
from rto.rollout.rewards import Completed, FunctionReward, RewardModel, function_name
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler
from rto.rollout.scoring import draw
from rto.rollout.token_rewards import TokenReward
from rto.stages import MODEL_FILES, digest_of, stage
from rto.terminal import Terminal
from rto.trainers.engine import processes, shared_out, wait_for_all
from rto.trainers.preference import PreferenceTrainer
from rto.trainers.prompts import with_room
from rto.trainers.rto import RTOTrainer
from rto.trainers.supervised import RewardTrainer, SFTTrainer
from rto.values import read_yaml, write_yaml

logger = logging.getLogger(__name__)
SHOWN = 16  # completions whose token rewards are kept for the heat-map
MAX_TOKENS = 2**15
SIDE_BY_SIDE = 512


def run(recipe: Recipe, output_dir: str | Path) -> Path:
    """Run what is not done yet, print the results, and return the path of the report.

    Raises:
        RecipeError: the folder holds a run of another recipe, or a model cannot be had.
        DataError: an input cannot be used.
    """
    pipeline = Pipeline(recipe, Path(output_dir), Terminal())
    if processes().is_main_process:
        make_folder(pipeline.folder, "--output_dir")
    with alone(pipeline.folder) if processes().is_main_process else nullcontext():
        pipeline.check()
        pipeline.claim()
        pipeline.sft()
        pipeline.pairs()
        for name in recipe.learners:
            pipeline.prefer(name)
        pipeline.reward()
        for name in recipe.methods:
            pipeline.train(name)
        return pipeline.evaluate()


@dataclass(frozen=True)
class Pipeline:
    """One run: a recipe and its folder."""

    recipe: Recipe
    folder: Path
    console: Console

    def check(self) -> None:
        """That every model and every file that a stage with work left reads can be had, before any work.

        Raises:
            RecipeError: a model cannot; the message names the key.
            DataError: rows cannot.
        """
        recipe = self.recipe
        learning = [*map(folder_of, recipe.learners), *(["reward"] if recipe.reward is not None else [])]
        models = {"model": (recipe.model, ["sft"])}
        if recipe.reward_model is not None and recipe.reward is not None:
            models["reward_model"] = (recipe.reward_model, ["reward"])
        rows = {
            "demonstrations": ["sft"] if recipe.sft is not None else [],
            "pair_prompts": ["pairs"] if recipe.data.pairs is None else [],
            "pairs": learning,
            "eval_pairs": learning,
            "prompts": [folder_of(name) for name in recipe.methods],
            "test_prompts": ["evaluation"],
        }
        for key, (source, stages) in models.items():
            if self._left(stages) and not is_function(source):
                find_config(key, source, **self._trust)
                check_weights(key, source)
        for key, stages in rows.items():
            found = getattr(recipe.data, key)
            if found is not None and self._left(stages) and not is_function(found.path):
                try:
                    found.load(recipe.seed)
                except DataError as error:
                    raise DataError(f"data.{key}: {error}") from error

    def _left(self, stages: list[str]) -> bool:
        return not all((self.folder / stage / "done.json").is_file() for stage in stages)

    def claim(self) -> None:
        """Make the folder this recipe's own.

        Raises:
            RecipeError: it is another's already; the message names the first key that differs.
        """
        saved, environment = self.folder / "recipe.yaml", self.folder / "environment.json"
        if saved.is_file():
            theirs, ours = saved_tree(saved), read_yaml(self.recipe.to_yaml())
            if theirs not in (ours, read_yaml(write_yaml(self.recipe.tree(resolved=True)))):  # it was saved resolved
                key = _first_difference(theirs, ours)
                raise RecipeError(
                    f"{self.folder} holds a run of another recipe ({key}): choose another --output_dir, or delete it"
                )
            if (
                environment.is_file()
                and (name := changed(json.loads(environment.read_text()), self.recipe.references)) is not None
            ):
                raise RecipeError(
                    f"{self.folder}: the environment variable {name}, which the recipe reads, was another when this "
                    "run began: set it back, or choose another --output_dir"
                )
        elif processes().is_main_process:
            make_folder(self.folder, "--output_dir")
            if self.recipe.references:
                write_atomically(environment, json.dumps(digests(self.recipe.references), indent=1))
            write_atomically(saved, self.recipe.to_yaml())
        wait_for_all()

    # --- stages

    def sft(self) -> None:
        """The starting policy: fine-tuned on demonstrations, or as it comes."""
        recipe = self.recipe
        with self._stage("sft", f"{recipe.start}: the starting policy") as folder:
            if folder is None:
                return
            set_seed(recipe.seed)
            model: Any = recipe.model
            if is_function(recipe.model):
                function = resolve(recipe.model, "model:")
                with users_code(recipe.model):
                    model, tokenizer = function(recipe.seed)
            else:
                tokenizer = load_tokenizer(recipe.model, **self._trust)
            if recipe.sft is None:
                start: Any = load_policy(model, **self._trust)
                _check_policy(start, tokenizer)
                if processes().is_main_process:
                    with writing(folder):
                        start.save_pretrained(folder)
                        tokenizer.save_pretrained(folder)
                return
            assert recipe.data.demonstrations is not None
            rows = recipe.data.demonstrations.load(recipe.seed)
            trainer = SFTTrainer(
                model,
                stage_config(recipe, "sft", folder),
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=recipe.lora(),
            )
            _check_policy(trainer.model, tokenizer)
            self._begin(trainer)
            trainer.train(resume_from_checkpoint=True)
            if recipe.peft is None:
                trainer.save_model()
                return
            # A whole model: the base that the adapters of all later stages share.
            merged: Any = trainer.accelerator.unwrap_model(trainer.model)
            if trainer.engine.sharded:
                trainer.save_model(str(folder / "adapter"))
                merged = load_policy(folder / "adapter", **self._trust) if trainer.args.should_save else None
            if trainer.args.should_save:
                merged = merged.merge_and_unload()
                stop_at_eos(merged, tokenizer)
                with writing(folder):
                    merged.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)

    def pairs(self) -> None:
        """Preference pairs: two completions of the starting policy for each prompt, labelled by the gold reward."""
        if self.recipe.data.pairs is not None:
            return
        with self._stage(
            "pairs", "pairs: two completions a prompt, labelled by Bradley–Terry on the gold reward"
        ) as folder:
            if folder is None:
                return
            recipe = self.recipe
            assert recipe.gold is not None
            assert recipe.data.pair_prompts is not None
            prompts, sides = self._complete_twice(recipe.data.pair_prompts.load(recipe.seed))
            if not processes().is_main_process:
                return
            scores = [scores_by(recipe.gold, side) for side in sides]
            gap = torch.tensor(scores[0], dtype=torch.float64) - torch.tensor(scores[1], dtype=torch.float64)
            draw = torch.rand(len(gap), generator=torch.Generator().manual_seed(recipe.seed), dtype=torch.float64)
            first = (draw < torch.sigmoid(gap / recipe.label_temperature)).tolist()
            lines = []
            for i, (prompt, a_wins) in enumerate(zip(prompts, first)):
                won, lost = sides if a_wins else sides[::-1]
                row = {"prompt": prompt.raw, "chosen": won.completions[i], "rejected": lost.completions[i]}
                row |= {"chosen_ended": won.ended[i], "rejected_ended": lost.ended[i]}
                row |= {name: prompt.columns[name] for name in TEMPLATE_COLUMNS if prompt.columns.get(name)}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            write_atomically(folder / "pairs.jsonl", "".join(lines))

    def prefer(self, name: str) -> None:
        """A direct preference learner, from the starting policy; with DPO it is π_dpo."""
        bootstrap = self.recipe.learners[name].get("bootstrap")
        with self._stage(folder_of(name), f"{name}: the policy that carries the token reward") as folder:
            if folder is None:
                return
            pairs = self._pairs()
            if bootstrap is not None:
                draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + bootstrap)
                pairs = pairs.select(torch.randint(len(pairs), (len(pairs),), generator=draw).tolist())
            trainer = PreferenceTrainer(
                str(self.folder / "sft"),
                stage_config(self.recipe, name, folder),
                train_dataset=pairs,
                eval_dataset=self._eval_pairs(),
                peft_config=self.recipe.lora(),
            )
            self._begin(trainer)
            trainer.train(resume_from_checkpoint=True)
            self._held_out(trainer, folder)
            trainer.save_model()

    def reward(self) -> None:
        """The sentence reward model, from the starting policy's backbone."""
        if self.recipe.reward is None:
            return
        with self._stage("reward", "reward model: one score a completion") as folder:
            if folder is None:
                return
            start = self.recipe.reward_model or str(self.folder / "sft")
            tokenizer = load_tokenizer(start, **self._trust)
            trainer = RewardTrainer(
                model=start,
                args=stage_config(self.recipe, "reward", folder),
                train_dataset=self._pairs(),
                eval_dataset=self._eval_pairs(),
                processing_class=tokenizer,
                peft_config=self.recipe.lora("SEQ_CLS") if self.recipe.reward_model is None else None,
            )
            self._begin(trainer)
            trainer.train(resume_from_checkpoint=True)
            self._held_out(trainer, folder)
            trainer.save_model()

    def train(self, name: str) -> None:
        """One on-line method, from the starting policy, on the same prompts as every other."""
        recipe = self.recipe
        with self._stage(folder_of(name), f"{name}: on-line, from the starting policy") as folder:
            if folder is None:
                return
            rewards: list[Any] = [
                str(self.folder / source) if source == "reward" else resolve(source) for source in recipe.rewards(name)
            ]
            learners: list[Any] = [str(self.folder / folder_of(learner)) for learner in recipe.token_rewards(name)]
            trainer = RTOTrainer(
                str(self.folder / "sft"),
                stage_config(recipe, name, folder),
                dpo_model=learners or None,
                reward_funcs=rewards,
                train_dataset=recipe.data.prompts.load(recipe.seed),
                peft_config=recipe.lora(),
            )
            self._begin(trainer)
            trainer.train(resume_from_checkpoint=True)
            trainer.save_model()

    def evaluate(self) -> Path:
        """Every policy on the same held-out prompts; the table and the report."""
        with self._stage("evaluation", "evaluation on held-out prompts") as folder:
            if folder is not None:
                self._evaluate(folder)
        report = self.folder / "report.html"
        if processes().is_main_process:
            report = write_report(self.folder)
            results = json.loads((self.folder / "evaluation" / "results.json").read_text(encoding="utf-8"))
            self.console.print(results_table(results))
            self.console.print(Text(f"report: {report}"))
        return report

    def measure(self, name: str, prompts: str) -> None:
        """What one policy wrote for ``test_prompts`` or ``validation_prompts``: a number a prompt, in its folder."""
        folder = self.folder / self.recipe.policies[name]
        path = folder / f"{prompts}.json"
        if path.is_file() or not processes().is_main_process:
            return
        examiner = self._examiner(prompts)
        found = examiner.answer(str(folder))
        completed = Completed.of(examiner.asked, found.completions, found.ended)
        logged = {f: scores_by(f, completed) for f in self.recipe.logged}
        shown = [{"prompt": spoken(x.raw), "completion": y} for x, y in zip(examiner.asked[:SHOWN], found.completions)]
        row = {"gold": found.gold, "kl": found.kl, "length": found.lengths, "ended": found.ended}
        write_atomically(path, json.dumps({**row, "logged": logged, "shown": shown}))

    def _evaluate(self, folder: Path) -> None:
        recipe = self.recipe
        examiner = self._examiner("test_prompts")
        raw = [prompt.raw for prompt in examiner.asked]
        methods: dict[str, Any] = {}

        def ask(where: str) -> Answers:
            found = examiner.answer(str(self.folder / where))
            return replace(found, samples=found.samples.to("cpu"))

        found = self._shared_out(list(recipe.policies.values()), ask, "sampling and judging")
        if not processes().is_main_process:
            return
        answers = dict(zip(recipe.policies, found))
        for name, where in recipe.policies.items():
            seconds = json.loads((self.folder / where / "done.json").read_text())["seconds"]
            methods[name] = summary(
                answers[name], None if name == recipe.start else answers[recipe.start], seconds, where
            )
        self._write_token_rewards(folder, raw, answers, examiner.tokenizer)
        lines = [
            {
                "prompt": spoken(prompt),
                "completions": {name: a.completions[i] for name, a in answers.items()},
                "gold": {name: a.gold[i] for name, a in answers.items()},
            }
            for i, prompt in enumerate(raw)
        ]
        _write_lines(folder / "completions.jsonl", lines)
        results = {"gold": examiner.judged_by, "baseline": recipe.start, "prompts": len(raw), "methods": methods}
        write_atomically(folder / "results.json", json.dumps(results, indent=1))

    def _examiner(self, prompts: str) -> "Examiner":
        """What every policy is asked, and how it is judged."""
        recipe, start = self.recipe, self.folder / "sft"
        tokenizer = load_tokenizer(start, **self._trust)
        reference = load_policy(str(start), **self._trust).eval().to(self._device)
        asked, _ = read_prompts(
            getattr(recipe.data, prompts).load(recipe.seed),
            tokenizer,
            max_length=_room(reference, recipe.completion_length),
            what=f"data.{prompts}",
        )
        if recipe.gold is None:
            scorer = self._scorer()
            asked, _ = with_room(asked, f"data.{prompts}", scorers=[scorer], completion=recipe.completion_length)
            judge, judged_by = _judge(scorer, asked), REWARD_MODEL
        else:
            gold = recipe.gold
            judge, judged_by = _judge(lambda y: scores_by(gold, y), asked), function_name(resolve(gold))
        sampling = SamplingConfig(
            max_completion_length=recipe.completion_length, temperature=recipe.evaluate_temperature
        )
        ids = [p.ids for p in asked]

        def ask(folder: str) -> Answers:
            policy = load_policy(folder, **self._trust).eval().to(self._device)
            seed = recipe.seed + 1_000_003
            return answer(policy, reference, tokenizer, ids, judge, sampling, seed=seed, max_tokens=MAX_TOKENS)

        return Examiner(answer=ask, asked=asked, tokenizer=tokenizer, judged_by=judged_by)

    def _write_token_rewards(
        self, folder: Path, raw: list[Any], answers: dict[str, Answers], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Log π_dpo/π_ref on the first completions of the last method, for the heat-map."""
        name = list(answers)[-1]
        rows = answers[name].samples.rows(torch.arange(min(SHOWN, len(raw)))).to(self._device)
        learner = next(iter(self.recipe.learners))
        source = TokenReward(str(self.folder / folder_of(learner)), str(self.folder / "sft"), **self._trust)
        source.to(self._device)
        ratios = source(rows)
        lines = []
        for i, (tokens, keep, ratio) in enumerate(zip(rows.responses, rows.mask, ratios)):
            ids = tokens[keep].tolist()
            row = {"method": name, "prompt": spoken(raw[i]), "gold": answers[name].gold[i]}
            lines.append({**row, "tokens": drawn(tokenizer, ids), "rewards": ratio[keep].tolist()})
        _write_lines(folder / "token_rewards.jsonl", lines)

    def _scorer(self) -> RewardModel:
        """The learned reward model: the judge where a task has no gold reward."""
        where = self.folder / "reward"
        model, tokenizer = load_scalar(str(where), **self._trust), load_tokenizer(where, **self._trust)
        return RewardModel(model.to(self._device), tokenizer, max_tokens=MAX_TOKENS)

    # --- help

    def _complete_twice(self, rows: Dataset) -> tuple[list[Prompt], list[Completed]]:
        """Prompts that fit, and two completions of each by the starting policy."""
        start = self.folder / "sft"
        tokenizer = load_tokenizer(start, **self._trust)
        policy = load_policy(str(start), **self._trust).to(self._device)
        length = self.recipe.completion_length
        prompts, _ = read_prompts(rows, tokenizer, max_length=_room(policy, length), what="data.pair_prompts")
        sampler = TransformersSampler.of(policy, tokenizer, SamplingConfig(max_completion_length=length))
        ids = [p.ids for p in prompts for _ in range(2)]

        def part(i: int) -> list[tuple[str, bool]]:
            seed = self.recipe.seed * 1_000_003 + i
            drawn = draw(sampler, policy, tokenizer, ids[i : i + SIDE_BY_SIDE], seed)
            return list(zip(drawn.texts, drawn.ended, strict=True))

        parts = self._shared_out(range(0, len(ids), SIDE_BY_SIDE), part, "sampling completions")
        drawn = [one for some in parts for one in some]
        sides = [Completed.of(prompts, *map(list, zip(*drawn[i::2]))) for i in range(2)]
        return prompts, sides

    def _shared_out(self, items: Sequence[Any], work: Callable[[Any], Any], title: str) -> list[Any]:
        """`shared_out` with the main process's own progress, which is about that of all."""
        bar = Progress(console=self.console, disable=not processes().is_main_process)
        task = bar.add_task(title, total=-(-len(items) // processes().num_processes))

        def watched(item: Any) -> Any:
            found = work(item)
            bar.advance(task)
            return found

        with bar:
            return shared_out(items, watched)

    def _pairs(self) -> Dataset:
        if self.recipe.data.pairs is not None:
            return self.recipe.data.pairs.load(self.recipe.seed)
        return load_rows(self.folder / "pairs" / "pairs.jsonl")

    def _eval_pairs(self) -> Dataset | None:
        held_out = self.recipe.data.eval_pairs
        return None if held_out is None else held_out.load(self.recipe.seed)

    def _held_out(self, trainer: Any, folder: Path) -> None:
        if self.recipe.data.eval_pairs is not None:
            write_atomically(folder / "held_out.json", json.dumps(trainer.evaluate(), indent=1))

    @contextmanager
    def _stage(self, name: str, title: str) -> Iterator[Path | None]:
        """The folder of a stage that has work left, or None; marks it done when the work is."""
        main = processes().is_main_process

        def tell(again: str | None) -> None:
            if again is None:
                self.console.print(Text(f"{title}: done", "dim"))
            else:
                self.console.print(Text.assemble((title, "bold"), f" (continues from {again})" if again else ""))

        with stage(self.folder / name, lambda: self._inputs(name), tell, main=main) as folder:
            wait_for_all()
            yield folder
            wait_for_all()
        wait_for_all()
        gc.collect()

    def _begin(self, trainer: Any) -> None:
        """A line of what a stage is about to do."""
        weights = list(trainer.model.parameters())
        trained, every = (sum(p.numel() for p in weights if p.requires_grad or of) for of in (False, True))
        learns = f"{every:,} weights" if trained == every else f"{trained:,} of {every:,} weights"
        self.console.print(Text(f"  {len(trainer.train_dataset):,} rows, {learns} learn", "dim"))

    def _inputs(self, name: str) -> dict[str, str | None]:
        """Digests of what a stage is made from: rows, models, and the stages before it."""
        recipe = self.recipe

        def rows(*keys: str) -> dict[str, str | None]:
            sources = {key: getattr(recipe.data, key) for key in keys}
            return {f"data.{key}": digest_of(x.path) for key, x in sources.items() if x and not is_function(x.path)}

        def model(source: str) -> str | None:
            return None if is_function(source) else digest_of(source, MODEL_FILES)

        def made(*stages: str) -> dict[str, str | None]:
            return {stage: digest_of(self.folder / stage, MODEL_FILES) for stage in stages}

        pairs = rows("pairs") or {"pairs": digest_of(self.folder / "pairs" / "pairs.jsonl")}
        reward = ["reward"] if recipe.reward is not None else []
        methods = {folder_of(method): method for method in recipe.methods}
        match name:
            case "sft":
                return {"model": model(recipe.model), **(rows("demonstrations") if recipe.sft is not None else {})}
            case "pairs":
                return {**made("sft"), **rows("pair_prompts")}
            case "reward":
                start = made("sft") if recipe.reward_model is None else {"reward_model": model(recipe.reward_model)}
                return {**start, **pairs, **rows("eval_pairs")}
            case "evaluation":
                return {**made(*recipe.policies.values(), *reward), **rows("test_prompts")}
            case method if method in methods:
                learners = map(folder_of, recipe.token_rewards(methods[method]))
                return {**made("sft", *reward, *learners), **rows("prompts")}
        return {**made("sft"), **pairs, **rows("eval_pairs")}

    @property
    def _trust(self) -> dict[str, Any]:
        """For everything that is loaded here rather than by a trainer."""
        return {"trust_remote_code": self.recipe.trust_remote_code}

    @property
    def _device(self) -> torch.device:
        return processes().device


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Held-out prompts and their judge, the same for every policy."""

    answer: Callable[[str], Answers]
    """Of the policy in a folder."""
    asked: list[Prompt]
    tokenizer: PreTrainedTokenizerBase
    judged_by: str


def scores_by(function: str, completed: Completed) -> list[float]:
    """What a recipe's ``module:function`` gives completions, checked like every reward function's scores.

    Raises:
        ValueError: the function returns another number of scores, or one that is not finite.
    """
    return FunctionReward(resolve(function))(completed)


def _judge(
    scores: Callable[[Completed], list[float]], asked: list[Prompt]
) -> Callable[[list[str], list[bool]], list[float]]:
    """What scores the answers to some prompts."""
    return lambda texts, ended: scores(Completed.of(asked, texts, ended))


def _check_policy(policy: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """What the later stages will do with a policy, tried before hours are spent on it."""
    check_output_layer(policy)
    TransformersSampler.of(policy, tokenizer, SamplingConfig())


def _room(policy: Any, completion_length: int) -> int:
    context = max_positions(policy)
    return 2**31 if context is None else context - completion_length


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _first_difference(theirs: Any, ours: Any, key: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*theirs, *ours]:
            if theirs.get(name) != ours.get(name):
                return _first_difference(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
    return f"{key} is {theirs!r} there and {ours!r} here"
