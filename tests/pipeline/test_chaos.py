"""A small part of ``make chaos``: a few kills, a spoilt input of each kind; and that the tool sees what is lost."""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import warm

CHAOS = Path(__file__).parents[1] / "chaos"
KINDS = {"data", "recipe", "flag", "model", "checkpoint", "evaluation", "judge"}


@pytest.fixture(scope="module", autouse=True)
def _tool() -> Iterator[None]:
    sys.path.insert(0, str(CHAOS))
    yield
    sys.path.remove(str(CHAOS))


@pytest.mark.slow
def test_a_few_kills_and_spoilt_inputs_lose_nothing() -> None:
    few = ["--kills", "3", "--inputs", str(len(KINDS)), "--only", "compare", "inputs", "--seed", "3"]
    done = warm.run(CHAOS, *few, environment={**os.environ, "PYTHONWARNINGS": "ignore"}, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "compare: 3 tried, 1 ended, 0 lost, 0 stuck, 0 unsaid" in done.stdout
    assert set(re.findall(r"^(\w+): 1 tried, 1 (?:used|refused)$", done.stdout, re.MULTILINE)) == KINDS


def test_whatever_a_judge_answers_is_a_game_or_a_failure() -> None:
    """Every place of an answer × every wrong value, read by both protocols."""
    from inputs import faults

    from rto.evaluation.judging.endpoint import Prices, Reply, _read_reply
    from rto.evaluation.judging.judges import FiveWay, Weighted

    answers = [fault for _, fault in faults() if isinstance(fault, dict | bytes)]
    assert len(answers) > 200
    for answer in answers:
        text = json.dumps(answer) if isinstance(answer, dict) else answer.decode(errors="replace")
        reply = _read_reply(text, 0.1)
        if isinstance(reply, Reply):
            for protocol in (Weighted(), FiveWay()):
                game = protocol.read([reply])
                assert (game.preference is None) == (game.reason is not None)
                assert game.preference is None or 1 <= game.preference <= 2
            Prices(prompt=1.0, completion=2.0).of(reply.prompt_tokens or 0, reply.completion_tokens or 0)
        else:
            assert "not a chat completion" in reply


def test_what_differs_is_seen(tmp_path: Path) -> None:
    """The comparison itself: a byte of a weight, a row of a log and a file are missed, the clock is not."""
    from kills import left

    folder = tmp_path / "sft"
    folder.mkdir()
    files = {"model.safetensors": b"ab", "log.jsonl": b'{"loss": 1, "seconds": 3}\n', "done.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    whole = left(tmp_path)
    for name, content in {"log.jsonl": b'{"loss": 1, "seconds": 4}\n', "done.json": b"[]"}.items():
        (folder / name).write_bytes(content)
        assert left(tmp_path) == whole
    for name, content in {"model.safetensors": b"aB", "log.jsonl": b'{"loss": 2, "seconds": 3}\n'}.items():
        (folder / name).write_bytes(content)
        assert left(tmp_path) != whole
        (folder / name).write_bytes(files[name])
    assert left(tmp_path) == whole
    (folder / "model.safetensors").unlink()
    assert left(tmp_path) != whole


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "model: out", None),
        (2, "rto sft: rows.csv: line 7 is no text", None),
        (2, "rto sft: rows.csv is no text", "unnamed"),
        (2, "rto sft: line 7 is no text", "unnamed"),
        (2, "it is no text", "without a line"),
        (2, "rto sft: rows.csv: line 7\nrto sft: rows.csv: line 7", "without a line"),
        (1, "rto sft: rows.csv: line 7", "tracebacks"),
        (2, "Traceback (most recent call last):\nrto sft: rows.csv: line 7", "tracebacks"),
        (None, "", "time-outs"),
    ],
)
def test_what_went_wrong_is_seen(code: int | None, said: str, wrong: str | None) -> None:
    from inputs import Input, verdict

    given = Input("data/cut/rows.csv", lambda folder: ["sft"], (("rows.csv",), ("row 6", "line 7")))
    assert verdict(given, ["sft"], code, said) == wrong
    if code == 0:
        assert verdict(replace(given, used=False), ["sft"], code, said) == "accepted"
