"""A score is what the model's own forward pass gives for one row alone: for every type of model that scores a text.

The oracle is ``model(input_ids, attention_mask).logits`` of each row by itself, without padding.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model
from scorers import SKIPPED, TYPES, scorer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rto.batches import collate
from rto.data.formats import DataError, Prompt
from rto.evaluation.judging.judges import ScoreJudge, Sight
from rto.models.actor import token_values
from rto.models.loading import load_policy, max_positions, scalar_head
from rto.models.roles import SharedBase
from rto.models.scalars import check_critic, critic_of, last_scored, values_of, why_no_critic
from rto.rollout.rewards import Completed, RewardModel, distinct, reward_source
from rto.trainers.prompts import with_room
from tables import check_table

LENGTHS = (40, 2, 23, 5, 11, 1, 31)
PADS = {"its own": 0, "EOS": 2, "another than the tokenizer's": 7, "none": None}
COMMON = (
    *("llama", "qwen2", "gpt2", "gpt_neox", "opt", "bloom", "gemma2", "mistral", "mixtral"),
    *("bert", "roberta", "deberta-v2", "modernbert", "distilbert", "fnet", "convbert", "t5", "bart"),
)
"""Tested by default: what people score with, and one of each kind of pooling and mixing."""


def rows(n: int = len(LENGTHS), ended: bool = True) -> Completed:
    texts = [("ab cab dab " * 5)[i : i + length] for i, length in enumerate(LENGTHS)][:n]
    return Completed(
        prompts=["Q: "] * n, completions=texts, completion_ids=[[]] * n, ended=[ended or i % 2 == 0 for i in range(n)]
    )


def texts_of(batch: Completed) -> list[str]:
    triples = zip(batch.prompts, batch.completions, batch.ended)
    return [x + y + ("<eos>" if ended else "") for x, y, ended in triples]


@torch.no_grad()
def alone(model: nn.Module, tokenizer: Any, batch: Completed) -> list[float]:
    """Each row by itself, as transformers scores it."""
    ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts_of(batch)]
    return [model(input_ids=x, attention_mask=torch.ones_like(x)).logits.item() for x in ids]


def check(kind: str, tokenizer: Any) -> None:
    """Right, or refused by one line that names the type, whatever pads."""
    scored = 0
    for pad in PADS.values():
        model = None
        try:
            model = scorer(kind, pad_token_id=pad)
            expected = alone(model, tokenizer, rows())
        except Exception:  # the library itself cannot make or run it so
            if model is not None:
                with pytest.raises(ValueError, match="cannot score token ids alone") as refused:
                    RewardModel(model, tokenizer)
                assert type(model).__name__ in str(refused.value)
                assert "\n" not in str(refused.value)
            continue
        found = RewardModel(model, tokenizer, max_tokens=100)(rows())
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-4), f"{kind}, pad {pad}"
        assert torch.tensor(expected).std() > 1e-3
        scored += 1
    assert scored >= 2


@pytest.mark.parametrize("kind", COMMON)
def test_scores_are_the_models_own(kind, tokenizer):
    check(kind, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in COMMON])
def test_scores_are_the_models_own_for_every_type(kind, tokenizer):
    check(kind, tokenizer)


def test_every_type_is_tested_or_has_a_reason():
    assert len(TYPES) >= 100
    assert set(TYPES) | set(SKIPPED) >= set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    assert set(COMMON) <= set(TYPES)


@pytest.mark.slow
def test_the_page_is_what_was_found(tokenizer):
    page = Path(__file__).resolve().parents[2] / "docs" / "scorers.md"
    if f"transformers {transformers.__version__} " not in page.read_text(encoding="utf-8"):
        pytest.skip("the page is of another version of transformers")
    rows_of = []
    for kind in sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        if kind in SKIPPED:
            rows_of.append({"type": kind, "rows": "not tried", "critic": f"({SKIPPED[kind]})"})
            continue
        model = scorer(kind)
        together = RewardModel(model, tokenizer).padding is not None
        rows_of.append(
            {"type": kind, "rows": "together" if together else "one by one", "critic": why_no_critic(model) or "yes"}
        )
    check_table(page, "scorers", rows_of)


@pytest.mark.parametrize("pad", PADS.values(), ids=PADS)
def test_the_tokenizers_own_padding_says_nothing(pad, tokenizer):
    """Its side, its id and whether it has one; completions that were cut off, too."""
    model = scorer("llama", pad_token_id=pad)
    batch = rows(ended=False)
    expected = alone(model, tokenizer, batch)
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>")
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    assert without.pad_token is None
    for other in (tokenizer, left, eos, without):
        assert RewardModel(model, other)(batch) == pytest.approx(expected, abs=1e-4)


def test_padded_rows_go_together_and_the_others_one_by_one(tokenizer):
    """By what a model does with padding, not by its name."""
    calls: list[int] = []

    def passes(kind: str, **config: Any) -> int:
        model = scorer(kind, **config)
        source = RewardModel(model, tokenizer)
        model.register_forward_pre_hook(lambda m, a, k: calls.append(len(k["input_ids"])), with_kwargs=True)
        calls.clear()
        source(rows())
        return len(calls)

    assert passes("llama") == passes("deberta-v2") == 1
    for kind, config in (("llama", {"pad_token_id": None}), ("llama", {"pad_token_id": -1}), ("fnet", {}), ("t5", {})):
        assert passes(kind, **config) == len(LENGTHS)


def test_what_cannot_be_scored_is_refused_by_one_line(tokenizer):
    two = scorer("llama", num_labels=2)
    with pytest.raises(ValueError, match=r"a LlamaForSequenceClassification, cannot score token ids alone \(shape"):
        RewardModel(two, tokenizer)
    with pytest.raises(ValueError, match="its tokenizer reads no token in prompt and completion 0"):
        RewardModel(scorer("llama"), tokenizer)(
            Completed(prompts=[""], completions=[""], completion_ids=[[]], ended=[False])
        )


def test_a_score_that_is_no_number_names_model_and_completion(tokenizer):
    model = scorer("llama")
    model.config._name_or_path = "org/judge"
    source = RewardModel(model, tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("d").input_ids[0]] = float("nan")
    with pytest.raises(ValueError, match=r"reward model judge returned nan for completion 0 \('ab cab dab"):
        source(rows())


def test_an_encoders_tokenizer_needs_no_eos(tokenizer, tmp_path):
    """BERT's ends a text in a way of its own; nothing is appended."""
    model = scorer("bert")
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    source = reward_source(str(tmp_path), max_tokens=100)
    assert source.tokenizer.eos_token is None
    bare = rows()
    bare.ended[:] = [False] * len(bare.ended)
    assert source(rows()) == pytest.approx(alone(model, tokenizer, bare), abs=1e-4)


