"""Programs in processes of their own that begin with everything imported: each is a fork of one process a session.

A new interpreter that imports torch, transformers, trl and peft works for seconds before a test's own work begins. One
that has imported them waits here for programs, and runs each in a fork: it has its own memory, environment, signals
and exit code, and can be killed. It has no shape checks, as a user's process has none. What `accelerate launch` and
`torchrun` do for several processes is to set the same few variables in each; tests marked slow start these themselves.
"""

import atexit
import contextlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_server: subprocess.Popen | None = None


def run(
    program: Path | str,
    *args: str,
    processes: int = 1,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Run a program, a file (or a folder with a ``__main__.py``) or Python code, to its end.

    Args:
        program: a path, or code as of ``python -c``.
        args: of the program.
        processes: how many of it; they know of each other as `torch.distributed` wants it.
        environment: this process's own when not given.
        timeout: seconds.

    Returns:
        The first exit code that is not 0, as of `subprocess`, and what all of them wrote.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        request = {
            "program": str(program),
            "code": isinstance(program, str),
            "args": list(args),
            "processes": processes,
            "environment": dict(os.environ if environment is None else environment),
            "path": [p for p in sys.path if p],
            "here": os.getcwd(),
            "folder": folder,
            "port": probe.getsockname()[1],
            "timeout": timeout,
        }
        probe.close()
        codes = _ask(request)
        out, err = ("".join(p.read_text() for p in sorted(Path(folder).glob(f"*.{name}"))) for name in ("out", "err"))
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess([str(program), *args], code, out, err)


def _ask(request: dict[str, Any]) -> list[int]:
    global _server
    if _server is None or _server.poll() is not None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        _server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        atexit.register(_end)
    assert _server.stdin is not None
    assert _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    answer = json.loads(_server.stdout.readline())
    if answer is None:
        raise subprocess.TimeoutExpired([request["program"], *request["args"]], request["timeout"])
    return answer


def _end() -> None:
    if _server is not None and _server.stdin is not None:
        _server.stdin.close()  # it ends where its input does, unless it is still at a program
        try:
            _server.wait(5)
        except subprocess.TimeoutExpired:
            _server.kill()


# --- in the process that waits


def serve() -> None:
    """Run programs until the input ends."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch

    import rto.cli
    import rto.evaluation.commands
    import rto.pipeline  # noqa: F401
    from rto import PreferenceTrainer, RTOTrainer  # noqa: F401
    from rto.trainers.supervised import SFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        children = [_fork(request, rank) for rank in range(request["processes"])]
        print(json.dumps(_ended(children, request["timeout"])), flush=True)


def _ended(children: Sequence[int], timeout: float) -> list[int] | None:
    """Exit codes; None when the time is over. Where one fails, the others are stopped, as launchers do."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        over = time.monotonic() > deadline
        if over or any(codes.values()):
            for child in set(children) - codes.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        if over:
            return None
        time.sleep(0.005)
    return [codes[child] for child in sorted(codes, key=lambda child: codes[child] == -signal.SIGKILL)]


def _fork(request: dict[str, Any], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = _program(request, rank)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _program(request: dict[str, Any], rank: int) -> int:
    """Become the program: its files, its environment, its arguments."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(request["folder"]) / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["processes"] > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["processes"]}
        world |= {"LOCAL_WORLD_SIZE": request["processes"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in world.items()})
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    os.chdir(request["here"])
    random.seed()
    program = request["program"]
    folder = "" if request["code"] else program if Path(program).is_dir() else str(Path(program).parent)
    sys.path[:] = [folder, *request["path"]]
    sys.argv = ["-c" if request["code"] else program, *request["args"]]
    try:
        if request["code"]:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), main.__dict__)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return 0


if __name__ == "__main__":
    serve()
