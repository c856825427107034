"""Forward passes over `Sequences`: token log-probabilities from a policy, token values from a critic.

Only positions that predict a response token reach a head, and only in chunks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rto.batches import Sequences, collate, micro_batches
from rto.functional.logprobs import Head, logprobs_and_entropies, predicting, scatter, token_forward_kl, token_logprobs
from rto.models.loading import backbone, unwrap_peft
from rto.models.precision import wide_linear
from rto.models.roles import Role, acting, own_parameters
from rto.models.scalars import values_of


class TokenOutputs(NamedTuple):
    """What one forward pass yields for each response token, 0 outside the mask."""

    logp: Float[Tensor, "B T"] | None
    """log π(y_t|x,y_<t), nats; None where only the critic is read."""
    values: Float[Tensor, "B T"] | None
    """V(s_t), s_t = (x, y_<t)."""
    entropy: Float[Tensor, "B T"] | None = None
    """Entropy of π(·|x,y_<t), nats, without gradient; None where not asked for."""
    ref_kl: Float[Tensor, "B T"] | None = None
    """KL(π_ref(·|x,y_<t) ‖ π(·|x,y_<t)), nats; None without a reference to compare with."""


class Actor(nn.Module):
    """A policy and, where the estimator needs one, its critic, under one forward pass.

    One module, because whatever wraps a model for many processes (DDP, FSDP, DeepSpeed) acts on `forward`.
    """

    def __init__(self, policy: nn.Module, value_model: nn.Module | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    @property
    def value_parameters(self) -> list[nn.Parameter]:
        """The critic's trained parameters: all of its model, or its adapter and head on a base that it shares."""
        return [] if self.value_model is None else [p for p in own_parameters(self.value_model) if p.requires_grad]

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        """The policy's trained parameters: all that are not the critic's."""
        theirs = set(map(id, self.value_parameters))
        return [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]

    @property
    def config(self) -> object:
        """The policy's configuration: what `transformers.Trainer` looks up on its model."""
        return unwrap_peft(self.policy).config

    @property
    def _no_split_modules(self) -> set[str]:
        """Classes of the layers of both models: what FSDP cuts by. A name that no module here has would be refused."""
        models = [m for m in (self.policy, self.value_model) if m is not None and not isinstance(m, Role)]
        named = {name for m in models for name in getattr(unwrap_peft(m), "_no_split_modules", None) or ()}
        return named & {type(m).__name__ for m in self.modules()}

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        prompt_mask: Bool[Tensor, "B P"],
        mask: Bool[Tensor, "B T"],
        temperature: float = 1.0,
        with_entropy: bool = False,
        ref_hidden: Float[Tensor, "N D"] | None = None,
        ref_head: Head | None = None,
        parts: Sequence[str] = ("policy", "value"),
    ) -> TokenOutputs:
        """Score every response token under the policy and the critic, or under one of them (``parts``).

        With ``with_entropy`` the entropies come, too, and nothing has a gradient. With ``ref_hidden`` (a reference's
        hidden states at the kept response tokens) and ``ref_head`` (its output layer), the policy's whole
        distribution is compared with the reference's.
        """
        sequences = Sequences(tokens=tokens, prompt_mask=prompt_mask, mask=mask)
        if "policy" not in parts:
            assert self.value_model is not None
            return TokenOutputs(None, token_values(self.value_model, sequences))
        hidden = response_states(self.policy, sequences)
        head, own = output_layer(self.policy), sequences.responses[mask]
        settings: dict[str, Any] = {"vocab_size": vocab_size(self.policy), "temperature": temperature}
        values = entropy = ref_kl = None
        if with_entropy:
            logp, flat = logprobs_and_entropies(hidden, head, own, **settings)
            entropy = scatter(flat, mask)
        else:
            logp = token_logprobs(hidden, head, own, **settings)
        if self.value_model is not None and "value" in parts:
            values = token_values(self.value_model, sequences)
        if ref_hidden is not None:
            assert ref_head is not None
            size = vocab_size(self.policy)
            ref_kl = scatter(token_forward_kl(hidden, head, ref_hidden, ref_head, vocab_size=size), mask)
        return TokenOutputs(scatter(logp, mask), values, entropy, ref_kl)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: object
    ) -> None:
        """Recompute activations in the backward pass, in both models; on a shared base each in its own role."""
        settings, models = activation_checkpointing_kwargs, [self.policy, self.value_model]
        if isinstance(self.value_model, Role):
            settings = {"use_reentrant": False, **(settings or {}), "context_fn": self.value_model.base.recomputing}
            models = [self.policy]
        for model in models:
            if model is not None:
                inner = unwrap_peft(model)
                new = hasattr(inner, "activation_checkpointing_enable")  # older transformers call it gradient ...
                enable = inner.activation_checkpointing_enable if new else inner.gradient_checkpointing_enable
                enable(settings)

    gradient_checkpointing_enable = activation_checkpointing_enable


