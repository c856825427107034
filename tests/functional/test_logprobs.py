import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rto.functional.logprobs import logprobs_and_entropies, predicting, scatter, token_forward_kl, token_logprobs

N, D, V = 23, 8, 61


@pytest.fixture
def layer():
    """Hidden states, an output layer whose logits are far from uniform, and tokens."""
    torch.manual_seed(0)
    head = nn.Linear(D, V)
    hidden = torch.randn(N, D) * 4
    return hidden, head, torch.randint(V, (N,))


def full_softmax(hidden, head, tokens, temperature=1.0):
    """The textbook way, all logits at once."""
    logp = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
    return logp[torch.arange(len(tokens)), tokens]


@pytest.mark.parametrize("max_logits", [1, 5 * V + 3, 2**24], ids=["row by row", "five rows", "at once"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_are_those_of_the_full_softmax(layer, temperature, max_logits):
    hidden, head, tokens = layer
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logp = token_logprobs(hidden, head, tokens, vocab_size=V, temperature=temperature, max_logits=max_logits)
        torch.testing.assert_close(logp, full_softmax(hidden, head, tokens, temperature), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_distribution(layer, temperature):
    hidden, head, tokens = layer
    expected = torch.distributions.Categorical(logits=head(hidden).double() / temperature).entropy()
    for max_logits in (5 * V, 2**24):
        settings = {"vocab_size": V, "temperature": temperature, "max_logits": max_logits}
        logp, entropy = logprobs_and_entropies(hidden, head, tokens, **settings)
        torch.testing.assert_close(logp, token_logprobs(hidden, head, tokens, **settings), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
        assert not entropy.requires_grad


def test_gradients_of_chunks_are_those_of_the_whole(layer):
    hidden, head, tokens = layer
    weights = torch.randn(N)
    grads = []
    for logprobs in (
        lambda h: full_softmax(h, head, tokens, 0.7),
        lambda h: token_logprobs(h, head, tokens, vocab_size=V, temperature=0.7, max_logits=4 * V),
        lambda h: token_logprobs(h, head, tokens, vocab_size=V, temperature=0.7),
    ):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        (logprobs(h) * weights).sum().backward()
        grads.append((h.grad, head.weight.grad, head.bias.grad))
    for chunked in grads[1:]:
        for ours, theirs in zip(chunked, grads[0]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_normalized_in_full_precision(layer):
    """The logits are rounded by the model; the softmax over them must not be rounded once more."""
    hidden, head, tokens = layer
    hidden, head = hidden.bfloat16(), head.bfloat16()
    logp, entropy = logprobs_and_entropies(hidden, head, tokens, vocab_size=V)
    torch.testing.assert_close(token_logprobs(hidden, head, tokens, vocab_size=V), logp, rtol=1e-6, atol=2e-6)
    assert logp.dtype == entropy.dtype == torch.float32
    exact = torch.log_softmax(head(hidden).double(), -1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=2e-6)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("max_logits", [3 * 500, 500])
def test_no_tensor_ever_holds_a_vocabulary_for_each_token(max_logits):
    """Forward and backward: the largest tensor is a chunk of logits or the weight, not N·V."""
    n, d, v = 64, 2, 500
    hidden, head = torch.randn(n, d, requires_grad=True), nn.Linear(d, v)
    tokens = torch.randint(v, (n,))
    with LargestTensor() as largest:
        token_logprobs(hidden, head, tokens, vocab_size=v, max_logits=max_logits).sum().backward()
    assert largest.numel == max(max_logits, d * v)
    with LargestTensor() as largest:  # the recorder does see them
        token_logprobs(hidden, head, tokens, vocab_size=v).sum().backward()
    assert largest.numel == n * v


def test_chunks_do_not_add_up_in_memory_until_the_backward_pass():
    """What autograd keeps is less than the logits of one chunk."""
    n, d, v, rows = 64, 2, 500, 4
    hidden, head = torch.randn(n, d, requires_grad=True), nn.Linear(d, v)
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logprobs(hidden, head, torch.randint(v, (n,)), vocab_size=v, max_logits=rows * v)
    assert sum(kept) < rows * v


def test_no_tokens_is_no_numbers_but_still_a_graph():
    """A process whose micro-batch holds no token must still take part in the backward pass."""
    hidden = torch.randn(0, D, requires_grad=True)
    none, head = torch.zeros(0, dtype=torch.long), nn.Linear(D, V)
    logp = token_logprobs(hidden, head, none, vocab_size=V)
    assert logp.shape == (0,)
    assert [x.shape for x in logprobs_and_entropies(hidden, head, none, vocab_size=V)] == [(0,), (0,)]
    logp.sum().backward()
    assert hidden.grad.shape == (0, D)


def test_each_token_is_predicted_at_the_position_before_it():
    kept = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    expected = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    assert torch.equal(predicting(kept), expected)


def test_a_response_needs_a_prompt_before_it():
    with pytest.raises(ValueError, match="prompts must not be empty"):
        predicting(torch.tensor([[False, True], [True, True]]))


def test_scatter_undoes_the_selection_and_carries_gradients():
    torch.manual_seed(0)
    mask = torch.rand(4, 6) < 0.5
    x = torch.randn(4, 6)
    chosen = x[mask].requires_grad_()
    back = scatter(chosen, mask)
    assert torch.equal(back, torch.where(mask, x, torch.zeros(())))
    weights = torch.randn(4, 6)
    (back * weights).sum().backward()
    assert torch.equal(chosen.grad, weights[mask])


# --- the divergence from a reference's whole distribution


@pytest.mark.parametrize("max_logits", [1, 10 * V + 3, 2**24], ids=["row by row", "five rows", "at once"])
def test_forward_kl_and_its_gradient_are_torchs(layer, max_logits):
    """Against torch.distributions in fp64, gradients of a weighted sum included; the reference gets none."""
    hidden, head, _ = layer
    ref_hidden, ref_head = torch.randn(N, D + 3) * 3, nn.Linear(D + 3, V)
    weights = torch.linspace(-1, 2, N)

    ours = hidden.clone().requires_grad_(), ref_hidden.clone().requires_grad_()
    kl = token_forward_kl(ours[0], head, ours[1], ref_head, vocab_size=V, max_logits=max_logits)
    (kl * weights).sum().backward()
    grad = head.weight.grad.clone()
    assert ours[1].grad is None
    assert ref_head.weight.grad is None

    head.zero_grad()
    wide = hidden.clone().requires_grad_()
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (ref_head(ref_hidden), head(wide)))
    expected = torch.distributions.kl_divergence(p, q)
    (expected * weights).sum().backward()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0].grad, wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, head.weight.grad, rtol=1e-4, atol=1e-4)


def test_forward_kl_of_equal_distributions_is_zero_and_of_no_tokens_is_empty(layer):
    hidden, head, _ = layer
    same = token_forward_kl(hidden, head, hidden, head, vocab_size=V)
    torch.testing.assert_close(same, torch.zeros(N), rtol=0, atol=1e-6)
    assert token_forward_kl(hidden[:0], head, hidden[:0], head, vocab_size=V).shape == (0,)
