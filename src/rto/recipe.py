"""A run as a value: what `rto run` reads, checks before any work, and saves beside the results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from datasets import Dataset
from pydantic import Field

from rto.data.formats import DataError, load_rows
from rto.errors import users_code
from rto.functional.preference import LOSSES, needs_scalar_head
from rto.imports import import_module, taken
from rto.packaged import find_packaged
from rto.references import below, put_back, read_unresolved
from rto.references import resolve as resolve_references
from rto.values import build, culprit, nearest, read_yaml, typed, write_yaml, yaml_text

STAGES = ("sft", "pairs", "reward", "evaluation")
LEARNER_KEYS: dict[str, Any] = {"bootstrap": int}
METHOD_KEYS: dict[str, Any] = {
    "dpo_model": str | list[str],
    "dpo_ref_model": str,
    "paid_by": Literal["reward", "gold"],
}
SET_BY_RECIPE = {"output_dir", "seed", "max_completion_length", "resume_from_checkpoint"}
SET_BY_STAGES = {"task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"}
EMBEDDED = Path(__file__).parent / "recipes" / "embedded.yaml"

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

ROUND_SEEDS = 104_729
"""Between the seeds of two rounds: those of a study's runs lie closer together."""

TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "report_to": "none",
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 0.25,
    "save_total_limit": 1,
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
"""Of every stage; a recipe's own values win."""


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the key and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where rows come from.

    Attributes:
        path: a local file or folder, a hub name, or ``module:function``, a Python function
            ``f(rows, seed, split)`` that returns rows (a string stands for a prompt).
        split: split of the data set.
        name: configuration of a hub data set.
        rows: how many to take; None takes all.
    """

    path: str
    split: str = "train"
    name: str | None = None
    rows: Count | None = None

    def load(self, seed: int) -> Dataset:
        """The rows.

        Raises:
            DataError: they cannot be had.
        """
        if is_function(self.path):
            if self.rows is None:
                raise DataError(f"{self.path}: say how many rows a function is to make (rows: N)")
            function = resolve(self.path)
            with users_code(self.path):
                made = list(function(self.rows, seed, self.split))
            return Dataset.from_list([{"prompt": row} if isinstance(row, str) else row for row in made])
        dataset = load_rows(self.path, name=self.name, split=self.split)
        if self.rows is None:
            return dataset
        if len(dataset) < self.rows:
            raise DataError(
                f"{self.path} has {len(dataset)} rows in split {self.split!r}, {self.rows} are asked for: lower rows, "
                "or leave it out to take all"
            )
        return dataset.shuffle(seed=seed).select(range(self.rows))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Inputs of a run.

    Attributes:
        demonstrations: prompt-completion rows for supervised fine-tuning; None starts from ``model`` as it is.
        pairs: preference pairs; None samples them from the SFT policy and labels them by ``gold``.
        pair_prompts: prompts for sampled pairs, those of all rounds together.
        prompts: prompts for reinforcement learning, the same for every method, those of all rounds together.
        test_prompts: held-out prompts for the evaluation.
        eval_pairs: held-out pairs; learners and reward model are measured on them (``held_out.json`` in their
            folders).
        validation_prompts: prompts that `rto reproduce` tunes on, apart from ``prompts`` and ``test_prompts``.
    """

    prompts: Rows
    test_prompts: Rows
    demonstrations: Rows | None = None
    pairs: Rows | None = None
    pair_prompts: Rows | None = None
    eval_pairs: Rows | None = None
    validation_prompts: Rows | None = None

    def load(self, key: str, seed: int) -> Dataset:
        """The rows of an input that is given.

        Raises:
            DataError: they cannot be had; the message names the key.
        """
        try:
            return getattr(self, key).load(seed)
        except DataError as error:
            raise DataError(f"data.{key}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class JudgeEndpoint:
    """A chat model behind an OpenAI-compatible endpoint that labels pairs.

    Attributes:
        model: its name there.
        base_url: like http://localhost:8000/v1.
        key_env: environment variable with the API key; None: OPENAI_API_KEY for OpenAI, else no key.
        protocol: arena_hard, a verdict in words, or alpaca_eval, the log-probabilities of one letter.
        template: an official template, AlpacaEval's .txt or Arena-Hard's .yaml; None: our own.
        parameters: added to each request; a null takes one away.
        concurrency: requests under way at once.
        timeout: seconds for one attempt.
        retries: further attempts on errors, time-outs and rate limits.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_env: str | None = None
    protocol: Literal["arena_hard", "alpaca_eval"] = "arena_hard"
    template: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    concurrency: Count = 8
    timeout: Positive = 120.0
    retries: Annotated[int, Field(ge=0)] = 6


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Who says which of two sampled completions is better.

    Attributes:
        by: gold (Bradley–Terry on ``gold``), judge, or person: the run writes ``labels/round-N.jsonl``, stops, and
            goes on when each row of it has a label.
        judge: who judges.
    """

    by: Literal["gold", "judge", "person"] = "gold"
    judge: JudgeEndpoint | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The search that every learner and every method gets: its learning rate times each factor.

    Attributes:
        factors: of the learning rate; the same number of trials for each.
        seed: one seed beside those of the final runs.
        max_kl: a trial that ends further from the reference, nats a completion, is not taken; None takes any.
        like: methods that take the factor of another instead of a search of their own: the points of a sweep differ
            from what they are compared with in one thing.
        learners: search for the learners, too; else they keep the recipe's rates, and with them what weights of their
            rewards were found for.
        frontier: take the factors of a method's points (`Frontier`) together: those whose best mixtures have the most
            gold, summed over the levels. Else each point takes its own by gold, which goes far from the reference and
            leaves little for small KLs. ``max_kl`` is then not read for them.
    """

    factors: list[Positive] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    seed: Seed = 1000
    max_kl: NotNegative | None = None
    like: dict[str, str] = field(default_factory=dict)
    learners: bool = True
    frontier: bool = False


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What makes a method a curve in the plane of KL and gold instead of a point: β₂ tuned for every KL.

    Attributes:
        kl_coefs: values of β₂, the same for each method, that are run beside its own.
        levels: KLs, nats a completion, at which methods are compared.
        methods: which have one; empty: all that are run.
    """

    kl_coefs: list[Positive] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    levels: list[Positive] = field(default_factory=lambda: [2.0, 4.0, 8.0])
    methods: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Foretelling:
    """How much is drawn to foretell what a method gains, before it is trained.

    Attributes:
        prompts: of the validation prompts.
        completions: of each, by the starting policy and by the trained one.
    """

    prompts: Count = 64
    completions: Annotated[int, Field(ge=2)] = 16


@dataclass(frozen=True, kw_only=True)
class Study:
    """What `rto reproduce` runs a recipe for; `rto run` does not read it.

    Attributes:
        baseline: the method that paired tests compare with.
        seeds: how many, from the recipe's ``seed`` up.
        fractions: shares of the RL prompts below 1.
        scaled: methods that are also trained on those shares.
        rounds: the same labels and prompts in so many rounds, a variant of every learner and method for each entry,
            called ``NAME in N rounds``.
        comparisons: further paired comparisons, question to [method, other method].
        tune: None takes learning rates as they stand.
        frontier: compare methods at equal KL, each with the β₂ that is best there; None compares them as they are.
        foretell: tell each method's gain from completions of the starting policy; None does not.
    """

    baseline: str = "PPO"
    seeds: Annotated[int, Field(ge=0)] = 3
    fractions: list[float] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)
    rounds: list[Annotated[int, Field(ge=2)]] = field(default_factory=list)
    comparisons: dict[str, list[str]] = field(default_factory=dict)
    tune: Tuning | None = None
    frontier: Frontier | None = None
    foretell: Foretelling | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe:
    """One run of the whole method.

    Attributes:
        model: the starting point: a folder, a hub id, or ``module:function`` that returns (model, tokenizer).
        data: inputs.
        seed: seed of every stage.
        gold: ``module:function`` with TRL's reward signature, the ground truth where a task has one. Training
            sees it only through the labels of sampled pairs; runs log it beside the learned score.
        logged: further functions of this kind that are logged and evaluated, and never trained on.
        rounds: how often pairs are labelled and learned from; each round has an equal part of ``data.pair_prompts``
            and of ``data.prompts``. Given ``data.pairs`` are those of the first round.
        pairs_from: learners and methods whose policies write the pairs of later rounds, in equal parts; empty: all.
        labels: who labels sampled pairs.
        label_temperature: pairs are labelled by Bradley–Terry, P(a ≻ b) = σ((gold_a − gold_b) / temperature).
        completion_length: longest completion, in tokens, in every stage.
        sft: arguments of TRL's ``SFTConfig``; None skips the stage.
        prefer: arguments of `PreferenceConfig` that all learners share.
        learners: name to the arguments of `PreferenceConfig` that are its own, and ``bootstrap: N``, which draws as
            many pairs again with replacement, another sample for each N.
        reward: arguments of TRL's ``RewardConfig``; None trains no reward model.
        reward_model: what the reward model starts from, another family and size if need be; None: the SFT policy.
        train: arguments of `RTOConfig` that all methods share.
        methods: name to the arguments of `RTOConfig` that are its own, and three more: ``dpo_model``, the learner
            that gives the token reward or a list of them (default: the first), ``dpo_ref_model``, the learner that
            it is compared with (default: the starting policy), and ``paid_by``: reward (default), or gold, which pays
            gold / label_temperature, the score of a perfect reward model.
        evaluate_temperature: sampling temperature of the evaluation.
        peft: arguments of PEFT's ``LoraConfig``; every stage then trains an adapter. That of SFT is merged into
            ``sft/``, the base that all other roles share; a ``reward_model`` of its own is trained whole. None trains
            whole models.
        trust_remote_code: run code that comes with a model or a tokenizer, in every stage; a stage's own key wins.
        study: what `rto reproduce` compares.
        references: where the file says ``${NAME}``; no key of a file.
    """

    model: str
    data: Data
    seed: Seed = 0
    gold: str | None = None
    logged: list[str] = field(default_factory=list)
    rounds: Count = 1
    pairs_from: list[str] = field(default_factory=list)
    labels: Labels = field(default_factory=Labels)
    label_temperature: Positive = 1.0
    completion_length: Count = 256
    sft: dict[str, Any] | None = None
    prefer: dict[str, Any] = field(default_factory=dict)
    learners: dict[str, dict[str, Any]] = field(default_factory=lambda: {"DPO": {}})
    reward: dict[str, Any] | None = None
    reward_model: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"RTO": {}})
    evaluate_temperature: NotNegative = 1.0
    peft: dict[str, Any] | None = None
    trust_remote_code: bool = False
    study: Study = field(default_factory=Study)
    references: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def start(self) -> str:
        """What the starting policy, in the folder ``sft``, is called: SFT only where it was fine-tuned."""
        return "start" if self.sft is None else "SFT"

    @property
    def policies(self) -> dict[str, str]:
        """What is evaluated, and its folder: the start, the learners that are policies of their own, and the methods.

        A learner or a method has its own name after the last round, and ``NAME, round K`` after an earlier one.
        """
        found = {self.start: "sft"}
        for name in self.trained:
            found |= {self.policy(name, k): stage_folder(name, k) for k in range(1, self.rounds + 1)}
        return found

    @property
    def trained(self) -> list[str]:
        """Learners and methods; not the learners that only give token rewards.

        Those are bootstrapped and reverse ones, and those with a scalar head.
        """
        return [name for name in self.learners if not self._only_rewards(name)] + list(self.methods)

    @property
    def origins(self) -> dict[str, tuple[str, int]]:
        """Every policy's learner or method, and its round; the start is its own, of round 0."""
        rounds = range(1, self.rounds + 1)
        return {self.start: (self.start, 0), **{self.policy(n, k): (n, k) for n in self.trained for k in rounds}}

    def policy(self, name: str, k: int) -> str:
        """What a learner or a method is called after round k."""
        return name if k == self.rounds else f"{name}, round {k}"

    @property
    def writers(self) -> list[str]:
        """Learners and methods whose policies write the pairs of later rounds."""
        return list(self.pairs_from) or self.trained

    @property
    def sampled(self) -> list[int]:
        """Rounds whose pairs are sampled here."""
        return list(range(1 if self.data.pairs is None else 2, self.rounds + 1))

    @property
    def counted(self) -> bool:
        """Whether labels are a cost that is told: pairs that nobody could label are then left out beforehand."""
        return self.rounds > 1 or self.labels.by != "gold"

    def seed_of(self, k: int) -> int:
        """The seed of the stages of round k."""
        return (self.seed + (k - 1) * ROUND_SEEDS) % 2**32

    def _only_rewards(self, learner: str) -> bool:
        own = {**self.prefer, **self.learners[learner]}
        return "bootstrap" in own or bool(own.get("swap_pairs")) or self.has_scalar_head(learner)

    def has_scalar_head(self, learner: str) -> bool:
        """Whether it is a model that scores tokens, and no language model."""
        loss = {**self.prefer, **self.learners[learner]}.get("loss", "dpo")
        return loss in LOSSES and needs_scalar_head(LOSSES[loss])

    def token_rewards(self, method: str) -> list[str]:
        """The learners whose token rewards a method is paid; none where β₁ = 0."""
        if {**self.train, **self.methods[method]}.get("dpo_coef") == 0:
            return []
        named = self.methods[method].get("dpo_model", next(iter(self.learners)))
        return [named] if isinstance(named, str) else list(named)

    def token_reference(self, method: str) -> str | None:
        """The learner that a method's token rewards are compared with; None where that is the starting policy."""
        return self.methods[method].get("dpo_ref_model") if self.token_rewards(method) else None

    def learners_of(self, method: str) -> list[str]:
        """Every learner that a method reads, each once: its token rewards and what they are compared with."""
        reference = self.token_reference(method)
        return list(dict.fromkeys([*self.token_rewards(method), *([] if reference is None else [reference])]))

    def rewards(self, method: str) -> dict[str, float]:
        """What scores a method's completions, and its weight: the reward stage, gold, what is logged.

        A weight of 0 only logs.
        """
        paid_by = self.methods[method].get("paid_by", "reward")
        found: dict[str, float] = {}
        if self.reward is not None:
            found["reward"] = float(paid_by == "reward")
        if self.gold is not None:
            found[self.gold] = float(paid_by == "gold") / self.label_temperature
        return found | {f: 0.0 for f in self.logged if f != self.gold}

    def lora(self, task: str = "CAUSAL_LM") -> Any:
        """A new ``LoraConfig`` for a language model, or for one that scores (``SEQ_CLS``); None without ``peft``."""
        if self.peft is None:
            return None
        from peft import LoraConfig

        return LoraConfig(task_type=task, **self.peft)

    def __repr__(self) -> str:
        """As of a dataclass, environment variables by their names: tracebacks and logs show it."""
        return f"Recipe({', '.join(f'{key}={value!r}' for key, value in self.tree().items())})"

    def tree(self, *, resolved: bool = False) -> dict[str, Any]:
        """The recipe as a mapping, with what it does not say; environment variables by their names or ``resolved``."""
        tree = asdict(self)
        references = tree.pop("references")
        return tree if resolved else put_back(tree, references)

    def to_yaml(self) -> str:
        """The whole recipe, environment variables by their names."""
        return write_yaml(self.tree())


