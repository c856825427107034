"""Blocks of the README, of CONTRIBUTING and of the pages under docs/, and what a shell would make of them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")))
RUN, SHOWN = ("bash", "python", "yaml"), ("", "text", "json")
"""Languages of blocks that a test runs or writes, and of those that are only looked at."""
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file it stands in.
        line: of its first line of text.
        language: first word after the fence.
        title: file name that the page shows above it, in ``title="…"``; None without one.
        text: what stands in it, without the indentation of its fence.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str

    @property
    def at(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in its order."""
    text, found = (ROOT / page).read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        inside = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, language, title[1] if title else None, inside))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a block as lists of words, comments and continued lines understood.

    ``NAME=$(…)`` is one word: what a shell makes of it is the shell's to say.
    """
    lines = re.sub(r"\\\n\s*", " ", text).split("\n")
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    return [line.partition("  #")[0].strip()] if re.match(r"\w+=\$\(", line) else shlex.split(line, comments=True)
