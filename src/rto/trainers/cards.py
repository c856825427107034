"""What a saved model says of itself: ``README.md``, a model card as the hub reads it, and ``rto_config.json``.

Every trainer writes both beside its weights. The card names the method and its coefficients, the data, the last
metrics, versions, and what to cite; folders of this machine and keyword arguments of loading stay out of both.
"""

import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rto import __version__, module_of
from rto.credit import METHODS, Credit
from rto.declared import declared
from rto.files import write_atomically
from rto.functional.preference import LOSSES, needs_scalar_head
from rto.models.loading import source_name
from rto.trainers.engine import unwrapped
from rto.values import write_yaml

VERSIONS = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers")
COMMON = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type", "seed")
PRIVATE = {"model_init_kwargs", "ref_cache_dir", "remove_unused_columns", "dataloader_pin_memory", "logging_steps"}
PRIVATE |= {"stop_on_alarm", "trust_remote_code"}
METRICS: tuple[str, ...] = (
    "loss",
    "train_loss",
    "score",
    "kl",
    "entropy",
    "accuracy",
    "margin",
    "share/token",
    "explained_variance",
)
METRICS += ("completions/mean_length", "episodes")
"""Of the training log; of an evaluation all are shown."""
BIBLIOGRAPHY = {
    "rto": ("DPO Meets PPO: Reinforced Token Optimization for RLHF", "Zhong, Han and Shan, Zikang and Feng, Guhao and "
            "Xiong, Wei and Cheng, Xinle and Zhao, Li and He, Di and Bian, Jiang and Wang, Liwei", 2025, "2404.18922"),
    "ppo": ("Proximal Policy Optimization Algorithms", "Schulman, John and Wolski, Filip and Dhariwal, Prafulla and "
            "Radford, Alec and Klimov, Oleg", 2017, "1707.06347"),
    "dpo": ("Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "Rafailov, Rafael and "
            "Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and Finn, Chelsea", 2023,
            "2305.18290"),
    "ipo": ("A General Theoretical Paradigm to Understand Learning from Human Preferences", "Gheshlaghi Azar, "
            "Mohammad and Rowland, Mark and Piot, Bilal and Guo, Daniel and Calandriello, Daniele and Valko, Michal "
            "and Munos, Rémi", 2023, "2310.12036"),
    "kto": ("KTO: Model Alignment as Prospect Theoretic Optimization", "Ethayarajh, Kawin and Xu, Winnie and "
            "Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe", 2024, "2402.01306"),
    "simpo": ("SimPO: Simple Preference Optimization with a Reference-Free Reward", "Meng, Yu and Xia, Mengzhou and "
              "Chen, Danqi", 2024, "2405.14734"),
    "rdpo": ("Disentangling Length from Quality in Direct Preference Optimization", "Park, Ryan and Rafailov, Rafael "
             "and Ermon, Stefano and Finn, Chelsea", 2024, "2403.19159"),
    "tdpo": ("Token-level Direct Preference Optimization", "Zeng, Yongcheng and Liu, Guoqing and Ma, Weiyu and Yang, "
             "Ning and Zhang, Haifeng and Wang, Jun", 2024, "2404.11999"),
    "qrm": ("Discriminative Policy Optimization for Token-Level Reward Models", "Chen, Hongzhan and Yang, Tao and "
            "Gao, Shiping and Chen, Ruijun and Quan, Xiaojun and Tian, Hongtao and Yao, Ting", 2025, "2505.23363"),
}  # fmt: skip
"""Title, authors, year and arXiv number."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a model was trained by.

    Attributes:
        name: as people call it.
        does: what it does, in a sentence.
        tag: on the hub.
        task: the hub's name of what such a model is for.
        cites: keys of `BIBLIOGRAPHY`.
    """

    name: str
    does: str
    tag: str
    task: str = "text-generation"
    cites: tuple[str, ...] = ()


