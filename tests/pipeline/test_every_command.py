"""What every command keeps to: what can be known before the work is told before it, and a signal ends it in a line."""

import json
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from rto.cli import COMMANDS, main
from rto.evaluation import commands as evaluation

ALL = [*(name for name in COMMANDS if name != "evaluate"), *(f"evaluate {name}" for name in evaluation.COMMANDS)]
WRITES_NOTHING = {"watch", "plan"}
ROWS = {
    "sft.jsonl": {"prompt": "ab", "completion": "ba"},
    "pairs.jsonl": {"prompt": "ab", "chosen": "ba", "rejected": "zq"},
    "ours.json": {"instruction": "ab", "output": "ba", "generator": "ours", "dataset": "own"},
    "theirs.json": {"instruction": "ab", "output": "zq", "generator": "theirs", "dataset": "own"},
}
STAGE = "--model_name_or_path {model} --dataset_name {pairs} --report_to none --use_cpu true --output_dir {bad}"
JUDGE = "--answers {ours} --baseline {theirs} --judge_model none --base_url http://127.0.0.1:9"
WRITERS: dict[str, list[str]] = {
    "run": ["--output_dir {bad}"],
    "init": ["chat --output {bad}/mine.yaml"],
    "reproduce": ["embedded --output_dir {bad}"],
    "sft": [STAGE.replace("{pairs}", "{sft}")],
    "prefer": [STAGE, STAGE.replace("{bad}", "{good} --ref_cache_dir {bad}")],
    "reward": [STAGE],
    "train": [f"{STAGE} --dpo_model {{model}} --score_coef 0 --max_completion_length 4"],
    "export": ["--model_name_or_path {adapter} --output_dir {bad}/whole"],
    "inspect": ["--dpo_model {model} --ref_model {model} --dataset_name {pairs} --output_dir {bad}"],
    "report": ["{bad}"],
    "theory": ["--quick --output_dir {bad}"],
    "evaluate generate": ["--model {model} --benchmark {sft} --output {bad}"],
    "evaluate judge": [f"{JUDGE} --output {{bad}}", f"{JUDGE} --output {{good}} --cache {{bad}}/cache.jsonl"],
    "evaluate compare": ["{judged} --output_dir {bad}"],
}
"""Command → its arguments; once for each place that it writes to."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_model: Callable) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    for name, row in ROWS.items():
        rows = [{**row, next(iter(row)): f"ab {i}"} for i in range(8)]
        text = json.dumps(rows) if name.endswith("json") else "".join(json.dumps(r) + "\n" for r in rows)
        (folder / name).write_text(text)
    base = tiny_model()
    base.name_or_path = base.config._name_or_path = str(tiny_folder)
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
    (folder / "judged").mkdir()
    kept = {"instruction": "ab", "output_1": "zq", "output_2": "ba", "generator_1": "theirs", "generator_2": "ours"}
    (folder / "judged" / "annotations.json").write_text(json.dumps([{**kept, "annotator": "j", "preference": 1.5}]))
    named = {Path(name).stem: str(folder / name) for name in ROWS}
    return (
        named
        | {"model": str(tiny_folder), "good": str(folder / "good")}
        | {name: str(folder / name) for name in ("adapter", "judged")}
    )


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not read, studies not run, and a judge not asked."""
    import rto.models.loading
    import rto.theory.__main__
    from rto.evaluation.judging.endpoint import Endpoint

    def work(*args: Any, **kwargs: Any) -> None:
        pytest.fail("work began")

    for owner, name in ((rto.models.loading, "_load"), (rto.theory.__main__, "run_all"), (Endpoint, "ask")):
        assert hasattr(owner, name)
        monkeypatch.setattr(owner, name, work)


def bad_places(tmp_path: Path) -> Iterator[tuple[str, str]]:
    (tmp_path / "file").write_text("")
    yield "file", str(tmp_path / "file")
    yield "below a file", str(tmp_path / "file" / "out")
    if sys.platform == "linux":
        yield "no place to write", "/proc/sys"


