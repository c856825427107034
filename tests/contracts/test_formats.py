"""Data sets to token ids: nothing is cut, nothing is lost without a count, and errors say where."""

import gzip
import json
import logging
import lzma

import pytest
from datasets import Dataset

from rto.data.chat import completion_ids, completion_texts, prompt_ids
from rto.data.formats import DataError, load_rows, read_pairs, read_prompts


def user(text):
    return {"role": "user", "content": text}


def agent(text):
    return {"role": "assistant", "content": text}


def text_of(pair, tokenizer):
    """(prompt, chosen, rejected) back as text, special tokens included."""
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))


# --- Formats


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(
            {"prompt": "Q: hi\nA:", "chosen": " yes", "rejected": " no"},
            ("Q: hi\nA:", " yes<eos>", " no<eos>"),
            id="standard, explicit prompt",
        ),
        pytest.param(
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            ("The sky is", " blue.<eos>", " green.<eos>"),
            id="standard, implicit prompt",
        ),
        pytest.param(
            {"prompt": [user("hi")], "chosen": [agent("yes")], "rejected": [agent("no")]},
            ("<user>hi<eos><assistant>", "yes<eos>", "no<eos>"),
            id="conversational, explicit prompt",
        ),
        pytest.param(
            {"chosen": [user("hi"), agent("yes")], "rejected": [user("hi"), agent("no")]},
            ("<user>hi<eos><assistant>", "yes<eos>", "no<eos>"),
            id="conversational, implicit prompt",
        ),
        pytest.param(
            {"prompt": "p", "chosen": " yes<eos>", "rejected": " no"},
            ("p", " yes<eos>", " no<eos>"),
            id="an EOS that is there already",
        ),
        pytest.param(
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            ("a", "b<eos>", "c<eos>"),
            id="a merge across the cut",
        ),
    ],
)
def test_pairs_in_every_format(tokenizer, row, expected):
    pairs, skipped = read_pairs(Dataset.from_list([row]), tokenizer, max_length=100)
    assert text_of(pairs[0], tokenizer) == expected
    assert pairs[0].prompt == tokenizer(expected[0], add_special_tokens=False).input_ids
    assert skipped.total == 1
    assert not skipped.counts


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " green and"},
        {"chosen": "The sky is blue", "rejected": "The sky is green and"},
    ],
    ids=["explicit prompt", "implicit prompt"],
)
def test_a_completion_that_was_cut_off_gets_no_eos(tokenizer, row):
    """Nobody wrote it; a DPO model that learned it there would reward stopping in mid-sentence."""
    row = row | {"chosen_ended": True, "rejected_ended": False}
    (pair,), _ = read_pairs(Dataset.from_list([row]), tokenizer, max_length=100)
    assert text_of(pair, tokenizer) == ("The sky is", " blue<eos>", " green and")


def test_prompts_in_either_format_keep_their_columns(tokenizer):
    prompts, _ = read_prompts(Dataset.from_list([{"prompt": "hi ab", "gold": 3}]), tokenizer, max_length=50)
    assert prompts[0].ids == tokenizer("hi ab").input_ids
    assert prompts[0].raw == "hi ab"
    assert prompts[0].columns == {"gold": 3}
    chat = [user("hi"), agent("so?"), user("ab")]
    prompts, _ = read_prompts(Dataset.from_list([{"prompt": chat}]), tokenizer, max_length=50)
    assert tokenizer.decode(prompts[0].ids) == "<user>hi<eos><assistant>so?<eos><user>ab<eos><assistant>"
    assert prompts[0].raw == chat


def test_a_prompt_is_the_same_for_pairs_and_for_rollouts(tokenizer, stories):
    """Else the DPO model would judge states that the policy never sees; also where BOS is added."""
    from transformers import AutoTokenizer

    for tok in (tokenizer, AutoTokenizer.from_pretrained(stories)):
        ids, completion = completion_ids("Once upon a", " time", tok)
        assert ids == prompt_ids("Once upon a", tok)
        assert completion[-1] == tok.eos_token_id
        assert completion.count(tok.eos_token_id) == 1
        assert tok.bos_token_id not in completion


