"""The rows of docs/chat.md: short human preference pairs and instructions, for a chat model of 135 million weights.

    RTO_DATA=../shared/data python experiments/chat.py rows     runs/chat/rows: pairs, held_out, prompts, ...
    rto run experiments/chat.yaml --output_dir runs/chat/run
    python experiments/chat.py read start RTO                   what two policies say, side by side in a blind order
    python experiments/chat.py read start RTO --said 12-2…      what a reader preferred is counted: 1, 2, - for none

Pairs are those of LLMBar, PandaLM and the ranked trees of Open Assistant that people labelled. A prompt stands on one
side of the split alone: PandaLM asks each of its instructions several times.
"""

import argparse
import gzip
import json
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

DATA = Path(os.environ.get("RTO_DATA", "../shared/data"))
RUNS = Path(os.environ.get("RTO_RUNS", "runs")) / "chat"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT = 200
PROMPT = 60  # tokens of an instruction, at most
TEST_PROMPTS = 128


def chat(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt: those of Open Assistant are written as "Human: … Assistant: …", the others are one."""
    turns = re.split(r"\n\n(Human|Assistant):", prompt)
    if len(turns) == 1:
        return [{"role": "user", "content": prompt}]
    roles = {"Human": "user", "Assistant": "assistant"}
    spoken = [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[1::2], turns[2::2])]
    return [turn for turn in spoken if turn["content"]]


def preference(row: dict[str, str]) -> dict[str, Any]:
    """A pair in TRL's conversational format."""
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": chat(row["prompt"]), **sides}


def human_pairs(tokenizer: PreTrainedTokenizerBase, longest: int) -> tuple[list[Any], list[Any]]:
    """Pairs to learn from, and `HELD_OUT` others of prompts that the first do not have.

    Args:
        tokenizer: that counts.
        longest: tokens of a prompt and its longer side, without the template.
    """
    text = gzip.decompress((DATA / "prefs" / "human_pairs_misc.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in text.split("\n") if line]

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    rows = [x for x in rows if size(x["prompt"]) + max(size(x["chosen"]), size(x["rejected"])) <= longest]
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(0).shuffle(prompts)
    held: set[str] = set()
    while sum(row["prompt"] in held for row in rows) < HELD_OUT:
        held.add(prompts.pop())
    learn, out = ([x for x in rows if (x["prompt"] in held) == side] for side in (False, True))
    random.Random(1).shuffle(learn)
    random.Random(2).shuffle(out)
    return learn, out[:HELD_OUT]


def instructions(tokenizer: PreTrainedTokenizerBase, taken: set[str]) -> list[str]:
    """Short instructions, each once, that no pair has."""
    text = (DATA / "prompts" / "instructions_misc.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    asked = {"\n\n".join(filter(None, (row["instruction"], row["input"]))) for row in rows} - taken
    short = sorted(x for x in asked if len(tokenizer(x, add_special_tokens=False).input_ids) <= PROMPT)
    random.Random(3).shuffle(short)
    return short


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines in the folder of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path = RUNS / "rows" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def rows(model: str, longest: int) -> None:
    """All files of rows, and how often the longer side is the preferred one: what a rule without a model gets."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    learn, held_out = human_pairs(tokenizer, longest)
    asked = instructions(tokenizer, {row["prompt"] for row in (*learn, *held_out)})
    write("pairs", map(preference, learn))
    write("held_out", map(preference, held_out))
    write("prompts", ({"prompt": chat(x)} for x in asked[TEST_PROMPTS:]))
    write("test_prompts", ({"prompt": chat(x)} for x in asked[:TEST_PROMPTS]))
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in held_out]
    print(f"held out: the longer side is preferred in {sum(longer) / len(longer):.3f} of {len(longer)} pairs")


def read(run: Path, methods: list[str], said: str) -> None:
    """Print completions of two policies to the same prompts, or count a reader's verdicts on them.

    Args:
        run: the folder of the run.
        methods: the two.
        said: a character for each prompt; "" prints the completions.
    """
    lines = (run / "evaluation" / "completions.jsonl").read_text(encoding="utf-8").split("\n")
    asked = [json.loads(line) for line in lines if line][: len(said) or None]
    coin = random.Random(4)
    first = [coin.random() < 0.5 for _ in asked]
    for i, (row, straight) in enumerate(zip(asked, first)):
        sides = [row["completions"][name] for name in (methods if straight else methods[::-1])]
        if not said:
            print(f"--- {i}: {row['prompt']}\n[1] {sides[0]}\n[2] {sides[1]}")
    if said:
        wins = [("12" if straight else "21").find(verdict) for verdict, straight in zip(said, first)]
        print({name: wins.count(i) for i, name in enumerate(methods)} | {"none": wins.count(-1)})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "read"])
    parser.add_argument("methods", nargs="*", help="two policies to read side by side")
    parser.add_argument("--said", default="", help="a reader's verdicts in the order of the prompts")
    parser.add_argument("--run", type=Path, default=RUNS / "run", help="the run to read")
    parser.add_argument("--model", default=MODEL, help="whose tokenizer counts")
    parser.add_argument("--longest", type=int, default=120, help="tokens of a prompt and its longer side")
    given = parser.parse_args()
    if given.what == "rows":
        rows(given.model, given.longest)
    else:
        read(given.run, given.methods, given.said)


if __name__ == "__main__":
    main()
