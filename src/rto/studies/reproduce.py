"""`rto reproduce`: the methods of a recipe over seeds, each upstream stage run once a seed, and one file of results.

    OUT/tune/…                 trials on validation prompts, one seed beside the final ones
    OUT/seed-0/sft, pairs, dpo, reward, ppo, rto, …     run folders as of `rto run`
    OUT/seed-0/in-2-rounds/…   the same with its labels in so many rounds, for each of study.rounds
    OUT/results.json           everything the tables and figures are made from
    OUT/report.md, *.svg       made from it

A job is one stage of one seed. Jobs run in processes, no two of them on the same folder, and a job that is done is
passed over, so that the same command continues after a kill.
"""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console

from rto.errors import make_folder, told
from rto.evaluation.statistics.gain import best_mixture
from rto.files import parse_json, write_atomically
from rto.functional.rewards import RTOReward
from rto.packaged import packaged
from rto.pipeline import Pipeline
from rto.recipe import (
    Recipe,
    RecipeError,
    Study,
    Tuning,
    folder_of,
    load_recipe,
    resolve,
    stage_folder,
    variants,
)
from rto.report.table import REWARD_MODEL
from rto.rollout.rewards import function_name
from rto.studies.foretold import FORETOLD, write_foretold
from rto.terminal import Terminal
from rto.workers import pool as worker_pool

