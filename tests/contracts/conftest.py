import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

from rto.batches import Sequences, collate

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "gpt2": lambda: GPT2Config(
        **{k: SMALL[k] for k in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")},
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    # caps the logits; every other layer attends to a window of 4 tokens only
    "gemma2": lambda: Gemma2Config(
        **SMALL, head_dim=8, sliding_window=4, final_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.125),  # multiplies them
    "cohere2": lambda: Cohere2Config(**SMALL, logit_scale=0.125, sliding_window=4, head_dim=8),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=5.0),  # divides them
}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request):
    """A tiny random model of each kind that treats its logits in its own way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(ARCHITECTURES[request.param](), dtype=torch.float32).eval()


@pytest.fixture
def ragged():
    """``ragged(vocab_size)``: token lists of prompts and responses of many lengths, among them 1."""

    def build(vocab_size: int, rows: int = 6, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
        g = torch.Generator().manual_seed(seed)

        def lists(lengths):
            return [torch.randint(3, vocab_size, (n,), generator=g).tolist() for n in lengths]

        lengths = [1, 9, 3, 6, 2, 12, 5, 4][:rows]
        return lists(lengths), lists([*lengths[1:], lengths[0]])

    return build


@pytest.fixture
def batch(ragged):
    """``batch(vocab_size, left, right)``: the same rows with extra columns of padding."""

    def build(vocab_size: int, left: int = 0, right: int = 0, pad: int = 0, **kwargs) -> Sequences:
        x = collate(*ragged(vocab_size, **kwargs), pad=pad)
        tokens = torch.nn.functional.pad(x.tokens, (left, right), value=pad)
        return Sequences(
            tokens=tokens,
            prompt_mask=torch.nn.functional.pad(x.prompt_mask, (left, 0), value=False),
            mask=torch.nn.functional.pad(x.mask, (0, right), value=False),
        )

    return build