# --- context


@pytest.mark.parametrize(
    ("kind", "context"), [("llama", 64), ("gpt2", 64), ("opt", 64), ("bert", 64), ("roberta", 61)]
)
def test_a_row_longer_than_the_context_is_refused(kind, context, tokenizer):
    """RoBERTa counts positions from its padding id on."""
    model = scorer(kind, pad_token_id=2 if kind == "roberta" else 0)
    source = RewardModel(model, tokenizer)
    assert source.context == context

    def of_length(n: int) -> Completed:
        return Completed(prompts=["x" * 10], completions=["y" * (n - 11)], completion_ids=[[]], ended=[True])

    expected = alone(model, tokenizer, of_length(context))
    assert source(of_length(context)) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=rf"reads at most {context} tokens, and prompt and completion 0 \('yyy.*have"):
        source(of_length(context + 1))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_a_judge_counts_what_it_cannot_read(kind: str, tokenizer: Any) -> None:
    """A text over the judge's context on either side, or none at all: its game is not read, the others are."""
    source = RewardModel(scorer(kind, pad_token_id=2 if kind == "roberta" else 0), tokenizer)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    source.tokenizer = plain
    long = "y" * (source.context + 1)
    sights = [
        Sight(instruction="x", first=a, second=b) for a, b in (("y", "yy"), ("y", long), (long, "y"), ("z", "y"))
    ]
    games = ScoreJudge(source)(sights)
    assert [game.reason is None for game in games] == [True, False, False, True]
    assert {game.reason for game in games[1:3]} == {f"over the {source.context} tokens that {source.name} reads"}
    fit = Completed(prompts=["x"] * 2, completions=["y", "yy"], completion_ids=[[]] * 2, ended=[True] * 2)
    assert games[0].said == pytest.approx(source(fit), abs=1e-5)


