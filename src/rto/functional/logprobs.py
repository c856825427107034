"""Token log-probabilities and entropy from hidden states, without ever holding batch × length × vocabulary.

The label shift of the whole project is here, in `predicting`, and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]: a model's output layer, with whatever it applies to its logits."""

MAX_LOGITS = 2**24
"""Logits held at once: 64 MiB in fp32."""


def predicting(kept: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """Positions that predict the kept tokens: position t − 1 predicts token t.

    At the same positions the critic reads V(s_t) with s_t = (x, y_<t), the state before y_t is chosen.

    Raises:
        ValueError: a row's first token is kept; nothing predicts that one.
    """
    if bool(kept[:, 0].any()):
        raise ValueError("a response needs a token before it that predicts its first one: prompts must not be empty")
    return F.pad(kept[:, 1:], (0, 1), value=False)


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    head: Head,
    tokens: Int[Tensor, " N"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> Float[Tensor, " N"]:
    """Log p(token) for each token, in fp32, with p = softmax(head(hidden) / temperature).

    Rows are cut so that at most ``max_logits`` logits exist at a time. When there is more than one cut and
    gradients are on, logits are computed again in the backward pass instead of being kept.
    """

    def logp(h: Tensor, y: Tensor) -> Tensor:
        return _LogProb.apply(_logits(h, head, temperature), y)

    return _by_rows(logp, (hidden, tokens), max(1, max_logits // vocab_size))


class _LogProb(torch.autograd.Function):
    """log softmax(z)[y] with its gradient, g · (1[v = y] − softmax(z)[v]), made in the forward pass's own buffer.

    Autograd's own derivative of gather − logsumexp holds three tensors of the size of the logits instead of one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The log-probability of each row's token."""
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, tokens[:, None]) - top
        weights = (logits - top).exp_()
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, total, tokens)
        return (chosen - total.log()).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " N"]) -> tuple[Float[Tensor, "N V"], None]:
        """Overwrites what the forward pass saved: good for one backward pass, as all of ours are."""
        weights, total, tokens = ctx.saved_tensors
        weights.mul_(-grad[:, None] / total)
        return weights.scatter_add_(-1, tokens[:, None], grad[:, None]), None


@torch.no_grad()
def logprobs_and_entropies(
    hidden: Float[Tensor, "N D"],
    head: Head,
    tokens: Int[Tensor, " N"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log p(token) as in `token_logprobs`, and H(p) = −Σ_v p(v) log p(v), nats; from one pass, without gradient."""

    def both(h: Tensor, y: Tensor) -> Tensor:
        logp = _logits(h, head, temperature).log_softmax(-1)
        return torch.stack([logp.gather(-1, y[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)])

    logp, entropy = _by_rows(both, (hidden, tokens), max(1, max_logits // vocab_size)).expand(2, -1)
    return logp, entropy


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

    Gradients reach ``hidden`` and ``head`` only. Cuts as in `token_logprobs`; both models' logits exist for one cut
    at a time.
    """

    def divergence(h: Tensor, ref_h: Tensor) -> Tensor:
        with torch.no_grad():
            ref = _logits(ref_h, ref_head, 1.0).log_softmax(-1)
        return (ref.exp() * (ref - _logits(h, head, 1.0).log_softmax(-1))).sum(-1)

    return _by_rows(divergence, (hidden, ref_hidden), max(1, max_logits // (2 * vocab_size)))


def _logits(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    logits = head(hidden).float()
    return logits if temperature == 1.0 else logits / temperature


def _by_rows(number: Callable[..., Tensor], columns: tuple[Tensor, ...], rows: int) -> Tensor:
    """``number`` of so many rows at a time; several cuts with gradients are computed again in the backward pass."""
    hidden = columns[0]
    if len(hidden) == 0:
        return hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
    cuts = list(zip(*(x.split(rows) for x in columns)))
    if not torch.is_grad_enabled() or len(cuts) == 1:
        return torch.cat([number(*cut) for cut in cuts], dim=-1)
    return torch.cat([checkpoint(number, *cut, use_reentrant=False) for cut in cuts], dim=-1)


def scatter(x: Float[Tensor, " N"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Put the kept tokens' numbers back in their places, 0 elsewhere; the inverse of ``y[mask]``."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)
