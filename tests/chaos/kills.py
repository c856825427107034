"""Commands that are killed or asked to stop at random moments, and then go on: nothing is lost, nothing is stuck."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from world import QUIET, ROOT, SMALL, STUDY, WORDS, ended, flags, kill_group, of_group, run, start

CLOCK = re.compile("seconds|tokens_per_second|train_runtime|train_samples_per|train_steps_per|total_flos")
"""In the names of what is said of time."""
DATED = ("tstamp", "time_per_example", "price_per_example")
PATIENCE = 120.0
"""Seconds in which a command that was asked to stop has to end, and the rest of its processes."""
TOGETHER = 4
"""Requests that a judge has under way at once."""


@dataclass(frozen=True)
class World:
    """Where a subject finds its inputs.

    Attributes:
        base: a folder of its own.
        models: as of `world.build_models`.
        url: of a judge.
        asked: what the judge was asked, a line a request.
    """

    base: Path
    models: dict[str, str]
    url: str
    asked: Path


@dataclass(frozen=True)
class Subject:
    """A command that is killed.

    Attributes:
        args: of `rto`, by its output folder.
        prepare: makes its inputs, before the first run.
        parts: what is hit: the whole group of processes, the parent alone, one of its workers.
        judged: it asks the judge, and must not ask for what it was told already.
        before: is called in the command's process first.
        weight: of its share of the time.
    """

    args: Callable[[World, Path], list[str]]
    prepare: Callable[[World], None] = lambda world: None
    parts: tuple[str, ...] = ("group",)
    judged: bool = False
    before: Callable[[], None] | None = None
    weight: float = 1.0


# --- subjects


def _study(world: World, out: Path, *more: str) -> list[str]:
    recipe = ROOT / "recipes" / "embedded" / "study.yaml"
    own = {**STUDY, "model": world.models["policy"]}
    return ["reproduce", str(recipe), "--methods", *more, "--output_dir", str(out), *flags(own)]


def _stage(command: str, columns: dict[str, str], *more: str) -> Subject:
    """A command of one stage that saves after each update, and goes on from there."""

    def prepare(world: World) -> None:
        rows = [{name: text.format(word) for name, text in columns.items()} for word in WORDS * 4]
        (world.base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def args(world: World, out: Path) -> list[str]:
        own = [word.format(**world.models) for word in more]
        return [
            *(
                command,
                "--model_name_or_path",
                world.models["policy"],
                "--dataset_name",
                str(world.base / "rows.jsonl"),
            ),
            *("--output_dir", str(out), "--save_steps", "1", "--save_total_limit", "2", "--logging_steps", "1"),
            *("--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--resume_from_checkpoint", "true"),
            *own,
            *QUIET,
        ]

    return Subject(args, prepare)


def _answers(kind: str, count: int) -> list[dict[str, Any]]:
    prompts = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(count)]
    if kind == "alpaca":
        return [{"instruction": text, "dataset": "own"} for text in prompts]
    return [{"question_id": f"q{i}", "turns": [{"content": text}]} for i, text in enumerate(prompts)]


def _generate(kind: str) -> Subject:
    def prepare(world: World) -> None:
        rows = _answers(kind, 64)
        (world.base / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def args(world: World, out: Path) -> list[str]:
        return [
            *("evaluate", "generate", "--model", world.models["policy"], "--temperature", "1.0"),
            *("--benchmark", str(world.base / "prompts.jsonl"), "--output", str(out)),
            *("--max_new_tokens", "48", "--batch_size", "2"),
        ]

    return Subject(args, prepare)


def _judge(kind: str) -> Subject:
    def prepare(world: World) -> None:
        for model in ("ours", "theirs"):
            if kind == "alpaca":
                rows = [
                    {**row, "output": f"{model} {i}", "generator": model} for i, row in enumerate(_answers(kind, 48))
                ]
                (world.base / f"{model}.json").write_text(json.dumps(rows))
            else:
                (world.base / "question.jsonl").write_text(
                    "".join(json.dumps(row) + "\n" for row in _answers(kind, 48))
                )
                path = world.base / "model_answer" / f"{model}.jsonl"
                path.parent.mkdir(exist_ok=True)
                said = [
                    {"question_id": f"q{i}", "model_id": model, "choices": [{"turns": [{"content": f"{model} {i}"}]}]}
                    for i in range(48)
                ]
                path.write_text("".join(json.dumps(row) + "\n" for row in said))

    def args(world: World, out: Path) -> list[str]:
        place, end = (world.base, "json") if kind == "alpaca" else (world.base / "model_answer", "jsonl")
        return [
            *(
                "evaluate",
                "judge",
                "--answers",
                str(place / f"ours.{end}"),
                "--baseline",
                str(place / f"theirs.{end}"),
            ),
            *("--output", str(out), "--judge_model", "judge", "--base_url", world.url, "--concurrency", str(TOGETHER)),
        ]

    return Subject(args, prepare, judged=True)


def _compare() -> Subject:
    def prepare(world: World) -> None:
        judge = _judge("alpaca")
        judge.prepare(world)
        own = [*judge.args(world, world.base / "judged")[:8], "--judge", world.models["reward"]]
        if run(own) != 0:
            raise SystemExit("compare: the answers cannot be judged")

    def args(world: World, out: Path) -> list[str]:
        return ["evaluate", "compare", str(world.base / "judged"), "--output_dir", str(out), "--rounds", "4000"]

    return Subject(args, prepare)


def _inspect() -> Subject:
    def prepare(world: World) -> None:
        rows = [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in WORDS * 4]
        (world.base / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def args(world: World, out: Path) -> list[str]:
        own = ["--dpo_model", world.models["dpo"], "--ref_model", world.models["policy"]]
        return ["inspect", *own, "--dataset_name", str(world.base / "pairs.jsonl"), "--output_dir", str(out)]

    return Subject(args, prepare)


def fork_workers() -> None:
    """Workers take over what is imported, where users' begin by importing it: more of the kills then hit work."""
    multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")  # type: ignore[index]


