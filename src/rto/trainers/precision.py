"""Which precision and which revision each model of a run is read in: one rule for every command."""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig

from rto.data.chat import split_special_tokens
from rto.models.loading import check_special_tokens, is_adapter, load_tokenizer, source_name, tokenizer_kwargs
from rto.models.precision import NARROW, as_dtype, check_derivative, keep_derivative, widen
from rto.references import References, put_back
from rto.trainers.engine import will_cut
from rto.values import json_mapping

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ``ModelConfig`` with nothing chosen that was not asked for."""

    model_revision: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Branch, tag or commit of model_name_or_path and its tokenizer."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of model_name_or_path. What of it is trained is float32 at least; the base under an "
            "adapter is held in it, in frozen_dtype when not given.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        named = self.lora_target_modules
        if isinstance(named, str) and named.isidentifier():  # one module's name; PEFT reads text as a pattern
            self.lora_target_modules = [named]


@dataclass
class PrecisionArguments:
    """What every stage's configuration says of how its models are read.

    Attributes:
        model_init_kwargs: passed to ``from_pretrained`` of every model given as a folder or hub id; ``dtype`` and
            ``revision`` in it are of the model that training starts from.
        trust_remote_code: run code that comes with a model.
        split_special_tokens: read special tokens that stand in the text of rows as text, and save the tokenizer so;
            None leaves it to the tokenizer. What a chat template writes are tokens either way.
        frozen_dtype: precision of models that are only read; ``auto`` is the compute precision, bfloat16 under
            ``bf16``, else float32.
    """

    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained for models given as folder or hub id."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    split_special_tokens: bool | None = field(
        default=None,
        metadata={"help": "Read special tokens in the text of rows as text; else as the tokenizer has it."},
    )
    frozen_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of models that are only read: auto (bfloat16 under bf16), float32, bfloat16, ..."
        },
    )

    references: ClassVar[References] = {}
    """Which values a recipe reads from the environment; a configuration that it makes has its own."""

    def to_dict(self) -> dict[str, Any]:
        """As the library's, for logs and pages: environment variables by their names."""
        return put_back(super().to_dict(), self.references, always=True)  # type: ignore[misc]

    def __repr__(self) -> str:
        """As of a dataclass, tokens hidden and environment variables by their names: tracebacks and logs show it."""
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.to_dict().items())})"

    __str__ = __repr__

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """``model_init_kwargs`` as a dictionary, with ``trust_remote_code``."""
        return init_kwargs(self)


def for_saving(args: Any) -> Any:
    """A configuration as it may be written: environment variables by their names."""
    references: References = getattr(args, "references", {})
    if not references:
        return args
    saved = copy.copy(args)
    own = {str(path[0]): getattr(args, str(path[0])) for path in references}
    for name, value in put_back(own, references, always=True).items():
        setattr(saved, name, value)
    saved.references = {}  # they hold the values
    return saved


def init_kwargs(args: Any) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` in a configuration, TRL's own included."""
    found = json_mapping("model_init_kwargs", args.model_init_kwargs)
    return {"trust_remote_code": True, **found} if getattr(args, "trust_remote_code", False) else found


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Arguments of ``from_pretrained``, by what a model is for. Models given as objects keep what they have."""

    init: dict[str, Any]
    split: bool | None
    """How special tokens in the text of rows are read; None for as the tokenizer has it."""
    start: str
    """The model that training starts from, which a revision belongs to."""
    dtype: Any
    """What was asked for; None for nothing."""
    frozen_dtype: torch.dtype
    """Of models that are only read."""
    as_stored: bool = False
    """Whether whole models stay as their files have them until they are cut over processes, so that none is ever
    copied whole (`rto.models.precision.settle`)."""

    @classmethod
    def of(cls, args: Any, start: Any) -> "Reading":
        """How the models of a run are read that starts from ``start``.

        Raises:
            ValueError: a precision is not known.
        """
        given = init_kwargs(args)
        asked = given.pop("dtype", None)
        dtype = None if asked is None else as_dtype(asked)
        frozen = as_dtype(getattr(args, "frozen_dtype", "auto"))
        if frozen == "auto":
            frozen = torch.bfloat16 if args.mixed_precision == "bf16" else _at_least_fp32(dtype)
        split = getattr(args, "split_special_tokens", None)
        return cls(
            init=given,
            split=split,
            start=source_name(start),
            dtype=dtype,
            frozen_dtype=frozen,
            as_stored=will_cut(args),
        )

    def trained(self, source: Any, *, adapted: bool = False) -> dict[str, Any]:
        """For a model that is trained: whole, or (``adapted``, or the folder of an adapter) its adapter alone."""
        if adapted or (isinstance(source, str | Path) and is_adapter(source)):
            dtype = self.frozen_dtype if self.dtype is None else self.dtype  # of the base, which is frozen
            return {**self._own(source), "dtype": dtype, **self._left()}
        if self.dtype in NARROW and self._is_start(source):
            logger.warning("%s is trained whole: dtype=%s gives way to float32", source_name(source), self.dtype)
        dtype = _at_least_fp32(self.dtype)
        return {**self._own(source), "dtype": dtype, **self._left()}

    def frozen(self, source: Any) -> dict[str, Any]:
        """For a model that is only read."""
        return {**self._own(source), "dtype": self.frozen_dtype, **self._left()}

    def _left(self) -> dict[str, Any]:
        return {"as_stored": True} if self.as_stored else {}

    def read_tokenizer(self, model: Any, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """The tokenizer that is given, or the model's; it reads special tokens as the configuration says."""
        found = given or load_tokenizer(source_name(model), **self.tokenizer(model))
        check_special_tokens(model, found, **self.tokenizer(model))
        return split_special_tokens(found, self.split)

    def tokenizer(self, source: Any) -> dict[str, Any]:
        """For a model's tokenizer."""
        return tokenizer_kwargs(self._own(source))

    def _own(self, source: Any) -> dict[str, Any]:
        return self.init if self._is_start(source) else {n: x for n, x in self.init.items() if n != "revision"}

    def _is_start(self, source: Any) -> bool:
        return isinstance(source, str | Path | nn.Module) and source_name(source) == self.start


def _at_least_fp32(dtype: Any) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare_trained(*models: Any) -> None:
    """Make models ready to be trained: fp32 weights where they are trained, and a base that has a derivative.

    Raises:
        ValueError: a base of four bits has lost its derivative.
    """
    for model in models:
        check_derivative(source_name(model), keep_derivative(model))
        widened = widen(model)
        if widened:
            logger.warning(
                "%s: %s trained weights came in 16 bits, where they would hardly move; they are float32 now, in place",
                source_name(model),
                f"{widened:,}",
            )


def on_this_machine(args: TrainingArguments) -> None:
    """Where there is no accelerator, train on the processor instead of refusing bf16, which processors have, too."""
    if not torch.accelerator.is_available():
        args.use_cpu = True
    if args.use_cpu and args.fp16:
        logger.warning("fp16 needs an accelerator: on a processor this run computes in float32 (or set bf16)")
