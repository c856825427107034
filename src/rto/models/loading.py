"""Models and tokenizers from folders, hub ids, adapters or live objects; and the checks that come before work.

Weights load from safetensors only, and code that comes with a model runs only when asked for.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from rto.data.chat import check_reads, stop_ids
from rto.files import parse_json
from rto.models.precision import as_dtype, keep_derivative, kept_in_fp32, leave, note, noted, taking_adapter
from rto.ranges import ADAPTER, check_ranges

dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
"""The library asks on standard input where nothing decides about a model's own code; here that is an error at once."""

Source = str | Path | nn.Module
"""A folder, a hub id, or a model that is already loaded (a PEFT model counts)."""


def load_policy(source: Source, **init_kwargs: Any) -> nn.Module:
    """A causal language model, as policy, reference or DPO model; a PEFT adapter folder loads on its base.

    Raises:
        ValueError: it is a reward model, weights are missing, or an adapter is of a kind that is not read here.
    """
    if isinstance(source, nn.Module):
        return keep_derivative(source)
    if is_adapter(source):
        config = adapter_config(source)
        if is_scorer(config):
            raise ValueError(f"{source} is an adapter that scores completions, not a language model")
        kwargs = _of_base(config, init_kwargs)
        return _load_adapter(_load(AutoModelForCausalLM, _base_of(source, config), kwargs), source, config)
    config = _config_of(source, trusts(init_kwargs), init_kwargs.get("revision"))
    _refuse_scorer(str(source), config)
    _check_type(AutoModelForCausalLM, str(source), config, "causal language model")
    model, missing = _load_and_report(AutoModelForCausalLM, source, init_kwargs)
    if missing:
        raise ValueError(f"{source} is not a whole causal language model: it lacks {', '.join(sorted(missing)[:3])}")
    return model


def find_config(role: str, source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The configuration of a folder or hub id, the base model's for an adapter.

    Raises:
        ValueError: there is no such folder, and no such model on the hub.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # a name that is nowhere is told once, not at each try
    try:
        return _config_of(source, trust_remote_code, revision)
    except ValueError as error:
        raise ValueError(f"{role} {error}") from error
    finally:
        hub.setLevel(level)


def check_weights(role: str, source: str | Path) -> None:
    """That a folder's weights are there and whole, by the headers of their files; a hub id's are not looked at.

    Raises:
        ValueError: they are not; the message names the remedy.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise LoadingError(f"{role} {folder} has no weights (model.safetensors): save the model with save_pretrained")
    try:
        for file in files:
            with told_of(folder), safe_open(file, "pt"):
                pass
    except ValueError as error:
        raise LoadingError(f"{role} {error}") from error


@contextmanager
def told_of(source: str | Path) -> Iterator[None]:
    """What the libraries raise when they read a model's folder or hub id becomes one line that says what is wrong.

    A damaged folder can raise anything: the libraries index, convert and construct what its files say unchecked.

    Raises:
        ValueError: that line.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, LoadingError | MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        folder, why = Path(source), str(error).strip().partition("\n")[0]
        if folder.is_file():
            what = "is a file, not a model's folder"
        elif not folder.is_dir():
            local = str(source).startswith((".", "/", "~")) or str(source).count("/") > 1
            what = f"is neither a folder here nor on the hub ({'no such folder' if local else why})"
        elif not (folder / "config.json").is_file() and not is_adapter(folder):
            what = "is no model's folder: it has no config.json"
        elif "trust_remote_code" in str(error):
            what = (
                "brings code of its own, which does not run unasked: read it, then set trust_remote_code (a flag of "
                "every command, a key of recipes)"
            )
        elif isinstance(error, SafetensorError):
            what = f"has damaged weights ({why}): copy or train them again"
        elif "tokenizer" in str(error) and not list(folder.glob("tokenizer*")):
            what = "has no tokenizer: save one into the folder (tokenizer.save_pretrained)"
        else:
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            what = f"cannot be read: {kind}{' '.join(str(error).split())}"
        raise LoadingError(f"{source} {what}") from error


class LoadingError(OSError, ValueError):
    """A model or tokenizer that cannot be read; the message says why in one line."""


def config_of_policy(role: str, source: str | Path, **hub: Any) -> Any:
    """The configuration of a language model, before it is loaded.

    Raises:
        ValueError: there is no such model, or it is one that scores.
    """
    config = find_config(role, source, **hub)
    _refuse_scorer(f"{role} {source}", config)
    return config


def _refuse_scorer(name: str, config: Any) -> None:
    """With tied embeddings no weight of a language model is missing in a reward model's folder."""
    if _is_scorer(name, config):
        raise ValueError(f"{name} is a model that scores completions, not a language model")


def _is_scorer(name: str, config: Any) -> bool:
    """Whether a folder holds a model that scores, by the names of classes in its configuration."""
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(x, str) for x in named):
        raise ValueError(f"{name}: architectures in config.json is {named!r:.60}, expected a list of names of classes")
    return any("SequenceClassification" in x for x in named)


