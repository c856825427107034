"""What the site changes in the pages, so that they read right both here and in a repository's browser.

Links out of ``docs/`` lead to the repository, where its address is known (``REPOSITORY``), else they are plain text;
and pages that stand at its root (the change log, CONTRIBUTING) are taken into the site by a line ``{{ FILE }}``, so
that no text is written twice.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_INCLUDED = re.compile(r"^\{\{ (\S+) \}\}$", re.M)
_OUTSIDE = re.compile(r"\[([^\[\]]+)\]\(((?:\.\./)+)(?!\.)([^)#\s]+)(#[^)\s]*)?\)")
_FROM_ROOT = re.compile(r"\]\((?!https?:|#|\.\./)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Include, then rewrite links."""
    repository, depth = (config["repo_url"] or "").rstrip("/"), page.file.src_uri.count("/")
    markdown = _INCLUDED.sub(lambda m: _at_root(m[1]), markdown)

    def outside(match: re.Match[str]) -> str:
        label, ups, path, anchor = match.groups()
        if ups.count("../") <= depth:  # still below docs/
            return match[0]
        if not repository:
            return label
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{label}]({repository}/{kind}/main/{path}{anchor or ''})"

    return _OUTSIDE.sub(outside, markdown)


def _at_root(name: str) -> str:
    """A file of the root, with its links as they are from within docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")

    def from_docs(match: re.Match[str]) -> str:
        inside = match[1].startswith("docs/")
        return f"]({match[1].removeprefix('docs/') if inside else '../' + match[1]})"

    return _FROM_ROOT.sub(from_docs, text)
