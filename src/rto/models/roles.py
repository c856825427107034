"""Several models on one frozen base: each role is an adapter (and, where it scores, a scalar head).

π_θ, π_ref, π_dpo, the critic and the reward model differ from one base model by little, so the base is held once:

    policy           the adapter that is active at rest
    reference        the base with every adapter off, or a frozen copy of the adapter that training started from
    DPO model        an adapter
    value, reward    an adapter and a scalar head

A `Role` stands wherever `rto.models.actor` takes a model; `acting` switches to its adapter for a forward pass. PEFT's
own switch also sets ``requires_grad``, which would lose the gradients of whichever role is not active in the backward
pass; here only the choice of adapter changes.
"""

import copy
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rto.errors import make_folder, writing
from rto.files import alone
from rto.models.loading import (
    Source,
    adapter_config,
    backbone,
    check_adapter,
    is_adapter,
    is_scorer,
    is_shareable,
    load_policy,
    load_tokenizer,
    pad_of_adapter,
    source_name,
    split_head,
    stop_at_eos,
    trusts,
    unwrap_peft,
    zero_head,
)
from rto.models.precision import HEAD_NAMES, taking_adapter
from rto.models.saving import Gather, as_it_is, save_model
from rto.models.scalars import last_scored, values_of


class Role(nn.Module):
    """A view of a shared base with one adapter, or none, and for models that score a scalar head.

    The base is no child of this module: moving, freezing or counting the parameters of a role touches its own
    adapter and head only.

    Args:
        base: what it shares.
        adapter: its adapter on the base; None for the base itself.
        source: the folder it comes from.
        head: its scalar head.
        pad_token_id: the id behind which a score is read (`last_scored`); the base's configuration does not decide
            it, since trainers change that.
    """

    def __init__(
        self,
        base: "SharedBase",
        adapter: str | None,
        *,
        source: str = "",
        head: nn.Linear | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.base, self.adapter, self.source, self.score = base, adapter, source, head
        self.pad_token_id = pad_token_id

    def forward(self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]) -> SequenceClassifierOutput:
        """Scores [B, 1] of right-padded rows, as PEFT's sequence classifier gives them for the folder of this role."""
        with self.acting():
            hidden = backbone(self)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        at = last_scored(input_ids, attention_mask, self.pad_token_id)
        states = hidden.last_hidden_state[torch.arange(len(at), device=at.device), at]
        return SequenceClassifierOutput(logits=values_of(self, states)[:, None])

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.base.model.config

    @property
    def num_labels(self) -> int | None:
        """Outputs of the head; None without one."""
        return None if self.score is None else self.score.out_features

    def get_base_model(self) -> Any:
        """The transformers model that all roles share, as of a PEFT model."""
        return self.base.model.get_base_model()

    def own_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, then the head's."""
        return [*self.base.parameters_of(self.adapter), *self.parameters()]

    def weights(self) -> dict[str, Tensor]:
        """Everything that this role's numbers depend on: the base, its adapter, its head."""
        others = {id(p) for name in self.base.adapters if name != self.adapter for p in self.base.parameters_of(name)}
        state = {n: p for n, p in self.base.model.named_parameters() if id(p) not in others}
        return {**state, **self.state_dict()}

    def requires_grad_(self, requires_grad: bool = True) -> "Role":
        """Freeze or train the adapter and the head."""
        if self.adapter is not None:
            self.base.model.set_requires_grad(self.adapter, requires_grad)
        super().requires_grad_(requires_grad)
        return self

    def save_pretrained(self, folder: str | Path, *, gather: Gather = as_it_is, writes: bool = True) -> None:
        """Write the role as an adapter that PEFT reads, its head in ``modules_to_save``.

        Args:
            folder: where to.
            gather: makes a weight whole, where weights lie in pieces.
            writes: whether this process writes; where weights lie in pieces every process calls this.
        """
        assert self.adapter is not None
        head = None if self.score is None else self.score.state_dict()
        save_adapter(self.base.model, self.adapter, Path(folder), head=head, gather=gather, writes=writes)

    def load_weights(self, folder: Path) -> None:
        """Put what `save_pretrained` wrote back in place.

        Raises:
            ValueError: it does not fit.
        """
        assert self.adapter is not None
        load_adapter_weights(self.base.model, self.adapter, folder, head=self.score)

    def acting(self) -> AbstractContextManager[None]:
        """Within this context the base acts in this role."""
        return self.base.acting_as(self.adapter, evaluating=not self.training)