def _check_type(auto: Any, name: str, config: Any, what: str) -> None:
    """Refuse a type that the library has no such model of."""
    if type(config) not in auto._model_mapping and auto.__name__ not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(f"{name} is of type {config.model_type}, of which transformers has no {what}: take another")


def load_scalar(source: Source, *, new_head: bool = True, **init_kwargs: Any) -> nn.Module:
    """A model with one scalar head, as reward model or critic; a PEFT adapter folder loads on its base.

    A folder of a causal language model gives its backbone with a new head that starts at zero: V = 0.

    Args:
        source: where from.
        new_head: whether a new head will do; it will not for a reward model that is to score something.
        init_kwargs: passed to ``from_pretrained``.

    Raises:
        ValueError: the model has more than one output, or no trained head and none may be made.
    """
    if isinstance(source, nn.Module):
        labels = getattr(source, "num_labels", getattr(source.config, "num_labels", None))
        if labels != 1:
            raise ValueError(f"a reward or value model has one output, {source_name(source)} has num_labels={labels}")
        return keep_derivative(source)
    if is_adapter(source):
        return _load_scalar_adapter(source, new_head, init_kwargs)
    config = _config_of(source, trusts(init_kwargs), init_kwargs.get("revision"))
    if config.num_labels != 1 and _is_scorer(str(source), config):
        raise ValueError(f"a reward or value model has one output, {source} has num_labels={config.num_labels}")
    _check_type(AutoModelForSequenceClassification, str(source), config, "model that scores")
    model, missing = _load_and_report(AutoModelForSequenceClassification, source, {**init_kwargs, "num_labels": 1})
    if missing and not new_head:
        raise ValueError(
            f"{source} has no trained scalar head, so its scores would mean nothing: train one with `rto reward`"
        )
    head = getattr(model, "score", getattr(model, "classifier", None))
    if missing and isinstance(head, nn.Linear):  # an encoder's head of several layers starts small and random
        nn.init.zeros_(head.float().weight)  # trained, whatever the precision of the backbone
    return model


def _load_scalar_adapter(source: str | Path, new_head: bool, init_kwargs: dict[str, Any]) -> nn.Module:
    from peft import load_peft_weights

    config = adapter_config(source)
    with told_of(source):
        _, head = split_head(load_peft_weights(str(source), device="cpu"))
    if head is None and not new_head:
        raise ValueError(
            f"{source} has no trained scalar head, so its scores would mean nothing: train one with `rto reward`"
        )
    if not is_scorer(config):
        raise ValueError(
            f"{source} is an adapter of a language model, whose kind has no scalar head: merge it first with "
            "`rto export`, or start from its base"
        )
    base: Any = load_scalar(_base_of(source, config), **_of_base(config, init_kwargs))
    base.config.get_text_config().pad_token_id = pad_of_adapter(source, base.config, trusts(init_kwargs))
    model: Any = _load_adapter(base, source, config)
    model.source = str(source)
    return model


