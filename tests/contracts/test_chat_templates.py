"""One reading of a chat template: each shape against the tokenizer's own rendering, in every stage."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from jinja2 import UndefinedError
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, SFTConfig

from rto.data.chat import (
    TemplateError,
    completion_ids,
    completion_texts,
    conversation_ids,
    prompt_ids,
    stop_ids,
    template_options,
    whole_ids,
    without_tail,
)
from rto.data.formats import DataError, read_labelled, read_pairs, read_prompts
from rto.evaluation.benchmarks.answers import encode
from rto.evaluation.benchmarks.types import Question
from rto.inspection.reading import Inspector
from rto.inspection.statistics import carried_by_kind
from rto.models.loading import eos_ids
from rto.rollout.rewards import Completed, RewardModel
from rto.rollout.token_rewards import token_source
from rto.trainers.examples import read_examples
from rto.trainers.supervised import RewardTrainer, SFTTrainer
from templates import SHAPES, Shape, tokenizer_for, tokenizer_of


def user(text):
    return {"role": "user", "content": text}


def agent(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "be nice"}
TOOLS = [{"type": "function", "function": {"name": "boil", "parameters": {"egg": "string"}}}]
THOUGHT = "<think>\nhm\n</think>\n\n"
ASKED = [user("why ?")]
# name: prompt, completion, columns of the row
CONVERSATIONS = {
    "one turn": (ASKED, [agent("light scatters .")], {}),
    "several turns": ([user("why ?"), agent("no"), user("what ?")], [agent("the cat")], {}),
    "a system prompt": ([SYSTEM, *ASKED], [agent("light")], {}),
    "spaces around": (ASKED, [agent("  light scatters . ")], {}),
    "an empty answer": (ASKED, [agent("")], {}),
    "a thought": (ASKED, [agent(THOUGHT + "light")], {}),
    "a thought in an earlier turn": ([user("why ?"), agent(THOUGHT + "no"), user("what ?")], [agent("the cat")], {}),
    "a thought of its own": (ASKED, [agent("light", reasoning_content="hm", thinking="hm")], {}),
    "tools": (ASKED, [agent("light")], {"tools": TOOLS}),
    "a keyword": (ASKED, [agent("light")], {"chat_template_kwargs": {"enable_thinking": False}}),
    "another keyword": (ASKED, [agent("light")], {"chat_template_kwargs": {"reasoning_effort": "high"}}),
    "several messages": (ASKED, [agent("light"), user("what ?"), agent("the cat")], {}),
    "parts": ([user([{"type": "text", "text": "why ?"}])], [agent([{"type": "text", "text": "light"}])], {}),
}
ALL = [pytest.param(shape, c, id=f"{name}: {c}") for name, shape in SHAPES.items() for c in CONVERSATIONS]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def in_parts(message):
    """As templates of models that see images want it."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def ids_of(tokenizer, messages, row=(), **how):
    """By the tokenizer's own `apply_chat_template`."""
    row = dict(row)
    return tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), **row.get("chat_template_kwargs", {}), **how
    )["input_ids"]


def refused(shape: Shape, tokenizer, messages, row) -> bool:
    """The tokenizer's own rendering fails, as it does on a list of parts where text is expected."""
    try:
        ids_of(tokenizer, messages, row)
    except Exception:  # whatever a template raises
        return True
    return False


@pytest.mark.parametrize("lines", [False, True], ids=["", "tokens of several lines"])
@pytest.mark.parametrize(("shape", "conversation"), ALL)
def test_prompt_and_completion_are_the_whole_rendering(shape, conversation, lines):
    """Token by token; cut where the prompt with its generation prompt ends, or where the two part."""
    tokenizer = tokenizer_for(shape, lines=lines)
    prompt, completion, row = CONVERSATIONS[conversation]
    if refused(shape, tokenizer, prompt + completion, row):
        assert not shape.system or conversation == "parts"
        with pytest.raises(TemplateError, match="the chat template refuses"):
            completion_ids(prompt, completion, tokenizer, **template_options(row))
        return
    before, ids = completion_ids(prompt, completion, tokenizer, **template_options(row))
    whole = ids_of(tokenizer, prompt + completion, row)
    asked = ids_of(tokenizer, prompt, row, add_generation_prompt=True)
    assert prompt_ids(prompt, tokenizer, **template_options(row)) == asked
    assert whole_ids(prompt, completion, tokenizer, **template_options(row)) == whole
    assert conversation_ids(prompt + completion, tokenizer, **template_options(row)) == whole
    assert tokenizer.decode(before + ids) == tokenizer.decode(whole)
    text, start = tokenizer.decode(whole), tokenizer.decode(asked)
    if whole[: len(asked)] == asked:
        assert (before, ids) == (asked, whole[len(asked) :])
    elif text.startswith(start):  # the tokenizer reads the end of the prompt otherwise when the answer follows
        assert lines
        assert before == asked
        assert ids == tokenizer(text[len(start) :], add_special_tokens=False).input_ids
    else:  # the longest beginning that both have
        assert before + ids == whole
        assert before == asked[: len(before)]
        assert whole[len(before)] != asked[len(before)]