def test_prompts_without_room_in_the_learned_judge_are_counted(tokenizer: Any, caplog: Any) -> None:
    source = RewardModel(scorer("llama"), tokenizer)
    asked = [Prompt(ids=[], raw="x" * n, columns={}) for n in (1, source.context - 4, source.context)]
    assert with_room(asked, "rows", scorers=[source], completion=4)[0] == asked[:2]
    assert "1 with no room for a completion" in caplog.text
    with pytest.raises(DataError, match="take a reward model of a longer context"):
        with_room(asked[2:], "rows", scorers=[source], completion=4)


@pytest.mark.parametrize("kind", ["bloom", "t5", "deberta-v2", "falcon"])
def test_relative_positions_have_no_limit(kind, tokenizer):
    config = {"deberta-v2": {"position_biased_input": False}, "falcon": {"alibi": True}}.get(kind, {})
    model = scorer(kind, **config)
    long = Completed(prompts=["x" * 90], completions=["y"], completion_ids=[[]], ended=[True])
    assert max_positions(model) is None
    assert RewardModel(model, tokenizer)(long) == pytest.approx(alone(model, tokenizer, long), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_reads_as_much_as_we_say(kind, tokenizer):
    model = scorer(kind, pad_token_id=1)
    context = max_positions(model)
    if context is None or context > 1000:
        pytest.skip("no limit within reach")
    RewardModel(model, tokenizer)(
        Completed(prompts=["x"], completions=["y" * (context - 2)], completion_ids=[[]], ended=[True])
    )


# --- adapters, alone and on a shared base


@pytest.fixture
def adapters(tiny_model, tokenizer, tmp_path):
    """``adapters(pad of the base's config, pad of the tokenizer beside the adapter)``: policy, reward, tokenizer."""

    def build(base_pad: int | None, pad_token: str | None) -> tuple[Any, Any, Any]:
        base = tmp_path / f"base-{base_pad}"
        tiny_model(pad_token_id=base_pad).save_pretrained(base)
        folders = []
        for name, kind in (("policy", TaskType.CAUSAL_LM), ("reward", TaskType.SEQ_CLS)):
            auto = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
            made = auto.from_pretrained(base, **({} if name == "policy" else {"num_labels": 1}))
            model = get_peft_model(made, LoraConfig(r=4, target_modules="all-linear", task_type=kind))
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
            folders.append(base.with_name(f"{name}-{base_pad}-{pad_token}"))
            model.save_pretrained(folders[-1])
        own = copy.deepcopy(tokenizer)
        if pad_token is not None:
            own.pad_token = pad_token
            own.save_pretrained(folders[1])
        return *folders, own

    return build


@pytest.mark.parametrize("base_pad", [0, 2, None])
@pytest.mark.parametrize("pad_token", [None, "<pad>", "<eos>"])
def test_an_adapter_scores_where_it_was_trained_alone_and_as_a_role(adapters, base_pad, pad_token):
    """The base's configuration does not say what training set: the tokenizer beside the adapter does.

    The oracle is PEFT's own model of the folder, padded as it was in training.
    """
    policy, reward, tokenizer = adapters(base_pad, pad_token)
    oracle = AutoPeftModelForSequenceClassification.from_pretrained(reward, num_labels=1).eval()
    if pad_token is not None:
        oracle.config.pad_token_id = tokenizer.pad_token_id
    expected = alone(oracle, tokenizer, rows())
    base = SharedBase(load_policy(policy))
    role = base.load(reward, "reward_model", scalar=True)
    base.model.config.pad_token_id = 5  # transformers.Trainer sets it when training begins
    for source in (RewardModel(role, tokenizer), reward_source(str(reward), tokenizer, max_tokens=100)):
        assert source(rows()) == pytest.approx(expected, abs=1e-4)
        assert source.name == reward.name
    copied = base.copy(role, "value_model")
    assert RewardModel(copied, tokenizer)(rows()) == pytest.approx(expected, abs=1e-4)


def test_a_scorer_is_called_after_its_own_folder(adapters, tokenizer):
    _, reward, _ = adapters(0, None)
    source = reward_source(str(reward), tokenizer, max_tokens=100)
    assert (source.name, source.identity) == (reward.name, str(reward.resolve()))
    assert distinct(["a", "a", "b", "a_1", "a"]) == ["a", "a_1", "b", "a_1_1", "a_2"]


# --- critics


CAUSAL = ("llama", "qwen2", "gpt2", "gpt_neox", "opt", "bloom", "gemma2", "mistral", "mixtral", "falcon")
NO_CRITIC = {
    "bert": "does not read the last hidden state of each token",
    "distilbert": "does not read the last hidden state",
    "roberta": "its head is a RobertaClassificationHead, not one linear layer",
    "deberta-v2": "does not read the last hidden state",
    "modernbert": "does not read the last hidden state",
    "modernbert-decoder": "does not read the last hidden state",
    "t5": "T5ForSequenceClassification has no `score` head",
    "bart": "BartForSequenceClassification has no `score` head",
    "xlnet": "has no `score` head",
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_scorer_is_a_critic_with_its_score_at_the_last_token(kind, tokenizer):
    """V before the response's last token is the score of the row that ends there; padding is EOS, as in training."""
    model = check_critic(scorer(kind, pad_token_id=2))
    prompt, response = tokenizer("Q: ab").input_ids, [*tokenizer("cab dab").input_ids, 2]
    with torch.no_grad():
        values = token_values(model, collate([prompt], [response], pad=0))[0]
        ids = torch.tensor([prompt + response])
        assert values[-1].item() == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-4)
    assert values.std() > 1e-3


@pytest.mark.parametrize("kind", NO_CRITIC)
def test_what_cannot_be_read_token_by_token_is_no_critic(kind):
    model = scorer(kind)
    assert NO_CRITIC[kind] in (why_no_critic(model) or "")
    with pytest.raises(ValueError, match=rf"value_model .*a {type(model).__name__}, cannot be a critic: .*leave"):
        check_critic(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_every_critic_reads_its_own_head(kind, tokenizer):
    """Whatever type is let through gives, before the last token, the score of what stands there."""
    model = scorer(kind)
    if why_no_critic(model) is not None:
        pytest.skip("no critic")
    prompt, response = tokenizer("Q: ab").input_ids, tokenizer("cab dab!").input_ids
    with torch.no_grad():
        values = token_values(model, collate([prompt], [response], pad=0))[0]
        for t in range(len(response)):
            own = model(input_ids=torch.tensor([prompt + response[:t]])).logits.item()
            assert values[t].item() == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("kind", ["embed", "zero"])
def test_a_bidirectional_backbone_under_a_linear_head_is_found_out(kind):
    """Even where nothing tells from the head's weights: it may start at zero."""
    model = scorer("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.model.config.is_causal = False
    if kind == "zero":
        nn.init.zeros_(model.score.weight)
    assert why_no_critic(model) == "it is no causal model: a token changes what is read before it"


def test_a_critic_starts_from_the_weights_of_the_object(tiny_folder, tiny_model):
    """Not from those of the folder that it was once loaded from."""
    live = LlamaForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(0.1)
    critic = critic_of(live)
    assert critic.config.num_labels == 1
    theirs, ours = live.model.state_dict(), critic.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(live.parameters(), critic.parameters()))
    assert not critic.score.weight.any()
    half = critic_of(tiny_model().bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_a_type_without_a_scorer_has_no_critic(architecture):
    name = type(architecture).__name__
    if architecture.config.model_type in ("llama", "gpt2", "gemma2"):
        assert critic_of(architecture).config.num_labels == 1
    else:
        with pytest.raises(ValueError, match=f"no critic can start from a {name}: .*advantage_estimator='reinforce"):
            critic_of(architecture)


@pytest.mark.parametrize("peft_config", [{"target_modules": "all-linear"}, {"modules_to_save": ["embed_tokens"]}])
def test_a_new_critic_on_a_base_starts_as_the_policy(tiny_model, batch, peft_config):
    """Backbone and adapter as they are in the object, whatever its adapter trains."""
    from rto.models.actor import response_states

    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], **peft_config}
    policy = get_peft_model(tiny_model(tie_word_embeddings=False), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    base = SharedBase(policy.eval())
    x = batch(260)
    with torch.no_grad():
        own = response_states(policy, x)
        started = response_states(base.new_critic("value_model", from_policy=True), x)
        blank = response_states(base.new_critic("other"), x)
    torch.testing.assert_close(started, own)
    assert (blank - own).abs().max() > 0.1


# --- heads in fp32


def heads(kind: str) -> tuple[nn.Module, nn.Linear]:
    """A model whose head is wrapped as its kind says, and the linear layer itself."""
    model = scorer("llama")
    if kind == "modules_to_save":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
        return model, scalar_head(model).modules_to_save["default"]
    return model, model.score


@pytest.mark.parametrize("kind", ["plain", "modules_to_save"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_values_are_fp32_under_autocast_and_with_bf16_weights(kind, weights, states):
    """Products of what is there, in full: V around 3 moves by less than 1/64."""
    model, linear = heads(kind)
    model.to(weights)
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).to(states)
    expected = hidden.double() @ linear.weight.double().T
    with torch.autocast("cpu", torch.bfloat16):
        found = values_of(model, hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.squeeze(-1), rtol=1e-5, atol=1e-5)
    assert (found - found.bfloat16().float()).abs().max() > 1e-3  # bf16 would have rounded
    found.sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("kind", ["plain", "modules_to_save"])
def test_a_reward_model_computes_its_head_in_fp32_too(kind, tokenizer):
    """The backbone is under autocast and in bf16, the head on its last states is not."""
    model, linear = heads(kind)
    model.bfloat16()
    with torch.no_grad():
        linear.weight.mul_(20)  # scores large enough for bf16 to be coarse
    states: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = RewardModel(model, tokenizer)(rows(1))
    (of_row,) = states[-1]  # one row, read at its last token
    expected = of_row[-1].double() @ linear.weight[0].double()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert found != torch.tensor(found).bfloat16().item()
    assert "forward" not in vars(scalar_head(model))  # the model is left as it was


def test_a_head_follows_its_bases_device_and_not_its_precision(tiny_model, batch):
    """A LoRA critic on a base in bf16: values and gradients."""
    policy = get_peft_model(tiny_model().bfloat16(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    role = SharedBase(policy).new_critic("value_model").requires_grad_(True)
    assert role.score.weight.dtype == torch.float32
    nn.init.ones_(role.score.weight)
    values = token_values(role, batch(260))
    assert values.dtype == torch.float32
    values.sum().backward()
    assert role.score.weight.grad.abs().sum() > 0


def test_where_a_classifier_reads_its_head():
    tokens = torch.tensor([[5, 6, 2, 0, 0], [5, 2, 6, 2, 2], [2, 2, 2, 2, 2]])
    attention = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert last_scored(tokens, attention, 0).tolist() == [2, 4, 4]
    assert last_scored(tokens, attention, 2).tolist() == [1, 2, 0]
    assert last_scored(tokens, attention, None).tolist() == [2, 4, 4]