def pad_of_adapter(source: str | Path, base_config: Any, trust_remote_code: bool = False) -> int | None:
    """The padding id that an adapter which scores was trained with: that of the tokenizer in its folder.

    Trainers set it in the configuration of the base model, which an adapter's folder does not hold. A sequence
    classifier reads its head at the last token that is not padding, so a score depends on it.
    """
    saved = Path(source) / "tokenizer_config.json"
    pad = None
    if saved.is_file():
        with told_of(source):
            pad = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code).pad_token_id
    return base_config.get_text_config().pad_token_id if pad is None else int(pad)


# --- adapters


def is_adapter(source: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(source) / "adapter_config.json").is_file()


def adapter_config(folder: str | Path) -> Any:
    """A PEFT adapter's configuration.

    Raises:
        ValueError: PEFT is not installed, or the adapter is of a kind that is not read here.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ValueError(f"{folder} is a PEFT adapter: pip install peft") from error
    with told_of(folder):
        config = PeftConfig.from_pretrained(str(folder))
    check_adapter(str(folder), config)
    return config


def is_scorer(config: Any) -> bool:
    """Whether an adapter belongs to a sequence classification model."""
    return config.task_type == "SEQ_CLS"


CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations of LoRA that change the base's weights, so that the base is not what is left without it."""


def is_shareable(config: Any) -> bool:
    """Whether an adapter leaves its base as it is and can be switched layer by layer."""
    initialisation = str(getattr(config, "init_lora_weights", "")).lower()
    changes = initialisation.startswith(CHANGES_BASE) or getattr(config, "bias", "none") != "none"
    return not (config.is_prompt_learning or config.is_adaption_prompt or changes)


def check_adapter(name: str, config: Any) -> None:
    """Refuse adapters that cannot be told from their base.

    Raises:
        ValueError: it is a prompt, trains the base's biases, or starts by changing the base's weights.
    """
    try:
        check_ranges(config, **{key: allowed for key, allowed in ADAPTER.items() if hasattr(config, key)})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not is_shareable(config):
        what = f"{getattr(config.peft_type, 'value', config.peft_type)}"
        raise ValueError(
            f"{name}: this {what} adapter cannot be used here: an adapter must live in the layers and leave the base "
            f"as it is (LoRA with bias='none', without init_lora_weights of {', '.join(CHANGES_BASE)}; no prompts)"
        )


def _base_of(source: str | Path, config: Any) -> str:
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ValueError(f"{source}: adapter_config.json names no base model: set base_model_name_or_path in it")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"{source}: its base model {base} is not there: set base_model_name_or_path in its adapter_config.json"
        )
    return str(base)