class SharedBase:
    """A PEFT model, with the policy's adapter active, on which other roles find room.

    Args:
        model: the policy, a PEFT model; its base is frozen.
        trust_remote_code: whether code that comes with the tokenizer of another adapter may run.

    Raises:
        ValueError: its adapter cannot share a base: prompt tuning, trained biases, or one that changed the base.
    """

    def __init__(self, model: Any, *, trust_remote_code: bool = False) -> None:
        self.model, self.policy, self._trust = model, str(model.active_adapter), trust_remote_code
        check_adapter("the policy's adapter", model.peft_config[self.policy])
        self.active = [self.policy]
        self._layers = _adapter_layers(model)
        trainable(model)

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters on this base."""
        return list(self.model.peft_config)

    def carries(self, source: Any) -> bool:
        """Whether a source is an adapter folder made for this base, of the policy's kind of adapter."""
        if not isinstance(source, str | Path) or not is_adapter(source):
            return False
        theirs, ours = adapter_config(source), self.model.peft_config[self.policy]
        same = _identity(theirs.base_model_name_or_path) == _identity(source_name(self.model))
        revisions = {theirs.revision or ours.revision, ours.revision or theirs.revision}
        return same and len(revisions) == 1 and theirs.peft_type == ours.peft_type and is_shareable(theirs)

    def stands_in(self, source: Any) -> bool:
        """Whether a source is the folder of this base itself."""
        local = isinstance(source, str | Path) and Path(source).is_dir() and not is_adapter(source)
        return local and _identity(str(source)) == _identity(source_name(self.model))

    def load(self, source: str | Path, name: str, *, scalar: bool = False, new_head: bool = False) -> Role:
        """Put an adapter of a folder on the base, frozen.

        Args:
            source: a folder that `carries` accepts.
            name: what the adapter is called; a number is added where the name is taken.
            scalar: whether the role scores, by the head in the folder.
            new_head: whether a head that starts at zero will do where the folder has none.

        Raises:
            ValueError: weights do not fit, the head is missing, or a scoring adapter is to speak.
        """
        from peft import load_peft_weights

        config = adapter_config(source)
        if is_scorer(config) and not scalar:
            raise ValueError(f"{source} is an adapter that scores completions, not a language model")
        state, head = split_head(load_peft_weights(str(source), device="cpu"))
        if scalar and head is None and not new_head:
            raise ValueError(
                f"{source} has no trained scalar head, so its scores would mean nothing: train one with `rto reward`"
            )
        name = self._add(name, self._without_heads(config))
        _fill(self.model, name, state, str(source))
        if not scalar:
            return Role(self, name, source=str(source))
        pad = pad_of_adapter(source, self.model.config, self._trust)
        return Role(self, name, source=str(source), head=self._head(head), pad_token_id=pad)

    def copy(self, role: Role | None, name: str) -> Role:
        """A second, frozen copy of a role; of the policy for None."""
        source = self.policy if role is None else role.adapter
        name = self._add(name, copy.deepcopy(self.model.peft_config[source]))
        with torch.no_grad():
            for new, old in zip(self.parameters_of(name), self.parameters_of(source), strict=True):
                new.copy_(old)
        if role is None:
            return Role(self, name)
        head = copy.deepcopy(role.score)
        return Role(self, name, source=role.source, head=head, pad_token_id=role.pad_token_id)

    def new_critic(self, name: str, *, from_policy: bool = False) -> Role:
        """A new adapter like the policy's with a head that starts at zero: V = 0.

        Args:
            name: what the adapter is called.
            from_policy: whether it starts from the policy's adapter as it is now, else as one that does nothing yet.
        """
        config = self._without_heads(self.model.peft_config[self.policy])
        kept = set(config.modules_to_save or []) - {self._output_name()} if from_policy else None
        config.modules_to_save = list(kept) if kept else None
        if not isinstance(config.target_modules, str):
            config.target_modules = set(config.target_modules) - {self._output_name()}
        name = self._add(name, config)
        if from_policy:
            with torch.no_grad():
                for new, old in _both(self._layers, name, self.policy):
                    new.copy_(old)
        return Role(self, name, head=self._head(None), pad_token_id=self.model.config.get_text_config().pad_token_id)

    def without_adapter(self) -> Role:
        """The base itself."""
        return Role(self, None, source=source_name(self.model))

    def parameters_of(self, adapter: str | None) -> list[nn.Parameter]:
        """All parameters of one adapter, in the order of the layers."""
        return [] if adapter is None else _parameters_of(self._layers, adapter)

    @contextmanager
    def acting_as(self, adapter: str | None, *, evaluating: bool = False) -> Iterator[None]:
        """Switch to an adapter, or to none, and back; ``requires_grad`` stays as it is."""
        before, quiet = self.active, evaluating and self.model.training
        self._switch([] if adapter is None else [adapter])
        if quiet:
            self.model.eval()
        try:
            yield
        finally:
            if quiet:
                self.model.train()
            self._switch(before)

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of activation checkpointing: a layer is recomputed in the role it was first computed in."""
        return nullcontext(), _Again(self, self.active)

    # --- help

    def _switch(self, names: list[str]) -> None:
        if names != self.active:
            for layer in self._layers:  # past nn.Module's own __setattr__, which takes ten times as long
                vars(layer)["_active_adapter"] = names
            self.active = names

    def _add(self, name: str, config: Any) -> str:
        """A new, frozen adapter; the policy's stays active."""
        taken = sum(other == name or other.startswith(f"{name}_") for other in self.adapters)
        name = f"{name}_{taken}" if taken else name
        training = self.model.training
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        with taking_adapter(self.model, config):
            self.model.add_adapter(name, config)
        for parameter in self.model.parameters():  # some versions of PEFT train what was added last
            parameter.requires_grad_(id(parameter) in trained)
        self._layers = _adapter_layers(self.model)
        for layer in self._layers:
            layer._active_adapter = self.active
        self.model.train(training)
        return name

    def _without_heads(self, config: Any) -> Any:
        """The same adapter on a causal base, which has no scalar head that it could wrap."""
        config = copy.deepcopy(config)
        kept = [name for name in config.modules_to_save or [] if name not in HEAD_NAMES]
        config.modules_to_save, config.task_type = kept or None, self.model.peft_config[self.policy].task_type
        return config

    def _head(self, state: dict[str, Tensor] | None) -> nn.Linear:
        """A scalar head where the base is, in fp32 whatever the base is in."""
        inner = self.model.get_base_model()
        parameter = next(inner.get_input_embeddings().parameters())
        width = inner.get_output_embeddings().in_features if state is None else state["weight"].shape[1]
        head = zero_head(width, bias="bias" in (state or {}))
        if state is not None:
            head.load_state_dict(state)
        return head.to(parameter.device).requires_grad_(False)

    def _output_name(self) -> str:
        inner = self.model.get_base_model()
        output = inner.get_output_embeddings()
        return next((n.rpartition(".")[2] for n, module in inner.named_modules() if module is output), "")


