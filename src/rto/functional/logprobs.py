"""Token log-probabilities and entropy from hidden states, without ever holding batch × length × vocabulary.

The label shift of the whole project is here, in `predicting`, and nowhere else.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]: a model's output layer, with whatever it applies to its logits."""

MAX_LOGITS = 2**24
"""Logits held at once: 64 MiB in fp32."""


def predicting(hidden: Float[Tensor, "B L *D"], response: int) -> Float[Tensor, "B T *D"]:
    """The entries that predict the last ``response`` tokens: position t−1 predicts token t.

    At the same positions the critic reads V(s_t) with s_t = (x, y_<t), the state before y_t is chosen.
    """
    length = hidden.shape[1]
    if not 0 < response < length:
        raise ValueError(f"a response of {response} tokens does not fit a sequence of {length} with a prompt")
    return hidden[:, length - response - 1 : length - 1]


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    head: Head,
    tokens: Int[Tensor, " N"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """One number a token, in fp32: log p(token) and entropy of p = softmax(head(hidden) / temperature).

    Rows are cut so that at most ``max_logits`` logits exist at a time. When there is more than one cut and
    gradients are on, logits are computed again in the backward pass instead of being kept. The entropy
    carries no gradient.
    """
    if len(tokens) == 0:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty.detach()
    rows = max(1, max_logits // vocab_size)
    again = torch.is_grad_enabled() and len(tokens) > rows
    parts = []
    for h, y in zip(hidden.split(rows), tokens.split(rows)):
        args = (h, head, y, temperature)
        parts.append(checkpoint(_token_logprobs, *args, use_reentrant=False) if again else _token_logprobs(*args))
    logp, entropy = (torch.cat(column) for column in zip(*parts))
    return logp, entropy


def _token_logprobs(hidden: Tensor, head: Head, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    normalizer = logits.logsumexp(-1)
    logp = logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer
    with torch.no_grad():
        entropy = normalizer - (logits - normalizer[:, None]).exp().mul_(logits).sum(-1)
    return logp, entropy


def scatter(x: Float[Tensor, " N"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Put the kept tokens' numbers back in their places, 0 elsewhere; the inverse of ``y[mask]``."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


def token_forward_kl(
    hidden: Float[Tensor, "N D"],
    head: Head,
    ref_hidden: Float[Tensor, "N Dref"],
    ref_head: Head,
    *,
    vocab_size: int,
    max_logits: int = MAX_LOGITS,
) -> Float[Tensor, " N"]:
    """KL(p_ref ‖ p) = Σ_v p_ref(v) [log p_ref(v) − log p(v)] for each position, nats, in fp32.

    Gradients reach ``hidden`` and ``head`` only. Rows are cut and logits computed again in the backward pass as in
    `token_logprobs`; both models' logits exist for one cut at a time.
    """
    if len(hidden) == 0:
        return hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
    rows = max(1, max_logits // (2 * vocab_size))
    again = torch.is_grad_enabled() and len(hidden) > rows
    parts = []
    for h, ref in zip(hidden.split(rows), ref_hidden.split(rows)):
        args = (h, head, ref, ref_head)
        parts.append(checkpoint(_forward_kl, *args, use_reentrant=False) if again else _forward_kl(*args))
    return torch.cat(parts)


def _forward_kl(hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head) -> Tensor:
    with torch.no_grad():
        ref = ref_head(ref_hidden).float().log_softmax(-1)
    ours = head(hidden).float().log_softmax(-1)
    return (ref.exp() * (ref - ours)).sum(-1)