def _of_base(config: Any, init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for an adapter's base: the revision that the adapter was trained on, where it knows it."""
    return init_kwargs if config.revision is None else {**init_kwargs, "revision": config.revision}


def _load_adapter(base: nn.Module, source: str | Path, config: Any) -> nn.Module:
    from peft import PeftModel

    with told_of(source), taking_adapter(base, config):
        return PeftModel.from_pretrained(base, str(source), config=config).requires_grad_(False)


def split_head(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """An adapter's weights without its scalar head, and the head's (None where there is none)."""
    head, rest = {}, {}
    for name, x in state.items():
        owner, _, parameter = name.removeprefix("base_model.model.").rpartition(".")
        if owner in ("score", "classifier"):
            head[parameter] = x
        else:
            rest[name] = x
    return rest, head or None


def zero_head(width: int, *, bias: bool = False) -> nn.Linear:
    """A scalar head that starts at zero."""
    head = nn.Linear(width, 1, bias=bias)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def load_tokenizer(
    source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, needs_eos: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a padding token.

    pad = EOS is allowed: padding is told by position in this project, never by id. A tokenizer that only serves a
    model which scores needs no EOS: an encoder's ends a text in a way of its own.

    Raises:
        ValueError: there is no tokenizer, it reads no text, or an EOS token is needed and there is none.
    """
    with told_of(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **_hub(trust_remote_code, revision))
        check_reads(tokenizer)
    if tokenizer.eos_token is None and needs_eos:
        raise ValueError(f"the tokenizer of {source} has no EOS token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill up rows with: padding, EOS or 0. Which one never matters, since padding is told by position."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))


def trusts(init_kwargs: dict[str, Any]) -> bool:
    """Whether code that comes with a model may run."""
    return bool(init_kwargs.get("trust_remote_code", False))


def tokenizer_kwargs(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of the keyword arguments that a model is loaded with is about its tokenizer, too."""
    return {name: init_kwargs[name] for name in ("trust_remote_code", "revision") if name in init_kwargs}


def _hub(trust_remote_code: bool, revision: str | None) -> dict[str, Any]:
    """A revision is named only where there is one: None is not the default of every version of transformers."""
    return {"trust_remote_code": trust_remote_code} | ({} if revision is None else {"revision": revision})


def _load_and_report(auto: Any, source: str | Path, init_kwargs: dict[str, Any]) -> tuple[Any, set[str]]:
    """A model and the names of the weights its folder lacks; the library's own report of them is kept quiet."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, report = _load(auto, source, {**init_kwargs, "output_loading_info": True})
    finally:
        hf_logging.set_verbosity(verbosity)
    return model, set(report["missing_keys"])


def _load(auto: Any, source: Source, init_kwargs: dict[str, Any]) -> Any:
    if isinstance(source, nn.Module):
        return source
    kwargs = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, **init_kwargs}
    kwargs["dtype"] = as_dtype(kwargs["dtype"])
    left, target = kwargs.pop("as_stored", False) and "quantization_config" not in kwargs, kwargs["dtype"]
    with told_of(source), _reading_here():
        stored = _stored_dtype(source, kwargs.get("revision")) if left else None
        if stored is not None and target != "auto":
            kwargs["dtype"] = stored
        loaded = auto.from_pretrained(str(source), **kwargs)
    model = keep_derivative(loaded[0] if kwargs.get("output_loading_info") else loaded)
    _check_numbers(str(source), model.config)
    if stored is not None and target != "auto":
        leave(model, target)
    return loaded


def _check_numbers(source: str, config: Any) -> None:
    """Refuse numbers of a configuration that the library takes, and that no pass through the model survives."""
    for name, value in vars(config).items():
        if not isinstance(value, int | float):
            continue
        if "dropout" in name and not 0 <= value <= 1:
            raise ValueError(f"{source}: {name} in config.json is {value}, expected a probability")
        if name == "num_hidden_layers" and value < 0:
            raise ValueError(f"{source}: {name} in config.json is {value}, expected a count")
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    for part in (rope, *(x for x in rope.values() if isinstance(x, dict))):  # one for all layers, or one a kind
        base = part.get("rope_theta")
        if isinstance(base, int | float) and base <= 0:
            raise ValueError(f"{source}: rope_theta in config.json is {base}, expected a positive number")


@contextmanager
def _reading_here() -> Iterator[None]:
    """This process reads weights, whatever the library would let only the first one of a host do (FSDP)."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What the safetensors format calls precisions that can be trained from."""


def _stored_dtype(source: Source, revision: str | None) -> torch.dtype | None:
    """The widest precision in a model's files, so that none is rounded; None where it cannot be told."""
    found, name = set(), str(source)
    own = {} if revision is None else {"revision": revision}
    files = [cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False, **own)]
    if files[0] is None:
        index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **own)
        parts = {} if index is None else parse_json(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = [cached_file(name, part, **own) for part in sorted(set(parts.values()))]
    for file in files:
        with safe_open(file, "pt") as weights:
            found |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    if not found or found - STORED.keys():
        return None
    return max((STORED[kind] for kind in found), key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))


def clone(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An independent copy of a model's weights, in another precision where one is named.

    Weights are cast one by one as they are copied. Those that the architecture keeps in fp32 are, and buffers (the
    frequencies of rotary embeddings) are copied as they are. Weights that were left as their file has them are so in
    the copy, too, and share the file's memory until they are settled.
    """
    kept = () if dtype is None else kept_in_fp32(model, dtype)
    copies: dict[int, Any] = {}
    for name, weight in model.named_parameters():
        target = weight.dtype if dtype is None or not weight.is_floating_point() else dtype
        target = torch.float32 if any(part in name for part in kept) else target
        copies[id(weight)] = copied(weight, target if dtype is not None else noted(weight) or target)
    return copy.deepcopy(model, copies)


def copied(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A weight in another precision: a copy, or where it was left as its file has it a second name of the same."""
    left = noted(weight) is not None
    x = weight.detach() if left else weight.detach().to(dtype, copy=True)
    copy_of = nn.Parameter(x, requires_grad=weight.requires_grad)
    if left:
        note(copy_of, dtype)
    return copy_of


def freeze(model: nn.Module) -> nn.Module:
    """A model that is only read: eval mode, no gradients."""
    return model.requires_grad_(False).eval()


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model, with its adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: nn.Module) -> Any:
    """The part of a model that ends in hidden states."""
    inner = unwrap_peft(model)
    # Llama 4's language model calls its backbone by a name that it does not have, and is then its own base model.
    return inner.base_model if inner.base_model is not inner else getattr(inner, "model", inner)


def scalar_head(model: nn.Module) -> Any:
    """The scalar head of a sequence classification model.

    Raises:
        ValueError: the model keeps its head under another name than ``score`` or ``classifier``.
    """
    for name in ("score", "classifier"):
        head = getattr(model, name, None)  # a PEFT model hands on what its base has
        if head is not None:
            return head
    raise ValueError(f"{type(unwrap_peft(model)).__name__} has no `score` head that can be read at every token")


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: EOS, what the generation config adds to it, and the template's end of turn.

    Raises:
        ValueError: the generation config names something that is no token.
    """
    config = getattr(model, "generation_config", None)
    extra = getattr(config, "eos_token_id", None)
    listed = extra if isinstance(extra, list) else [extra]
    if not all(isinstance(i, int | None) for i in listed):
        raise ValueError(
            f"{source_name(model)}: eos_token_id in generation_config.json is {extra!r:.60}, expected ids of tokens"
        )
    return tuple(sorted({int(i) for i in [tokenizer.eos_token_id, *listed, *stop_ids(tokenizer)] if i is not None}))


def stop_at_eos(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the library's `generate` end where completions end here (`eos_ids`); a saved model takes it along."""
    config = getattr(unwrap_peft(model), "generation_config", None)
    if config is not None:
        ids = eos_ids(model, tokenizer)
        config.eos_token_id = list(ids) if len(ids) > 1 else ids[0]


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence a model can read, where its configuration says so; see `positions_of`."""
    return positions_of(unwrap_peft(model).config)


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model of this configuration can read.

    None for a model without a limit (ALiBi, relative positions, recurrent layers). A window of attention is no limit.
    """
    config = config.get_text_config()
    found = [getattr(config, name, None) for name in POSITIONS]
    limit = next((n for n in found if isinstance(n, int) and n > 0), None)
    unlimited = getattr(config, "alibi", False) or not getattr(config, "position_biased_input", True)
    if limit is None or unlimited:
        return None
    return limit - _positions_before_text(config)


def shared_context(
    models: Iterable[tuple[str, Source]],
    hub: Callable[[Source], dict[str, Any]],
    *,
    scoring: Container[str] = (),
) -> int | None:
    """The longest sequence that all of some models can read, told before any is loaded.

    Args:
        models: each with its role, for messages.
        hub: ``trust_remote_code`` and ``revision`` of each.
        scoring: roles whose models score; all others are language models.

    Raises:
        ValueError: there is no such model, or it is one that scores and should not.
    """
    found = [
        max_positions(model)
        if isinstance(model, nn.Module)
        else positions_of((find_config if role in scoring else config_of_policy)(role, model, **hub(model)))
        for role, model in models
    ]
    return min((n for n in found if n is not None), default=None)


POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "max_sequence_length", "seq_length")
"""What configurations call it; most others (``n_positions``, …) answer to the first name."""