class _Again:
    """Enter the adapters that were active when this was made; any number of times."""

    def __init__(self, base: SharedBase, active: list[str]) -> None:
        self.base, self.active, self.before = base, active, active

    def __enter__(self) -> None:
        self.before = self.base.active
        self.base._switch(self.active)

    def __exit__(self, *exception: object) -> None:
        self.base._switch(self.before)


def acting(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context a role's base acts in that role; any other model is itself without a context."""
    return model.acting() if isinstance(model, Role) else nullcontext()


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that belong to a model: not those of the base it may share."""
    return model.own_parameters() if isinstance(model, Role) else list(model.parameters())


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a model's numbers depend on, by name."""
    return model.weights() if isinstance(model, Role) else model.state_dict()


def trainable(model: Any) -> nn.Module:
    """A model that is trained: a role's adapter and head, a PEFT model's adapter, all of any other."""
    if isinstance(model, Role) or not hasattr(model, "peft_config"):
        return model.requires_grad_(True)
    model.requires_grad_(False)
    model.set_requires_grad(model.active_adapter, True)
    return model


def place(base: SharedBase | None, source: Any, name: str, **kwargs: Any) -> Any:
    """A role on the shared base where a source is an adapter made for it, or the base; the source itself otherwise."""
    if base is not None and not kwargs and base.stands_in(source):
        return base.without_adapter()
    return source if base is None or not base.carries(source) else base.load(source, name, **kwargs)


def adapt(model: nn.Module, peft_config: Any, *, revision: str | None = None) -> nn.Module:
    """A model under a new adapter, which remembers the ``revision`` of its base.

    Raises:
        ValueError: there is an adapter already, or the new one cannot share a base.
    """
    from peft import get_peft_model

    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{source_name(model)} is under an adapter already: leave out peft_config to go on training that adapter, "
            "or merge it first with `rto export`"
        )
    check_adapter("peft_config", peft_config)
    with taking_adapter(model, peft_config):
        return get_peft_model(model, copy.deepcopy(peft_config), revision=revision)