def method_of(args: Any) -> Method:
    """The method that a configuration describes."""
    kinds = {kind.__name__ for kind in type(args).__mro__}
    if "RTOConfig" in kinds:
        name = _online(args)
        reward = "" if args.dpo_coef == 0 else " on the token reward β₁·log π_dpo/π_ref of a preference-trained model"
        score = "" if args.score_coef == 0 else f"{' and' if reward else ' on'} a sentence score"
        cites: tuple[str, ...] = ("ppo",) if args.dpo_coef == 0 else ("rto", "ppo", "dpo")
        return Method(name=name, does=f"Policy optimization{reward}{score}.", tag=name.lower(), cites=cites)
    if "PreferenceConfig" in kinds:
        cites = tuple(key for key in (args.loss.rstrip("1"), "rto") if key in BIBLIOGRAPHY)
        title = {"rdpo": "R-DPO", "simpo": "SimPO", "qrm": "Q-RM"}.get(args.loss, args.loss.upper())
        if needs_scalar_head(LOSSES[args.loss]):
            does = "Scores every token of a completion; learned from preference pairs. No language model."
            return Method(name=title, does=does, tag=args.loss, task="token-classification", cites=cites)
        does = "Learned from preferences; its log-ratio to the model it started from is a reward for every token."
        if args.swap_pairs:
            title, does = f"reverse {title}", f"Learned from swapped preferences: what is not wanted. {does}"
        return Method(name=title, does=does, tag=args.loss, cites=cites)
    if "RewardConfig" in kinds:
        does = "Gives a completion a score, learned from preference pairs by Bradley–Terry."
        return Method(name="reward model", does=does, tag="reward-trainer", task="text-classification", cites=("rto",))
    return Method(name="SFT", does="Fine-tuned on demonstrations.", tag="sft")


def _online(args: Any) -> str:
    """Which of the paper's methods, by what of its values is structure rather than size."""

    def structure(credit: Credit) -> tuple[Any, ...]:
        reward = credit.reward
        return (reward.dpo_coef == 0, credit.placement, reward.shaping, type(credit.estimator))

    names = {structure(Credit.of(name)): name for name in METHODS}
    own = structure(args.credit())
    return names.get(own, "rto" if args.dpo_coef else "ppo").upper().replace("SEMI", "Semi")