@EVERY_SHAPE
def test_an_answer_ends_with_the_end_of_turn(shape):
    """What the template writes after it is not learned, and it ends a sampled answer."""
    tokenizer = tokenizer_for(shape)
    end = tokenizer.convert_tokens_to_ids(shape.end)
    _, ids = completion_ids(ASKED, [agent("light")], tokenizer)
    assert stop_ids(tokenizer) == (end,)
    assert {end, tokenizer.eos_token_id} == set(eos_ids(torch.nn.Module(), tokenizer))
    learned = without_tail(ids, tokenizer)
    assert learned[-1] == end
    assert learned.count(end) == 1
    assert tokenizer.decode(ids[len(learned) :]) == shape.tail
    assert completion_texts(tokenizer, [[end]], [learned]) == completion_texts(tokenizer, [[end]], [learned[:-1]])


@EVERY_SHAPE
@pytest.mark.parametrize("said", ["light sca", THOUGHT + "light sca", ""], ids=["text", "after a thought", "nothing"])
def test_what_was_cut_off_has_no_end_of_turn(shape, said):
    """It is the beginning of the same answer, had it ended."""
    tokenizer = tokenizer_for(shape)
    whole = tokenizer.apply_chat_template([*ASKED, agent(said)], tokenize=False)
    before, ids = completion_ids(ASKED, [agent(said)], tokenizer, ended=False)
    text = tokenizer.decode(before + ids)
    assert whole.startswith(text)
    assert whole[len(text) :].strip(" ") == shape.end + shape.tail
    assert not set(ids) & {*stop_ids(tokenizer), tokenizer.eos_token_id}
    assert without_tail(ids, tokenizer) == ids


@EVERY_SHAPE
def test_a_prompt_that_ends_in_an_assistants_turn_is_continued(shape):
    """The completion belongs to the same turn, whose end of turn is the only one."""
    tokenizer = tokenizer_for(shape)
    prompt = [*ASKED, agent("light")]
    before, ids = completion_ids(prompt, [agent(" scatters .")], tokenizer)
    start = ids_of(tokenizer, prompt, continue_final_message=True)
    assert prompt_ids(prompt, tokenizer) == before == start
    assert before + ids == ids_of(tokenizer, [*ASKED, agent("light scatters .")])
    before, ids = completion_ids(prompt, [agent(" scatters .")], tokenizer, ended=False)
    assert tokenizer.decode(before + ids).endswith("light scatters .")
    parts = [*ASKED, agent([{"type": "text", "text": "light"}])]
    if not refused(shape, tokenizer, parts, {}):
        together = [*ASKED, agent([{"type": "text", "text": "light scatters ."}])]
        assert whole_ids(parts, [agent(" scatters .")], tokenizer) == ids_of(tokenizer, together)


@pytest.mark.parametrize("thinks", ["chosen", "rejected", "both", "neither"])
@pytest.mark.parametrize(
    "shape", [s for s in SHAPES.values() if s.thinks], ids=[n for n, s in SHAPES.items() if s.thinks]
)
def test_sides_of_a_pair_share_their_prompt(shape, thinks):
    """One side thinks, the other does not: neither loses a token, neither is given one."""
    tokenizer = tokenizer_for(shape)
    said = {side: [agent((THOUGHT if thinks in (side, "both") else "") + side)] for side in ("chosen", "rejected")}
    (pair,), _ = read_pairs(Dataset.from_list([{"prompt": ASKED, **said}]), tokenizer, max_length=200)
    asked = ids_of(tokenizer, ASKED, add_generation_prompt=True)
    assert pair.prompt == asked[: len(pair.prompt)]
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(ASKED + said[side], tokenize=False)
        assert tokenizer.decode(pair.prompt + getattr(pair, side)) == whole
        alone, _ = completion_ids(ASKED, said[side], tokenizer)
        assert len(pair.prompt) <= len(alone)