def _positions_before_text(config: Any) -> int:
    """Entries of a position table that no token of a text uses: RoBERTa and its kind count from padding on."""
    family = MODEL_MAPPING.get(type(config), None)
    module = sys.modules[(family[0] if isinstance(family, tuple) else family).__module__] if family else None
    owners = [module, *(x for x in vars(module or object).values() if isinstance(x, type))]
    counts_from_padding = any("create_position_ids_from_input_ids" in vars(owner) for owner in owners if owner)
    return (getattr(config, "pad_token_id", None) or 0) + 1 if counts_from_padding else 0


def source_name(source: Any) -> str:
    """How messages call a model."""
    if isinstance(source, str | Path):
        return str(source)
    folder = getattr(source, "source", "")  # a role, or an adapter that scores, knows its own
    return str(folder or getattr(unwrap_peft(source).config, "_name_or_path", "") or type(source).__name__)


def check_same_vocabulary(
    role: str, source: Source, tokenizer: PreTrainedTokenizerBase, policy: Any, **init_kwargs: Any
) -> None:
    """Refuse a DPO or reference model that reads other tokens than the policy writes, before it is loaded.

    Args:
        role: what messages call the model.
        source: the model.
        tokenizer: the policy's.
        policy: the policy, or its configuration where it has a revision of its own.
        init_kwargs: keyword arguments that ``source`` is loaded with.

    Raises:
        ValueError: the vocabularies differ in size or, where the folder has a tokenizer, in any entry.
    """
    name = source_name(source)
    expected, found = _vocab_size(policy, trusts(init_kwargs)), _vocab_size(source, **tokenizer_kwargs(init_kwargs))
    if found != expected:
        raise ValueError(
            f"{role} {name} has a vocabulary of {found} tokens, the policy one of {expected}: a token reward compares "
            "the two token by token, so train the DPO model from the policy's own starting point"
        )
    folder = Path(str(source))
    if isinstance(source, nn.Module) or not (folder / "tokenizer_config.json").is_file():
        return
    with told_of(folder):
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts(init_kwargs))
    theirs, ours = loaded.get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        token = next(iter(sorted(set(theirs.items()) ^ set(ours.items()))))
        raise ValueError(
            f"{role} {name} has another tokenizer than the policy (they differ, for one, at {token}): train the DPO "
            "model from the policy's own starting point"
        )


