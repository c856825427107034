"""Malformed inputs: what can be spoilt × the formats and commands that read it, each with what a refusal has to name.

An `Input` is written into an empty folder and read by one command there. The command ends by itself: with exit code 0
where the rest can be used, or 2 and one line that names the file and the row, or the key.
"""

import contextlib
import csv
import gzip
import io
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import yaml
from datasets import Dataset
from world import QUIET, SMALL, WORDS, ended, flags, kill_group, run, start

from rto.recipe import EMBEDDED

PATIENCE = 90.0
"""Seconds for one command."""


@dataclass(frozen=True)
class Input:
    """One command on something that was spoilt.

    Attributes:
        name: kind / what was done / by what it is read.
        write: writes the files into a folder and returns the arguments of `rto`.
        says: groups of words; of each group a refusal must have one.
        used: whether the command may do without what was spoilt.
        check_only: the command is stopped where a recipe's first stage would begin.
    """

    name: str
    write: Callable[[Path], list[str]]
    says: tuple[tuple[str, ...], ...]
    used: bool = True
    check_only: bool = False


def lines(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- mutations


VALUES: list[Any] = [
    *(None, True, 0, -1, 3.5, float("nan"), 10**30, "", " ", "\x00", "\ud83d", "<eos>", "ab" * 400),
    *([], {}, [[]], [{}], [None], {"role": 3}, [{"role": "user"}], [{"role": "user", "content": None}]),
    *([{"role": "user", "content": [{"type": "image"}]}], [{"role": 3, "content": "ab"}], {"content": "ab"}),
]
"""In place of a text or a conversation."""


def spoilt_bytes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file with damage that has nothing to do with what it holds."""
    for share in (0.0, 0.1, 0.5, 0.9):
        yield f"cut at {share:.0%}", data[: int(share * len(data))]
    yield "last byte lost", data[:-1]
    for share in (0.0, 0.3, 0.6, 0.95):
        at = int(share * (len(data) - 1))
        yield f"byte at {share:.0%} flipped", data[:at] + bytes([data[at] ^ 0xA5]) + data[at + 1 :]
    for name, head in {"UTF-8 mark": b"\xef\xbb\xbf", "UTF-16 mark": b"\xff\xfe", "gzip's head": b"\x1f\x8b"}.items():
        yield f"{name} before it", head + data
    yield "NUL within", data[: len(data) // 2] + b"\x00" + data[len(data) // 2 :]
    yield "[ before it", b"[" + data
    yield "null before it", b"null\n" + data
    yield "itself twice", data + data
    yield "garbage after it", data + b"}{]["
    yield "deep nesting", b"[" * 100_000
    yield "noise", random.Random(0).randbytes(400)


def spoilt_trees(tree: Any, values: Iterable[Any], at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place of a JSON tree × every value in its stead, or nothing; the place, and the whole tree then."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        gone = {k: v for k, v in tree.items() if k != key} if isinstance(tree, dict) else [x for x in tree if 0]
        yield (*at, key, "gone"), gone
        for value in values:
            whole = dict(tree) if isinstance(tree, dict) else list(tree)
            whole[key] = value
            yield (*at, key, repr(value)[:24]), whole
        for path, below in spoilt_trees(tree[key], values, (*at, key)):
            whole = dict(tree) if isinstance(tree, dict) else list(tree)
            whole[key] = below
            yield path, whole


# --- rows, in every format


def as_table(rows: list[dict], delimiter: str) -> bytes:
    file = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerows([names, *([row.get(name, "") for name in names] for row in rows)])
    return file.getvalue().encode(errors="surrogatepass")


def as_parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    pa.parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), file)
    return file.getvalue()


FORMATS: dict[str, Callable[[list[dict]], bytes]] = {
    "jsonl": lines,
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": lambda rows: as_table(rows, ","),
    "tsv": lambda rows: as_table(rows, "\t"),
    "parquet": as_parquet,
    "jsonl.gz": lambda rows: gzip.compress(lines(rows), mtime=0),
}
PAIRS = [{"prompt": w, "chosen": "ba" + w, "rejected": "zq"} for w in WORDS]
ROWS: dict[str, list[dict]] = {
    "sft": [{"prompt": w, "completion": w + w} for w in WORDS],
    "prefer": PAIRS,
    "prefer unpaired": [{"prompt": w, "completion": "ba", "label": bool(i % 2)} for i, w in enumerate(WORDS)],
    "reward": PAIRS,
    "train": [{"prompt": w} for w in WORDS],
    "inspect": PAIRS,
}
AT = 5
"""The row that is spoilt."""


def stage(models: dict[str, str], command: str, rows: str, *more: str, **roles: str) -> list[str]:
    """The arguments of a command of one stage, for one step; ``roles`` puts other folders in the place of its own."""
    model = roles.get("model", models["policy"])
    if command == "inspect":
        own = ["--dpo_model", roles.get("dpo_model", models["dpo"]), "--ref_model", roles.get("ref_model", model)]
        return ["inspect", *own, "--dataset_name", rows, "--output_dir", "out", *more]
    args = [command.split()[0], "--model_name_or_path", model, "--dataset_name", rows, "--output_dir", "out"]
    args += ["--max_steps", "1", "--per_device_train_batch_size", "4", "--save_strategy", "no", *QUIET]
    if command == "prefer unpaired":
        args += ["--loss", "kto"]
    if command == "train":
        own = {"dpo_model": "dpo", "reward_funcs": "reward", "value_model": "reward", "ref_model": "policy"}
        args += [x for flag, name in own.items() for x in (f"--{flag}", roles.get(flag, models[name]))]
        args += ["--max_completion_length", "4"]
    elif "ref_model" in roles:
        args += ["--ref_model", roles["ref_model"]]
    return [*args, *more]


def data(models: dict[str, str]) -> Iterator[Input]:
    """Rows × mutations × formats × commands."""

    def of(name: str, command: str, file: str, content: bytes, *where: str) -> Input:
        def write(folder: Path) -> list[str]:
            (folder / file).write_bytes(content)
            return stage(models, command, file)

        says = ((file,), where) if where else ((file,),)
        return Input(f"data/{name}/{file} by {command}", write, says)

    row = (f"row {AT}", f"line {AT + 1}", f"line {AT + 2}")  # a table has its columns' names in line 1
    for command, rows in ROWS.items():
        for form, encode in FORMATS.items():
            file, columns = f"rows.{form}", list(rows[0])
            cases: dict[str, tuple[list[dict], tuple[str, ...]]] = {}
            for column in columns:
                for value in VALUES:
                    one = [{**r, column: value} if i == AT else r for i, r in enumerate(rows)]
                    cases[f"{column} {value!r:.24}"] = one, row
                    cases[f"{column} {value!r:.24} everywhere"] = (
                        [{**r, column: value} for r in rows],
                        ("row 0", column, "line 1", "line 2"),
                    )
                cases[f"{column} gone"] = (
                    [{k: v for k, v in r.items() if k != column or i != AT} for i, r in enumerate(rows)],
                    row,
                )
                cases[f"{column} gone everywhere"] = (
                    [{k: v for k, v in r.items() if k != column} for r in rows],
                    (column, "column"),
                )
                cases[f"{column} named otherwise"] = (
                    [{f"{k}s" if k == column else k: v for k, v in r.items()} for r in rows],
                    (column, "column"),
                )
            for extra in ("label", "tools", "chat_template_kwargs", "prompt_ids"):
                for value in (3, "x", [1], {"a": [None]}):
                    cases[f"{extra} {value!r:.24} beside"] = [{**r, extra: value} for r in rows], ("row 0", extra)
            for i, other in enumerate(([], rows[:1], [{}] * 4, [3], [None, *rows], [rows])):
                cases[f"other rows {i}"] = other, ()  # type: ignore[assignment]
            for name, (spoilt, where) in cases.items():
                try:
                    content = encode(spoilt)
                except (pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
                    continue  # a format cannot hold it
                yield of(name, command, file, content, *where)
            for name, content in spoilt_bytes(encode(rows)):
                yield of(name, command, file, content)
    for command, rows in ROWS.items():

        def write(
            folder: Path, command: str = command, rows: list[dict] = rows, *, spoil: str = "", cut: bool = True
        ) -> list[str]:
            Dataset.from_list(rows).save_to_disk(folder / "saved")
            for path in (folder / "saved").glob(spoil):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if cut else 0])
            return stage(models, command, "saved")

        for spoil in ("state.json", "dataset_info.json", "*.arrow"):
            for cut in (True, False):
                yield Input(
                    f"data/{spoil} {'cut' if cut else 'empty'}/saved folder by {command}",
                    lambda folder, write=write, spoil=spoil, cut=cut: write(folder, spoil=spoil, cut=cut),
                    (("saved",),),
                )


# --- recipes

WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    0.5,
    10**12,
    float("nan"),
    float("inf"),
    "",
    "much",
    "${RTO_NOT_SET}",
    [],
    [3],
    {},
    {"x": 1},
]


def recipes(models: dict[str, str]) -> Iterator[Input]:
    """Every key of a recipe × wrong values, other keys, and a file that is no recipe."""
    tree = yaml.safe_load(EMBEDDED.read_text())
    for key, value in SMALL.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place[parent]
        place[last] = value
    tree["model"] = models["policy"]
    tree["peft"] = {"r": 2, "lora_alpha": 4}
    tree["study"] = {
        "seeds": 1,
        "baseline": "PPO",
        "comparisons": {"a question": ["RTO", "PPO"]},
        "tune": {"factors": [1.0], "seed": 5},
    }
    tree["data"]["validation_prompts"] = {**tree["data"]["test_prompts"], "split": "validation"}
    tree["learners"] = {"DPO": {}, "R-DPO": {"loss": "rdpo", "loss_kwargs": {"beta": 0.1, "alpha": 0.001}}}

    def of(name: str, content: bytes | dict, *where: str) -> Input:
        def write(folder: Path) -> list[str]:
            (folder / "recipe.yaml").write_bytes(written(content) if isinstance(content, dict) else content)
            return ["run", "recipe.yaml", "--output_dir", "out"]

        return Input(
            f"recipe/{name}/run", write, (("recipe.yaml", "data.", "model "), where or ("",)), check_only=True
        )

    def written(tree: Any) -> bytes:
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()

    for place, spoilt in spoilt_trees(tree, WRONG):
        keys = [str(k) for k in place[:-1] if not isinstance(k, int)]
        yield of(".".join(map(str, place)), spoilt, *keys[-2:], *keys[:1], "RTO_NOT_SET")
    for key in (
        "gamma",
        "Seed",
        "data.x",
        "train.gama",
        "sft.max_len",
        "methods.RTO.x",
        "study.seedz",
        "peft.rank",
        "12",
    ):
        spoilt = json.loads(json.dumps(tree))
        *parents, last = key.split(".")
        here = spoilt
        for parent in parents:
            here = here[parent]
        here[last] = 1
        yield of(f"further key {key}", written(spoilt), last)
    for name, content in spoilt_bytes(written(tree)):
        yield of(name, content)
    for text in (
        "a: [",
        "- a",
        "a: 1\na: 2",
        "\ta: 1",
        "? [a]\n: 1",
        "a: !!python/object:os.system x",
        "*a",
        "&a [*a]",
        "base: recipe.yaml",
        "base: 3",
        "base: nowhere.yaml",
        "3",
        "null",
        "",
    ):
        yield of(f"text {text!r}", text.encode())


# --- the command line

BAD = ["", " ", "nan", "inf", "-1", "0", "0.5", "1e999", "much", "[", "{}", "null", "true", "nowhere.json", "\udcff"]
UNSAFE = ("push_to_hub", "help", "torch_compile")
"""What begins so reaches for the net, or for minutes of compilation."""


@cache
def known_flags(command: str) -> list[str]:
    """What a command's help lists."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        for page in ("--help", "--help-all"):  # the second where there is one
            run([*command.split(), page])
    text = said.getvalue()
    found = {name for name in re.findall(r"(?<![\w-])--([a-z]\w+)(?![\w-])", text) if not name.startswith(UNSAFE)}
    return sorted(f"--{name}" for name in found)


def command_line(models: dict[str, str]) -> Iterator[Input]:
    """Every flag of every command × wrong values, and words that are no flags."""
    whole = {
        **{
            command: stage(models, command, "rows.jsonl")
            for command in ("sft", "prefer", "reward", "train", "inspect")
        },
        "evaluate generate": evaluation_args(models, "generate"),
        "evaluate judge": [*evaluation_args(models, "judge"), "--judge", models["reward"]],
        "evaluate compare": evaluation_args(models, "compare"),
        "run": ["run", "--output_dir", "out", "--model", models["policy"]],
        "reproduce": ["reproduce", "recipe.yaml", "--output_dir", "out"],
        "plan": ["plan", "recipe.yaml", "--config", f"policy={models['policy']}"],
        "export": ["export", "--model_name_or_path", models["adapter"], "--output_dir", "out"],
        "report": ["report", "."],
        "theory": ["theory"],
    }

    def of(command: str, words: list[str], *where: str) -> Input:
        def write(folder: Path) -> list[str]:
            evaluation_files(folder, "alpaca")
            (folder / "rows.jsonl").write_bytes(lines(ROWS.get(command, ROWS["train"])))
            shutil.copy(EMBEDDED, folder / "recipe.yaml")
            return [*whole[command], *words]

        only = command in ("run", "reproduce")
        return Input(f"flag/{' '.join(words)!r:.60}/{command}", write, (where,), check_only=only)

    for command in whole:
        found = known_flags(command) if command != "run" else [f"--{key}" for key in SMALL]
        for flag in found:
            if command == "theory":
                continue  # it has no checks before its work
            for value in BAD:
                yield of(command, [flag, value], flag[2:], value or flag, ascii(value))
            yield of(command, [flag], flag[2:])
        for words in (
            ["--no_such_flag", "1"],
            ["--seed"],
            ["word"],
            ["--", "x"],
            ["-x"],
            ["--=3"],
            ["--seed=", "--seed=x"],
            ["--config", "nowhere.yaml"],
            ["--config", "rows.jsonl"],
        ):
            yield of(command, words, "")
    for words in (
        [""],
        ["runn"],
        ["evaluate", "jugde"],
        ["evaluate"],
        ["--version", "x"],
        ["run", "nowhere.yaml"],
        ["run", "."],
        ["plan"],
        ["report", "nowhere"],
        ["reproduce", "nowhere"],
        ["export"],
    ):
        yield Input(f"flag/{' '.join(words)}/rto", lambda folder, words=words: list(words), (("",),), check_only=True)


# --- model folders


READERS: dict[str, tuple[str, str, str]] = {
    "sft": ("policy", "sft", "model"),
    "prefer": ("policy", "prefer", "model"),
    "train": ("policy", "train", "model"),
    "train --dpo_model": ("dpo", "train", "dpo_model"),
    "train --ref_model": ("policy", "train", "ref_model"),
    "train --reward_funcs": ("reward", "train", "reward_funcs"),
    "train --value_model": ("reward", "train", "value_model"),
    "prefer --ref_model": ("policy", "prefer", "ref_model"),
    "inspect --dpo_model": ("dpo", "inspect", "dpo_model"),
    "reward": ("policy", "reward", "model"),
    "prefer, an adapter": ("adapter", "prefer", "model"),
    "train --dpo_model, an adapter": ("adapter", "train", "dpo_model"),
    "export": ("adapter", "export", "model"),
}
"""Who reads a model's folder: which model, by which command, in which role."""


def model_folders(models: dict[str, str]) -> Iterator[Input]:
    """Files of a model's folder that are missing, cut, damaged or say something else × the commands that read them."""

    def of(name: str, reader: str, file: str, content: bytes | None) -> Input:
        kind = READERS[reader][0] if reader in READERS else "reward" if reader == "judge" else "policy"

        def write(folder: Path) -> list[str]:
            shutil.copytree(models[kind], folder / "bad")
            if content is None:
                (folder / "bad" / file).unlink()
            else:
                (folder / "bad" / file).write_bytes(content)
            if reader == "generate":
                evaluation_files(folder, "alpaca")
                return evaluation_args({**models, "policy": "bad"}, "generate")
            if reader == "judge":
                evaluation_files(folder, "alpaca")
                return [*evaluation_args(models, "judge"), "--judge", "bad"]
            if reader == "run":
                return ["run", "--output_dir", "out", *flags({**SMALL, "model": "bad"})]
            _, command, role = READERS[reader]
            if command == "export":
                return ["export", "--model_name_or_path", "bad", "--output_dir", "out"]
            (folder / "rows.jsonl").write_bytes(lines(ROWS[command]))
            return stage(models, command, "rows.jsonl", **{role: "bad"})

        return Input(f"model/{file} {name}/{reader}", write, (("bad",),), check_only=reader == "run")

    for reader in (*READERS, "generate", "judge", "run"):
        folder = Path(models[READERS[reader][0] if reader in READERS else "reward" if reader == "judge" else "policy"])
        for file in sorted(p.name for p in folder.iterdir()):
            whole = (folder / file).read_bytes()
            yield of("gone", reader, file, None)
            for name, content in spoilt_bytes(whole):
                yield of(name, reader, file, content)
            if file.endswith(".json"):
                tree = json.loads(whole)
                for text in (b"[]", b"null", b"{}", b'"x"', b"3"):
                    yield of(f"is {text.decode()}", reader, file, text)
                shallow = {key: value for key, value in tree.items() if key not in ("model", "added_tokens")}
                for place, spoilt in spoilt_trees(shallow, [None, -1, 0, 1.5, "much", [], {}]):
                    rest = {key: tree[key] for key in tree if key not in shallow}
                    yield of(".".join(map(str, place)), reader, file, json.dumps({**spoilt, **rest}).encode())


# --- sealed checkpoints


def checkpoints(models: dict[str, str], base: Path) -> Iterator[Input]:
    """Files of a sealed checkpoint × damage × ways to name it, of an on-line run and of one on pairs."""
    more = {"train": ["--num_mini_batches", "2"], "prefer": []}
    for command, own in more.items():
        run_dir = base / f"checkpoint-of-{command}"
        run_dir.mkdir()
        (run_dir / "rows.jsonl").write_bytes(lines(ROWS[command]))
        args = stage(
            models, command, "rows.jsonl", *own, "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"
        )
        if ended(start(args, run_dir / "log", run_dir), 300) != 0:
            raise SystemExit(f"{command}: no checkpoint to spoil: {(run_dir / 'log').read_text()[-800:]}")
        files = sorted(
            p.relative_to(run_dir / "out") for p in (run_dir / "out" / "checkpoint-2").rglob("*") if p.is_file()
        )
        for file in files:
            whole = (run_dir / "out" / file).read_bytes()
            cases: dict[str, bytes | None] = {"gone": None, **dict(spoilt_bytes(whole))}
            if file.suffix == ".json":
                cases |= {f"is {text}": text.encode() for text in ("[]", "null", "{}", '"x"', "3")}
            if file.name == "complete.json":
                trees = spoilt_trees(json.loads(whole), [None, -1, "much", [], {}])
                cases |= {".".join(map(str, place)): json.dumps(tree).encode() for place, tree in trees}
            for name, content in cases.items():
                if content == whole:
                    continue  # nothing is spoilt
                for resume in ("true", "out/checkpoint-2"):

                    def write(
                        folder: Path, args=args, file=file, content=content, resume=resume, run_dir=run_dir
                    ) -> list[str]:
                        shutil.copytree(run_dir, folder, dirs_exist_ok=True)
                        path = folder / "out" / file
                        if content is None:
                            path.unlink()
                        else:
                            path.write_bytes(content)
                        return [*args, "--resume_from_checkpoint", resume]

                    unsealed = file.name == "complete.json" and resume == "true"
                    where = ((file.name, "checkpoint-2"),)
                    yield Input(f"checkpoint/{file} {name}/{command} {resume}", write, where, used=unsealed)


# --- evaluation


def alpaca(model: str, count: int = 6) -> list[dict]:
    return [{"instruction": w, "output": f"{model} {w}", "generator": model, "dataset": "own"} for w in WORDS[:count]]


def arena(model: str) -> list[dict]:
    said = [{"index": 0, "turns": [{"content": f"{model} {w}", "token_len": 3}]} for w in WORDS[:6]]
    return [{"question_id": f"q{i}", "answer_id": "a", "model_id": model, "choices": [x]} for i, x in enumerate(said)]


def annotations() -> list[dict]:
    return [
        {
            "instruction": w,
            "output_1": "theirs",
            "generator_1": "theirs",
            "output_2": "ours " + w,
            "generator_2": "ours",
            "annotator": "judge",
            "preference": 1.0 + (i % 3) / 2,
            "is_switched_outputs": False,
        }
        for i, w in enumerate(WORDS)
    ]


def judgments() -> list[dict]:
    verdicts = ["A>>B", "A>B", "A=B", "B>A", "B>>A", None, "A>B", "B>A"]
    games = [
        [{"user_prompt": "", "judgment": "", "score": v}, {"user_prompt": "", "judgment": "", "score": v}]
        for v in verdicts
    ]
    return [{"question_id": f"q{i}", "model": "ours", "judge": "judge", "games": g} for i, g in enumerate(games)]


def evaluation_files(folder: Path, kind: str) -> None:
    """What the commands of `evaluation_args` read."""
    for model in ("ours", "theirs"):
        (folder / f"{model}.json").write_text(json.dumps(alpaca(model)))
    (folder / "prompts.jsonl").write_bytes(lines({"instruction": w} for w in WORDS[:4]))
    (folder / "annotations.json").write_text(json.dumps(annotations()))
    if kind == "arena":
        (folder / "model_answer").mkdir(exist_ok=True)
        for model in ("ours", "theirs"):
            (folder / "model_answer" / f"{model}.jsonl").write_bytes(lines(arena(model)))
        questions = [{"question_id": f"q{i}", "turns": [{"content": w}]} for i, w in enumerate(WORDS[:6])]
        (folder / "question.jsonl").write_bytes(lines(questions))
        (folder / "model_judgment" / "judge").mkdir(parents=True, exist_ok=True)
        (folder / "model_judgment" / "judge" / "ours.jsonl").write_bytes(lines(judgments()))


def evaluation_args(models: dict[str, str], command: str, kind: str = "alpaca") -> list[str]:
    """The arguments of `rto evaluate` on `evaluation_files`."""
    match command, kind:
        case "generate", _:
            prompts = "prompts.jsonl" if kind == "alpaca" else "question.jsonl"
            own = ["--model", models["policy"], "--benchmark", prompts, "--output", "out", "--max_new_tokens", "4"]
        case "judge", "alpaca":
            own = ["--answers", "ours.json", "--baseline", "theirs.json", "--output", "out"]
        case "judge", _:
            own = [
                "--answers",
                "model_answer/ours.jsonl",
                "--baseline",
                "model_answer/theirs.jsonl",
                "--output",
                "out",
            ]
        case _, "alpaca":
            own = ["annotations.json", "--output_dir", "out", "--rounds", "100"]
        case _:
            own = ["model_judgment/judge/ours.jsonl", "--output_dir", "out", "--rounds", "100"]
    return ["evaluate", command, *own]


READ = {
    ("generate", "alpaca"): ["prompts.jsonl"],
    ("generate", "arena"): ["question.jsonl"],
    ("judge", "alpaca"): ["ours.json", "theirs.json"],
    ("judge", "arena"): ["model_answer/ours.jsonl", "model_answer/theirs.jsonl", "question.jsonl"],
    ("compare", "alpaca"): ["annotations.json"],
    ("compare", "arena"): ["model_judgment/judge/ours.jsonl", "model_answer/ours.jsonl", "question.jsonl"],
}


def evaluations(models: dict[str, str], base: Path) -> Iterator[Input]:
    """Files of the benchmarks × damage and wrong values × the commands that read them."""
    for (command, kind), files in READ.items():
        place = base / f"evaluation-{kind}"
        place.mkdir(exist_ok=True)
        evaluation_files(place, kind)
        for file in files:
            whole = (place / file).read_bytes()
            listed = file.endswith("json")
            rows = json.loads(whole) if listed else [json.loads(x) for x in whole.splitlines()]

            def of(name: str, content: bytes | None, *where: str, command=command, kind=kind, file=file) -> Input:
                def write(folder: Path) -> list[str]:
                    evaluation_files(folder, kind)
                    if content is None:
                        (folder / file).unlink()
                    else:
                        (folder / file).write_bytes(content)
                    more = ["--judge", models["reward"]] if command == "judge" else []
                    return [*evaluation_args(models, command, kind), *more]

                name = f"evaluation/{file} {name}/{command}"
                return Input(name, write, ((Path(file).name,), where or ("",)))

            def encode(rows: Any, listed: bool = listed) -> bytes:
                return json.dumps(rows).encode() if listed else lines(rows)

            yield of("gone", None)
            for name, content in spoilt_bytes(whole):
                yield of(name, content)
            at = min(3, len(rows) - 1)
            for where, spoilt in spoilt_trees(
                rows[at], [None, True, -1, 3.5, float("nan"), "", "much", "\ud83d", [], {}, [None]]
            ):
                one = [spoilt if i == at else row for i, row in enumerate(rows)]
                yield of(".".join(map(str, where)), encode(one), f"row {at}", f"line {at + 1}", str(where[0]))
            for value in (None, 3, "x", [], {}):
                one = [value if i == at else row for i, row in enumerate(rows)]
                yield of(f"row is {value!r}", encode(one), f"row {at}", f"line {at + 1}")
            yield of("row twice", encode([*rows, rows[at]]), f"row {len(rows)}", f"row {at}", f"line {at + 1}")
            yield of("no rows", encode([]))
            yield of("one row", encode(rows[:1]))


# --- what a judge says


def judge_answers(models: dict[str, str], base: Path, url: str) -> Iterator[Input]:
    """A judge's answers that are none: the n-th fault of `faults`, asked for by the model's name."""
    for kind in ("alpaca", "arena"):
        for i, (name, _) in enumerate(faults()):

            def write(folder: Path, kind=kind, i=i) -> list[str]:
                evaluation_files(folder, kind)
                own = ["--judge_model", f"fault-{i}", "--base_url", url, "--timeout", "0.5", "--retries", "0"]
                return [*evaluation_args(models, "judge", kind), *own]

            yield Input(f"judge/{name}/{kind}", write, ((f"fault-{i}", url, "judge"),))


@cache
def faults() -> list[tuple[str, Any]]:
    """What a judge may answer, as bytes, as a status, or as a JSON tree."""
    from judge_server import completion

    found: list[tuple[str, Any]] = []
    for words, usual in (("m", completion("m", {"m": -0.1, "M": -2.4})), ("[[A>B]]", completion("so [[A>B]]"))):
        trees = spoilt_trees(usual, [None, True, -1, float("nan"), 10**400, "", "\ud83d", [], {}, [None], "ab" * 9999])
        found += [(f"{words} {'.'.join(map(str, place))}", tree) for place, tree in trees]
        found += [(f"{words} {name}", content) for name, content in spoilt_bytes(json.dumps(usual).encode())]
    found += [(f"status {status}", status) for status in (204, 301, 400, 401, 404, 413, 429, 500, 503, 599)]
    found += [(act, act) for act in ("half", "hang_up", "drip")]
    found += [
        (f"says {text!r:.20}", completion(text))
        for text in ("", "[[C]]", "[[A>B]] [[B>A]]", "\x1b[2J", "m" * 99, "[[")
    ]
    found += [(f"candidates {x}", completion("m", x)) for x in ({"x": -0.1}, {"m": 5.0}, {"m": float("-inf")})]
    return found


def misbehave(handler: Any, body: dict, n: int) -> None:
    """The fault that a request's model names."""
    from judge_server import completion

    fault = faults()[int(body["model"].split("-")[1])][1]
    if isinstance(fault, int):
        handler.say({"error": {"message": "no"}}, status=fault)
    elif fault == "drip":
        handler.drip(2.0)
    elif isinstance(fault, str):
        getattr(handler, fault)()
    else:
        handler.say(fault if fault else completion(""))


# --- all of them


def every_input(models: dict[str, str], base: Path, url: str) -> dict[str, list[Input]]:
    """By kind, in an order of no meaning."""
    return {
        "data": list(data(models)),
        "recipe": list(recipes(models)),
        "flag": list(command_line(models)),
        "model": list(model_folders(models)),
        "checkpoint": list(checkpoints(models, base)),
        "evaluation": list(evaluations(models, base)),
        "judge": list(judge_answers(models, base, url)),
    }


def drawn(found: dict[str, list[Input]], count: int, draw: random.Random) -> list[Input]:
    """As many of each kind as there are, up to ``count`` in all."""
    orders = {kind: draw.sample(inputs, len(inputs)) for kind, inputs in found.items() if inputs}
    chosen: list[Input] = []
    while len(chosen) < count and orders:
        for kind in list(orders):
            if len(chosen) < count:
                chosen.append(orders[kind].pop())
            if not orders[kind]:
                del orders[kind]
    return chosen


def verdict(given: Input, args: list[str], code: int | None, said: str) -> str | None:
    """What is wrong with how a command ended; None where nothing is."""
    if code is None:
        return "time-outs"
    if "Traceback (most" in said or code not in (0, 2):
        return "tracebacks"
    if code == 0:
        return None if given.used else "accepted"
    told = [line for line in said.splitlines() if re.match(rf"rto( {re.escape(args[0] if args else '')})?: ", line)]
    if len(told) != 1 and not said.startswith("usage:"):
        return "without a line"
    line = told[0] if told else said
    return None if all(any(words in line for words in group) for group in given.says) else "unnamed"


def stop_before_stages() -> None:
    """A recipe that passes its checks ends there."""
    from rto.pipeline import Pipeline

    def stop(self: Any) -> None:
        raise SystemExit(0)

    Pipeline.sft = stop  # type: ignore[method-assign]


def attempt(given: Input, folder: Path) -> tuple[str | None, int | None, str]:
    """Run one input in a process of its own: what is wrong, the exit code, and what it said."""
    folder.mkdir()
    args = given.write(folder)
    log = folder.parent / "input.log"
    child = start(args, log, folder, stop_before_stages if given.check_only else None)
    code = ended(child, PATIENCE)
    if code is None:
        kill_group(child)
    said = log.read_text(errors="replace")
    shutil.rmtree(folder)
    return verdict(given, args, code, said), code, said


def feed(inputs: list[Input], base: Path, deadline: float, *, show: bool = True) -> dict[str, Counter[str]]:
    """Counts of each kind: tried, used, refused, and what is wrong."""
    counts: dict[str, Counter[str]] = {}
    for given in inputs:
        if time.monotonic() > deadline:
            break
        wrong, code, said = attempt(given, base / "input")
        here = counts.setdefault(given.name.partition("/")[0], Counter())
        here["tried"] += 1
        if wrong is None:
            here["used" if code == 0 else "refused"] += 1
        else:
            here[wrong] += 1
            if show:
                print(f"{wrong}: {given.name}, exit code {code}\n{said[-900:]}\n", flush=True)
    return counts