# --- every stage


@EVERY_SHAPE
def test_every_stage_reads_the_same(shape):
    """Sft, prefer (pairs and labels), reward, train, reward models, inspect and evaluate."""
    tokenizer = tokenizer_for(shape)
    prompt = [user("why ?"), agent("no"), user("what ?")]
    good, bad = [agent("light scatters .")], [agent("the cat")]
    row = {"chat_template_kwargs": {"enable_thinking": False}, **({"tools": TOOLS} if shape.tools else {})}
    pair = {"prompt": prompt, "chosen": good, "rejected": bad, **row}
    labels = [{"prompt": prompt, "completion": said, "label": said is good, **row} for said in (good, bad)]
    asked = ids_of(tokenizer, prompt, row, add_generation_prompt=True)
    end = tokenizer.convert_tokens_to_ids(shape.end)
    expected = {}
    for name, said in (("chosen", good), ("rejected", bad)):
        ids = ids_of(tokenizer, prompt + said, row)
        learned = len(ids) - ids[::-1].index(end)
        expected[name] = (ids, learned)
    # prefer
    (example,), _ = read_examples(Dataset.from_list([pair]), tokenizer, unpaired=False, max_length=300, what="d")
    for ids, (whole, learned) in zip(example.completions, expected.values(), strict=True):
        assert example.prompt + ids == whole[:learned]
        assert ids[-1] == end
    read, _ = read_labelled(Dataset.from_list(labels), tokenizer, max_length=300)
    assert [x.prompt + x.completion for x in read] == [whole for whole, _ in expected.values()]
    # train
    (asked_of,), _ = read_prompts(Dataset.from_list([{"prompt": prompt, **row}]), tokenizer, max_length=300)
    assert asked_of.ids == asked
    # a reward model, as in train and as a judge
    model = RewardModel(scorer(tokenizer), tokenizer)
    batch = Completed(
        prompts=[prompt, prompt],
        completions=[good, bad],
        completion_ids=[[], []],
        ended=[True, True],
        columns={name: [x, x] for name, x in row.items()},
    )
    assert model._encode(batch) == [whole for whole, _ in expected.values()]
    # evaluate
    assert encode([Question(key=("1", 0), text="why ?")], tokenizer, max_length=300).ids == [
        ids_of(tokenizer, ASKED, add_generation_prompt=True)
    ]
    # inspect
    source = token_source([lambda completion_ids: [[1.0] * (len(y) - 1) + [5.0] for y in completion_ids]], None)
    data = Dataset.from_list([pair])
    pairs, _ = read_pairs(data, tokenizer, max_length=300)
    (seen,) = Inspector(source, tokenizer).pairs(pairs, data)
    sizes = [len(ids) for ids in example.completions]
    assert [len(side.rewards) for side in (seen.chosen, seen.rejected)] == sizes
    last = carried_by_kind([seen.chosen, seen.rejected])["last token"]
    assert last.tokens == pytest.approx(2 / sum(sizes))
    assert last.reward == pytest.approx(10 / (sum(sizes) - 2 + 10))


def scorer(tokenizer):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    )


@EVERY_SHAPE
def test_the_supervised_stages_train_on_the_rendering(shape, tiny_model, tmp_path):
    """Read off the trainers' own data sets: token ids of the whole, and no label after the end of turn."""
    tokenizer = tokenizer_for(shape)
    prompt, said = ASKED, [agent("light scatters .")]
    rows = {
        "prompt and completion": [{"prompt": prompt, "completion": said}],
        "messages": [{"messages": prompt + said}],
        "conversations": [{"conversations": [{"from": m["role"], "value": m["content"]} for m in prompt + said]}],
    }
    whole, end = ids_of(tokenizer, prompt + said), tokenizer.convert_tokens_to_ids(shape.end)
    before, _ = completion_ids(prompt, said, tokenizer)
    learned = len(whole) - whole[::-1].index(end)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1)
    for name, data in rows.items():
        config = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
        (row,) = trainer.train_dataset
        start = len(before) if name == "prompt and completion" else 0
        assert row["input_ids"] == whole
        assert row["labels"] == [-100] * start + whole[start:learned] + [-100] * (len(whole) - learned)
    pair = Dataset.from_list([{"prompt": prompt, "chosen": said, "rejected": [agent("no")]}])
    config = RewardConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = RewardTrainer(scorer(tokenizer), config, train_dataset=pair, processing_class=tokenizer)
    assert trainer.train_dataset[0]["chosen_ids"] == whole
    assert trainer.train_dataset[0]["rejected_ids"] == ids_of(tokenizer, [*prompt, agent("no")])


