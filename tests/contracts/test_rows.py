"""Any row is read, or left out with a reason that is counted, or refused in one line; so is any file."""

import csv
import gzip
import io
import json
import logging
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rto.data import formats
from rto.data.formats import (
    DataError,
    load_rows,
    read_demonstration,
    read_labelled,
    read_pairs,
    read_prompts,
    reason_of,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + '</s>' }}{% endfor %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "</s>"]
PROSE = "the cat sat on the mat. why is the sky blue? light scatters; boil an egg in water. don't, 3.14"


def tokenizer_of(template: str | None, eos: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [PROSE] * 9,
        trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    return fast


TOKENIZERS = {
    "text": tokenizer_of(None, "</s>"),
    "chatml": tokenizer_of(CHATML, "<|im_end|>"),
    "strict": tokenizer_of(STRICT, "</s>"),
}
PLAIN, CHAT, STERN = TOKENIZERS.values()


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def agent(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# --- what tools write


def pair(prompt: Any, chosen: Any, rejected: Any = "no") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


READ = [
    ("numbers", PLAIN, pair("2+2?", 4, 5), ("2+2?", "4</s>", "5</s>")),
    ("a number with a point", PLAIN, pair("x?", 0.5, "no"), ("x?", "0.5</s>", "no</s>")),
    ("a list of one text", PLAIN, pair(["x?"], ["yes"], ["no"]), ("x?", "yes</s>", "no</s>")),
    ("one message without a template", PLAIN, pair("x?", agent("yes"), "no"), ("x?", "yes</s>", "no</s>")),
    ("a null prompt beside a common start", PLAIN, pair(None, "so it is", "so not"), ("so", " it is</s>", " not</s>")),
    ("one message", CHAT, pair("x?", agent("yes"), agent("no")), ("x?", "yes", "no")),
    ("text beside messages", CHAT, pair([user("x?")], "yes", [agent("no")]), ("x?", "yes", "no")),
    ("ShareGPT", CHAT, pair([{"from": "human", "value": "x?"}], {"from": "gpt", "value": "yes"}), ("x?", "yes", "no")),
    ("ShareGPT, whole", CHAT, pair(None, [{"from": "human", "value": "x?"}, {"from": "gpt", "value": "yes"}],
                                   [user("x?"), agent("no")]), ("x?", "yes", "no")),
    ("both keys, one null", CHAT, pair([{"role": "user", "content": "x?", "from": None, "value": None}],
                                       [{"role": None, "content": None, "from": "gpt", "value": "yes"}]),
     ("x?", "yes", "no")),
    ("a prompt that repeats the start", CHAT, pair("x?", [user("x?"), agent("yes")], [user("x?"), agent("no")]),
     ("x?", "yes", "no")),
    ("sides that repeat the prompt", CHAT, pair([user("x?")], [user("x?"), agent("yes")], [user("x?"), agent("no")]),
     ("x?", "yes", "no")),
    ("messages as JSON text", CHAT, pair(json.dumps([user("x?")]), json.dumps([agent("yes")])), ("x?", "yes", "no")),
    ("parts of text", CHAT, pair([user([{"type": "text", "text": "x"}, {"type": "text", "text": "?"}])], "yes"),
     ("x?", "yes", "no")),
    ("a number in a message", CHAT, pair([user("x?")], [agent(4)], [agent(5)]), ("x?", "4", "5")),
]  # fmt: skip


@pytest.mark.parametrize(("tokenizer", "row", "expected"), [x[1:] for x in READ], ids=[x[0] for x in READ])
def test_is_read(tokenizer: Any, row: dict, expected: tuple[str, str, str]) -> None:
    """Against the tokenizer's own rendering of the conversation that is meant, or its own tokens of the text."""
    (found,), skipped = read_pairs([row], tokenizer, max_length=200)
    assert not skipped.counts
    prompt, chosen, rejected = expected
    if tokenizer is PLAIN:
        assert found.prompt == PLAIN(prompt).input_ids
        assert [PLAIN.decode(found.chosen), PLAIN.decode(found.rejected)] == [chosen, rejected]
        return
    for said, ids in ((chosen, found.chosen), (rejected, found.rejected)):
        whole = CHAT.apply_chat_template([user(prompt), agent(said)], tokenize=True, return_dict=False)
        assert found.prompt + ids == whole
    alone = CHAT.apply_chat_template([user(prompt)], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert found.prompt == alone


LEFT_OUT = [
    (PLAIN, pair("x?", True), "whose chosen is true or false where text is needed"),
    (PLAIN, pair("x?", {"a": 1}), "whose chosen has a message without a role"),
    (PLAIN, pair("x?", ["yes", "no"]), "whose chosen is a list that holds other things than messages"),
    (PLAIN, pair("x?", b"yes"), "whose chosen is of type bytes, not text"),
    (PLAIN, pair("x?", "y\ud800"), "whose chosen holds half a character (a lone surrogate)"),
    (PLAIN, pair("x?", float("nan")), "with an empty side"),
    (PLAIN, pair("x?", []), "with an empty side"),
    (PLAIN, pair(" \n", "yes"), "with an empty prompt"),
    (PLAIN, pair([user("x?")], "yes"), "because conversations need a chat template"),
    (CHAT, pair([user(None)], "yes"), "whose prompt has a message without content"),
    (CHAT, pair([{"content": "x?"}], "yes"), "whose prompt has a message without a role"),
    (CHAT, pair([user("x?")], [agent(None)]), "with an empty side"),
    (CHAT, pair([user("x?")], [user("yes")], [user("no")]), "whose chosen is no answer of the assistant"),
    (CHAT, pair("x?", [user("x?"), agent("")], [user("x?"), agent("no")]), "with an empty side"),
    (CHAT, pair([user([{"type": "image"}])], "yes"), "whose prompt has a message that holds more than text"),
    (CHAT, pair(None, [agent("yes")], "no"), "with text beside messages and no prompt"),
    (CHAT, pair([user("x?")], [agent("yes")]) | {"tools": "{"}, "because tools is text that is no JSON"),
    (CHAT, pair([user("x?")], [agent("yes")]) | {"chosen_ended": "perhaps"}, "with a chosen_ended that is neither"),
    (STERN, pair([{"role": "system", "content": "hi"}, user("x?")], "yes"), "System role not supported"),
]


@pytest.mark.parametrize(("tokenizer", "row", "reason"), LEFT_OUT, ids=[x[2] for x in LEFT_OUT])
def test_is_left_out(tokenizer: Any, row: dict, reason: str) -> None:
    good = pair("so", "yes", "no")
    found, skipped = read_pairs([good, row], tokenizer, max_length=200)
    assert [p.row for p in found] == [0]
    (words,) = skipped.counts
    assert reason in words
    assert skipped.first == {words: 1}


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, True), (0, False), (1.0, True), ("True", True), (" false", False), ("1", True), ("0.0", False)],
)
def test_labels_of_a_table_are_read(label: Any, expected: bool) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": x} for x in (label, not expected)]
    found, _ = read_labelled(rows, PLAIN, max_length=20)
    assert [row.desirable for row in found] == [expected, not expected]


