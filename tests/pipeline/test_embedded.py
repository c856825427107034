import os
import random
import statistics
import subprocess
import sys

import pytest
import torch

from rto.demo import embedded
from rto.demo.embedded import (
    best_reply,
    build_model,
    build_tokenizer,
    demonstrations,
    gold,
    gold_reward,
    gold_spans,
    prompts,
    reply,
)
from rto.recipe import resolve

# Everything below is written by hand: the facts are a kettle and a damage.
PROMPT = "Customer: Hello, the blue kettle I bought last week arrived with a crack in it. What can you do?\nAgent:"
LATE = "Customer: Hi, the red lamp I bought on Friday is very late. Please help me.\nAgent:"
OPENING = " I am very sorry to hear about the problem with the kettle."
ISSUE = " It should never have arrived damaged."
ACTION = " I will send you a new one within two days."
EASE = " You do not need to send anything back."
UPDATE = " You will get an email with all the details."
CLOSING = " Thank you for your patience and have a nice day."
BEST = OPENING + ISSUE + ACTION + EASE + UPDATE + CLOSING
NEUTRAL = (
    " I have found your order in our list today. We have put a note on your order."
    " Our shop is open from Monday to Friday. This message was sent by the shop team."
)


@pytest.fixture(scope="module")
def corpus():
    return demonstrations(1000, seed=0)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return build_tokenizer(row["prompt"] + row["completion"] for row in corpus)


# --- Gold, case by case ---


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (BEST, 5.0),  # .5 sorry + .8 item + .7 issue + 1. action + .5 time + .5 ease + .5 update + .5 closing
        (OPENING + ISSUE + ACTION + CLOSING, 4.0),  # four sentences are enough
        (OPENING + ISSUE + ACTION, 3.0),  # three are one short: 3.5 − .5
        (NEUTRAL, 0.0),
        ("", -2.0),  # four sentences short
        ("  \n\t ", -2.0),
        ("asdf asdf", -2.5),  # garbled and four short
        (". . . . . . . .", -2.5),  # a run of garbage costs once
        ("<eos><pad>\x00\ufffd é 漢字 (((*+?[", -2.5),
        (BEST + " And", 4.5),  # a truncated sentence is garbled
        (BEST.removesuffix("nice day."), 4.0),  # the closing is cut off: no credit, and garbled
        (" What" + BEST, 4.5 - 1.3),  # what is glued to garbage is garbage: the opening is lost
        (BEST.removesuffix(".") + "!", 4.0),
        (BEST.replace(ACTION, " Um. Ah." + ACTION) + " Um.", 4.0),  # two runs of garbage
        (BEST + CLOSING, 4.6),  # the same again
        (BEST + " Please write to us again if you need more help.", 4.6),  # the same in other words
        (NEUTRAL + OPENING, -0.4),  # an apology after the closing earns nothing
        (" I am so sorry to hear about the problem with the lamp." + NEUTRAL, 0.5 - 0.6),
        (" Please accept our apologies for the trouble with the kettle." + NEUTRAL, 0.5 + 0.8),
        (" Thank you for your message about the problem with the kettle." + NEUTRAL, 0.8),
        (" I do not see why you are upset about the kettle." + NEUTRAL, -0.6 + 0.8),
        (" I am very sorry to hear about the problem with the kettle and the lamp." + NEUTRAL, -0.5),
        (
            " I can see that it has taken so long. I will give you a full refund by Friday.",
            -0.6 + 1.0 + 0.5 - 1.0,
        ),
        (" I can see that you did not take care of it. I will return the second payment by Friday.", -1.9),
        (
            " I will send you a new one at some point. You need to pay a fee before we do this.",
            0.5 - 0.5 - 1.0,
        ),
        (
            " I will see what we can do when we have time. You will love our new bags at half price.",
            -0.5 - 0.6 - 1.0,
        ),
        (
            NEUTRAL.replace("This message was sent by the shop team", "Thank you for not asking us again about this"),
            -0.6,
        ),
        (NEUTRAL + " Please do not write to us again about this.", -0.4 - 0.6),  # out of place, still curt
    ],
)
def test_gold_of_handwritten_replies(completion, expected):
    assert gold(PROMPT, completion) == pytest.approx(expected, abs=1e-9)


