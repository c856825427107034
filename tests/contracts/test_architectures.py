"""Every causal type of the installed transformers: right to the model's own forward pass, or refused by one line."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from architectures import NAMES, SKIPPED, VARIANTS, WINDOW, build, committed, decide
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rto.functional.logprobs import token_logprobs
from rto.models.actor import output_layer, policy_logprobs, response_states, vocab_size
from rto.models.saving import as_it_is, as_stored, pieces_of, save_model
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler

LIMIT, PROMPTS = 14, (1, 3, 13, 7, 13)
TIE = 1e-4

FEW = [
    "llama, tied",  # plain
    "gpt2",  # learned positions
    "mistral",  # windows without layer_types
    "mixtral",
    "qwen2, windows",
    "gemma3_text",  # windows in every other layer
    "gemma2, capped at 2",
    "llama4_text, chunks",
    "deepseek_v3",  # latent attention, experts
    "bloom",  # ALiBi
    "falcon, ALiBi",
    "mamba",  # a state
    "mamba2",
    "recurrent_gemma",
    "lfm2",  # convolutions and attention
    "qwen3_next",  # linear and full attention
    "bart",  # padding reaches the positions
    "opt, projected",
    "bert",  # not causal
    "bert, decoder",  # a head of several layers
    "modernbert-decoder",
]
"""One of each kind. All others are slow tests."""


def names():
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in NAMES]


@pytest.fixture(scope="module")
def rows():
    """Prompts of several lengths, one token among them and two alike."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (n,), generator=g).tolist() for n in PROMPTS]


def own_logits(model, tokens):
    """The oracle: one forward pass of the model itself over one row without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def greedy(model, prompts, eos=()):
    sampler = TransformersSampler(
        config=SamplingConfig(max_completion_length=LIMIT, temperature=0.0), eos_ids=eos, pad_id=0
    )
    samples = sampler(model, prompts, seed=0)
    return samples, [y[m].tolist() for y, m in zip(samples.responses, samples.mask)]


def early_ends(completions):
    """Two ids that end rows at as many different steps as two can."""
    ids = sorted({token for y in completions for token in y})

    def steps(eos):
        return len({next((t for t, token in enumerate(y) if token in eos), LIMIT) for y in completions})

    return max(itertools.combinations(ids, 2), key=steps)


def assert_greedy(model, prompts, completions, eos, ended):
    for x, y, end in zip(prompts, completions, ended):
        logits = own_logits(model, x + y)[len(x) - 1 : -1]
        behind = logits.max(-1).values - logits.gather(-1, torch.tensor(y)[:, None]).squeeze(-1)
        assert behind.max() <= TIE
        assert end == (y[-1] in eos)
        assert end or len(y) == LIMIT
        assert not any(token in eos for token in y[:-1])


@pytest.mark.parametrize("name", names())
def test_a_type_is_right_or_refused_by_name(name, rows):
    model = build(name)
    found = decide(name, model)
    assert committed()[name] == found.decoded, "write the table anew: python tests/contracts/architectures.py"
    if found.decoded == "refused":
        assert model.config.model_type in found.line
        assert "take a" in found.line
        assert "\n" not in found.line
        return
    _, endless = greedy(model, rows)
    eos = early_ends(endless)
    samples, completions = greedy(model, rows, eos)
    assert len({len(y) for y in completions}) > 1
    assert_greedy(model, rows, completions, eos, samples.ended.tolist())
    assert max(map(len, endless)) + max(PROMPTS) > 3 * WINDOW
    with torch.no_grad():
        logp = policy_logprobs(model, samples)
        hidden = response_states(model, samples)
    for x, y, ours in zip(rows, completions, logp):
        theirs = own_logits(model, x + y).log_softmax(-1)[len(x) - 1 : -1].gather(-1, torch.tensor(y)[:, None])
        torch.testing.assert_close(ours[: len(y)], theirs.squeeze(-1), rtol=1e-4, atol=1e-4)
    assert_head_in_fp32(model, hidden.bfloat16(), samples.responses[samples.mask])


def assert_head_in_fp32(model, hidden, tokens):
    """Under autocast to bfloat16, and with weights in it, against the head in float64 on the same hidden states."""
    size, layer = vocab_size(model), output_layer(model)
    for dtype in (torch.float32, torch.bfloat16):
        head = layer.head.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            ours = token_logprobs(hidden, layer, tokens, vocab_size=size)
        bias = None if getattr(head, "bias", None) is None else head.bias.double()
        logits = F.linear(hidden.double(), head.weight.double(), bias) * layer.scale
        if layer.softcap is not None:
            logits = layer.softcap * torch.tanh(logits / layer.softcap)
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


def test_every_type_is_tried_or_skipped_with_a_reason():
    types = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert types <= (set(NAMES) - VARIANTS.keys()) | SKIPPED.keys()  # an older version has fewer
    assert set(FEW) <= set(NAMES)
    table = committed()
    assert set(table) == set(NAMES)
    assert sum(way != "refused" for way in table.values()) >= 100


SEVERAL = {"hrm_text": 5}
"""Weights of a model that are gathered side by side to be written; of all others one."""
OTHER_NAMES = {"camembert", "xlm-roberta"}
"""Whose tied output layer the library writes under its second name."""


@pytest.mark.slow
def test_every_type_is_written_weight_by_weight_as_the_library_writes_it(tmp_path):
    """Also those whose folder holds them in another form: experts one by one, other names, joined maps."""
    found, others = set(), {}
    for i, name in enumerate(NAMES):
        model = build(name)
        pieces = pieces_of(model, as_it_is)
        stored = as_stored(model, pieces)
        assert stored is not None
        if stored.keys() != pieces.keys():
            found.add(name)
            several = max(len(piece.make.func.__self__.pieces) for piece in stored.values())
            others |= {name: several} if several > 1 else {}
        model.save_pretrained(tmp_path / f"{i} theirs")
        save_model(model, tmp_path / f"{i} ours", as_it_is, writes=True)
        theirs, ours = (tmp_path / f"{i} {whose}" / "model.safetensors" for whose in ("theirs", "ours"))
        assert theirs.read_bytes() == ours.read_bytes() or name.partition(",")[0] in OTHER_NAMES, name
    assert others == SEVERAL
    assert {"mixtral", "qwen3_moe", "gpt_neox", "gemma3"} < found