PAIR = {"prompt": "{}", "chosen": "ba{}", "rejected": "zq"}
SUBJECTS: dict[str, Subject] = {
    "run": Subject(
        lambda world, out: ["run", "--output_dir", str(out), *flags({**SMALL, "model": world.models["policy"]})]
    ),
    "sft": _stage("sft", {"prompt": "{}", "completion": "{0}{0}"}),
    "prefer": _stage("prefer", PAIR),
    "reward": _stage("reward", PAIR),
    "update": _stage(
        "train",
        {"prompt": "{}"},
        *("--dpo_model", "{dpo}", "--reward_funcs", "{reward}", "--value_model", "{reward}"),
        *("--max_completion_length", "16", "--num_mini_batches", "2", "--num_ppo_epochs", "2"),
    ),
    "study": Subject(lambda world, out: _study(world, out, "RTO", "--seeds", "1")),
    "study-jobs": Subject(
        lambda world, out: _study(world, out, "RTO", "R-DPO", "--seeds", "1", "--jobs", "2"),
        parts=("group", "parent", "worker"),
        before=fork_workers,
    ),
    "study-spawned": Subject(
        lambda world, out: _study(world, out, "DPO", "R-DPO", "--seeds", "1", "--jobs", "2"),
        parts=("group", "parent", "worker"),
        weight=4.0,  # its workers begin by importing, after every kill
    ),
    "generate-alpaca": _generate("alpaca"),
    "generate-arena": _generate("arena"),
    "judge-alpaca": _judge("alpaca"),
    "judge-arena": _judge("arena"),
    "compare": _compare(),
    "inspect": _inspect(),
}


# --- the judge