def test_labels_that_say_nothing_are_counted() -> None:
    rows = [{"prompt": "p", "completion": "c", "label": x} for x in (True, False, None, "", "good", 2)]
    found, skipped = read_labelled(rows, PLAIN, max_length=20)
    assert len(found) == 2
    assert skipped.counts == {"without a label": 2, "with a label that is neither true nor false": 2}


def test_demonstrations_of_every_kind() -> None:
    said = [user("x?"), agent("yes")]
    whole = CHAT.apply_chat_template(said, tokenize=True, return_dict=False)
    shared = [{"from": "human", "value": "x?"}, {"from": "gpt", "value": "yes"}]
    for row in (
        {"messages": said},
        {"conversations": shared},
        {"messages": None, "conversations": shared},
        {"prompt": "x?", "completion": [agent("yes")]},
        {"prompt": [user("x?")], "completion": "yes"},
        {"prompt": None, "completion": said},
    ):
        prompt, ids = read_demonstration(row, CHAT)
        assert prompt + ids == whole
    prompt, ids = read_demonstration({"text": "the cat"}, PLAIN)
    assert (prompt, PLAIN.decode(ids)) == ([], "the cat</s>")
    for row in ({"messages": []}, {"text": " "}, {"other": 1}):
        with pytest.raises(DataError) as error:
            read_demonstration(row, CHAT)
        assert reason_of(error.value).startswith(("whose ", "without "))