def test_every_command_is_here() -> None:
    assert set(ALL) == WRITERS.keys() | WRITES_NOTHING


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.usefixtures("no_work")
def test_what_cannot_be_written_is_told_before_the_work(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for kind, bad in bad_places(tmp_path):
        for words in WRITERS[command]:
            args = [*command.split(), *(word.format(bad=bad, **places) for word in words.split())]
            assert main(args) == 2, kind
            said = capsys.readouterr().err
            lines = [line for line in said.splitlines() if line.startswith(f"rto {command.split()[0]}: ")]
            assert len(lines) == 1, said
            assert bad in lines[0]
            assert any(remedy in lines[0] for remedy in ("name ", "choose another", "rto watch")), lines[0]
            assert "Traceback" not in said


# --- what is neither here nor on the hub

NOWHERE = "nobody/nothing-of-this-name"
TRAIN = "--model_name_or_path {model} --dataset_name {pairs} --report_to none --use_cpu true --output_dir {good}"
EMBEDDED = "--output_dir {good}/run"
UNKNOWN: dict[str, list[str]] = {
    "run": [f"{EMBEDDED} --model {NOWHERE}", f"{EMBEDDED} --data.prompts.path {NOWHERE}"],
    "reproduce": [f"embedded {EMBEDDED} --model {NOWHERE}"],
    "sft": [
        *(TRAIN.replace("{model}", NOWHERE), TRAIN.replace("{pairs}", NOWHERE)),
        *(f"{TRAIN} --{name} {NOWHERE}" for name in ("chat_template_path", "eval_dataset_name")),
    ],
    "prefer": [TRAIN.replace("{model}", NOWHERE), TRAIN.replace("{pairs}", NOWHERE), f"{TRAIN} --ref_model {NOWHERE}"],
    "reward": [
        *(TRAIN.replace("{model}", NOWHERE), TRAIN.replace("{pairs}", NOWHERE)),
        *(f"{TRAIN} --{name} {NOWHERE}" for name in ("chat_template_path", "eval_dataset_name")),
    ],
    "train": [
        f"{TRAIN} --dpo_model {{model}} --score_coef 0 --{role} {NOWHERE}"
        for role in ("model_name_or_path", "dataset_name", "dpo_model", "dpo_ref_model", "ref_model", "value_model")
    ]
    + [f"{TRAIN} --dpo_coef 0 --reward_funcs {NOWHERE}"],
    "export": [f"--model_name_or_path {NOWHERE} --output_dir {{good}}/whole"],
    "inspect": [
        f"--dpo_model {NOWHERE} --ref_model {{model}} --dataset_name {{pairs}} --output_dir {{good}}",
        f"--dpo_model {{model}} --ref_model {NOWHERE} --dataset_name {{pairs}} --output_dir {{good}}",
        f"--dpo_model {{model}} --ref_model {{model}} --dataset_name {NOWHERE} --output_dir {{good}}",
    ],
    "plan": [f"embedded --model {NOWHERE}", f"embedded --config policy={NOWHERE}"],
    "evaluate generate": [
        f"--model {NOWHERE} --benchmark {{sft}} --output {{good}}",
        f"--model {{model}} --benchmark {NOWHERE} --output {{good}}",
    ],
    "evaluate judge": [f"--answers {{ours}} --baseline {{theirs}} --judge {NOWHERE} --output {{good}}"],
}
"""Command → its arguments with a name that is nowhere; once for each model and each set of rows that it reads."""
READS_NO_HUB = {"init", "report", "watch", "theory", "evaluate compare"}


def test_every_command_that_reads_the_hub_is_here() -> None:
    assert set(ALL) == UNKNOWN.keys() | READS_NO_HUB


@pytest.mark.parametrize("command", UNKNOWN)
@pytest.mark.usefixtures("no_work")
def test_a_name_that_is_nowhere_is_told_before_the_work(
    command: str, places: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    """Without a network, as `HF_HUB_OFFLINE=1` has it: at once, and with the name."""
    for words in UNKNOWN[command]:
        args = [*command.split(), *(word.format(**places) for word in words.split())]
        begun = time.monotonic()
        assert main(args) == 2, words
        assert time.monotonic() - begun < 20
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith(f"rto {command.split()[0]}: ")]
        assert len(lines) == 1, said
        assert NOWHERE in lines[0], said
        assert "Traceback" not in said


# --- a signal in the midst of the work

WORK: dict[str, tuple[str, str]] = {
    "run": ("rto.pipeline.Pipeline", "sft"),
    "init": ("rto.cli", "copied"),
    "reproduce": ("rto.studies.reproduce", "run_jobs"),
    **dict.fromkeys(("sft", "prefer", "reward", "train", "export", "inspect"), ("rto.models.loading", "_load")),
    "report": ("rto.report.page", "render"),
    "watch": ("http.server.ThreadingHTTPServer", "serve_forever"),
    "plan": ("rto.planning.command", "plan"),
    "theory": ("rto.theory.__main__", "run_all"),
    "evaluate generate": ("rto.models.loading", "_load"),
    "evaluate judge": ("rto.evaluation.judging.judges", "hold"),
    "evaluate compare": ("rto.evaluation.table.significance", "compare"),
}
"""Command → where it is at work: something within that it calls."""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ALL)
def test_a_signal_ends_a_command_in_one_line(
    command: str,
    signum: signal.Signals,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    owner, name = WORK[command]
    monkeypatch.setattr(pkgutil.resolve_name(owner), name, lambda *args, **kwargs: signal.raise_signal(signum))
    (tmp_path / "out").mkdir()
    words = (WRITERS | {"watch": ["{bad}"], "plan": ["embedded"]})[command][0].format(bad=tmp_path / "out", **places)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = main([*command.split(), *words.split()])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err.splitlines()
    if command == "watch":  # it has no other end
        assert (code, said) == (0, [])
    else:
        assert code == 128 + signum, said
        assert said[-1] == f"rto: stopped by {signum.name}"
        assert not [line for line in said if "Traceback" in line]
