"""Every relative link of the README, CONTRIBUTING, the change log and the docs leads to something.

`make docs` checks the links of the site; this holds for a repository's browser as well, and in seconds.
"""

import re
from pathlib import Path

import pytest
import yaml
from pages import ROOT

import rto

FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.S | re.M)


def anchors(path: Path) -> set[str]:
    """What a repository's browser calls the headings of a page."""
    text = path.read_text(encoding="utf-8")
    if included := re.fullmatch(r"\{\{ (\S+) \}\}\n", text):
        text = (ROOT / included[1]).read_text(encoding="utf-8")
    text = FENCE.sub("", text)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{path.name} links to {target}, which is not there"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{path.name} links to {target}, and {there.name} has no such heading"


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: rto\.(\w+)$", page, re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(rto.__all__)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(text.replace("!ENV ", ""))["nav"]  # a tag of mkdocs' own

    def pages(tree: object) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        children = tree.values() if isinstance(tree, dict) else tree
        return [page for child in children for page in pages(child)]

    written = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages(nav)) == written
