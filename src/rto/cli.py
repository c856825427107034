"""`rto run | reproduce | sft | reward | prefer | train | evaluate | inspect`: the whole method, or one stage of it."""

import ctypes
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rto import __version__, signals
from rto.errors import make_folder, make_room_for, told
from rto.files import plain, write_atomically
from rto.flags import OneLine, overrides
from rto.imports import close_present_folder
from rto.packaged import copied, listing
from rto.stage_help import STAGES, recipe_help, shown_flags, stage_help
from rto.terminal import PlainFormatter, Terminal, only_our_bars, say
from rto.trl_names import ROWS, by_trl_names
from rto.values import as_flag, nearest

USAGE = """usage: rto COMMAND [options]

the whole method:
  run [RECIPE.yaml] [--output_dir DIR] [--KEY VALUE ...]
                      sft → dpo → reward → PPO, RTO → evaluate → report; the embedded recipe when none is named.
                      A key of the recipe is overridden by its dotted name: --train.total_episodes 512.
                      On a folder that was begun, it continues where it stopped.
  init NAME           write a commented recipe to make your own, for your data and model: rto init chat
  reproduce TASK      every method of a study over seeds, upstream stages shared, with intervals and paired tests

one stage (flags as in TRL; --config FILE.yaml holds the same keys):
  sft                 fine-tune on demonstrations
  prefer              learn π_dpo from preference pairs
  reward              learn a sentence reward model from preference pairs
  train               PPO on the token reward of π_dpo (RTO), or without it (--dpo_coef 0)

win rates (AlpacaEval 2, Arena-Hard, your own prompts):
  evaluate generate   a model's answers to a benchmark's prompts
  evaluate judge      compare two models' answers, by a chat model or offline
  evaluate compare    the table of several runs, with intervals

and:
  export              merge a policy adapter into its base and write the whole model
  inspect             what a token reward is worth: on held-out pairs (--dataset_name), a prompt (--prompt) or a file
                      (--completions), token by token
  plan RECIPE.yaml    memory, arithmetic and time before anything runs, and whether it fits: --devices 8 --memory 80
  theory              the paper's statements, run
  report DIR          write report.html of a run, or of one stage, again
  watch DIR           show it in the browser while the run goes on, with alarms

rto COMMAND --help tells the options of a command, rto --version which versions are at work."""
RUN_USAGE = """usage: rto run [RECIPE] [--output_dir DIR] [--KEY VALUE ...]

The whole method: sft → pairs → dpo → reward → PPO, RTO → evaluation → report. RECIPE is a file, or the name of one
that comes with the package; the embedded one when none is named. On a folder that was begun, it continues where it
stopped.

  --output_dir DIR                  folder of the run (runs/RECIPE)
  --dry_run                         tell what each stage would read, train and cost, and stop
  --list                            names of the recipes that come with the package"""
INIT_USAGE = """usage: rto init NAME [--output FILE] [--KEY VALUE ...]

Writes a recipe that comes with the package (rto run --list), comments and all, to a file of your own: NAME.yaml here,
unless --output says otherwise. Keys that stand in it can be set at once: rto init chat --model MODEL
--data.pairs.path pairs.jsonl; of a file of your own all rows are taken."""
PRECISIONS = ("float32", "bfloat16", "float16")


@by_trl_names(ROWS)
@dataclass
class DataArguments:
    """Which data set."""

    dataset_name: str = field(metadata={"help": "A local file or folder, or a hub name."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out data, read like dataset_name."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of the held-out data."})


