"""What is refused before any work is done, and how the message helps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from rto.models.actor import token_values
from rto.models.loading import (
    check_same_vocabulary,
    eos_ids,
    find_config,
    freeze,
    load_policy,
    load_scalar,
    load_tokenizer,
    max_positions,
    scalar_head,
    stop_at_eos,
)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_a_folder_and_a_live_model_load(tiny_folder, tiny_model):
    model = load_policy(tiny_folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters()))
    assert model.dtype == torch.float32
    assert load_policy(model) is model
    assert load_policy(tiny_folder, dtype="bfloat16").dtype == torch.bfloat16
    assert max_positions(model) == 128


def test_a_model_that_is_only_read_takes_no_gradient(tiny_model):
    model = freeze(tiny_model().train())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_pickled_weights_are_refused(folder):
    """They can run code when they load: safetensors only."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    for load in (load_policy, load_scalar):
        with pytest.raises(OSError, match="safetensors"):
            load(folder)


def test_code_in_a_model_folder_does_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"trust_remote_code|evil"):
        load_policy(folder)
    assert not (tmp_path / "ran").exists()


# --- Tokenizers


def test_a_tokenizer_without_padding_pads_with_eos(tiny_folder, tokenizer, tmp_path):
    assert load_tokenizer(tiny_folder).pad_token == "<pad>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<eos>"


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no EOS token: set eos_token in its tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("listed", "expected"), [(None, (2,)), (2, (2,)), (7, (2, 7)), ([7, 2, 5], (2, 5, 7))], ids=str
)
def test_every_id_that_ends_a_completion(tiny_model, tokenizer, listed, expected):
    model = tiny_model()
    model.generation_config.eos_token_id = listed
    assert eos_ids(model, tokenizer) == expected


@pytest.mark.parametrize(("listed", "saved"), [(None, 2), ([7, 5], [2, 5, 7])], ids=str)
def test_a_saved_model_stops_where_sampling_does(tiny_model, tokenizer, tmp_path, listed, saved):
    """Plain `generate` of what was trained here must not run on past the end of a turn."""
    model = tiny_model()
    model.generation_config.eos_token_id = listed
    stop_at_eos(model, tokenizer)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == saved


# --- The policy's vocabulary


def test_the_same_vocabulary_passes(tiny_folder, tiny_model, tokenizer):
    check_same_vocabulary("dpo_model", tiny_folder, tokenizer, tiny_model())
    check_same_vocabulary("dpo_model", tiny_model(seed=1), tokenizer, tiny_model())


@pytest.mark.parametrize("live", [True, False])
def test_another_vocabulary_size_is_refused(tiny_model, tokenizer, tmp_path, live):
    other = tiny_model(vocab_size=300)
    if not live:
        other.save_pretrained(tmp_path)
    match = "dpo_model .* has a vocabulary of 300 tokens, the policy one of 260: .* own starting point"
    with pytest.raises(ValueError, match=match):
        check_same_vocabulary("dpo_model", other if live else tmp_path, tokenizer, tiny_model())


def test_another_tokenizer_of_the_same_size_is_refused(folder, tiny_model, tokenizer):
    """Two ids exchanged: every shape fits, every token reward would be wrong."""
    path = folder / "tokenizer.json"
    text = json.loads(path.read_text())
    vocab = text["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"ref_model .* another tokenizer than the policy .*'[ab]'"):
        check_same_vocabulary("ref_model", folder, tokenizer, tiny_model())


# --- Models with one scalar head


@pytest.fixture
def scalar_config(tiny_model):
    return lambda labels: LlamaConfig(**tiny_model().config.to_dict() | {"num_labels": labels})


def test_a_causal_model_as_critic_starts_at_zero(tiny_folder, tiny_model, batch):
    critic = load_scalar(tiny_folder)
    policy = tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(critic.model.parameters(), policy.model.parameters()))
    values = token_values(critic, batch(policy.config.vocab_size))
    assert (values == 0).all()
    values.sum().backward()  # and can learn
    assert scalar_head(critic).weight.grad.abs().sum() > 0