def shared_base(model: nn.Module, *, trust_remote_code: bool = False) -> SharedBase | None:
    """The base under a PEFT model, for other roles to share; None for a model that is trained whole."""
    if not (hasattr(model, "get_base_model") and hasattr(model, "peft_config")):
        return None
    return SharedBase(model, trust_remote_code=trust_remote_code)


def save_adapter(
    model: Any,
    adapter: str,
    folder: Path,
    *,
    head: dict[str, Tensor] | None = None,
    gather: Gather = as_it_is,
    writes: bool = True,
) -> None:
    """Write one adapter of a PEFT model as PEFT reads it, without the others on the same base.

    Args:
        model: the PEFT model.
        adapter: the adapter's name on it.
        folder: where to; the adapter is its only one and stands at its root.
        head: the state of its scalar head; the folder is then a sequence classifier's.
        gather: makes a weight whole, where weights lie in pieces; of the adapter alone.
        writes: whether this process writes; where weights lie in pieces every process calls this.
    """
    from peft import TaskType, get_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode, config.auto_mapping = True, None
    config.task_type = TaskType.CAUSAL_LM if config.task_type is None else config.task_type
    config.base_model_name_or_path = unwrap_peft(model).config._name_or_path or config.base_model_name_or_path
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if head is not None:
        config.task_type, config.modules_to_save = TaskType.SEQ_CLS, list(HEAD_NAMES)
        weights |= {f"base_model.model.score.{name}": x for name, x in head.items()}
    whole = {name: gather(x.detach()).cpu().clone().contiguous() for name, x in weights.items()}
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def save_part(part: Any, folder: Path, gather: Gather, *, writes: bool) -> None:
    """Write a model that is trained as its kind is read: a role or an adapter as PEFT's, any other whole.

    Args:
        part: the model.
        folder: where to.
        gather: makes a weight whole.
        writes: whether this process writes; where weights lie in pieces every process calls this.
    """
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    if isinstance(part, Role):
        part.save_pretrained(folder, gather=gather, writes=writes)
    elif hasattr(part, "peft_config"):
        save_adapter(part, part.active_adapter, folder, gather=gather, writes=writes)
    else:
        save_model(part, folder, gather, writes=writes)