@dataclass
class ExportArguments:
    """What `rto export` merges, and where to."""

    model_name_or_path: str = field(metadata={"help": "Folder of a policy adapter."})
    output_dir: str = field(metadata={"help": "A new folder for the whole model."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision to merge in; auto: the base's.", "choices": ("auto", *PRECISIONS)},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base."})


@dataclass
class ReferenceArguments:
    """Models of `rto prefer` besides the one it trains."""

    ref_model: str | None = field(default=None, metadata={"help": "π_ref; the starting policy when not given."})


@dataclass
class RewardArguments:
    """Models and rewards of `rto train` besides the policy."""

    dpo_model: list[str] | None = field(
        default=None,
        metadata={"help": "π_dpo: folder, hub id, adapter or function (module:function); several: their mean."},
    )
    dpo_ref_model: str | None = field(default=None, metadata={"help": "π_dpo's reference, if it is not ref_model."})
    ref_model: str | None = field(default=None, metadata={"help": "π_ref; the starting policy when not given."})
    value_model: str | None = field(default=None, metadata={"help": "What the critic starts from."})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward models (folder or hub id) or functions (module:function)."}
    )


@signals.in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `rto`; bad input ends in one line and exit code 2."""
    if argv is None:  # called as the entry point of a process
        close_present_folder()
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--version"]:
        print(_versions())
        return 0
    if args and args[0] in STAGES and {"-h", "--help"} & set(args):
        print(stage_help(args[0]))
        return 0
    if not args or args[0] in ("-h", "--help") or args[0] not in COMMANDS:
        if args and args[0] not in ("-h", "--help"):
            say(f"rto: no such command: {args[0]}{nearest(args[0], COMMANDS)}", sys.stderr)
            return 2
        print(USAGE)
        return 0 if args else 2
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of optional parts whenever it is imported
    # Rows are padded on the right, where causal attention does not look.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda r: "in an `attention_mask`" not in r.getMessage()
    )
    _keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # PEFT sets it right by itself
            for library in ("transformers", "trl", "peft"):  # what one deprecates and another uses
                warnings.filterwarnings("ignore", category=FutureWarning, module=library)
            code = COMMANDS[args[0]](args[1:])
        if argv is None and code == 0 and "LOCAL_RANK" in os.environ:
            from rto.trainers.engine import leave

            leave()
        return code
    except Exception as error:
        if (line := told(error)) is None:
            raise
        say(f"rto {args[0]}: {line}", sys.stderr)
        return 2


def _versions() -> str:
    """Of this package and of those that results hang on."""
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    return f"rto {__version__} (Python {platform.python_version()}, {others})"


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of handing it back to the system, and torch to ask for large pages.

    PyTorch frees and asks for tensors of megabytes at every operation; each would come as untouched pages and be paid
    for in page faults, a quarter of a forward pass on a CPU. Weights that are read once a step come a third faster
    from large pages, where the system gives them. Processes started from this one inherit it through the environment,
    where a user's own setting stays.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            for name, parameter in {"MMAP": M_MMAP_THRESHOLD, "TRIM": M_TRIM_THRESHOLD}.items():
                libc.mallopt(parameter, 2**31 - 1)
                os.environ[f"MALLOC_{name}_THRESHOLD_"] = str(2**31 - 1)
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at torch's first allocation


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def run(args: list[str]) -> int:
    """`rto run`."""
    if {"-h", "--help"} & set(args):
        print(RUN_USAGE, recipe_help(), sep="\n\n")
        return 0
    only_our_bars()
    if "--list" in args:
        print(listing())
        return 0
    named = args and not args[0].startswith("--")
    path, rest = (Path(args[0]), args[1:]) if named else (None, args)
    from rto.recipe import Recipe, load_recipe

    dry = DRY & set(rest)
    values = overrides([word for word in rest if word not in DRY], ["output_dir", *(f.name for f in fields(Recipe))])
    folder = values.pop("output_dir", None) or Path("runs") / (path.stem if path else "embedded")
    recipe = load_recipe(path, values)
    if dry:
        from rto.dry_run import dry_run, show

        show(dry_run(recipe, Path(str(folder))), Terminal())
        return 0
    from rto.pipeline import run as run_recipe

    run_recipe(recipe, Path(str(folder)))
    return 0


DRY = {"--dry_run", "--dry-run"}


def init(args: list[str]) -> int:
    """`rto init`."""
    if not args or {"-h", "--help"} & set(args) or args[0].startswith("--"):
        print(INIT_USAGE)
        return 0 if args else 2
    name, values = args[0], overrides(args[1:])
    path = Path(str(values.pop("output", f"{Path(name).stem}.yaml")))
    text = copied(name, values)
    if path.exists():
        raise ValueError(f"{path} is there already: choose another --output")
    make_room_for(path, "--output")
    write_atomically(path, text)
    say(f"{path}: look it over, then rto run {path} --dry_run")
    return 0


def reproduce(args: list[str]) -> int:
    """`rto reproduce`."""
    parser = OneLine(
        prog="rto reproduce",
        description="Run the methods of a study over seeds; the same command continues after a kill. Keys of the "
        "recipe are overridden by their dotted names, as in rto run.",
    )
    parser.add_argument("task", help="embedded, imdb, stories (packaged: TASK/study), or the path of a recipe")
    parser.add_argument("--methods", nargs="+", help="names of the recipe's learners and methods; all of them")
    parser.add_argument("--seeds", type=int, help="how many; study.seeds of the recipe")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each has its share of the cores")
    parser.add_argument("--output_dir", type=Path, help="default: runs/TASK-study")
    parser.add_argument("--report", action="store_true", help="only write report.md and the figures again")
    flags, rest = parser.parse_known_args(args)
    for name in ("seeds", "jobs"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    from rto.recipe import Recipe
    from rto.studies.report import write_study
    from rto.studies.reproduce import reproduce as run_study
    from rto.studies.reproduce import task_recipe

    only_our_bars()
    folder = flags.output_dir or Path("runs") / f"{Path(flags.task).stem}-study"
    if flags.report:
        results = folder / "results.json"
        if not results.is_file():
            raise ValueError(f"{results} is not there: run rto reproduce without --report first")
        make_folder(folder, "--output_dir")
    else:
        recipe = task_recipe(flags.task, overrides(rest, [f.name for f in fields(Recipe)], parser.flags))
        results = run_study(recipe, folder, methods=flags.methods, seeds=flags.seeds, jobs=flags.jobs)
    page = write_study(results)
    say(page.read_text(encoding="utf-8"))
    say(f"results: {results}\nreport: {page}")
    return 0


def sft(args: list[str]) -> int:
    """`rto sft`."""
    from rto.trainers.supervised import SFTConfig, SFTTrainer

    return _supervised("sft", args, SFTConfig, SFTTrainer, task="CAUSAL_LM")


def reward(args: list[str]) -> int:
    """`rto reward`."""
    from rto.trainers.supervised import RewardConfig, RewardTrainer

    return _supervised("reward", args, RewardConfig, RewardTrainer, task="SEQ_CLS")


def _supervised(command: str, args: list[str], kind: Any, trainer: Any, *, task: str) -> int:
    data, config, model = _parse(command, args, DataArguments, kind)
    config.model_init_kwargs = {**_init(model, config), **config.init_kwargs}
    _check_models(config, model, {})
    rows, held_out = _rows(data, config)
    peft = _peft(model, task=task)
    built = trainer(model.model_name_or_path, config, train_dataset=rows, eval_dataset=held_out, peft_config=peft)
    return _finish(built, data)


def prefer(args: list[str]) -> int:
    """`rto prefer`."""
    from rto.trainers.preference import PreferenceConfig, PreferenceTrainer

    data, others, config, model = _parse("prefer", args, DataArguments, ReferenceArguments, PreferenceConfig)
    config.model_init_kwargs = {**_init(model, config), **config.init_kwargs}
    _check_models(config, model, {"ref_model": others.ref_model})
    rows, held_out = _rows(data, config)
    trainer = PreferenceTrainer(
        model.model_name_or_path,
        config,
        ref_model=others.ref_model,
        train_dataset=rows,
        eval_dataset=held_out,
        peft_config=_peft(model),
    )
    return _finish(trainer, data)


def train(args: list[str]) -> int:
    """`rto train`."""
    from rto.recipe import is_function, resolve
    from rto.trainers.rto import RTOConfig, RTOTrainer

    data, others, config, model = _parse("train", args, DataArguments, RewardArguments, RTOConfig)
    config.model_init_kwargs = {**_init(model, config), **config.init_kwargs}
    rewards, token_rewards = (
        [resolve(name, f"--{flag}") if is_function(name) else name for name in getattr(others, flag) or []]
        for flag in ("reward_funcs", "dpo_model")
    )
    used = dict(vars(others)) if config.dpo_coef else {**vars(others), "dpo_model": None, "dpo_ref_model": None}
    _check_models(config, model, used)
    rows, held_out = _rows(data, config)
    trainer = RTOTrainer(
        model.model_name_or_path,
        config,
        dpo_model=token_rewards,
        dpo_ref_model=others.dpo_ref_model,
        ref_model=others.ref_model,
        value_model=others.value_model,
        reward_funcs=rewards,
        train_dataset=rows,
        eval_dataset=held_out,
        peft_config=_peft(model),
    )
    return _finish(trainer, data)


def export(args: list[str]) -> int:
    """`rto export`."""
    from rto.stage_parser import StageParser

    (parsed,) = StageParser([ExportArguments], "rto export").read(args)
    only_our_bars()
    from rto.models.loading import check_weights, find_config
    from rto.models.roles import export as write

    trust = parsed.trust_remote_code
    find_config("--model_name_or_path", parsed.model_name_or_path, trust_remote_code=trust)
    check_weights("--model_name_or_path", parsed.model_name_or_path)
    say(f"model: {write(parsed.model_name_or_path, parsed.output_dir, dtype=parsed.dtype, trust_remote_code=trust)}")
    return 0


def inspect(args: list[str]) -> int:
    """`rto inspect`."""
    from rto.inspection.reading import InspectArguments
    from rto.inspection.reading import inspect as look
    from rto.stage_parser import StageParser

    (parsed,) = StageParser([InspectArguments], "rto inspect").read(args)
    folder = make_folder(parsed.output_dir, "--output_dir")
    only_our_bars()
    inspection = look(parsed)
    from rto.inspection.page import inspection_text, write_inspection

    console = Terminal()
    console.print(inspection_text(inspection))
    page = write_inspection(inspection, folder)
    console.print(f"page: {page}", soft_wrap=True)
    return 0


def evaluate(args: list[str]) -> int:
    """`rto evaluate`."""
    from rto.evaluation.commands import main as run_evaluate

    return run_evaluate(args)


def report(args: list[str]) -> int:
    """`rto report`."""
    parser = OneLine(prog="rto report", description="Write report.html of a run folder again.")
    parser.add_argument("folder", type=Path)
    from rto.report.page import write_report

    folder = parser.parse_args(args).folder
    if folder.is_dir():
        make_folder(folder, "the page goes into", remedy="make it so, copy the run, or look at it with rto watch")
    say(write_report(folder))
    return 0


def watch(args: list[str]) -> int:
    """`rto watch`."""
    from rto.report.watch import main as run_watch

    return run_watch(args)


def plan(args: list[str]) -> int:
    """`rto plan`."""
    from rto.planning.command import main as run_plan

    return run_plan(args)


def theory(args: list[str]) -> int:
    """`rto theory`."""
    from rto.theory.__main__ import main as run_theory

    return run_theory(args)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "init": init,
    "reproduce": reproduce,
    "sft": sft,
    "reward": reward,
    "prefer": prefer,
    "train": train,
    "export": export,
    "inspect": inspect,
    "evaluate": evaluate,
    "report": report,
    "watch": watch,
    "plan": plan,
    "theory": theory,
}


def _parse(command: str, args: list[str], *kinds: Any) -> tuple[Any, ...]:
    """Flags and ``--config`` into ``kinds`` and `ModelArguments`, all that can be checked without a model."""
    if DRY & set(args):
        raise ValueError(
            "--dry_run is of recipes: rto init chat writes one, rto run RECIPE.yaml --dry_run tells its plan"
        )
    from rto.stage_parser import StageParser
    from rto.trainers.base import check_training
    from rto.trainers.checkpoints import CheckpointError, check_seal
    from rto.trainers.precision import ModelArguments

    only_our_bars()
    parser = StageParser([*kinds, ModelArguments], f"rto {command}")
    if {"--help-all", "--help_all"} & set(args):
        print(parser.help_all(stage_help(command), shown_flags(command)))
        raise SystemExit(0)
    *parsed, config, model = parser.read(args)
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the model to start from, a folder or a hub id")
    check_training(config)
    resume = as_flag(config.resume_from_checkpoint)
    config.resume_from_checkpoint = True if str(resume).lower() == "last" else resume
    if isinstance(config.resume_from_checkpoint, str):
        try:
            check_seal(Path(config.resume_from_checkpoint))
        except CheckpointError as error:
            raise CheckpointError(f"--resume_from_checkpoint {error}") from error
    if model.use_peft and find_spec("peft") is None:
        raise ValueError("--use_peft needs the package peft: pip install peft")
    for name in ("output_dir", "ref_cache_dir"):
        if (folder := getattr(config, name, None)) is not None:
            make_folder(folder, f"--{name}")
    return (*parsed, config, model)


def _check_models(config: Any, model: Any, others: Mapping[str, str | list[str] | None]) -> None:
    """That every model is there, before the first of them is loaded.

    Raises:
        ValueError: one is not; the message names its flag.
    """
    from rto.models.loading import check_weights, find_config, is_adapter, load_tokenizer
    from rto.recipe import is_function
    from rto.trainers.precision import Reading

    start = model.model_name_or_path
    reading = Reading.of(config, start)
    for flag, sources in {"model_name_or_path": start, **others}.items():
        for source in [sources] if isinstance(sources, str) else sources or ():
            if not is_function(source):
                find_config(f"--{flag}", source, **reading.tokenizer(source))
                check_weights(f"--{flag}", source)
    if not is_adapter(start):
        load_tokenizer(start, **reading.tokenizer(start))
    template = getattr(config, "chat_template_path", None)
    if template is not None and not Path(template).is_file():  # a tokenizer's, a folder's or a hub id's
        try:
            load_tokenizer(template, needs_eos=False, trust_remote_code=config.trust_remote_code)
        except ValueError as error:
            raise ValueError(f"--chat_template_path {error}") from error


def _rows(data: DataArguments, config: Any) -> tuple[Any, Any]:
    """Rows to train on, and held-out ones where there are some."""
    from rto.data.formats import load_rows

    evaluates = {"eval_strategy": config.eval_strategy != "no", "eval_on_start": config.eval_on_start}
    for flag, given in evaluates.items():
        if given and data.eval_dataset_name is None:
            raise ValueError(f"--{flag} needs rows to evaluate on: give --eval_dataset_name")
    rows = load_rows(data.dataset_name, name=data.dataset_config, split=data.dataset_train_split)
    if data.eval_dataset_name is None:
        return rows, None
    return rows, load_rows(data.eval_dataset_name, name=data.dataset_config, split=data.dataset_test_split)


def _init(model: Any, config: Any) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` from `ModelArguments`."""
    names = {"revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"}
    found = {name: getattr(model, ours, None) for name, ours in names.items()}
    if model.load_in_4bit or model.load_in_8bit:
        found |= _quantized(model, config)
    return {name: value for name, value in found.items() if value is not None}


def _quantized(model: Any, config: Any) -> dict[str, Any]:
    """``--load_in_4bit`` and ``--load_in_8bit``: a frozen base of few bits under adapters (QLoRA)."""
    from trl import get_quantization_config

    flag = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if not model.use_peft:
        raise ValueError(f"--{flag} freezes the base, so nothing could learn: add --use_peft")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"--{flag} needs the package bitsandbytes: pip install bitsandbytes")
    compute = model.dtype or ("bfloat16" if config.bf16 else "float32")
    return {"quantization_config": get_quantization_config(replace(model, dtype=compute))}


def _peft(model: Any, task: str = "CAUSAL_LM") -> Any:
    """The adapter that ``--use_peft`` and its flags describe, for a language model or one that scores."""
    from trl import get_peft_config

    return get_peft_config(replace(model, lora_task_type=task))


def _finish(trainer: Any, data: DataArguments) -> int:
    from rto.files import alone
    from rto.trainers.logs import beginning

    trainer.data_names = [data.dataset_name]
    folder = trainer.args.output_dir
    trainer.accelerator.print(plain(f"{folder}: {beginning(trainer)}; to see it: rto watch {shlex.quote(folder)}"))
    with alone(Path(trainer.args.output_dir)) if trainer.is_world_process_zero() else nullcontext():
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.accelerator.print(trainer.evaluate())
        trainer.create_model_card()  # with these metrics
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(plain(f"model: {folder}; what it did: rto report {shlex.quote(folder)}"))
    return 0