def test_other_columns_pass_untouched() -> None:
    other = {"gold": [1, {"a": None}], "kind": b"x", "prompt": ["hi"]}
    (prompt,), _ = read_prompts([other], PLAIN, max_length=20)
    assert prompt.raw == "hi"
    assert prompt.columns == {"gold": [1, {"a": None}], "kind": b"x"}


def test_rows_without_some_column_have_none_there() -> None:
    """What reward functions are given is one list a column."""
    prompts, _ = read_prompts([{"prompt": "a", "gold": 1}, {"prompt": "b"}], PLAIN, max_length=20)
    assert [p.columns for p in prompts] == [{"gold": 1}, {"gold": None}]


# --- implied prompts


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("the cat sat", "the cap sat", "the"),
        ("the cat", "the dog", "the"),
        ("why? light", "why? egg", "why?"),
        ("A: yes", "A: no", "A:"),
        ("A:yes", "A:no", "A:"),
        ("A:\nyes", "A:\nno", "A:\n"),
        ("it is 3.14 long", "it is 3.15 long", "it is"),
        ("it is 12:30", "it is 12:45", "it is"),
        ("I don't", "I don'x", "I"),
        ("the sky, blue", "the sky", None),
        ("the sky is", "the sky, blue", "the sky"),
        ("the cat", "the cats and", None),
        ("catsat", "capsat", ""),
        ("天空是蓝的", "天空是绿的", "天空是"),
        ("the cafe\u0301", "the cafe", None),
        ("cafe\u0301 it", "cafe\u0300 it", ""),
    ],
)
def test_an_implied_prompt_cuts_no_word(chosen: str, rejected: str, prompt: str | None) -> None:
    """None: one side adds nothing to the other, so it is no answer; "": nothing but a part of a word is shared."""
    pairs, skipped = read_pairs([pair(None, chosen, rejected), pair("p", "a", "b")], PLAIN, max_length=99)
    if not prompt:
        assert skipped.counts == {"with an empty side" if prompt is None else "with an empty prompt": 1}
        return
    found = pairs[0]
    assert PLAIN.decode(found.prompt) == prompt
    assert found.prompt + found.chosen == PLAIN(chosen + "</s>").input_ids
    assert found.prompt + found.rejected == PLAIN(rejected + "</s>").input_ids


# --- files


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    raw = text.encode(encoding)
    path.write_bytes(gzip.compress(raw) if path.suffix.lower() == ".gz" else raw)
    return path


MIXED = [
    {"prompt": "4", "chosen": "4", "rejected": "None"},
    {"prompt": [user("x?")], "chosen": [agent("yes")], "rejected": [agent("no")], "gold": {"a": 1}},
    {"prompt": "2024-01-01", "chosen": 4, "rejected": True, "gold": [0.1, None]},
]
EVERY = [{"gold": None} | row for row in MIXED]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.b.Jsonl.GZ"])
@pytest.mark.parametrize("form", ["lines", "crlf", "bom", "blank lines", "list", "utf-16", "held"])
def test_json_files_give_their_values(tmp_path: Path, name: str, form: str) -> None:
    lines = [json.dumps(row) for row in MIXED]
    text = "\n".join(lines) + "\n"
    text = {
        "crlf": "\r\n".join(lines),
        "bom": "\ufeff" + text,
        "blank lines": "\n\n".join(lines) + "\n\n",
        "list": json.dumps(MIXED, indent=1),
        "utf-16": "\ufeff" + text,
        "held": json.dumps({"version": 1, "data": MIXED}),
    }.get(form, text)
    rows = load_rows(written(tmp_path / name, text, "utf-16-le" if form == "utf-16" else "utf-8"))
    assert [{k: row[k] for k in sorted(row)} for row in rows] == [{k: row[k] for k in sorted(row)} for row in EVERY]


