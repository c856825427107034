"""Five roles on one base: each is what its adapter is alone, and none disturbs another."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto.functional import logprobs
from rto.models.actor import Actor, output_layer, policy_logprobs, response_states, token_values
from rto.models.loading import freeze, load_policy, load_scalar, scalar_head
from rto.models.roles import SharedBase, adapt, export, own_parameters, place, trainable
from rto.trainers.examples import reference_key

KINDS = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "dora": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "embedding": {"r": 2, "target_modules": ["embed_tokens", "v_proj"]},
    "whole layer": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, **settings})


def disturb(model: nn.Module, seed: int) -> None:
    """Adapters that do something: every trained number is moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def write_adapter(base: Path, folder: Path, seed: int, *, scalar: bool = False, **settings) -> Path:
    """An adapter made and saved by PEFT alone."""
    if scalar:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    kind = TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM
    adapted = get_peft_model(model, lora(task_type=kind, **settings))
    disturb(adapted, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tiny_model, tokenizer, tmp_path_factory):
    """A base whose output layer is not its embedding."""
    folder = tmp_path_factory.mktemp("untied")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folders(request, untied, tmp_path_factory):
    """One adapter a role, of each kind of adapter."""
    root = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    settings = KINDS[request.param]
    made = {name: write_adapter(untied, root / name, seed, **settings) for seed, name in enumerate(("pi", "dpo"))}
    kept = {k: v for k, v in settings.items() if k != "modules_to_save"}
    return made | {"reward": write_adapter(untied, root / "reward", 7, scalar=True, **kept)}


@pytest.fixture
def base(folders):
    return SharedBase(load_policy(folders["pi"]))


@pytest.fixture
def roles(base, folders):
    """All five, the last two with heads."""
    reward = base.load(folders["reward"], "reward_model", scalar=True)
    return {
        "pi": base.model.eval(),
        "ref": base.without_adapter(),
        "dpo": base.load(folders["dpo"], "dpo_model"),
        "reward": reward,
        "value": base.copy(reward, "value_model"),
    }


def close(found, expected):
    assert expected.abs().sum() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_each_role_is_its_adapter_alone(roles, folders, untied, batch):
    """Log-probabilities and scores against PEFT's own loading, each on a base of its own."""
    x = batch(260)
    alone = {name: AutoPeftModelForCausalLM.from_pretrained(folders[name]).eval() for name in ("pi", "dpo")}
    alone["ref"] = AutoModelForCausalLM.from_pretrained(untied).eval()
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(folders["reward"], num_labels=1).eval()
    with torch.no_grad():
        for _ in range(2):  # and again after every other role has acted
            numbers = {name: policy_logprobs(roles[name], x) for name in alone}
            for name, model in alone.items():
                close(numbers[name], policy_logprobs(model, x))
            for name in ("reward", "value"):
                close(token_values(roles[name].eval(), x), token_values(scorer, x))
        assert (numbers["pi"] - numbers["ref"]).abs().max() > 0.1
        assert (numbers["dpo"] - numbers["ref"]).abs().max() > 0.1


def test_nothing_but_the_acting_role_gets_a_gradient(roles, batch):
    x = batch(260)
    model, value = roles["pi"], trainable(roles["value"])
    mine = {id(p) for p in own_parameters(value)}
    for role, number in (("pi", policy_logprobs), ("value", token_values)):
        model.zero_grad()
        number(roles[role], x).sum().backward()
        learned = [p for p in [*model.parameters(), *value.parameters()] if p.grad is not None]
        learned = {id(p) for p in learned if p.grad.abs().sum() > 0}
        assert learned
        assert learned <= mine if role == "value" else not learned & mine
        value.zero_grad()
        for p in model.parameters():
            p.grad = None


def test_switching_changes_no_requires_grad(roles, batch):
    """Only the policy's adapter and the critic's are trained, before and after every role has acted."""
    value = trainable(roles["value"])
    flags = {n: p.requires_grad for n, p in roles["pi"].named_parameters()}
    trained = {n for n, needs in flags.items() if needs}
    assert trained
    assert all(".default" in n or ".value_model" in n for n in trained)
    assert any(".value_model" in n for n in trained)
    for role in roles.values():
        response_states(role, batch(260))
    with pytest.raises(KeyboardInterrupt), roles["dpo"].acting():
        raise KeyboardInterrupt
    assert {n: p.requires_grad for n, p in roles["pi"].named_parameters()} == flags
    assert roles["pi"].active_adapter == "default"
    freeze(value)
    frozen = {n for n, p in roles["pi"].named_parameters() if p.requires_grad}
    assert frozen == {n for n in trained if ".default" in n}