def hidden_states(model: nn.Module, sequences: Sequences) -> Float[Tensor, "B L D"]:
    """Last hidden states; positions count the tokens that exist, so left padding is inert."""
    attention = sequences.attention_mask
    positions = (attention.long().cumsum(1) - 1).clamp(min=0)
    with acting(model):
        outputs = backbone(model)(
            input_ids=sequences.tokens,
            attention_mask=None if bool(attention.all()) else attention.long(),
            position_ids=positions,
            use_cache=False,
        )
    return outputs.last_hidden_state


class TokenScorer(Actor):
    """A model with a scalar head, its `policy`, that is trained to say z(s_t, y_t) after each response token.

    What a loss with ``needs_scalar_head`` trains; its numbers stand where a policy's log-probabilities would.
    """

    def forward(  # type: ignore[override]  # it has one thing to say
        self, tokens: Int[Tensor, "B L"], prompt_mask: Bool[Tensor, "B P"], mask: Bool[Tensor, "B T"]
    ) -> TokenOutputs:
        """Score every response token."""
        sequences = Sequences(tokens=tokens, prompt_mask=prompt_mask, mask=mask)
        return TokenOutputs(token_scores(self.policy, sequences), None)


def response_states(model: nn.Module, sequences: Sequences, *, after: bool = False) -> Float[Tensor, "N D"]:
    """Last hidden states that predict the kept response tokens, or those ``after`` each was read, row by row.

    Rows are moved to the left, prompt and response in one piece, so a batch is as wide as its longest row. What is
    then padding comes after every token of its row, where a causal model never looks: no attention mask is needed,
    which is the fast path of attention kernels, and positions count from 0.
    """
    exists = sequences.attention_mask
    width = int(sequences.lengths.max())
    order = exists.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    kept = torch.cat([torch.zeros_like(sequences.prompt_mask), sequences.mask], dim=1)
    with acting(model):
        hidden = backbone(model)(input_ids=sequences.tokens.gather(1, order), use_cache=False).last_hidden_state
    kept = kept.gather(1, order)
    return hidden[kept if after else predicting(kept)]