def variants(recipe: Recipe) -> dict[str, tuple[Recipe, str]]:
    """Every policy of a study: the recipe that makes it, and what it is called there."""
    found = {name: (recipe, name) for name in recipe.policies}
    for rounds in recipe.study.rounds:
        other = replace(recipe, rounds=rounds)
        for name, (_, k) in other.origins.items():
            if k:
                found[f"{name} in {rounds} rounds" if k == rounds else f"{name} of {rounds}"] = (other, name)
    return found


def saved_tree(path: Path) -> dict[str, Any]:
    """The mapping of a saved recipe with the defaults of what it does not say: it may be of an earlier version.

    Raises:
        RecipeError: it is no recipe that this version knows.
    """
    try:
        recipe = _built(read_unresolved(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    return read_yaml(recipe.to_yaml())


def _built(tree: Any) -> Recipe:
    """A recipe of what `read_unresolved` read, which remembers its references."""
    tree, references = resolve_references(tree)
    if isinstance(tree, dict) and "references" in tree:
        raise RecipeError("references is not known: it is what a file's ${NAME} become")
    recipe = _with_typed_stages(build(Recipe, tree))
    typed_tree = recipe.tree(resolved=True)
    found = {path: (text, _at(typed_tree, path, value)) for path, (text, value) in references.items()}
    return replace(recipe, references=found)


def _at(tree: Any, path: tuple[str | int, ...], default: Any) -> Any:
    for key in path:
        if not isinstance(tree, dict | list):
            return tree  # one value where several may stand
        try:
            tree = tree[key]  # type: ignore[index]
        except (KeyError, IndexError):
            return default
    return tree


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, a file or the name of a packaged one (embedded when none is named), and apply dotted overrides.

    ``base: other.yaml`` starts from another recipe, found from this one's folder, ``base: NAME`` from a packaged one:
    mappings are merged key by key, but those of names (`NAMES`), which take the place of the other's.

    Raises:
        RecipeError: the file is missing or no mapping, a key is unknown or missing, a value is of the wrong type or
            out of range, the configuration of a stage cannot be built, or keys contradict each other.
    """
    path = EMBEDDED if path is None else _found(Path(path))
    tree = _read(path)
    for key, value in (overrides or {}).items():
        _set(tree, key.split("."), value)
    try:
        recipe = _built(tree)
        check_recipe(recipe)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a recipe on top of those of its bases."""
    if path.resolve() in seen:
        raise RecipeError(f"{path}: its base leads back to itself")
    try:
        text = yaml_text(path, what="recipe")
    except ValueError as error:
        raise RecipeError(f"{error}" + (f" (the base of {seen[-1]})" if seen else "")) from error
    try:
        tree = read_unresolved(text)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is {type(tree).__name__}")
    base, _ = resolve_references(tree.pop("base", None))
    if not isinstance(base, str | None):
        raise RecipeError(f"{path}: base must be the path of a recipe, not {base!r}")
    if base is None:
        return tree
    beside = path.parent / base
    return _merged(_read(beside if beside.suffix else _found(beside, base), (*seen, path.resolve())), tree)


def _found(path: Path, name: str = "") -> Path:
    """A recipe's file, or that of the packaged recipe of this name."""
    try:
        return path if path.is_file() else find_packaged(name or path)
    except ValueError as error:
        raise RecipeError(str(error)) from error


NAMES = ("learners", "methods", "comparisons", "like")
"""Keys whose mappings have names that a recipe chooses, or are about such names."""


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(under)
    for key, value in over.items():
        deep = isinstance(value, dict) and isinstance(out.get(key), dict) and key not in NAMES
        out[key] = _merged(out[key], value) if deep else value
    return out


def _with_typed_stages(recipe: Recipe) -> Recipe:
    """The recipe with every argument of a stage as its configuration wants it."""
    from rto.trainers.preference import PreferenceConfig
    from rto.trainers.rto import RTOConfig
    from rto.trainers.supervised import RewardConfig, SFTConfig

    def of(kind: Any, key: str, values: Any, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        _check_keys(kind, key, values, SET_BY_RECIPE, "the recipe itself", more or {})
        return typed(kind, values, key, more=more)

    learners = {n: of(PreferenceConfig, f"learners.{n}", own, LEARNER_KEYS) for n, own in recipe.learners.items()}
    methods = {n: of(RTOConfig, f"methods.{n}", own, METHOD_KEYS) for n, own in recipe.methods.items()}
    return replace(
        recipe,
        sft=None if recipe.sft is None else of(SFTConfig, "sft", recipe.sft),
        prefer=of(PreferenceConfig, "prefer", recipe.prefer),
        learners=learners,
        reward=None if recipe.reward is None else of(RewardConfig, "reward", recipe.reward),
        train=of(RTOConfig, "train", recipe.train),
        methods=methods,
        peft=_typed_peft(recipe),
    )


def _check_keys(kind: Any, key: str, values: Any, ours: set[str], who: str, more: Mapping[str, Any]) -> None:
    known = ({f.name for f in fields(kind) if f.init} - ours) | more.keys()
    for name in values if isinstance(values, Mapping) else ():
        if name not in known:
            why = f"is set by {who}" if name in ours else f"is not known{nearest(name, known)}"
            raise RecipeError(f"{key}.{name} {why}")


def stage_config(recipe: Recipe, stage: str, output_dir: str | Path, k: int = 1) -> Any:
    """What a stage trains with in round k: the configuration of ``sft``, ``reward``, or a learner or method.

    ``total_episodes`` are those of all rounds: a round has its part.

    Raises:
        RecipeError: it cannot be built; the message names the key that is to blame.
    """
    from rto.trainers.base import check_training
    from rto.trainers.preference import PreferenceConfig
    from rto.trainers.rto import RTOConfig
    from rto.trainers.supervised import RewardConfig, SFTConfig

    fixed: dict[str, Any] = {"output_dir": str(output_dir), "seed": recipe.seed_of(k)}
    common = {**TRAINING_DEFAULTS, "trust_remote_code": recipe.trust_remote_code}
    if stage in recipe.learners:
        kind: Any = PreferenceConfig
        defaults, sections = common, {"prefer": recipe.prefer, f"learners.{stage}": recipe.learners[stage]}
    elif stage in recipe.methods:
        kind = RTOConfig
        defaults = {**common, "logging_steps": 0}
        sections = {"train": recipe.train, f"methods.{stage}": recipe.methods[stage]}
        fixed["max_completion_length"] = recipe.completion_length
        if len(paid := recipe.rewards(stage)) > 1:
            fixed["reward_weights"] = list(paid.values())
    else:
        kind = {"sft": SFTConfig, "reward": RewardConfig}[stage]
        defaults, sections = common, {stage: getattr(recipe, stage)}
    own = LEARNER_KEYS.keys() | METHOD_KEYS.keys()
    given = {name: f"{key}.{name}" for key, values in sections.items() for name in values if name not in own}
    values = {name: value for section in sections.values() for name, value in section.items() if name in given}
    if both := values.keys() & fixed.keys():
        raise RecipeError(f"{given[min(both)]} is set by the recipe itself: paid_by says what a method is paid")
    if recipe.rounds > 1 and isinstance(total := values.get("total_episodes"), int):
        values["total_episodes"] = max(1, total * k // recipe.rounds - total * (k - 1) // recipe.rounds)
    try:
        config = kind(**{**defaults, **values}, **fixed)
        config.references = {
            where: found for key in sections for where, found in below(recipe.references, *key.split(".", 1)).items()
        }
        check_training(config)
        if config.eval_strategy != "no" and (recipe.data.eval_pairs is None or stage in ("sft", *recipe.methods)):
            raise ValueError("eval_strategy: the stage has no held-out rows (data.eval_pairs): leave it out")
    except (ValueError, TypeError, ImportError) as error:
        name = culprit(error, given)
        key = list(sections)[-1] if name is None else given[name]
        raise RecipeError(f"{key}: {' '.join(str(error).split())}") from error
    return config


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be wrong in a recipe and seen without loading a model.

    Raises:
        RecipeError: with the key and the remedy.
    """
    if recipe.sft is not None and recipe.data.demonstrations is None:
        raise RecipeError("sft needs data.demonstrations; give them, or set sft to null")
    by = recipe.labels.by
    if recipe.data.pairs is None and ((by == "gold" and recipe.gold is None) or recipe.data.pair_prompts is None):
        needed = "gold and data.pair_prompts" if by == "gold" else "data.pair_prompts"
        raise RecipeError(f"without data.pairs, pairs are sampled and labelled: give {needed}")
    for rounds in recipe.study.rounds:
        if rounds == recipe.rounds or recipe.study.rounds.count(rounds) > 1:
            raise RecipeError(f"study.rounds: {rounds} is there already: name each number of rounds once")
        _check_rounds(replace(recipe, rounds=rounds))
        _check_names(replace(recipe, rounds=rounds))
    _check_rounds(recipe)
    _check_names(recipe)
    if recipe.reward is None:
        for name, own in recipe.methods.items():
            if {**recipe.train, **own}.get("score_coef", 1.0) != 0 and own.get("paid_by") != "gold":
                raise RecipeError(
                    f"methods.{name} has a score_coef but reward is null: give reward: {{}}, or score_coef: 0"
                )
        if recipe.gold is None:
            raise RecipeError(
                "nothing would judge the evaluation: give gold, or reward: {} (methods with score_coef: 0 are then "
                "measured by the reward model, and not paid by it)"
            )
    for stage in ("sft", "reward"):
        if getattr(recipe, stage) is not None:
            stage_config(recipe, stage, "run")
    for stage in (*recipe.learners, *recipe.methods):
        stage_config(recipe, stage, "run")
    _check_peft(recipe)
    functions = [("gold", recipe.gold), ("model", recipe.model), *(("logged", f) for f in recipe.logged)]
    rows = {f.name: getattr(recipe.data, f.name) for f in fields(Data)}
    functions += [(f"data.{name}.path", found.path) for name, found in rows.items() if found is not None]
    for key, value in functions:
        if value is not None and (is_function(value) or key in ("gold", "logged")):
            resolve(value, f"{key}:")
    for name, found in rows.items():
        if found is not None and is_function(found.path) and found.rows is None:
            raise RecipeError(f"data.{name}.rows: say how many rows the function {found.path} is to make")


def _typed_peft(recipe: Recipe) -> dict[str, Any] | None:
    if recipe.peft is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RecipeError("peft needs the package peft: pip install peft") from error
    _check_keys(LoraConfig, "peft", recipe.peft, SET_BY_STAGES, "the stages themselves", {})
    return typed(LoraConfig, recipe.peft, "peft")


def _check_peft(recipe: Recipe) -> None:
    from rto.models.loading import check_adapter

    if recipe.peft is not None:
        try:
            check_adapter("peft", recipe.lora())
        except (TypeError, ValueError, ImportError) as error:
            raise RecipeError(f"peft: {' '.join(str(error).split())}") from error


def _check_rounds(recipe: Recipe) -> None:
    """Labels have somebody who gives them, and every round has pairs and prompts of its own."""
    labels, data = recipe.labels, recipe.data
    if (labels.by == "judge") != (labels.judge is not None):
        raise RecipeError(
            "labels.by: judge needs labels.judge: {model: NAME, base_url: URL}"
            if labels.by == "judge"
            else f"labels.judge is not asked, since labels.by is {labels.by}: set labels.by: judge, or leave it out"
        )
    if labels.by != "gold" and not recipe.sampled:
        raise RecipeError(
            f"labels.by: {labels.by} would label nothing: data.pairs have labels, and there is no later round"
        )
    if recipe.rounds == 1:
        if recipe.pairs_from and not recipe.study.rounds:
            raise RecipeError("pairs_from says who writes the pairs of later rounds: give rounds: 2 or more")
        return
    if data.pair_prompts is None or (labels.by == "gold" and recipe.gold is None):
        needed = "data.pair_prompts" if data.pair_prompts is None else "gold, or labels.by: judge or person"
        raise RecipeError(f"rounds: {recipe.rounds}: pairs of later rounds are sampled and labelled: give {needed}")
    for name in recipe.pairs_from:
        if name not in recipe.trained:
            raise RecipeError(f"pairs_from: no learner or method {name!r}{nearest(name, recipe.trained)}")
    if len(set(recipe.pairs_from)) < len(recipe.pairs_from):
        raise RecipeError("pairs_from names a policy twice: each one writes an equal part")
    for key, parts in (("pair_prompts", len(recipe.sampled)), ("prompts", recipe.rounds)):
        found = getattr(data, key)
        if found.rows is not None and found.rows < parts:
            raise RecipeError(f"data.{key}.rows: {found.rows} rows cannot be shared among {parts} rounds")


def _check_names(recipe: Recipe) -> None:
    """Every name that a method, or the study, refers to is there, and no two of them share a folder."""
    if not recipe.learners:
        raise RecipeError("learners is empty: leave the key out for DPO alone")
    folders = {stage: stage for stage in STAGES}
    folders |= {f"round-{k}": f"round {k}" for k in range(2, recipe.rounds + 1)}
    folders |= {} if recipe.labels.by == "gold" else {"labels": "the folder of labels"}
    for name in (*recipe.learners, *recipe.methods):
        if (taken := folders.setdefault(folder_of(name), name)) != name or name in STAGES:
            raise RecipeError(f"{name} and {taken} would share the folder {folder_of(name)}: rename one")
    if recipe.start in (*recipe.learners, *recipe.methods):
        raise RecipeError(f"{recipe.start} is the name of the starting policy: rename the learner or method")
    if both := recipe.learners.keys() & recipe.methods.keys():
        raise RecipeError(f"{min(both)} is the name of a learner and of a method: rename one")
    for name, own in recipe.methods.items():
        for learner in recipe.learners_of(name):
            if learner not in recipe.learners:
                key = "dpo_model" if learner in recipe.token_rewards(name) else "dpo_ref_model"
                raise RecipeError(f"methods.{name}.{key}: no learner {learner!r}{nearest(learner, recipe.learners)}")
        kind = {**recipe.train, **own}.get("token_reward", "logratio")
        for learner in recipe.token_rewards(name):
            if recipe.has_scalar_head(learner) != (kind == "q"):
                loss = "has the loss qrm" if recipe.has_scalar_head(learner) else "is a language model"
                raise RecipeError(
                    f"methods.{name}: token_reward is {kind}, and {learner} {loss}: q reads learners of loss qrm, "
                    "everything else reads language models"
                )
        if own.get("paid_by") == "gold" and recipe.gold is None:
            raise RecipeError(f"methods.{name} is paid_by gold, but the recipe has no gold")
    study = recipe.study
    known = {"scaled": recipe.trained, "comparisons": list(variants(recipe))}
    for key, names in (("scaled", study.scaled), *(("comparisons", pair) for pair in study.comparisons.values())):
        for name in names:
            if name not in known[key]:
                raise RecipeError(f"study.{key}: no method {name!r}{nearest(name, known[key])}")
    for name in [] if study.frontier is None else study.frontier.methods:
        if name not in recipe.methods:
            raise RecipeError(f"study.frontier.methods: no method {name!r}{nearest(name, recipe.methods)}")
    like = {} if study.tune is None else study.tune.like
    for name, other in like.items():
        for named in (name, other):
            if named not in recipe.methods:
                raise RecipeError(f"study.tune.like: no method {named!r}{nearest(named, recipe.methods)}")
        if other in like:
            raise RecipeError(f"study.tune.like: {name} is like {other}, which is not searched itself")
    for question, pair in study.comparisons.items():
        if len(pair) != 2:
            raise RecipeError(f"study.comparisons: {question}: give two methods, not {len(pair)}")
    if study.fractions and recipe.data.prompts.rows is None:
        raise RecipeError("study.fractions are shares of data.prompts.rows: give that number")
    if not all(0 < fraction < 1 for fraction in study.fractions):
        raise RecipeError("study.fractions are shares of the prompts between 0 and 1")
    for key in ("tune", "frontier", "foretell"):
        if getattr(study, key) is not None and recipe.data.validation_prompts is None:
            raise RecipeError(f"study.{key} reads data.validation_prompts: give them, or set study.{key} to null")
    if study.tune is not None and study.tune.frontier and study.frontier is None:
        raise RecipeError("study.tune.frontier tunes for the levels of study.frontier: give one, or set it to false")
    if study.foretell is not None and recipe.gold is None:
        raise RecipeError("study.foretell tells the gain in gold, and the recipe has none: set it to null")


def folder_of(name: str) -> str:
    """The folder of a learner or a method in a run."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def stage_folder(name: str, k: int) -> str:
    """The folder of a stage of round k in a run: those of the first stand at the root."""
    return folder_of(name) if k == 1 else f"round-{k}/{folder_of(name)}"


def part(rows: Dataset, rounds: Sequence[int], k: int) -> Dataset:
    """The rows of round k among those that share them: every so many, so that no stretch of a file is one round's."""
    if len(rounds) == 1:
        return rows
    return rows.select(range(list(rounds).index(k), len(rows), len(rounds)))


def is_function(path: str) -> bool:
    """``module:function``, not a path or a hub name."""
    module, _, name = path.partition(":")
    return bool(name) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def resolve(path: str, role: str = "") -> Callable[..., Any]:
    """Import ``module:function``; the present folder is searched last (`rto.imports`).

    An error within the user's module is the user's own and keeps its traceback.

    Raises:
        ValueError: there is no such module, or no such function in it; ``role`` says what it was to be.
    """
    module, _, name = path.partition(":")
    failed = f"{role} {path} cannot be imported:".lstrip()
    if not is_function(path):
        raise ValueError(f"{failed} expected module:function")
    try:
        with users_code(f"the module {module}"):
            found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the user's module needs
        raise ValueError(
            f"{failed} there is no module {error.name} here or on the Python path{taken(module)}"
        ) from error
    function = getattr(found, name, None)
    if not callable(function):
        known = [n for n, value in vars(found).items() if callable(value) and not n.startswith("_")]
        what = f"there is no {name} in {module}" if function is None else f"{name} in {module} is not a function"
        raise ValueError(f"{failed} {what}{taken(module) or nearest(name, known)}")
    return function


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree.get(key)
        if not isinstance(child, dict):
            child = tree[key] = {}
        tree = child
    tree[keys[-1]] = value