@contextmanager
def judging(asked: Path, answer: Callable[[Any, dict, int], None] | None = None) -> Iterator[str]:
    """A judge in a process of its own, which ends with this one; its address.

    Args:
        asked: where it notes what it was asked.
        answer: what it does, as of `judge_server`; else it says what depends on the question alone.
    """
    read, write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if not child:
        from judge_server import JudgeServer, completion

        def behave(handler: Any, body: dict, n: int) -> None:
            words = json.dumps(body, sort_keys=True)
            with asked.open("a") as file:
                file.write(json.dumps(words) + "\n")
            time.sleep(0.02)
            draw = random.Random(words)
            if body.get("logprobs"):
                handler.say(completion("m", {"m": -draw.random(), "M": -draw.random()}))
            else:
                handler.say(completion(f"My verdict is [[{draw.choice(['A>>B', 'A>B', 'A=B', 'B>A', 'B>>A'])}]]"))

        server = JudgeServer(answer or behave)
        with server:
            os.write(write, server.url.encode())
            while os.getppid() == parent:
                time.sleep(0.2)
        os._exit(0)
    try:
        yield os.read(read, 200).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def asked_again(asked: Path) -> int:
    """Requests that had been made before."""
    lines = asked.read_text().split("\n")[:-1] if asked.is_file() else []
    return len(lines) - len(set(lines))


# --- what a command leaves


def left(folder: Path) -> dict[str, Any]:
    """What a command has left, without what a clock wrote."""
    return {
        str(path.relative_to(folder)): read(path)
        for path in sorted(folder.rglob("*"))
        if (read := reader_of(path)) is not None and path.is_file()
    }


def reader_of(path: Path) -> Callable[[Path], Any] | None:
    """How a file is compared; None for one that says how a run went: times, places, attempts."""
    if path.suffix == ".safetensors":
        return None if "_ref_log_probs" in path.name else Path.read_bytes
    if path.name in ("done.json", "run.json", "complete.json", "attempt.json", "trainer_state.json"):
        return None
    if path.suffix == ".jsonl":
        return lambda path: sorted_rows(path) if path.name == "judge_cache.jsonl" else rows_of(path)
    if path.suffix == ".json":
        return lambda path: timeless(json.loads(path.read_text()))
    if path.name in ("report.md", "compare.md"):
        return lambda path: re.sub(r"\| *[\d.,]+ (s|min|h)[^|]*(?=\|)", "| ", path.read_text())
    return None


def rows_of(path: Path) -> list[Any]:
    return [timeless(json.loads(line)) for line in path.read_text().split("\n")[:-1]]


def sorted_rows(path: Path) -> list[str]:
    """Of a cache: answers come in any order, and one that was under way at a kill may stand there twice."""
    return sorted({json.dumps(row, sort_keys=True) for row in rows_of(path)})


def timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if not CLOCK.search(k) and k not in DATED}
    return [timeless(x) for x in tree] if isinstance(tree, list) else tree


# --- kills


