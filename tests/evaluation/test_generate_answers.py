"""Answers against `generate`, files against the official formats, killed runs against uninterrupted ones."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rto.cli import main
from rto.data.formats import DataError
from rto.evaluation.benchmarks import answers as generating
from rto.evaluation.benchmarks.answers import batches, encode, generate, journal_of, record_of
from rto.evaluation.benchmarks.formats import BENCHMARKS, benchmark_of, read_match, read_questions
from rto.evaluation.benchmarks.types import Question
from rto.files import Journal
from rto.rollout.samplers.base import SamplingConfig
from rto.rollout.samplers.transformers import TransformersSampler

WORDS = ["abba", "a cab", "back", "the abacus", "crab", "dab dab dab", "fable", "a", "garb", "habit", "jab"]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    return write(
        tmp_path / "prompts.jsonl", [{"instruction": w, "dataset": f"set {i % 2}"} for i, w in enumerate(WORDS)]
    )


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    rows = [{"question_id": f"q{i}", "category": "c", "prompt": w} for i, w in enumerate(WORDS)]
    return write(tmp_path / "arena.jsonl", rows)


def command(model: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    flags = ["--batch_size", "4", "--max_new_tokens", "12", "--name", "tiny"]
    head = ["evaluate", "generate", "--model", str(model), "--benchmark", str(prompts), "--output", str(output)]
    return [*head, *flags, *more]


def greedy(folder: Path, prompt: str) -> str:
    """By transformers' own template and `generate`, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"<user>{prompt}<eos><assistant>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_alpaca_eval_answers(tiny_folder: Path, alpaca: Path, tmp_path: Path) -> None:
    assert main(command(tiny_folder, alpaca, tmp_path / "out", "--temperature", "0")) == 0
    rows = json.loads((tmp_path / "out" / "model_outputs.json").read_text())
    assert [row["output"] for row in rows] == [greedy(tiny_folder, w) for w in WORDS]
    for i, row in enumerate(rows):
        assert list(row) == ["instruction", "output", "generator", "dataset", "datasplit"]
        assert (row["instruction"], row["generator"]) == (WORDS[i], "tiny")
        assert (row["dataset"], row["datasplit"]) == (f"set {i % 2}", "eval")
    settings = json.loads((tmp_path / "out" / "model_outputs.run.json").read_text())["settings"]
    assert (settings["template"], settings["sampling"]["temperature"]) == ("chat", 0)


