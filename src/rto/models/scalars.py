"""Scalar heads: V(s_t) and scores from hidden states, in fp32, and which models may be read at every token."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rto.models.loading import backbone, copied, scalar_head, source_name, unwrap_peft
from rto.models.precision import note, noted, wide_head, wide_linear


def values_of(model: nn.Module, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
    """A model's scalar head on hidden states, in fp32 whatever the precision of the states, the head and autocast."""
    with wide_linear(hidden.device):
        return scalar_head(model)(hidden).squeeze(-1)


def scoring_wide(model: Any) -> AbstractContextManager[None]:
    """Within this context a sequence classifier's own forward pass computes its head in fp32, where it has one."""
    try:
        return wide_head(scalar_head(model))
    except ValueError:  # a head under another name: what the model does with it is its own
        return nullcontext()


def last_scored(tokens: Int[Tensor, "B L"], attention: Int[Tensor, "B L"], pad_id: int | None) -> Int[Tensor, " B"]:
    """Where a sequence classifier of `transformers` reads its head: at the last token that is not ``pad_id``.

    Where padding is EOS, that is the token before EOS, in training as in use. Without a ``pad_id`` it is the last
    token.
    """
    exists = attention.bool() if pad_id is None else attention.bool() & (tokens != pad_id)
    return (exists * torch.arange(tokens.shape[1], device=tokens.device)).argmax(1)


# --- critics: a linear head at every token of a causal model


def critic_of(policy: Any) -> nn.Module:
    """A copy of a policy's backbone, with the weights that it has now, under a new head that starts at zero: V = 0.

    Raises:
        ValueError: `transformers` has no sequence classification model of this type, or one that is no critic.
    """
    config, name = copy.deepcopy(policy.config), type(policy).__name__
    config.num_labels = 1
    remedy = "pass value_model, or set advantage_estimator='reinforce++', which needs no critic"
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(f"no critic can start from a {name}: transformers has no such model that scores: {remedy}")
    with torch.device("meta"):
        critic = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    _take_over(backbone(critic), backbone(policy))
    kind = next(backbone(critic).parameters())
    for module in scalar_head(critic).modules():
        for parameter_name, x in list(module.named_parameters(recurse=False)):
            zero = nn.Parameter(torch.zeros(x.shape, dtype=kind.dtype, device=kind.device))
            if noted(kind) is not None:
                note(zero, torch.float32)
            setattr(module, parameter_name, zero)
    why = why_no_critic(critic)
    if why is not None:
        raise ValueError(f"no critic can start from a {name}: {why}: {remedy}")
    return critic


def _take_over(model: nn.Module, source: nn.Module) -> None:
    """Give a model without weights (meta) copies of another's, in fp32, and of its buffers."""
    held = dict(source.named_parameters())
    state = {name: copied(held[name], torch.float32) if name in held else x for name, x in source.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for name, buffer in source.named_buffers():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.clone()


def check_critic(model: nn.Module) -> nn.Module:
    """The model, if it can be a critic.

    Raises:
        ValueError: it cannot; the message says why.
    """
    why = why_no_critic(model)
    if why is not None:
        raise ValueError(
            f"value_model {source_name(model)}, a {type(unwrap_peft(model)).__name__}, cannot be a critic: {why}: "
            "leave value_model out, or give a causal model with one linear head (`rto reward` trains one)"
        )
    return model


def check_token_scorer(model: nn.Module) -> None:
    """Refuse a model whose scalar head cannot be read after every token.

    Raises:
        ValueError: it cannot; the message says why.
    """
    why = why_no_critic(model)
    if why is not None:
        raise ValueError(
            f"{source_name(model)}, a {type(unwrap_peft(model)).__name__}, cannot score token by token: {why}: give a "
            "causal model, or a causal model with one linear head"
        )


@torch.no_grad()
def why_no_critic(model: nn.Module) -> str | None:
    """Why V(s_t) cannot be read from a model at every token; None where it can.

    One forward pass of a few tokens shows what reaches the head (the backbone's last hidden states, as they are) and
    a second one whether a token changes what stands before it.
    """
    try:
        head = scalar_head(model)
    except ValueError as error:
        return str(error)
    linear = unwrapped(head)
    if not isinstance(linear, nn.Linear) or linear.out_features != 1:
        return f"its head is a {type(linear).__name__}, not one linear layer"
    seen: list[Any] = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    training, _ = model.training, model.eval()
    try:
        config = unwrap_peft(model).config.get_text_config()
        tokens = torch.arange(1, 9, device=next(model.parameters()).device)[None] % config.vocab_size
        other = tokens.index_fill(1, tokens.new_tensor([7]), 0)
        with scoring_wide(model):  # the head is trained, so in fp32, where a base under adapters is narrow
            own = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, 0]
        states, changed = (backbone(model)(input_ids=x, use_cache=False).last_hidden_state for x in (tokens, other))
    except Exception as error:  # whatever an architecture that is read in another way says of it
        return f"it cannot be read token by token ({str(error).strip().splitlines()[0]})"
    finally:
        hook.remove()
        model.train(training)
    if not states.isfinite().all():
        return "its hidden states are not finite: look at its weights"
    if len(seen) != 1 or seen[0].shape != states.shape or not _close(seen[0], states):
        return "its head does not read the last hidden state of each token"
    if not _close(changed[:, :-1], states[:, :-1]):
        return "it is no causal model: a token changes what is read before it"
    at = last_scored(tokens, torch.ones_like(tokens), config.pad_token_id)
    if not _close(own, values_of(model, states)[0, at]):
        return "its score is not what its head gives"
    return None


def unwrapped(head: Any) -> Any:
    """The layer itself under PEFT's wrappers: the active copy of ``modules_to_save``, the base of a LoRA layer."""
    while True:
        if hasattr(head, "modules_to_save"):
            head = head.modules_to_save[head.active_adapters[0]] if head.active_adapters else head.original_module
        elif hasattr(head, "get_base_layer"):
            head = head.get_base_layer()
        else:
            return head


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of kernels in their precision."""
    gap = (a.float() - b.float()).abs().max()
    return bool(gap <= (1e-4 if a.dtype == torch.float32 else 0.05) * b.float().abs().max().clamp(min=1.0))