def test_spans_mark_the_words_that_decide():
    completion = (
        " I am so sorry to hear about the problem with the lamp. I can see that it has arrived damaged."
        " I will give you a full refund at some point. You will love our new shoes at half price. Um. Blah "
    )
    marked = [(completion[s.start : s.end], s.label, s.value) for s in gold_spans(PROMPT, completion)]
    assert marked == [
        ("sorry", "apology", 0.5),
        ("lamp", "wrong item", -0.6),
        ("arrived damaged", "issue", 0.7),
        ("give you a full refund", "action", 1.0),
        ("at some point", "vague", -0.5),
        ("love our new shoes", "pitch", -0.6),
        ("Um. Blah", "garbled", -0.5),
    ]


def test_the_same_reply_is_judged_by_its_prompt():
    # For a late lamp the ideal reply about a broken kettle has the wrong item, issue and action.
    assert gold(LATE, BEST) == pytest.approx(5.0 - (0.8 + 0.6) - (0.7 + 0.6) - (1.0 + 0.6))
    fitting = " I will ask the courier to find it by Monday."
    assert gold(LATE, NEUTRAL.replace(" We", fitting + " We")) == pytest.approx(1.5)


def test_a_prompt_from_elsewhere_is_an_error():
    with pytest.raises(ValueError, match="not a prompt"):
        gold("Customer: Hello.\nAgent:", BEST)


def test_gold_reward_is_a_trl_reward_function():
    assert gold_reward(prompts=[PROMPT, LATE], completions=["", NEUTRAL], completion_ids=[[1], [2]]) == [
        -2.0,
        0.0,
    ]


# --- Gold under an optimiser ---


def test_best_reply_is_the_ceiling_and_within_reach_of_every_prompt():
    assert all(gold(prompt, best_reply(prompt)) == pytest.approx(5.0) for prompt in prompts(200, 3, "rl"))
    assert best_reply(PROMPT).count(".") == 6


@pytest.mark.parametrize(
    "attack",
    [
        BEST + BEST,
        BEST * 10,
        OPENING * 6,
        ACTION * 4,
        CLOSING + UPDATE + EASE + ACTION + ISSUE + OPENING,
        BEST.replace(".", ","),
        BEST.replace(" I ", " i "),
        BEST.replace("kettle", "kettle kettle"),
        BEST.replace("kettle", "kettle, the lamp, the chair"),
        BEST.replace(".", ".." * 5),
        BEST.replace("within two days", "within two days within two days"),
        " sorry apologies kettle arrived damaged send you a new one within two days your patience.",
        " sorry. kettle. arrived damaged. send you a new one. within two days. do not need to pay anything.",
        PROMPT + BEST,
        BEST + "\n" + PROMPT,
    ],
)
def test_attacks_do_not_beat_the_honest_reply(attack):
    assert gold(PROMPT, attack) <= gold(PROMPT, BEST) - 0.4


def test_no_edit_of_the_best_reply_improves_it():
    honest = [part + "." for part in BEST.split(".")[:-1]]
    rng = random.Random(0)
    others = {part + "." for _ in range(60) for part in reply(PROMPT, rng).split(".")[:-1]} | {
        " Um.",
        " kettle.",
    }
    edits = [honest[:i] + honest[i + 1 :] for i in range(6)]
    edits += [[*honest[:i], extra, *honest[i:]] for i in range(7) for extra in others]
    edits += [[*honest[:i], extra, *honest[i + 1 :]] for i in range(6) for extra in others]
    scores = [gold(PROMPT, "".join(edit)) for edit in edits]
    assert len(others) > 40
    assert max(scores) == pytest.approx(5.0)  # equal only for a synonym in its place
    assert all(score < 4.7 for score, edit in zip(scores, edits) if len(edit) != 6)


@pytest.mark.parametrize("seed", range(3))
def test_random_text_is_handled_and_never_good(seed, corpus):
    rng = random.Random(seed)
    words = [word for row in corpus[:50] for word in row["completion"].split()]
    for _ in range(100):
        soup = " ".join(rng.choices([*words, "\n", "  ", "..", "<eos>"], k=rng.randrange(60)))
        spans = gold_spans(PROMPT, soup)
        assert sum(span.value for span in spans) < 0
        assert all(0 <= span.start <= span.end <= len(soup) for span in spans)


# --- The corpus ---


