"""What kills and malformed inputs share: a tiny model, small settings, and a command in a process of its own."""

import importlib
import os
import pkgutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="rto-chaos-cache-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import rto
from rto.cli import main
from rto.recipe import load_recipe, resolve

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "evaluation"))  # the judge's server
WORDS = ["ab", "cab", "back", "abacus", "crab", "dab", "fable", "garb"]
QUIET = ["--report_to", "none", "--disable_tqdm", "true"]
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
"""A recipe of the whole method in seconds."""
STUDY = {
    **SMALL,
    "data.validation_prompts.rows": 4,
    "study.fractions": "[]",
    "study.scaled": "[]",
    "study.comparisons": "{}",
    "study.tune": "null",
}


def import_everything() -> None:
    """Every module of the package, so that a command in a fork of this process begins with its work."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(rto.__path__, "rto."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an optional package
                continue


def flags(settings: dict[str, Any]) -> list[str]:
    return [x for key, value in settings.items() for x in (f"--{key}", str(value))]


def build_models(folder: Path) -> dict[str, str]:
    """Folders of a policy, of another one (π_dpo) and of a reward model, of a few thousand parameters each."""
    _, tokenizer = resolve(load_recipe(None).model)(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.utils.logging.disable_progress_bar()
    scoring = LlamaConfig(**{**config.to_diff_dict(), "id2label": {0: "score"}})
    kinds = {
        "policy": (0, LlamaForCausalLM, config),
        "dpo": (1, LlamaForCausalLM, config),
        "reward": (2, LlamaForSequenceClassification, scoring),
    }
    for name, (seed, kind, own) in kinds.items():
        torch.manual_seed(seed)
        kind(own).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    policy = LlamaForCausalLM.from_pretrained(folder / "policy")
    get_peft_model(policy, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
    return {name: str(folder / name) for name in (*kinds, "adapter")}


# --- one command in a process of its own


def start(args: list[str], log: Path, folder: Path | None = None, before: Callable[[], None] | None = None) -> int:
    """The command in a forked process group; its id. Everything is imported already, so that kills hit work.

    Args:
        args: of `rto`.
        log: what it says.
        folder: where it runs; here when not given.
        before: is called in its process first.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if folder is not None:
            os.chdir(folder)
        if before is not None:
            before()
        code = run(args)
    except KeyboardInterrupt:  # a signal before the command began to listen
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(args: list[str]) -> int:
    """The exit code of the command in this process."""
    try:
        return main(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2 if stop.code else 0


def ended(child: int, seconds: float) -> int | None:
    """The exit code, or None when it is still at work after so long."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def kill_group(child: int) -> None:
    """SIGKILL for the command and all that it started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def of_group(group: int) -> list[int]:
    """Processes of a group that are at work."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended
            continue
        if int(of) == group and state != "Z":
            found.append(int(path.parent.name))
    return found
