"""Run the steps of pages one after the other, as a reader would in one shell and one interpreter a page.

In a process of its own, since the parser of arguments rewrites the annotations of the configurations. A step is
``{"at": …, "kind": "open" | "rto" | "python" | "shell" | "write" | "set" | "assign", …}``; the first that fails
ends it, by its place.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
NAMES: dict[str, Any] = {}


def run(step: dict[str, Any]) -> None:
    match step["kind"]:
        case "open":
            os.chdir(step["folder"])
            NAMES.clear()
            NAMES["__name__"] = "__main__"
        case "rto":
            from rto.cli import main

            if code := main(step["words"]):
                raise SystemExit(f"rto {' '.join(step['words'])}: exit code {code}")
        case "python":
            exec(compile(step["text"], step["at"], "exec"), NAMES)
        case "shell":
            words = [os.path.expandvars(word) for word in step["words"]]
            last = words.index("&&") if "&&" in words else None  # what follows is done in another folder
            elsewhere = (
                last is not None or words[0] == "git"
            )  # a clone called rto beside the desk's model of this name
            with tempfile.TemporaryDirectory() as apart:
                subprocess.run(words[:last], check=True, timeout=600, cwd=apart if elsewhere else None)
        case "assign":
            (line,) = step["words"]
            name = line.partition("=")[0]
            shell = ["bash", "-ec", f'{line}; printf %s "${name}"']
            os.environ[name] = subprocess.run(shell, check=True, capture_output=True, text=True, timeout=600).stdout
        case "set":
            os.environ.update(step["variables"])
        case "write":
            Path(step["file"]).parent.mkdir(parents=True, exist_ok=True)
            Path(step["file"]).write_text(step["text"], encoding="utf-8")


if __name__ == "__main__":  # a command's own processes read this file, too
    sys.path.insert(0, "")  # as the interpreter has it: modules of the reader's folder are found
    for step in json.loads(sys.argv[1]):
        start = time.perf_counter()
        print(f"--- {step['at']} {step['kind']} {' '.join(step.get('words', [])[:4])}", file=sys.stderr, flush=True)
        run(step)
        print(f"--- {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
