"""The whole method, stage by stage: sft → (pairs → prefer → reward → train each method) × rounds → evaluate → report.

In a later round pairs are written by the policies of the round before and labelled; learners and reward model learn
anew, from the start, from all pairs so far; each method goes on from its own policy against the first reference.

A stage writes its folder and, when all of it is there, ``done.json``. A second run on the same folder passes over
what is done and resumes what is not from its last whole checkpoint.
"""

import gc
import json
import logging
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from transformers import PreTrainedTokenizerBase, set_seed

from rto.data.formats import DataError, Prompt, load_rows, read_prompts
from rto.data.pieces import drawn
from rto.errors import make_folder, users_code, writing
from rto.evaluation.policies import Answers, answer, summary
from rto.files import alone, read_rows, read_whole, write_atomically
from rto.inspection.reading import spoken
from rto.labels import (
    Label,
    SampledPair,
    by_gold,
    by_judge,
    by_person,
    cost_of,
    counts,
    distinct,
    judge_of,
    labelled,
    read_sampled,
    write_questions,
    write_sampled,
)
from rto.models.actor import check_output_layer
from rto.models.loading import (
    check_weights,
    find_config,
    load_policy,
    load_scalar,
    load_tokenizer,
    max_positions,
)
from rto.recipe import Recipe, RecipeError, is_function, part, resolve, saved_tree, stage_config, stage_folder
from rto.references import changed, digests
from rto.report.folder import continued
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
from rto.trainers.logs import beginning
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
        pipeline.tell_where()
        pipeline.sft()
        for k in range(1, recipe.rounds + 1):
            pipeline.pairs(k)
            for name in recipe.learners:
                pipeline.prefer(name, k)
            pipeline.reward(k)
            for name in recipe.methods:
                pipeline.train(name, k)
        return pipeline.evaluate()