def test_a_reward_model_as_critic_keeps_its_head(scalar_config, tmp_path):
    model = LlamaForSequenceClassification(scalar_config(1))
    model.save_pretrained(tmp_path)
    critic = load_scalar(tmp_path)
    assert torch.equal(critic.score.weight, model.score.weight)
    assert critic.score.weight.abs().sum() > 0


@pytest.mark.parametrize("live", [True, False])
def test_a_model_with_two_outputs_is_refused(scalar_config, tmp_path, live):
    model = LlamaForSequenceClassification(scalar_config(2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has one output, .* has num_labels=2"):
        load_scalar(model if live else tmp_path)


def test_a_model_without_a_scalar_head_is_refused_by_name(tiny_model):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no `score` head"):
        scalar_head(tiny_model())


def test_a_type_without_such_a_model_is_refused_in_a_line(tmp_path):
    MambaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match=r"is of type mamba, of which transformers has no model that scores: take"):
        load_scalar(tmp_path / "mamba")
    T5Config(vocab_size=300).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"is of type t5, of which transformers has no causal language model: take"):
        load_policy(tmp_path / "t5")


def test_a_language_model_is_no_reward_model(tiny_folder: Path) -> None:
    """Without a trained head every score would be 0; as a critic to be trained the same folder is welcome."""
    with pytest.raises(ValueError, match=f"{tiny_folder.name} has no trained scalar head"):
        load_scalar(str(tiny_folder), new_head=False)
    assert load_scalar(str(tiny_folder)) is not None


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_no_policy(tiny_folder: Path, tmp_path: Path, tied: bool) -> None:
    """Also with tied embeddings, where no weight of a language model is missing."""
    load_scalar(str(tiny_folder)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.tie_word_embeddings = tied
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model that scores completions, not a language model"):
        load_policy(str(tmp_path))


def test_a_policy_without_its_output_layer_is_none(tiny_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a whole causal language model: it lacks lm_head\.weight"):
        load_policy(str(tmp_path))


def spoil(folder: Path, file: str, *place: str, value: object) -> None:
    """Put a value at a place of a JSON file."""
    tree = part = json.loads((folder / file).read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (folder / file).write_text(json.dumps(tree))


NO_TEXT = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("file", "place", "value", "says"),
    [
        ("tokenizer.json", ("post_processor",), NO_TEXT, "loses text .*post_processor in its tokenizer.json"),
        ("tokenizer_config.json", ("model_max_length",), "much", "cannot be read: TypeError"),
        (
            "generation_config.json",
            ("eos_token_id",),
            {},
            "eos_token_id in generation_config.json is {}, expected ids",
        ),
        ("generation_config.json", ("eos_token_id",), ["a"], "eos_token_id in generation_config.json is"),
        ("config.json", ("num_hidden_layers",), -1, "num_hidden_layers in config.json is -1"),
        ("config.json", ("rope_parameters", "rope_theta"), 0, "rope_theta in config.json is 0"),
        ("config.json", ("rope_parameters", "rope_theta"), -1, "rope_theta in config.json is -1"),
    ],
)
def test_what_a_file_says_wrongly_is_refused_with_the_folder(file, place, value, says, folder):
    """The libraries take each of these, and fail at the first text or the first pass, in a line of their own."""
    spoil(folder, file, *place, value=value)
    with pytest.raises(ValueError, match=says) as error:
        eos_ids(load_policy(folder), load_tokenizer(folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("base", [-1, 1.5, "nowhere/of-this-name"])
def test_an_adapter_whose_base_is_no_name_is_refused_with_its_folder(base, folder, tmp_path):
    get_peft_model(load_policy(folder), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    spoil(tmp_path / "adapter", "adapter_config.json", "base_model_name_or_path", value=base)
    with pytest.raises(ValueError, match="base") as error:
        find_config("--model", tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(error.value)