def check_special_tokens(source: Source, tokenizer: PreTrainedTokenizerBase, **init_kwargs: Any) -> None:
    """Refuse a tokenizer whose padding, EOS or BOS token is none of the model's: a token that was added to it alone.

    Other tokens may be beyond the model, as that for images is in some models of text.

    Raises:
        ValueError: with the token and the number of those that the model has.
    """
    size = _vocab_size(source, **tokenizer_kwargs(init_kwargs))
    for kind in ("pad", "eos", "bos"):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is not None and token >= size:
            raise ValueError(
                f"the {kind}_token {getattr(tokenizer, f'{kind}_token')!r} of the tokenizer of {source_name(source)} "
                f"has the id {token}, and the model has {size} tokens: set {kind}_token in tokenizer_config.json to "
                "one of them"
            )


def _vocab_size(source: Any, trust_remote_code: bool = False, revision: str | None = None) -> int:
    config = source
    if isinstance(source, nn.Module):
        config = unwrap_peft(source).config
    elif isinstance(source, str | Path):
        config = _config_of(source, trust_remote_code, revision)
    return int(config.get_text_config().vocab_size)


def _config_of(source: str | Path, trust_remote_code: bool, revision: str | None = None) -> Any:
    """The configuration of a folder or hub id; of the base model where it is an adapter."""
    if is_adapter(source):
        config = adapter_config(source)
        base = _base_of(source, config)
        try:
            return _read_config(base, trust_remote_code, config.revision or revision)
        except LoadingError as error:
            raise LoadingError(f"{source}: its base {error}") from error
    return _read_config(source, trust_remote_code, revision)


def _read_config(source: str | Path, trust_remote_code: bool, revision: str | None) -> Any:
    with told_of(source):
        return AutoConfig.from_pretrained(source, **_hub(trust_remote_code, revision))