@dataclass(frozen=True)
class Pipeline:
    """One run: a recipe and its folder. Rounds count from 1: ``k``."""

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
        learning = self._in_rounds(*recipe.learners, *(["reward"] if recipe.reward is not None else []))
        models = {"model": (recipe.model, ["sft"])}
        if recipe.reward_model is not None and recipe.reward is not None:
            models["reward_model"] = (recipe.reward_model, self._in_rounds("reward"))
        rows = {
            "demonstrations": ["sft"] if recipe.sft is not None else [],
            "pair_prompts": [stage_folder("pairs", k) for k in recipe.sampled],
            "pairs": learning,
            "eval_pairs": learning,
            "prompts": self._in_rounds(*recipe.methods),
            "test_prompts": ["evaluation"],
        }
        for key, (source, stages) in models.items():
            if self._left(stages) and not is_function(source):
                find_config(key, source, **self._trust)
                check_weights(key, source)
        for key, stages in rows.items():
            found = getattr(recipe.data, key)
            if found is not None and self._left(stages) and not is_function(found.path):
                recipe.data.load(key, recipe.seed)

    def _in_rounds(self, *names: str) -> list[str]:
        return [stage_folder(name, k) for k in range(1, self.recipe.rounds + 1) for name in names]

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
                    f"{self._labels_go_along(theirs, ours)}"
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

    def _labels_go_along(self, theirs: Any, ours: Any) -> str:
        """What can be done for a run that is asked for another number of rounds: rounds share prompts and labels."""
        pairs = self.folder / "pairs" / "pairs.jsonl"
        if theirs.get("rounds") == ours.get("rounds") or not pairs.is_file():
            return ""
        return f"; rounds share prompts, so none is added to these: --data.pairs.path {pairs} takes their labels along"

    def tell_where(self) -> None:
        """Where to look while stages run."""
        if self._left(["evaluation"]):
            self.console.print(Text(f"to see it in a browser: rto watch {shlex.quote(str(self.folder))}", "dim"))

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
            else:  # a whole model: the base that the adapters of all later stages share
                with writing(folder):
                    trainer.save_merged(folder)

    def pairs(self, k: int = 1) -> None:
        """Preference pairs: two completions of a policy for each prompt, and the label of who is asked.

        Raises:
            LabelsMissingError: a person is asked, and has not labelled all of them yet.
        """
        recipe = self.recipe
        if k not in recipe.sampled:
            return
        asked = {
            "gold": "labelled by Bradley–Terry on the gold reward",
            "judge": "labelled by a judge, in both orders",
            "person": "labelled by a person",
        }
        title = f"{self._named('pairs', k)}: two completions a prompt, {asked[recipe.labels.by]}"
        name = stage_folder("pairs", k)
        with self._stage(name, title) as folder:
            if folder is None:
                return
            kept, left = self._to_label(folder, k)
            if recipe.labels.by == "person":
                labels = self._by_person(kept, k)  # by every process: all of them stop where labels are missing
            if not processes().is_main_process:
                return
            cost: dict[str, Any] = {}
            if recipe.labels.by == "gold":
                assert recipe.gold is not None
                score, seed = partial(scores_by, recipe.gold), recipe.seed_of(k)
                labels = by_gold(kept, score, temperature=recipe.label_temperature, seed=seed)
            elif recipe.labels.by == "judge":
                labels, cost = self._by_judge(kept)
            more: dict[str, Any] = {"round": k} if recipe.rounds > 1 else {}
            rows = labelled(kept, labels, lambda pair: more | ({"policy": pair.policy} if more else {}))
            if recipe.counted:
                became = counts(left, labels)
                self.console.print(Text(f"  {_became(became)}", "dim"))
                if not rows:
                    raise DataError(f"{folder}: no pair has a better side ({_became(became)}): nothing can be learned")
                write_atomically(folder / "counts.json", json.dumps({"round": k, **became, **cost}, indent=1))
            _write_lines(folder / "pairs.jsonl", rows)

    def prefer(self, name: str, k: int = 1) -> None:
        """A direct preference learner, from the starting policy; with DPO it is π_dpo."""
        bootstrap = self.recipe.learners[name].get("bootstrap")
        title = f"{self._named(name, k)}: the policy that carries the token reward"
        with self._stage(stage_folder(name, k), title) as folder:
            if folder is None:
                return
            pairs = self._pairs(k)
            if bootstrap is not None:
                draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + bootstrap)
                at = torch.randint(len(pairs), (len(pairs),), generator=draw).tolist()
                pairs = pairs.select(at) if isinstance(pairs, Dataset) else [pairs[i] for i in at]
            trainer = PreferenceTrainer(
                str(self.folder / "sft"),
                stage_config(self.recipe, name, folder, k),
                train_dataset=pairs,
                eval_dataset=self._eval_pairs(),
                peft_config=self.recipe.lora("SEQ_CLS" if self.recipe.has_scalar_head(name) else "CAUSAL_LM"),
            )
            self._begin(trainer)
            trainer.train(resume_from_checkpoint=True)
            self._held_out(trainer, folder)
            trainer.save_model()

    def reward(self, k: int = 1) -> None:
        """The sentence reward model, from the starting policy's backbone."""
        if self.recipe.reward is None:
            return
        title = f"{self._named('reward model', k)}: one score a completion"
        with self._stage(stage_folder("reward", k), title) as folder:
            if folder is None:
                return
            start = self.recipe.reward_model or str(self.folder / "sft")
            tokenizer = load_tokenizer(start, **self._trust)
            trainer = RewardTrainer(
                model=start,
                args=stage_config(self.recipe, "reward", folder, k),
                train_dataset=self._pairs(k),
                eval_dataset=self._eval_pairs(),
                processing_class=tokenizer,
                peft_config=self.recipe.lora("SEQ_CLS") if self.recipe.reward_model is None else None,
            )
            self._begin(trainer)
            trainer.train(resume_from_checkpoint=True)
            self._held_out(trainer, folder)
            trainer.save_model()

    def train(self, name: str, k: int = 1) -> None:
        """One on-line method, from the starting policy, on the same prompts as every other.

        In a later round it goes on from its own policy; reference and critic's start are found as in the first.
        """
        recipe = self.recipe
        start = "sft" if k == 1 else stage_folder(name, k - 1)
        begins = "from the starting policy" if k == 1 else "from its own policy"
        with self._stage(stage_folder(name, k), f"{self._named(name, k)}: on-line, {begins}") as folder:
            if folder is None:
                return
            scorer = str(self.folder / stage_folder("reward", k))
            rewards: list[Any] = [scorer if source == "reward" else resolve(source) for source in recipe.rewards(name)]
            learners = [str(self.folder / stage_folder(learner, k)) for learner in recipe.token_rewards(name)]
            compared = recipe.token_reference(name)
            prompts = part(recipe.data.prompts.load(recipe.seed), range(1, recipe.rounds + 1), k)
            trainer = RTOTrainer(
                str(self.folder / start),
                stage_config(recipe, name, folder, k),
                dpo_model=[*learners] or None,
                dpo_ref_model=None if compared is None else str(self.folder / stage_folder(compared, k)),
                ref_model=None if k == 1 else str(self.folder / "sft"),
                reward_funcs=rewards,
                train_dataset=prompts,
                peft_config=recipe.lora() if k == 1 else None,
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
            baseline = None if name == recipe.start else answers[recipe.start]
            methods[name] = summary(answers[name], baseline, self.seconds(where), where)
            if recipe.rounds > 1:
                methods[name] |= self.used(where)
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
        learner = next((n for n in self.recipe.learners if not self.recipe.has_scalar_head(n)), None)
        if learner is None:
            return
        where = self.folder / stage_folder(learner, self.recipe.rounds)
        source = TokenReward(str(where), str(self.folder / "sft"), **self._trust)
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
        where = self.folder / stage_folder("reward", self.recipe.rounds)
        model, tokenizer = load_scalar(str(where), **self._trust), load_tokenizer(where, **self._trust)
        return RewardModel(model.to(self._device), tokenizer, max_tokens=MAX_TOKENS)

    # --- help

    def _to_label(self, folder: Path, k: int) -> tuple[list[SampledPair], Counter[str]]:
        """The pairs of a round that labels are asked for, and how many others there are, on every process.

        Where labels take long, pairs are kept in the stage's folder until it is done.
        """
        recipe, path = self.recipe, folder / "sampled.jsonl"
        kept_there = recipe.labels.by != "gold"
        inputs = self._inputs(stage_folder("pairs", k))
        inputs.pop("labels", None)
        if kept_there and (found := read_sampled(path, inputs)) is not None:
            return found
        sampled = self._complete_twice(k)
        left: Counter[str] = Counter()
        if recipe.counted:
            sampled, left = distinct(sampled, self._pairs(k - 1) if k > 1 else ())
        if kept_there:
            if processes().is_main_process:
                write_sampled(sampled, left, path, inputs)
            wait_for_all()
            return read_sampled(path, inputs) or (sampled, left)
        return sampled, left

    def _by_person(self, pairs: list[SampledPair], k: int) -> list[Label]:
        """Outside of the stage's folder, so that nobody deletes a person's work with it."""
        path = self._questions(k)
        if processes().is_main_process:
            write_questions(pairs, path)
        wait_for_all()
        return by_person(pairs, path)

    def _questions(self, k: int) -> Path:
        return self.folder / "labels" / f"round-{k}.jsonl"

    def _by_judge(self, pairs: list[SampledPair]) -> tuple[list[Label], dict[str, Any]]:
        assert self.recipe.labels.judge is not None
        (self.folder / "labels").mkdir(exist_ok=True)
        judge = judge_of(self.recipe.labels.judge, self.folder / "labels" / "judge_cache.jsonl")
        try:
            labels = by_judge(pairs, judge)
        finally:
            self.console.print(Text(f"  {judge.endpoint.model}: {judge.endpoint.usage.report(None)}", "dim"))
        return labels, {"judge": cost_of(judge)}

    def _complete_twice(self, k: int) -> list[SampledPair]:
        """Two completions of each prompt that fits, by the starting policy; later by those of the round before.

        The prompts are dealt out to the policies in turn.
        """
        recipe, start = self.recipe, self.folder / "sft"
        assert recipe.data.pair_prompts is not None
        rows = part(recipe.data.pair_prompts.load(recipe.seed), recipe.sampled, k)
        tokenizer = load_tokenizer(start, **self._trust)
        writers = {recipe.start: "sft"} if k == 1 else {n: stage_folder(n, k - 1) for n in recipe.writers}
        length, prompts = recipe.completion_length, list[Prompt]()
        found: dict[int, SampledPair] = {}
        for turn, (name, where) in enumerate(writers.items()):
            policy = load_policy(str(self.folder / where), **self._trust).to(self._device)
            if not prompts:
                prompts, _ = read_prompts(rows, tokenizer, max_length=_room(policy, length), what="data.pair_prompts")
            own = list(range(turn, len(prompts), len(writers)))
            title = "sampling completions" if k == 1 else f"sampling completions of {name}"
            seed = recipe.seed_of(k) * 1_000_003 + turn * len(prompts) * 2
            texts = self._twice([prompts[i].ids for i in own], policy, tokenizer, seed, title)
            sides = [Completed.of([prompts[i] for i in own], *map(list, zip(*texts[j::2]))) for j in range(2)]
            for at, i in enumerate(own):
                both = (sides[0].completions[at], sides[1].completions[at])
                ended = (sides[0].ended[at], sides[1].ended[at])
                found[i] = SampledPair(prompt=prompts[i], completions=both, ended=ended, policy=name)
        return [found[i] for i in sorted(found)]

    def _twice(
        self, prompts: list[list[int]], policy: Any, tokenizer: PreTrainedTokenizerBase, seed: int, title: str
    ) -> list[tuple[str, bool]]:
        """Text and whether it ended, of two completions a prompt, side by side."""
        length = self.recipe.completion_length
        sampler = TransformersSampler.of(policy, tokenizer, SamplingConfig(max_completion_length=length))
        ids = [p for p in prompts for _ in range(2)]

        def some(i: int) -> list[tuple[str, bool]]:
            drawn = draw(sampler, policy, tokenizer, ids[i : i + SIDE_BY_SIDE], seed + i)
            return list(zip(drawn.texts, drawn.ended, strict=True))

        parts = self._shared_out(range(0, len(ids), SIDE_BY_SIDE), some, title)
        return [one for found in parts for one in found]

    def _named(self, name: str, k: int) -> str:
        return name if self.recipe.rounds == 1 else f"round {k}: {name}"

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

    def _pairs(self, k: int) -> Dataset | list[dict[str, Any]]:
        """All pairs of the first k rounds, each with the round that it is of."""
        recipe = self.recipe
        if recipe.data.pairs is not None:
            first = recipe.data.pairs.load(recipe.seed)
        else:
            first = load_rows(self.folder / "pairs" / "pairs.jsonl")
        if k == 1:
            return first
        rows = [{**row, "round": 1} for row in first]
        for later in range(2, k + 1):  # line by line: rows of a file and rows of ours may be of different formats
            rows += read_whole(self.folder / stage_folder("pairs", later) / "pairs.jsonl").rows
        return rows

    def seconds(self, where: str) -> float:
        """What a policy has taken, over the rounds that led to it."""
        return sum(
            json.loads((self.folder / folder / "done.json").read_text())["seconds"] for folder in _led_to(where)
        )

    def log(self, where: str) -> list[dict[str, Any]]:
        """What training logged of a policy, over the rounds that led to it; prompts used are counted through."""
        rows: list[dict[str, Any]] = []
        for folder in _led_to(where):
            rows = continued(rows, log_rows(self.folder / folder / "log.jsonl"))
        return rows

    def used(self, where: str) -> dict[str, Any]:
        """What a policy has cost: the labels of all pairs so far, and the prompts that it was trained on by itself."""
        if where == "sft":
            return {"of": None, "round": 0, "labels": 0, "prompts_used": 0}
        chain = _led_to(where)
        of = next(n for n in self.recipe.trained if stage_folder(n, 1) == chain[0])
        prompts = int(max((row["episodes"] for row in self.log(where) if "episodes" in row), default=0))
        labels = sum(self.labels(k) for k in range(1, len(chain) + 1))
        return {"of": of, "round": len(chain), "labels": labels, "prompts_used": prompts}

    def labels(self, k: int) -> int:
        """How many labels the pairs of round k have cost."""
        if k not in self.recipe.sampled:
            return len(self._pairs(k))
        folder = self.folder / stage_folder("pairs", k)
        if (told := folder / "counts.json").is_file():
            return int(json.loads(told.read_text(encoding="utf-8"))["labels"])
        return len(read_whole(folder / "pairs.jsonl").rows)

    def _eval_pairs(self) -> Dataset | None:
        held_out = self.recipe.data.eval_pairs
        return None if held_out is None else held_out.load(self.recipe.seed)

    def _held_out(self, trainer: Any, folder: Path) -> None:
        if self.recipe.data.eval_pairs is None:
            return
        found = trainer.evaluate()
        if processes().is_main_process:
            write_atomically(folder / "held_out.json", json.dumps(found, indent=1))

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
        self.console.print(Text(f"  {beginning(trainer)}", "dim"))

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

        head, _, own = name.rpartition("/")
        k = int(head.removeprefix("round-") or 1)
        pairs = rows("pairs") or {"pairs": digest_of(self.folder / "pairs" / "pairs.jsonl")}
        for later in range(2, k + 1):
            where = stage_folder("pairs", later)
            pairs[where] = digest_of(self.folder / where / "pairs.jsonl")
        reward = [stage_folder("reward", k)] if recipe.reward is not None else []
        methods = {stage_folder(method, 1): method for method in recipe.methods}
        match own:
            case "sft":
                return {"model": model(recipe.model), **(rows("demonstrations") if recipe.sft is not None else {})}
            case "pairs":
                writers = ["sft"] if k == 1 else [stage_folder(writer, k - 1) for writer in recipe.writers]
                people = {"labels": digest_of(self._questions(k))} if recipe.labels.by == "person" else {}
                return {**made(*writers), **rows("pair_prompts"), **people}
            case "reward":
                start = made("sft") if recipe.reward_model is None else {"reward_model": model(recipe.reward_model)}
                return {**start, **pairs, **rows("eval_pairs")}
            case "evaluation":
                judge = [stage_folder("reward", recipe.rounds)] if reward else []
                return {**made(*recipe.policies.values(), *judge), **rows("test_prompts")}
            case method if method in methods:
                learners = [stage_folder(learner, k) for learner in recipe.learners_of(methods[method])]
                before = ["sft"] if k == 1 else ["sft", stage_folder(methods[method], k - 1)]
                return {**made(*before, *reward, *learners), **rows("prompts")}
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


def _led_to(where: str) -> list[str]:
    """The folders of a policy in all rounds up to its own."""
    head, _, own = where.rpartition("/")
    return [own, *(f"round-{k}/{own}" for k in range(2, int(head.removeprefix("round-") or 1) + 1))]


def _became(became: dict[str, Any]) -> str:
    """What became of sampled pairs, in words."""
    parts = [
        f"{became['sampled']} pairs sampled",
        f"{became['labels']} labels",
        f"{became['pairs']} pairs to learn from",
    ]
    return ", ".join(parts + [f"{n} {why}" for key in ("not asked", "left out") for why, n in became[key].items()])


def log_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a stage's log; none where it kept none."""
    return read_rows(path).rows if path.is_file() else []


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _first_difference(theirs: Any, ours: Any, key: str = "") -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*theirs, *ours]:
            if theirs.get(name) != ours.get(name):
                return _first_difference(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
    return f"{key} is {theirs!r} there and {ours!r} here"