@dataclass
class Campaign:
    """Kill one subject again and again until there were enough, or the time is over.

    ``counts`` holds: tried (signals that hit a command at work), of each signal and part; ended (runs that came to
    their end), lost (those that differ from the undisturbed run's), stuck (commands that did not go on or did not
    stop, processes that stayed), unsaid (a stop without its line).
    """

    name: str
    subject: Subject
    world: World
    draw: random.Random

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.out, self.log = self.world.base / "out", self.world.base / "log"

    def run(self, count: int, deadline: float) -> Counter[str]:
        """The counts.

        Raises:
            SystemExit: the command fails undisturbed.
        """
        self.subject.prepare(self.world)
        begun = time.monotonic()
        code = self._attempt(600)
        if code != 0:
            raise SystemExit(f"{self.name}: the command fails undisturbed:\n{self.log.read_text()[-2000:]}")
        length, expected = time.monotonic() - begun, left(self.out)
        if not expected:
            raise SystemExit(f"{self.name}: the command leaves nothing to compare")
        self.out = self.world.base / "same"
        while self.counts["tried"] < count and time.monotonic() < deadline:
            self.world.asked.unlink(missing_ok=True)
            code, hits = self._until_ended(count, deadline, length)
            if code == 0:
                self._compare(expected, hits)
            shutil.rmtree(self.out, ignore_errors=True)
        return self.counts

    def _until_ended(self, count: int, deadline: float, length: float) -> tuple[int | None, int]:
        """Kill the command, go on, kill it again, until it ends; its exit code, and how often it was hit."""
        attempt = hits = 0
        while True:
            enough = self.counts["tried"] >= count or time.monotonic() > deadline
            patience = 600 if enough else self.draw.uniform(0.0, min(1.0, 0.15 * (1 + attempt / 8)) * length)
            child = self._start(wait=not enough)
            code = ended(child, patience)
            attempt += 1
            if code is None and not enough:
                self.counts["tried"] += 1
                hits += 1
                self._hit(child)
                continue
            if code != 0:
                self._tell("stuck", f"the same command does not go on, exit code {code}")
                if code is None:
                    kill_group(child)
            return code, hits

    def _start(self, *, wait: bool) -> int:
        """Begin the command; where it has workers, come back when they are at work."""
        child = start(self.subject.args(self.world, self.out), self.log, before=self.subject.before)
        begun = time.monotonic()
        while wait and len(self.subject.parts) > 1 and time.monotonic() < begun + 60:
            if not of_group(child) or any(p.stat().st_mtime > time.time() - 0.5 for p in self.out.rglob("log.jsonl")):
                break
            time.sleep(0.05)
        return child

    def _attempt(self, seconds: float) -> int | None:
        return ended(self._start(wait=False), seconds)

    def _hit(self, child: int) -> None:
        part = self.draw.choice(self.subject.parts)
        signum = self.draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        workers = [p for p in of_group(child) if p != child and "resource_tracker" not in command_of(p)]
        if part == "worker" and workers:
            signum = signal.SIGKILL
            os.kill(self.draw.choice(workers), signum)
        elif part == "parent" or signum == signal.SIGTERM:  # as `kill PID` does; Ctrl-C reaches the group
            part = "parent"
            os.kill(child, signum)
        else:
            part = "group"
            os.killpg(child, signum)
        self.counts[f"{signal.Signals(signum).name} {part}" if len(self.subject.parts) > 1 else signum.name] += 1
        code = ended(child, PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while code is not None and (rest := of_group(child)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if code is None or rest:
            what = "the command does not end" if code is None else "processes stay"
            self._tell("stuck", f"{what} after {signal.Signals(signum).name} to the {part}")
            for process in of_group(child):
                os.kill(process, signal.SIGKILL)
            if code is None:
                os.waitpid(child, 0)
            return
        said = self.log.read_text(errors="replace")
        if "Traceback (most" in said:
            self._tell("unsaid", f"a traceback after {signal.Signals(signum).name} to the {part}, exit code {code}")
        elif signum != signal.SIGKILL and code not in (0, 128 + signum, -signum):
            self._tell("unsaid", f"exit code {code} after {signal.Signals(signum).name} to the {part}")

    def _compare(self, expected: dict[str, Any], hits: int) -> None:
        found = left(self.out)
        differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        self.counts["ended"] += 1
        if differ:
            self._tell("lost", f"differs from the undisturbed run: {differ[:5]}")
            for name in differ[:2]:
                print(f"  {name}: {str(expected.get(name))[-700:]}\n  and here: {str(found.get(name))[-700:]}")
        if self.subject.judged and (again := asked_again(self.world.asked)) > hits * TOGETHER:
            self._tell("lost", f"{again} answers were asked for again after {hits} kills")

    def _tell(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        said = self.log.read_text(errors="replace")
        at = said.find("Traceback (most")
        print(f"{self.name}: {what}\n{said[-1500:] if at < 0 else said[max(at - 300, 0) : at + 2500]}", flush=True)


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""
