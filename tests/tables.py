"""Tables in the docs that a test makes: it compares what is written with what it found.

``RTO_WRITE_DOCS=1 pytest ...`` writes what was found between the two comments of a table instead.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def check_table(path: Path, name: str, rows: Sequence[Mapping[str, str]]) -> None:
    """The table between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a page is the one that ``rows`` make."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    committed, found, after = rest.partition(end)
    assert found, f"{path} has no comments {start.strip()} and {end} around its table"
    made = markdown(rows)
    if os.environ.get("RTO_WRITE_DOCS"):
        path.write_text(f"{before}{start}{made}{end}{after}", encoding="utf-8")
    else:
        assert committed == made, f"{path}: the table {name} is not what was found; RTO_WRITE_DOCS=1 writes it anew"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table, their keys as its head."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[key] for key in head] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