def test_a_role_owns_no_base(roles):
    """Moving or counting a role leaves the base and the other roles alone."""
    base = {id(p) for n, p in roles["pi"].named_parameters() if "lora_" not in n and "modules_to_save" not in n}
    owned = {name: {id(p) for p in own_parameters(roles[name])} for name in ("ref", "dpo", "reward", "value")}
    assert not owned["ref"]
    for name in ("dpo", "reward", "value"):
        assert owned[name]
        assert not owned[name] & base
        assert not any(owned[name] & theirs for other, theirs in owned.items() if other != name)
    roles["ref"].to(torch.float64)
    roles["dpo"].to(torch.float64)
    assert {p.dtype for p in roles["pi"].parameters()} == {torch.float32}


def gradients(roles, x, *, checkpointing, monkeypatch):
    """Of policy and critic on one base; both graphs are alive when the backward pass begins."""
    actor = Actor(roles["pi"], trainable(roles["value"])).train()
    if checkpointing:
        actor.activation_checkpointing_enable()
        monkeypatch.setattr(logprobs, "MAX_LOGITS", 260 * 3)
    out = actor(x.tokens, x.prompt_mask, x.mask)
    (out.logp.sum() + (out.values**2).sum()).backward()
    return {n: p.grad for n, p in actor.named_parameters() if p.grad is not None}


def test_recomputation_happens_in_the_role_of_the_forward_pass(base, folders, batch, monkeypatch):
    """Activation checkpointing runs layers again in the backward pass, when another role is active."""
    found = []
    for checkpointing in (False, True):
        shared = SharedBase(load_policy(folders["pi"]))
        reward = shared.load(folders["reward"], "reward_model", scalar=True)
        roles = {"pi": shared.model, "value": shared.copy(reward, "value_model")}
        found.append(gradients(roles, batch(260), checkpointing=checkpointing, monkeypatch=monkeypatch))
    plain, again = found
    assert plain.keys() == again.keys()
    assert any(".value_model" in n for n in plain)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_checkpointed_head_runs_again_in_its_role(untied, tmp_path, batch):
    """An adapter on the output layer; cuts of the vocabulary are computed again while another role acts."""
    targets = ["q_proj", "lm_head"]
    first = write_adapter(untied, tmp_path / "a", 1, target_modules=targets)
    shared = SharedBase(load_policy(first))
    role, x = trainable(shared.copy(None, "copy")), batch(260)
    grads = []
    for cut in (10**9, 260 * 3):
        hidden, tokens = response_states(role, x), x.responses[x.mask]
        logp = logprobs.token_logprobs(hidden, output_layer(role), tokens, vocab_size=260, max_logits=cut)
        grads.append(torch.autograd.grad(logp.sum(), own_parameters(role)))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(a.abs().sum() > 0 for a in grads[0])


def test_dropout_of_a_frozen_role_is_off_while_the_policy_trains(tiny_folder, tmp_path, batch):
    folder = write_adapter(tiny_folder, tmp_path / "a", 1, lora_dropout=0.9)
    shared = SharedBase(load_policy(folder))
    frozen, x = freeze(shared.copy(None, "ref_model")), batch(260)
    expected = policy_logprobs(frozen, x)
    shared.model.train()
    assert torch.equal(policy_logprobs(frozen, x), expected)
    assert not torch.equal(policy_logprobs(shared.model, x), expected)


# --- folders