# --- Rows that cannot be used


def test_what_cannot_be_learned_from_is_counted_with_its_first_row(tokenizer, caplog):
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "chosen": "", "rejected": "bad"},
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "x" * 60, "rejected": "bad"},
        {"prompt": "p", "chosen": "good", "rejected": "  \n"},
        {"prompt": "p", "chosen": "good", "rejected": "good<eos>"},
        {"prompt": "p", "chosen": "fine", "rejected": "y" * 60},
    ]
    with caplog.at_level(logging.WARNING, logger="rto.data.formats"):
        pairs, skipped = read_pairs(Dataset.from_list(rows), tokenizer, max_length=40, what="my_data")
    assert [text_of(p, tokenizer)[1] for p in pairs] == ["good<eos>"]
    assert skipped.total == 7
    assert skipped.counts == {
        "with an empty side": 2,
        "with two equal sides": 1,
        "over 40 tokens": 2,
        "with sides that are equal as tokens": 1,
    }
    assert skipped.first == {
        "with an empty side": 1,
        "with two equal sides": 2,
        "over 40 tokens": 3,
        "with sides that are equal as tokens": 5,
    }
    message = caplog.messages[-1]
    assert "my_data: 6 of 7 rows left out" in message
    assert "2 with an empty side (first: row 1)" in message


def test_conversations_with_an_empty_answer_are_left_out(tokenizer):
    rows = [
        {"prompt": [user("hi")], "chosen": [agent("yes")], "rejected": [agent(" ")]},
        {"prompt": [user("hi")], "chosen": [agent("yes")], "rejected": [agent("no")]},
    ]
    pairs, skipped = read_pairs(Dataset.from_list(rows), tokenizer, max_length=100)
    assert len(pairs) == 1
    assert skipped.counts == {"with an empty side": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "chosen": "yes", "rejected": "no"},
        {"chosen": "yes", "rejected": "no"},
        {"chosen": [agent("yes")], "rejected": [agent("no")]},
    ],
    ids=["explicit", "implicit", "conversational"],
)
def test_pairs_without_a_prompt_are_left_out(tokenizer, row):
    """No token predicts the first one of a completion without a prompt: found now, not in the middle of training."""
    with pytest.raises(DataError, match="2 of 2 rows left out: 2 with an empty prompt"):
        read_pairs(Dataset.from_list([row, row]), tokenizer, max_length=100)


@pytest.mark.parametrize("room", [-1, 0])
def test_a_length_that_just_fits_is_kept_and_one_more_is_dropped(tokenizer, room):
    row = {"prompt": "12345", "chosen": "123", "rejected": "1"}  # 5 + 3 + EOS
    data = Dataset.from_list([row, {"prompt": "1", "chosen": "2", "rejected": "3"}])
    pairs, _ = read_pairs(data, tokenizer, max_length=9 + room)
    assert len(pairs) == 2 + room
    prompts, _ = read_prompts(data, tokenizer, max_length=5 + room)
    assert len(prompts) == 2 + room


def test_a_long_prompt_is_dropped_not_cut(tokenizer):
    data = Dataset.from_list([{"prompt": "short"}, {"prompt": "x" * 50}, {"prompt": ""}, {"prompt": "also short"}])
    prompts, skipped = read_prompts(data, tokenizer, max_length=20)
    assert [p.raw for p in prompts] == ["short", "also short"]
    assert [len(p.ids) for p in prompts] == [5, 10]
    assert skipped.first == {"with a prompt over 20 tokens": 1, "with an empty prompt": 2}


def test_nothing_left_says_why_and_what_to_do(tokenizer):
    with pytest.raises(
        DataError, match=r"2 of 2 rows left out: 2 with a prompt over 3 tokens .* raise max_prompt_length"
    ):
        read_prompts(Dataset.from_list([{"prompt": "long text"}] * 2), tokenizer, max_length=3)
    with pytest.raises(DataError, match="two different, non-empty completions"):
        read_pairs(Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "a"}]), tokenizer, max_length=9)