def test_spans_lie_in_the_text_in_order_and_sum_to_gold(corpus):
    for row in corpus:
        spans = gold_spans(**row)
        assert all(span.value == embedded.CREDITS[span.label] for span in spans)  # written text only goes forward
        assert {span.label for span in spans}.isdisjoint({"garbled", "backward", "short"})
        edges = [edge for span in spans for edge in (span.start, span.end)]
        assert edges == sorted(edges)
        assert edges[-1] <= len(row["completion"])
        assert sum(span.value for span in spans) == gold(**row)


def test_corpus_statistics(corpus, tokenizer):
    scores = [gold(**row) for row in corpus]
    mean, std = statistics.mean(scores), statistics.pstdev(scores)
    assert 0.2 < mean < 0.6
    assert 1.3 < std < 1.6
    assert 2.8 < (5.0 - mean) / std < 4.0  # room above the starting policy
    lengths = sorted(len(ids) + 1 for ids in tokenizer([row["completion"] for row in corpus]).input_ids)
    assert lengths[20] >= 48
    assert lengths[-1] <= 80
    assert max(len(ids) for ids in tokenizer([row["prompt"] for row in corpus]).input_ids) <= 40
    assert sum(lengths) - len(lengths) < 1.3 * sum(len(row["completion"].split()) for row in corpus)


def test_demonstrations_are_in_trl_format(corpus):
    assert all(row.keys() == {"prompt", "completion"} for row in corpus)
    assert all(row["prompt"].endswith("\nAgent:") and row["completion"].startswith(" ") for row in corpus)
    assert all(4 <= row["completion"].count(".") <= 6 for row in corpus)


def test_splits_are_disjoint_and_prompts_distinct():
    drawn = [prompts(600, seed, split) for split in ("sft", "pairs", "rl", "test") for seed in (0, 1)]
    assert all(len(set(part)) == 600 for part in drawn)
    union = [set(drawn[i]) | set(drawn[i + 1]) for i in range(0, 8, 2)]
    assert len(set.union(*union)) == sum(map(len, union))
    with pytest.raises(ValueError, match="distinct prompts in split 'test'"):
        prompts(10**6, 0, "test")


def test_seeds_decide_everything_and_the_hash_seed_nothing():
    assert demonstrations(20, 7) == demonstrations(20, 7)
    assert prompts(20, 7, "rl") == prompts(30, 7, "rl")[:20]
    assert prompts(20, 7, "rl") != prompts(20, 8, "rl")
    code = "from rto.demo.embedded import demonstrations; print(demonstrations(20, 7))"
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert printed.stdout.strip() == str(demonstrations(20, 7))


# --- Tokenizer and model ---


def test_tokenizer_is_lossless_and_splits_at_the_prompt(corpus, tokenizer):
    strange = ["", " ", "\n\n\t x", "Ünïcödé 漢字 \U0001f600", "it 's ,  a . test", PROMPT]
    for text in [*strange, *(row["completion"] for row in corpus[:50])]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for row in corpus[:50]:
        apart = tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids
        assert apart == tokenizer(row["prompt"] + row["completion"]).input_ids


def test_tokenizer_is_deterministic_and_survives_saving(corpus, tokenizer, tmp_path):
    again = build_tokenizer(row["prompt"] + row["completion"] for row in corpus)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 768
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded(BEST).input_ids == tokenizer(BEST).input_ids
    assert (loaded.padding_side, loaded.eos_token_id) == ("left", tokenizer.eos_token_id)


def test_model_is_small_seeded_and_leaves_the_global_state(tokenizer):
    before = torch.get_rng_state()
    first, same, other = (build_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert 8e5 < first.num_parameters() < 1e6
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters()))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert first.config.eos_token_id == tokenizer.eos_token_id
    assert first.config.max_position_embeddings == 160
    with torch.no_grad():  # the untrained loss is about log V: nothing is mis-scaled
        ids = tokenizer(PROMPT + BEST, return_tensors="pt").input_ids
        assert first(input_ids=ids, labels=ids).loss == pytest.approx(torch.tensor(len(tokenizer)).log(), abs=1.0)


def test_recipes_may_call_the_task_by_its_old_name():
    for name in ("build", "demonstrations", "prompts", "gold_reward", "gold_credit"):
        assert resolve(f"rto.data.embedded:{name}") is resolve(f"rto.demo.embedded:{name}")