def test_roles_are_saved_as_adapters_that_load_elsewhere(roles, tmp_path, batch):
    x = batch(260)
    roles["value"].save_pretrained(tmp_path / "value")
    disturbed = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "value", num_labels=1).eval()
    with torch.no_grad():
        close(token_values(roles["value"].eval(), x), token_values(disturbed, x))
    saved = json.loads((tmp_path / "value" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    assert "score" in saved["modules_to_save"]


def test_a_role_takes_its_weights_back(roles, tmp_path, batch):
    x, value = batch(260), trainable(roles["value"]).eval()
    value.save_pretrained(tmp_path / "value")
    with torch.no_grad():
        before = token_values(value, x)
        for p in own_parameters(value):
            p.add_(1.0)
        assert not torch.equal(token_values(value, x), before)
        value.load_weights(tmp_path / "value")
        assert torch.equal(token_values(value, x), before)


def test_merged_export_is_the_adapter(tiny_folder, tmp_path, batch):
    folder = write_adapter(tiny_folder, tmp_path / "adapter", 3)
    merged = AutoModelForCausalLM.from_pretrained(export(folder, tmp_path / "merged")).eval()
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert not list((tmp_path / "merged").glob("adapter*"))
    alone = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        close(policy_logprobs(merged, batch(260)), policy_logprobs(alone, batch(260)))
    with pytest.raises(ValueError, match="exists already"):
        export(folder, tmp_path / "merged")
    with pytest.raises(ValueError, match="is a whole model already"):
        export(tiny_folder, tmp_path / "again")


def test_only_adapters_made_for_this_base_share_it(base, folders, tiny_model, tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    elsewhere = write_adapter(tmp_path / "other", tmp_path / "elsewhere", 2)
    assert place(base, folders["dpo"], "dpo_model").adapter == "dpo_model"
    assert place(base, folders["dpo"], "dpo_model").adapter == "dpo_model_1"
    for source in (elsewhere, str(tmp_path / "other"), tiny_model(), len, None):
        assert place(base, source, "dpo_model") is source
    assert place(None, folders["dpo"], "dpo_model") is folders["dpo"]


def test_a_new_critic_is_zero_and_learns(base, batch):
    value = trainable(base.new_critic("value_model"))
    values = token_values(value, batch(260))
    assert (values == 0).all()
    (values - 1).square().sum().backward()
    assert scalar_head(value).weight.grad.abs().sum() > 0


def test_numbers_of_a_reference_are_kept_for_its_base(tiny_model):
    """π_ref's file of numbers is found again under another policy adapter, and never for another base."""

    def key(seed: int, adapter: int) -> str:
        model = adapt(tiny_model(seed=seed), lora())
        disturb(model, adapter)
        return reference_key(SharedBase(model).without_adapter(), [], "no")

    assert key(0, adapter=1) == key(0, adapter=2)
    assert key(0, adapter=1) != key(1, adapter=1)


# --- what is refused


def test_bad_adapters_are_refused_by_name(tiny_folder, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="peft_config: this PROMPT_TUNING adapter cannot be used here"):
        adapt(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for settings in ({"init_lora_weights": "pissa"}, {"bias": "all"}):
        with pytest.raises(ValueError, match="leave the base as it is"):
            adapt(tiny_model(), lora(**settings))
    with pytest.raises(ValueError, match="is under an adapter already"):
        adapt(adapt(tiny_model(), lora()), lora())
    causal = write_adapter(tiny_folder, tmp_path / "causal", 1)
    scorer = write_adapter(tiny_folder, tmp_path / "scorer", 1, scalar=True)
    base = SharedBase(load_policy(causal))
    for load in (lambda: base.load(causal, "reward_model", scalar=True), lambda: load_scalar(causal, new_head=False)):
        with pytest.raises(ValueError, match="causal has no trained scalar head"):
            load()
    for load in (lambda: base.load(scorer, "dpo_model"), lambda: load_policy(scorer)):
        with pytest.raises(ValueError, match="scorer is an adapter that scores completions, not a language model"):
            load()


def test_weights_that_do_not_fit_are_refused(tiny_folder, tmp_path):
    folder = write_adapter(tiny_folder, tmp_path / "a", 1)
    base = SharedBase(load_policy(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"a: the adapter's weights do not fit .*: \d+ numbers for \d+ parameters"):
        base.load(folder, "dpo_model")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(ValueError, match=r"a: its base model /gone is not there: set base_model_name_or_path"):
        load_policy(folder)


def test_adapter_folders_are_peft_models_with_their_own_base(tiny_folder, tmp_path, batch):
    """Where nothing shares: a reward adapter and a policy adapter, each loaded whole."""
    scorer = write_adapter(tiny_folder, tmp_path / "scorer", 1, scalar=True)
    model = load_scalar(scorer, new_head=False)
    assert isinstance(model, PeftModel)
    alone = AutoPeftModelForSequenceClassification.from_pretrained(scorer, num_labels=1).eval()
    with torch.no_grad():
        close(token_values(model.eval(), batch(260)), token_values(alone, batch(260)))