VERSIONS = ("torch", "transformers", "trl", "numpy")
CURVE = {"episodes": "episodes", "kl": "kl", "learned": "score/reward", "length": "completions/mean_length"}
"""What is kept of a training log."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage of one seed.

    Attributes:
        recipe: with the seed.
        folder: of the seed.
        stage: sft, pairs, reward, learner or method.
        policy: which one a learner or a method trains; the starting one for sft.
        k: the round.
        prompts: where the policy is measured, test_prompts or validation_prompts; None measures nothing.
        validated: it is measured on validation prompts as well: a point of a frontier is chosen there.
        foretold: what its method gains is told from completions, too.
        needs: folders that must be done before.
    """

    recipe: Recipe
    folder: Path
    stage: str
    policy: str | None = None
    k: int = 1
    prompts: str | None = None
    validated: bool = False
    foretold: bool = False
    needs: frozenset[Path] = frozenset()

    @property
    def path(self) -> Path:
        """The folder that this job, and no other, writes."""
        named = self.stage in ("learner", "method")
        return self.folder / stage_folder(str(self.policy) if named else self.stage, self.k)

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        files = ["done.json", *(f"{prompts}.json" for prompts in self._measured_on)]
        files += [FORETOLD] if self.foretold else []
        return all((self.path / name).is_file() for name in files)

    @property
    def _measured_on(self) -> list[str]:
        if self.prompts is None:
            return []
        return list(dict.fromkeys([self.prompts, *(["validation_prompts"] if self.validated else [])]))

    def run(self, console: Console) -> None:
        """Do the stage, and measure its policy."""
        pipeline = Pipeline(self.recipe, self.folder, console)
        match self.stage:
            case "learner":
                pipeline.prefer(str(self.policy), self.k)
            case "method":
                pipeline.train(str(self.policy), self.k)
            case "sft":
                pipeline.sft()
            case stage:
                getattr(pipeline, stage)(self.k)
        named = self.policy if self.stage == "sft" else self.recipe.policy(str(self.policy), self.k)
        for prompts in self._measured_on:
            pipeline.measure(str(named), prompts)
        if self.foretold:
            write_foretold(self.recipe, self.folder, str(self.policy))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A learning rate and how the policy did with it on the validation prompts."""

    learning_rate: float
    factor: float
    gold: float
    kl: float


def reproduce(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    jobs: int = 1,
    console: Console | None = None,
) -> Path:
    """Tune, run, and write ``results.json``; returns its path.

    Args:
        recipe: with its `Study`.
        output_dir: begun or not; a begun one is continued, more methods or seeds are added to it.
        methods: names among the learners and methods; None runs all of them.
        seeds: how many; None takes the study's.
        jobs: processes; each has its share of the cores.
        console: where progress is told.

    Raises:
        RecipeError: a name is not known, or the folder holds another recipe's runs or is in use.
    """
    folder, console = Path(output_dir), console or Terminal()
    policies = _chosen(recipe, methods)
    count = recipe.study.seeds if seeds is None else seeds
    if count < 1:
        raise RecipeError("study.seeds must be at least 1 to run a study")
    if recipe.study.tune is not None and recipe.seed <= recipe.study.tune.seed < recipe.seed + count:
        raise RecipeError(
            f"study.tune.seed is {recipe.study.tune.seed}, which is one of the final seeds: take another"
        )
    with _locked(folder):
        study = Study(baseline=recipe.study.baseline, seeds=0, tune=recipe.study.tune)  # the rest may change
        pipeline = Pipeline(replace(recipe, study=study), folder, console)
        replace(pipeline, folder=folder / f"seed-{recipe.seed}").check()
        pipeline.claim()
        recipe = tuned = with_frontier(recipe, policies)
        known = [recipe.start, *recipe.trained]
        policies = [name for name in known if of_frontier(recipe).get(name, name) in policies]
        trials: dict[str, list[Trial]] = {}
        if recipe.study.tune is not None:
            tuned, trials = tune(recipe, recipe.study.tune, folder / "tune", policies, jobs, console)
        final = with_fractions(tuned, policies)
        names = [name for name in variants(final) if _is_measured(name, final, policies)]
        every = range(recipe.seed, recipe.seed + count)
        _share_the_start(folder, every, {variants(final)[name][0].rounds for name in names} - {recipe.rounds})
        run_jobs([job for seed in every for job in of_seed(final, folder, seed, names)], jobs, console)
        path = folder / "results.json"
        rows = collect(final, folder, names, every)
        write_atomically(path, json.dumps({**rows, "tuning": _as_json(trials)}, ensure_ascii=False) + "\n")
    return path


def task_recipe(task: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """The study of a named task, the packaged recipe ``TASK/study``, or of a recipe's path.

    Raises:
        RecipeError: there is none.
    """
    path = task if task.endswith((".yaml", ".yml")) else f"{task}/study"
    if path != task and path not in packaged():
        known = ", ".join(name.removesuffix("/study") for name in packaged() if name.endswith("/study"))
        raise RecipeError(
            f"no task {task!r}: there are {known}, or give the path of a recipe. Those that need experiments/ run "
            "in a checkout of the project alone, from its root"
        )
    return load_recipe(path, overrides)


# --- plan


def of_seed(recipe: Recipe, folder: Path, seed: int, policies: Sequence[str]) -> list[Job]:
    """The jobs of a seed, those of the variants in more rounds after those of the recipe itself."""
    known = variants(recipe)
    where, found = folder / f"seed-{seed}", list[Job]()
    for rounds in (recipe.rounds, *recipe.study.rounds):
        own = [known[name][1] for name in policies if known[name][0].rounds == rounds]
        inside = replace(recipe, seed=seed, rounds=rounds)
        if rounds == recipe.rounds:
            found += plan(inside, where, own, "test_prompts")
        elif own:
            found += plan(inside, where / in_rounds(rounds), own, "test_prompts", sft=where / "sft")
    return found


def in_rounds(rounds: int) -> str:
    """The folder of a variant, within that of the seed."""
    return f"in-{rounds}-rounds"


def plan(recipe: Recipe, folder: Path, policies: Sequence[str], prompts: str, *, sft: Path | None = None) -> list[Job]:
    """The jobs of one seed in an order that they can be run in: what several policies need stands there once.

    Without a gold reward the reward model judges, so that every policy, the starting one too, is measured after it;
    where there are several rounds, after that of the last.

    Args:
        recipe: with the seed.
        folder: of the seed.
        policies: which are measured.
        prompts: on which prompts.
        sft: the starting policy, where another job makes it.
    """
    judge = stage_folder("reward", recipe.rounds)
    judged = [judge] if recipe.gold is None and recipe.reward is not None else []
    late = bool(judged) and recipe.rounds > 1
    asked = {recipe.origins[name][0] for name in policies}
    points = of_frontier(recipe)
    candidates: set[str] = set()
    if recipe.study.frontier is not None:
        candidates = {recipe.start, *points, *(recipe.study.frontier.methods or recipe.methods)}
    found: list[Job] = []

    def job(stage: str, *needs: str, policy: str | None = None, k: int = 1, again: bool = False) -> None:
        name = policy if stage == "sft" or policy is None else recipe.policy(policy, k)
        measured = prompts if name in policies or name == recipe.start else None
        if late and not again:
            measured = None
        if again and not measured:
            return
        found.append(
            Job(
                recipe=recipe,
                folder=folder,
                stage=stage,
                policy=policy,
                k=k,
                prompts=measured,
                validated=name in candidates,
                foretold=_is_foretold(recipe, stage, policy),
                needs=frozenset(sft if name == "sft" and sft is not None else folder / name for name in needs),
            )
        )

    if sft is None:
        job("sft", policy=None if judged else recipe.start)
    for k in range(1, recipe.rounds + 1):
        needed = asked | (set(recipe.writers) if k < recipe.rounds else set())
        methods = [name for name in recipe.methods if name in needed]
        rewarding = {learner for name in methods for learner in recipe.learners_of(name)}
        learners = [name for name in recipe.learners if name in needed or name in rewarding]
        labelled, reward = "sft", stage_folder("reward", k)
        if k in recipe.sampled:
            labelled = stage_folder("pairs", k)
            job("pairs", *(["sft"] if k == 1 else [stage_folder(w, k - 1) for w in recipe.writers]), k=k)
        if recipe.reward is not None and (methods or judged):
            job("reward", labelled, k=k)
        if judged and not late and sft is None:
            job("sft", *judged, policy=recipe.start)
        for name in learners:
            job("learner", labelled, *([] if late else judged), policy=name, k=k)
        scored = [reward] if recipe.reward is not None else [labelled]
        for name in methods:
            before = [stage_folder(name, k - 1)] if k > 1 else []
            own = [stage_folder(learner, k) for learner in recipe.learners_of(name)]
            job("method", *scored, *own, *before, policy=name, k=k)
    if late:
        if sft is None:
            job("sft", *judged, policy=recipe.start, again=True)
        for name, k in recipe.origins.values():
            if k:
                job("learner" if name in recipe.learners else "method", *judged, policy=name, k=k, again=True)
    return found


def _is_foretold(recipe: Recipe, stage: str, policy: str | None) -> bool:
    """A method of one round, with the β₂ of the recipe: between rounds what is paid changes."""
    asked = recipe.study.foretell is not None and recipe.rounds == 1
    return asked and stage == "method" and policy not in of_frontier(recipe)


def with_frontier(recipe: Recipe, policies: Sequence[str]) -> Recipe:
    """The recipe with a method more for each β₂ of its frontier that is not its own."""
    frontier = recipe.study.frontier
    if frontier is None:
        return recipe
    methods = dict(recipe.methods)
    for name in frontier.methods or recipe.methods:
        own = {"kl_coef": RTOReward.kl_coef, **recipe.train, **recipe.methods[name]}["kl_coef"]
        for coef in frontier.kl_coefs if name in policies else []:
            if coef != own:
                methods[frontier_name(name, coef)] = {**recipe.methods[name], "kl_coef": coef}
    return replace(recipe, methods=methods, pairs_from=_writers(recipe))


def _writers(recipe: Recipe) -> list[str]:
    """Who writes pairs, named before variants are added: those write none."""
    return recipe.writers if recipe.rounds > 1 or recipe.study.rounds else recipe.pairs_from


def frontier_name(method: str, kl_coef: float) -> str:
    """``RTO β₂ 0.03``."""
    return f"{method} β₂ {kl_coef:g}"


def of_frontier(recipe: Recipe) -> dict[str, str]:
    """The points that `with_frontier` added, each with the method that it belongs to."""
    frontier = recipe.study.frontier
    if frontier is None:
        return {}
    named = {frontier_name(m, c): m for m in frontier.methods or recipe.methods for c in frontier.kl_coefs}
    return {name: method for name, method in named.items() if name in recipe.methods}


def with_fractions(recipe: Recipe, policies: Sequence[str]) -> Recipe:
    """The recipe with a method more for each fraction of the prompts of each scaled method."""
    methods = dict(recipe.methods)
    for name in recipe.study.scaled:
        for fraction in recipe.study.fractions if name in policies else []:
            assert recipe.data.prompts.rows is not None
            episodes = max(1, round(fraction * recipe.data.prompts.rows))
            methods[fraction_name(name, fraction)] = {**recipe.methods[name], "total_episodes": episodes}
    return replace(recipe, methods=methods, pairs_from=_writers(recipe))


def fraction_name(method: str, fraction: float) -> str:
    """``RTO 1/4``."""
    return f"{method} {Fraction(fraction).limit_denominator(1024)}"


def _base(name: str, recipe: Recipe) -> str:
    """The method of a share of the prompts; any other policy is its own."""
    named = {fraction_name(m, f): m for m in recipe.study.scaled for f in recipe.study.fractions}
    return (named | of_frontier(recipe)).get(name, name)


def _is_measured(name: str, recipe: Recipe, methods: Sequence[str]) -> bool:
    """Whether a policy is one of these methods'; of shares of the prompts the last round of the recipe alone is."""
    by, own = variants(recipe)[name]
    method, k = by.origins[own]
    if (base := _base(method, recipe)) != method and (k, by.rounds) != (recipe.rounds, recipe.rounds):
        return False
    return base in methods


