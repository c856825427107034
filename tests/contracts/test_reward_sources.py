"""Scores from functions and models, and the token reward: who is given what, and what is done with the answer."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rto.models.actor import score_logprobs
from rto.rollout.rewards import Completed, FunctionReward, RewardModel, reward_source
from rto.rollout.token_rewards import (
    TOKEN_REWARDS,
    Ensemble,
    MeanLogProb,
    PowerDifference,
    QValue,
    TokenFunction,
    TokenReward,
    token_source,
)

PROMPTS = ["Say hello.", "ab", "Tell me a story about a dog."]
COMPLETIONS = [" Hello!", " b", " Once there was a dog"]


def completed(n: int = 3, **kwargs) -> Completed:
    settings = {
        "prompts": PROMPTS[:n],
        "completions": COMPLETIONS[:n],
        "completion_ids": [[9], [8, 7], [6]][:n],
        "ended": [True, False, True][:n],
    }
    return Completed(**settings | kwargs)


# --- Python functions


def test_a_function_is_given_what_its_signature_asks_for():
    seen = {}

    def few(completions, answer):
        seen.update(completions=completions, answer=answer)
        return [1.0, 2, True]

    batch = completed(columns={"answer": ["a", "b", "c"], "unused": [1, 2, 3]})
    assert FunctionReward(few)(batch) == [1.0, 2.0, 1.0]
    assert seen == {"completions": COMPLETIONS, "answer": ["a", "b", "c"]}


def test_a_function_with_kwargs_is_given_everything():
    seen = {}

    def everything(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    FunctionReward(everything)(completed(columns={"answer": ["a", "b", "c"]}))
    assert seen == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": [[9], [8, 7], [6]],
        "answer": ["a", "b", "c"],
    }


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_scores_names_the_function(count):
    def counts_badly(completions):
        return [0.0] * count

    with pytest.raises(ValueError, match=f"reward function counts_badly returned {count} scores for 3 completions"):
        FunctionReward(counts_badly)(completed())


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_names_function_and_completion(score):
    def strange(completions):
        return [0.0, score, 1.0]

    with pytest.raises(ValueError, match=rf"strange returned {score} for completion 1 \(' b'\)"):
        FunctionReward(strange)(completed())


def test_an_object_with_call_is_a_function_named_by_its_class():
    class Judge:
        def __call__(self, completions):
            return []

    reward = reward_source(Judge(), max_tokens=100)
    assert isinstance(reward, FunctionReward)
    with pytest.raises(ValueError, match="reward function Judge returned 0 scores"):
        reward(completed())


# --- Reward models


@pytest.fixture(scope="module")
def reward_tokenizer():
    """Words to ids: another family than the policy's bytes."""
    words = sorted({w for t in PROMPTS + COMPLETIONS for w in t.replace("!", " !").replace(".", " .").split()})
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *words])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="module")
def reward_model(reward_tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = LlamaConfig(
            vocab_size=len(reward_tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.4,
            pad_token_id=reward_tokenizer.pad_token_id,
            num_labels=1,
        )
        return LlamaForSequenceClassification(config).eval()


def own_score(model, tokenizer, text):
    """transformers' own pooled logit of one unpadded text."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


@pytest.mark.parametrize("max_tokens", [1, 20, 2**14])
def test_a_reward_model_scores_the_last_token_of_the_text(reward_model, reward_tokenizer, max_tokens):
    """EOS in the reward model's own spelling, only where one was sampled; padding changes nothing."""
    ours = RewardModel(reward_model, reward_tokenizer, max_tokens=max_tokens)(completed())
    texts = [x + y + ("<end>" if e else "") for x, y, e in zip(PROMPTS, COMPLETIONS, completed().ended)]
    expected = [own_score(reward_model, reward_tokenizer, text) for text in texts]
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(s, 3) for s in ours}) == 3
    without = [own_score(reward_model, reward_tokenizer, x + y) for x, y in zip(PROMPTS, COMPLETIONS)]
    assert abs(without[0] - ours[0]) > 1e-3  # EOS is seen


