"""Tables and figures as one page in the report's style: what a study and a comparison are shown as."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rto.files import plain
from rto.report.page import template
from rto.report.plots import Panel


@dataclass(frozen=True, kw_only=True)
class Titled:
    """A table under a heading; the first row holds the names of the columns, the first cell of each other its own."""

    title: str
    rows: Sequence[Sequence[str]]


def render_sheet(
    *,
    title: str,
    kind: str,
    about: Sequence[str] = (),
    tables: Sequence[Titled] = (),
    figures: Sequence[Panel] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page; cells and words are text and are escaped, but for what `bold` made.

    Args:
        title: of the page.
        kind: what it is, above the title.
        about: paragraphs below it.
        tables: those without rows are left out.
        figures: below the tables.
        notes: at the end.
    """
    return template("sheet.html.j2").render(
        title=title, kind=kind, about=about, tables=[t for t in tables if t.rows], figures=figures, notes=notes
    )


def bold(text: str) -> Markup:
    """Text in bold."""
    return Markup("<b>{}</b>").format(plain(text))