def _share_the_start(folder: Path, seeds: Sequence[int], rounds: set[int]) -> None:
    """One starting policy a seed: the folder of a variant in more rounds has a link to it."""
    for seed in seeds:
        for more in rounds:
            link = folder / f"seed-{seed}" / in_rounds(more) / "sft"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(Path("..") / "sft")


def _chosen(recipe: Recipe, methods: Sequence[str] | None) -> list[str]:
    known = [recipe.start, *recipe.trained]
    for name in methods or ():
        if name not in known:
            raise RecipeError(f"--methods: no method {name!r}; known: {', '.join(known)}")
    return [name for name in known if methods is None or name in methods or name == recipe.start]


# --- run


def run_jobs(jobs: Sequence[Job], workers: int, console: Console) -> None:
    """Run what is not done, each job when all it needs is.

    Raises:
        RecipeError, RuntimeError: a job failed, of its inputs or else; the message names its log. What is done stays
            done.
        ChildProcessError: a worker process ended before its job.
    """
    left = [job for job in jobs if not job.done]
    console.print(f"{len(jobs) - len(left)} of {len(jobs)} jobs are done")
    if workers == 1:
        for job in left:
            with _alone(job):
                job.run(console)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they import torch
    pending = {job.path for job in left}
    running: dict[Future[float], Job] = {}
    with worker_pool(_devices(workers)) as pool:
        while left or running:
            ready = [job for job in left if not job.needs & pending]
            for job in ready[: workers - len(running)]:
                left.remove(job)
                running[pool.submit(_work, job, threads)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    seconds = future.result()
                except BrokenProcessPool as error:
                    at_work = ", ".join(str(other.path) for other in (job, *running.values()))
                    raise ChildProcessError(
                        f"a worker was killed, or ran out of memory, while it was at one of {at_work}: what is done "
                        "stays done, and the same command goes on; fewer --jobs need less memory"
                    ) from error
                except Exception as error:
                    pool.shutdown(cancel_futures=True)
                    if (line := told(error)) is not None:
                        raise RecipeError(f"{job.path} failed: {line} (its log is {_log(job)})") from error
                    raise RuntimeError(f"{job.path} failed ({error}); its log is {_log(job)}") from error
                pending.discard(job.path)
                console.print(f"{job.path}: {seconds:.0f} s, {len(pending)} jobs left")


def _devices(workers: int) -> list[str | None]:
    """A device for each worker, in turn, where there are several; None is any."""
    there = torch.accelerator.device_count()
    return [str(i % there) if there > 1 else None for i in range(workers)]


def _work(job: Job, threads: int) -> float:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with _alone(job) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        job.run(Terminal(file=log))
    return time.perf_counter() - start


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[TextIO]:
    """A job's log, held: the worker of a killed command may still write the stage; wait for it, and find it done."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with _log(job).open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        yield log


def _log(job: Job) -> Path:
    return job.folder / f"{'-'.join(job.path.relative_to(job.folder).parts)}.log"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command at a time on a folder: two would write the same stages."""
    make_folder(folder, "--output_dir")
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecipeError(f"{folder} is in use by another rto reproduce: wait for it, or stop it") from error
        yield


# --- tune


def tune(
    recipe: Recipe, tuning: Tuning, folder: Path, policies: Sequence[str], jobs: int, console: Console
) -> tuple[Recipe, dict[str, list[Trial]]]:
    """The same search for every learner, if they are searched for, then for every method with the learners so chosen.

    The search is in one round, with all labels at once. Learners that only give token rewards, and are no policies
    to be measured, take the factor of the first one. Methods that are ``like`` another take that one's.

    Returns:
        The recipe with the chosen learning rates, and all trials.
    """
    start = replace(recipe, seed=tuning.seed, rounds=1, pairs_from=[])
    rewarding = {learner for name in policies if name in recipe.methods for learner in recipe.learners_of(name)}
    policies = [name for name in start.policies if name in {tuning.like.get(name, name) for name in policies}]
    first = next(iter(recipe.learners))
    members = {name for name in rewarding if name not in recipe.policies}
    searched = [n for n in recipe.learners if n not in members and (n in policies or n in rewarding)]
    searched += [first] if members and first not in searched else []
    if not tuning.learners:
        searched, members = [], set()

    def tried(key: str, names: Sequence[str], base: Recipe) -> dict[str, list[Trial]]:
        own = {trial_name(n, f): _at(base, key, n, f) for n in names for f in tuning.factors}
        known = {**base.learners, **own} if key == "learners" else base.learners
        search = replace(base, learners=known, methods=own if key == "methods" else {})
        run_jobs(plan(search, folder, list(own), "validation_prompts"), jobs, console)
        return {n: [_trial(folder, search, key, n, f) for f in tuning.factors] for n in names}

    trials = tried("learners", searched, start)
    factors = {name: best(found, tuning.max_kl).factor for name, found in trials.items()}
    factors |= dict.fromkeys(members, factors.get(first, 1.0))
    named = {n: trial_name(n, factors[n]) if n in factors else n for n in factors or recipe.learners}
    learners = {trial: _at(recipe, "learners", name, factors.get(name, 1.0)) for name, trial in named.items()}
    methods = {name: own | _renamed(recipe, name, named) for name, own in recipe.methods.items() if name in policies}
    on_line = replace(start, learners=learners, methods=methods)
    found = tried("methods", list(methods), on_line)
    factors |= {name: best(trial, tuning.max_kl).factor for name, trial in found.items()}
    if tuning.frontier:
        assert recipe.study.frontier is not None
        point = of_frontier(recipe)
        for method in dict.fromkeys(point.values()):
            points = {name: trial for name, trial in found.items() if point.get(name, name) == method}
            factors |= best_together(points, _measured(folder / "sft"), recipe.study.frontier.levels)
    factors |= {name: factors[other] for name, other in tuning.like.items() if other in factors}
    kept = {
        key: {n: _at(recipe, key, n, factors.get(n, 1.0)) for n in getattr(recipe, key)}
        for key in ("learners", "methods")
    }
    return replace(recipe, learners=kept["learners"], methods=kept["methods"]), {**trials, **found}


def best(trials: Sequence[Trial], max_kl: float | None) -> Trial:
    """The highest gold on validation prompts among those within ``max_kl``; if none is, the least KL."""
    near = [trial for trial in trials if max_kl is None or trial.kl <= max_kl]
    return max(near, key=lambda t: (t.gold, -t.factor)) if near else min(trials, key=lambda t: t.kl)


def best_together(
    points: Mapping[str, Sequence[Trial]], start: tuple[float, float], levels: Sequence[float]
) -> dict[str, float]:
    """The factors, a trial a point, whose best mixtures with the start have the most gold on validation prompts.

    Gold is summed over the levels of KL; of equal ones the first is taken.

    Args:
        points: of one method, with the trials of each.
        start: gold and KL of the policy that training starts from.
        levels: KLs, nats a completion.
    """

    def reached(chosen: Sequence[Trial]) -> float:
        gold, kl = np.array([start, *((trial.gold, max(trial.kl, 0.0)) for trial in chosen)]).T
        return sum(float(best_mixture(gold, kl, level) @ gold) for level in levels)

    chosen = max(itertools.product(*points.values()), key=reached)
    return {name: trial.factor for name, trial in zip(points, chosen, strict=True)}


def trial_name(name: str, factor: float) -> str:
    """``RTO × 0.5``."""
    return f"{name} × {factor:g}"


def _renamed(recipe: Recipe, method: str, named: dict[str, str]) -> dict[str, Any]:
    """Own keys of a method that name learners, with the trials that stand for them."""
    learners, reference = recipe.token_rewards(method), recipe.token_reference(method)
    found: dict[str, Any] = {"dpo_model": [named[name] for name in learners]} if learners else {}
    return found | ({} if reference is None else {"dpo_ref_model": named[reference]})


def _at(recipe: Recipe, key: str, name: str, factor: float) -> dict[str, Any]:
    """Own arguments of a learner or a method at a multiple of its learning rate."""
    own = getattr(recipe, key)[name]
    return {**own, "learning_rate": factor * _learning_rate(recipe, key, own)}


def _learning_rate(recipe: Recipe, key: str, own: dict[str, Any]) -> float:
    from rto.trainers.preference import PreferenceConfig
    from rto.trainers.rto import RTOConfig

    if key == "learners":
        return float({"learning_rate": PreferenceConfig.learning_rate, **recipe.prefer, **own}["learning_rate"])
    return float({"learning_rate": RTOConfig.learning_rate, **recipe.train, **own}["learning_rate"])


def _trial(folder: Path, search: Recipe, key: str, name: str, factor: float) -> Trial:
    trial = trial_name(name, factor)
    gold, kl = _measured(folder / folder_of(trial))
    rate = _learning_rate(search, key, getattr(search, key)[trial])
    return Trial(learning_rate=rate, factor=factor, gold=gold, kl=kl)


def _measured(folder: Path) -> tuple[float, float]:
    """Gold and KL of a policy on validation prompts."""
    found = _read(folder / "validation_prompts.json")
    return _mean(found["gold"]), _mean(found["kl"])


# --- collect


def collect(recipe: Recipe, folder: Path, policies: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Everything the report is made from: a row a policy and seed, with its training curve."""
    gold = REWARD_MODEL if recipe.gold is None else function_name(resolve(recipe.gold))
    kind = dict.fromkeys(recipe.learners, "learner") | dict.fromkeys(recipe.methods, "method")
    made = variants(recipe)
    runs = {}
    for name in policies:
        by, own = made[name]
        runs[name] = {
            "kind": kind.get(by.origins[own][0], "start"),
            "of": _base(name, recipe),
            "runs": [_run(by, folder / f"seed-{seed}", own, gold, seed, of=recipe) for seed in seeds],
        }
    shared = {
        stage: [_read(folder / f"seed-{seed}" / stage / "done.json")["seconds"] for seed in seeds]
        for stage in ("pairs", "reward")
        if all((folder / f"seed-{seed}" / stage / "done.json").is_file() for seed in seeds)
    }
    return {
        "recipe": {**recipe.tree(), "study": asdict(recipe.study)},
        "gold": gold,
        "seeds": list(seeds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in VERSIONS},
        "shared_seconds": shared,
        "policies": runs,
    }


def _run(recipe: Recipe, folder: Path, name: str, gold: str, seed: int, *, of: Recipe) -> dict[str, Any]:
    """A policy of a seed.

    Args:
        recipe: that makes it.
        folder: of the seed.
        name: of the policy, there.
        gold: whose scores the log has.
        seed: of the run.
        of: the study's recipe; the policies of others stand in a folder of their own.
    """
    inside = folder if recipe.rounds == of.rounds else folder / in_rounds(recipe.rounds)
    policy, pipeline = recipe.policies[name], Pipeline(replace(recipe, seed=seed), inside, Terminal())
    found, start = _read(inside / policy / "test_prompts.json"), _read(folder / "sft" / "test_prompts.json")
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(found["gold"], start["gold"], strict=True)]
    in_rounds_too = of.rounds > 1 or bool(of.study.rounds)
    last = recipe.origins[name][1] in (0, recipe.rounds)
    return {
        "seed": seed,
        "gold": _mean(found["gold"]),
        "kl": _mean(found["kl"]),
        "win_rate": _mean(wins),
        "length": _mean(found["length"]),
        "ended": _mean(found["ended"]),
        "logged": {name: _mean(values) for name, values in found["logged"].items()},
        "seconds": pipeline.seconds(policy),
        "shown": found["shown"][:2],
        "curve": _curve(pipeline.log(policy), gold) if last else {},
        **(pipeline.used(policy) if in_rounds_too else {}),
        **_if_there(inside / policy),
    }


def _if_there(folder: Path) -> dict[str, Any]:
    """What only some studies measure: gold and KL on validation prompts, and what was foretold."""
    found: dict[str, Any] = {}
    if (path := folder / "validation_prompts.json").is_file():
        measured = _read(path)
        found["validation"] = {key: _mean(measured[key]) for key in ("gold", "kl")}
    if (path := folder / FORETOLD).is_file():
        found["foretold"] = _read(path)
    return found


def _curve(log: Sequence[dict[str, Any]], gold: str) -> dict[str, list[float]]:
    """The training rollouts, one number an iteration; empty for a policy that was not trained on its own."""
    rows = [row for row in log if "episodes" in row]
    keys = {**CURVE, "gold": f"score/{gold}"}
    return {
        name: [round(row[key], 4) for row in rows]
        for name, key in keys.items()
        if rows and all(key in r for r in rows)
    }


def _read(path: Path) -> Any:
    return parse_json(path.read_text(encoding="utf-8"))


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _as_json(trials: dict[str, list[Trial]]) -> dict[str, list[dict[str, float]]]:
    return {name: [asdict(trial) for trial in found] for name, found in trials.items()}