def test_arena_hard_answers_are_greedy_by_default(tiny_folder: Path, arena: Path, tmp_path: Path) -> None:
    assert main(command(tiny_folder, arena, tmp_path / "out")) == 0
    lines = (tmp_path / "out" / "model_answer" / "tiny.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines[:-1]]
    assert [row["choices"][0]["turns"][0]["content"] for row in rows] == [greedy(tiny_folder, w) for w in WORDS]
    for i, row in enumerate(rows):
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert (row["question_id"], row["model_id"], row["choices"][0]["index"]) == (f"q{i}", "tiny", 0)
    assert len({row["answer_id"] for row in rows}) == len(WORDS)
    questions = read_questions(tmp_path / "out" / "question.jsonl", BENCHMARKS["arena_hard"])
    assert [(q.key[0], q.text) for q in questions] == [(f"q{i}", w) for i, w in enumerate(WORDS)]
    battles = read_match(*[tmp_path / "out" / "model_answer" / "tiny.jsonl"] * 2).battles
    assert [b.answer for b in battles] == [b.baseline for b in battles]


def test_models_that_answer_more_or_fewer_questions_share_a_folder(tmp_path: Path) -> None:
    """A prompt that fits one model's context and not another's is no other benchmark; another text is."""
    arena = BENCHMARKS["arena_hard"]
    few, many, others = (
        read_questions(
            write(tmp_path / "q", [{"question_id": i, "prompt": t, "cluster": "c"} for i, t in rows]), arena
        )
        for rows in ([("a", "x")], [("a", "x"), ("b", "y")], [("a", "z"), ("b", "y")])
    )
    for questions in (few, many, few):
        arena.prepare(tmp_path / "out", questions)
    kept = read_questions(tmp_path / "out" / "question.jsonl", arena)
    assert [(q.key[0], q.text, q.row["cluster"]) for q in kept] == [("a", "x", "c"), ("b", "y", "c")]
    for refused in (others, read_questions(write(tmp_path / "q", [{"question_id": "e", "prompt": "x"}]), arena)):
        with pytest.raises(DataError, match=r"question\.jsonl holds other questions than the prompts given"):
            arena.prepare(tmp_path / "out", refused)


def test_alpaca_eval_samples_at_its_temperature(tiny_folder: Path, alpaca: Path, tmp_path: Path) -> None:
    outputs = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(command(tiny_folder, alpaca, tmp_path / name, "--seed", seed)) == 0
        outputs.append(json.loads((tmp_path / name / "model_outputs.json").read_text()))
    assert outputs[0] == outputs[1] != outputs[2]
    settings = json.loads((tmp_path / "a" / "model_outputs.run.json").read_text())["settings"]
    assert settings["sampling"]["temperature"] == 0.7


def test_every_prompt_is_in_one_batch_of_like_lengths() -> None:
    ids = [[0] * n for n in (5, 1, 9, 1, 7, 3, 3)]
    assert batches(ids, 3) == [[1, 3, 5], [6, 0, 4], [2]]


class Sampler:
    """The real one; it dies before its n-th call, and counts."""

    def __init__(self, dies_at: int | None = None) -> None:
        config = SamplingConfig(max_completion_length=12, temperature=0.7)
        self.inner = TransformersSampler(config=config, eos_ids=(2,), pad_id=0)
        self.calls, self.dies_at = 0, dies_at

    def __call__(self, model: Any, prompts: list[list[int]], seed: int) -> Any:
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.inner(model, prompts, seed)


@pytest.fixture
def run(tiny_model: Callable, tokenizer: Any) -> Callable[..., Any]:
    questions = [Question(key=(w, 0), text=w, row={}) for w in WORDS]
    encoded = encode(questions, tokenizer, max_length=64)

    def start(folder: Path, sampler: Any, **settings: Any) -> Any:
        return generate(
            tiny_model(),
            tokenizer,
            encoded,
            BENCHMARKS["alpaca_eval"],
            folder,
            name="tiny",
            sampler=sampler,
            settings=settings,
            batch_size=4,
            seed=3,
        )

    return start


def test_a_run_cut_anywhere_ends_like_an_uninterrupted_one(
    run: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal is cut at many bytes: between batches, within one, within a line, within the settings."""
    whole = tmp_path / "whole"
    assert run(whole, Sampler()).new == len(WORDS)
    expected = (whole / "model_outputs.json").read_text()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Sampler(dies_at=2))
    path = tmp_path / "cut" / "model_outputs.json"
    data = journal_of(path).read_bytes()
    first = data.index(b"\n") + 1
    lines = [i + 1 for i, byte in enumerate(data) if byte == 10]
    assert len(lines) == 1 + 8
    for end in [
        0,
        5,
        first - 1,
        first,
        first + 1,
        lines[4] - 1,
        *lines[2:7:2],
        *(n + 9 for n in lines[1:8:3]),
        len(data),
    ]:
        path.unlink(missing_ok=True)
        record_of(path).unlink(missing_ok=True)
        journal_of(path).write_bytes(data[:end])
        caplog.clear()
        sampler = Sampler()
        kept = sum(n - 1 <= end for n in lines[1:])  # of a whole line, only its end may be lost
        result = run(tmp_path / "cut", sampler)
        assert path.read_text() == expected
        assert (result.answers, result.new) == (len(WORDS), len(WORDS) - kept)
        assert sampler.calls == 3 - kept // 4
        cut = end != 0 and end not in lines and end + 1 not in lines
        assert ("cut off in its last line" in caplog.text) == cut
        assert not journal_of(path).exists()
        if cut:
            aside = path.with_name("model_outputs.json.journal.cut")
            assert aside.read_bytes() == data[max([0, *(n for n in lines if n < end)]) : end] + b"\n"
            aside.unlink()


def test_a_batch_cut_in_two_is_completed_without_doubles(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Sampler(dies_at=1))
    path = journal_of(tmp_path / "model_outputs.json")
    whole = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(whole[:3]) + b"\n" + whole[3][:20])  # the settings, two of four answers, a bit
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Sampler(dies_at=1))
    assert path.read_bytes().split(b"\n") == whole


@pytest.mark.slow
def test_a_killed_process_loses_and_doubles_nothing(tiny_folder: Path, alpaca: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third batch's write, then the same command again."""
    assert main(command(tiny_folder, alpaca, tmp_path / "whole")) == 0
    program = [sys.executable, str(Path(__file__).with_name("answering.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [str(tiny_folder), str(alpaca), str(tmp_path / "killed"), "3", "50"]
    killed = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    journal = journal_of(tmp_path / "killed" / "model_outputs.json")
    assert journal.read_bytes().count(b"\n") == 1 + 8
    assert not journal.read_bytes().endswith(b"\n")
    assert main(command(tiny_folder, alpaca, tmp_path / "killed")) == 0
    whole, resumed = (tmp_path / name / "model_outputs.json" for name in ("whole", "killed"))
    assert resumed.read_text() == whole.read_text()


def test_what_is_finished_is_left_alone(run: Callable, tmp_path: Path) -> None:
    run(tmp_path, Sampler())
    before = (tmp_path / "model_outputs.json").stat().st_mtime_ns
    again = run(tmp_path, Sampler(dies_at=0))
    assert (again.answers, again.new) == (len(WORDS), 0)
    assert (tmp_path / "model_outputs.json").stat().st_mtime_ns == before


def test_other_settings_do_not_mix(run: Callable, tmp_path: Path) -> None:
    run(tmp_path, Sampler(), temperature=0.7)
    with pytest.raises(
        DataError, match=r"model_outputs\.json was written with other .*temperature is 0.7 there and 1.0"
    ):
        run(tmp_path, Sampler(), temperature=1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", Sampler(dies_at=1), temperature=0.7)
    with pytest.raises(DataError, match=r"journal was written with other settings \(temperature"):
        run(tmp_path / "half", Sampler(), temperature=1.0)
    record_of(tmp_path / "model_outputs.json").unlink()
    with pytest.raises(DataError, match=r"no model_outputs\.run\.json says how it was made"):
        run(tmp_path, Sampler(), temperature=0.7)


def test_a_model_trained_on_is_another_model(tiny_model: Callable, tmp_path: Path) -> None:
    tiny_model(seed=0).save_pretrained(tmp_path)
    before = generating.weights_digest(tmp_path)
    tiny_model(seed=1).save_pretrained(tmp_path)
    assert generating.weights_digest(tmp_path) != before
    tiny_model(seed=0).save_pretrained(tmp_path)
    assert generating.weights_digest(tmp_path) == before
    assert generating.weights_digest(tmp_path / "hub-id") is None


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {"a": 1})
    with pytest.raises(DataError, match="another process is writing here"):
        Journal(tmp_path / "j", {"a": 1})
    journal.append([{"index": 0}])
    journal.close()
    again = Journal(tmp_path / "j", {"a": 1})
    assert again.rows == [{"index": 0}]
    again.close()
    (tmp_path / "j").write_text('{"settings": {"a": 1}}\nnonsense\n{"index": 1}\n')
    with pytest.raises(DataError, match=r"j: row 1 \(line 2\) is not JSON"):
        Journal(tmp_path / "j", {"a": 1})


def test_a_line_that_lost_only_its_end_is_kept_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"settings": {"a": 1}}\n{"index": 0}')
    for rows in ([{"index": 0}], [{"index": 0}, {"index": 1}]):
        with Journal(path, {"a": 1}) as journal:
            assert journal.rows == rows
            journal.append([{"index": 1}] * (len(rows) == 1))


def test_a_journal_that_another_process_has_just_finished_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened before the other one removed it, and locked after: what is written there would be lost."""
    real = fcntl.flock

    def late(file: int, how: int) -> None:
        real(file, how)
        (tmp_path / "j").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match="another process is writing here"):
        Journal(tmp_path / "j", {"a": 1})


def test_prompts_that_do_not_fit_are_left_out_and_told(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    questions = [Question(key=(w, 0), text=w, row={}) for w in ("short", "long " * 20, "short too", "x" * 99)]
    encoded = encode(questions, tokenizer, max_length=40)
    assert [q.text for q in encoded.questions] == ["short", "short too"]
    assert "prompts: 2 of 4 rows left out: 2 with a prompt over 40 tokens (first: row 1)" in caplog.text
    with pytest.raises(DataError, match="lower max_new_tokens"):
        encode(questions, tokenizer, max_length=3)


def test_a_tokenizer_without_a_template_continues_text(
    stories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    encoded = encode([Question(key=("a", 0), text="Once upon a time", row={})], tokenizer, max_length=64)
    assert encoded.ids == [tokenizer("Once upon a time").input_ids]
    assert encoded.template == "plain"
    assert "no chat template: prompts are continued as plain text" in caplog.text
    with pytest.raises(DataError, match="a system message needs a chat template"):
        encode(encoded.questions, tokenizer, max_length=64, system="Be kind.")


def test_a_system_message_comes_first(tokenizer: Any) -> None:
    encoded = encode([Question(key=("a", 0), text="hi", row={})], tokenizer, max_length=64, system="Be kind.")
    assert tokenizer.decode(encoded.ids[0]) == "<system>Be kind.<eos><user>hi<eos><assistant>"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"instruction": "a"}, {"text": "b"}], "row 1: 'instruction' or 'prompt' must be non-empty text"),
        ([{"prompt": "a"}, {"prompt": " "}], "row 1: 'instruction' or 'prompt' must be non-empty text"),
        ([{"prompt": [{"role": "user", "content": "a"}] * 2}], "row 0: 'instruction' or 'prompt'"),
        ([{"prompt": "\ud800"}], "row 0: 'instruction' or 'prompt' holds half of a surrogate pair"),
        ([{"question_id": "a", "prompt": "x"}, {"prompt": "y"}], "row 1: no 'question_id'"),
        ([{"question_id": "a", "prompt": "x"}] * 2, "row 1: question 'a' occurs twice"),
        ([{"question_id": "\ud800", "prompt": "x"}], "row 0: question_id holds half of a surrogate pair"),
        ([{"question_id": "a", "turns": ["x"]}], "row 0: 'turns' must be a list of one turn"),
        ([], "no rows"),
    ],
)
def test_bad_prompts_are_refused_before_a_model_is_loaded(
    rows: list[dict], says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "p.jsonl", rows)
    assert main(command(Path("/no/such/model"), path, tmp_path)) == 2
    message = capsys.readouterr().err
    assert says in message
    assert str(path) in message
    assert message.count("\n") == 1


def test_bad_flags_are_refused(tmp_path: Path, alpaca: Path, capsys: pytest.CaptureFixture) -> None:
    none = Path("/no/such/model")
    assert main(command(none, tmp_path / "x.jsonl", tmp_path)) == 2
    assert "neither alpaca_eval nor arena_hard nor a file of prompts" in capsys.readouterr().err
    assert main(command(none, alpaca, tmp_path, "--name", "../up")) == 2
    assert "--name '../up' becomes part of a file's name" in capsys.readouterr().err
    assert main(command(none, alpaca, tmp_path, "--batch_size", "0")) == 2
    assert "--batch_size must be at least 1" in capsys.readouterr().err


def test_equal_prompts_are_answered_each(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    assert [q.key for q in read_questions(path, BENCHMARKS["alpaca_eval"])] == [("a", 0), ("b", 0), ("a", 1)]


@pytest.mark.parametrize(
    ("file", "rows", "benchmark"),
    [
        ("alpaca_eval_805.jsonl", 805, "alpaca_eval"),
        ("arena_hard_v0.1_500.jsonl", 500, "arena_hard"),
        ("hh_harmless_first_turn.jsonl", 2178, "alpaca_eval"),
        ("instructions_misc.jsonl", 587, "alpaca_eval"),
    ],
)
def test_real_prompts_are_read(data_dir: Path, file: str, rows: int, benchmark: str) -> None:
    path = data_dir / "prompts" / file
    questions = read_questions(path, benchmark_of(path))
    assert benchmark_of(path).name == benchmark
    assert len({q.key for q in questions}) == len(questions) == rows
