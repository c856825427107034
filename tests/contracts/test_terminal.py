"""Whatever names, prompts, completions and messages hold, a terminal is shown text."""

import ast
import io
import logging
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

import rto
from rto.files import plain
from rto.report.table import results_table
from rto.terminal import PlainFormatter, Terminal, say

HOSTILE = "\x1b]0;title\x07[bold]name[/bold]\x9b2J\u202e\x00\r:smile:\x1b[31m"
SHOWN = "␛]0;title␇[bold]name[/bold]\\x9b2J\\u202e␀␍:smile:␛[31m"
SOURCES = sorted(Path(rto.__file__).parent.rglob("*.py"))


def printed(thing: object) -> str:
    out = io.StringIO()
    Terminal(file=out, width=200).print(thing)
    return out.getvalue()


def table(**kwargs: str) -> Table:
    found = Table(HOSTILE, **kwargs)
    found.add_row(HOSTILE)
    found.add_row(Text(HOSTILE, "bold"))
    return found


@pytest.mark.parametrize(
    "thing",
    [HOSTILE, Text(HOSTILE), table(title=HOSTILE), table(caption=HOSTILE), Panel(HOSTILE, title=Text(HOSTILE))],
    ids=["text", "styled", "title", "caption", "panel"],
)
def test_what_a_terminal_prints_is_text(thing: object) -> None:
    out = printed(thing)
    assert "[bold]name[/bold]" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_results_of_hostile_names_are_text() -> None:
    results = {"gold": HOSTILE, "baseline": HOSTILE, "prompts": 8, "methods": {HOSTILE: {"gold": 1.0, "gold_se": 0.1}}}
    out = printed(results_table(results))
    assert "[bold]name[/bold]" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_styles_of_our_own_and_progress_stay() -> None:
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=True, color_system="truecolor", width=200)
    console.print(Text(HOSTILE, "bold"))
    assert "\x1b[1m" in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert list(track([1], "working", console=console)) == [1]


def test_lines_and_the_log_are_text(capsys: pytest.CaptureFixture) -> None:
    say(f"one\n{HOSTILE}")
    assert capsys.readouterr().out == f"one\n{SHOWN}\n"
    record = logging.LogRecord("rto", logging.WARNING, "", 1, "%s", (HOSTILE,), None)
    assert "\x1b" not in PlainFormatter("%(message)s").format(record)
    assert plain("a\tb\r\nc") == "a    b\nc"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_nothing_prints_past_it(path: Path) -> None:
    """No other console is made, and nothing but a constant or a signal's name goes through ``print``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    assert path.name == "terminal.py" or "Console" not in named
    if path.name not in ("signals.py", "cli.py", "vllm_server.py"):
        assert "print" not in named
