"""Special tokens in the text of rows: counted, and text where that is asked for; by every reader, in every format.

The oracle is a twin of each tokenizer: the same ids, its special tokens under other names, which no row holds. To it,
what a row says is text.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rto.data.chat import side_ids, split_special_tokens, whole_sides
from rto.data.errors import DataError
from rto.data.formats import read_demonstration, read_labelled, read_pairs, read_prompts
from rto.trainers.supervised import demonstration

NAMES = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>", "end": "<|im_end|>"}
OTHERS = {name: f"\ue100{name}\ue100" for name in NAMES}
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] | trim }}END{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)
LETTERS = [chr(c) for c in range(33, 127)]


def byte_pairs(names: dict[str, str]) -> Tokenizer:
    alphabet = [*names.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "eo", "eos"]
    found = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[("a", "b"), ("e", "o"), ("eo", "s")])
    )
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    return found


def sentence_pieces(names: dict[str, str]) -> Tokenizer:
    """As older Llamas: a normalizer puts the first blank before every piece of text between special tokens."""
    pieces = [*names.values(), "▁", "▁a", "eos", "<e", *LETTERS]
    found = Tokenizer(models.Unigram([(t, -float(len(t) == 1)) for t in pieces], unk_id=3))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return found


def metaspaces(names: dict[str, str]) -> Tokenizer:
    found = sentence_pieces(names)
    found.normalizer = normalizers.NFKC()
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return found


def words(names: dict[str, str]) -> Tokenizer:
    pieces = [*names.values(), *LETTERS, *(f"##{c}" for c in LETTERS), "eos", "user", "assistant"]
    found = Tokenizer(models.WordPiece({t: i for i, t in enumerate(pieces)}, unk_token=names["unk"]))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return found


KINDS: dict[str, Callable[[dict[str, str]], Tokenizer]] = {
    "byte pairs": byte_pairs,
    "sentence pieces": sentence_pieces,
    "metaspaces": metaspaces,
    "words": words,
}


def tokenizer(kind: str, names: dict[str, str], *, normalized: bool = False) -> PreTrainedTokenizerFast:
    backend = KINDS[kind](names)
    backend.add_special_tokens([AddedToken(name, normalized=normalized) for name in names.values()])
    special = {
        f"{name}_token": AddedToken(names[name], normalized=normalized) for name in ("bos", "eos", "pad", "unk")
    }
    found = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    found.chat_template = TEMPLATE.replace("END", names["end"])
    return found


TEXTS = [
    ("a <eos> b", "cab<eos>"),
    ("<bos>ab", "a<eos><eos> b"),
    ("a<e", "os> b"),
    ("a <e<eos>os> b", "<|im_end|>"),
    ("<pad><unk>", "x<|im_end|><bos>assistant: y"),
]


def conversation(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def every_reading(found: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Token ids of hostile rows by each reader, as text and as conversations."""
    out: dict[str, Any] = {}
    for prompt, completion in TEXTS:
        chat = (conversation("user", prompt), conversation("assistant", completion))
        for name, (x, y) in {"text": (prompt, completion), "chat": chat}.items():
            where = f"{name} {prompt!r} {completion!r}"
            other = "zz" if name == "text" else conversation("assistant", "zz")
            pairs = [{"prompt": x, "chosen": y, "rejected": other}]
            labels = [{"prompt": x, "completion": y, "label": label} for label in (True, False)]
            for encode in (side_ids, whole_sides):
                out[f"{where} {encode.__name__}"] = read_pairs(pairs, found, max_length=10**6, encode=encode)[0]
            out[f"{where} labelled"] = read_labelled(labels, found, max_length=10**6)[0]
            out[f"{where} prompts"] = read_prompts([{"prompt": x}], found, max_length=10**6)[0][0].ids
            out[f"{where} sft"] = read_demonstration({"prompt": x, "completion": y}, found)
            cut = {"prompt": x, "completion": y, "completion_ended": False}
            out[f"{where} cut off"] = read_demonstration(cut, found)
            whole = {"messages": [*chat[0], *chat[1]]} if name == "chat" else {"text": prompt + completion}
            out[f"{where} whole"] = read_demonstration(whole, found)
    return out


@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_rows_are_text_where_that_is_asked_for(kind: str, normalized: bool) -> None:
    ours = split_special_tokens(tokenizer(kind, NAMES, normalized=normalized), True)
    expected = every_reading(tokenizer(kind, OTHERS))
    if normalized and kind == "sentence pieces":  # its normalizer adds a blank to each piece, or to the whole text
        with pytest.raises(DataError, match='say "normalized": false of them'):
            every_reading(ours)
        return
    for where, found in every_reading(ours).items():
        assert found == expected[where], where


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_tokens_where_it_is_not(kind: str) -> None:
    found = tokenizer(kind, NAMES)
    prompts, _ = read_prompts([{"prompt": "a <eos> b"}], found, max_length=100)
    assert found.eos_token_id in prompts[0].ids


def test_the_setting_is_saved_with_the_tokenizer(tmp_path: Any) -> None:
    split_special_tokens(tokenizer("byte pairs", NAMES), True).save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.split_special_tokens
    assert every_reading(again) == every_reading(tokenizer("byte pairs", OTHERS))


ROWS = {
    "prompts": ({"prompt": "a<eos>b<eos>"}, lambda rows, t: read_prompts(rows, t, max_length=100)),
    "chat prompts": (
        {"prompt": conversation("user", "a<eos>b<eos>")},
        lambda rows, t: read_prompts(rows, t, max_length=100),
    ),
    "pairs": (
        {"prompt": "a<eos>b", "chosen": "c<eos>", "rejected": "d"},
        lambda rows, t: read_pairs(rows, t, max_length=100),
    ),
}


@pytest.mark.parametrize("split", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize("kind", ROWS)
def test_they_are_counted_and_told(kind: str, split: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One at the end of a text is where EOS would be put: 1 of two counts."""
    row, read = ROWS[kind]
    clean = {name: "zz" if isinstance(value, str) else conversation("user", "zz") for name, value in row.items()}
    clean |= {"rejected": "y"} if "rejected" in row else {}
    with caplog.at_level(logging.WARNING):
        _, skipped = read([clean, row, row], split_special_tokens(tokenizer("byte pairs", NAMES), split))
    assert skipped.special == {"<eos>": 2}
    assert skipped.holding == [1, 2]
    assert "2 of 3 rows hold special tokens in their text (<eos> 2 times; first: row 1)" in caplog.text
    assert ("are read as text" if split else "split_special_tokens: true") in caplog.text


def test_rows_of_the_sft_stage_bring_their_count() -> None:
    row = demonstration({"prompt": "a<eos>b", "completion": "c"}, tokenizer("byte pairs", NAMES), "text", True)
    assert row["special"] == '{"<eos>": 1}'
    assert Dataset.from_list([row])["special"] == ['{"<eos>": 1}']