def write_card(trainer: Any, folder: Path, name: str | None = None) -> None:
    """``README.md`` and ``rto_config.json`` of what a trainer has saved in a folder; by the process that saves."""
    if not trainer.args.should_save:  # the library calls ``_save`` in every process
        return
    write_atomically(folder / "rto_config.json", json.dumps(about(trainer), indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "README.md", card(trainer, name or Path(str(trainer.args.output_dir)).name))


def create_model_card(self: Any, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
    """A trainer's method of this name, which ``push_to_hub`` and TRL's checkpoints call."""
    if self.is_world_process_zero():
        write_card(self, Path(str(self.args.output_dir)), model_name)


def about(trainer: Any) -> dict[str, Any]:
    """How a model was trained, for programs."""
    method = method_of(trainer.args)
    return {
        "rto_version": __version__,
        "method": method.name,
        "base_model": _hub_name(_start(trainer)),
        "settings": settings(trainer.args),
        "data": data(trainer),
        "steps": trainer.state.global_step,
        "versions": dict(versions()),
    }


def settings(args: Any) -> dict[str, Any]:
    """A configuration's own arguments, and the common ones; nothing that names a folder or holds a secret."""
    ours = (k.__name__ for k in type(args).__mro__ if k.__module__.partition(".")[0] == "rto")
    kind = next(ours, None)  # TRL's own configurations serve, too
    own = [flag.name for flag in declared(module_of(kind), kind) if flag.name not in PRIVATE] if kind else []
    found = {name: getattr(args, name) for name in dict.fromkeys([*own, *COMMON])}
    if "loss_kwargs" in found:  # with those that were not given: β is one of them
        found["loss_kwargs"] = asdict(args.make_loss())
    return {name: str(x.value) if hasattr(x, "value") else x for name, x in found.items()}


def data(trainer: Any) -> dict[str, Any]:
    """Data sets by name where one is known, files without their folders, rows trained on, and left out with why."""
    rows = trainer.train_dataset
    skipped = {what: dict(x.counts) for what, x in getattr(trainer, "skipped", {}).items() if x.counts}
    given = [str(name) for name in getattr(trainer, "data_names", ()) if name]
    names = [name for name in given if _hub_name(name)]
    files = [Path(name).name for name in given if not _hub_name(name)]
    return {
        "names": names,
        "files": files,
        "rows": len(rows) if hasattr(rows, "__len__") else None,
        "left_out": skipped,
    }


@cache
def versions() -> Mapping[str, str]:
    """Of Python and the libraries that are there; looked up once, since every checkpoint has a card."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def metrics(trainer: Any) -> dict[str, float]:
    """The last value of each metric worth a line in a card."""
    found: dict[str, float] = {}
    for row in trainer.state.log_history:
        for name, value in row.items():
            told = name in METRICS or (name.startswith("eval_") and not name.endswith(("runtime", "per_second")))
            if told and isinstance(value, int | float) and math.isfinite(value):
                found[name] = value
    return found


def card(trainer: Any, name: str) -> str:
    """The text of ``README.md``."""
    method, start = method_of(trainer.args), _start(trainer)
    base, adapter = _hub_name(start), hasattr(getattr(trainer.model, "policy", trainer.model), "peft_config")
    told = data(trainer)
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": method.task}
    head |= {"base_model": base} if base else {}
    head |= {"datasets": told["names"]} if told["names"] else {}
    head |= {"model_name": name, "tags": ["rto", method.tag, "generated_from_trainer"]}
    lines = [f"---\n{write_yaml(head)}---", "", f"# {name}", ""]
    origin = f"[{base}](https://huggingface.co/{base})" if base else Path(start).name
    kind = "an adapter" if adapter else "a whole model"
    lines += [f"{method.does} Trained by {method.name} from {origin}, as {kind}, with [rto]({HOME}) {__version__}."]
    lines += ["", "## Use", "", "```python", *_use(method, name, trainer.processing_class), "```"]
    lines += ["", "## Training", "", *_table("setting", _told(settings(trainer.args)))]
    rows = "" if told["rows"] is None else f"{told['rows']:,} rows"
    read = ", ".join(filter(None, [*told["names"], *told["files"], rows]))
    lines += ["", f"Data: {read}. {trainer.state.global_step:,} updates."]
    lines += [f"Left out of {what}: {n:,} {why}." for what, x in told["left_out"].items() for why, n in x.items()]
    if found := metrics(trainer):
        lines += ["", "## Last metrics", "", *_table("metric", {key: f"{x:.4g}" for key, x in found.items()})]
    lines += ["", "## Versions", "", *(f"- {key}: {x}" for key, x in {"rto": __version__, **versions()}.items())]
    if method.cites:
        lines += ["", "## Citation", "", "```bibtex", *"\n\n".join(map(_entry, method.cites)).split("\n"), "```"]
    return "\n".join(lines) + "\n"


HOME = "https://arxiv.org/abs/2404.18922"


def _use(method: Method, name: str, tokenizer: Any) -> Iterator[str]:
    yield "from transformers import pipeline"
    yield ""
    if method.task == "text-classification":
        yield f'score = pipeline("text-classification", model="{name}", function_to_apply="none")'
        yield 'print(score("A question and its answer, in the form of the training data"))'
    else:
        yield f'write = pipeline("text-generation", model="{name}")'
        asked = "What is the capital of France?"
        chat = getattr(tokenizer, "chat_template", None) is not None
        prompt = f'[{{"role": "user", "content": "{asked}"}}]' if chat else f'"{asked}"'
        yield f"print(write({prompt}, max_new_tokens=128))"


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that say something, mappings as words."""
    said = {
        key: ", ".join(f"{k} {x}" for k, x in v.items()) if isinstance(v, Mapping) else v for key, v in values.items()
    }
    return {key: value for key, value in said.items() if value not in (None, "")}


def _table(what: str, values: Mapping[str, Any]) -> list[str]:
    return [f"| {what} | value |", "| --- | --- |", *(f"| `{key}` | {x} |" for key, x in values.items())]


def _entry(key: str) -> str:
    title, authors, year, number = BIBLIOGRAPHY[key]
    fields = {"title": f"{{{title}}}", "author": authors, "year": year, "eprint": number, "archivePrefix": "arXiv"}
    body = ",\n".join(f"  {name:13} = {{{x}}}" for name, x in fields.items())
    return f"@article{{{key}{year},\n{body}\n}}"


def _start(trainer: Any) -> str:
    """What training started from, as it was given."""
    model = unwrapped(trainer.accelerator, trainer.model)
    return source_name(getattr(model, "policy", model))


def _hub_name(name: str) -> str | None:
    """A hub id; None for a folder of this machine or a class."""
    owner, slash, rest = str(name).partition("/")
    plain = bool(slash) and "/" not in rest and owner.replace("-", "").replace("_", "").isalnum() and bool(rest)
    return name if plain and not Path(name).exists() else None
