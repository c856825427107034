"""Our log-probabilities and values against the models' own, row by row and without any padding."""

import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from rto.batches import micro_batches
from rto.functional.logprobs import token_logprobs
from rto.models.actor import (
    Actor,
    check_output_layer,
    output_layer,
    policy_logprobs,
    response_states,
    score_logprobs,
    token_values,
)


def own_logprobs(model, prompt, response, temperature=1.0):
    """log π of each response token, from ``model(ids).logits`` of one unpadded row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double() / temperature
    logp = logits.log_softmax(-1)
    return [logp[len(prompt) + t - 1, y].item() for t, y in enumerate(response)], logp


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_models_own(architecture, ragged, batch, temperature):
    """On each architecture: the output layer, the label shift, positions and attention under padding."""
    vocab = architecture.config.vocab_size
    x = batch(vocab, left=3, right=2)
    with torch.no_grad():
        logp, _, entropy, _ = Actor(architecture)(x.tokens, x.prompt_mask, x.mask, temperature, with_entropy=True)
    torch.testing.assert_close(policy_logprobs(architecture, x, temperature), logp, rtol=1e-6, atol=2e-6)
    for i, (x, y) in enumerate(zip(*ragged(vocab))):
        expected, full = own_logprobs(architecture, x, y, temperature)
        n = len(y)
        assert logp[i, :n].tolist() == pytest.approx(expected, abs=1e-4)
        at = full[len(x) - 1 : len(x) + n - 1]
        assert entropy[i, :n].tolist() == pytest.approx((-(at.exp() * at).sum(-1)).tolist(), abs=1e-4)
        assert (logp[i, n:] == 0).all()
        assert (entropy[i, n:] == 0).all()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]], ids=str)
def test_adapters_are_read_and_learn(tiny_model, ragged, batch, targets):
    """A LoRA policy scores with its adapters in place, also on the output layer, and only they get a gradient."""
    base = tiny_model(tie_word_embeddings=False)
    vocab = base.config.vocab_size
    plain = policy_logprobs(base, batch(vocab)).detach()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    logp = policy_logprobs(model, batch(vocab, left=2))
    for i, (x, y) in enumerate(zip(*ragged(vocab))):
        assert logp[i, : len(y)].tolist() == pytest.approx(own_logprobs(model, x, y)[0], abs=1e-4)
    assert (logp - plain).abs().max() > 0.1
    check_output_layer(model)
    logp.sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learned == {name for name, _ in model.named_parameters() if "lora_" in name}
    with model.disable_adapter():
        assert torch.equal(policy_logprobs(model, batch(vocab)), plain)


def test_known_output_layers_pass_the_check(architecture):
    check_output_layer(architecture)


@pytest.mark.parametrize(
    ("architecture", "forgotten"),
    [("cohere", {"scale": 1.0}), ("granite", {"scale": 1.0}), ("gemma2", {"softcap": None})],
    indirect=["architecture"],
    ids=str,
)
def test_the_check_sees_what_would_be_forgotten(architecture, forgotten, monkeypatch):
    """Where an architecture scales or caps its logits, leaving that out must not pass."""
    original = output_layer.__init__

    def forget(self, model):
        original(self, model)
        self.__dict__.update(forgotten)

    monkeypatch.setattr(output_layer, "__init__", forget)
    with pytest.raises(ValueError, match="does something to its logits"):
        check_output_layer(architecture)


def test_an_unknown_architecture_is_refused_by_name(tiny_model, monkeypatch):
    model = tiny_model().train()
    original = type(model).forward

    def with_a_twist(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 1.3
        return out

    monkeypatch.setattr(type(model), "forward", with_a_twist)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does something .* teach rto\.models\.actor\.output_layer"):
        check_output_layer(model)
    assert model.training  # and the check leaves the mode as it was


@pytest.fixture(params=["tiny", "stories"])
def policy(request, tiny_model):
    if request.param == "tiny":
        return tiny_model()
    return AutoModelForCausalLM.from_pretrained(request.getfixturevalue("stories")).eval()


@pytest.fixture
def critic(policy):
    """The policy's backbone with a random scalar head."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        critic = LlamaForSequenceClassification(type(policy.config)(**policy.config.to_dict() | {"num_labels": 1}))
    critic.model.load_state_dict(policy.model.state_dict())
    nn.init.normal_(critic.score.weight)
    return critic.eval()


@torch.no_grad()
@pytest.mark.parametrize(("left", "right", "pad"), [(5, 0, 0), (0, 7, 0), (4, 3, 0), (4, 3, 17)])
def test_padding_is_inert(policy, critic, batch, left, right, pad):
    """More padding, or padding that looks like a real token, changes no number."""
    vocab = policy.config.vocab_size
    actor = Actor(policy, critic)
    few, more = batch(vocab), batch(vocab, left=left, right=right, pad=pad)
    for a, b in zip(*(actor(x.tokens, x.prompt_mask, x.mask, with_entropy=True)[:3] for x in (few, more))):
        assert a.abs().sum() > 1
        torch.testing.assert_close(b[:, : few.mask.shape[1]], a, rtol=1e-4, atol=1e-4)
        assert (b[:, few.mask.shape[1] :] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [1, 30, 64, 10_000])