def test_a_table_adds_no_keys_and_changes_no_number(tmp_path: Path) -> None:
    """Arrow would give each mapping the keys of all, and make 1 a 1.0 beside 2.5."""
    rows = [{"gold": {"a": 1}, "n": 1}, {"gold": {"b": [None]}, "n": 2.5}]
    loaded = load_rows(written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert repr(loaded.to_list()) == repr(rows)


CELLS = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "None"},
    {"prompt": "ag\u2028ent", "chosen": "007", "rejected": "N/A"},
    {"prompt": "a,b\tc", "chosen": "NA", "rejected": "nan"},
    {"prompt": 'two\nlines "x"', "chosen": "null", "rejected": "1e3"},
]


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_every_cell_of_a_table_is_text(tmp_path: Path, name: str, bom: str) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(CELLS[0]), delimiter="\t" if ".tsv" in name else ",")
    writer.writeheader()
    writer.writerows(CELLS)
    assert load_rows(written(tmp_path / name, bom + out.getvalue())).to_list() == CELLS


def test_a_long_cell_and_a_short_line(tmp_path: Path) -> None:
    long = "x" * 300_000
    rows = load_rows(written(tmp_path / "a.csv", f"prompt,gold\n{long},1\n\nshort\n")).to_list()
    assert rows == [{"prompt": long, "gold": "1"}, {"prompt": "short", "gold": None}]


BROKEN = [
    ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3 is no JSON: column 12: Expecting value"),
    ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2 is a list, not an object"),
    ("a.json", '[{"prompt": "a"},\n{"prompt": }]', "line 2"),
    ("a.json", '[{"prompt": "a"}, 3]', "row 1 is a number, not an object"),
    ("a.json", '"text"', "holds text, not rows"),
    ("a.jsonl", "[" * 100_000, "nested too deep"),
    ("a.csv", "prompt,chosen\na,b,c\n", "line 2 has 3 cells and the first line 2: put text that holds a comma in"),
    ("a.csv", 'prompt\n"a\n', "line 2"),
    ("a.csv", "prompt,prompt\na,b\n", "the column 'prompt' stands there twice"),
    ("a.csv", "prompt\n", "it has no rows"),
    ("a.json", "", "cannot be read"),
    ("a.txt", "hello", "its ending does not say its format"),
    ("a.parquet", "hello", "cannot be read"),
    ("a.jsonl.xz", "hello", "cannot be read"),
]


@pytest.mark.parametrize(("name", "text", "says"), BROKEN, ids=[f"{x[0]} {x[2]:.30}" for x in BROKEN])
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(DataError) as error:
        load_rows(written(tmp_path / name, text))
    assert str(tmp_path / name) in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_latin_1_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "prompt\nok\ncafé\n", "latin-1")
    with pytest.raises(DataError, match=r"line 3 is not utf-8 text .* save it as UTF-8"):
        load_rows(path)