# --- options, refusals and text


def test_tools_and_keywords_may_be_json_text_and_have_nulls():
    """A CSV file has them as text; a table has nulls where another row has a key."""
    tokenizer = tokenizer_for(SHAPES["qwen 3"])
    keywords = {"enable_thinking": False}
    plain = {"tools": TOOLS, "chat_template_kwargs": keywords}
    want = ids_of(tokenizer, ASKED, plain, add_generation_prompt=True)
    as_text = {name: json.dumps(x) for name, x in plain.items()}
    rows = Dataset.from_list(
        [
            {"prompt": ASKED, **plain},
            {"prompt": ASKED, "tools": None, "chat_template_kwargs": {"reasoning_effort": "high"}},
        ]
    )
    prompts, _ = read_prompts(rows, tokenizer, max_length=300)
    assert prompts[0].ids == prompt_ids(ASKED, tokenizer, **template_options(as_text)) == want
    assert prompts[1].ids == ids_of(tokenizer, ASKED, add_generation_prompt=True)
    assert template_options({"tools": [], "chat_template_kwargs": None}) == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tools": "boil"}, "tools is text that is no JSON"),
        ({"tools": {"name": "boil"}}, "tools must be a list of JSON schemas"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "may not set add_generation_prompt"),
    ],
)
def test_options_that_are_none_are_refused(row, words):
    with pytest.raises(DataError, match=words):
        template_options(row)


def test_what_a_template_refuses_is_told_in_its_words(tmp_path, tiny_model, caplog):
    tokenizer = tokenizer_for(SHAPES["gemma"])
    with pytest.raises(TemplateError, match="refuses a conversation of system, user: System role not supported"):
        prompt_ids([SYSTEM, *ASKED], tokenizer)
    with pytest.raises(DataError, match="System role not supported"):
        encode([Question(key=("1", 0), text="why ?")], tokenizer, max_length=300, system="be nice")
    bare = tokenizer_of(None, ())
    with pytest.raises(DataError, match="need a chat template, which this tokenizer lacks"):
        prompt_ids(ASKED, bare)
    with pytest.raises(DataError, match="a list of messages with role and content"):
        prompt_ids([{"from": "human", "value": "why ?"}], tokenizer)
    # fine-tuning leaves such rows out, with a count
    data = Dataset.from_list([{"messages": [*ASKED, agent("no")]}, {"messages": [SYSTEM, *ASKED, agent("no")]}])
    config = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=1)
    with caplog.at_level(logging.WARNING, logger="rto"):
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == 1
    assert sum(trainer.skipped["train"].counts.values()) == 1
    assert "1 of 2 rows left out: 1 because the chat template refuses" in caplog.text
    with pytest.raises(DataError, match="Nothing is left to train on"):
        SFTTrainer(model, config, train_dataset=data.select([1]), processing_class=tokenizer)


def test_text_and_messages_make_one_conversation():
    tokenizer = tokenizer_for(SHAPES["chatml"])
    want = completion_ids(ASKED, [agent("light")], tokenizer)
    assert completion_ids("why ?", [agent("light")], tokenizer) == want
    assert completion_ids(ASKED, "light", tokenizer) == want


@pytest.mark.parametrize("name", ["llama 3", "gemma", "mistral", "llama 2", "deepseek r1", "zephyr"])
def test_bos_stands_once(name):
    """The tokenizer adds it to text, most of these templates write it, and text may bring its own."""
    shape = SHAPES[name]
    tokenizer = tokenizer_for(shape)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("why ?").input_ids[0] == bos
    in_template = 0 if name == "zephyr" else 1
    assert whole_ids(ASKED, [agent("light")], tokenizer).count(bos) == in_template
    for prompt in ("why ?", shape.bos + "why ?"):
        for said in (" light", " light" + shape.eos):
            before, ids = completion_ids(prompt, said, tokenizer)
            assert (before.count(bos), ids.count(bos), before[0], ids.count(eos)) == (1, 0, bos, 1)
            assert before == prompt_ids(prompt, tokenizer)
            assert before + ids == whole_ids(prompt, said, tokenizer)


