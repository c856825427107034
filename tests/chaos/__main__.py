"""Kills at random moments, and malformed inputs: what is tried, what comes through, what is lost.

usage: python tests/chaos [--kills N] [--inputs N] [--seconds S] [--seed N]

A kill is SIGKILL of a whole process group at a moment drawn from ``--seed``; the same command then goes on, and is
killed again, until it ends. What it leaves must be what the command leaves when nobody disturbs it: weights byte by
byte, logs but for the clock, results. An input is a file or flag that was spoilt; the command must end by itself, with
exit code 0 where the rest could be used, or 2 and one line that names the file or the flag. Exit code 1 when
anything is lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import torch

from rto.cli import main as rto
from rto.studies import reproduce  # noqa: F401  (and with it everything that a command imports)

torch.set_num_threads(1)
CLOCK = ("seconds", "tokens_per_second", "train_runtime", "train_samples_per", "train_steps_per", "total_flos")
ROOT = Path(__file__).parents[2]
SMALL = {
    "data.demonstrations.rows": 32,
    "data.pair_prompts.rows": 16,
    "data.prompts.rows": 16,
    "data.test_prompts.rows": 4,
    "completion_length": 8,
    "train.per_device_train_batch_size": 8,
    "train.num_mini_batches": 2,
    "prefer.per_device_train_batch_size": 8,
    "reward.per_device_train_batch_size": 8,
    "sft.per_device_train_batch_size": 16,
}
STUDY = {
    **SMALL,
    "data.validation_prompts.rows": 4,
    "study.fractions": "[]",
    "study.scaled": "[]",
    "study.comparisons": "{}",
    "study.tune": "null",
}


def flags(settings: dict[str, Any]) -> list[str]:
    return [x for key, value in settings.items() for x in (f"--{key}", str(value))]


# --- one command in a process of its own


def start(args: list[str], log: Path) -> int:
    """The command in a forked process group; its id. Everything is imported already, so that kills hit work."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 70
    try:
        code = rto(args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 2
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def end(child: int, seconds: float) -> int | None:
    """The exit code, or None after a kill when the time is over."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


# --- kills


def left(folder: Path) -> dict[str, Any]:
    """What a command has left, without what a clock wrote."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors" and "_ref_log_probs" not in name:
            found[name] = path.read_bytes()
        elif path.name in ("log.jsonl", "completions.jsonl"):
            rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            found[name] = [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]
        elif path.name in ("results.json", "test_prompts.json", "pairs.jsonl"):
            found[name] = without_clock(json.loads(path.read_text())) if path.suffix == ".json" else path.read_text()
    return found


def without_clock(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: without_clock(v) for k, v in tree.items() if "seconds" not in k}
    return [without_clock(x) for x in tree] if isinstance(tree, list) else tree


def kills(
    subject: str, args: Callable[[Path], list[str]], count: int, deadline: float, draw: random.Random
) -> Counter:
    """Kill a command again and again until it has ended, and compare; and anew, until there were enough."""
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory(prefix="rto-chaos-") as place:
        base = Path(place)
        begin = time.time()
        code = end(start(args(base / "whole"), base / "whole.log"), 600)
        if code != 0:
            raise SystemExit(f"{subject}: the command fails undisturbed:\n{(base / 'whole.log').read_text()[-2000:]}")
        length, expected = time.time() - begin, left(base / "whole")
        while counts["tried"] < count and time.time() < deadline:
            folder, attempt = base / "out", 0
            while True:
                enough = counts["tried"] >= count or time.time() > deadline
                patience = 600 if enough else draw.uniform(0.0, min(1.0, 0.15 * (1 + attempt / 8)) * length)
                code = end(start(args(folder), base / "out.log"), patience)
                attempt += 1
                if code is None and not enough:
                    counts["tried"] += 1
                    continue
                if code != 0:
                    counts["stuck"] += 1
                    print(f"{subject}: stuck: {(base / 'out.log').read_text()[-600:]}")
                break
            if code == 0:
                found = left(folder)
                differ = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
                counts["lost"] += bool(differ)
                counts["ended"] += 1
                if differ:
                    print(f"{subject}: differs from the undisturbed run: {differ[:5]}")
            shutil.rmtree(folder, ignore_errors=True)
    return counts


# --- malformed inputs

WORDS = ["ab", "cab", "back", "abacus", "crab", "dab", "fable", "garb"]
VALUES = [
    None,
    0,
    -1,
    3.5,
    "",
    "\x00",
    "\ud83d",
    [],
    {},
    [[]],
    [{}],
    {"role": 3},
    [{"role": "user"}],
    True,
    "ab" * 300,
]


def model_folder(folder: Path) -> str:
    from rto.demo.embedded import build

    for part in build(0):
        part.save_pretrained(folder)
    return str(folder)


def spoilt(rows: list[dict], draw: random.Random) -> bytes:
    """A file of rows with one kind of damage."""
    rows = json.loads(json.dumps(rows))
    row = draw.choice(rows)
    match draw.randrange(8):
        case 0:
            row[draw.choice(list(row))] = draw.choice(VALUES)
        case 1:
            del row[draw.choice(list(row))]
        case 2:
            row[draw.choice(["more", "label", "tools", "chosen", "prompt"])] = draw.choice(VALUES)
        case 3:
            rows = draw.choice([[], rows[:1], [row] * 3, [{}] * 4])
        case _:
            pass
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    match draw.randrange(6):
        case 0 if data:
            data = data[: draw.randrange(len(data))]
        case 1 if data:
            at = draw.randrange(len(data))
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        case 2:
            data = draw.choice([b"\xff\xfe", b"\xef\xbb\xbf", b"[", b"{}\n", b"null\n", b"\x1f\x8b"]) + data
        case _:
            pass
    return data


def inputs(count: int, deadline: float, draw: random.Random) -> Counter:
    """Commands on spoilt files and flags."""
    counts: Counter = Counter()
    kinds: dict[str, list[dict]] = {
        "sft": [{"prompt": w, "completion": w + w} for w in WORDS],
        "prefer": [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in WORDS],
        "reward": [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in WORDS],
        "train": [{"prompt": w} for w in WORDS],
    }
    own = {"train": ["--dpo_coef", "0", "--score_coef", "0", "--max_completion_length", "4"]}
    wrong = [
        *(["--learning_rate", x] for x in ("nan", "-1", "much", "inf")),
        *(["--max_steps", x] for x in ("1.5", "one")),
        *(["--per_device_train_batch_size", x] for x in ("0", "-3", "2.5")),
        *([flag, x] for flag in ("--model_name_or_path", "--config", "--dataset_name") for x in ("nowhere", "", "/")),
        *(["--resume_from_checkpoint", x] for x in ("nowhere", "/")),
        ["--no_such_flag", "1"],
    ]
    with tempfile.TemporaryDirectory(prefix="rto-chaos-") as place:
        base = Path(place)
        model = model_folder(base / "model")
        common = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--max_steps", "1"]
        while counts["tried"] < count and time.time() < deadline:
            command = draw.choice(list(kinds))
            path = base / "rows.jsonl"
            path.write_bytes(spoilt(kinds[command], draw))
            args = [command, "--model_name_or_path", model, "--dataset_name", str(path), *common]
            args += ["--output_dir", str(base / "out"), *own.get(command, [])]
            if draw.random() < 0.2:
                path.write_text("".join(json.dumps(row) + "\n" for row in kinds[command]))
                args += draw.choice(wrong)
            code = end(start(args, base / "log"), 60)
            said = (base / "log").read_text(errors="replace")
            counts["tried"] += 1
            counts["used" if code == 0 else "refused" if code == 2 else "failed"] += 1
            bad = "Traceback (most" in said or code not in (0, 2)
            if code == 2 and not bad:
                lines = [line for line in said.split("\n") if line.startswith(f"rto {command}: ")]
                bad = len(lines) != 1 and "usage:" not in said
            if bad:
                counts["time-outs" if code is None else "tracebacks or no line"] += 1
                print(f"{' '.join(args)}\n{path.read_bytes()[:300]!r}\n{said[-900:]}\n")
            shutil.rmtree(base / "out", ignore_errors=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1800, help="stop begun work's kills after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["run", "study"], help="kill this alone")
    given = parser.parse_args()
    draw, begun = random.Random(given.seed), time.time()
    study = ROOT / "recipes" / "embedded" / "study.yaml"
    subjects: dict[str, Callable[[Path], list[str]]] = {
        "run": lambda out: ["run", "--output_dir", str(out), *flags(SMALL)],
        "study": lambda out: [
            *("reproduce", str(study), "--methods", "RTO", "--seeds", "1"),
            *("--output_dir", str(out), *flags(STUDY)),
        ],
    }
    subjects = {name: args for name, args in subjects.items() if given.only in (None, name)}
    failed = False
    for i, (name, args) in enumerate(subjects.items(), 1) if given.kills else ():
        share = 0.7 * given.seconds * i / len(subjects) if given.inputs else given.seconds * i / len(subjects)
        found = kills(name, args, given.kills // len(subjects), begun + share, draw)
        counts = f"{found['tried']} kills, {found['ended']} runs ended, {found['stuck']} stuck, {found['lost']} lost"
        print(f"{name}: {counts}")
        failed |= bool(found["stuck"] or found["lost"])
    if given.inputs:
        found = inputs(given.inputs, begun + given.seconds, draw)
        print(f"inputs: {dict(sorted(found.items()))}")
        failed |= any(name not in ("tried", "used", "refused") for name in found)
    print(f"seed {given.seed}, {time.time() - begun:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