@pytest.mark.parametrize(
    "path", ["nothing.jsonl", "./nothing", "/no/such/folder", "runs/a/b", "a.parquet", "owner/data"]
)
def test_what_is_not_there_is_told_in_one_line(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file") as error:
        load_rows(path)
    assert "\n" not in str(error.value)


def test_folders(tmp_path: Path) -> None:
    """What `save_to_disk` wrote, and files by split; the cells of their tables are text, too."""
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "several"))
    (tmp_path / "files").mkdir()
    written(tmp_path / "files" / "train.csv", "prompt\nNone\n007\n")
    written(tmp_path / "files" / "test.csv", "prompt\nNA\n")
    assert load_rows(tmp_path / "one").to_list() == load_rows(tmp_path / "several").to_list() == rows
    assert load_rows(tmp_path / "files").to_list() == [{"prompt": "None"}, {"prompt": "007"}]
    assert load_rows(tmp_path / "files", split="test").to_list() == [{"prompt": "NA"}]
    for folder, split in (("several", "test"), ("files", "validation")):
        with pytest.raises(DataError, match=split):
            load_rows(tmp_path / folder, split=split)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        load_rows(tmp_path / "empty")


def test_half_a_character_of_a_file_is_replaced(tmp_path: Path) -> None:
    rows = load_rows(written(tmp_path / "a.jsonl", '{"prompt": "a\\ud800b", "gold": ["\\udc00"]}'))
    assert rows.to_list() == [{"prompt": "a\ufffdb", "gold": ["\ufffd"]}]


def test_messages_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "my.csv", "prompt\n \n")
    with pytest.raises(DataError, match=rf"^train_dataset \({path}\): 1 of 1 rows left out: 1 with an empty prompt"):
        read_prompts(load_rows(path), PLAIN, max_length=9)
    with pytest.raises(DataError, match=rf"^train_dataset \({path}\) has no column 'chosen', 'rejected'"):
        read_pairs(load_rows(path).select([0]), PLAIN, max_length=9)


# --- streams and what is no data set


def test_a_stream_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"question": "no prompt in the first row"}
        for i in range(6):
            yield {"prompt": f"p{i}"}

    prompts, skipped = read_prompts(IterableDataset.from_generator(rows), PLAIN, max_length=9)
    assert (len(prompts), skipped.total) == (6, 7)
    monkeypatch.setattr(formats, "STREAM_ROWS", 6)
    with pytest.raises(DataError, match=r"a stream of more than 6 rows.* take\(n\)"):
        read_prompts(IterableDataset.from_generator(rows), PLAIN, max_length=9)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}), "is a dictionary of 'train', not a data set"),
        (["a", "b"], "row 0 is a str, not a dictionary of columns"),
        ([], "has no rows"),
    ],
)
def test_what_is_no_data_set_is_refused(data: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_prompts(data, PLAIN, max_length=9)


def test_a_report_stays_one_line_when_every_row_has_a_reason_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    rows = [pair([user("x?")], [agent("a"), {"role": f"r{i}", "content": "b"}, agent("c")]) for i in range(50)]
    with caplog.at_level(logging.WARNING):
        read_pairs([pair([user("a")], "b", "c"), *rows], STERN, max_length=99)
    (line,) = caplog.messages
    assert "\n" not in line
    assert len(line) < 4000
    assert "50 of 51 rows left out" in line


# --- generated rows

words = st.text(
    st.sampled_from(string.ascii_letters + " .\n\t'?é天\u2028\u200d\u0301😀\ud800\x00<|>"), max_size=12
) | (
    st.sampled_from(["", " ", "None", "the cat sat", "</s>", "<|im_end|>", "[{", '[{"role": "user", "content": "x"}]'])
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | words
    | st.sampled_from([0, 1, "true", "0", "tools", "{}"])
)
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=3), max_leaves=6
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", None, 3])


def message(content: st.SearchStrategy) -> st.SearchStrategy:
    openai = st.fixed_dictionaries(
        {"role": roles, "content": content}, optional={"tool_calls": anything, "name": anything}
    )
    share = st.fixed_dictionaries({"from": roles, "value": content}, optional={"weight": anything})
    parts = st.fixed_dictionaries(
        {"role": roles, "content": st.lists(st.fixed_dictionaries({"type": words, "text": content}), max_size=2)}
    )
    return openai | share | parts | st.dictionaries(st.sampled_from(["role", "content", "from"]), anything, max_size=2)