def test_a_reward_model_whose_pad_is_its_eos(reward_model, reward_tokenizer):
    """Told by id, the last token would be the one before EOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=reward_tokenizer.backend_tokenizer, pad_token="<end>", eos_token="<end>", unk_token="<unk>"
    )
    assert RewardModel(reward_model, tokenizer)(completed()) == pytest.approx(
        RewardModel(reward_model, reward_tokenizer)(completed()), rel=1e-4, abs=1e-5
    )


def test_a_reward_model_is_only_read(reward_model, reward_tokenizer):
    model = AutoModelForSequenceClassification.from_config(reward_model.config).train()
    source = reward_source(model, reward_tokenizer, max_tokens=100)
    assert not source.model.training
    assert not any(p.requires_grad for p in source.model.parameters())


def test_a_folder_brings_model_and_tokenizer(reward_model, reward_tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path / "judge")
    reward_tokenizer.save_pretrained(tmp_path / "judge")
    source = reward_source(str(tmp_path / "judge"), max_tokens=100)
    assert source.name == "judge"
    assert source(completed()) == pytest.approx(RewardModel(reward_model, reward_tokenizer)(completed()), rel=1e-5)


def test_conversations_go_through_the_reward_models_own_template(tiny_model, tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(
            LlamaConfig(**tiny_model().config.to_dict() | {"num_labels": 1, "initializer_range": 0.4})
        ).eval()
    batch = completed(
        n=2,
        prompts=[[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ab"}]],
        completions=[[{"role": "assistant", "content": "hello"}], [{"role": "assistant", "content": "b"}]],
        ended=[True, True],
    )
    texts = ["<user>hi<eos><assistant>hello<eos>", "<user>ab<eos><assistant>b<eos>"]
    expected = [own_score(model, tokenizer, text) for text in texts]
    assert RewardModel(model, tokenizer)(batch) == pytest.approx(expected, rel=1e-4)


def test_a_live_model_needs_its_tokenizer(reward_model):
    model = LlamaForSequenceClassification(reward_model.config)
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="needs its tokenizer: pass reward_processing_classes"):
        reward_source(model, max_tokens=100)


# --- The token reward


@pytest.fixture
def dpo_models(tiny_model):
    return tiny_model(seed=1), tiny_model(seed=2), tiny_model(seed=3)


def own_logratio(dpo, ref, prompt, response, temperature):
    """Σ-free: one number a token, by ``logits`` of the unpadded row."""
    ids = torch.tensor([[*prompt, *response]])
    rows = []
    with torch.no_grad():
        for model in (dpo, ref):
            logp = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
            rows.append(logp[torch.arange(len(prompt) - 1, ids.shape[1] - 1), torch.tensor(response)])
    return (rows[0] - rows[1]).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_token_reward_is_the_log_ratio_of_dpo_model_and_its_reference(dpo_models, ragged, batch, temperature):
    dpo, ref, other = dpo_models
    vocab = dpo.config.vocab_size
    x = batch(vocab, left=2, right=2)
    expected = [own_logratio(dpo, ref, p, y, temperature) for p, y in zip(*ragged(vocab))]
    own = TokenReward(dpo, ref, temperature=temperature, max_tokens=40)
    trainers = TokenReward(dpo, temperature=temperature, max_tokens=40)
    ref_logp = score_logprobs(ref, x, temperature=temperature, max_tokens=40)
    others = score_logprobs(other, x, temperature=temperature, max_tokens=40)
    for logratio in (own(x), own(x, ref_logp=others), trainers(x, ref_logp=ref_logp)):  # a reference of its own wins
        for row, y in zip(logratio, expected):
            assert row[: len(y)].tolist() == pytest.approx(y, abs=1e-4)
            assert (row[len(y) :] == 0).all()


def test_a_token_reward_without_any_reference_is_an_error(dpo_models, batch):
    with pytest.raises(ValueError, match="needs the reference's log-probabilities or a reference model"):
        TokenReward(dpo_models[0])(batch(dpo_models[0].config.vocab_size))


def test_a_model_has_no_advantage_over_itself(tiny_folder, batch):
    reward = TokenReward(str(tiny_folder), str(tiny_folder))
    x = batch(AutoModelForCausalLM.from_pretrained(tiny_folder).config.vocab_size)
    assert (reward(x) == 0).all()
    assert all(not p.requires_grad for m in (reward.dpo_model, reward.ref_model) for p in m.parameters())
    assert isinstance(reward.dpo_model, nn.Module)


# --- other sources of token rewards


def test_simpos_reward_needs_no_reference_and_adds_up_to_the_mean_log_probability(dpo_models, ragged, batch):
    model = dpo_models[0]
    x = batch(model.config.vocab_size, left=1, right=3)
    reward = MeanLogProb(model, max_tokens=40)(x)
    for row, prompt, y in zip(reward, *ragged(model.config.vocab_size)):
        ids = torch.tensor([[*prompt, *y]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            expected = -model(input_ids=ids, labels=labels).loss.item()
        assert row.sum().item() == pytest.approx(expected, rel=1e-4)
        assert (row[len(y) :] == 0).all()


@pytest.mark.parametrize("power", [0.5, 1.0, 5.0])
def test_the_power_transform_is_bounded_and_has_the_log_ratios_sign(dpo_models, ragged, batch, power):
    dpo, ref, _ = dpo_models
    x = batch(dpo.config.vocab_size, left=2, right=2)
    found = PowerDifference(dpo, ref, power=power, max_tokens=40)(x)
    for row, p, y in zip(found, *ragged(dpo.config.vocab_size)):
        ids = torch.tensor([[*p, *y]])
        with torch.no_grad():
            own, theirs = (
                m(input_ids=ids).logits[0].double().softmax(-1)[torch.arange(len(p) - 1, ids.shape[1] - 1), y]
                for m in (dpo, ref)
            )
        expected = ((own**power - theirs**power) / power).tolist()
        assert row[: len(y)].tolist() == pytest.approx(expected, abs=1e-5)
        assert (row[len(y) :] == 0).all()
    assert found.abs().max() <= 1 / power
    ratio = TokenReward(dpo, ref, max_tokens=40)(x)
    assert (found.sign() == ratio.sign()).all()
    limit = PowerDifference(dpo, ref, power=1e-4, max_tokens=40)(x)
    torch.testing.assert_close(limit, ratio, rtol=2e-2, atol=2e-3)  # differences of numbers near 1, in fp32
    with pytest.raises(ValueError, match="power must be a positive number"):
        PowerDifference(dpo, ref, power=0.0)


def test_a_q_value_is_the_head_on_the_state_after_each_token(tiny_folder, batch, ragged):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    found = QValue(model, max_tokens=40)(batch(model.config.vocab_size, left=1, right=2))
    for row, p, y in zip(found, *ragged(model.config.vocab_size)):
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([[*p, *y]])).last_hidden_state[0]
        assert row[: len(y)].tolist() == pytest.approx(model.score(states)[len(p) :, 0].tolist(), abs=1e-4)
        assert (row[len(y) :] == 0).all()
    with pytest.raises(ValueError, match="no trained scalar head"):
        QValue(str(tiny_folder))


def test_every_kind_of_token_reward_says_what_it_reads():
    for kind in TOKEN_REWARDS.values():
        assert {type(x) for x in (kind.compares, kind.scalar, kind.settings)} == {bool, tuple}
        assert not (kind.compares and kind.scalar)


class Fixed:
    """A source that always says the same."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def to(self, device):
        return self

    def __call__(self, sequences, *, ref_logp=None, completed=None):
        return self.value