@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_column_is_named_with_those_that_are_there(tokenizer, stream):
    data = Dataset.from_list([{"question": "q", "chosen": "a", "bad": "b"}])
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(DataError, match=r"eval_dataset has no column 'rejected'; it has 'question', 'chosen', 'bad'"):
        read_pairs(data, tokenizer, max_length=10, what="eval_dataset")
    with pytest.raises(DataError, match="has no column 'prompt'"):
        read_prompts(data, tokenizer, max_length=10)


# --- Files

ROWS = [
    {"prompt": "a\u2028b", "chosen": "x\u2029y", "rejected": "z\x85"},
    {"prompt": "c", "chosen": "d", "rejected": "é"},
]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("data.jsonl", lambda path, raw: path.write_bytes(raw)),
        ("data.jsonl.gz", lambda path, raw: path.write_bytes(gzip.compress(raw))),
        ("data.jsonl.xz", lambda path, raw: path.write_bytes(lzma.compress(raw))),
        ("my.data.v2.json", lambda path, raw: path.write_bytes(raw)),
    ],
)
def test_files_load_with_every_character(tmp_path, name, write):
    """U+2028 and its like are text, not line ends."""
    write(tmp_path / name, lines(ROWS))
    assert load_rows(tmp_path / name).to_list() == ROWS


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        load_rows(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("content", [b'{"prompt": "a"}\n{"prompt": \n', b"not json at all", b""])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jsonl: cannot be read"):
        load_rows(path)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_folder(name: str) -> None:
    with pytest.raises(DataError, match="an empty name: give --dataset_name"):
        load_rows(name)


def test_real_preference_pairs(data_dir, stories):
    """Each human pair is read or counted, and no completion is cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    data = load_rows(data_dir / "prefs" / "hh_harmless_pairs_test.jsonl.gz")
    assert len(data) == 312
    pairs, skipped = read_pairs(data, tokenizer, max_length=512)
    assert len(pairs) + sum(skipped.counts.values()) == 312
    assert len(pairs) > 200
    for pair in pairs:
        assert pair.prompt[0] == tokenizer.bos_token_id
        assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 512
    first = next(row for row in data if len(tokenizer(row["prompt"] + row["chosen"]).input_ids) < 300)
    decoded = {tokenizer.decode(p.prompt + p.chosen[:-1], skip_special_tokens=True) for p in pairs}
    assert first["prompt"] + first["chosen"] in decoded


def test_a_conversation_that_was_cut_off_gets_no_end_of_turn(tokenizer):
    row = {"prompt": [user("hi")], "chosen": [agent("yes")], "rejected": [agent("no")], "rejected_ended": False}
    (pair,), _ = read_pairs(Dataset.from_list([row]), tokenizer, max_length=100)
    assert tokenizer.decode(pair.chosen) == "yes<eos>"
    assert tokenizer.decode(pair.rejected) == "no"


def test_what_is_left_out_is_told_once(tokenizer, caplog):
    rows = [{"prompt": "p", "chosen": "yes", "rejected": side} for side in ("no", "", "x" * 50)]
    read_pairs(Dataset.from_list(rows), tokenizer, max_length=20)
    assert len(caplog.messages) == 1
    assert "2 of 3 rows left out" in caplog.messages[0]


def test_completions_keep_the_space_before_their_first_word(stories):
    """stories260K's tokenizer drops it when a completion is decoded by itself; special tokens add nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = 'Once upon a time there was a café, "Lily" said.'
    ids = tokenizer(text).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    cuts = [i for i in range(1, len(ids)) if not tokenizer.decode(ids[:i]).endswith("\ufffd")]
    prompts, rest = [ids[:i] for i in cuts], [[*ids[i:], tokenizer.eos_token_id] for i in cuts]
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    assert [x + y for x, y in zip(before, completion_texts(tokenizer, prompts, rest))] == [whole] * len(cuts)
    alone = tokenizer.batch_decode(rest, skip_special_tokens=True)
    assert sum(x + y != whole for x, y in zip(before, alone)) > 5
