"""A small part of ``make chaos``: the tool itself works, and a few kills and spoilt inputs come through."""

import os
import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[1] / "chaos"


def test_a_few_spoilt_inputs_end_in_a_line() -> None:
    command = [sys.executable, str(CHAOS), "--kills", "0", "--inputs", "8", "--seconds", "60", "--seed", "3"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "'tried': " in done.stdout