def test_text_that_brings_the_end_of_turn_gets_no_other():
    """Rendered beforehand, as many data sets are; what follows the end of turn is cut there, too."""
    tokenizer = tokenizer_for(SHAPES["chatml"])
    prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    _, want = completion_ids(ASKED, [agent("light")], tokenizer)
    for said in ("light<|im_end|>", "light<|im_end|>\n"):
        before, ids = completion_ids(prompt, said, tokenizer)
        assert before == prompt_ids(ASKED, tokenizer)
        assert without_tail(ids, tokenizer) == without_tail(want, tokenizer)


def test_a_tokenizer_that_ends_text_itself_ends_it_once():
    """As tokenizers of encoders do, and those that add EOS: not behind a prompt, nor behind what was cut off."""
    from tokenizers import processors

    tokenizer = tokenizer_of("{{ 'other' }}", ("<cls>",))
    eos, first = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<cls>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <|endoftext|>", special_tokens=[("<cls>", first), ("<|endoftext|>", eos)]
    )
    for ended in (True, False):
        before, ids = completion_ids("why ?", " light", tokenizer, ended=ended)
        assert before == prompt_ids("why ?", tokenizer)
        assert before[0] == first
        assert (before.count(eos), ids.count(eos)) == (0, int(ended))
    assert whole_ids("why ?", " light", tokenizer) == tokenizer("why ? light").input_ids


def test_an_answer_that_ends_in_plain_text_is_told_of(caplog):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '###' }}{% endfor %}"
    tokenizer = tokenizer_of(template, ())
    with caplog.at_level(logging.WARNING, logger="rto"):
        assert stop_ids(tokenizer) == stop_ids(tokenizer) == ()
    (line,) = caplog.messages
    assert "ends an answer with '###', in which no token is a special one" in line


def test_a_template_that_needs_a_system_message_or_parts_is_read_all_the_same():
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
    first = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + parts
    for template in (parts, first):
        tokenizer = tokenizer_of(template, ("<|end|>",))
        assert stop_ids(tokenizer) == (tokenizer.convert_tokens_to_ids("<|end|>"),)


def test_a_template_that_reads_parts_alone_is_given_parts():
    """Of text it would render nothing, and say nothing."""
    content = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    tokenizer = tokenizer_of("{% for m in messages %}{{ m.role }}:" + content + "<|end|>{% endfor %}", ("<|end|>",))
    rows = [{"prompt": [user("why ?")], "chosen": [agent("light")], "rejected": [agent("no")]}]
    (pair,), _ = read_pairs(rows, tokenizer, max_length=99)
    assert tokenizer.decode(pair.prompt + pair.chosen) == "user:why ?<|end|>assistant:light<|end|>"


def test_a_turn_may_be_ended_by_the_next_one():
    """As in GLM-4, whose answers end where the user's token stands."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    tokenizer = tokenizer_of(template, ("<|user|>", "<|assistant|>"))
    assert stop_ids(tokenizer) == (tokenizer.convert_tokens_to_ids("<|user|>"),)
    before, ids = completion_ids(ASKED, [agent("light")], tokenizer)
    assert before + without_tail(ids, tokenizer) == ids_of(tokenizer, [*ASKED, agent("light")])
    assert completion_ids("why ?", " light", tokenizer)[1][-1] == tokenizer.eos_token_id


REAL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TOKEN = re.compile(r"<[|｜a-z_/▁]+[\w▁|｜]*>|\[/?INST\]")


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_the_templates_that_trl_ships(path):
    """Real ones, with every token that they write as a special one; what one refuses is refused."""
    template = path.read_text(encoding="utf-8")
    special = tuple(sorted(set(TOKEN.findall(template))))
    tokenizer = tokenizer_of(template, special, bos="<s>")
    try:
        text_alone = "sky" in tokenizer.decode(ids_of(tokenizer, [user("sky"), agent("sky")]))
    except UndefinedError:
        text_alone = False
    for name, (prompt, completion, row) in CONVERSATIONS.items():
        if name == "tools" or refused(SHAPES["chatml"], tokenizer, prompt + completion, row):
            continue
        theirs = [x if text_alone else list(map(in_parts, x)) for x in (prompt, prompt + completion)]
        try:
            asked = ids_of(tokenizer, theirs[0], row, add_generation_prompt=True)
        except Exception:  # as `refused`
            continue
        before, ids = completion_ids(prompt, completion, tokenizer, **template_options(row))
        assert before == asked[: len(before)], name
        assert tokenizer.decode(before + ids) == tokenizer.decode(ids_of(tokenizer, theirs[1], row)), name