def policy_logprobs(model: nn.Module, sequences: Sequences, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """Log π(y_t|x,y_<t), 0 outside the mask."""
    hidden, mask = response_states(model, sequences), sequences.mask
    tokens, size = sequences.responses[mask], vocab_size(model)
    logp = token_logprobs(hidden, output_layer(model), tokens, vocab_size=size, temperature=temperature)
    return scatter(logp, mask)


def token_values(model: nn.Module, sequences: Sequences) -> Float[Tensor, "B T"]:
    """V(s_t) before each response token, 0 outside the mask."""
    hidden = response_states(model, sequences)
    return scatter(values_of(model, hidden).float(), sequences.mask)


def token_scores(model: nn.Module, sequences: Sequences) -> Float[Tensor, "B T"]:
    """z(s_t, y_t): the scalar head after each response token was read, 0 outside the mask."""
    hidden = response_states(model, sequences, after=True)
    return scatter(values_of(model, hidden).float(), sequences.mask)


def vocab_size(model: nn.Module) -> int:
    """V."""
    return int(unwrap_peft(model).config.get_text_config().vocab_size)


MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Settings that logits are multiplied by: Cohere; Falcon-H1."""
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Settings that logits, or the hidden state before a head without bias, are divided by: Granite; Inkling."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Settings c of c · tanh(logits / c): Gemma; RecurrentGemma; xLSTM."""


class output_layer:
    """A policy's output layer with what its architecture does to logits after it: scales (×, /) and caps.

    Logits are made in fp32 from the hidden state and the weights as they are, under autocast, too: in bfloat16 a logit
    of 10 moves in steps of 1/16, a token reward is of that size or less. `check_output_layer` tells when a model does
    something that is not known here.

    Raises:
        ValueError: the model has no output layer.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap_peft(model)
        config = inner.config.get_text_config()
        self.model = model
        self.head: Any = inner.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"a model of type {inner.config.model_type} has no output layer: it is no language model")
        self.scale = math.prod(_settings(config, MULTIPLIERS)) / math.prod(_settings(config, DIVISORS))
        self.softcap = next(iter(_settings(config, CAPS)), None)

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits, in fp32."""
        # Both contexts here and not around the call: a checkpointed head runs again in the backward pass.
        with acting(self.model), wide_linear(hidden.device):
            logits = self.head(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _settings(config: Any, names: Sequence[str]) -> list[float]:
    """The values of those settings that a configuration has and that are not 0 or None."""
    return [float(x) for x in (getattr(config, name, None) for name in names) if x]


@torch.no_grad()
def check_output_layer(model: nn.Module) -> None:
    """Compare the logits that training will read with the model's own, on short rows and on a batch of them.

    Raises:
        ValueError: the model is not causal, its rows depend on each other, or it treats its logits in a way that this
            project does not know.
    """
    inner, device = unwrap_peft(model), next(model.parameters()).device
    name, kind = type(inner).__name__, inner.config.model_type
    ids = torch.arange(CHECKED, device=device) % vocab_size(model)
    lengths = (CHECKED, CHECKED // 2, 3)
    training, _ = model.training, model.eval()
    try:
        theirs = [model(input_ids=ids[None, :n], use_cache=False).logits[0].float() for n in lengths]
        seen = _gap(theirs[1], theirs[0][: lengths[1]])
        if seen > _tolerance(model, theirs[0]):
            raise ValueError(
                f"{name} is not causal (model type {kind}): the log-probability of a token moves by {seen:.2g} with "
                "what comes after it; take a causal model"
            )
        ours = _own_logits(model, ids, lengths)
    finally:
        model.train(training)
    gap = max(map(_gap, ours, theirs))
    if gap > _tolerance(model, theirs[0]):
        raise ValueError(
            f"{name} does something to its logits after the output layer, or to the hidden states before it, that is "
            f"not known here (model type {kind}, log-probabilities differ by {gap:.2g}): take a model of another "
            "type, or teach rto.models.actor.output_layer about it"
        )


CHECKED = 8
"""Tokens of the longest row that `check_output_layer` reads."""


def _own_logits(model: nn.Module, ids: Int[Tensor, " L"], lengths: Sequence[int]) -> list[Tensor]:
    """Our logits at every position but the last of rows that begin alike, from one batch."""
    x = collate([[int(ids[0])]] * len(lengths), [ids[1:n].tolist() for n in lengths], pad=0, device=ids.device)
    try:
        logits = output_layer(model)(response_states(model, x))
    except (AttributeError, RuntimeError, TypeError) as error:
        why = str(error).split("\n")[0]
        raise ValueError(
            f"the hidden states of model type {unwrap_peft(model).config.model_type} cannot be read apart from its "
            f"output layer ({why}): take a model of another type"
        ) from error
    return list(logits.split([n - 1 for n in lengths]))


def _gap(ours: Float[Tensor, "N V"], theirs: Float[Tensor, "M W"]) -> float:
    """The largest difference of log-probabilities at the positions that both have."""
    if ours.shape[-1] != theirs.shape[-1]:
        return math.inf
    return (ours.log_softmax(-1) - theirs[: len(ours)].log_softmax(-1)).abs().max().item()


def _tolerance(model: nn.Module, logits: Float[Tensor, "N V"]) -> float:
    """What rounding explains: a model's own logits are as exact as its precision; a forgotten scale is far more."""
    dtype = next(model.parameters()).dtype
    eps = torch.finfo(dtype if dtype.is_floating_point else torch.bfloat16).eps
    return max(0.01, eps * logits.abs().max().item())


def score_logprobs(
    model: nn.Module, sequences: Sequences, *, temperature: float, max_tokens: int
) -> Float[Tensor, "B T"]:
    """Log π(y_t|x,y_<t) by a model that is only read, in micro-batches of like length."""
    return read_in_parts(lambda part: policy_logprobs(model, part, temperature), sequences, max_tokens=max_tokens)


@torch.no_grad()
def read_in_parts(
    read: Callable[[Sequences], Float[Tensor, "B T"]], sequences: Sequences, *, max_tokens: int
) -> Float[Tensor, "B T"]:
    """One number a response token, read in micro-batches of like length, 0 outside the mask."""
    out = torch.zeros(sequences.mask.shape, dtype=torch.float32, device=sequences.tokens.device)
    for rows in micro_batches(sequences.lengths.cpu(), max_tokens):
        part = sequences.rows(rows).trim()
        out[rows.to(out.device), : part.mask.shape[1]] = read(part)
    return out