turns = st.lists(message(words | scalars), max_size=3)
sensible = st.builds(lambda q, a: [user(q), agent(a)], words, words)
said = words | turns | sensible | message(words) | st.lists(words, max_size=2) | anything
columns = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "label",
        "messages",
        "conversations",
        "text",
        "chosen_ended",
        "tools",
        "chat_template_kwargs",
        "other",
    ]
)
one_row = st.fixed_dictionaries(
    {"prompt": said, "chosen": said, "rejected": said, "completion": said, "label": scalars | st.booleans()},
    optional={"messages": said, "text": said, "chosen_ended": scalars, "tools": anything, "other": anything},
) | st.dictionaries(columns, said, max_size=4)
many_rows = st.lists(one_row, min_size=1, max_size=4)
READERS: list[Callable[..., Any]] = [read_prompts, read_pairs, read_labelled]


def in_one_line(error: Any, names: str = "") -> None:
    assert "\n" not in str(error)
    assert names in str(error)


def check(rows: Any, tokenizer: Any) -> None:
    """Every reader keeps or counts each row, or says why not in one line."""
    total = len(rows)
    for read in READERS:
        try:
            kept, skipped = read(rows, tokenizer, max_length=60, context=50)
        except DataError as error:
            in_one_line(error, "train_dataset")
            continue
        assert skipped.total == total == len(kept) + sum(skipped.counts.values())
        assert all(x.prompt for x in kept) if read is not read_prompts else all(x.ids for x in kept)
    for row in rows:
        try:
            _, ids = read_demonstration(row, tokenizer)
        except DataError as error:
            in_one_line(reason_of(error))
        else:
            assert ids


def check_file(rows: list[dict[str, Any]], folder: Path) -> None:
    """Through files of each kind: the values come back, or one line says why not."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        loaded = load_rows(path)
    except DataError as error:
        in_one_line(error)  # rows without a column at all
    else:
        assert len(loaded) == len(rows)
        check(loaded, CHAT)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        table = folder / f"rows{ending}"
        with table.open("w", encoding="utf-8", newline="", errors="replace") as file:
            writer = csv.DictWriter(file, names, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        try:
            check(load_rows(table), PLAIN)
        except DataError as error:
            in_one_line(error)


PROFILE: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture
def quiet() -> Iterator[None]:
    """Reports of what is left out, by the thousand."""
    logging.getLogger("rto.data.formats").disabled = True
    yield
    logging.getLogger("rto.data.formats").disabled = False


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50, **PROFILE)
@given(rows=many_rows)
def test_no_row_ends_in_a_traceback(name: str, rows: list[dict[str, Any]]) -> None:
    check(rows, TOKENIZERS[name])


@pytest.mark.usefixtures("quiet")
@settings(max_examples=30, **PROFILE)
@given(rows=many_rows)
def test_no_file_ends_in_a_traceback(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    check_file(rows, tmp_path_factory.mktemp("rows"))


@pytest.mark.usefixtures("quiet")
@settings(max_examples=80, **PROFILE)
@given(raw=st.binary(max_size=60) | words.map(lambda x: x.encode("utf-8", "replace")), data=st.data())
def test_no_bytes_end_in_a_traceback(raw: bytes, data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("raw") / (
        "x" + data.draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".gz"]))
    )
    path.write_bytes(raw)
    try:
        load_rows(path.rename(path.with_suffix(".jsonl.gz")) if path.suffix == ".gz" else path)
    except DataError as error:
        in_one_line(error)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=1000, **PROFILE)
@given(rows=many_rows)
def test_no_row_ends_in_a_traceback_at_length(name: str, rows: list[dict[str, Any]]) -> None:
    check(rows, TOKENIZERS[name])


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@settings(max_examples=500, **PROFILE)
@given(rows=many_rows)
def test_no_file_ends_in_a_traceback_at_length(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_file(rows, tmp_path_factory.mktemp("rows"))