def test_an_ensemble_is_the_mean_less_kappa_deviations(batch):
    """Members 1, 2, 6: mean 3, deviation √(14/3)."""
    members = [Fixed(torch.full((6, 12), float(x))) for x in (1, 2, 6)]
    x = batch(97)
    assert Ensemble(members)(x).unique().tolist() == pytest.approx([3.0])
    low = Ensemble(members, pessimism=0.5)(x).unique().tolist()
    assert low == pytest.approx([3 - 0.5 * (14 / 3) ** 0.5])
    assert (Ensemble(members[:1] * 3, pessimism=2.0)(x) == 1).all()  # who agree are believed


@pytest.mark.parametrize(
    ("members", "pessimism", "message"),
    [
        ([], 0.0, "needs members"),
        ([Fixed(torch.zeros(1, 1))], 1.0, "give more than one token reward"),
        ([Fixed(torch.zeros(1, 1))] * 2, -1.0, "must not be negative"),
    ],
)
def test_an_ensemble_that_makes_no_sense(members, pessimism, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(members, pessimism=pessimism)


def written(ids: list[list[int]], **columns) -> Completed:
    texts = [str(row) for row in ids]
    return Completed(
        prompts=["p"] * len(ids), completions=texts, completion_ids=ids, ended=[True] * len(ids), columns=columns
    )


def test_a_function_rewards_each_token(ragged, batch):
    _, responses = ragged(97)

    def token_ids_times_weight(completion_ids, weight):
        return [[w * token for token in ids] for ids, w in zip(completion_ids, weight)]

    x = batch(97, right=2)
    weight = list(range(len(responses)))
    reward = TokenFunction(token_ids_times_weight)(x, completed=written(responses, weight=weight, other=weight))
    expected = torch.where(x.mask, x.responses, 0) * torch.tensor(weight)[:, None]
    assert torch.equal(reward, expected.float())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completion_ids: [[0.0]], "returned 1 lists for 6 completions"),
        (
            lambda completion_ids: [[0.0] * (len(y) + (i == 3)) for i, y in enumerate(completion_ids)],
            "of completion 3",
        ),
        (lambda completion_ids: [[float("nan")] * len(y) for y in completion_ids], "one finite number for each"),
    ],
)
def test_what_a_function_must_return(ragged, batch, function, message):
    with pytest.raises(ValueError, match=message):
        TokenFunction(function)(batch(97), completed=written(ragged(97)[1]))


def test_what_the_user_names_becomes_a_source(dpo_models, tiny_folder, batch):
    dpo, ref, other = dpo_models
    x = batch(dpo.config.vocab_size)
    one = token_source([dpo], ref)
    assert isinstance(one, TokenReward)
    assert isinstance(token_source([str(tiny_folder)], kind="mean_logprob"), MeanLogProb)
    assert isinstance(token_source([lambda completion_ids: []]), TokenFunction)
    assert token_source([one]) is one
    both = token_source([dpo, other], ref, pessimism=1.0, max_tokens=40)
    a, b = one(x), TokenReward(other, ref)(x)
    torch.testing.assert_close(both(x), torch.minimum(a, b), rtol=1e-4, atol=1e-5)  # of two: mean − |a − b|/2
    assert both.to("cpu") is both