def test_micro_batches_change_no_number(policy, batch, max_tokens):
    x = batch(policy.config.vocab_size, left=2, right=2)
    whole = policy_logprobs(policy, x, 0.8)
    torch.testing.assert_close(
        score_logprobs(policy, x, temperature=0.8, max_tokens=max_tokens), whole, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_values_are_of_the_state_before_the_token(policy, critic, ragged, batch):
    """V(s_t) is the head over the unpadded prefix (x, y_<t): y_t and what follows it are not seen."""
    vocab = policy.config.vocab_size
    values = token_values(critic, batch(vocab, left=2))
    for i, (x, y) in enumerate(zip(*ragged(vocab))):
        for t in range(len(y)):
            hidden = critic.model(input_ids=torch.tensor([[*x, *y[:t]]])).last_hidden_state[0, -1]
            assert values[i, t].item() == pytest.approx(critic.score(hidden).item(), rel=1e-3, abs=1e-3)


def test_gradients_of_micro_batches_add_up(tiny_model, batch):
    model = tiny_model()
    x = batch(model.config.vocab_size)
    grads = []
    for budget in (10_000, 30):
        model.zero_grad()
        for rows in micro_batches(x.lengths, budget):
            part = x.rows(rows).trim()
            policy_logprobs(model, part).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-4, atol=1e-4)
        assert grads[0][name].abs().sum() > 0


def float64_logprobs(model, hidden, tokens, temperature=1.0):
    """log p of the tokens from given hidden states, by the model's head in float64."""
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.double()
    logits = nn.functional.linear(hidden.double(), head.weight.double(), bias) / temperature
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


@pytest.mark.parametrize("max_logits", [2**24, 500], ids=["one cut", "many cuts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_layer_works_in_fp32_under_autocast(tiny_model, batch, dtype, max_logits):
    """Log-probabilities and gradients are those of a head in float64 on the hidden states as they come."""
    model = tiny_model(tie_word_embeddings=False, initializer_range=1.0).to(dtype)
    x = batch(model.config.vocab_size)
    tokens, head = x.responses[x.mask], model.get_output_embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = response_states(model, x).detach().requires_grad_()
        settings = {"vocab_size": model.config.vocab_size, "max_logits": max_logits}
        logp = token_logprobs(hidden, output_layer(model), tokens, **settings)
    ours = torch.autograd.grad(logp.sum(), [hidden, head.weight])
    expected = float64_logprobs(model, hidden, tokens)
    theirs = torch.autograd.grad(expected.sum(), [hidden, head.weight])
    assert expected.min() < -20  # logits at which bfloat16 moves in large steps
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=2e-5)
    precision = 1e-5 if dtype == torch.float32 else 1e-2  # a gradient comes back in its own weight's precision
    for gradient, right in zip(ours, theirs):
        assert gradient.dtype == right.dtype
        torch.testing.assert_close(gradient, right, rtol=precision, atol=precision * right.abs().max().item())


@torch.no_grad()
def test_whole_passes_under_autocast_have_their_heads_in_fp32(tiny_model, batch):
    """Through the actor, as training runs them: log-probability and entropy."""
    model = tiny_model(tie_word_embeddings=False, initializer_range=1.0)
    x = batch(model.config.vocab_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = Actor(model)(x.tokens, x.prompt_mask, x.mask, 0.7, with_entropy=True).logp
        hidden = response_states(model, x)
    expected = float64_logprobs(model, hidden, x.responses[x.mask], 0.7)
    torch.testing.assert_close(logp[x.mask].double(), expected, rtol=0, atol=3e-5)


def test_an_adapter_on_the_output_layer_is_in_fp32_too(tiny_model, batch):
    """A LoRA head of a bfloat16 base: base and adapter, against both in float64."""
    base = tiny_model(tie_word_embeddings=False, initializer_range=1.0).to(torch.bfloat16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model = get_peft_model(base, config).eval()
    x = batch(base.config.vocab_size)
    tokens = x.responses[x.mask]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = response_states(model, x).detach()
        logp = token_logprobs(hidden, output_layer(model), tokens, vocab_size=base.config.vocab_size)
    layer = base.lm_head
    a, b = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    weight = layer.base_layer.weight.double() + layer.scaling["default"] * b @ a
    expected = (hidden.double() @ weight.T).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-4)
    logp.sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learned == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("bert", r"^BertLMHeadModel is not causal \(model type bert\): .*; take a causal model$"),
        (
            "bert, decoder",
            r"^BertLMHeadModel does something .* \(model type bert, .* take a model of another type, or",
        ),
        (
            "rembert, decoder",
            r"^the hidden states of model type rembert cannot be read .* take a model of another type$",
        ),
    ],
)
def test_what_training_cannot_read_is_refused_by_type(name, line):
    with pytest.raises(ValueError, match=line):
        check_output_layer(build(name))


def test_a_cap_far_above_the_logits_is_seen(monkeypatch):
    """RecurrentGemma's is 30: it moves logits of 5 by a twentieth, log-probabilities by less than a tenth."""
    model = build("recurrent_gemma")
    head = model.get_output_embeddings()
    with torch.no_grad():
        loudest = model(input_ids=torch.arange(8)[None]).logits.abs().max()
        head.weight.mul_(5.0 / loudest)
    check_output_layer(model)
    monkeypatch.setattr("rto.models.actor.CAPS", ())
    with pytest.raises(ValueError, match=r"RecurrentGemmaForCausalLM does something to its logits .* differ by 0\.0"):
        check_output_layer(model)