def load_adapter_weights(model: Any, adapter: str, folder: Path, *, head: nn.Linear | None = None) -> None:
    """Put the weights that `save_adapter` wrote into an adapter, in place.

    Raises:
        ValueError: they do not fit.
    """
    from peft import load_peft_weights

    state, saved = load_peft_weights(str(folder), device="cpu"), None
    if head is not None:
        state, saved = split_head(state)
        if saved is None:
            raise ValueError(f"{folder} has no scalar head: resume with the models this run started from")
        head.load_state_dict(saved)
    _fill(model, adapter, state, str(folder))


def _fill(model: Any, adapter: str, state: dict[str, Tensor], where: str) -> None:
    from peft import set_peft_model_state_dict

    # PEFT writes the base's embedding beside an adapter on it; the base here has it.
    state = {name: x for name, x in state.items() if ".base_layer." not in name}
    expected = sum(p.numel() for p in _parameters_of(_adapter_layers(model), adapter))
    found = sum(x.numel() for x in state.values())  # PEFT takes weights away from this dictionary
    try:
        report: Any = set_peft_model_state_dict(model, state, adapter_name=adapter)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{where}: the adapter's weights do not fit {source_name(model)}: {error}") from error
    if report.unexpected_keys or found != expected:
        raise ValueError(
            f"{where}: the adapter's weights do not fit {source_name(model)}: {found} numbers for {expected} "
            f"parameters{', unknown ' + report.unexpected_keys[0] if report.unexpected_keys else ''}"
        )


def export(source: Source, folder: str | Path, **init_kwargs: Any) -> Path:
    """Write a policy adapter, merged into its base, as a whole model with its tokenizer.

    Raises:
        ValueError: the source is no adapter, there is something at ``folder`` already, or another process is
            writing there.
    """
    target = Path(folder)
    if target.exists():
        raise ValueError(f"{target} exists already: name a new folder")
    if not (hasattr(source, "merge_and_unload") if isinstance(source, nn.Module) else is_adapter(source)):
        raise ValueError(f"{source_name(source)} is no adapter: it is a whole model already")
    make_folder(target.parent, "output_dir")
    partial = target.with_name(f"{target.name}.partial")
    with alone(partial):
        model: Any = load_policy(source, **init_kwargs)
        tokenizer = None if isinstance(source, nn.Module) else _tokenizer(source, source_name(model), init_kwargs)
        whole = partial / "model"
        if whole.exists():  # of one that was killed
            shutil.rmtree(whole)
        merged = model.merge_and_unload()
        if tokenizer is not None:
            stop_at_eos(merged, tokenizer)
        with writing(target):
            merged.save_pretrained(whole)
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
            whole.replace(target)
    shutil.rmtree(partial, ignore_errors=True)
    return target


def _tokenizer(source: str | Path, base: str, init_kwargs: dict[str, Any]) -> Any:
    own = (Path(source) / "tokenizer_config.json").is_file()
    return load_tokenizer(source if own else base, trust_remote_code=trusts(init_kwargs))


def _adapter_layers(model: nn.Module) -> list[Any]:
    """Every layer that has adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _both(layers: list[Any], new: str, old: str) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of two adapters side by side, in the layers that the new one has."""
    for layer in layers:
        if theirs := _parameters_of([layer], new):
            yield from zip(theirs, _parameters_of([layer], old), strict=True)


def _parameters_of(layers: list[Any], adapter: str) -> list[nn.Parameter]:
    found = [
        attrgetter(attribute)(layer)[adapter]
        for layer in layers
        for attribute in layer.adapter_layer_names
        if adapter in attrgetter(attribute)(layer)
    ]
    parts = [[x] if isinstance(x, nn.Parameter) else x.parameters() for x in found]
    return list({id(p): p for part in parts for p in part}.values())


def _identity(name: str | None) -> str:
    """One name for one base: a folder's whole path, or a hub id."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else str(name)
